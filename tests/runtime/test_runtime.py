"""Loaded artifacts: the logits of their dequantized weights, transformers' generation, and a word about what runs."""

import json
import math
import shutil

import pytest
import torch
import transformers

import qquant
from qquant import devices, recipe
from qquant.algorithms.grid import Integers, QuantizedTensor, UniformGrid, UniformParams
from qquant.artifact.draft import Draft
from qquant.artifact.finishing import installed
from qquant.artifact.manifest import Origin
from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.cli import main
from qquant.errors import EnvironmentMissingError, InputError, NumericalError, UsageError
from qquant.formats.awq import AwqLayout
from qquant.formats.gguf.container import read_header
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.formats.gptq import GptqLayout
from qquant.kernels import cpu_int4
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.runtime import linears, loading, parts
from qquant.runtime.answering import Answerer, AnswerSettings, Text
from qquant.runtime.skeleton import transformers_config
from qquant.solve import walk
from qquant.solve.layers import Layers
from qquant.solve.moments import Moments
from qquant.source.checkpoint import Checkpoint
from tests.worlds import GOLDEN

MADE = GOLDEN / "artifacts"  # by other tools
RECIPE = """
version: 1
name: runtime
calibration: {sources: [{bundled: books-en}], samples: 2, length: 64, default_system_share: 0}
checks: {text: "bundled:wikitext-2-test", windows: 2, length: 32}
artifacts:
"""
FOLDERS = (
    "{name: gptq-int4, format: gptq, bits: 4, solver: rtn, scale_search: minmax}",
    "{name: gptq-int8, format: gptq, bits: 8, solver: rtn, scale_search: minmax}",
    "{name: awq, format: awq, ratios: 1, solver: rtn, scale_search: minmax}",
)
GGUF = ("q4_0", "q5_0", "q8_0", "q4_k_m", "q2_k", "f16")
NAMES = ("gptq-int4", "gptq-int8", "awq", *GGUF)
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 6e-3}  # relative error of logits, Frobenius


def built(checkpoint, folder, entries):
    """Artifact name -> path: a checkpoint in the formats of recipe `entries`, solved on one short sample and not checked."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + "".join(f"  - {entry}\n" for entry in entries))
    loaded = recipe.load(str(path))
    plan = Plan.of(loaded, checkpoint)
    drafts = [Draft(artifact, folder / "partial", "test") for artifact in plan.artifacts]
    for draft in drafts:
        draft.open()
    moments = Moments(folder / "moments", None)
    walk.quantize(checkpoint, [torch.arange(64)], drafts, moments, Layers.of(checkpoint, torch.device("cpu")), Quiet())
    (folder / "out").mkdir()
    for draft in drafts:
        draft.finish(folder / "out", Origin())
    return {artifact.name: installed(folder / "out", artifact) for artifact in plan.artifacts}


def gguf(name):
    return f"{{name: {name}, format: gguf, type: {name}, solver: ggml, imatrix: false}}"


@pytest.fixture(scope="module")
def release(demo, tmp_path_factory):
    """Artifact name -> path: the demo checkpoint in every format, rounded to nearest."""
    folder = tmp_path_factory.mktemp("release")
    return built(Checkpoint.open(demo), folder, [*FOLDERS, *map(gguf, GGUF)])


def reference(path, dtype=torch.float32):
    """transformers' own model with the dequantized weights."""
    source = open_weights(path)
    config = transformers_config(source.family.transformers, source.config, {}, dtype)
    model = transformers.Qwen2ForCausalLM(config)
    names = source.family.shapes(source.config)
    state = {name: source.tensor(name).to(dtype) for name in names}
    state.setdefault("lm_head.weight", source.tensor("lm_head.weight").to(dtype))
    model.load_state_dict(state)
    return model.to(dtype).eval()


def tokens(count, model):
    return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(5))


