"""Coverage-guided fuzzing of the readers of strange files: `make fuzz`, or python tests/fuzz/readers.py TARGET RUNS OUT.

    safetensors   header and places of tensors          reference: the safetensors package
    gguf          header, and as a Qwen2 model           reference: the gguf package
    json          config.json and an index of shards     reference: Python's json

Each input may take 2 GiB of address space and 5 seconds of processor time. Counted: inputs, accepted files, and what must not happen: an error that is no
InputError, a hang, a file that is accepted here and refused by the reference reader (which runs in a process of its own with the
same limits). An input that does one of these is kept in OUT. Exit status 1 if there was any.
"""

import hashlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qquant", "json"]):
    from qquant.errors import InputError
    from qquant.families import FAMILIES, family_of, parse_config
    from qquant.formats.gguf.container import Field, header_bytes, read_header
    from qquant.formats.gguf.source import GgufSource
    from qquant.source import safetensors_file
    from qquant.source.checkpoint import _indexed
    from qquant.source.untrusted import read_json, refuse_hooks

MEMORY, SECONDS = 2 << 30, 5.0
PATIENCE = 120  # seconds of wall time, which a busy machine takes from us: for an input and its reference, and before a reader counts as hung
CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 32, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


# --- what is read -----------------------------------------------------------------------------------------------------


