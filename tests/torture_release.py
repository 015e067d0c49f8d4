"""Commands after a build that are killed and starved: python -m tests.torture_release [KILLS] [SEED] prints one JSON line of what happened.

    check      writes its report and evidence                     sign    writes a signature (by a stand-in for the library)
    publish    into a folder; to the stand-in for a hub            patch   one setting in the repositories there
    verify     reads, and changes nothing

Each command gets SIGKILL KILLS times, at a random time or before a random call that changes the file system; then each such call fails once with
ENOSPC, EIO or a short write, n = 1, 2, ... until the command passes untouched. After each: what stands under a final name is whole, the
same command finishes, and what it leaves is what an undisturbed one does. A hub never shows half a release.
"""

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from huggingface_hub import HfApi

from qquant import pipeline
from qquant.artifact import verification
from qquant.artifact.manifest import SIGNATURE, verify_files
from qquant.errors import QQuantError
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.release import card, hub, signing, statements
from qquant.release.repository import complete, read_release
from tests.torture import BUG, NARROW, QUICK, Range, append, digests
from tests.worlds.hub_release import Waits
from tests.worlds.hub_server import TOKEN, serve

CHANGING = ("open", "write", "pwrite", "fsync", "rename", "replace", "link", "mkdir", "sendfile", "unlink", "rmdir")
REAL = {name: getattr(os, name) for name in CHANGING}
OPEN = io.open
FAULTS = ("ENOSPC", "EIO", "short")


def disturb(n, fault, under):
    """In a child: the n-th call that changes something below `under` fails, or is the last of this process. -> [calls left]."""
    left = [n]

    def due(place):
        if not str(place).startswith(str(under)):
            return False
        left[0] -= 1
        if left[0] == 0 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return left[0] == 0

    def fail(place):
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number), str(place))

    def wrapped(name):
        def call(*arguments, **named):
            place = arguments[0]
            if isinstance(place, int):
                place = os.readlink(f"/proc/self/fd/{place}")
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return REAL[name](*arguments, **named)
            if due(place):
                if fault != "short":
                    fail(place)
                if name in ("write", "pwrite"):
                    return REAL[name](arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)], *arguments[2:])
            return REAL[name](*arguments, **named)

        return call

    def opened(file, mode="r", *arguments, **named):
        if not isinstance(file, int) and set(mode) & set("wxa+") and due(file) and fault != "short":
            fail(file)
        return OPEN(file, mode, *arguments, **named)

    for name in CHANGING:
        setattr(os, name, wrapped(name))
    io.open = builtins.open = opened
    return left


class Command:
    """What is run in a child, and what it leaves: `run()`, `place` that it writes below, `look()` at what is visible, `clear()`."""

    def __init__(self, name, run, place, look, clear=None):
        self.name, self.run, self.place, self.look = name, run, place, look
        self.clear = clear or (lambda: shutil.rmtree(place, ignore_errors=True))


