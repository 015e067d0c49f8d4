"""What holds for every format, from the round trip to the card: each test runs for all of FORMATS, and for one that is known to tests alone."""

import json
import re
import shutil
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant import pipeline
from qquant.algorithms.grid import QuantizedTensor, nearest
from qquant.artifact import draft
from qquant.artifact.draft import Draft
from qquant.artifact.opening import open_weights
from qquant.artifact.verification import verify
from qquant.checks.structure import CachedWeights, folds
from qquant.errors import InputError, QQuantError, UsageError
from qquant.formats import FORMATS, detect, kind_of_file, weight_files
from qquant.inspection import describe
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates
from qquant.recipe.artifacts import ENTRIES, FormatName
from qquant.release import card
from qquant.release.hub import Folder, Request
from qquant.release.repository import complete, read_release
from qquant.solve.solver import Solver
from qquant.source.checkpoint import Checkpoint
from qquant.source.safetensors_file import torch_dtype
from tests.conftest import write_checkpoint
from tests.worlds import toy_format
from tests.worlds.chats import prose
from tests.worlds.every_format import EVERY, SAMPLES, recipe_of

CPU = torch.device("cpu")
INSIDE = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _toy():
    with toy_format.registered():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("every") / "model", num_key_value_heads=2))


@pytest.fixture(scope="module", params=EVERY)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short one: a bundled text takes longer to encode than everything else."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(20))
    return path


@pytest.fixture(scope="module")
def recipe(name, text):
    return recipe_of(name, text)


@pytest.fixture(scope="module")
def plan(recipe, checkpoint):
    return Plan.of(recipe, checkpoint)


@pytest.fixture(scope="module")
def planned(plan):
    return plan.artifacts[0]


def build(recipe, checkpoint, plan, out):
    return pipeline.build(recipe, checkpoint, plan, out, CPU, Quiet())


@pytest.fixture(scope="module")
def built(name, recipe, checkpoint, plan, tmp_path_factory):
    """(report, output folder) of one artifact."""
    out = tmp_path_factory.mktemp(name) / "out"
    return build(recipe, checkpoint, plan, out), out


@pytest.fixture
def artifact(name, built, planned):
    """Where readers find it."""
    return FORMATS[name].path_of(built[1] / planned.folder, [file.name for file in planned.files])


def contents(out):
    """Every file of the artifact's folder and its bytes."""
    return {path.name: path.read_bytes() for folder in out.glob("model-*") for path in folder.iterdir()}


def test_every_format_has_an_entry_and_its_word():
    """Who adds one names it in FORMATS, and in `ArtifactSpec` and `FormatName`."""
    ours = set(FORMATS) - {toy_format.NAME}
    assert {get_args(entry.model_fields["format"].annotation)[0] for entry in ENTRIES} == ours
    assert set(get_args(FormatName)) == ours


def test_every_format_has_a_sample():
    """Who adds a format says here what to ask of it; everything else in this file follows."""
    assert set(SAMPLES) == set(EVERY)


def test_round_trip(name, checkpoint, planned):
    """Codes of every linear come back as the values that they mean, in tensors of the planned type and shape."""
    layout, family = FORMATS[name], checkpoint.family
    places = {tensor.name: tensor for file in planned.files for tensor in file.tensors}
    for linear in family.linears:
        weight = f"{family.block.format(0)}{linear}.weight"
        value = checkpoint.tensor(weight).float()
        grid = layout.grid_for(planned, weight, value.shape[1])
        assert not planned.stored[weight].numbers
        params = grid.fit(value, torch.rand(value.shape[1]) + 0.1)
        found = QuantizedTensor(nearest(value, *params.step_and_offset(), grid), params, grid)
        packed = layout.pack(planned, weight, found)
        for stored, tensor in packed.items():
            assert tensor.nbytes == places[stored].nbytes, stored
        assert torch.equal(layout.restore(planned, weight, packed), found.dequantize()), weight
        assert (found.dequantize() - value).norm() < 0.2 * value.norm()


def test_what_has_no_codes_keeps_its_values(name, checkpoint, planned):
    layout = FORMATS[name]
    for tensor in (checkpoint.family.final_norm, f"{checkpoint.family.block.format(0)}self_attn.q_proj.bias"):
        assert planned.stored[tensor].numbers
        stored = layout.store(planned, tensor, checkpoint.tensor(tensor), None)
        assert torch.equal(layout.restore(planned, tensor, stored).view(-1), checkpoint.tensor(tensor).float())


def test_the_plan_is_the_bytes(built, planned):
    _, out = built
    for file in planned.files:
        content = (out / planned.folder / file.name).read_bytes()
        assert len(content) == file.size
        if file.copy_of:
            assert content == file.copy_of.read_bytes()
        else:
            assert content.startswith(file.head)
    names = {path.name for path in (out / planned.folder).iterdir()}
    assert names == {"qquant-manifest.json", *(file.name for file in planned.files)}
    assert planned.size == sum(file.size for file in planned.files)


