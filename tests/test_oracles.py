"""Other tools read what qquant writes, and compute what qquant's own dequantized weights compute.

Needs the side environments of `make oracles` (tests/oracles/README.md); run with `make test-oracles`. An artifact's logits
in another tool are compared with those of transformers' Qwen2 holding `open_weights(artifact)` in float32. That a
tool loads a folder without an error proves nothing: some fill what they do not find with random numbers.

A tool that multiplies in float32 must agree to rounding. One that rounds activations (bf16, or 8 bits in llama.cpp) may
differ by a KL divergence a fifth of what 4-bit quantization itself costs on the demo checkpoint (0.003).
"""

import dataclasses
import functools
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qquant import recipe
from qquant.artifact.opening import open_weights
from qquant.calibration import Tokenizer
from qquant.calibration.sources import corpora, heldout_texts
from qquant.formats import FORMATS
from qquant.formats.gguf.container import read_header
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.pipeline import check
from qquant.progress import Quiet
from qquant.recipe import Checks, Gates, GgufArtifact
from qquant.resources import data_dir
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint
from tests.worlds import GOLDEN, ROOT

pytestmark = pytest.mark.oracle

RUNNERS = ROOT / "tests" / "oracles"
ORACLES = ROOT / ".oracles"
GGUF_TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
FOLDERS = ("GPTQ-Int4", "GPTQ-Int8", "AWQ")
CHECKPOINTS = ("demo", "grouped")
HEAD = """
version: 1
name: oracles
calibration:
  sources: [{bundled: wikitext-2-valid}]
  samples: 16
  length: 256
  default_system_share: 0
checks: {text: "bundled:wikitext-2-test", windows: 2, length: 128}
artifacts:
"""
FOLDER_ENTRIES = """\
  - {name: gptq-int4, format: gptq, bits: 4, gates: {defaults: false}}
  - {name: gptq-int8, format: gptq, bits: 8, gates: {defaults: false}}
  - {name: awq, format: awq, gates: {defaults: false}}
"""
CARD = """---
license: other
license_name: tongyi-qianwen
license_link: https://huggingface.co/Qwen/Qwen1.5-7B-Chat/blob/main/LICENSE
language: [en, zh]
pipeline_tag: text-generation
tags: [chat]
base_model: Qwen/Qwen1.5-7B
datasets: [wikitext]
---
# Grouped
"""
HELD_OUT = "wikitext-2-test.txt.gz"


def needs(name):
    """Skip where the side environment `name` was not made."""
    ready = (ORACLES / name / ".stamp").is_file()
    return pytest.mark.skipif(not ready, reason=f".oracles/{name} is missing: run `make oracles`")


def run(name, script, *arguments):
    """What a runner of tests/oracles prints last, parsed; the test fails with its error output if it fails."""
    command = [ORACLES / name / "bin" / "python", RUNNERS / script, *arguments]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{script} exited {done.returncode}:\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass
class Built:
    """A checkpoint, what `qquant build` made of it, and some held-out tokens int32 [rows, length]."""

    checkpoint: Path
    out: Path
    tokens: Path
    expected: dict = dataclasses.field(default_factory=dict)

    def folder(self, suffix):
        (found,) = self.out.glob(f"*-{suffix}")
        return found

    def gguf(self, kind):
        (found,) = self.out.glob(f"*-GGUF/*-{kind}.gguf")
        return found

    def reference(self, path):
        """(logits float32 [rows, length, vocabulary] of the dequantized weights of `path`, a model that holds them)."""
        if path not in self.expected:
            config = AutoConfig.from_pretrained(self.checkpoint)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            state = dequantized_state(path)
            missing, unexpected = model.load_state_dict(state, strict=False)
            assert not unexpected
            assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
            model.tie_weights()
            with torch.inference_mode():
                rows = load_file(self.tokens)["tokens"].long()
                logits = torch.stack([model(row[None]).logits[0] for row in rows])
            self.expected[path] = logits, model
        return self.expected[path]