def safetensors_bytes(data: bytes) -> bytes:
    """An even first byte: the rest as it is. Odd: the rest is the header, with its length before it and as much data as it asks for."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    text = data[1:]
    try:
        ends = [entry["data_offsets"][1] for entry in json.loads(text).values() if "data_offsets" in entry]
        size = min(max((end for end in ends if type(end) is int and end >= 0), default=0), 1 << 16)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        size = 0
    return len(text).to_bytes(8, "little") + text + b"\0" * size


def read_safetensors(path):
    safetensors_file.read_header(path)


def read_gguf(path):
    read_header(path)
    try:
        GgufSource.open(path)
    except InputError:
        return  # a GGUF file, and not of this model


def read_config(path):
    """An input is a config, or an index of shards of the folder it is in."""
    content = read_json(path)
    refuse_hooks(content, str(path))
    if "weight_map" in content:
        _indexed(path.parent, content)
    else:
        family = family_of(content, str(path))
        family.shapes(parse_config(content, str(path)))


# --- references, in a process of their own ----------------------------------------------------------------------------


def reference_safetensors(path):
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        list(file.keys())


def reference_gguf(path):
    import gguf

    gguf.GGUFReader(path)


def reference_json(path):
    json.loads(Path(path).read_bytes())


REFERENCES = {"safetensors": reference_safetensors, "gguf": reference_gguf, "json": reference_json}


def serve(target, connection):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while path := connection.recv():
        try:
            REFERENCES[target](path)
            connection.send("")
        except BaseException as error:  # noqa: BLE001  whatever it is, it refused
            connection.send(repr(error)[:200] or "refused")


class Reference:
    """A process that says whether the reference reader takes a file; a new one after a hang or a crash."""

    def __init__(self, target):
        self.target, self.process = target, None

    def refusal(self, path, again=True):
        """What the reference says against a file; one that hangs is asked once more, since it may have waited for the machine."""
        if self.process is None or not self.process.is_alive():
            self.connection, theirs = multiprocessing.Pipe()
            self.process = multiprocessing.get_context("spawn").Process(
                target=serve, args=(self.target, theirs), daemon=True
            )
            self.process.start()
            theirs.close()
            self.connection.poll(0)
        self.connection.send(str(path))
        try:
            if self.connection.poll(PATIENCE / 2):
                return self.connection.recv()
        except EOFError:
            return "the reference crashed"
        self.process.kill()
        self.process.join()
        return self.refusal(path, again=False) if again else "the reference hung"


# --- seeds ------------------------------------------------------------------------------------------------------------


def seeds(target):
    if target == "safetensors":
        head, _ = safetensors_file.header_bytes([("a", "F32", (2, 3)), ("b", "U8", (8,))], {"format": "pt"})
        yield b"\0" + head + b"\0" * 32
        yield b"\1" + head[8:]
        yield b"\1" + json.dumps({"x": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}}).encode()
    elif target == "gguf":
        fields = [Field("general.architecture", "str", "qwen2"), Field("qwen2.block_count", "u32", 1)]
        fields += [
            Field("tokenizer.ggml.tokens", "[str]", ["a", "b"]),
            Field("tokenizer.ggml.token_type", "[i32]", [1, 1]),
        ]
        numbers = {
            "embedding_length": 32,
            "feed_forward_length": 64,
            "attention.head_count": 1,
            "attention.head_count_kv": 1,
        }
        numbers |= {"context_length": 64}
        fields += [Field(f"qwen2.{key}", "u32", value) for key, value in numbers.items()]
        fields += [Field("qwen2.attention.layer_norm_rms_epsilon", "f32", 1e-6), Field("general.alignment", "u32", 32)]
        family = FAMILIES["qwen2"]
        shapes = family.shapes(parse_config(CONFIG, "seed"))
        tensors = [
            (family.gguf_name(name), shape, 0, 4 * shape[0] * (shape[1:] or (1,))[0]) for name, shape in shapes.items()
        ]
        head, _, size = header_bytes(fields, tensors)
        yield head + b"\0" * (size - len(head))
        head, _, size = header_bytes(fields[:4], [("t", (2, 32), 8, 68), ("u", (4,), 0, 16)])
        yield head + b"\0" * (size - len(head))
        yield header_bytes([Field("k", kind, 1) for kind in ("u8", "i64", "f64", "bool")][:1], [])[0]
    else:
        yield json.dumps(CONFIG).encode()
        yield json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
        ).encode()
        yield json.dumps(
            CONFIG | {"rope_scaling": {"type": "default"}, "head_dim": 32, "x": [[1.5, None], {"y": "\u00e9"}]}
        ).encode()


# --- the loop ---------------------------------------------------------------------------------------------------------

WORDS = {  # what a mutation may insert, as libFuzzer writes strings
    "safetensors": [
        *(f"\\\"{word}\\\"" for word in ("dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "U8", "a", "b", "\\\\ud800")),
        "[0,0]", "[0,24]", "[24,32]", "[]", "{}", ",", ":", "18446744073709551615", "9223372036854775807", "1e400", "NaN", "-1",
    ],
    "gguf": [
        "GGUF", "qwen2.block_count", "general.alignment", "general.architecture", "token_embd.weight", "split.count", *(
            "".join(f"\\x{byte:02x}" for byte in number.to_bytes(8, "little")) for number in (0, 1, 8, 9, 32, 2**32, 2**63, 2**64 - 1)
        ),
    ],
    "json": [
        *(f"\\\"{word}\\\"" for word in (*CONFIG, "weight_map", "auto_map", "a.safetensors", "../x.safetensors", "rope_parameters")),
        "[]", "{}", "NaN", "Infinity", "1e400", "-0", "18446744073709551616", "null", "true",
    ],
}  # fmt: skip
READERS = {"safetensors": read_safetensors, "gguf": read_gguf, "json": read_config}


def main():
    target, runs, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    reference = Reference(target)
    reader, counts = READERS[target], {"inputs": 0, "accepted": 0, "crashes": 0, "slow": 0, "refused by reference": 0}
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    for name in ("a.safetensors", "b.safetensors"):
        (place / name).write_bytes(b"")
    path, slowest = place / "input.json", 0.0

    def keep(kind, data, what):
        counts[kind] += 1
        name = hashlib.sha256(data).hexdigest()[:16]
        (out / f"{target}-{kind.split()[0]}-{name}").write_bytes(data)
        print(f"{target}: {kind}: {name}: {what}", flush=True)

    def one(data):
        nonlocal slowest
        content = safetensors_bytes(data) if target == "safetensors" else data
        path.write_bytes(content)
        counts["inputs"] += 1
        began = time.process_time()
        try:
            reader(path)
        except InputError:
            accepted = False
        except BaseException as error:  # noqa: BLE001  what is counted
            accepted = False
            keep("crashes", content, repr(error)[:200])
        else:
            accepted = True
        took = time.process_time() - began
        slowest = max(slowest, took)
        if took > SECONDS:
            keep("slow", content, f"{took:.1f} s")
        if accepted:
            counts["accepted"] += 1
            refusal = reference.refusal(path)
            if refusal:
                keep("refused by reference", content, refusal)
        if counts["inputs"] % 50_000 == 0:
            print(json.dumps({"target": target} | counts | {"slowest_s": round(slowest, 3)}), flush=True)
        if counts["inputs"] >= runs:
            print(json.dumps({"target": target, "done": True} | counts | {"slowest_s": round(slowest, 3)}), flush=True)
            reference.process and reference.process.kill()
            bad = counts["crashes"] + counts["slow"] + counts["refused by reference"]
            sys.stdout.flush()
            import os

            os._exit(1 if bad else 0)

    corpus = out / f"corpus-{target}"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = out / f"words-{target}"
    words.write_text("".join(f'"{word}"\n' for word in WORDS[target]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    options = [
        f"-dict={words}",
        f"-timeout={PATIENCE}",
        "-rss_limit_mb=2048",
        "-max_len=65536",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={out}/", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