def relative(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dequantized_model(name, release):
    exact = reference(release[name])
    ids = tokens(40, exact)
    with torch.no_grad():
        truth = exact(ids).logits
        for dtype, limit in LIMITS.items():
            model = qquant.load(release[name], "cpu", dtype)
            assert model.dtype == dtype
            assert relative(model(ids).logits, truth) <= limit, dtype


@pytest.mark.parametrize("name", ["gptq-int4", "q8_0"])
def test_many_rows_take_the_exact_way(name, release):
    """Above the threshold bf16 rounding of activations and weights is all that is left."""
    exact = reference(release[name])
    model = qquant.load(release[name], "cpu", torch.bfloat16)
    ids = tokens(cpu_int4.MAX_ROWS[4] + 1, exact)
    with torch.no_grad():
        truth = exact(ids).logits
        plain = relative(reference(release[name], torch.bfloat16)(ids).logits, truth)
        assert relative(model(ids).logits, truth) <= 1.2 * plain


@pytest.mark.parametrize("name", ["gptq-int4", "gptq-int8", "awq", "q4_0", "q4_k_m"])
def test_generation_is_the_reference_models(name, release):
    exact = reference(release[name])
    model = qquant.load(release[name], "cpu", torch.float32)
    exact.generation_config = model.generation_config
    ids = tokens(12, exact)
    wanted = exact.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None), wanted)
    quick = qquant.load(release[name], "cpu", torch.bfloat16)
    found = quick.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert found.shape == wanted.shape


def test_batches_and_caches_agree(release):
    """A batch gives what its rows give; a step with a cache what the whole gives."""
    model = qquant.load(release["gptq-int4"], "cpu", torch.float32)
    ids = torch.cat([tokens(10, model), tokens(10, model).flip(1)])
    with torch.no_grad():
        whole = model(ids).logits
        alone = model(ids[1:]).logits
        first = model(ids[:, :9], use_cache=True)
        last = model(ids[:, 9:], past_key_values=first.past_key_values).logits
    assert relative(whole[1:], alone) <= 1e-5
    assert relative(last[:, 0], whole[:, 9]) <= 1e-5


def test_every_linear_says_what_runs(release):
    model = qquant.load(release["gptq-int4"], "cpu")
    found = loading.paths(model)
    assert len(found) == 6 * 4 + 1, "q, k, v and gate, up are one each"
    qkv = found["model.layers.0.self_attn.q_proj"]
    assert qkv == (
        "256 -> 768, GPTQ 4 bit, groups of 128; torch's int4 product up to 48 rows, above dequantize and multiply"
    )
    by = "" if devices.multiplies(torch.bfloat16) else ", by float32 above 4 rows"
    assert found["lm_head"] == f"256 -> 8192, bf16; torch linear in bfloat16{by}"
    assert "torch's int4 product" in repr(model)
    dense = loading.paths(qquant.load(release["q4_k_m"], "cpu"))
    assert "dequantized at load" in dense["model.layers.0.mlp.down_proj"]
    assert "q6_k" in dense["lm_head"]
    eight = loading.paths(qquant.load(release["q8_0"], "cpu"))
    assert "twice" in eight["model.layers.0.self_attn.o_proj"]
    assert eight["model.embed_tokens"].startswith("8 bit")


@pytest.mark.parametrize(("name", "bits"), [("gptq-int4", 4.5), ("gptq-int8", 9.0), ("q4_0", 5.6), ("q8_0", 10.6)])
def test_no_16_bit_copy_is_kept(name, bits, release):
    """Codes, and per group scale and shift for the product and the exact scale for the other way."""
    model = qquant.load(release[name], "cpu")
    held = [module for module in model.model.modules() if isinstance(module, linears.CpuQuantLinear)]
    assert len(held) == 24
    weights = sum(module.in_features * module.out_features for module in held)
    biases = sum(0 if module.bias is None else module.bias.nbytes for module in held)
    assert 8 * (sum(module.nbytes for module in held) - biases) / weights <= bits
    assert weight_bytes(model) < weight_bytes(qquant.load(release["f16"], "cpu"))


# -- what other tools wrote


@pytest.mark.parametrize("name", ["autogptq-int4", "autogptq-int8", "gptqmodel-int4", "gptqmodel-awq"])
def test_other_tools_artifacts_load(name):
    exact = reference(MADE / name)
    model = qquant.load(MADE / name, "cpu", torch.float32)
    ids = tokens(20, exact)
    with torch.no_grad():
        assert relative(model(ids).logits, exact(ids).logits) <= 2e-3  # scales of bf16 and fp32 become fp16