def dequantized_state(path):
    """Every tensor of an artifact by its checkpoint name, dequantized by qquant, float32."""
    source = open_weights(path)
    return {name: source.tensor(name).float() for name in source.family.shapes(source.config)}


def run_tool(name, *arguments, folder=None):
    """What a program of llama.cpp prints; the test fails with it if it fails."""
    command = [str(part) for part in (ORACLES.resolve() / "llama" / "tools" / name, *arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, cwd=folder)
    assert done.returncode == 0, f"{name} exited {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout


def held_out_text():
    return gzip.decompress((data_dir("calibration") / "heldout" / HELD_OUT).read_bytes()).decode()


def entries(kinds, imatrix):
    """Recipe entries for GGUF files."""
    return "".join(
        f"  - {{name: gguf-{kind}, format: gguf, type: {kind}, imatrix: {str(imatrix).lower()}, solver: ggml, gates: {{defaults: false}}}}\n"
        for kind in kinds
    )


MEASURED_TYPES = ("q2_k", "q4_k_m", "q4_0")
MEASURED = HEAD + entries(MEASURED_TYPES, True)
EVERYTHING = HEAD + FOLDER_ENTRIES + entries(GGUF_TYPES, False)


def build(checkpoint, folder, text=EVERYTHING, *options):
    described = folder / "oracles.yaml"
    folder.mkdir(exist_ok=True)
    described.write_text(text)
    command = [
        Path(sys.executable).with_name("qquant"),
        "build",
        checkpoint,
        "--recipe",
        described,
        "--out",
        folder / "out",
        *options,
    ]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-6000:]
    ids = AutoTokenizer.from_pretrained(checkpoint)(held_out_text()[:8000]).input_ids
    tokens = torch.tensor(ids[: 3 * 128], dtype=torch.int32).view(3, 128)
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    return Built(checkpoint, folder / "out", folder / "tokens.safetensors")


@pytest.fixture(scope="session")
def built(demo, tmp_path_factory):
    """What `qquant build` makes of the trained demo checkpoint, with every kind of artifact."""
    return build(demo, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def grouped(tmp_path_factory):
    """The same of random fp16 weights with grouped queries and tied embeddings."""
    folder = tmp_path_factory.mktemp("grouped")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2, "tie_word_embeddings": True}
    checkpoint = write_checkpoint(folder / "Grouped-9M-Chat-v2", torch.float16, **sizes)
    (checkpoint / "README.md").write_text(CARD)
    return build(checkpoint, folder)


@pytest.fixture(scope="session")
def measured(demo, tmp_path_factory):
    """Files of the trained checkpoint that use the importance matrix of their own build."""
    return build(demo, tmp_path_factory.mktemp("measured"), MEASURED)


@pytest.fixture(params=CHECKPOINTS)
def model(request):
    """Either of the two."""
    return request.getfixturevalue({"demo": "built", "grouped": "grouped"}[request.param])


def divergence(expected, found):
    """Mean KL divergence of `found` logits from `expected`, in nats per token, and their top-1 agreement."""
    expected, found = (logits.double().log_softmax(-1) for logits in (expected, found))
    mean = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return mean, (expected.argmax(-1) == found.argmax(-1)).double().mean().item()


def assert_equal_to_rounding(expected, found, relative):
    """No logit off by more than `relative` times the spread of the logits."""
    worst = (expected - found).abs().max().item() / expected.std().item()
    assert worst < relative, f"a logit is off by {worst:.2g} standard deviations"


def assert_close(expected, found):
    mean, agreement = divergence(expected, found)
    assert mean < 6e-4, f"KL divergence {mean:.2g}"
    assert agreement > 0.95, f"top-1 agreement {agreement:.3f}"


@needs("transformers")
@pytest.mark.parametrize("suffix", FOLDERS)
def test_transformers_multiplies_with_our_weights(model, suffix, tmp_path):
    """from_pretrained, and gptqmodel's plain kernels: float32 for GPTQ, fp16 for AWQ."""
    folder = model.folder(suffix)
    out = tmp_path / "logits.safetensors"
    run("transformers", "transformers_logits.py", folder, model.tokens, out, "--kernel", "reference")
    expected, _ = model.reference(folder)
    assert_equal_to_rounding(expected, load_file(out)["logits"], 1e-2 if suffix == "AWQ" else 1e-4)


