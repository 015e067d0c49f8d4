"""Builds that are killed, starved and crowded: python -m tests.torture MODE [COUNT] [SEED] prints one JSON line of what happened.

    sample      some of all that follows, in one process (COUNT kills)
    kill        COUNT builds get SIGKILL: at a random time, at a random call of `writes.crash_point` (every named place at least once), and
                before a random call that changes the file system
    calls       the n-th open, write, fsync, rename, link or mkdir fails with ENOSPC, EIO, EINTR, or a short write; n = 1, 2, ... until
                the build passes untouched (COUNT: only every so manieth n)
    full        a real full disk: a tmpfs of a few sizes, too small for the build (needs root)
    crowd       eight builds at once into one folder, then into eight folders

`kill` and `calls` build two formats and two files of one folder on one narrow layer (QUICK), the others all that is solved (RECIPE).
After each: nothing stands at a final path without its manifest and matching hashes; the inputs are untouched; the same command finishes;
every byte of the output is that of an undisturbed build; no unit that was journalled is solved again. Torch is imported once, and every
build is a fork of this process, which knows what templates compile to and what tokenizers answered in the undisturbed build.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jinja2
import torch

from qquant import pipeline, recipe
from qquant.artifact import draft, verification
from qquant.checks import loading
from qquant.disk import output
from qquant.errors import QQuantError
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.resources import data_dir
from qquant.source import confined
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint

RECIPE = """
version: 1
name: torture
calibration: {sources: [{path: PLACE/read.txt}], samples: 3, length: 32, default_system_share: 0}
checks: {text: "PLACE/judge.txt", windows: 2, length: 32}
artifacts:
  - {name: gptq-int4, format: gptq, bits: 4, group_size: 64, sweeps: 0, scale_search: minmax}
  - {name: awq, format: awq, group_size: 64, ratios: 2, sweeps: 0, scale_search: minmax}
  - {name: gguf-q8_0, format: gguf, type: q8_0, solver: ggml}
  - {name: gguf-q4_k_m, format: gguf, type: q4_k_m, solver: ggml}
"""
QUICK = """
version: 1
name: torture
calibration: {sources: [{path: PLACE/read.txt}], samples: 1, length: 32, default_system_share: 0}
checks: {text: "PLACE/judge.txt", windows: 2, length: 16}
artifacts:
  - {name: gptq-int4, format: gptq, bits: 4, group_size: 64, solver: rtn, scale_search: minmax}
  - {name: gguf-q8_0, format: gguf, type: q8_0, solver: ggml, imatrix: false}
  - {name: gguf-q4_0, format: gguf, type: q4_0, solver: ggml, imatrix: false}
"""
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}  # for K-quants
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
VOCABULARY = 640
BUG = 70  # exit status of a child that met an error which is no QQuantError


def remember():
    """What costs time and is the same in every build is done once, in the process that forks them: templates, tokenizers."""
    known, compile_, ask = {}, jinja2.Environment.compile, confined.Confined.ask

    def compiled(self, source, *rest, **named):
        return kept(("template", type(self), str(source)), lambda: compile_(self, source, *rest, **named))

    def asked(self, work, content=b"", **arguments):
        key = (self.job, self.key, work, content, json.dumps(arguments, sort_keys=True, default=str))
        return kept(key, lambda: ask(self, work, content, **arguments))

    def kept(key, make):
        if key not in known:
            known[key] = make()
        return known[key]

    jinja2.Environment.compile, confined.Confined.ask = compiled, asked


def cut_vocabulary(folder):
    """The demo's tokenizer in `folder`, cut to its first tokens, so that builds are quick."""
    content = json.loads((data_dir("recipes") / "demo" / "tiny-qwen1.5" / "tokenizer.json").read_text())
    kept = {token: number for token, number in content["model"]["vocab"].items() if number < VOCABULARY - 3}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in content["model"]["merges"]]
    merges = [merge for merge in merges if merge[0] in kept and merge[1] in kept and "".join(merge) in kept]
    content["model"] |= {"vocab": kept, "merges": merges}
    content["added_tokens"] = [
        token | {"id": VOCABULARY - 3 + number} for number, token in enumerate(content["added_tokens"])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"bos_token_id": None, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != output.TIMINGS
    }


