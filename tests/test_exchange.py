"""What ranks hand each other, and artifacts that they make together: the bytes of one rank, on any number of them, killed or not."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from qquant import pipeline
from qquant.artifact.owning import helps
from qquant.exchange import ALIGNED, ALONE, Exchange, _kind, _places, _unpacked
from qquant.plan.plan import Plan
from qquant.ranks import Membership, Ranks, dealt
from qquant.source.checkpoint import Checkpoint
from tests.worlds import ROOT
from tests.worlds.builds import CPU, contents, load_recipe, quiet
from tests.worlds.ranks_at_work import unchecked

MADE_TOGETHER = {  # what there is to share out, by artifact
    "gptq-own": "a stream of its own: samples and sums, solved by the first",
    "gptq-shared": "the 16-bit stream: samples, sums and stages",
    "awq": "folded scales, for which all ranks need every H",
    "rtn": "samples, for the moments alone",
}


def group(world, *arguments, module="tests.worlds.ranks_at_work"):
    """The end of a module that torchrun runs on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", module]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_rank_alone_gets_what_it_gives():
    given = [[torch.ones(2), torch.zeros(0)]]
    assert ALONE.deliver(given) is given
    assert [(index, parcel[0]) for index, parcel in ALONE.in_turn(3, lambda index: [[index * 10]])] == [
        (0, 0),
        (1, 10),
        (2, 20),
    ]
    assert ALONE.say({"a": 1}) == [{"a": 1}]
    assert list(ALONE.mine(4)) == [0, 1, 2, 3]
    assert not ALONE.connected


def test_samples_are_run_in_turn_and_sums_have_owners():
    ranks = [Exchange(Ranks(Membership(rank, 3, rank))) for rank in range(3)]
    assert [list(one.mine(5)) for one in ranks] == [[0, 3], [1, 4], [2]]
    assert [list(one.mine(1)) for one in ranks] == [[0], [], []]
    found = [one.owners({"a": 5.0, "b": 3.0, "c": 3.0, "d": 1.0}) for one in ranks]
    assert found == [{"a": 0, "b": 1, "c": 2, "d": 1}] * 3


def test_a_parcel_is_unpacked_as_it_was_packed():
    """Tensors begin where a vector register or a copy begins: a sum's bits may depend on that."""
    tensors = [
        torch.randn(3, 5).bfloat16(),
        torch.tensor(7.0),
        torch.randn(4, 6).T,  # not contiguous
        torch.zeros(0, 3),
        torch.arange(9),
        torch.randint(0, 255, (2, 300)).to(torch.uint8),
    ]
    kinds = json.loads(json.dumps([_kind(x) for x in tensors]))
    found = _unpacked(Exchange()._packed(tensors), kinds)
    for x, y in zip(tensors, found, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
        assert y.is_contiguous()
        assert y.data_ptr() % 64 == 0
    assert all((stop - start) % ALIGNED == 0 for start, stop in pairwise(_places(kinds)))


@pytest.mark.parametrize(
    ("costs", "world", "together"),
    [
        ([7.0], 2, True),
        ([7.0, 1.0], 2, True),
        ([4.0, 4.0], 2, False),
        ([4.0, 4.0, 4.0], 2, False),
        ([4.0, 4.0], 4, True),
        ([1.0] * 11, 4, False),
        ([7.0], 1, False),
        ([], 2, False),
    ],
)
def test_ranks_work_together_where_one_would_have_most_to_do(costs, world, together):
    named = {str(index): cost for index, cost in enumerate(costs)}
    assert helps(named, dealt(named, world)) == together


def test_several_ranks_make_one_artifact_with_the_bytes_of_one(make_checkpoint, tmp_path, monkeypatch):
    """On two and on three ranks, of samples that neither number divides; then one is killed on three, and two go on."""
    folder, recipes = make_checkpoint(), tmp_path / "recipes"
    monkeypatch.setattr(pipeline, "_judge", unchecked)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipes.mkdir()
    expected, checkpoint = {}, Checkpoint.open(folder)
    try:
        for name in MADE_TOGETHER:
            loaded = load_recipe(tmp_path, [name])
            (recipes / f"{name}.yaml").write_text(
                (tmp_path / "test.yaml").read_text().replace("samples: 6", "samples: 7")
            )
            loaded = loaded.model_copy(update={"calibration": loaded.calibration.model_copy(update={"samples": 7})})
            pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / name, CPU, quiet)
            expected[name] = contents(tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    for world in (2, 3):
        done = group(world, folder, recipes)
        assert done.returncode == 0, done.stderr
        for name, files in expected.items():
            assert contents(recipes / f"{name}-{world}") == files, (name, world)
    for name in MADE_TOGETHER:
        if name != "gptq-own":
            (recipes / f"{name}.yaml").unlink()
    shutil.rmtree(recipes / "gptq-own-3")
    killed = group(3, folder, recipes, 2)  # what is outside the blocks, and a block
    said = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, killed.stderr
    assert "rank 2 (process " in said[0]
    assert "died" in said[0]
    (recipes / "gptq-own-3").rename(recipes / "gptq-own-2-before")
    shutil.rmtree(recipes / "gptq-own-2")
    (recipes / "gptq-own-2-before").rename(recipes / "gptq-own-2")
    journal = recipes / "gptq-own-2" / ".partial" / "gptq-own.journal"
    assert len(journal.read_text().splitlines()) == 3
    done = group(2, folder, recipes)
    assert done.returncode == 0, done.stderr
    assert contents(recipes / "gptq-own-2") == expected["gptq-own"]