@needs("transformers")
@pytest.mark.parametrize("suffix", FOLDERS)
def test_transformers_as_users_load_it(model, suffix, tmp_path):
    """from_pretrained with nothing but a path: the kernels that gptqmodel picks, in the checkpoint's own precision."""
    folder = model.folder(suffix)
    out = tmp_path / "logits.safetensors"
    said = run("transformers", "transformers_logits.py", folder, model.tokens, out)
    blocks = AutoConfig.from_pretrained(model.checkpoint).num_hidden_layers
    assert sum(count for kernel, count in said["kernels"].items() if kernel != "Linear") == 7 * blocks
    expected, _ = model.reference(folder)
    assert_close(expected, load_file(out)["logits"])


@needs("auto-gptq")
@pytest.mark.parametrize("suffix", ["GPTQ-Int4", "GPTQ-Int8"])
def test_auto_gptq_multiplies_with_our_weights(built, suffix, tmp_path):
    folder = built.folder(suffix)
    out = tmp_path / "logits.safetensors"
    said = run("auto-gptq", "autogptq_logits.py", folder, built.tokens, out)
    assert sum(said["kernels"].values()) == 7 * 6
    expected, _ = built.reference(folder)
    assert_equal_to_rounding(expected, load_file(out)["logits"], 1e-4)