class Range:
    """A place for builds, the undisturbed result, and what went wrong."""

    def __init__(self, place, text=RECIPE, shape=WIDE):
        remember()
        self.place, self.out = place, place / "out"
        self.model = cut_vocabulary(write_checkpoint(place / "Torture-Chat", vocab_size=VOCABULARY, **shape))
        for name in ("read", "judge"):
            (place / f"{name}.txt").write_text(
                "\n\n".join(" ".join(f"{name}{i * j}" for i in range(60)) for j in range(1, 9))
            )
        (place / "torture.yaml").write_text(text.replace("PLACE", str(place)))
        loading.examine = lambda *_, **__: loading.Loaded(
            {}
        )  # a process that imports transformers is not what is tried here
        self.recipe = recipe.load(str(place / "torture.yaml"))
        self.checkpoint = Checkpoint.open(self.model)
        self.plan = Plan.of(self.recipe, self.checkpoint)
        self.inputs = digests(self.model)
        self.violations = []
        self.counts = Counter()
        device, quiet = torch.device("cpu"), Quiet()
        pipeline.build(self.recipe, self.checkpoint, self.plan, self.out, device, quiet)  # imports everything, once
        self.golden = digests(self.out)
        shutil.rmtree(self.out)
        began = time.monotonic()
        assert self.finish(self.start()) == 0, f"the undisturbed build fails: {self.tail('stderr')}"
        self.seconds = time.monotonic() - began
        assert digests(self.out) == self.golden, "two undisturbed builds differ"
        self.clear()

    # --- children -------------------------------------------------------------------------------------------------------

    def fork(self, work):
        """A child that ends with the status that `work()` returns, or as a bug, and tells the rest to the file `stderr`."""
        child = os.fork()
        if child:
            return child
        status = BUG
        try:
            sink = os.open(self.place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 2)
            status = work()
        except BaseException:  # noqa: BLE001  told to the parent
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)

    def start(self, prepare=None, out=None):
        """A child that builds; `prepare()` runs in it first."""

        def work():
            log_writes(self.place / "log")
            try:
                if prepare:
                    prepare()
                device, quiet = torch.device("cpu"), Quiet()
                pipeline.build(self.recipe, self.checkpoint, self.plan, out or self.out, device, quiet)
            except QQuantError as error:
                append(self.place / "errors", f"{error.exit_code} {error}")
                return error.exit_code
            return 0

        return self.fork(work)

    def finish(self, child):
        """Its exit status, negative for a signal."""
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    # --- judgement ------------------------------------------------------------------------------------------------------

    def wrong(self, trial, what):
        self.violations.append(f"{trial}: {what}")
        print(f"violation: {self.violations[-1]}", file=sys.stderr, flush=True)

    def look(self, trial):
        """I1, I2, I5 on what a disturbed build left."""
        if self.out.is_dir():
            for path in self.out.iterdir():
                if path.is_dir() and path.name not in output.OURS:
                    try:
                        verification.hashes(path)
                        strange = verification.unlisted(path)
                    except QQuantError as error:
                        self.wrong(trial, f"at a final path: {error}")
                    else:
                        if strange:
                            self.wrong(trial, f"{path.name} holds {strange}")
        if digests(self.model) != self.inputs:
            self.wrong(trial, "an input was changed")

    def settle(self, trial):
        """The same command again, to the end; then every byte is compared, and solves are counted."""
        log = self.place / "log"
        before = log.read_text().splitlines() if log.exists() else []
        status = self.finish(self.start())
        if status:
            self.wrong(trial, f"the same command ends with {status}: {self.tail('errors')} {self.tail('stderr')}")
        found = digests(self.out)
        if found != self.golden:
            names = sorted(
                name for name in found.keys() | self.golden.keys() if found.get(name) != self.golden.get(name)
            )
            self.wrong(trial, f"other bytes: {names[:5]}")
        self.count_solved(trial, before)
        self.clear()

    def count_solved(self, trial, before):
        """No unit that the lines `before` of the log call done was begun again since."""
        log = self.place / "log"
        after = (log.read_text().splitlines() if log.exists() else [])[len(before) :]
        done = {line.removeprefix("done ") for line in before if line.startswith("done ")}
        again = [line for line in after if line.startswith("begin ") and line.removeprefix("begin ") in done]
        if again:
            self.wrong(trial, f"solved again: {again}")
        self.counts["solved before the end"] += len(done)

    def tail(self, name):
        path = self.place / name
        return path.read_text()[-300:] if path.exists() else ""

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)
        for name in ("log", "errors", "stderr"):
            (self.place / name).unlink(missing_ok=True)


