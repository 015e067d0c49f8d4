"""Whatever a family is, its passes agree, and its checkpoints are planned, built, checked, continued and loaded."""

import hashlib
import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from gguf import GGUFReader

import qquant
from qquant import pipeline, recipe
from qquant.artifact.opening import open_weights
from qquant.checks.decoding import Chooser
from qquant.checks.decoding import PromptDecoder as CheckDecoder
from qquant.dequantization import dequantize
from qquant.errors import InputError, QQuantError, StoppedError
from qquant.families import FAMILIES, ModelConfig, decoder
from qquant.formats import FORMATS
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.recipe import Gates
from qquant.runtime.stepping import Stepper, read_weights
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import padded

CPU = torch.device("cpu")
RECIPE = """
version: 1
name: test
calibration: {sources: [{bundled: books-en}], samples: 3, length: 32, default_system_share: 0}
checks: {text: "bundled:wikitext-2-test", windows: 2, length: 32}
artifacts:
  - {name: gptq, format: gptq, bits: 4, group_size: 32, gates: {defaults: false}}
  - {name: awq, format: awq, group_size: 64, ratios: 2, gates: {defaults: false}}
"""
GGUF = "  - {name: q8_0, format: gguf, type: q8_0, gates: {defaults: false}}\n"
"""In `RECIPE`, another artifact."""


@pytest.fixture
def checkpoint(family, make_checkpoint):
    """A small random one."""
    return Checkpoint.open(make_checkpoint(family=family))


def planned(checkpoint, folder, text=RECIPE):
    (folder / "test.yaml").write_text(text)
    loaded = recipe.load(str(folder / "test.yaml"))
    return loaded, checkpoint, Plan.of(loaded, checkpoint)


def logits(source, tokens):
    """[T, vocab] of the pass that calibration and fidelity take."""
    x = decoder.embed(source, tokens, torch.float32)
    for layer in range(source.config.layers):
        x = decoder.source_block(source, layer, torch.float32).forward(x)
    return decoder.logits(source, x)


def artifacts(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".gguf")
    }


def test_the_table_and_the_forward_pass_speak_of_the_same_stages(family, checkpoint):
    x = torch.randn(7, checkpoint.config.hidden)
    for layer in range(checkpoint.config.layers):
        block = decoder.source_block(checkpoint, layer, torch.float32)
        *seen, last = block.stages(x)
        assert [one.stage for one in seen] == [stage.name for stage in family.stages]
        assert last.stage == ""
        for one, stage in zip(seen, family.stages, strict=True):
            assert (one.residual is not None) == stage.into_residual, stage.name
            assert one.x.shape == (7, family.inputs(checkpoint.config, layer)[stage.name])
        assert torch.equal(last.x, seen[-1].residual + sum(block.apply(family.last.name, seen[-1].x)))


def test_the_passes_agree(checkpoint):
    """The walk's, the one that answers for checks (several prompts, a cache) and the one that steps (fused)."""
    tokens = torch.randint(0, checkpoint.config.vocab, (23,))
    truth = logits(checkpoint, tokens)
    answers = CheckDecoder(checkpoint, torch.float32, CPU).answer(
        [tokens[:9].tolist(), tokens[:17].tolist()], 3, chooser := Recorded(checkpoint.config.vocab, ())
    )
    assert torch.allclose(chooser.seen[0], truth[[8, 16]], rtol=1e-4, atol=1e-4)
    whole = torch.cat([tokens[:17], torch.tensor(answers[1].ids)])
    assert torch.allclose(chooser.seen[2][1], logits(checkpoint, whole)[18], rtol=1e-4, atol=1e-4)
    stepper = Stepper(checkpoint.config, read_weights(checkpoint, CPU, torch.float32), 40, CPU, torch.float32)
    with torch.inference_mode():
        found = [stepper.prefill(tokens[:17])]
        for token in tokens[17:]:
            stepper.token.fill_(int(token))
            found.append(stepper.step())
    assert torch.allclose(torch.cat(found), truth[16:], rtol=1e-4, atol=1e-4)
    assert F.cross_entropy(truth, tokens).isfinite()


class Recorded(Chooser):
    """It keeps the logits that it chose from."""

    def __post_init__(self):
        super().__post_init__()
        self.seen = []

    def choose(self, logits):
        self.seen.append(logits.clone())
        return super().choose(logits)


def test_artifacts_are_what_was_planned_and_load(family, checkpoint, tmp_path):
    report = pipeline.build(*(given := planned(checkpoint, tmp_path)), tmp_path / "out", CPU, Quiet())
    assert report.passed, report.artifacts
    folders = [tmp_path / "out" / artifact.folder for artifact in given[2].artifacts]
    checked = pipeline.check(folders, checkpoint, given[0].checks, Gates(defaults=False), CPU, Quiet())
    assert [row.kl_divergence for row in checked.artifacts] == [row.kl_divergence for row in report.artifacts]
    tokens = torch.randint(0, checkpoint.config.vocab, (11,))
    for artifact in given[2].artifacts:
        folder = tmp_path / "out" / artifact.folder
        assert all((folder / file.name).stat().st_size == file.size for file in artifact.files)
        row = next(row for row in report.artifacts if row.name == artifact.name)
        assert 0.0005 < row.kl_divergence < 0.3
        model = qquant.load(folder, "cpu", torch.float32)
        with torch.no_grad():
            assert torch.allclose(model(tokens[None]).logits[0], logits(open_weights(folder), tokens), atol=1e-3)
            answer = model.generate(
                tokens[None], attention_mask=torch.ones_like(tokens[None]), max_new_tokens=3, do_sample=False
            )
            assert answer[0, 11] == model(tokens[None]).logits[0, -1].argmax()


