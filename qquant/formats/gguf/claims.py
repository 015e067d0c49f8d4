"""What the metadata of a GGUF file says, key by key, against what `metadata` writes for the checkpoint.

    kind            of every key that llama.cpp's loader reads, whether we write it or not: it refuses a file where one is of another kind
    value           of every key that we write: CONSEQUENCES says what follows from another one, ABSENT what runtimes take without it
    further keys    of the architecture and of the tokenizer: a fault unless the value is the one in `_neutral`, which changes nothing;
                    HARMLESS are those that nothing reads while a model runs, others are unknown, and warned of
    tokens          text and type of each id, also of ids that no token has: a second token of the same text takes over its id
    tensors         none beside those of the model, which llama.cpp refuses or applies; the file type is what the tensors are

Reference: the keys that llama.cpp's loader reads (LLM_KV_*), those that transformers' GGUF reader maps, and vLLM's, which is transformers'.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qquant.calibration.tokenizer import Tokenizer
from qquant.families import Family, ModelConfig
from qquant.formats.claims import Claims, claims, differs, shown
from qquant.formats.gguf import mix
from qquant.formats.gguf.container import Field, Header, type_name
from qquant.formats.gguf.metadata import CONTROL, UNUSED, USER_DEFINED, of_checkpoint
from qquant.formats.gguf.shards import read_model
from qquant.formats.gguf.types import TYPES
from qquant.source.checkpoint import Checkpoint

CONSEQUENCES = {
    "general.architecture": "it is loaded as another kind of model",
    "general.type": "llama.cpp does not load it as a model",
    "general.quantization_version": "its blocks are of another version of ggml's types",
    "block_count": "blocks are left out, or it does not load",
    "context_length": "a runtime cuts prompts there, or lets them run beyond what the model was made for",
    "embedding_length": "it does not load",
    "feed_forward_length": "it does not load",
    "attention.head_count": "attention is cut into other heads",
    "attention.head_count_kv": "attention is cut into other heads",
    "attention.key_length": "attention is cut into other heads",
    "attention.value_length": "attention is cut into other heads",
    "rope.freq_base": "every position is rotated otherwise",
    "attention.layer_norm_rms_epsilon": "every norm gives other numbers",
    "tokenizer.ggml.model": "it is loaded with another kind of tokenizer",
    "tokenizer.ggml.pre": "text is cut into other words before it is tokenized",
    "tokenizer.ggml.merges": "the same text gets other tokens",
    "tokenizer.ggml.eos_token_id": "answers end on another token",
    "tokenizer.ggml.bos_token_id": "a runtime that begins with it begins otherwise",
    "tokenizer.ggml.padding_token_id": "batches are padded with another token",
    "tokenizer.ggml.unknown_token_id": "what has no token becomes another one",
    "tokenizer.ggml.add_bos_token": "a token is put before every prompt, or is left out",
    "tokenizer.ggml.add_eos_token": "a token is put after every prompt, or is left out",
    "tokenizer.chat_template": "chats are written otherwise",
}
FLOAT32 = 2e-7  # relative distance of numbers that are one in float32
SAMPLING = "general.sampling."
NO_SUCH = "the checkpoint has no such thing"
ONLY_WARNED = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.unknown_token_id")
ABSENT: dict[str, Any] = {  # what llama.cpp takes for a key that is not there
    "general.type": "model",
    "rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
}
STRICT_ORDER = "f32 bf16 f16 q8_0 q6_k q5_k_m q5_1 q5_k_s q5_0 q4_k_m q4_1 q4_k_s iq4_nl q4_0 iq4_xs q3_k_l q3_k_m q3_k_s q2_k q2_k_s"  # file types, the one with the closest limits first; on small models some are the same tensors
HARMLESS = {
    r"general\.(name|author|version|organization|finetune|basename|description|quantized_by|size_label|url|doi|uuid|repo_url|tags|languages|datasets)": "a description",
    r"general\.(license|source|base_model|dataset|datasets)\b.*": "a description",
    r"general\.alignment": "the reader has placed every tensor by it",
    r"general\.file_type": "compared with the tensors apart",
    r"quantize\.imatrix\.(file|dataset|entries_count|chunks_count)": "tells how it was made",
    r"split\.(no|count|tensors\.count)": "the reader has held it against the parts",
    r"tokenizer\.ggml\.(scores|token_type_count|precompiled_charsmap)": "of other kinds of tokenizers; byte-level BPE asks for none",
    r"tokenizer\.chat_templates": "a list of the names of further templates, which are compared",
}
"""Keys (whole, as regular expressions) that change no answer, and why."""
SCORES = "tokenizer.ggml.scores"
KINDS = {  # in which llama.cpp reads keys that we do not write for a checkpoint, and that change no answer
    "general.name": "str",
    "general.file_type": "u32",
    "split.no": "u16",
    "split.count": "u16",
    "split.tensors.count": "i32",
    "tokenizer.ggml.token_type_count": "u32",
    SCORES: "[f32]",
}
KINDS_OF_VALUES = {bool: "bool", int: "u32", float: "f32", str: "str"}  # of `_neutral`


def compare(path: Path, checkpoint: Checkpoint) -> Claims:
    """The claims of the GGUF file (or the parts) at `path`.

    Raises:
        InputError: it is damaged, or the checkpoint has no tokenizer.
    """
    header, family, config = read_model(path), checkpoint.family, checkpoint.config
    expected = _written(checkpoint)
    all_claims = claims()
    for part in (
        _expected(header, expected, checkpoint),
        _further(header, expected, checkpoint),
        _tokens(header, expected),
        _tensors(header, family, config),
    ):
        all_claims += part
    return all_claims


@functools.lru_cache(maxsize=1)  # many files of one checkpoint are compared, and its vocabulary is large
def _written(checkpoint: Checkpoint) -> dict[str, Field]:
    return {field.key: field for field in of_checkpoint(checkpoint)}


def _short(key: str, arch: str) -> str:
    return key.removeprefix(f"{arch}.")


def _expected(header: Header, expected: Mapping[str, Field], checkpoint: Checkpoint) -> Claims:
    """Every key that we write and that holds one value."""
    arch = checkpoint.family.llama_cpp.architecture
    faults: list[str] = []
    warnings: list[str] = []
    absent = ABSENT | {"attention.head_count_kv": checkpoint.config.heads} | _neutral(checkpoint.config)
    for key, field in expected.items():
        if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            continue
        short, stored = _short(key, arch), header.fields.get(key)
        consequence = CONSEQUENCES.get(short, "answers are drawn otherwise")
        if stored is None:
            if not (short in absent and same(absent[short], field.value)):
                soft = key in ONLY_WARNED or key.startswith(SAMPLING) or key == "tokenizer.chat_template"
                (warnings if soft else faults).append(f"{key}: missing; a runtime takes its own, so {consequence}")
        elif stored.kind != field.kind:
            faults.append(_of_another_kind(stored, field.kind))
        elif not same(stored.value, field.value):
            if field.kind.startswith("["):
                faults.append(f"{key}: are not the checkpoint's; {consequence}")
            elif key == "tokenizer.ggml.eos_token_id" and stored.value in _stops(checkpoint):
                warnings.append(differs(key, stored.value, field.value, "one of its stop tokens, and not the first"))
            else:
                soft = key in ONLY_WARNED
                (warnings if soft else faults).append(differs(key, stored.value, field.value, consequence))
    return claims(faults, warnings)


def _of_another_kind(stored: Field, kind: str) -> str:
    return f"{stored.key} is of kind {stored.kind}, readers expect {kind}: it does not load"


def _stops(checkpoint: Checkpoint) -> Sequence[int]:
    return Tokenizer.open(checkpoint.path).eos


def same(mine: Any, theirs: Any) -> bool:
    """Whether two values are one, as far as float32 tells."""
    if isinstance(mine, float) and isinstance(theirs, int | float):
        return math.isclose(mine, theirs, rel_tol=FLOAT32)
    return type(mine) is type(theirs) and bool(mine == theirs)


def _neutral(config: ModelConfig) -> dict[str, Any]:
    """Keys of the architecture that we do not write, and the value that says what a runtime does without them."""
    return {
        "vocab_size": config.vocab,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.causal": True,
        "attention.scale": 0.0,
        "attention.sliding_window": 0,
        "attention.max_alibi_bias": 0.0,
        "attention.clamp_kqv": 0.0,
        "rope.dimension_count": config.head_dim,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.original_context_length": config.positions,
        "rope.scaling.finetuned": False,
        "rope.scale_linear": 1.0,
        "logit_scale": 0.0,
        "residual_scale": 0.0,
        "embedding_scale": 0.0,
        "expert_count": 0,
        "expert_used_count": 0,
    }


def _further(header: Header, expected: Mapping[str, Field], checkpoint: Checkpoint) -> Claims:
    """Every key that we would not have written."""
    arch, neutral = checkpoint.family.llama_cpp.architecture, _neutral(checkpoint.config)
    tokenizer = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
    tokenizer |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.remove_extra_whitespaces": False}
    faults, warnings = [], []
    for key, stored in header.fields.items():
        if key in expected:
            continue
        short = _short(key, arch)
        defaults = neutral if key.startswith(f"{arch}.") else tokenizer
        kind = KINDS_OF_VALUES[type(defaults[short])] if short in defaults else KINDS.get(key, stored.kind)
        if stored.kind != kind:
            faults.append(_of_another_kind(stored, kind))
            continue
        if any(re.fullmatch(pattern, key) for pattern in HARMLESS):
            continue
        if short in defaults and same(stored.value, defaults[short]):
            continue
        if key.startswith((f"{arch}.", "tokenizer.", SAMPLING, "adapter.")):
            faults += [f"{key} is {shown(stored.value)}: {NO_SUCH}, and a runtime that reads it answers otherwise"]
        else:
            warnings.append(f"{key} is {shown(stored.value)}: no key that qquant knows; a runtime may read it")
    return claims(faults, warnings)


def _tokens(header: Header, expected: Mapping[str, Field]) -> Claims:
    """The text and the type of every token id."""
    tokens, kinds = header.fields.get("tokenizer.ggml.tokens"), header.fields.get("tokenizer.ggml.token_type")
    texts, types = expected["tokenizer.ggml.tokens"].value, expected["tokenizer.ggml.token_type"].value
    if tokens is None or tokens.kind != "[str]" or len(tokens.value) != len(texts):
        count = len(tokens.value) if tokens and tokens.kind == "[str]" else "no list of them"
        return claims([f"tokenizer.ggml.tokens: {count}, the embedding has {len(texts)} rows; it does not load"])
    if kinds is None or kinds.kind != "[i32]" or len(kinds.value) != len(texts):
        return claims(["tokenizer.ggml.token_type: no type for every token; special tokens are read as text"])
    used = [number for number, kind in enumerate(types) if kind != UNUSED]
    faults: list[str] = []
    scores = header.value(SCORES, texts)
    if isinstance(scores, list) and len(scores) != len(texts):
        faults.append(
            f"{SCORES}: {len(scores)}, for {len(texts)} tokens: llama.cpp reads one for each, beyond their end"
        )
    warnings: list[str] = []
    if any(tokens.value[number] != texts[number] for number in used):
        faults.append("tokenizer.ggml.tokens: is not the checkpoint's vocabulary; the same text gets other tokens")
    used_texts = {texts[number] for number in used}
    for number in range(len(texts)):
        if types[number] == UNUSED and (kinds.value[number] != UNUSED or tokens.value[number] in used_texts):
            faults.append(
                f"tokenizer.ggml.tokens: id {number} is {shown(tokens.value[number])}; the checkpoint has no such token"
            )
            break
    changed = [number for number in used if kinds.value[number] != types[number]]
    added = {CONTROL, USER_DEFINED}
    hard = [number for number in changed if not {kinds.value[number], types[number]} <= added]
    for lines, numbers in ((faults, hard), (warnings, [] if hard else changed)):
        if numbers:
            lines.append(
                f"tokenizer.ggml.token_type: of {shown(texts[numbers[0]])} is {kinds.value[numbers[0]]}, not {types[numbers[0]]} "
                f"({len(numbers)} such): special tokens and text are told apart by it"
            )
    return claims(faults, warnings)


# --- tensors ------------------------------------------------------------------------------------------------------------


def matrix_types(header: Header) -> dict[str, str]:
    """Tensor name -> type, of every matrix of a file whose types are known."""
    matrices = {name: type_name(tensor.type_id) for name, tensor in header.tensors.items() if len(tensor.shape) > 1}
    return {name: kind for name, kind in matrices.items() if kind in TYPES}


def kind(header: Header, family: Family, config: ModelConfig) -> str:
    """The file type whose limits hold for a file: the one whose mix its matrices are; else the largest that is not larger than it.

    What the file says of itself is not asked, so that it cannot choose wider limits.
    """
    return kind_of(matrix_types(header), mix.ModelShape(family, config))


def kind_of(types: Mapping[str, str], shape: mix.ModelShape) -> str:
    """The file type for matrices of these types: as `kind`."""
    exact = next(iter(_mixes_of(types, shape)), "")
    if exact:
        return exact
    sizes = {name: _size(shape, types_of_mix) for name, types_of_mix in _mixes(shape)}
    mine = _size(shape, types)
    fitting = {name: size for name, size in sizes.items() if size <= mine}
    return max(fitting, key=lambda name: fitting[name]) if fitting else min(sizes, key=lambda name: sizes[name])


def _mixes(shape: mix.ModelShape) -> Iterator[tuple[str, dict[str, str]]]:
    vectors = shape.vectors()
    for name in STRICT_ORDER.split():
        for imatrix in (False, True):
            if imatrix or name not in mix.NEEDS_IMATRIX:
                types_of_mix = mix.tensor_types(name, shape, imatrix).types
                yield name, {tensor: types_of_mix[tensor] for tensor in types_of_mix if tensor not in vectors}


def _mixes_of(types: Mapping[str, str], shape: mix.ModelShape) -> Iterator[str]:
    """The file types that give exactly these; a head that is stored although it is tied is not asked."""
    for name, types_of_mix in _mixes(shape):
        if all(types.get(tensor) == kind for tensor, kind in types_of_mix.items()):
            yield name


def _size(shape: mix.ModelShape, types: Mapping[str, str]) -> int:
    """Bytes of the matrices of the model in these types."""
    return sum(TYPES[types[name]].nbytes(size) for name, size in shape.matrices().items() if name in types)


def _tensors(header: Header, family: Family, config: ModelConfig) -> Claims:
    expected = {family.gguf_name(name) for name in (*family.shapes(config), family.head)}
    faults = [
        f"tensor {name}: {NO_SUCH}; llama.cpp does not load it" for name in header.tensors if name not in expected
    ]
    warnings: list[str] = []
    shape = mix.ModelShape(family, config)
    stated = next((name for name, number in mix.FILE_TYPES.items() if number == header.value("general.file_type")), "")
    fitting = list(dict.fromkeys(_mixes_of(matrix_types(header), shape)))
    if fitting and stated not in fitting:
        said = stated or shown(header.value("general.file_type"))
        faults.append(
            f"general.file_type is {said}, the tensors are {fitting[0]}: it is held to the limits of what it is"
        )
    elif not fitting:
        warnings.append(
            f"general.file_type is {stated or shown(header.value('general.file_type'))}, and the types of its tensors are no mix of "
            f"llama-quantize's; by its size it is held to the limits of {kind(header, family, config)}"
        )
    return claims(faults, warnings)
