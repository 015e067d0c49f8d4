"""What `qquant doctor --warm` runs, on the CPU: the same calls as on a GPU, of which nothing is compiled here."""

import pytest
import torch

from qquant import recipe, warming
from qquant.cli import main
from qquant.errors import UsageError
from qquant.families import FAMILIES
from qquant.kernels import jit
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.runtime.loading import load
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint

CPU = torch.device("cpu")
RECIPE = """
version: 1
name: warm
calibration: {sources: [{path: %s}], samples: 40, length: 32, default_system_share: 0}
checks: {windows: 8, max_windows: 64, length: 48, profile: %s}
artifacts:
  - {name: int4, format: gptq, bits: 4, group_size: 32, gates: {defaults: false}}
  - {name: q4, format: gguf, type: q4_0, gates: {defaults: false}}
  - {name: sized, format: gguf, size: 600KB, gates: {defaults: false}}
"""


@pytest.fixture
def asked(book, tmp_path, make_checkpoint):
    path = tmp_path / "warm.yaml"
    path.write_text(RECIPE % (book, "release"))
    return Asked(str(make_checkpoint()), path)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_first_blocks_are_checkpoints_of_the_same_widths(tmp_path, family):
    whole = Checkpoint.open(write_checkpoint(tmp_path / "model", family=family))
    first = warming.first_block(whole)
    assert first.config.layers == 1
    assert whole.config.layers > 1
    assert family.linear_shapes(first.config, 0) == family.linear_shapes(whole.config, 0)
    for name, value in whole.block(0).items():
        assert torch.equal(first.block(0)[name], value)
    assert set(first.tensors) < set(whole.tensors)


def test_every_artifact_but_a_sized_one_is_built_of_a_block_and_answers(asked, monkeypatch, tmp_path):
    """Samples as long as the recipe's; nothing is left behind."""
    built, prompts = [], []

    def watched(loaded, checkpoint, plan, *rest):
        built.append((loaded, checkpoint, [one.name for one in plan.artifacts]))
        return build(loaded, checkpoint, plan, *rest)

    class Listening:
        def __init__(self, model):
            self.model = model

        def generate(self, tokens, **options):
            made = self.model.generate(tokens, **options)
            prompts.append((tokens.shape[1], made.shape[1] - tokens.shape[1]))
            return made

    build = warming.pipeline.build
    monkeypatch.setattr(warming.pipeline, "build", watched)
    monkeypatch.setattr(warming, "load", lambda *arguments: Listening(load(*arguments)))
    monkeypatch.setattr(warming.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    warming.build(asked.wanted(), asked.reference, CPU, Quiet())
    ((few, first, names),) = built
    assert names == ["int4", "q4"]
    assert (few.calibration.samples, few.calibration.length) == (warming.CALLS, 32)
    assert (few.checks.profile, few.checks.windows, few.checks.max_windows) == ("default", 2, None)
    assert first.config.layers == 1
    assert [length for length, _ in prompts] == 2 * list(warming.PROMPTS)
    assert all(0 < new <= warming.ANSWER for _, new in prompts)
    assert list((tmp_path / "scratch").glob("qquant-*")) == []


def test_what_was_compiled_meanwhile_is_counted(asked, monkeypatch, tmp_path):
    def compiled(*names):
        for name in names:
            (tmp_path / "cache" / name).mkdir(parents=True)
            (tmp_path / "cache" / name / "kernel.cubin").touch()

    compiled("earlier")
    (tmp_path / "cache" / "launcher").mkdir()
    monkeypatch.setattr(jit, "kept_in", lambda device: tmp_path / "cache")
    monkeypatch.setattr(warming, "build", lambda *_: compiled("one", "two"))
    warmed = warming.warm(asked, CPU, Quiet())
    assert (warmed.kernels, warmed.folder) == (2, tmp_path / "cache")


def test_files_for_a_size_alone_are_refused(asked):
    alone = asked.wanted()
    alone = alone.model_copy(update={"artifacts": alone.artifacts[2:]})
    with pytest.raises(UsageError, match="recipe warm has files for a size alone"):
        warming.build(alone, asked.reference, CPU, Quiet())


@pytest.mark.parametrize("name", recipe.names())
def test_bundled_recipes_take_few_samples(name, demo):
    """As many as they have sources at least, of the length that they have."""
    whole = recipe.load(name)
    few = warming.with_few_samples(whole)
    assert few.calibration.samples <= max(warming.CALLS, len(whole.calibration.sources))
    assert few.calibration.length == whole.calibration.length
    assert Plan.of(
        few, warming.first_block(Checkpoint.open(demo)), [one.name for one in few.artifacts if not one.sized]
    )


def test_on_a_cpu_it_says_that_nothing_is_compiled(demo, tmp_path, capsys):
    for words, said in [
        (["--warm", str(demo)], "--warm: no kernels are compiled on cpu"),
        (["--recipe", "demo"], "--recipe goes with --warm CHECKPOINT"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--device", "cpu", "--out", str(tmp_path), *words])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