@needs("vllm")
@pytest.mark.parametrize("suffix", ["GPTQ-Int4", "AWQ"])
def test_vllm_serves_chats_from_our_weights(built, suffix, tmp_path):
    """Its CPU build has no 8-bit kernel, so GPTQ-Int8 is not asked for."""
    folder = built.folder(suffix)
    out = tmp_path / "answers.json"
    run("vllm", "vllm_serve.py", folder, built.tokens, out)
    answers = json.loads(out.read_text())
    (choice,) = answers["chat"]["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Tell me about the city of London."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(built.checkpoint)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answers["prompt"] == rendered
    assert answers["chat"]["usage"]["prompt_tokens"] == len(rendered)
    expected = built.reference(folder)[0].log_softmax(-1)[:, :-1]
    following = load_file(built.tokens)["tokens"].long()[:, 1:]
    ours = expected.gather(-1, following.unsqueeze(-1)).squeeze(-1)
    error = (ours - torch.tensor(answers["logprobs"])).abs()
    assert error.mean() < 0.03, f"log-probabilities off by {error.mean():.3f} on average"
    assert error.max() < 0.3
    assert (expected.argmax(-1) == torch.tensor(answers["top"])).double().mean() > 0.95


@needs("llama")
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_llama_cpp_decodes_our_blocks_and_continues_a_prompt(model, kind, tmp_path):
    """libllama dequantizes the file to f32 itself, so only the order of float32 sums is left to differ."""
    plain, out = tmp_path / "plain.gguf", tmp_path / "logits.safetensors"
    run("llama", "llama_quantize.py", model.gguf(kind), plain, "f32", "--requantize")
    run("llama", "llama_logits.py", plain, model.tokens, out)
    found = load_file(out)
    expected, twin = model.reference(model.gguf(kind))
    assert_equal_to_rounding(expected, found["logits"], 1e-2)
    prompt = load_file(model.tokens)["tokens"].long()
    count = found["continuation"].shape[1]
    with torch.inference_mode():
        for row, continuation in zip(prompt, found["continuation"].long(), strict=True):
            logits = twin(torch.cat([row, continuation])[None]).logits[0, len(row) - 1 : -1]
            chosen = logits.gather(-1, continuation.unsqueeze(-1)).squeeze(-1)
            assert (logits.max(-1).values - chosen).max() < 0.02 * logits.std(), f"another word within {count} tokens"


@needs("llama")
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_llama_cpp_as_users_run_it(built, kind, tmp_path):
    """Its quantized multiplications round activations to 8 bits."""
    out = tmp_path / "logits.safetensors"
    run("llama", "llama_logits.py", built.gguf(kind), built.tokens, out)
    assert_close(built.reference(built.gguf(kind))[0], load_file(out)["logits"])


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """`converted(checkpoint)`: the checkpoint as an f32 GGUF of llama.cpp's own converter."""

    @functools.cache
    def convert(checkpoint):
        target = tmp_path_factory.mktemp("converted") / "f32.gguf"
        run("transformers", "llama_converter.py", checkpoint, target)
        return target

    return convert


def differences(ours, theirs):
    """What differs between two GGUF files, by name; empty: not a byte."""
    mine, other = read_header(ours), read_header(theirs)
    placed = [
        {name: (tensor.shape, tensor.type_id, tensor.offset) for name, tensor in header.tensors.items()}
        for header in (mine, other)
    ]
    found = [key for key in {**mine.fields, **other.fields} if mine.fields.get(key) != other.fields.get(key)]
    found += [name for name in {**placed[0], **placed[1]} if placed[0].get(name) != placed[1].get(name)]
    if list(mine.fields) != list(other.fields):
        found.append(f"order of fields: {list(mine.fields)} | {list(other.fields)}")
    if list(mine.tensors) != list(other.tensors):
        found.append("order of tensors")
    if ours.read_bytes()[mine.data :] != theirs.read_bytes()[other.data :]:
        found.append("data")
    return found or ([] if ours.read_bytes() == theirs.read_bytes() else ["bytes of the header"])


@needs("llama")
@needs("transformers")
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_llama_cpp_writes_the_same_file(model, converted, kind, tmp_path):
    """Its converter, then llama-quantize, on the same checkpoint: every byte, the metadata included."""
    theirs = tmp_path / "theirs.gguf"
    run_tool("llama-quantize", converted(model.checkpoint), theirs, kind)
    assert differences(model.gguf(kind), theirs) == []


@needs("llama")
@needs("transformers")
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_llama_quantize_takes_our_importance_matrix_and_writes_the_same_file(measured, converted, form, tmp_path):
    """The matrix that a build leaves, in either format; the file that came of it was built with it, measured or given."""
    for name in ("imatrix.gguf", "imatrix.dat"):
        shutil.copy(measured.out / "calibration" / name, tmp_path / name)
    for kind in MEASURED_TYPES:
        theirs = tmp_path / f"{kind}.gguf"
        run_tool(
            "llama-quantize",
            "--imatrix",
            f"imatrix.{form}",
            converted(measured.checkpoint),
            theirs,
            kind,
            folder=tmp_path,
        )
        found = differences(measured.gguf(kind), theirs)
        assert found == ([] if form == "gguf" else ["quantize.imatrix.file"])


@needs("llama")
@needs("transformers")
def test_an_importance_matrix_of_llama_imatrix_gives_the_same_file(built, converted, tmp_path):
    """Given with --imatrix, in both formats; names, counts and chunks are those of the file."""
    for form in ("gguf", "dat"):
        given = tmp_path / f"given.{form}"
        shutil.copy(GOLDEN / f"tiny.imatrix.{form}", given)
        ours = build(built.checkpoint, tmp_path / f"from-{form}", MEASURED, "--imatrix", given)
        for kind in MEASURED_TYPES:
            theirs = tmp_path / f"{kind}-{form}.gguf"
            source = converted(built.checkpoint)
            run_tool("llama-quantize", "--imatrix", given.name, source, theirs, kind, folder=tmp_path)
            assert differences(ours.gguf(kind), theirs) == []


@needs("llama")
@pytest.mark.parametrize(("kind", "limit"), [("q8_0", 3), ("q4_0", 2), ("f16", 5)])
def test_gguf_split_writes_the_same_parts(built, kind, limit, tmp_path):
    """Of the whole file, by size; llama.cpp loads the model from the first part, and merges ours to the whole file."""
    text = EVERYTHING.replace("calibration:", f"gguf_split_size: {limit}000000\ncalibration:", 1)
    ours = build(built.checkpoint, tmp_path / "ours", text, "--only", f"gguf-{kind}").out
    files = sorted(ours.glob("*-GGUF/*.gguf"))
    prefix = files[0].name.removesuffix(f"-00001-of-{len(files):05d}.gguf")
    run_tool("llama-gguf-split", "--split", "--split-max-size", f"{limit}M", built.gguf(kind), tmp_path / prefix)
    theirs = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 1
    assert [file.name for file in files] == [file.name for file in theirs]
    assert [differences(mine, other) for mine, other in zip(files, theirs, strict=True)] == [[]] * len(files)
    logits = []
    for number, path in enumerate((built.gguf(kind), files[0])):
        run("llama", "llama_logits.py", path, built.tokens, tmp_path / f"{number}.safetensors")
        logits.append(load_file(tmp_path / f"{number}.safetensors")["logits"])
    assert torch.equal(*logits)
    run_tool("llama-gguf-split", "--merge", files[0], tmp_path / "merged")
    whole, merged = read_header(built.gguf(kind)), read_header(tmp_path / "merged")
    assert {key: field for key, field in merged.fields.items() if not key.startswith("split.")} == whole.fields
    assert [(t.name, t.shape, t.type_id) for t in merged.tensors.values()] == [
        (t.name, t.shape, t.type_id) for t in whole.tensors.values()
    ]


@needs("llama")
def test_llama_cpp_finds_the_perplexity_that_a_check_states(built, tmp_path):
    """Same text, windows of 512 and scored half: within 0.1 % on f16 weights, 0.5 % where llama.cpp rounds activations to 8 bits."""
    text = tmp_path / "held-out.txt"
    text.write_text(held_out_text())
    checks = Checks(windows=16, length=512)
    paths = {kind: built.gguf(kind) for kind in GGUF_TYPES}
    checkpoint = Checkpoint.open(built.checkpoint)
    gates = Gates(defaults=False)
    stated = check(list(paths.values()), checkpoint, checks, gates, torch.device("cpu"), Quiet()).artifacts
    for (kind, path), row in zip(paths.items(), stated, strict=True):
        found = run("llama", "llama_perplexity.py", path, text, "--context", "512", "--chunks", "16")
        print(f"{kind}: {row.perplexity:.3f}, llama.cpp {found['ppl']:.3f}, {row.perplexity / found['ppl'] - 1:+.3%}")
        assert row.perplexity == pytest.approx(found["ppl"], rel=1e-3 if kind == "f16" else 5e-3), kind


@pytest.fixture
def sixteen(demo, tmp_path):
    """Calibration for the tools that quantize: 16 samples of 128 tokens of held-out text."""
    ids = AutoTokenizer.from_pretrained(demo)(held_out_text()[:20_000]).input_ids
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.tensor(ids[: 16 * 128], dtype=torch.int32).view(16, 128)}, path)
    return path


