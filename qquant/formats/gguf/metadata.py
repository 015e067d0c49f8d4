"""The metadata of a GGUF file, key for key what llama.cpp's converter and llama-quantize write for the same checkpoint.

    general.architecture, .type, .sampling.* (generation_config.json), .name, .finetune, .basename, .size_label,
    .license*, .base_model.*, .dataset.*, .tags, .languages (head of the checkpoint's README.md)
    qwen2.*                         the numbers of config.json
    tokenizer.ggml.*, tokenizer.chat_template
    general.quantization_version, general.file_type     llama-quantize sets them again, so they come last,
    quantize.imatrix.*                                  and these after them

Token ids without a token are `[PAD i]`, type UNUSED. `add_bos_token` and `add_eos_token` are written where the tokenizer's files say
so, as Qwen's byte-level post-processor does (both false, which is also what llama.cpp takes where they are absent).

Where we depart, on purpose: `general.name` and its parts come from the model's name alone and never from `_name_or_path` of config.json,
which names the parent of a fine-tuned model; chat_template.jinja comes before tokenizer_config.json, as in transformers; of several
named templates only the default is written; the importance matrix is named without its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qquant.formats.gguf.container import Field
from qquant.formats.gguf.imatrix import CHUNK, FILE, Imatrix
from qquant.formats.gguf.mix import FILE_TYPES
from qquant.recipe import GgufArtifact, Recipe
from qquant.recipe.artifacts import NO_CODES
from qquant.source.checkpoint import Checkpoint
from qquant.source.hub import card_head
from qquant.source.untrusted import read_json, read_text

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types
QUANTIZATION_VERSION = 2
SAMPLING_LIMIT = 1 << 31  # of a number; larger ones are no settings, and do not fit
TEXT_LIMIT = 127  # bytes of a text that llama-quantize adds
SAMPLING = (
    ("top_k", "i32", ("top_k",)),
    ("top_p", "f32", ("top_p",)),
    ("min_p", "f32", ("min_p",)),
    ("temp", "f32", ("temperature",)),
    ("penalty_repeat", "f32", ("penalty_repeat", "repetition_penalty")),
)  # general.sampling.*, and where generation_config.json has it
ROLES = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))  # of tokens: in the files, in the keys
VERSION = r"(v|iter)?\d+(\.\d+)*"
STORED_AS = r"i?q\d(_\w)*|b?fp?(16|32)"
SIZE = r"(([A]|\d+x)?\d+([._]\d+)?[KMBT]\d?|small|mini|medium|large|x?xl)"
TUNING = r"chat|instruct|vision|lora"
HUB = "https://huggingface.co/"


def metadata(
    checkpoint: Checkpoint, spec: GgufArtifact, recipe: Recipe, name: str, imatrix: Imatrix | None = None
) -> list[Field]:
    """Every field of the file of model `name`, in order; `imatrix` is the user's, if any."""
    arch = checkpoint.family.llama_cpp.architecture
    return [
        Field("general.architecture", "str", arch),
        Field("general.type", "str", "model"),
        *_sampling(checkpoint.path / "generation_config.json"),
        *_naming(name, checkpoint.family.parameters(checkpoint.config)),
        *_card(card_head(checkpoint.path / "README.md")),
        *_numbers(checkpoint, arch),
        *_tokenizer(checkpoint),
        Field("general.quantization_version", "u32", QUANTIZATION_VERSION),
        Field("general.file_type", "u32", FILE_TYPES[spec.kind]),
        *(_importance(checkpoint, recipe, imatrix) if spec.imatrix and spec.type not in NO_CODES else ()),
    ]


def of_checkpoint(checkpoint: Checkpoint) -> list[Field]:
    """The fields of any file made of `checkpoint` that say how a runtime must run it: all but names, file type and what made it.

    Raises:
        InputError: the checkpoint has no tokenizer, or it is malformed.
    """
    arch = checkpoint.family.llama_cpp.architecture
    return [
        Field("general.architecture", "str", arch),
        Field("general.type", "str", "model"),
        *_sampling(checkpoint.path / "generation_config.json"),
        *_numbers(checkpoint, arch),
        *_tokenizer(checkpoint),
        Field("general.quantization_version", "u32", QUANTIZATION_VERSION),
    ]


def _sampling(path: Path) -> Iterator[Field]:
    settings = read_json(path) if path.is_file() else {}
    for key, kind, names in SAMPLING:
        value = next((settings[name] for name in names if settings.get(name) is not None), None)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < SAMPLING_LIMIT:
            yield Field(f"general.sampling.{key}", kind, int(value) if kind == "i32" else value)


def _naming(name: str, parameters: int) -> Iterator[Field]:
    parts = name_parts(name, parameters)
    yield Field("general.name", "str", titled(name))
    for key in ("version", "finetune", "basename"):
        if parts.get(key):
            yield Field(f"general.{key}", "str", parts[key])
    yield Field("general.size_label", "str", parts.get("size_label") or size_label(parameters))


def titled(name: str) -> str:
    """A name as llama.cpp's converter writes it: words in lower case get a capital, versions, numbers and mixed case stay."""
    words = name.replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not re.fullmatch(r"v\d+(\.\d+)*|\d.*", w) else w for w in words)