def weight_bytes(model):
    """Memory of all weights of a loaded model; shared ones count once."""
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    packed = [module.packed.nbytes for module in model.modules() if isinstance(module, linears.CpuQuantLinear)]
    return sum(seen.values()) + sum(packed)


def integers(rows=64, columns=256, width=64, bits=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, columns // width, generator=generator) * 0.01 + 0.001).half()
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator).float()
    return codes, scales, zeros


def linear(weight, bias=None, device="cpu"):
    loader = parts.Loader.__new__(parts.Loader)
    loader.device = torch.device(device)
    return loader.quantized(weight, bias, "test")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [0, 1])
def test_activation_order_and_zeros_of_both_versions(bits, version):
    """Columns in any order, zero points of v1 (less one) and v2: the linear is what the layout says."""
    codes, scales, zeros = integers(bits=bits)
    layout = GptqLayout(bits, 64, shift=version)
    stored = layout.pack(
        QuantizedTensor(codes, UniformParams(scales, zeros), UniformGrid(bits, 64, symmetric=True, search="minmax"))
    )
    stored["g_idx"] = stored["g_idx"][torch.randperm(256)]
    module = linear(layout.integers(stored))
    x = torch.randn(3, 256)
    assert relative(module(x), x @ layout.dequantize(stored).T) <= 1e-6
    assert "inputs reordered" in module.path
    assert relative(module(x.bfloat16()), x @ layout.dequantize(stored).T) <= 2e-2
    stored["g_idx"][0] = 1 - stored["g_idx"][0].clamp(max=1)
    with pytest.raises(InputError, match="different sizes"):
        layout.integers(stored)
    stored["g_idx"][0] = 4
    with pytest.raises(InputError, match="there are 4 groups"):
        layout.integers(stored)


def test_awq_integers_are_the_layouts():
    codes, scales, zeros = integers()
    layout = AwqLayout(64)
    stored = layout.pack(
        QuantizedTensor(codes, UniformParams(scales, zeros), UniformGrid(4, 64, symmetric=False, search="minmax"))
    )
    bias = torch.randn(64)
    x = torch.randn(2, 5, 256)
    assert relative(linear(layout.integers(stored), bias)(x), x @ layout.dequantize(stored).T + bias) <= 1e-6


@pytest.mark.parametrize("shape", [(48, 256, 64, 4), (64, 96, 96, 4), (64, 512, 512, 8), (20, 64, 32, 8)])
def test_shapes_without_a_cpu_product_use_the_reference(shape):
    rows, columns, width, bits = shape
    codes, scales, zeros = integers(rows, columns, width, bits)
    module = linear(Integers(codes, scales, zeros, bits))
    exact = (codes.float().view(rows, -1, width) - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)
    x = torch.randn(3, columns)
    assert relative(module(x), x @ exact.view(rows, columns).T) <= 1e-6
    expected = linears.CpuQuantLinear if rows == 64 and width == 512 else linears.QuantLinear
    assert type(module) is expected
    if expected is linears.QuantLinear:
        assert "no kernel" in module.path


def test_linears_that_differ_stay_apart(release, tmp_path):
    """k_proj with another group size than q_proj and v_proj: three products, and the same logits."""
    source = open_weights(release["gptq-int4"])
    loader = parts.Loader(source, torch.device("cpu"), torch.float32)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    whole = loader.fused(names, [(256, 256)] * 3)
    original = loader.integers

    def integers(name):
        found = original(name)
        if "k_proj" not in name:
            return found
        return Integers(found.codes, found.scales.repeat_interleave(2, 1), found.zeros.repeat_interleave(2, 1), 4)

    loader.integers = integers
    apart = loader.fused(names, [(256, 256)] * 3)
    assert (len(whole), len(apart)) == (1, 3)
    x = torch.randn(4, 256)
    assert relative(torch.cat([part(x) for part in apart], -1), whole[0](x)) <= 1e-6