def qquant(*arguments):
    """What a command of ours prints; the test fails with its error output if it fails."""
    command = [Path(sys.executable).with_name("qquant"), *arguments]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-6000:]}"
    return done.stdout


@needs("autoround")
def test_a_folder_of_auto_round_is_read_checked_and_asked(demo, sixteen, tmp_path):
    """Written as `auto_gptq`; after one step a block it is rounding to nearest, which costs the demo a KL divergence of 0.006."""
    folder = tmp_path / "auto-round"
    run("autoround", "autoround_quantize.py", demo, sixteen, folder, "--iters", 1)
    assert "autoround_version" in qquant("inspect", folder)
    said = json.loads(qquant("check", folder, "--against", demo, "--windows", 4, "--length", 128, "--json"))
    (row,) = said["artifacts"]
    assert 1e-3 < row["kl_divergence"] < 1e-2
    answer = json.loads(
        qquant("run", folder, "The city of London", "--raw", "--max-new-tokens", 8, "--greedy", "--json")
    )
    assert answer["answer"].strip()


@needs("llmcompressor")
def test_a_folder_of_llm_compressor_is_described_and_its_weights_are_near(demo, sixteen, tmp_path):
    """In compressed-tensors, which `inspect` describes and nothing else reads; what its own library unpacks is a checkpoint."""
    folder, plain = tmp_path / "llm-compressor", tmp_path / "plain"
    run("llmcompressor", "llmcompressor_quantize.py", demo, sixteen, folder, "--dequantized", plain)
    said = json.loads(qquant("inspect", folder, "--tensors", "--json"))
    assert said["facts"]["quantization_config"]["quant_method"] == "compressed-tensors"
    kinds = {tensor["name"].rsplit(".", 1)[1] for tensor in said["tensors"]}
    assert {"weight_packed", "weight_scale", "weight_shape"} <= kinds
    ours, theirs = dequantized_state(demo), dequantized_state(plain)
    for name in (name for name in ours if name.endswith("proj.weight")):
        error = (theirs[name] - ours[name]).norm() / ours[name].norm()
        assert 0.01 < error < 0.2, f"{name}: {error:.3f}"


