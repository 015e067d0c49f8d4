"""Loading in a clean process: what loads, what does not and why, and that one bad artifact does not hide the others."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import background, devices, pipeline
from qquant.checks import loading, loading_child, review
from qquant.errors import NumericalError
from qquant.formats.gguf.container import header_bytes, read_header
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.source.checkpoint import Checkpoint
from tests.worlds.watched import Told

quiet = Quiet()

CPU = torch.device("cpu")
SLEEP = "import time; time.sleep(99)"


def watched_subprocess(popen):
    """The library with another way to start a child."""
    return SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)


def batched(words):
    """(what, path) of each part that a child is asked for."""
    return zip(words[::2], words[1::2], strict=True)


@pytest.fixture(scope="module")
def paths(built):
    """A GPTQ folder, an AWQ folder and a GGUF file."""
    return [next(built[1].glob(pattern)) for pattern in ("*-Int4", "*-AWQ", "*-GGUF/*.gguf")]


def copied(origin, target, change):
    shutil.copytree(origin, target)
    change(target)
    return target


def edit_json(name, **entries):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def faults(paths, stop=None, children=1, **options):
    return loading.examine(paths, None, stop, children, **options).faults


def without_scales(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_parts_that_load_are_told_as_they_do(paths):
    progress = Told()
    assert loading.examine(paths[:2], None, progress=progress).faults == {}
    progress.require_whole("load")
    told = {done for done, _ in progress.steps["load"]}
    assert told & {1, 2, 3}, "a child says each part when it is loaded"
    assert progress.steps["load"].count((4, 4)) == 1, (
        "the phase ended with the last word of the child, and again with the child"
    )


@pytest.mark.parametrize("children", [1, 2])
def test_what_is_broken_is_named_and_hides_nothing(paths, tmp_path, children):
    """Good ones before, between and after bad ones, in one call."""
    gptq, awq, gguf = paths
    number = copied(gptq, tmp_path / "number", edit_json("config.json", attention_dropout="much"))
    tensor = copied(awq, tmp_path / "tensor", without_scales)
    found = faults([gptq, number, awq, tensor, gguf], children=children)
    assert list(found) == [number, tensor]
    assert "attention_dropout" in found[number]
    assert "up_proj" in found[tensor]


def test_the_process_is_clean_and_bounded(paths, monkeypatch):
    """Nothing of the parent is imported there; what takes too long, or dies, is a finding."""
    gptq, _, gguf = paths
    asked = []

    def popen(command, **options):
        asked.append((command, options))
        script = (
            "import time; print('a line\\n' * 3, end='', flush=True); time.sleep(99)" if len(command) == 13 else SLEEP
        )
        return subprocess.Popen([sys.executable, "-c", script], stdout=options["stdout"], stderr=options["stderr"])

    monkeypatch.setattr(loading, "subprocess", watched_subprocess(popen))
    monkeypatch.setattr(loading, "BYTES_A_SECOND", 10**12)
    assert faults([gptq, gguf], seconds=1) == {gguf: "not loaded after 5 s"}
    assert asked[0][1]["cwd"] == "/"
    assert asked[0][1]["env"]["HF_HUB_OFFLINE"] == "1"
    assert asked[0][1]["env"]["CUDA_VISIBLE_DEVICES"] == ""

    def dying(command, **options):
        script = "import os; os.kill(os.getpid(), 11)"
        return subprocess.Popen([sys.executable, "-c", script], stdout=options["stdout"], stderr=options["stderr"])

    monkeypatch.setattr(loading, "subprocess", watched_subprocess(dying))
    assert faults([gptq]) == {gptq: "the process died of SIGSEGV"}


@pytest.fixture
def children(monkeypatch):
    """Children that sleep for long, as they are started."""
    found = []

    def popen(command, **options):
        pipes = {name: options[name] for name in ("stdout", "stderr")}
        found.append(subprocess.Popen([sys.executable, "-c", SLEEP], **pipes))
        return found[-1]

    monkeypatch.setattr(loading, "subprocess", watched_subprocess(popen))
    return found


def test_a_child_that_is_no_longer_wanted_is_ended(children):
    with background.start_early(partial(faults, [Path("a"), Path("b")]), threaded=True):
        while not children:
            time.sleep(0.01)
    assert [child.returncode for child in children] == [-9]


def test_several_children_share_artifacts_cores_and_memory(paths, monkeypatch):
    """Each has about as many bytes to load, and says how many there are, so that each takes only its part of the free memory."""
    asked = []

    def popen(command, **options):
        asked.append((command[3:], options["env"].get("OMP_NUM_THREADS")))
        script = f"print({chr(10)!r} * {(len(command) - 5) // 2}, end='')"
        return subprocess.Popen([sys.executable, "-c", script], stdout=options["stdout"], stderr=options["stderr"])

    monkeypatch.setattr(loading, "subprocess", watched_subprocess(popen))
    monkeypatch.setattr(devices, "cores", lambda: 6)
    monkeypatch.setattr(loading, "CARD", 1)
    assert faults(paths, children=2) == {}
    assert {threads for _, threads in asked} == {"3"}
    assert {tuple(words[:2]) for words, _ in asked} == {("2", "cpu")}
    shares = [list(batched(words)) for (_, _, *words), _ in asked]
    assert sorted(part for share in shares for part in share) == sorted(
        (what, str(path)) for what in ("metadata", "weights") for path in paths
    )
    sizes = [sum(loading.size_of(Path(path)) for what, path in share if what == "weights") for share in shares]
    assert max(sizes) == max(loading.size_of(paths[0]), sum(map(loading.size_of, paths[1:])))


def test_the_vocabulary_of_a_gguf_file_is_no_childs_last_part(paths):
    """Of eleven artifacts one child went on with it for thirteen seconds after all others had ended."""
    tasks = [loading.LoadTask(what, path) for path in paths for what in ("metadata", "weights")]
    shares = loading._dealt(tasks, 3)
    (alone,) = (share for share in shares if loading.LoadTask("metadata", paths[2]) in share)
    assert alone == [loading.LoadTask("metadata", paths[2])]
    assert sorted(part for share in shares for part in share) == sorted(tasks)


def test_metadata_of_gguf_files_that_differ_in_type_alone_is_read_once(paths, tmp_path, monkeypatch):
    """And what is wrong with it is a finding about each of them."""
    gguf = paths[2]
    header = read_header(gguf)

    def written(title, **values):
        fields = [replace(field, value=values.get(field.key[8:], field.value)) for field in header.fields.values()]
        tensors = [(tensor.name, tensor.shape, tensor.type_id, tensor.nbytes) for tensor in header.tensors.values()]
        path = tmp_path / title
        path.write_bytes(header_bytes(fields, tensors)[0] + gguf.read_bytes()[header.data :])
        return path

    other, named = written("other.gguf", file_type=7), written("named.gguf", name="another name")
    asked = []

    def popen(command, **options):
        asked.extend(batched(command[5:]))
        script = "raise SystemExit('no such tokenizer')" if command[5] == "metadata" else f"print({chr(10)!r} * 9)"
        return subprocess.Popen([sys.executable, "-c", script], stdout=options["stdout"], stderr=options["stderr"])

    monkeypatch.setattr(loading, "subprocess", watched_subprocess(popen))
    found = faults([gguf, other, named], children=8)
    assert sorted(path for what, path in asked if what == "metadata") == sorted([str(gguf), str(named)])
    assert sorted(path for what, path in asked if what == "weights") == sorted(map(str, [gguf, other, named]))
    assert found == dict.fromkeys([gguf, other, named], "no such tokenizer")


def test_a_child_takes_its_part_of_the_memory(paths, monkeypatch):
    whole = loading.size_of(paths[0]) * 10
    monkeypatch.setattr(loading_child.os, "sysconf", lambda name: whole if name == "SC_AVPHYS_PAGES" else 1)
    assert loading_child.weights(paths[0], children=3)["loaded"] == "whole model"
    assert loading_child.weights(paths[0], children=4)["loaded"] == "first block"


@pytest.mark.parametrize("device", [torch.device("cuda"), torch.device("cuda", 1)])
def test_weights_go_onto_the_card_where_it_has_room_for_them_beside_the_check(paths, device, monkeypatch):
    """For as many artifacts as are loaded at a time; the largest of them may come together."""
    sizes = sorted((loading.size_of(path) for path in paths), reverse=True)
    needed = int(loading.COPIES * sum(sizes[:2]) / loading.BESIDE)
    monkeypatch.setattr(devices, "_free_on_card", lambda device: needed)
    assert loading.card_or_cpu(paths, device, 2) == str(device)
    assert loading.card_or_cpu(paths, device, 3) == "cpu"
    monkeypatch.setattr(devices, "_free_on_card", lambda device: needed - 1)
    assert loading.card_or_cpu(paths, device, 2) == "cpu"
    assert loading.card_or_cpu(paths, CPU, 1) == "cpu"


def test_a_card_that_cannot_be_had_or_is_short_leaves_the_weights_to_the_cpu(paths, monkeypatch):
    loads, there = [], [False, True]
    whole = loading_child._whole

    def short(path, device):
        loads.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("of the card")
        return whole(path, device)

    monkeypatch.setattr(loading_child, "_whole", short)
    monkeypatch.setattr(loading_child, "_there", lambda device: there.pop(0))
    for _ in range(2):
        assert loading_child.weights(paths[0], device="cuda:1")["on"] == "cpu"
    assert loads == ["cpu", "cuda:1", "cpu"]


def test_what_fails_on_the_card_for_another_reason_is_a_finding(paths, monkeypatch):
    def broken(path, device):
        raise RuntimeError(f"an illegal address on {device}")

    monkeypatch.setattr(loading_child, "_whole", broken)
    monkeypatch.setattr(loading_child, "_there", lambda device: True)
    with pytest.raises(RuntimeError, match="illegal address on cuda:0"):
        loading_child.weights(paths[0], device="cuda:0")


def test_a_child_is_told_the_device_and_may_see_it(paths, monkeypatch):
    """One that waits and one that is started then; on a CPU no child sees a card."""
    seen = []

    def popen(command, **options):
        seen.append((command[3:5], options["env"].get("CUDA_VISIBLE_DEVICES", "all")))
        script = "import sys; print(input(), file=sys.stderr)" if options["stdin"] else "print(chr(10) * 9)"
        return subprocess.Popen([sys.executable, "-c", script], **{**options, "env": None})

    card = torch.device("cuda", 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_free_on_card", lambda device: 1 << 40)
    monkeypatch.setattr(loading, "subprocess", watched_subprocess(popen))
    with loading.waiting(1, gpu=True) as idle:
        found = loading.examine(paths[:1], None, idle=idle, device=card).faults
    assert found[paths[0]].startswith('[null, "1", "cuda:2", "metadata"')
    assert loading.examine(paths[:1], None, device=card).faults == {}
    assert seen == [(["-"], "all"), (["1", "cuda:2"], "all"), (["1", "cuda:2"], "all")]


def test_a_child_that_cannot_be_started_ends_the_others(children, monkeypatch):
    start, calls = loading.subprocess.Popen, count()

    def once(command, **options):
        if next(calls):
            while not children:
                time.sleep(0.01)
            raise OSError("no more processes")
        return start(command, **options)

    monkeypatch.setattr(loading.subprocess, "Popen", once)
    with pytest.raises(OSError, match="no more"):
        faults([Path("a"), Path("b")], children=2)
    assert [child.returncode for child in children] == [-9]


def test_a_child_does_not_outlive_an_interrupt(children, monkeypatch):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        faults([Path("a")])
    assert [child.returncode for child in children] == [-9]


def test_a_child_that_waits_loads_what_it_is_told(paths, monkeypatch):
    """And one that nobody took, or that died while it waited, changes nothing."""
    with loading.waiting(3) as idle:
        left, taken, dead = idle
        dead.kill()
        dead.wait()
        monkeypatch.setattr(loading, "_started", None)  # no other is started
        assert loading.examine([paths[0]], None, children=1, idle=idle).faults == {}
        assert idle == [left]
    assert taken.returncode == 0
    assert left.returncode == -9


def test_a_child_that_waits_finds_what_does_not_load(paths, tmp_path):
    broken = copied(paths[0], tmp_path / "broken", edit_json("config.json", attention_dropout="much"))
    with loading.waiting(1) as idle:
        found = loading.examine([broken], None, idle=idle).faults
    assert list(found) == [broken]


def test_a_check_that_fails_meanwhile_ends_the_child(built, paths, children, monkeypatch):
    """As on a GPU; and a check that does not fail says the same as one that waits first."""
    monkeypatch.setattr(review, "loading", loading)
    monkeypatch.setattr(devices, "threads_help", lambda device: True)

    def fail(*_):
        while not children:
            time.sleep(0.01)
        raise NumericalError("not finite")

    monkeypatch.setattr(review, "_read", fail)
    checks, gates = Checks(windows=2, length=32), Gates(defaults=False)
    with pytest.raises(NumericalError):
        pipeline.check([paths[0]], Checkpoint.open(built[0]), checks, gates, CPU, quiet)
    assert [child.returncode for child in children] == [-9]


def test_loading_beside_the_check_finds_the_same(built, paths, monkeypatch):
    checks, gates, told = Checks(windows=2, length=32), Gates(defaults=False), {paths[1]: "why"}
    monkeypatch.setattr(review.loading, "examine", lambda *_, **__: loading.Loaded(told))
    reports = []
    for threaded in (False, True):
        monkeypatch.setattr(devices, "threads_help", lambda device, threaded=threaded: threaded)
        reports.append(pipeline.check(paths, Checkpoint.open(built[0]), checks, gates, CPU, quiet))
    assert reports[0].to_json() == reports[1].to_json()
    assert "does not load in a clean process: why" in reports[0].artifacts[1].verdict.reasons


def test_a_check_fails_what_does_not_load(built, paths, tmp_path, monkeypatch):
    folder, gptq = built[0], paths[0]
    monkeypatch.setattr(review, "loading", loading)
    broken = copied(gptq, tmp_path / "broken", edit_json("config.json", attention_dropout="much"))
    gates = Gates(defaults=False)
    report = pipeline.check([broken, gptq], Checkpoint.open(folder), Checks(windows=2, length=32), gates, CPU, quiet)
    first, second = (artifact.verdict for artifact in report.artifacts)
    assert [reason for reason in first.reasons if reason.startswith("does not load in a clean process")]
    assert second.outcome == "pass"


@pytest.mark.parametrize(
    ("cores", "artifacts", "expected"), [(16, 1, 3), (16, 11, 8), (64, 11, 23), (4, 11, 2), (1, 1, 1)]
)
def test_a_build_starts_the_children_that_will_load_its_artifacts(monkeypatch, cores, artifacts, expected):
    """Each imports for 12 seconds before it loads anything: of eleven artifacts three were started, and five imported while a check waited."""
    monkeypatch.setattr(devices, "cores", lambda: cores)
    assert loading.children(artifacts) == expected
    assert loading.early(artifacts, torch.device("cuda")) == expected
    assert loading.early(artifacts, torch.device("cpu")) == 0