def log_writes(log):
    """Note when a unit of a draft is begun and done."""
    write = draft.Draft.write

    def logged(draft, unit, *rest):
        append(log, f"begin {draft.plan.name} {unit}")
        write(draft, unit, *rest)
        append(log, f"done {draft.plan.name} {unit}")

    draft.Draft.write = logged


def append(path, line):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    REAL["write"](descriptor, (line + "\n").encode())
    os.close(descriptor)


def hook(function):
    """`writes.crash_point` in every module that has it."""
    for name, module in sys.modules.items():
        if name.startswith("qquant.") and hasattr(module, "crash_point"):
            module.crash_point = function


# --- SIGKILL ------------------------------------------------------------------------------------------------------------


def places(range_):
    """Every call of `crash_point` in an undisturbed build, by name, in order."""
    trace = range_.place / "trace"

    def prepare():
        hook(lambda place: append(trace, place))

    assert range_.finish(range_.start(prepare)) == 0
    found = trace.read_text().splitlines()
    range_.clear()
    return found


def kill(range_, count, random_):
    called, changes = places(range_), calls_of(range_)
    first = [called.index(name) for name in dict.fromkeys(called)]
    for trial in range(count):
        ways = [("place", random_.randrange(len(called))), ("time", random_.uniform(0, range_.seconds))]
        ways.append(("call", random_.randrange(1, changes + 1)))
        way, at = ("place", first[trial]) if trial < len(first) else ways[trial % 3]
        for _ in range(1 + (trial % 5 == 4)):
            strike(range_, way, at)
            range_.counts[f"kills by {way}"] += 1
            range_.look(f"kill {trial} at {way} {called[at] if way == 'place' else at}")
            way, at = ("place", random_.randrange(len(called)))
        range_.settle(f"kill {trial} at {way} {at}")
        if trial % 50 == 49:
            print(f"{trial + 1} kills, {len(range_.violations)} violations", file=sys.stderr, flush=True)
    counts = {"builds": count, "named places": len(first), "calls of crash_point": len(called)}
    range_.counts |= counts | {"calls of the file system": changes}


def strike(range_, way, at):
    """A build that gets SIGKILL at a `place`, a `time` or a `call`."""

    def prepare():
        left = [at]

        def die(_):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        if way == "place":
            hook(die)
        elif way == "call":
            starve("kill", at, range_.out)

    child = range_.start(prepare)
    if way == "time":
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    if range_.finish(child) == 0:
        range_.counts["ended before the signal"] += 1


# --- the n-th call fails --------------------------------------------------------------------------------------------------

CALLS = ("open", "write", "pwrite", "fsync", "rename", "link", "mkdir", "posix_fallocate", "ftruncate")
REAL = {name: getattr(os, name) for name in CALLS}
FAULTS = ("ENOSPC", "EIO", "EINTR", "short")