def test_parts_notice_another_input():
    whole = linears.DenseLinear(torch.randn(6, 4), None, "f32")
    first, second = (linears.FusedSlice(whole, [4, 2], index) for index in range(2))
    second.first = [first]
    x = torch.randn(3, 4)
    assert torch.equal(torch.cat([first(x), second(x)], -1), whole(x))
    first(x)
    with pytest.raises(RuntimeError, match="out of order"):
        second(x.clone())


# -- loading


def test_checkpoints_load_too_and_tied_heads_share(make_checkpoint):
    folder = make_checkpoint(tie_word_embeddings=True, num_key_value_heads=2)
    model = qquant.load(folder, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = tokens(9, model)
    with torch.no_grad():
        assert relative(model(ids).logits, theirs(ids).logits.float()) <= 1e-2
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    shapes = Checkpoint.open(folder).family.shapes(Checkpoint.open(folder).config).values()
    tables = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    assert weight_bytes(model) == 2 * sum(math.prod(shape) for shape in shapes) + tables


def test_generation_settings_come_along(release, demo):
    expected = json.loads((demo / "generation_config.json").read_text())
    for name in ("gptq-int4", "q4_0"):
        settings = qquant.load(release[name], "cpu").generation_config
        assert settings.temperature == pytest.approx(expected["temperature"])
        assert settings.top_k == expected["top_k"]
        assert settings.repetition_penalty == pytest.approx(expected["repetition_penalty"])
        assert settings.eos_token_id == expected["eos_token_id"]


def test_bad_requests_are_typed(release, tmp_path):
    with pytest.raises(UsageError, match="float64"):
        qquant.load(release["awq"], "cpu", "float64")
    with pytest.raises((InputError, UsageError)):
        qquant.load(tmp_path / "nothing", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentMissingError, match="CUDA"):
            qquant.load(release["awq"], "cuda")
    damaged = tmp_path / "damaged"
    shutil.copytree(release["awq"], damaged)
    (damaged / "config.json").write_text("{}")
    with pytest.raises(InputError):
        qquant.load(damaged, "cpu")


def test_import_stays_light():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = qquant.lod


# -- answers


@pytest.fixture
def ask(capsys):
    """`ask(arguments...)` -> (exit status, stdout, stderr) of `qquant run`."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["run", *map(str, arguments), "--device", "cpu"])
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["awq", "q8_0"])
def test_run_streams_the_models_answer(name, release, ask, demo):
    status, out, err = ask(release[name], "Where does the river go?", "--greedy", "--max-new-tokens", 12)
    assert status == 0
    assert "tokens/s" in err
    model, tokenizer = qquant.load(release[name], "cpu"), Tokenizer.open(demo)
    prompt = tokenizer.render([{"role": "user", "content": "Where does the river go?"}], add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(prompt)])
    made = model.generate(ids, do_sample=False, max_new_tokens=12, temperature=None, top_p=None, top_k=None)
    expected = tokenizer.decode(token for token in made[0, ids.shape[1] :].tolist() if token not in tokenizer.eos)
    assert out == expected + "\n"


def test_run_json_seed_and_system_turn(release, ask):
    def answer(*more):
        status, out, _ = ask(release["q4_0"], "Hi", "--json", "--max-new-tokens", 6, *more)
        assert status == 0
        return json.loads(out)

    first = answer("--seed", 3)
    assert first["schema"] == "qquant-answer-1"
    assert first["tokens"] == 6 or first["stopped"]
    assert answer("--seed", 3)["answer"] == first["answer"]
    assert answer("--no-system")["prompt_tokens"] < answer()["prompt_tokens"]
    assert answer("--system", "You are a pirate, and a helpful one.")["prompt_tokens"] > first["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["Hi", "--greedy", "--top-p", "0.5"], 2, "--greedy"),
        (["Hi", "--system", "a", "--no-system"], 2, "contradict"),
        ([], 2, "PROMPT"),
        (["", "--raw"], 2, "empty"),
        (["word " * 3000, "--raw"], 2, "Shorten"),
    ],
)
def test_run_refuses(arguments, status, word, release, ask):
    code, out, err = ask(release["awq"], *arguments)
    assert (code, out) == (status, "")
    assert word in err


def test_run_without_a_template_or_with_nan(release, ask, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(release["awq"], plain)
    (plain / "chat_template.jinja").unlink()
    code, _, err = ask(plain, "Hi")
    assert (code, "--raw" in err) == (2, True)
    assert ask(plain, "Hi", "--raw", "--greedy", "--max-new-tokens", 3)[0] == 0
    answerer = Answerer.open(release["awq"], "cpu")
    answerer.model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match="not finite"):
        answerer.answer([1, 2, 3], AnswerSettings(), print)


@pytest.mark.parametrize("name", ["gptq-int4", "q8_0"])
def test_a_base_model_answers_and_stops_on_its_own_end(name, release, ask, tmp_path, monkeypatch):
    """As Qwen1.5's base models are: the template ends turns with <|im_end|>, generation stops on <|endoftext|> alone."""
    path = tmp_path / "base"
    if name == "q8_0":
        path = release[name]
        monkeypatch.setattr(Tokenizer, "_stops", lambda found: (found.added["<|endoftext|>"],))
    else:
        shutil.copytree(release[name], path)
        end = Tokenizer.open(path).added["<|endoftext|>"]
        for file in ("config.json", "generation_config.json"):
            (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | {"eos_token_id": end}))
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    code, out, err = ask(path, "Where does the river go?", "--raw", "--greedy", "--max-new-tokens", 4)
    assert (code, bool(out.strip()), "warning" in err) == (0, True, False), err
    code, out, err = ask(path, "Where does the river go?", "--greedy", "--max-new-tokens", 4)
    assert (code, bool(out.strip())) == (0, True), err
    assert "ends an answer with <|im_end|>" in err
    assert "until another stop token" in err


