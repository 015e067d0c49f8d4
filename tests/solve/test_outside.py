"""Embedding and head: their curvature is the definition's, solved rows cost less than those of ggml's search, and each table is a unit."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from qquant import devices, pipeline, recipe
from qquant.algorithms.problem import Problem
from qquant.artifact.draft import Draft
from qquant.artifact.opening import open_weights
from qquant.errors import StoppedError
from qquant.families.decoder import embed, rms_norm, source_block
from qquant.formats.gguf import quantize
from qquant.plan.plan import Plan
from qquant.recipe.solvers import SOLVERS
from qquant.solve import outside, walk
from qquant.solve.curvature import Tables, measure
from qquant.solve.head import Head, HeadInput, head_gradients
from qquant.solve.outside import OCTAVES, kinds_of
from qquant.source.checkpoint import Checkpoint
from tests.solve.test_curvature import CPU, quiet, samples
from tests.worlds.watched import Watched

HEAD = """
version: 1
name: t
calibration: {sources: [{bundled: books-en}], samples: 4, length: 48, default_system_share: 0, objective: kl}
checks: {windows: 2, length: 64}
artifacts:
"""
EMBEDDING, TOP = "model.embed_tokens.weight", "lm_head.weight"


def silent(*_):
    pass


@pytest.fixture
def drafted(tmp_path):
    """`drafted(folder, fields, out)` -> a draft without blocks, its checkpoint, and `rows(name)` of what was written."""

    def open_draft(folder, fields, out="out"):
        line = f"  - {{name: a, format: gguf, gates: {{defaults: false}}, {fields}}}\n"
        loaded, checkpoint = recipe.parse(HEAD + line), Checkpoint.open(folder)
        draft = Draft(Plan.of(loaded, checkpoint).artifacts[0], tmp_path / out, "key")
        draft.open()
        path = draft.folder / draft.plan.files[0].name
        return SimpleNamespace(draft=draft, checkpoint=checkpoint, rows=lambda name: open_weights(path).tensor(name))

    return open_draft


@pytest.fixture
def built(tmp_path):
    """`built(folder, fields, out)` -> a finished artifact, and its entry in the manifest."""

    def run(folder, fields, out="out", text=HEAD, progress=quiet):
        line = f"  - {{name: a, format: gguf, gates: {{defaults: false}}, {fields}}}\n"
        loaded, checkpoint = recipe.parse(text + line), Checkpoint.open(folder)
        plan = Plan.of(loaded, checkpoint)
        pipeline.build(loaded, checkpoint, plan, tmp_path / out, CPU, progress)
        place = tmp_path / out / plan.artifacts[0].folder
        entry = json.loads((place / "qquant-manifest.json").read_text())["artifacts"]["a"]
        return SimpleNamespace(file=place / plan.artifacts[0].files[0].name, entry=entry)

    return run


def tables_of(checkpoint, folder, given=None):
    return measure(checkpoint, given or samples(), folder, torch.float32, CPU, quiet).tables(CPU)


def config(tied, vocab):
    return SimpleNamespace(
        config=SimpleNamespace(tied=tied, vocab=vocab), family=SimpleNamespace(embedding=EMBEDDING, head=TOP)
    )


def cost(error, matrix):
    return float(((error.double() @ matrix.double()) * error.double()).sum())


@pytest.mark.parametrize("tied", [True, False])
def test_the_statistics_are_those_of_their_definitions(make_checkpoint, tmp_path, tied):
    """The whole model in one graph, probabilities from a softmax over all words."""
    source = Checkpoint.open(make_checkpoint(dtype=torch.float32, tie_word_embeddings=tied))
    given = samples()
    tables = tables_of(source, tmp_path / "c", given)
    head = source.rows(source.family.head, 0, source.config.vocab).float()
    norm = source.tensor(source.family.final_norm)
    hidden, lookup, top, starts = [], 0, 0, []
    for tokens in given.values():
        x = start = embed(source, tokens, torch.float32).requires_grad_()
        for layer in range(source.config.layers):
            x = source_block(source, layer, torch.float32).forward(x)
        hidden.append(x.detach())
        starts.append((x, start))
        normed = rms_norm(x.detach(), norm, source.config.epsilon).double()
        p = (normed @ head.double().T).softmax(1)
        top = top + normed.T @ ((1 - p.square().sum(1, keepdim=True)) * normed)
    for (x, start), gradient in zip(
        starts, head_gradients(source, hidden, HeadInput.zeros(source, CPU), silent), strict=True
    ):
        x.backward(gradient)
        lookup = lookup + start.grad.T @ start.grad
    assert torch.allclose(tables.head, top.float(), rtol=1e-4, atol=1e-4 * float(top.diagonal().mean()))
    assert torch.allclose(tables.lookup, lookup, rtol=1e-3, atol=1e-5 * float(lookup.diagonal().mean()))
    every = torch.cat(list(given.values()))
    assert torch.equal(tables.counts, torch.bincount(every, minlength=source.config.vocab).float())
    assert tables.tokens == len(every)


def test_words_are_drawn_as_often_as_they_are_predicted(make_checkpoint, monkeypatch):
    """The sum of p (1 - p), which the draws estimate; of a head that is sure of some words."""
    source = Checkpoint.open(make_checkpoint(dtype=torch.float32))
    rows = Head._rows
    monkeypatch.setattr(Head, "_rows", lambda self, number: 4 * rows(self, number))
    x = torch.randn(1, source.config.hidden).expand(6000, -1)
    seen = HeadInput.zeros(source, CPU)
    head_gradients(source, [x.contiguous()], seen, silent)
    normed = rms_norm(x[:1], source.tensor(source.family.final_norm), source.config.epsilon)
    p = (normed @ (4 * source.rows(TOP, 0, source.config.vocab)).T).softmax(1)[0]
    expected = 6000 * p * (1 - p)
    assert seen.spread == pytest.approx(6000 * float(1 - p.square().sum()), rel=1e-4)
    assert float(seen.predicted.sum()) == pytest.approx(seen.spread, rel=0.05)
    often = expected > 30
    assert bool(often.any())
    assert bool(((seen.predicted - expected)[often].abs() < 6 * expected[often].sqrt()).all())


def written(found, tables):
    """The tables of a draft after they were written, by its solver if it has one."""
    outside.write_unsolved(found.checkpoint, [found.draft], True, CPU, False, threading.Event())
    outside.solve_tables(found.checkpoint, [found.draft], tables, CPU, quiet)
    return found


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q6_k", "q4_k", "q3_k", "q2_k"])
def test_solved_rows_cost_less_than_those_of_ggmls_own_search(kind):
    """On correlated channels; with the mean square of each as ggml's importance matrix, too."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(900, 256, generator=generator) @ (torch.eye(256) + torch.randn(256, 256, generator=generator) / 16)
    weight = 0.02 * torch.randn(200, 256, generator=generator)
    (known,) = kinds_of(
        config(False, 200), TOP, Tables(x.T @ x, x.T @ x, torch.ones(200), torch.ones(200), 900, 900.0, 1.0)
    )
    spec = SimpleNamespace(damping=0.01, sweeps=2)
    problem = Problem({TOP: weight}, known.gram, quantize.grid(kind), spec)
    solved = outside.solve(problem, SOLVERS["gptq"].steps).quantized(problem)[TOP].dequantize()
    for importance in (None, known.gram.importance):
        ggml = quantize.dequantize(quantize.quantize(weight, kind, importance), kind)
        assert cost(solved - weight, known.gram.matrix) < 0.9 * cost(ggml - weight, known.gram.matrix)