def starve(fault, n, under):
    """In a child: the n-th call that changes something below `under` fails."""
    left = [n]

    def concerns(name, arguments):
        if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
            return False
        path = arguments[0]
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return str(path).startswith(str(under)) and not str(path).endswith("/lock")

    def wrapped(name):
        def call(*arguments, **named):
            if concerns(name, arguments):
                left[0] -= 1
                if left[0] == 0:
                    if fault == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if fault != "short":
                        number = getattr(errno, fault)
                        raise OSError(number, os.strerror(number), str(arguments[0]))
                    if name in ("write", "pwrite"):
                        descriptor, data, *rest = arguments
                        return REAL[name](descriptor, data[: max(1, len(data) // 2)], *rest)
            return REAL[name](*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    return left


def calls_of(range_):
    """How many calls of an undisturbed build change something."""
    trace = range_.place / "calls"

    def prepare():
        left, build = starve("short", 1 << 40, range_.out), pipeline.build

        def counted(*arguments):
            build(*arguments)
            append(trace, str((1 << 40) - left[0]))

        pipeline.build = counted

    assert range_.finish(range_.start(prepare)) == 0
    number = int(trace.read_text())
    trace.unlink()
    range_.clear()
    return number


def calls(range_, step, random_):
    for fault in FAULTS:
        n = 1
        while True:
            passed = range_.place / "untouched"

            def prepare(fault=fault, n=n, passed=passed):
                left = starve(fault, n, range_.out)
                build = pipeline.build

                def watched(*arguments):
                    result = build(*arguments)
                    if left[0] > 0:
                        passed.touch()
                    return result

                pipeline.build = watched

            trial = f"{fault} at call {n}"
            status = range_.finish(range_.start(prepare))
            untouched = passed.exists()
            passed.unlink(missing_ok=True)
            allowed = {0} if fault in ("short",) else {0, 6, 75}
            if status not in allowed:
                range_.wrong(trial, f"ends with {status}: {range_.tail('errors')} {range_.tail('stderr')}")
            range_.counts[f"{fault}: status {status}"] += 1
            range_.look(trial)
            range_.settle(trial)
            if untouched:
                range_.counts[f"{fault}: calls"] = n - 1
                print(f"{fault}: {n - 1} calls, {len(range_.violations)} violations", file=sys.stderr, flush=True)
                break
            if n % 50 == 0:
                print(f"{fault} at call {n}, {len(range_.violations)} violations", file=sys.stderr, flush=True)
            n += random_.randint(max(1, step // 2), step)


# --- a full disk, and crowds ----------------------------------------------------------------------------------------------


def full(range_, steps, random_):
    need = sum(planned.size for planned in range_.plan.artifacts)
    range_.out.mkdir()
    for step in range(1, steps + 1):
        size = need * step // (steps + 1) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(range_.out)], check=True)
        try:
            trial = f"disk of {size:,} bytes"
            preflight = range_.finish(range_.start())
            if preflight != 6:
                range_.wrong(trial, f"is not seen beforehand: {preflight}")
            status = range_.finish(range_.start(lambda: setattr(Plan, "require_room", lambda *_: None)))
            if status != 75:
                range_.wrong(trial, f"ends with {status}: {range_.tail('errors')} {range_.tail('stderr')}")
            range_.counts[f"full: status {status}"] += 1
            range_.look(trial)
            subprocess.run(["mount", "-o", "remount,size=1g", str(range_.out)], check=True)
            again = range_.finish(range_.start())
            if again or digests(range_.out) != range_.golden:
                range_.wrong(trial, f"does not continue: {again} {range_.tail('errors')}")
        finally:
            subprocess.run(["umount", str(range_.out)], check=True)
            for name in ("log", "errors", "stderr"):
                (range_.place / name).unlink(missing_ok=True)


def crowd(range_, count, random_):
    children = [range_.start() for _ in range(count)]
    statuses = sorted(range_.finish(child) for child in children)
    range_.counts["one folder: " + " ".join(map(str, statuses))] += 1
    if set(statuses) - {0, 9} or 0 not in statuses:
        range_.wrong("one folder", f"{statuses} {range_.tail('errors')} {range_.tail('stderr')}")
    range_.look("one folder")
    range_.settle("one folder")
    outs = [range_.place / f"out-{number}" for number in range(count)]
    statuses = [range_.finish(child) for child in [range_.start(out=out) for out in outs]]
    if any(statuses):
        range_.wrong("own folders", f"{statuses}")
    for out in outs:
        different = {
            name
            for name, value in digests(out).items()
            if range_.golden.get(name) != value and not name.startswith("report.")
        }  # which tell where the artifacts are
        if different:
            range_.wrong("own folders", f"other bytes: {sorted(different)[:5]}")
        shutil.rmtree(out)
    range_.counts["own folders"] = len(outs)
    range_.clear()


def sample(range_, kills, random_):
    """Some of everything, in one process."""
    kill(range_, kills, random_)
    calls(range_, 700, random_)
    crowd(range_, 8, random_)
    if os.geteuid() == 0 and not subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        full(range_, 2, random_)


MODES = {"sample": (sample, 14), "kill": (kill, 200), "calls": (calls, 1), "full": (full, 6), "crowd": (crowd, 8)}
NARROWLY = ("kill", "calls")


def main():
    mode, seed = sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    run, count = MODES[mode]
    count = int(sys.argv[2]) if len(sys.argv) > 2 else count
    torch.set_num_threads(1)
    began = time.monotonic()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        range_ = Range(Path(place), *((QUICK, NARROW) if mode in NARROWLY else ()))
        run(range_, count, random.Random(seed))
        content = {"mode": mode, "seed": seed, "build_s": round(range_.seconds, 2), **range_.counts}
        content |= {"seconds": round(time.monotonic() - began, 1), "violations": range_.violations}
        print(json.dumps(content, ensure_ascii=False))
    sys.exit(bool(range_.violations))


if __name__ == "__main__":
    main()
