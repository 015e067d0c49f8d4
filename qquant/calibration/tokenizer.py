"""A checkpoint's own tokenizer and chat template, read from its folder without transformers.

`tokenizer.json` holds the whole tokenizer; `vocab.json` with `merges.txt`, and the metadata of GGUF files, hold the tokens of Qwen's.
All of it comes from strangers: `vocabulary` and `untrusted` read the files, `source.confined` runs tokenizers and templates.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from qquant.calibration.template import Template
from qquant.errors import InputError
from qquant.source import vocabulary
from qquant.source.confined import Confined, Refused
from qquant.source.untrusted import read_json, read_text
from qquant.source.vocabulary import Vocabulary

SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token")
DEFAULT_END = "<|endoftext|>"  # of Qwen's tokenizer, whatever its settings say
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint, {} if there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


class Backend:
    """The text of a tokenizer.json, read and run in a process of its own; `added`: token -> (id, special)."""

    def __init__(self, text: str, where: str) -> None:
        """`where` it stands. Raises InputError if it is no tokenizer."""
        self.where, self.confined = where, Confined("tokenizer", text)
        try:
            described, _ = self.confined.ask("describe")
        except Refused as error:
            raise InputError(
                f"{where}: no tokenizer ({error}). Copy the file again from the original checkpoint"
            ) from None
        self.size: int = described["size"]
        self.added: dict[str, tuple[int, bool]] = {
            token: (number, special) for number, token, special in described["added"]
        }

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Ids of each text."""
        contents = [text.encode("utf-8", "surrogatepass") for text in texts]
        said, data = self._ask("encode", b"".join(contents), special=special, sizes=list(map(len, contents)))
        ids = iter(struct.unpack(f"<{len(data) // 4}I", data))
        return [list(islice(ids, count)) for count in said["counts"]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._ask("decode", struct.pack(f"<{len(ids)}I", *ids))[1].decode("utf-8", "surrogatepass")

    def _ask(self, work: str, content: bytes, **arguments: Any) -> tuple[dict[str, Any], bytes]:
        try:
            return self.confined.ask(work, content, **arguments)
        except Refused as error:
            raise InputError(f"{self.where}: the tokenizer does not {work} {len(content):,} bytes: {error}") from None


def _backend(path: Path) -> Backend:
    """The tokenizer of a checkpoint folder, from tokenizer.json, else from vocab.json and merges.txt."""
    vocab = vocabulary.read(path)
    file = path / "tokenizer.json"
    if file.is_file():
        return Backend(read_text(file), str(file))
    return _from_parts(path, vocab)


def _from_parts(path: Path, vocab: Vocabulary) -> Backend:
    """Qwen's tokenizer from vocab.json and merges.txt.

    These two do not say the ids of the special tokens: added_tokens.json or tokenizer_config.json must.
    """
    config = _json(path / "tokenizer_config.json")
    stated = {token.content for token in vocab.added} | vocab.tokens.keys()
    names = [config.get(key) for key in SETTINGS] + list(config.get("additional_special_tokens") or ())
    wanted = [token.get("content") if isinstance(token, dict) else token for token in names]
    absent = [token for token in (*wanted, DEFAULT_END) if isinstance(token, str) and token not in stated]
    if absent:
        raise InputError(
            f"{path}: no file says the id of {absent[0]}, and vocab.json with merges.txt do not tell. Copy tokenizer.json from the "
            "base model, or its tokenizer_config.json with `added_tokens_decoder`"
        )
    backend = Backend(qwen(vocab), str(path / "vocab.json"))
    require_ids(backend, vocab)
    return backend


def qwen(vocab: Vocabulary) -> str:
    """The tokenizer.json of Qwen's byte-level BPE with these tokens: what transformers makes of vocab.json and merges.txt."""
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    in_order = sorted(vocab.added, key=lambda token: token.id)
    added = [{"id": token.id, "content": token.content, "special": token.special, **flags} for token in in_order]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
        "byte_fallback": False, "ignore_merges": False, "vocab": dict(vocab.tokens), "merges": [list(pair) for pair in vocab.merges],
    }  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level, "decoder": level, "model": model,
    }  # fmt: skip
    return json.dumps(content)


def require_ids(backend: Backend, vocab: Vocabulary) -> None:
    """Raise InputError unless every added token has got its own id: the library numbers them in a row after the others."""
    for token in vocab.added:
        if backend.added.get(token.content, (token.id, False))[0] != token.id:
            raise InputError(
                f"{backend.where}: token {token.id} ({token.content!r}) does not follow the tokens before it"
            )