@pytest.mark.parametrize(("kind", "tied"), [("q3_k_m", True), ("q4_k_m", False)])
def test_tables_in_a_file_cost_less_than_those_of_ggmls_own_search(make_checkpoint, drafted, tmp_path, kind, tied):
    """tr(E M E'), M of each word by the definition; a tied table with both of its matrices."""
    folder = make_checkpoint("m", hidden_size=256, num_hidden_layers=1, tie_word_embeddings=tied)
    ours = drafted(folder, f"type: {kind}, solver: gptq, sweeps: 1")
    ggml = drafted(folder, f"type: {kind}, solver: ggml", "ggml")
    tables = tables_of(ours.checkpoint, tmp_path / "c", samples(6, 48))
    written(ours, tables)
    written(ggml, tables)
    lookup, head = tables.lookup / tables.tokens, tables.head / tables.spread
    for name in [EMBEDDING] if tied else [EMBEDDING, TOP]:
        weight = ours.checkpoint.tensor(name).float()
        costs = []
        for found in (ours, ggml):
            error = found.rows(name) - weight
            seen = (tables.counts + 1).sqrt()[:, None] * error
            predicted = (tables.predicted + tables.spread / tables.tokens).sqrt()[:, None] * error
            parts = [cost(seen, lookup), cost(predicted, head)]
            costs.append(sum(parts) if tied else parts[name == TOP])
        assert costs[0] < 0.95 * costs[1], name