def test_tokens_without_text_count(release, demo, monkeypatch):
    """The rate and the time to the first token are of tokens, whatever they say."""
    answerer = Answerer.open(release["q8_0"], "cpu")
    moments = iter(range(100))
    monkeypatch.setattr("qquant.runtime.answering.time.perf_counter", lambda: float(next(moments)))
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "")
    said = []
    answer = answerer.answer([1, 2, 3], AnswerSettings(max_new_tokens=6, greedy=True), said.append)
    assert said == []
    assert (answer.tokens, answer.to_first, answer.seconds, answer.rate) == (6, 1.0, 6.0, 1.0)


def test_text_waits_for_whole_characters(demo):
    tokenizer = Tokenizer.open(demo)
    said = []
    text = Text(tokenizer, [7], 2, said.append)
    text.put(torch.tensor([[1, 2]]))
    ids = tokenizer.encode("né 你好")
    for token in [*ids, 7]:
        text.put(torch.tensor([token]))
    text.end()
    assert "".join(said) == text.text == "né 你好"
    assert all("\ufffd" not in piece for piece in said)
    assert len(said) < len(ids), "a byte of a character is not said alone"


def test_gguf_tokenizer_is_the_checkpoints(release, demo):
    theirs = Tokenizer.open(demo)
    path = release["q4_0"]
    ours = gguf_tokenizer(path, read_header(path))
    for text in ("What's up? 123 naïve\n\n  x", "你好，世界", "<|im_start|>user\nHi<|im_end|>\n"):
        assert ours.encode(text) == theirs.encode(text)
    turns = [{"role": "user", "content": "Hi"}]
    assert ours.render(turns, add_generation_prompt=True) == theirs.render(turns, add_generation_prompt=True)
    assert ours.end_of_turn == theirs.end_of_turn


def test_dense_linears_multiply_as_blocks_do(monkeypatch):
    """F.linear takes four times as long where the CPU has no instructions for bfloat16."""
    seen = []
    monkeypatch.setattr(linears, "linear", lambda *given: seen.append(given) or given[0])
    dense = linears.DenseLinear(torch.randn(8, 8).bfloat16(), torch.randn(8).bfloat16(), "bf16")
    x = torch.randn(5, 8).bfloat16()
    assert dense(x) is x
    assert [id(one) for one in seen[0]] == [id(x), id(dense.weight), id(dense.bias)]
