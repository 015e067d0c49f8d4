"""Builds on several ranks, of which one is killed or stopped: python -m tests.torture_ranks [KILLS] [SEED] prints one JSON line.

First one, two, three and four ranks build, undisturbed. Then one rank of two to four gets SIGKILL, at a random time or at a random call
of `writes.crash_point`; every third gets SIGSTOP instead, or runs out of memory. The first trial kills the first rank where it tidies up
(LAST). The others must end by themselves within BOUND seconds and five builds of a group (a rank that is short of memory may go on with less), with 75
and one line that names the rank, or with 0 where all was done; then another number of ranks continues. After each, what `tests.torture` asks of builds. Ranks are forks of this process that meet in a
file, without a launcher.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.distributed import FileStore, PrefixStore

from qquant import pipeline, ranks
from qquant.cli import together
from qquant.disk import lock, output
from qquant.errors import QQuantError, StoppedError
from qquant.progress import Quiet
from tests.torture import Range, append, digests, hook, log_writes, places

WORLDS = (2, 3, 4)
BOUND = 20.0  # seconds, on a busy machine
ranks.BEAT, ranks.SILENT, ranks.ARRIVAL = 0.2, 4.0, 15.0
lock.PATIENCE = output.PATIENCE = 10.0


class Group(Range):
    """Builds by several processes."""

    groups = 0
    longest = 0.0  # seconds of a build by a group

    def start_rank(self, rank, world, prepare=None):
        """The child that is this rank of the group at hand; `prepare()` runs in it first."""
        return self.fork(lambda: self.in_rank(rank, world, prepare))

    def in_rank(self, rank, world, prepare):
        store = PrefixStore("test", FileStore(str(self.place / f"store-{self.groups}"), world))
        group = ranks.Ranks(ranks.Membership(rank, world, rank), store)
        with ranks.watched(group, together.lost):
            log_writes(self.place / "log")
            if prepare:
                prepare()
            try:
                device = torch.device("cpu")
                pipeline.build(self.recipe, self.checkpoint, self.plan, self.out, device, Quiet(), group)
            except (QQuantError, MemoryError) as error:
                append(self.place / "errors", f"{rank}: {error}")
                return together.told(error, str(error), group) or error.exit_code
        return 0

    def start_group(self, world, prepare=None, whom=0):
        """The children of a new group; `prepare()` runs in one of them."""
        self.groups += 1
        return [self.start_rank(rank, world, prepare if rank == whom else None) for rank in range(world)]

    def finish_all(self, children, trial):
        """Their exit statuses; who does not end in time is a violation."""
        late, found = time.monotonic() + BOUND + 5 * max(self.longest, self.seconds), {}
        while len(found) < len(children):
            for child in children:
                if child not in found:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        found[child] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > late:
                self.wrong(trial, f"a rank does not end: {self.tail('stderr')}")
                for child in children:
                    if child not in found:
                        os.kill(child, signal.SIGKILL)
                late = float("inf")
            time.sleep(0.02)
        return [found[child] for child in children]

    def whole(self, world, trial):
        """A group builds to the end; every byte is compared."""
        log = self.place / "log"
        before = log.read_text().splitlines() if log.exists() else []
        statuses = self.finish_all(self.start_group(world), trial)
        if any(statuses):
            self.wrong(trial, f"{world} ranks end with {statuses}: {self.tail('errors')} {self.tail('stderr')}")
        found = digests(self.out) if self.out.is_dir() else {}
        if found != self.golden:
            names = sorted(
                name for name in found.keys() | self.golden.keys() if found.get(name) != self.golden.get(name)
            )
            self.wrong(trial, f"other bytes on {world} ranks: {names[:5]}")
        self.count_solved(trial, before)
        self.clear()

    def is_done(self):
        """Whether every byte is there, and nothing beside them: who dies then takes nothing along."""
        left = {output.PARTIAL, output.DONE} & set(os.listdir(self.out)) if self.out.is_dir() else {output.PARTIAL}
        return not left and digests(self.out) == self.golden

    def disturbed(self, world, whom, trial, how, at, random_):
        """One rank of a group is hurt, at a time, at the call of `crash_point` of that number or name; the others say so, and end."""

        def prepare():
            calls = [0]

            def at_crash_point(place):
                calls[0] += 1
                if at in (calls[0], place):
                    if how is MemoryError:
                        raise MemoryError
                    os.kill(os.getpid(), how)

            if at is not None:
                hook(at_crash_point)

        children = self.start_group(world, prepare, whom)
        if at is None:
            time.sleep(random_.uniform(0, 1.5 * self.seconds))
            os.kill(children[whom], how)
        others = self.finish_all(children[:whom] + children[whom + 1 :], trial)
        if how == signal.SIGSTOP:
            os.kill(children[whom], signal.SIGCONT)
        (hurt,) = self.finish_all([children[whom]], trial)
        self.look(trial)
        if hurt == 0:
            self.counts["ended before"] += 1
            return
        if 0 in others and set(others) <= {0, StoppedError.exit_code} and at != LAST and self.is_done():
            self.counts["hurt when all was done"] += 1
            return
        said = [line for line in (self.place / "stderr").read_text().splitlines() if line.startswith("error: ")]
        if set(others) != {StoppedError.exit_code}:
            self.wrong(trial, f"the others end with {others}: {self.tail('errors')} {self.tail('stderr')}")
        if how is MemoryError and whom == 0:
            named = len(said) == 1
        else:
            named = len(said) == 1 and f"rank {whom} (" in said[0]
        if not named:
            self.wrong(trial, f"told of rank {whom}: {said}")
        (self.place / "stderr").unlink(missing_ok=True)


LAST = "while removing the partial folder"
HURTS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL, MemoryError)


def main():
    count, seed = (int(word) for word in [*sys.argv[1:], *["60", "0"][len(sys.argv) - 1 :]])
    random_, began = random.Random(seed), time.monotonic()
    torch.set_num_threads(1)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        group = Group(Path(place))
        calls = len(places(group))
        took = {}
        for world in WORLDS if count > 2 else WORLDS[:2]:
            then = time.monotonic()
            group.whole(world, f"{world} ranks")
            took[world] = round(time.monotonic() - then, 2)
            group.longest = max(took.values())
        for trial in range(count):
            how, world = HURTS[trial % len(HURTS)], random_.choice(WORLDS)
            at = random_.randrange(1, calls // world) if trial % 2 or how is MemoryError else None
            whom = random_.randrange(world)
            if trial == 0:
                at, whom = LAST, 0
            name = how.name if how is not MemoryError else "short memory"
            group.disturbed(world, whom, f"{trial}: {name} of rank {whom} of {world} at {at}", how, at, random_)
            group.counts[name] += 1
            again = random_.choice((1, *WORLDS))
            if again == 1:
                group.settle(f"{trial}: continued on 1")
            else:
                group.whole(again, f"{trial}: continued on {again}")
            if trial % 10 == 9:
                print(f"{trial + 1} hurt, {len(group.violations)} violations", file=sys.stderr, flush=True)
        content = {"hurt": count, "seed": seed, "build_s": round(group.seconds, 2), "ranks_s": took, **group.counts}
        content |= {"seconds": round(time.monotonic() - began, 1), "violations": group.violations}
        print(json.dumps(content, ensure_ascii=False))
        shutil.rmtree(place, ignore_errors=True)
    sys.exit(bool(group.violations))


if __name__ == "__main__":
    main()