def test_ggml_stores_what_llama_quantize_does_and_so_does_the_output_objective(make_checkpoint, drafted):
    """`solved` is false where no curvature is measured."""
    folder = make_checkpoint("m", num_hidden_layers=1)
    for fields, solved in (("solver: ggml", True), ("solver: gptq", False)):
        found = drafted(folder, f"type: q4_0, {fields}", fields[-4:])
        outside.write_unsolved(found.checkpoint, [found.draft], solved, CPU, False, threading.Event())
        assert list(found.draft.units) == [outside.UNSOLVED]
        for name in (EMBEDDING, TOP):
            weight, kind = found.checkpoint.tensor(name).float(), found.draft.plan.stored[name].type
            assert torch.equal(found.rows(name), quantize.dequantize(quantize.quantize(weight, kind), kind))


def test_a_gpu_reads_tables_once_for_all_drafts(make_checkpoint, drafted, monkeypatch):
    """The bytes of drafts that are written one after another; slices that differ between them keep their places."""
    monkeypatch.setattr(outside, "HEAD_ROWS", 40)
    folder, kinds = make_checkpoint("m", num_hidden_layers=1), ("q4_0", "q8_0", "q6_k")
    alone = [drafted(folder, f"type: {kind}, solver: ggml", f"alone-{kind}") for kind in kinds]
    beside = [drafted(folder, f"type: {kind}, solver: ggml", f"beside-{kind}") for kind in kinds]
    checkpoint, read = alone[0].checkpoint, []
    rows = checkpoint.rows
    monkeypatch.setattr(checkpoint, "rows", lambda name, *span: read.append((name, *span)) or rows(name, *span))
    outside.write_unsolved(checkpoint, [one.draft for one in alone], False, CPU, False, threading.Event())
    slices = set(read)
    assert len(read) == len(kinds) * len(slices)
    read.clear()
    outside.write_unsolved(checkpoint, [one.draft for one in beside], False, CPU, True, threading.Event())
    assert sorted(read) == sorted(slices)
    for one, other in zip(alone, beside, strict=True):
        (unit,), (twin,) = one.draft.units.values(), other.draft.units.values()
        assert unit.checksums == twin.checksums
        name = one.draft.plan.files[0].name
        assert (one.draft.folder / name).read_bytes() == (other.draft.folder / name).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_the_record_names_every_table_that_was_solved(make_checkpoint, built, tied):
    folder = make_checkpoint("m", tie_word_embeddings=tied, num_hidden_layers=1)
    layers = built(folder, "type: q4_0, solver: gptq, sweeps: 1").entry["layers"]
    records = {entry["name"]: entry for entry in layers if "layers." not in entry["name"]}
    assert set(records) == ({EMBEDDING} if tied else {EMBEDDING, TOP})
    for record in records.values():
        assert list(record["steps"]) == ["rtn", "gptq", "sweeps"]
        assert record["error"] == record["steps"]["sweeps"] < record["steps"]["gptq"] < record["steps"]["rtn"]
        assert record["fallback"] is None
        assert record["inputs"] == 64
        assert record["tokens"] == 4 * 48


def known(counts, predicted, hidden=8):
    """Statistics of a made-up model."""
    generator = torch.Generator().manual_seed(7)
    lookup, head = (torch.randn(20, hidden, generator=generator) for _ in range(2))
    counts, predicted = torch.tensor(counts), torch.tensor(predicted)
    return Tables(3 * lookup.T @ lookup, head.T @ head, counts, predicted, 1000, 500.0, 4.0)


def test_a_tied_table_weighs_its_two_matrices_by_sightings_and_predictions():
    """Row v costs n G + p H; a word seen as often as predicted, four times as often, never either, and far more often."""
    tables = known([100.0, 400.0, 0.0, 1e6], [100.0, 100.0, 0.0, 1.0])
    kinds = kinds_of(config(True, 4), EMBEDDING, tables)
    assert torch.equal(sum(kind.words.int() for kind in kinds), torch.ones(4, dtype=torch.int32))
    lookup, head = tables.lookup / 1000, tables.head / 500
    for word, ratio in enumerate([1, 4, 2, 2**OCTAVES]):  # a sighting is half a prediction here
        gram = next(kind.gram for kind in kinds if kind.words[word])
        expected = ratio * lookup + head
        expected = expected / expected.diagonal().mean()
        assert torch.allclose(gram.matrix, expected, rtol=1e-5)
        assert torch.allclose(gram.importance, expected.diagonal(), rtol=1e-5)


def test_an_untied_table_has_one_matrix_for_every_word():
    tables = known([100.0, 0.0], [0.0, 100.0])
    for name, matrix in ((EMBEDDING, tables.lookup), (TOP, tables.head)):
        (kind,) = kinds_of(config(False, 2), name, tables)
        assert bool(kind.words.all())
        assert torch.allclose(kind.gram.matrix, matrix / matrix.diagonal().mean())