def size_label(parameters: int) -> str:
    """Two digits and a unit: 9.3M, 620M, 7.7B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if parameters > size:
            break
    else:
        unit, size = "K", 1e3
    return f"{parameters / size:.{1 if round(parameters / size) < 10 else 0}f}{unit}"


def name_parts(name: str, parameters: int) -> dict[str, str]:
    """`basename`, `size_label`, `finetune` and `version` of a model's name, by the converter's rules; those it has.

    Each word between hyphens is a version, a storage type, a size or a tuning, or unknown. Unknown words and versions at the
    start are the base name, less versions at the very end of the name; unknown words after it tell the tuning. A size far
    from the model's own number of parameters is a context length, which is a tuning. Without any of the three there is no
    base name either: too little is known.
    """
    if " " in name:
        return {}
    words = [word for word in name.split("-") if word]
    labelled = [_label(word, index, parameters) for index, word in enumerate(words)]
    if any(kind == "size_label" and any(c.isdecimal() for c in word) for word, kind in labelled):
        labelled = [(word, "" if kind == "size_label" and word.isalpha() else kind) for word, kind in labelled]
    opening = next(
        (i for i, (word, kind) in enumerate(labelled) if kind != "version" and (kind or not word[0].isalpha())),
        len(labelled),
    )
    based = opening
    while opening == len(labelled) and based and labelled[based - 1][1] == "version":
        based -= 1
    by_kind: dict[str, list[str]] = {"basename": [word for word, _ in labelled[:based]]}
    for index, (word, kind) in enumerate(labelled):
        if kind == "version" and index < based:
            continue
        if kind or index >= opening:
            by_kind.setdefault(kind or "finetune", []).append(word)
    parts = {kind: "-".join(dict.fromkeys(some) if kind == "size_label" else some) for kind, some in by_kind.items()}
    return parts if parts.keys() & {"size_label", "finetune", "version"} else {}


def _label(word: str, index: int, parameters: int) -> tuple[str, str]:
    """(the word, as the converter spells it; its kind, "" if unknown)."""
    if re.fullmatch(VERSION, word, re.IGNORECASE):
        return word, "version"
    if re.fullmatch(STORED_AS, word, re.IGNORECASE):
        return word.upper(), "type"
    if index and re.fullmatch(SIZE, word, re.IGNORECASE):
        return _size(word.replace("_", "."), parameters)
    return word, "finetune" if index and re.fullmatch(TUNING, word, re.IGNORECASE) else ""


def _size(word: str, parameters: int) -> tuple[str, str]:
    if word[-1].isdecimal():  # 7b1 for 7.1b
        word = f"{word[:-2]}.{word[-1]}{word[-2]}"
    if len(word) > 1 and word[-2].isdecimal() and word[-1] in "kmbt":
        word = word[:-1] + word[-1].upper()
    if parameters and re.fullmatch(r"\d+(\.\d+)?[KMBT]", word):
        stated = float(word[:-1]) * 1000 ** " KMBT".find(word[-1])
        if abs(stated - parameters) > 7 * parameters // 8:
            return word[:-1] + word[-1].lower(), "finetune"
    return word, "size_label"


def _card(head: Mapping[str, Any]) -> Iterator[Field]:
    """What the converter takes over from the head of a model card."""
    for key in ("license", "license_name", "license_link"):
        if head.get(key) is not None:
            yield Field(f"general.{key.replace('_', '.')}", "str", ",".join(_texts(head[key])))
    for kind, keys in (("base_model", ("base_model", "base_models")), ("dataset", ("datasets", "dataset"))):
        stated = next((head[key] for key in keys if key in head), None)
        if stated is not None:
            references = _texts(stated)
            yield Field(f"general.{kind}.count", "u32", len(references))
            for number, reference in enumerate(references):
                for key, value in _reference(reference).items():
                    yield Field(f"general.{kind}.{number}.{key}", "str", value)
    for key, names in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        texts = [text for name in names for text in _texts(head.get(name))]
        if any(head.get(name) is not None for name in names):
            yield Field(f"general.{key}", "[str]", texts)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value] if isinstance(value, Iterable) else []


def _reference(reference: str) -> dict[str, str]:
    """Name, organisation, version and address of `owner/name` or of a link."""
    link = reference.startswith(("http://", "https://", "ssh://"))
    if link and not re.fullmatch(r"https?://huggingface\.co/[^/]+/[^/]+", reference):
        return {"repo_url": reference}
    *owner, name = reference.split("huggingface.co/")[-1].split("/", 1)
    fields = {"name": titled(name)}
    version = name_parts(name, 0).get("version")
    if version:
        fields["version"] = version
    if owner:
        fields["organization"] = titled(owner[0])
        fields["repo_url"] = reference if link else f"{HUB}{reference}"
    return fields


def _numbers(checkpoint: Checkpoint, arch: str) -> Iterator[Field]:
    config = checkpoint.config
    yield Field(f"{arch}.block_count", "u32", config.layers)
    yield Field(f"{arch}.context_length", "u32", config.positions)
    yield Field(f"{arch}.embedding_length", "u32", config.hidden)
    yield Field(f"{arch}.feed_forward_length", "u32", config.intermediate)
    yield Field(f"{arch}.attention.head_count", "u32", config.heads)
    yield Field(f"{arch}.attention.head_count_kv", "u32", config.kv_heads)
    yield Field(f"{arch}.rope.freq_base", "f32", config.rope_theta)
    yield Field(f"{arch}.attention.layer_norm_rms_epsilon", "f32", config.epsilon)
    for key, kind, attribute in checkpoint.family.llama_cpp.numbers:
        yield Field(f"{arch}.{key}", kind, getattr(config, attribute))
    if checkpoint.raw_config.get("head_dim") is not None:
        yield Field(f"{arch}.attention.key_length", "u32", config.head_dim)
        yield Field(f"{arch}.attention.value_length", "u32", config.head_dim)


@lru_cache(maxsize=1)
def _tokenizer(checkpoint: Checkpoint) -> tuple[Field, ...]:
    """What every file of a checkpoint has alike; read once for all that are planned of it."""
    return tuple(_tokenizer_fields(checkpoint))


def _tokenizer_fields(checkpoint: Checkpoint) -> Iterator[Field]:
    path = checkpoint.path
    content = read_json(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else {}
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    tokens, kinds, merges, added = _vocabulary(checkpoint)
    yield Field("tokenizer.ggml.model", "str", "gpt2")
    yield Field("tokenizer.ggml.pre", "str", checkpoint.family.llama_cpp.pre)
    yield Field("tokenizer.ggml.tokens", "[str]", tokens)
    yield Field("tokenizer.ggml.token_type", "[i32]", kinds)
    yield Field("tokenizer.ggml.merges", "[str]", merges)
    special = {}
    for role, key in ROLES:
        text = settings.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in added:
            special[key] = added[text]
    for role, key in ROLES:
        number = checkpoint.raw_config.get(f"{role}_token_id")
        if key not in special and isinstance(number, int) and 0 <= number < len(tokens):
            special[key] = number
    for key, number in special.items():
        yield Field(f"tokenizer.ggml.{key}_token_id", "u32", number)
    for role, adds in _added_around(content, settings).items():
        yield Field(f"tokenizer.ggml.add_{role}_token", "bool", adds)
    template = chat_template(path, settings)
    if template is not None:
        yield Field("tokenizer.chat_template", "str", template)


def _added_around(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer puts a token before (`bos`) and after (`eos`) every text, where its files say so."""
    added: dict[str, bool] = {}
    processor = content.get("post_processor") or {}
    for one in _mappings(processor.get("processors", [processor]) if isinstance(processor, dict) else []):
        if one.get("type") == "ByteLevel":
            added = {"bos": False, "eos": False} | added
        single = _mappings(one.get("single")) if one.get("type") == "TemplateProcessing" else []
        for role, end in (("bos", 0), ("eos", -1)):
            special = _mappings([single[end].get("SpecialToken")]) if len(single) > 1 else []
            token = special[0].get("id") if special else None
            if token:
                added[role] = True
    for role in ("bos", "eos"):
        stated = settings.get(f"add_{role}_token")
        if isinstance(stated, bool):
            added.setdefault(role, stated)
    return added


