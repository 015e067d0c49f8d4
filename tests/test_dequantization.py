"""`qquant dequantize`: what transformers loads answers as the artifact does, and a folder is whole or not there."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner

import qquant
from qquant import dequantization
from qquant.artifact.opening import open_weights
from qquant.cli import cli
from qquant.dequantization import dequantize
from qquant.errors import NumericalError, UsageError
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.source.checkpoint import Checkpoint

CPU = torch.device("cpu")
KINDS = {"gptq": "model-GPTQ-Int4", "awq": "model-AWQ", "gguf": "model-GGUF/model-q4_0.gguf"}


@pytest.fixture(params=KINDS)
def artifact(request, built):
    return built[1] / KINDS[request.param]


def test_transformers_loads_it_and_gives_the_artifacts_logits(artifact, tmp_path):
    out = tmp_path / "back"
    made = dequantize(artifact, out, "float32", CPU, Quiet())
    assert made.size == sum(file.stat().st_size for file in out.iterdir())
    ids = torch.arange(40, 90)[None]
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = qquant.load(artifact, device="cpu", dtype="float32")(ids).logits
        found = theirs.eval()(ids).logits
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert theirs.config.tie_word_embeddings


def test_weights_are_the_codes_values_rounded_once(artifact, tmp_path):
    out = tmp_path / "back"
    done = CliRunner().invoke(cli, ["dequantize", str(artifact), "--out", str(out), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.exception
    source, back = open_weights(artifact), Checkpoint.open(out)
    assert json.loads(done.stdout)["tensors"] == len(back.tensors)
    assert back.dtype == "BF16"
    for name in back.tensors:
        assert torch.equal(back.tensor(name), source.tensor(name).to(torch.bfloat16)), name
    assert "quantization_config" not in back.raw_config
    card = (out / "README.md").read_text()
    assert "are not the original weights" in card
    assert artifact.name in card


def test_it_can_be_built_again(artifact, tmp_path):
    dequantize(artifact, tmp_path / "back", None, CPU, Quiet())
    recipe, checkpoint = Asked(str(tmp_path / "back"), "demo").open()
    assert Plan.of(recipe, checkpoint, ["gguf-q8_0"]).artifacts
    text = "Ships and sailors, <|im_start|>user\n42 + 1<|im_end|>"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs(text, add_special_tokens=False)["input_ids"] == checkpoint_ids(artifact, text)
    chat = [{"role": "user", "content": "?"}]
    assert "<|im_start|>user" in theirs.apply_chat_template(chat, tokenize=False)


def checkpoint_ids(artifact, text):
    from qquant.runtime.answering import _tokenizer

    return _tokenizer(artifact).encode(text)


def test_a_killed_one_leaves_nothing_under_its_name(built, tmp_path, monkeypatch):
    artifact, out = built[1] / KINDS["gptq"], tmp_path / "back"

    class Stopped(Quiet):
        def advance(self, phase, done, of):
            if done == of // 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantize(artifact, out, None, CPU, Stopped())
    assert list(tmp_path.iterdir()) == []
    stale = tmp_path / ".back.partial"  # of one that had no time to clean up
    stale.mkdir()
    (stale / "model-00001-of-00002.safetensors").write_bytes(b"old")
    dequantize(artifact, out, None, CPU, Quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["back"]
    assert not (out / "model-00001-of-00002.safetensors").exists()


def test_what_cannot_be_done_is_said(built, tmp_path, monkeypatch):
    folder, out = built
    with pytest.raises(UsageError, match="is not quantized"):
        dequantize(folder, tmp_path / "back", None, CPU, Quiet())
    with pytest.raises(UsageError, match="exists; give a new folder"):
        dequantize(out / KINDS["awq"], tmp_path, None, CPU, Quiet())
    monkeypatch.setattr(dequantization, "_rows", lambda source, name, shape: [torch.full(shape, 1e6)])
    with pytest.raises(NumericalError, match="give --dtype bfloat16"):
        dequantize(out / KINDS["awq"], tmp_path / "back", "float16", CPU, Quiet())
    assert not (tmp_path / "back").exists()
