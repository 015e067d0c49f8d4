"""Mutations of what strangers bring, by structure: `make fuzz`, or python -m tests.fuzz.strangers RUNS [TARGET ...].

    config, index, tokenizer    one JSON file of a small checkpoint, opened as `plan` does          template    rendered
    gguf        metadata of a small file: read, tokenizer made, compared with the checkpoint         adapter     its config and header
    imatrix     both formats                                                                         recipe      its YAML
    report, manifest, source, published, evidence, journal                                           `records`

Seeded: input `n` of a target is the same on every machine. Counted: inputs, refusals, and what must not happen: an error that is no
QQuantError, or more than SECONDS. Exit status 1 if there was any; the input is printed.
"""

import json
import math
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from qquant import recipe
from qquant.calibration import Tokenizer
from qquant.calibration.template import Template
from qquant.errors import QQuantError
from qquant.formats import claims_of, kind_of_file
from qquant.formats.gguf import imatrix
from qquant.formats.gguf.container import Field, read_header
from qquant.formats.gguf.container import header_bytes as gguf_header
from qquant.formats.gguf.metadata import of_checkpoint
from qquant.formats.gguf.tokenizer import gguf_tokenizer
from qquant.resources import data_dir
from qquant.source.adapter import Adapter
from qquant.source.checkpoint import Checkpoint
from qquant.source.confined import Refused
from qquant.source.safetensors_file import header_bytes

SECONDS = 8.0
GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    1e308,
    -0.5,
    "",
    "x",
    "../x",
    "\0",
    "default",
    [],
    [[]],
    {},
    {"a": 1},
    "9" * 400,
]
WORDS = ["default", "yarn", "rope_type", "full_attention", "auto_map", "{{", "}}", "{%", "%}", "(a+)+", "\u00e9", "\ud7ff", "0", "e9", "-", ":", "#", "&a", "*a"]  # fmt: skip