class Yard:
    """A finished build, and the commands that follow one."""

    def __init__(self, place, server):
        self.place, self.errors, self.violations, self.counts = place, place / "errors", [], Counter()
        made = Range(
            place / "made",
            QUICK.replace("}\n  -", ", gates: {defaults: false}}\n  -").replace(
                "false}\n", "false, gates: {defaults: false}}\n"
            ),
            NARROW,
        )
        assert made.finish(made.start()) == 0, made.tail("stderr")
        self.build, self.checkpoint, self.server = made.out, made.checkpoint, server
        release = read_release(self.build)
        assert not release.refused, release.refused
        self.repositories = [
            statements.with_statements(card.with_card(complete(one, "v1", "org", None))) for one in release.repositories
        ]
        self.release, self.signed = place / "release", place / "signed"
        hub.Folder(self.signed).publish(self.repositories, hub.Request("org"))
        (self.folder,) = (path for path in self.signed.iterdir() if path.name.endswith("Int4"))
        self.golden = {one.name: {name: one.files[name].sha256 for name in one.files} for one in self.repositories}
        self.states = {}  # of the hub, by repository: what a reader may see

    def check(self):
        """`qquant check --out`."""
        artifact = next(path for path in self.build.iterdir() if path.name.endswith("Int4"))
        checks, gates = Checks(windows=2, length=16), Gates(defaults=False)
        pipeline.check([artifact], self.checkpoint, checks, gates, torch.device("cpu"), Quiet(), self.place / "checked")

    def publish(self):
        """`qquant publish --to dir`."""
        hub.Folder(self.release).publish(self.repositories, hub.Request("org"))

    def sign(self):
        """`qquant sign`."""
        signing.sign(self.folder, Path(__file__))

    def verify(self):
        """`qquant verify --deep`."""
        verification.verify(self.folder, deep=True)

    def upload(self):
        """`qquant publish --to huggingface`."""
        self._client().publish(self.repositories, hub.Request("org", "v1"))

    def patch(self):
        """`qquant patch`."""
        hub.patch(self._client(), hub.Setting.parse("generation_config.json:top_p=0.5"), ["org/*"], lambda _: True)

    def _client(self):
        return hub.HuggingFace(HfApi(self.server.url, TOKEN), lambda _: None, Waits())

    def commands(self):
        """All that write files, then verify."""
        report = self.place / "checked" / "report.json"
        signature = self.folder / SIGNATURE
        kept = {}

        def whole_report():
            if report.exists():
                json.loads(report.read_text())

        def whole_folders():
            for folder in self.release.glob("[!.]*"):
                verify_files(folder)
                assert digests(folder) == self.golden[folder.name], f"{folder.name} is not the release"

        def whole_signature():
            if signature.exists():
                assert signature.read_bytes() == b"a signature over 9 files\n" * 1000, "half a signature"
            assert not [path.name for path in self.folder.iterdir() if "partial" in path.name], "a part of a signature"

        def unchanged():
            assert digests(self.signed) == kept.setdefault("signed", digests(self.signed)), "verify changed something"

        return [
            Command("check", self.check, self.place / "checked", whole_report),
            Command("publish", self.publish, self.release, whole_folders),
            Command("sign", self.sign, self.signed, whole_signature, lambda: signature.unlink(missing_ok=True)),
            Command("verify", self.verify, self.signed, unchanged, lambda: None),
        ]

    # --- children -------------------------------------------------------------------------------------------------------

    def start(self, run, prepare=lambda: None):
        """A child that runs it."""
        child = os.fork()
        if child:
            return child
        status = BUG
        try:
            prepare()
            run()
            status = 0
        except QQuantError as error:
            append(self.errors, f"{error.exit_code} {error}")
            status = error.exit_code
        except BaseException as error:  # noqa: BLE001  told to the parent
            append(self.errors, f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def finish(self, child):
        """Its exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def wrong(self, trial, what):
        said = self.errors.read_text()[-300:] if self.errors.exists() else ""
        self.violations.append(f"{trial}: {what} {said}")

    def judge(self, command, trial, golden):
        """What is visible, and what the same command leaves."""
        try:
            command.look()
        except (AssertionError, QQuantError, ValueError) as error:
            self.wrong(trial, f"visible: {error}")
        status = self.finish(self.start(command.run))
        if status:
            self.wrong(trial, f"the same command ends with {status}")
        elif digests(command.place) != golden:
            self.wrong(trial, "other bytes")
        self.errors.unlink(missing_ok=True)
        command.clear()

    def torment(self, command, kills, draw):
        """Kill it, and let each of its calls fail once."""
        trace, began = self.place / "calls", time.monotonic()

        def counted():
            left = disturb(1 << 40, "short", command.place)
            command.run()
            append(trace, str((1 << 40) - left[0]))

        assert self.finish(self.start(counted)) == 0, self.errors.read_text()
        seconds, changes = time.monotonic() - began, int(trace.read_text())
        trace.unlink()
        golden = digests(command.place)
        command.clear()
        for trial in range(kills):
            if trial % 2 and changes:
                at = draw.randrange(1, changes + 1)
                child = self.start(command.run, lambda at=at: disturb(at, "kill", command.place))
            else:
                at = draw.uniform(0, seconds)
                child = self.start(command.run)
                time.sleep(at)
                os.kill(child, signal.SIGKILL)
            self.counts[f"{command.name}: killed" if self.finish(child) else f"{command.name}: ended before"] += 1
            self.judge(command, f"{command.name} killed at {at}", golden)
        for fault in FAULTS:
            for n in range(1, changes + 1):
                status = self.finish(self.start(command.run, lambda n=n, fault=fault: disturb(n, fault, command.place)))
                self.counts[f"{command.name}: {fault}: {status}"] += 1
                if status not in ((0,) if fault == "short" else (0, 6, 8, 75)):
                    self.wrong(f"{command.name}, {fault} at call {n}", f"ends with {status}")
                self.judge(command, f"{command.name}, {fault} at call {n}", golden)
        self.counts[f"{command.name}: calls"] = changes
        told = f"{command.name}: {kills} kills, {changes} calls, {len(self.violations)} violations"
        print(told, file=sys.stderr, flush=True)

    def torment_hub(self, name, run, kills, draw):
        """Kill what speaks to a hub; a reader sees the old state of each repository, or the new one."""
        for trial in range(kills):
            for known in (self.server.repos, self.server.collections, self.server.history):
                known.clear()
            if name == "patch":
                self.upload()
            before = self.shown()
            began = time.monotonic()
            if trial == 0:
                run()
                self.counts[f"{name}: seconds"] = round(time.monotonic() - began, 3)
                self.states[name] = self.shown()
                continue
            child = self.start(run)
            time.sleep(draw.uniform(0, self.counts[f"{name}: seconds"]))
            os.kill(child, signal.SIGKILL)
            self.counts[f"{name}: killed" if self.finish(child) else f"{name}: ended before"] += 1
            for repository, files in self.shown().items():
                if files not in (before.get(repository), self.states[name][repository], {}):
                    self.wrong(f"{name} killed, trial {trial}", f"{repository} shows {sorted(files)}")
            status = self.finish(self.start(run))
            if status or self.shown() != self.states[name]:
                self.wrong(
                    f"{name} killed, trial {trial}", f"the same command ends with {status}, or leaves something else"
                )
            self.errors.unlink(missing_ok=True)
        print(f"{name}: {kills} kills, {len(self.violations)} violations", file=sys.stderr, flush=True)

    def shown(self):
        """Files that a reader of the hub sees, by repository."""
        return {name: self.server.files(name) for name in list(self.server.repos)}


def stand_in_for_signing():
    """`model_signing` with two calls: a signature is written in two pieces."""

    class Config:
        def set_ignored_paths(self, paths):
            return self

        def set_hashing_config(self, config):
            return self

        def use_elliptic_key_signer(self, private_key):
            return self

        def sign(self, folder, target):
            with open(target, "wb") as file:
                file.write(b"a signature over 9 files\n" * 500)
                file.flush()
                os.fsync(file.fileno())
                file.write(b"a signature over 9 files\n" * 500)

    library = types.ModuleType("model_signing")
    library.hashing = library.signing = types.SimpleNamespace(Config=Config)
    return library


def main():
    kills, draw = int(sys.argv[1]) if len(sys.argv) > 1 else 50, random.Random(sys.argv[2] if len(sys.argv) > 2 else 0)
    torch.set_num_threads(1)
    sys.modules["model_signing"] = stand_in_for_signing()
    began, shared = time.monotonic(), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place, serve() as server:
        (Path(place) / "made").mkdir()
        yard = Yard(Path(place), server)
        for command in yard.commands():
            yard.torment(command, kills, draw)
        for name, run in (("upload", yard.upload), ("patch", yard.patch)):
            yard.torment_hub(name, run, kills, draw)
        content = {"kills": kills, **yard.counts, "seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(content | {"violations": yard.violations}, ensure_ascii=False))
    sys.exit(bool(yard.violations))


if __name__ == "__main__":
    main()
