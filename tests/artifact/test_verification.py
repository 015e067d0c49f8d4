"""`verify`, `doctor`, converted pickles, and the order of syncs and renames."""

import collections
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import doctor
from qquant.algorithms.checksum import checksum, checksum_of
from qquant.artifact import verification
from qquant.disk.digest import sha256_of
from qquant.disk.output import MANIFEST
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.source import confined, pickles
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint
from tests.test_faults import build, load_recipe, make_checkpoint
from tests.torture import digests
from tests.worlds import ROOT

assert build, make_checkpoint
CHILD = confined.CHILD


@pytest.mark.parametrize("count", [0, 1, 7, 1024, 3 << 10, (1 << 20) + 1025])
def test_a_checksum_is_a_sum_over_bits_and_places(count):
    """Whatever pieces it is computed in; -0 counts as 0, and so does nothing else."""
    value = torch.randn(count, generator=torch.Generator().manual_seed(1))
    place = torch.arange(count) * 0x1E3779B97F4A7C15 | 1
    total = int((value.view(torch.int32).long() * place).sum())
    assert checksum(value) == f"{total % (1 << 64):016x}"
    assert checksum_of(value.split(1023)) == checksum(value)
    assert checksum(-torch.zeros(count)) == checksum(torch.zeros(count))
    if count > 1:
        assert checksum(value.flip(0)) != checksum(value)


# --- verify ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(make_checkpoint, build):
    return build(make_checkpoint(), "gptq-int4", "awq", "gguf-q4_0")[1]


def resign(folder):
    """Make the manifest's hashes those of the files, as somebody would who changed them on purpose."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["artifacts"].values():
        for name in entry["files"]:
            path = folder / name
            entry["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_verify_finds_what_was_changed(made):
    """I1 from the outside, one folder for all kinds of change."""
    for folder, linears in (("model-GPTQ-Int4", 14), ("model-AWQ", 14), ("model-GGUF", 14)):
        some, whole = verification.verify(made / folder), verification.verify(made / folder, deep=True)
        assert (some.tensors, some.digests, some.unlisted) == (4, 4, ())
        assert whole.digests == linears
        assert whole.tensors > linears
    folder = made / "model-GPTQ-Int4"
    path = folder / "model.safetensors"
    tensors, before = load_file(path), path.read_bytes()

    def changed(name, change):
        copy = {key: value.clone() for key, value in tensors.items()}
        change(copy[name])
        save_file(copy, path, {"format": "pt"})

    for file in json.loads((folder / MANIFEST).read_text())["artifacts"]["gptq-int4"][
        "files"
    ]:  # one bit, the same size
        kept = (folder / file).read_bytes()
        (folder / file).write_bytes(kept[:-9] + bytes([kept[-9] ^ 1]) + kept[-8:])
        with pytest.raises(InputError, match=rf"{re.escape(file)}: does not match"):
            verification.verify(folder)
        (folder / file).write_bytes(kept)
    changed("model.norm.weight", lambda value: value.fill_(float("nan")))
    with pytest.raises(InputError, match=r"model\.safetensors: does not match"):
        verification.verify(folder)
    resign(folder)
    verification.verify(folder)  # the sample has no norms
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        verification.verify(folder, deep=True)
    changed("model.layers.1.mlp.up_proj.qweight", lambda value: value.view(-1)[5:6].bitwise_xor_(1))
    resign(folder)
    with pytest.raises(InputError, match=r"up_proj\.weight: dequantizes to other values"):
        verification.verify(folder, deep=True)
    short = {name: value for name, value in tensors.items() if name != "model.layers.1.mlp.up_proj.scales"}
    save_file(short, path, {"format": "pt"})
    resign(folder)
    with pytest.raises(InputError, match=r"up_proj\.scales is missing"):
        verification.verify(folder)
    path.write_bytes(before)
    (folder / "notes.txt").write_text("mine")
    resign(folder)
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/config.json.metadata").write_text("of a download")
    (folder / ".gitattributes").write_text("* text")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("of a clone")
    assert verification.verify(folder).unlisted == ("notes.txt",)
    path.rename(made / "elsewhere")
    path.symlink_to(made / "elsewhere")
    with pytest.raises(InputError, match="link out of its folder"):
        verification.verify(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match="holds no qquant-manifest"):
        verification.verify(folder)


def test_security_names_tests_that_exist():
    root = ROOT
    named = set(re.findall(r"`(test_\w+)`", (root / "SECURITY.md").read_text()))
    there = {
        name for path in root.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named <= there


# --- doctor ---------------------------------------------------------------------------------------------------------------


def test_doctor_leaves_nothing_and_finds_nothing_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    found = list(doctor.examine(tmp_path / "new" / "out", torch.device("cpu")))
    assert {finding.state for finding in found} <= {"ok", "warning"}
    assert not list(tmp_path.iterdir())
    assert "hf_secret" not in str(found)
    assert {"rename and sync", "lock", "product in float32", "hub"} <= {finding.name for finding in found}


@pytest.mark.parametrize(
    ("owner", "name", "number", "title", "state"),
    [
        (os, "fsync", errno.EINVAL, "write and sync", "failure"),
        (os, "rename", errno.EPERM, "rename and sync", "failure"),
        (doctor.fcntl, "flock", errno.ENOLCK, "lock", "failure"),
        (os, "link", errno.EPERM, "hard links", "warning"),
        (os, "posix_fallocate", errno.EOPNOTSUPP, "preallocate", "warning"),
    ],
)
def test_doctor_tells_what_a_file_system_lacks(tmp_path, monkeypatch, owner, name, number, title, state):
    """F31."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, name, refuse)
    found = {finding.name: finding for finding in doctor.folder(tmp_path)}
    monkeypatch.undo()
    assert found[title].state == state
    assert found[title].text == os.strerror(number)