def _mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in what should be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of the checkpoint in `path`, whose tokenizer_config.json holds `settings`; the default of several."""
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _vocabulary(checkpoint: Checkpoint) -> tuple[list[str], list[int], list[str], dict[str, int]]:
    """Tokens padded to the embedding's rows, their types, merges as "a b", and the added tokens with their ids."""
    checkpoint.require_tokenizer()
    vocabulary, size = checkpoint.vocabulary, checkpoint.config.vocab
    tokens = {number: token for token, number in vocabulary.tokens.items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for entry in vocabulary.added:
        tokens[entry.id], kinds[entry.id] = entry.content, CONTROL if entry.special else USER_DEFINED
    return (
        [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        [kinds.get(number, UNUSED) for number in range(size)],
        [" ".join(token.replace(" ", chr(288)) for token in merge) for merge in vocabulary.merges],
        {entry.content: entry.id for entry in vocabulary.added},
    )


def _importance(checkpoint: Checkpoint, recipe: Recipe, imatrix: Imatrix | None) -> Iterator[Field]:
    tokens = recipe.calibration.tokens
    file, dataset = (imatrix.file, imatrix.dataset) if imatrix else (FILE, f"qquant recipe {recipe.name}")
    entries = len(imatrix.sums) if imatrix else checkpoint.config.layers * len(checkpoint.family.linears)
    chunks = imatrix.chunks if imatrix else -(-tokens // CHUNK)
    yield Field("quantize.imatrix.file", "str", _cut(file))
    if dataset:
        yield Field("quantize.imatrix.dataset", "str", _cut(dataset))
    yield Field("quantize.imatrix.entries_count", "u32", entries)
    if chunks:
        yield Field("quantize.imatrix.chunks_count", "u32", chunks)


def _cut(text: str) -> str:
    return text.encode()[:TEXT_LIMIT].decode("utf-8", "ignore")