def _template(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """(chat template, where it stands): chat_template.jinja comes before tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file), file.name
    origin = "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise InputError(f"{path / origin}: chat_template names {sorted(named)}, none of them is `default`")
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{path / origin}: chat_template is a {type(template).__name__}, expected text or a list of named templates"
        )
    return template, origin


class Tokenizer:
    """A checkpoint's own tokenizer and chat template."""

    def __init__(self, path: Path, backend: Backend, config: Mapping[str, Any] | None = None) -> None:
        """Read what surrounds `backend` in the checkpoint folder `path`; `config` stands for its tokenizer_config.json.

        Raises:
            InputError: unreadable files.
        """
        self.path = path
        self._backend = backend
        config = _json(path / "tokenizer_config.json") if config is None else config
        self.template, self.template_origin = _template(path, config)
        self.added: dict[str, int] = {token: number for token, (number, _) in backend.added.items()}
        self.special: dict[str, int] = {token: number for token, (number, special) in backend.added.items() if special}
        names = {key: config.get(f"{key}_token") for key in ("bos", "eos", "pad", "unk")}
        named = {key: token.get("content") if isinstance(token, dict) else token for key, token in names.items()}
        self._variables = {f"{key}_token": token for key, token in named.items() if isinstance(token, str)}
        self.eos = self._stops()

    @classmethod
    def open(cls, checkpoint: str | Path) -> Tokenizer:
        """The tokenizer in a checkpoint folder. Raises InputError if there is none or if it is corrupt."""
        path = Path(checkpoint)
        return cls(path, _backend(path))

    def _stops(self) -> tuple[int, ...]:
        """Ids on which generation stops, by any of the three files that say so."""
        stops: list[int] = []
        for name in ("generation_config.json", "config.json"):
            eos = _json(self.path / name).get("eos_token_id")
            stops += [i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)]
        name = self._variables.get("eos_token", "")
        token = self.added.get(name)
        if token is None and name:
            ids = self.encode(name)
            token = ids[0] if len(ids) == 1 else None
        return tuple(dict.fromkeys(stops + ([token] if token is not None else [])))

    @property
    def size(self) -> int:
        """Number of token ids, special ones included; a model's embedding may be padded beyond it."""
        return self._backend.size

    @functools.cached_property
    def _compiled(self) -> Template:
        if self.template is None:
            raise InputError(
                f"{self.path}: no chat template, looked for chat_template.jinja and for chat_template in tokenizer_config.json. "
                "Calibrate a base model with sources of `kind: text`; for a chat model copy its template back"
            )
        return Template(self.template, f"{self.path / self.template_origin}")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`. `special`: the name of a special token, such as <|im_end|>, is that token; else it is ordinary text."""
        return self._backend.encode([text], special)[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, all in one go."""
        return self._backend.encode(texts, True)

    def to_json(self) -> str:
        """The whole of it as a tokenizer.json."""
        return json.dumps(json.loads(self._backend.confined.source), indent=2, ensure_ascii=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name."""
        return self._backend.decode([int(i) for i in ids])

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """A chat as the template writes it. Raises InputError if there is no template or if it refuses the chat."""
        return self.render_all([messages], add_generation_prompt)[0]

    def render_all(
        self, chats: Sequence[Sequence[Mapping[str, str]]], add_generation_prompt: bool = False
    ) -> list[str]:
        """`render` of each chat, all in one go."""
        shared = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return self._compiled.render([{"messages": chat} for chat in chats], shared | self._variables)
        except Refused as error:
            roles = ", ".join(message["role"] for message in chats[error.at])
            raise InputError(
                f"{self.path / self.template_origin}: the chat template refuses a chat of ({roles}): {error}. "
                "Leave such chats out of the calibration sources"
            ) from error

    @functools.cached_property
    def default_system(self) -> str | None:
        """The system text that the template adds to a chat without one, None if it adds none."""
        probe = "\ue000"
        user = {"role": "user", "content": "?"}
        before, _, after = self.render([{"role": "system", "content": probe}, user]).partition(probe)
        without = self.render([user])
        size = len(without) - len(before) - len(after)
        if not before or size < 0 or not (without.startswith(before) and without.endswith(after)):
            return None
        return without[len(before) : len(before) + size]

    @functools.cached_property
    def end_of_turn(self) -> int:
        """Id of the token that the template writes after an answer that another question follows.

        Raises InputError if there is none, or if generation would not stop on it.
        """
        probe = "\ue000"
        talk = [{"role": role, "content": text} for role, text in (("user", "?"), ("assistant", probe), ("user", "?"))]
        after = self.render(talk).partition(probe)[2].lstrip()
        token = next((name for name in sorted(self.added, key=len, reverse=True) if after.startswith(name)), None)
        origin = self.path / self.template_origin
        if token is None:
            raise InputError(
                f"{origin}: the chat template ends an answer with {after[:20]!r}, which is no added token of the tokenizer "
                f"({', '.join(sorted(self.added)) or 'it has none'}): the model cannot learn where to stop. Repair the template"
            )
        if self.eos and self.added[token] not in self.eos:
            raise InputError(
                f"{origin}: the chat template ends an answer with {token} (id {self.added[token]}), but generation stops on "
                f"{list(self.eos)} only. Add the id to eos_token_id in generation_config.json, or repair the template"
            )
        return self.added[token]