SHARED = ROOT.parent / "shared"  # texts and the tokenizer of Qwen1.5, where they are


@needs("llama")
@pytest.mark.skipif(not (SHARED / "data" / "qwen-tokenizer").is_dir(), reason="Qwen's own tokenizer is not here")
def test_the_tokenizer_of_a_gguf_file_is_qwens(tmp_path):
    """llama.cpp reads it from our metadata: 47 of 47 golden cases, and two texts token by token and back."""
    checkpoint = write_checkpoint(tmp_path / "Qwen1.5-0.0B", vocab_size=151936, hidden_size=32)
    for path in (SHARED / "data" / "qwen-tokenizer").iterdir():
        shutil.copy(path, checkpoint / path.name)
    (checkpoint / "chat_template.jinja").unlink()
    planned = FORMATS["gguf"].plan(
        Checkpoint.open(checkpoint),
        GgufArtifact(name="x", format="gguf", type="q8_0", imatrix=False),
        recipe.load("demo"),
        "Qwen1.5-0.0B",
    )
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(planned.files[0].head.ljust(planned.files[0].size, b"\0"))
    header = read_header(path)
    assert header.value("tokenizer.ggml.add_bos_token") is header.value("tokenizer.ggml.add_eos_token") is False
    cases = (SHARED / "golden" / "qwen2-tokenizer.inp").read_text().split("\n__ggml_vocab_test__\n")
    answers = (SHARED / "golden" / "qwen2-tokenizer.out").read_text().split("\n")
    golden = [[int(token) for token in line.split()] for line in answers[: len(cases)]]
    assert len(cases) == 47
    texts = [tmp_path / f"{number}.txt" for number in range(len(cases))]
    for text, case in zip(texts, cases, strict=True):
        text.write_text(case, newline="")
    for entry in (*corpora().values(), *heldout_texts().values()):  # a stretch of all that calibrates and judges
        texts.append(tmp_path / f"{len(texts)}.txt")
        texts[-1].write_text(entry.read()[:20_000].decode(errors="ignore"), newline="")
    texts += [SHARED / "data" / "wiki.test.raw", SHARED / "data" / "wiki.valid.txt"]
    said = run("llama", "llama_tokens.py", path, tmp_path / "ids.safetensors", *texts)
    theirs = load_file(tmp_path / "ids.safetensors")
    ours, from_file = Tokenizer.open(checkpoint), gguf_tokenizer(path, header)
    users = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    for number, text in enumerate(texts):
        found = theirs[str(number)].tolist()
        content = text.read_bytes().decode()
        assert found == ours.encode(content, special=False) == from_file.encode(content, special=False), text
        if "<|" not in content:
            assert found == users(content, add_special_tokens=False, verbose=False).input_ids, text
        if number < len(golden):
            assert found == golden[number]
    assert said["round_trip"][-2:] == [True, True]
    for text in texts[-2:]:
        content = text.read_bytes().decode()
        assert from_file.decode(from_file.encode(content, special=False)) == content