def mutated_json(draw: random.Random, value: object) -> object:
    """A JSON value with one place changed, left out, renamed, or grown."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, result = draw.choice(list(value)), dict(value)
        way = draw.random()
        if way < 0.1:
            del result[key]
        elif way < 0.15:
            result[draw.choice([*WORDS, *map(str, value)])] = result[key]
        else:
            result[key] = mutated_json(draw, value[key])
        return result
    if isinstance(value, list) and value and draw.random() < 0.8:
        place, result = draw.randrange(len(value)), list(value)
        if draw.random() < 0.2:
            return result[:place] + result[place + 1 :] + result[place : place + 1] * draw.choice([0, 2])
        result[place] = mutated_json(draw, value[place])
        return result
    if isinstance(value, str) and draw.random() < 0.5:
        return mutated_text(draw, value)
    return draw.choice(VALUES)


def mutated_text(draw: random.Random, text: str) -> str:
    """A text with a piece left out, doubled, moved or replaced by a word."""
    a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    b = min(b, a + 40)
    return text[:a] + draw.choice(["", text[a:b] * 2, draw.choice(WORDS), chr(draw.randrange(32, 0x2FFF))]) + text[b:]


def mutated_bytes(draw: random.Random, data: bytes, first: int) -> bytes:
    """Bytes with a few of the `first` ones changed, or cut."""
    result = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4])):
        place = draw.randrange(min(first, len(result)))
        number = draw.choice([0, 1, 8, 9, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
        piece = draw.choice(
            [bytes([draw.randrange(256)]), struct.pack("<Q", number), struct.pack("<I", number % 2**32)]
        )
        result[place : place + len(piece)] = piece
    return bytes(result[: draw.randrange(len(result))] if draw.random() < 0.05 else result)


class World:
    """A small checkpoint, a GGUF file of it, an adapter and an imatrix, to be mutated one file at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, Checkpoint.open(folder)
        self.adapter = folder.parent / "adapter"
        self.adapter.mkdir(exist_ok=True)
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        size = self.checkpoint.config.hidden
        head, _ = header_bytes([(f"{name}A.weight", "F32", (4, size)), (f"{name}B.weight", "F32", (size, 4))], {})
        self.adapter_bytes = head + bytes(2 * 4 * 4 * size)
        self.template = (folder / "chat_template.jinja").read_text()
        self.recipe = (data_dir("recipes") / "demo.yaml").read_text()
        self.kept = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json")}
        family = self.checkpoint.family
        shapes = {family.gguf_name(name): shape for name, shape in family.shapes(self.checkpoint.config).items()}
        fields = [*of_checkpoint(self.checkpoint), Field("general.file_type", "u32", 0)]
        head, _, end = gguf_header(fields, [(name, shape, 0, 4 * math.prod(shape)) for name, shape in shapes.items()])
        self.kept_gguf = head + bytes(end - len(head))
        self.kept_matrices = [path.read_bytes() for path in sorted(GOLDEN.glob("tiny.imatrix.*"))]
        self.scratch = folder.parent / "scratch"

    def targets(self) -> dict[str, Callable[[random.Random], None]]:
        """By name: try one input."""
        return {
            "config": self.config, "index": self.index, "tokenizer": self.tokenizer, "template": self.render, "gguf": self.metadata,
            "adapter": self.lora, "imatrix": self.importance, "recipe": self.yaml,
        }  # fmt: skip

    def config(self, draw: random.Random) -> None:
        """config.json."""
        self._json("config.json", draw, lambda: Checkpoint.open(self.folder).require_tokenizer())

    def tokenizer(self, draw: random.Random) -> None:
        """tokenizer.json, and a text."""
        self._json("tokenizer.json", draw, lambda: Tokenizer.open(self.folder).encode("Hello, it's 12 \u4e16\u754c"))

    def _json(self, name: str, draw: random.Random, read: Callable[[], object]) -> None:
        try:
            (self.folder / name).write_text(json.dumps(mutated_json(draw, json.loads(self.kept[name]))))
            read()
        finally:
            (self.folder / name).write_bytes(self.kept[name])

    def index(self, draw: random.Random) -> None:
        """An index of shards."""
        path = self.folder / "model.safetensors.index.json"
        weights = dict.fromkeys(self.checkpoint.tensors, "model.safetensors")
        try:
            path.write_text(json.dumps(mutated_json(draw, {"metadata": {"total_size": 1}, "weight_map": weights})))
            Checkpoint.open(self.folder)
        finally:
            path.unlink()

    def render(self, draw: random.Random) -> None:
        """The chat template."""
        text = self.template
        for _ in range(draw.choice([1, 2, 4])):
            text = mutated_text(draw, text)
        Template(text, "template").render(
            [{"messages": [{"role": "user", "content": "hi"}]}], {"add_generation_prompt": True}
        )

    def metadata(self, draw: random.Random) -> None:
        """The header of a GGUF file."""
        data = self.kept_gguf
        path = self.scratch.with_suffix(".gguf")
        path.write_bytes(mutated_bytes(draw, data, draw.choice([2000, 200_000])))
        header = read_header(path)
        kind_of_file(path)
        claims_of(path, self.checkpoint)
        gguf_tokenizer(path, header)

    def lora(self, draw: random.Random) -> None:
        """A LoRA folder."""
        config: object = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "bias": "none",
            "target_modules": ["q_proj"],
            "use_rslora": False,
        }
        config |= {
            "alpha_pattern": {"q_proj": 8},
            "rank_pattern": {},
            "init_lora_weights": True,
            "fan_in_fan_out": False,
        }
        data = self.adapter_bytes
        if draw.random() < 0.7:
            config = mutated_json(draw, config)
        else:
            data = mutated_bytes(draw, data, 300)
        (self.adapter / "adapter_config.json").write_text(json.dumps(config))
        (self.adapter / "adapter_model.safetensors").write_bytes(data)
        Adapter.open(self.adapter, {name: info.shape for name, info in self.checkpoint.tensors.items()})

    def importance(self, draw: random.Random) -> None:
        """An importance matrix."""
        path = self.scratch.with_suffix(".imatrix")
        path.write_bytes(mutated_bytes(draw, draw.choice(self.kept_matrices), 4000))
        imatrix.read(path)

    def yaml(self, draw: random.Random) -> None:
        """A recipe."""
        recipe.parse(mutated_text(draw, self.recipe), "recipe.yaml")


def run(target: Callable[[random.Random], None], name: str, runs: int) -> tuple[int, list[str]]:
    """(inputs that were refused, what must not have happened)."""
    refused, bad = 0, []
    for number in range(runs):
        began = time.process_time()
        try:
            target(random.Random(f"{name} {number}"))
        except (QQuantError, Refused) as error:
            refused += 1
            if len(str(error)) > 20_000:
                bad.append(f"{name} {number}: a message of {len(str(error)):,} characters")
        except Exception as error:  # noqa: BLE001  what is counted
            bad.append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
        if time.process_time() - began > SECONDS:
            bad.append(f"{name} {number}: {time.process_time() - began:.1f} s")
    return refused, bad


def main() -> None:
    """Run targets on a checkpoint of their own."""
    from tests.conftest import write_checkpoint
    from tests.fuzz.records import Records
    from tests.torture import VOCABULARY, cut_vocabulary

    runs, names, failed = int(sys.argv[1]), sys.argv[2:], 0
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        folder = write_checkpoint(Path(place) / "model", num_hidden_layers=1, vocab_size=VOCABULARY)
        targets = World(cut_vocabulary(folder)).targets() | Records(Path(place) / "records").targets()
        for name, target in targets.items():
            if not names or name in names:
                began, spent = time.monotonic(), time.process_time()
                refused, bad = run(target, name, runs)
                failed += len(bad)
                print(
                    "\n".join(
                        [
                            *bad[:20],
                            f"{name}: {runs:,} inputs, {refused:,} refused, {len(bad)} bad, {time.monotonic() - began:.0f} s ({time.process_time() - spent:.1f} s of this process)",
                        ]
                    )
                )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
