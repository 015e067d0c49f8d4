"""The device table: kinds that no size was measured for are refused by name, before any work."""

import os
import subprocess
import sys

import pytest
import torch

from qquant import devices
from qquant.cli import main, together
from qquant.errors import EnvironmentMissingError, UsageError
from qquant.ranks import Membership, Ranks


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "meta"])
def test_a_kind_without_sizes_is_refused_by_name(name):
    with pytest.raises(UsageError, match=rf"--device {name}: qquant computes on cpu and cuda only"):
        devices.named(name)


def test_what_is_no_device_is_said():
    with pytest.raises(UsageError, match="--device gpu: not a device; give cpu, cuda, cuda:1, or auto"):
        devices.named("gpu")


def test_a_card_that_is_not_there(monkeypatch):
    with pytest.raises(EnvironmentMissingError, match=r"--device cuda:7: this torch .* sees no .*CUDA device"):
        devices.named("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EnvironmentMissingError, match="sees no such CUDA device"):
        devices.named("cuda:2")


def test_mps_on_the_command_line_is_one_line(demo, tmp_path, capsys):
    """A laptop's own graphics: it ended in a KeyError of a size table, in the middle of a build."""
    with pytest.raises(SystemExit) as ended:
        main(["build", "--recipe", "demo", "--device", "mps", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "--device mps: qquant computes on cpu and cuda only; give cpu, cuda, or auto" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_cores_are_those_of_the_process():
    given = os.sched_getaffinity(0)
    assert devices.cores() == len(given)
    try:
        os.sched_setaffinity(0, {min(given)})
        assert devices.cores() == 1
    finally:
        os.sched_setaffinity(0, given)


def test_ranks_of_a_host_share_its_cores_and_those_with_a_gpu_use_them(monkeypatch):
    """Launchers give each rank one thread, which is right where ranks compute on the CPU: bytes depend on it there."""
    member = Membership(rank=5, world=8, local=1, beside=4)
    monkeypatch.setattr(devices, "_sharing", member.beside)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(14), raising=False)
    assert devices.cores() == 3
    spread = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert together.device_of("cpu", Ranks(member)) == torch.device("cpu")
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        assert together.device_of("auto", Ranks(member)) == torch.device("cuda:1")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(spread)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_free_memory_of_a_card_is_no_more_than_it_has(name):
    _, total = torch.cuda.mem_get_info()
    assert 0 < devices.free_memory(torch.device(name)) <= total


def a_mixed_bag(device):
    """Tensors of several kinds, of which some are not contiguous."""
    some = torch.arange(24, device=device).view(4, 6)
    return {"as it is": some.float(), "turned": some.bfloat16().T, "every other": some[:, ::2], "none": some[:0].half()}


def test_copies_for_the_host_are_contiguous_and_say_what_was_there():
    values = a_mixed_bag("cpu")
    copies = devices.to_host(values)()
    assert list(copies) == list(values)
    for name, value in values.items():
        assert copies[name].is_contiguous()
        assert copies[name].dtype == value.dtype
        assert torch.equal(copies[name], value)
    assert devices.to_host({})() == {}


@pytest.mark.gpu
def test_copies_from_a_card_are_made_while_the_caller_goes_on():
    """What is written over on the card after they were asked for does not reach them, and none is used before it is whole."""
    values = a_mixed_bag("cuda") | {"large": torch.randn(1 << 24, device="cuda")}
    wanted = {name: value.cpu() for name, value in values.items()}
    wait = devices.to_host(values)
    for value in values.values():
        value.zero_()
    for name, copied in wait().items():
        assert copied.device == torch.device("cpu")
        assert copied.is_contiguous()
        assert torch.equal(copied, wanted[name])


FREED = """
import re
from pathlib import Path
import torch
from qquant import devices

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

large = torch.ones(1 << 22)  # 16 MB: pieces of as much come from an arena, once it is freed
del large
devices.return_freed(torch.device("cpu"))
pieces = [torch.ones(1 << 18) for _ in range(64)]
behind = torch.ones(1 << 16)
del pieces
kept = resident()
devices.return_freed(torch.device("meta"))  # which has memory of its own
still = resident()
devices.return_freed(torch.device("cpu"))
print(kept - still, kept - resident())
"""


@pytest.mark.skipif(not devices._malloc_trim(), reason="GNU's allocator alone keeps what was freed")
def test_what_was_freed_goes_back_to_the_system():
    """64 MB in pieces of 1 MB, with one in use behind them: the allocator kept them all."""
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    elsewhere, here = map(int, run.stdout.split())
    assert elsewhere < 10
    assert here > 50


def test_a_build_returns_what_was_freed_between_its_stages(make_checkpoint, build, monkeypatch):
    """After every block forth and back, stage, block that was solved, and block of a model that is checked."""
    times = []
    monkeypatch.setattr(devices, "_malloc_trim", lambda: times.append)
    build(make_checkpoint(), "gptq-int4")
    layers, stages, models = 2, 4, 2
    assert len(times) == layers * (2 + stages + 1 + models)