def test_an_artifact_written_back_is_a_checkpoint_with_its_values(checkpoint, tmp_path):
    given = planned(checkpoint, tmp_path)
    pipeline.build(*given, tmp_path / "out", CPU, Quiet())
    folder = tmp_path / "out" / given[2].artifacts[0].folder
    dequantize(folder, tmp_path / "back", "float32", CPU, Quiet())
    back, source = Checkpoint.open(tmp_path / "back"), open_weights(folder)
    assert back.config == checkpoint.config
    assert all(torch.equal(back.tensor(name), source.tensor(name)) for name in back.family.shapes(back.config))


def test_an_interrupted_build_goes_on_to_the_same_bytes(checkpoint, tmp_path):
    given = planned(checkpoint, tmp_path)
    pipeline.build(*given, tmp_path / "whole", CPU, Quiet())
    with pytest.raises(StoppedError):
        pipeline.build(*given, tmp_path / "out", CPU, Interrupted())
    pipeline.build(*given, tmp_path / "out", CPU, Quiet())
    assert artifacts(tmp_path / "out") == artifacts(tmp_path / "whole")


class Interrupted(Quiet):
    """It stops a build after the first block."""

    def __init__(self):
        self.over = False

    def advance(self, phase, done, of):
        self.over = phase == "quantize"

    def check_stop(self):
        if self.over:
            raise StoppedError("as asked")


def test_gguf_is_refused_where_llama_cpp_has_no_architecture(family, checkpoint, tmp_path):
    if family.gguf:
        assert planned(checkpoint, tmp_path, RECIPE + GGUF)[2].artifacts[2].size
        return
    with pytest.raises(InputError, match=rf"artifact q8_0: llama\.cpp has no architecture for '{family.model_type}'"):
        planned(checkpoint, tmp_path, RECIPE + GGUF)


def test_padding_is_refused_where_one_number_does_not_say_the_width(family, checkpoint, tmp_path):
    text = RECIPE.replace("artifacts:", "pad_intermediate: 256\nartifacts:").replace("group_size: 64", "group_size: 32")
    (tmp_path / "test.yaml").write_text(text)
    loaded = recipe.load(str(tmp_path / "test.yaml"))
    if family.padded_by:
        assert json.dumps(padded(checkpoint, loaded).raw_config[family.padded_by]) == "256"
        return
    with pytest.raises(InputError, match="Remove pad_intermediate"):
        padded(checkpoint, loaded)


@dataclass(frozen=True)
class SiblingConfig(ModelConfig):
    """With one number more."""

    mixers: int = 3


def sibling():
    """Qwen2 with other names and a number of its own in GGUF files."""
    qwen2 = FAMILIES["qwen2"]
    names = dict(qwen2.gguf.names) | {"mlp.down_proj": "ffn_out", "input_layernorm": "first_norm"}
    numbers = (("mixer_count", "u32", "mixers"),)
    return replace(
        qwen2,
        model_type="sibling",
        parse=lambda raw, where: SiblingConfig(**vars(qwen2.parse(raw, where))),
        gguf=replace(qwen2.gguf, architecture="sibling", names=names, numbers=numbers, config=SiblingConfig),
    )


def test_a_gguf_file_has_the_names_and_numbers_of_its_own_family(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sibling", sibling())
    checkpoint = Checkpoint.open(make_checkpoint(model_type="sibling"))
    given = planned(checkpoint, tmp_path, RECIPE.split("  - {")[0] + GGUF)
    assert pipeline.build(*given, tmp_path / "out", CPU, Quiet()).passed
    path = next((tmp_path / "out" / "model-GGUF").glob("*.gguf"))
    source = open_weights(path)
    assert replace(source.config, epsilon=checkpoint.config.epsilon) == checkpoint.config  # a float32 in the file
    assert source.header.value("sibling.mixer_count") == 3
    assert "blk.1.ffn_out.weight" in source.header.tensors
    assert "blk.0.first_norm.weight" in source.header.tensors
    written = {tensor.name: hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in GGUFReader(path).tensors}
    others = {f"model.layers.1.{checkpoint.family.linears[-1]}.weight": "not these values"}
    compared = {
        compare.args[3].name: compare for compare in FORMATS["gguf"].read_back([path], CPU).tensors(written, others)
    }
    compared["blk.0.ffn_out.weight"]()
    with pytest.raises(QQuantError, match="decodes to other values"):
        compared["blk.1.ffn_out.weight"]()