def test_the_file_says_what_it_is(name, artifact, planned, checkpoint):
    assert detect(artifact) == name
    assert kind_of_file(artifact) == planned.spec.kind
    rows = {row["name"]: row for row in describe(artifact)["tensors"]}
    tensors = {tensor.name: tensor for file in planned.files for tensor in file.tensors}
    assert {key: (tuple(row["shape"]), row["bytes"]) for key, row in rows.items()} == {
        key: (tensor.shape, tensor.nbytes) for key, tensor in tensors.items()
    }
    assert {path.name for path in weight_files(artifact)} == {file.name for file in planned.files if file.tensors}
    assert artifact.is_dir() == FORMATS[name].is_folder


def test_it_is_read_back(artifact, built, planned, checkpoint):
    """By the shapes of the checkpoint, near its values, with the digests that the build recorded; head and embedding too."""
    source = open_weights(artifact)
    for tensor, shape in checkpoint.family.shapes(checkpoint.config).items():
        value, truth = source.tensor(tensor), checkpoint.tensor(tensor).float()
        assert value.shape == shape
        assert (value - truth).norm() < 0.5 * truth.norm(), tensor
    head = checkpoint.family.head
    assert torch.equal(source.rows(head, 3, 9), source.tensor(head)[3:9])
    assert source.stored_as(INSIDE)
    found = verify(built[1] / planned.folder, deep=True)
    assert found.digests == len(checkpoint.family.linears) * checkpoint.config.layers
    assert found.unlisted == ()


def test_operators_compute_with_what_is_stored(artifact, checkpoint):
    """Integers mean the dequantized values; a format that operators cannot take says so, and is dequantized."""
    source = open_weights(artifact)
    for linear in checkpoint.family.linears:
        tensor = f"{checkpoint.family.block.format(0)}{linear}.weight"
        found = source.integers(tensor, CPU)
        if found is not None:
            width = found.codes.shape[1] // found.scales.shape[1]
            zeros = (
                torch.tensor(1 << (found.bits - 1)) if found.zeros is None else found.zeros.repeat_interleave(width, 1)
            )
            value = (found.codes.float() - zeros) * found.scales.float().repeat_interleave(width, 1)
            assert torch.equal(value, source.tensor(tensor))


def test_a_model_answers_with_it(artifact, checkpoint):
    from qquant.runtime.loading import load

    with torch.no_grad():
        logits = load(artifact, "cpu")(torch.arange(7)[None]).logits
    assert logits.shape == (1, 7, checkpoint.config.vocab)
    assert bool(logits.isfinite().all())


def test_odd_shapes_are_refused_or_fall_back(name, recipe, tmp_path):
    sample = SAMPLES[name]
    odd = Checkpoint.open(write_checkpoint(tmp_path / "odd", **sample.odd))
    if sample.said is None:
        assert Plan.of(recipe, odd).artifacts[0].fallbacks == ()
    elif FORMATS[name].is_folder:
        with pytest.raises(InputError, match=rf"^artifact one: {sample.said}"):
            Plan.of(recipe, odd)
    else:
        said = Plan.of(recipe, odd).artifacts[0].fallbacks
        assert any(re.fullmatch(sample.said, line) for line in said), said


def test_a_build_that_is_killed_twice_continues_to_the_same_bytes(
    recipe, checkpoint, plan, built, monkeypatch, tmp_path
):
    """First between two blocks, then before it gets its name; bytes that were damaged in between are not trusted."""
    solved, finish = [], Solver.finish

    def dying(self, *given):
        if len(solved) == 1:
            raise KeyboardInterrupt
        finish(self, *given)
        solved.append(self.layer)

    monkeypatch.setattr(Solver, "finish", dying)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, checkpoint, plan, tmp_path / "out")
    monkeypatch.setattr(Solver, "finish", lambda self, *given: finish(self, *given) or solved.append(self.layer))
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(recipe, checkpoint, plan, tmp_path / "out")
    assert solved == [0, 1], "each block is solved once"
    planned = plan.artifacts[0]
    file = next(file for file in planned.files if file.tensors)
    damaged = next(tensor for tensor in file.tensors if ".1." in tensor.name and "down" in tensor.name)
    path = tmp_path / "out" / ".partial" / "one" / file.name
    data = bytearray(path.read_bytes())
    data[damaged.offset] ^= 1
    path.write_bytes(data)
    build(recipe, checkpoint, plan, tmp_path / "out")
    assert solved == [0, 1, 1], "of what was journalled, only the block that was damaged is solved again"
    assert contents(tmp_path / "out") == contents(built[1])


def test_bytes_lost_on_the_way_to_disk_are_found(recipe, checkpoint, plan, monkeypatch, tmp_path):
    put = draft.put
    inside = {tensor.offset for file in plan.artifacts[0].files for tensor in file.tensors}

    def lossy(path, position, data):
        put(path, position, bytes(len(data)) if position in inside else data)

    monkeypatch.setattr(draft, "put", lossy)
    with pytest.raises(QQuantError, match="read back differs"):
        build(recipe, checkpoint, plan, tmp_path / "out")
    assert not (tmp_path / "out" / plan.artifacts[0].folder).exists()


