"""What ranks hand each other, and artifacts that they make together: the bytes of one rank, on any number of them, killed or not."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from qquant import pipeline, recipe
from qquant.errors import StoppedError
from qquant.exchange import ALIGNED, ALONE, BY_HOST, Exchange, _kind, _places, _unpacked, shares_card
from qquant.plan.plan import Plan
from qquant.ranks import Membership, Ranks, dealt, helps
from qquant.source.checkpoint import Checkpoint
from tests.test_ranks import on_ranks
from tests.worlds import ROOT, importing
from tests.worlds.builds import CPU, contents, load_recipe, quiet
from tests.worlds.ranks_at_work import unchecked

MADE_TOGETHER = {  # what there is to share out, by artifact
    "gptq-own": "a stream of its own: samples, sums and linears of a stage",
    "gptq-shared": "the 16-bit stream: samples, sums and stages",
    "awq": "folded scales, for which all ranks need every H",
    "rtn": "samples, for the moments alone",
}


@pytest.fixture(scope="module")
def group():
    """`group(world, checkpoint, recipes, stop=0, device="cpu")` -> statuses and stderr of so many ranks, see `tests.worlds.ranks_at_work`."""
    command = [sys.executable, "-m", "tests.worlds.ranks_at_work"]
    with subprocess.Popen(
        command, cwd=ROOT, env=importing(OMP_NUM_THREADS="1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as ranks:

        def ask(world, checkpoint, recipes, stop=0, device="cpu"):
            ranks.stdin.write(json.dumps([world, str(checkpoint), str(recipes), stop, device]) + "\n")
            ranks.stdin.flush()
            return json.loads(ranks.stdout.readline())

        yield ask
        ranks.stdin.close()


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
    found = _unpacked(Exchange()._packed(tensors), kinds, CPU)
    for x, y in zip(tensors, found, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
        assert y.is_contiguous()
        assert y.data_ptr() % 64 == 0
    assert all((stop - start) % ALIGNED == 0 for start, stop in pairwise(_places(kinds)))


@pytest.mark.parametrize(("cards", "shared"), [("abc", False), ("aba", True), ("aaa", True)])
def test_ranks_on_one_card_are_found(monkeypatch, caplog, cards, shared):
    """NCCL refuses them; all take the other way, also those with a card of their own, and one says so."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=cards[device.index]), raising=True
    )
    found = on_ranks(3, lambda ranks: shares_card(torch.device("cuda", ranks.rank), ranks))
    assert found == [shared] * 3
    assert on_ranks(3, lambda ranks: shares_card(CPU, ranks)) == [False] * 3
    began = []
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **rest: began.append(backend))
    monkeypatch.setattr(distributed, "all_reduce", lambda value: None)
    monkeypatch.setattr(torch, "zeros", lambda size, device: None)

    def connect(ranks):
        exchange = Exchange(ranks, torch.device("cuda", ranks.rank))
        exchange._connect()
        return exchange.place.type

    assert on_ranks(3, connect) == ["cpu" if shared else "cuda"] * 3
    assert began == ["gloo" if shared else "cpu:gloo,cuda:nccl"] * 3
    assert [record.message for record in caplog.records] == ([BY_HOST] if shared else [])


@pytest.mark.gpu
def test_ranks_on_one_card_make_the_bytes_of_one(make_checkpoint, recipes, group):
    folder, asked = make_checkpoint(), recipes(["gptq-own", "gptq-shared"], samples=5)
    for world in (1, 1 + torch.cuda.device_count()):
        statuses, said = group(world, folder, asked, 0, "cuda")
        assert statuses == [0] * world, said
    for name in ("gptq-own", "gptq-shared"):
        assert contents(asked / f"{name}-{world}") == contents(asked / f"{name}-1"), name


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


def manifests(folder):
    """What is said of every linear, in the order in which they were solved."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("qquant-manifest.json")}


@pytest.fixture
def recipes(tmp_path, book):
    """`recipes(names, samples)` -> a folder with a recipe for each; nothing is checked, so of a short text."""

    def write(names, samples):
        folder = tmp_path / "recipes"
        folder.mkdir()
        for name in names:
            load_recipe(tmp_path, [name])
            text = (tmp_path / "test.yaml").read_text().replace("samples: 6", f"samples: {samples}")
            (folder / f"{name}.yaml").write_text(text.replace("bundled:wikitext-2-test", str(book)))
        return folder

    return write


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """`alone(checkpoint, recipes)` -> by name what one rank makes of each, without its check."""

    def build(folder, recipes):
        monkeypatch.setattr(pipeline, "_judge", unchecked)
        checkpoint, made = Checkpoint.open(folder), {}
        for path in recipes.glob("*.yaml"):
            loaded, out = recipe.load(str(path)), tmp_path / path.stem
            pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), out, CPU, quiet)
            made[path.stem] = contents(out) | manifests(out)
        return made

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build
    torch.set_num_threads(threads)


def test_several_ranks_make_one_artifact_with_the_bytes_of_one(make_checkpoint, recipes, alone, group):
    """On three ranks, of samples whose number they do not divide; then one is killed on three, and two go on."""
    folder, asked = make_checkpoint(), recipes(MADE_TOGETHER.keys() - {"rtn"}, samples=4)
    expected = alone(folder, asked)
    statuses, said = group(3, folder, asked)
    assert statuses == [0, 0, 0], said
    for name, files in expected.items():
        assert contents(asked / f"{name}-3") | manifests(asked / f"{name}-3") == files, name
    for name in expected.keys() - {"gptq-own"}:
        (asked / f"{name}.yaml").unlink()
    shutil.rmtree(asked / "gptq-own-3")
    statuses, said = group(3, folder, asked, 2)  # what is outside the blocks, and a block
    assert statuses[2] == -signal.SIGKILL
    assert statuses[:2] == [StoppedError.exit_code] * 2
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "rank 2 (process " in errors[0]
    assert "died" in errors[0]
    (asked / "gptq-own-3").rename(asked / "gptq-own-2")
    journal = asked / "gptq-own-2" / ".partial" / "gptq-own.journal"
    assert len(journal.read_text().splitlines()) == 3
    statuses, said = group(2, folder, asked)
    assert statuses == [0, 0], said
    assert contents(asked / "gptq-own-2") | manifests(asked / "gptq-own-2") == expected["gptq-own"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_makes_the_bytes_of_one(make_checkpoint, recipes, alone, group, world):
    """Also more ranks than some sums have owners."""
    folder, asked = make_checkpoint(), recipes(MADE_TOGETHER, samples=7)
    expected = alone(folder, asked)
    statuses, said = group(world, folder, asked)
    assert statuses == [0] * world, said
    for name, files in expected.items():
        assert contents(asked / f"{name}-{world}") | manifests(asked / f"{name}-{world}") == files, name
