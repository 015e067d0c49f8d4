"""The device table: kinds that no size was measured for are refused by name, before any work."""

import pytest
import torch

from qquant import devices
from qquant.cli import main
from qquant.errors import EnvironmentMissingError, UsageError


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_free_memory_of_a_card_is_no_more_than_it_has(name):
    _, total = torch.cuda.mem_get_info()
    assert 0 < devices.free_memory(torch.device(name)) <= total