def test_two_that_would_write_the_same_files_are_refused(recipe, checkpoint):
    """By `qquant recipe validate`, which sees no checkpoint, as by `qquant plan`."""
    (one,) = recipe.artifacts
    both = recipe.model_copy(update={"artifacts": (one, one.model_copy(update={"name": "other"}))})
    assert len(both.clashes) == 1
    with pytest.raises(UsageError, match="artifacts one and other would both write"):
        Plan.of(both, checkpoint)


def test_a_finished_artifact_is_kept(recipe, checkpoint, plan, built, monkeypatch):
    before = contents(built[1])
    monkeypatch.setattr(Solver, "__init__", None)  # solving anything would fail
    build(recipe, checkpoint, plan, built[1])
    assert contents(built[1]) == before


def test_it_is_checked(artifact, built, planned, checkpoint, text):
    """`check` measures what `build` measured, without a fault or a missing file, and sees whether scales are folded."""
    row = built[0].artifacts[0]
    checks, gates = Checks(text=str(text), windows=2, length=64), Gates(defaults=False)
    report = pipeline.check([artifact], checkpoint, checks, gates, CPU, Quiet())
    again = report.artifacts[0]
    assert again.verdict.outcome == row.verdict.outcome == "pass"
    assert again.verdict.reasons == row.verdict.reasons == ()
    assert again.kl_divergence == row.kl_divergence
    assert 0 < row.kl_divergence < 0.3
    assert not [warning for warning in report.warnings if "missing" in warning]
    assert folds(open_weights(artifact), CachedWeights(checkpoint)) == planned.spec.transforms


def test_what_is_wrong_with_it_is_found(name, artifact, planned, checkpoint, tmp_path):
    """Another chat template, in a file beside the weights or inside."""
    other = Checkpoint.open(shutil.copytree(checkpoint.path, tmp_path / "other"))
    template = other.path / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    found = FORMATS[name].claims(artifact, other)
    assert [fault for fault in found.faults if "template" in fault.replace("_", " ")] == list(found.faults) != []
    assert FORMATS[name].claims(artifact, checkpoint).faults == ()
    (other.path / "LICENSE").write_text("terms")
    said = FORMATS[name].claims(artifact, Checkpoint.open(other.path)).warnings
    assert ("LICENSE: missing" in said) == FORMATS[name].is_folder


def test_it_has_a_card(name, built, planned, tmp_path):
    """Whose numbers and head are the report's and the manifest's, and which says what the files are."""
    facts = {"tag": "v1", "namespace": "org", "base_model": "Qwen/Qwen1.5-Test"}
    repository = card.with_card(complete(read_release(built[1]).repositories[0], **facts))
    Folder(tmp_path / "release").publish([repository], Request("org"))
    written = tmp_path / "release" / repository.name
    assert card.problems(written) == []
    text = (written / "README.md").read_text()
    assert f"{name.upper()} (" in text
    assert f"library_name: {FORMATS[name].library}" in text
    models = FORMATS[name].models([file.name for file in planned.files])
    assert bool(models) != FORMATS[name].is_folder
    assert all(f"-m {model.first}" in text for model in models)
    assert ("vllm serve" in text) == FORMATS[name].is_folder
    assert verify(written, deep=True).unlisted == ()


def test_only_folders_have_tensor_parallel_sizes(name, plan):
    assert ("one" in plan.parallel) == FORMATS[name].is_folder


def test_an_unknown_format_is_answered_with_those_that_are_known(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint.path, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "unheard"}}))
    folders = ", ".join(name for name in EVERY if FORMATS[name].is_folder)
    with pytest.raises(
        InputError, match=rf"config\.json: quant_method 'unheard'; qquant reads model folders \({folders}\)"
    ):
        detect(folder)
    (tmp_path / "model.bin").write_bytes(b"GGML")
    with pytest.raises(InputError, match=r"model\.bin: is not a GGUF file; qquant reads .* files \(gguf\)"):
        detect(tmp_path / "model.bin")


def test_a_tensor_of_the_toy_that_is_no_function_of_the_codes_is_checked(checkpoint, text, tmp_path):
    recipe = recipe_of("toy", text, "solver: rtn")
    plan = Plan.of(recipe, checkpoint)
    build(recipe, checkpoint, plan, tmp_path / "out")
    folder = tmp_path / "out" / plan.artifacts[0].folder
    tensors = load_file(folder / "model.safetensors")
    name = INSIDE.removesuffix("weight")
    assert tensors[f"{name}steps"].dtype == torch_dtype("BF16")
    assert tensors[f"{name}extent"].tolist() == [64, 128]
    tensors[f"{name}extent"] = torch.tensor([128, 64])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"extent is \[128, 64\]; its codes are \[64, 128\]"):
        open_weights(folder).tensor(INSIDE)
