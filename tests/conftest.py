"""Fixtures: the demo checkpoint and its tokenizer, random checkpoints, a text, small releases, and a hub to publish them to."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from qquant import pipeline, recipe
from qquant.calibration import Tokenizer
from qquant.checks.loading import Loaded
from qquant.families import FAMILIES
from qquant.plan.plan import Plan
from qquant.progress import Quiet
from qquant.resources import data_dir
from qquant.source.checkpoint import Checkpoint
from tests.worlds import toy_family
from tests.worlds.builds import CPU, HEAD, load_recipe, quiet
from tests.worlds.chats import prose
from tests.worlds.hub_release import Waits, write_build
from tests.worlds.hub_server import serve

SMALL = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CONFIGS = {"qwen2": SMALL, "toy": toy_family.CONFIG}  # of a small checkpoint, by model type
RELEASE = """
version: 1
name: release
calibration: {sources: [{bundled: books-en}], samples: 2, length: 32, default_system_share: 0}
checks: {windows: 2, length: 32}
artifacts:
  - {name: gptq, format: gptq, bits: 4, group_size: 32, solver: rtn, gates: {defaults: false}}
  - {name: awq, format: awq, group_size: 64, ratios: 2, solver: rtn, gates: {defaults: false}}
  - {name: q4_0, format: gguf, type: q4_0, imatrix: false, gates: {defaults: false}}
"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.fixture(autouse=True)
def _signals():
    """As a terminal gives them: `nohup` and a shell's `&` let a process ignore some, and a stopped command goes deaf before it ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    """Tables as wide as in a pipe: workers of a parallel run have a terminal's 80 columns."""
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture(scope="session", autouse=True)
def _no_children():
    """A new process for every check would cost minutes; tests/checks/test_loading.py starts it, and so does the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qquant.checks.review.loading", SimpleNamespace(children=lambda _: 1, examine=lambda *_, **__: Loaded({}))
        )
        yield


@pytest.fixture(scope="session")
def demo():
    """The bundled trained checkpoint."""
    return data_dir("recipes") / "demo" / "tiny-qwen1.5"


@pytest.fixture(scope="session")
def tiny(demo):
    """Its tokenizer."""
    return Tokenizer.open(demo)


@pytest.fixture
def tokenizer_folder(tmp_path, demo):
    """A folder with the demo checkpoint's tokenizer: `tokenizer_folder(template, config__json=...)`, a file is left out by None."""

    def make(template=None, **files):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        for name in ("config.json", *TOKENIZER_FILES):
            shutil.copy(demo / name, folder / name)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        for name, content in files.items():
            file = folder / name.replace("__", ".")
            file.unlink() if content is None else file.write_text(
                content if isinstance(content, str) else json.dumps(content)
            )
        return folder

    return make


@pytest.fixture
def book(tmp_path):
    """A text of 400 paragraphs, no two alike."""
    path = tmp_path / "book.txt"
    path.write_text(prose(400))
    return path


def write_checkpoint(folder, dtype=torch.bfloat16, shards=1, seed=0, family=FAMILIES["qwen2"], **changes):
    """A random checkpoint with the demo's tokenizer; `changes` go into config.json."""
    config = CONFIGS[family.model_type] | changes
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in family.shapes(family.parse(config, "test")).items():
        value = torch.randn(shape, generator=generator) * (0.5 if name.endswith("bias") else shape[-1] ** -0.5)
        tensors[name] = (value if len(shape) > 1 or name.endswith("bias") else 1 + 0.1 * value).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    source = data_dir("recipes") / "demo" / "tiny-qwen1.5"
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(params=[*FAMILIES.values(), toy_family.TOY], ids=lambda family: family.model_type)
def family(request, monkeypatch):
    """Every family, and one that only the tests know, registered."""
    monkeypatch.setitem(FAMILIES, request.param.model_type, request.param)
    return request.param


@pytest.fixture
def make_checkpoint(tmp_path):
    """`make_checkpoint(name="model", dtype=..., shards=..., **config)` -> folder."""

    def make(name="model", **options):
        return write_checkpoint(tmp_path / name, **options)

    return make


@pytest.fixture
def build(tmp_path):
    """`build(folder, *artifacts, out="out")` -> (report, out)."""

    def run(folder, *names, out="out", text=HEAD, adapter=None):
        loaded = load_recipe(tmp_path, names, text)
        checkpoint = Checkpoint.open(folder, adapter=adapter)
        report = pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint), tmp_path / out, CPU, quiet)
        return report, tmp_path / out

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for all examples of a property, which are too many for one each."""
    return tmp_path_factory.mktemp("strange")


@pytest.fixture(scope="module")
def strange_folder(tmp_path_factory):
    """A checkpoint of one layer for all examples of a property; each puts back what it changed."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(checkpoint folder, output folder) of a small build without faults: a GPTQ folder, an AWQ folder, a GGUF file."""
    place = tmp_path_factory.mktemp("release")
    folder = write_checkpoint(place / "model", tie_word_embeddings=True)
    (place / "recipe.yaml").write_text(RELEASE)
    loaded, checkpoint = recipe.load(place / "recipe.yaml"), Checkpoint.open(folder)
    plan = Plan.of(loaded, checkpoint)
    report = pipeline.build(loaded, checkpoint, plan, place / "out", torch.device("cpu"), Quiet())
    assert report.passed, report.artifacts
    return folder, place / "out"


@pytest.fixture
def random_release(tmp_path):
    """The output folder of a build, with random bytes for weights: what publishing starts from."""
    return write_build(tmp_path / "build")


@pytest.fixture
def hub():
    """The stand-in of the hub, running."""
    with serve() as running:
        yield running


@pytest.fixture
def waits(monkeypatch):
    """Pauses are recorded, not taken; the stand-in speaks LFS, not xet."""
    taken = Waits()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", taken)
    return taken