def test_doctor_finds_a_device_that_rounds(monkeypatch):
    """F29: TF32 keeps 10 bits of the mantissa."""
    real = torch.Tensor.to

    def rounded(self, *rest):
        value = real(self, *rest)
        short = value.is_floating_point() and rest == (torch.device("cpu"),)
        return (value.view(torch.int32) >> 13 << 13).view(torch.float32) if short else value

    monkeypatch.setattr(torch.Tensor, "to", rounded)
    assert next(doctor.numbers(torch.device("cpu"))).state == "failure"


def test_doctor_exits_6(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from qquant.cli import cli

    assert CliRunner().invoke(cli, ["doctor", "--out", str(tmp_path), "--device", "cpu", "--json"]).exit_code == 0
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli, ["doctor", "--out", str(tmp_path / "file"), "--device", "cpu"])
    assert isinstance(done.exception, EnvironmentMissingError)


# --- F15: pickles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(tmp_path):
    """A checkpoint whose weights are in two .bin files."""
    folder = write_checkpoint(tmp_path / "Old-Chat", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weights = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weights |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return folder, tensors


def test_pickles_are_converted_once_beside_the_output(pickled, tmp_path, monkeypatch):
    folder, tensors = pickled
    before = digests(folder)
    with pytest.raises(InputError, match="--allow-pickle"):
        Checkpoint.open(folder)
    made = pickles.converted(folder, tmp_path / "out")
    checkpoint = Checkpoint.open(made)
    assert checkpoint.name == "Old-Chat"
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in tensors.items())
    assert digests(folder) == before
    assert made.is_relative_to(tmp_path / ".out.converted")
    convert = pickles._convert
    monkeypatch.setattr(pickles, "_convert", None)  # would fail
    assert pickles.converted(folder, tmp_path / "out") == made
    monkeypatch.setattr(pickles, "_convert", convert)
    file = next(made.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    pickles.converted(folder, tmp_path / "out")
    assert all(torch.equal(Checkpoint.open(made).tensor(name), value) for name, value in tensors.items())


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.marker,)


def evil_global(path):
    torch.save({"a": Evil()}, path)


def evil_protocol(path):
    torch.save({"a": Evil()}, path, pickle_protocol=4)