def test_rows_are_solved_in_slices_of_bounded_size(make_checkpoint, drafted, monkeypatch, tmp_path):
    """Slices are smaller than the table, and give what the table as a whole does but for the last bits of sums."""
    folder = make_checkpoint("m", tie_word_embeddings=True, num_hidden_layers=1)
    sizes, solve = [], outside.solve

    def watched(problem, steps):
        sizes.append(len(problem.weight))
        return solve(problem, steps)

    monkeypatch.setattr(outside, "solve", watched)
    monkeypatch.setattr(outside, "ROWS", 700)
    cut, whole = (drafted(folder, "type: q4_0, solver: gptq", out) for out in ("cut", "whole"))
    tables = tables_of(cut.checkpoint, tmp_path / "c")
    written(cut, tables)
    assert max(sizes) <= 700
    assert sum(sizes) == 8192
    monkeypatch.setattr(outside, "ROWS", 10000)
    written(whole, tables)
    assert float((cut.rows(EMBEDDING) == whole.rows(EMBEDDING)).float().mean()) > 0.999


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_between_slices_it_continues_with_the_same_bytes(make_checkpoint, built, monkeypatch, stop):
    """After the first slice, the first table, and within the second: a table that is whole is not solved again."""
    folder, fields = make_checkpoint("m", num_hidden_layers=1), "type: q4_0, solver: gptq, sweeps: 1"
    expected = built(folder, fields, "whole").file.read_bytes()
    told = []

    class Stopping(Watched):
        def check_stop(self):
            if told and told[-1][:2] == (outside.PHASE, stop):
                raise StoppedError("now")

    with pytest.raises(StoppedError):
        built(folder, fields, progress=Stopping(lambda *values: told.append(values)))
    told.clear()
    found = built(folder, fields, progress=Watched(lambda *values: told.append(values)))
    steps = [values for values in told if values[0] == outside.PHASE]
    assert steps[-1][2] == (4 if stop < 2 else 2)  # slices of both tables, or of one
    assert found.file.read_bytes() == expected


@pytest.mark.parametrize("threaded", [False, True])
def test_an_own_stream_begins_with_the_artifacts_own_embedding(make_checkpoint, built, monkeypatch, threaded):
    """What is read back of it, also where a thread writes; and goes on with the same bytes after a stop among the blocks."""
    monkeypatch.setattr(devices, "threads_help", lambda device: threaded)
    folder, fields = make_checkpoint("m", num_hidden_layers=2), "type: q4_0, solver: gptq, sweeps: 1, propagate: true"
    begun, solve = [], walk.carry

    def watched(view, carried, stream, *rest):
        if view.layer == 0:
            begun.append((list(carried.stream.hidden), list(stream.hidden)))
        return solve(view, carried, stream, *rest)

    monkeypatch.setattr(walk, "carry", watched)
    whole = built(folder, fields, "whole")
    table, exact = open_weights(whole.file).tensor(EMBEDDING).bfloat16(), Checkpoint.open(folder).tensor(EMBEDDING)
    (before, own) = begun[0]
    for x, y in zip(before, own, strict=True):
        words = torch.stack([(exact == row).all(1).nonzero()[0, 0] for row in x])
        assert torch.equal(y, table[words])
        assert not torch.equal(x, y)
    told = []

    class Stopping(Watched):
        def check_stop(self):
            if told and told[-1][:2] == ("quantize", 1):
                raise StoppedError("now")

    with pytest.raises(StoppedError):
        built(folder, fields, progress=Stopping(lambda *values: told.append(values)))
    assert built(folder, fields).file.read_bytes() == whole.file.read_bytes()


def test_an_embedding_of_numbers_is_that_of_the_checkpoint(make_checkpoint, tmp_path, monkeypatch):
    begun, solve = [], walk.carry

    def watched(view, carried, stream, *rest):
        begun.append((list(carried.stream.hidden), list(stream.hidden)) if view.layer == 0 else None)
        return solve(view, carried, stream, *rest)

    monkeypatch.setattr(walk, "carry", watched)
    line = "  - {name: a, format: gptq, bits: 4, group_size: 32, sweeps: 0, gates: {defaults: false}}\n"
    loaded, checkpoint = recipe.parse(HEAD + line), Checkpoint.open(make_checkpoint("m", num_hidden_layers=1))
    pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / "out", CPU, quiet)
    assert all(torch.equal(x, y) for x, y in zip(*begun[0], strict=True))