def legacy(path):
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def compressed(path):
    torch.save({"a": torch.zeros(9)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries.items():
            new.writestr(name, content)


def no_tensors(path):
    torch.save([torch.zeros(2)], path)


def truncated(path):
    torch.save({"a": torch.zeros(99)}, path)
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("write", [evil_global, evil_protocol, legacy, compressed, no_tensors, truncated])
def test_strange_pickles_are_refused_and_nothing_runs(make_checkpoint, tmp_path, write):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    Evil.marker = str(tmp_path / "was here")
    write(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        pickles.converted(folder, tmp_path / "out")
    assert not (tmp_path / "was here").exists()


def test_an_index_of_pickles_names_files_of_its_folder_only(pickled, tmp_path):
    folder, _ = pickled
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(InputError, match="is not the plain name"):
        pickles.converted(folder, tmp_path / "out")


IN_CHILD = "import sys, runpy; child = runpy.run_path(sys.argv[1]); "


def in_child(code, *arguments):
    return subprocess.run(
        [sys.executable, "-I", "-c", IN_CHILD + code, str(CHILD), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL(None)",
        "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
        "open('/dev/null', 'w')",
        "try:\n  import socket; socket.socket()\nexcept BaseException:\n  print('caught')",
    ],
)
def test_the_child_may_not(code):
    done = in_child(
        f"exec({'import socket, subprocess, os, ctypes, pickle'!r}); sys.addaudithook(child['guard']); exec({code!r})"
    )
    assert done.returncode == 1
    assert "it asks for" in done.stderr
    assert "caught" not in done.stdout


def test_the_child_has_limits():
    done = in_child("child['limit'](0); x = bytearray(64 << 30)")
    assert "MemoryError" in done.stderr
    done = in_child(
        "import resource; child['limit'](10**9); print(resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_FSIZE)[0])"
    )
    assert done.stdout.split() == ["170", str(2 * 10**9 + (1 << 20))]


def test_the_child_has_no_network():
    if subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no network namespaces here; the audit hook is what is left")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        connect = "import socket; socket.create_connection(('127.0.0.1', int(sys.argv[2])), 2); print('through')"
        assert "through" in in_child(connect, port).stdout
        assert "through" not in in_child("child['leave_the_network'](); " + connect, port).stdout


# --- strace: fsync, rename, fsync ---------------------------------------------------------------------------------------------

BUILD = """
import sys, torch
from pathlib import Path
from qquant import pipeline, recipe
from qquant.source.checkpoint import Checkpoint
from qquant.checks import loading
from qquant.plan.plan import Plan
from qquant.progress import Quiet
loading.examine = lambda *_, **__: loading.Loaded({})
loaded, checkpoint = recipe.load(sys.argv[1]), Checkpoint.open(sys.argv[2])
for only in (["gguf-q4_0"], ["gguf-q4_0", "gguf-q8_0", "gptq-int4"]):
    plan = Plan.of(loaded, checkpoint, only)
    pipeline.build(loaded, checkpoint, plan, Path(sys.argv[3]), torch.device("cpu"), Quiet())
"""
CALL = re.compile(
    r"(?P<name>write|pwrite64|ftruncate|fsync|fdatasync)\(\d+<(?P<path>[^>]+)>|(?P<moved>rename\w*)\((?P<rest>.*)\)\s+= 0"
)


def calls(trace):
    for line in trace.splitlines():
        found = CALL.search(line)
        if found and found["name"]:
            yield found["name"], found["path"], ""
        elif found:
            old, new = re.findall(r'"([^"]+)"', found["rest"])
            yield "rename", old, new


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_every_rename_is_preceded_and_followed_by_a_sync(make_checkpoint, tmp_path):
    """Of what is renamed, every byte was synced after it was written; then the folder of the new name is synced before anything else."""
    folder, out, trace = make_checkpoint(), tmp_path / "out", tmp_path / "trace"
    load_recipe(tmp_path, ["gguf-q4_0", "gguf-q8_0", "gptq-int4"])
    watched = "write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2"
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={watched}", "-o", str(trace)]
    arguments = [sys.executable, "-c", BUILD, str(tmp_path / "test.yaml"), str(folder), str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and "permitted" in done.stderr:
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr[-2000:]
    unsynced, waiting, seen = set(), None, collections.Counter()
    for name, path, new in calls(trace.read_text()):
        if not path.startswith(str(out)) or path.endswith("/lock"):
            continue
        if waiting:
            assert name == "fsync" and path == waiting, f"{name} {path} before the sync of {waiting}"  # noqa: PT018
            waiting = None
        if name in ("write", "pwrite64", "ftruncate"):
            unsynced.add(path)
        elif name in ("fsync", "fdatasync"):
            unsynced.discard(path)
        else:
            assert not {p for p in unsynced if p == path or p.startswith(path + "/")}, f"{path} is renamed unsynced"
            waiting = str(Path(new).parent)
            seen[Path(new).name] += 1
    assert not unsynced
    assert waiting is None
    assert seen["model-GGUF"] >= 3  # made, put aside, replaced
    assert seen["report.json"] == 2
    assert seen[MANIFEST] >= 3
