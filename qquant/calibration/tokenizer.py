"""A checkpoint's own tokenizer and chat template, read from its folder without transformers.

`tokenizer.json` holds the whole tokenizer; `vocab.json` with `merges.txt` need the code of Qwen's tokenizer, which transformers has.
All of it comes from strangers: `vocabulary` and `untrusted` read the files, `template` runs the chat template in a sandbox.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.errors import InputError, QQuantError
from qquant.resources import lazy
from qquant.source import vocabulary
from qquant.source.untrusted import read_json, read_text

if TYPE_CHECKING:
    import tokenizers

    from qquant.calibration import template
else:
    tokenizers, template = lazy("tokenizers"), lazy("qquant.calibration.template")

SETTINGS = ("added_tokens_decoder", "additional_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token")


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint, {} if there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def _backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint folder, from tokenizer.json, else from vocab.json and merges.txt."""
    vocabulary.read(path)
    file = path / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(file)) if file.is_file() else _from_parts(path)
    except (QQuantError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001  tokenizers raises bare Exception, and a panic of it is not even that
        raise InputError(f"{file}: no tokenizer ({error}). Copy the file again from the original checkpoint") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_parts(path: Path) -> tokenizers.Tokenizer:
    """Qwen's tokenizer from vocab.json and merges.txt, through transformers.

    These two do not say the ids of the special tokens, and transformers would number them in an order of its own. It reads copies
    with nothing in their settings but the names of tokens.
    """
    import transformers  # costs seconds, and most checkpoints have tokenizer.json

    config = _json(path / "tokenizer_config.json")
    stated = _json(path / "vocab.json") | _json(path / "added_tokens.json")
    stated |= {token.content: token.id for token in vocabulary.read(path).added}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):
            if os.path.lexists(path / name):
                (Path(folder) / name).write_text(read_text(path / name), "utf-8")
        kept = {key: config[key] for key in SETTINGS if key in config}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(kept))
        backend: tokenizers.Tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer
    for i, token in backend.get_added_tokens_decoder().items():
        if stated.get(token.content) != i:
            raise InputError(
                f"{path}: no file says the id of {token.content}, and vocab.json with merges.txt do not tell. Copy tokenizer.json from the "
                "base model, or its tokenizer_config.json with `added_tokens_decoder`"
            )
    return backend


def _template(path: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """(chat template, where it stands): chat_template.jinja comes before tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file), file.name
    origin = "tokenizer_config.json"
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {str(entry.get("name")): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
        if given is None:
            raise InputError(f"{path / origin}: chat_template names {sorted(named)}, none of them is `default`")
    if given is not None and not isinstance(given, str):
        raise InputError(
            f"{path / origin}: chat_template is a {type(given).__name__}, expected text or a list of named templates"
        )
    return given, origin


class Tokenizer:
    """A checkpoint's own tokenizer and chat template."""

    def __init__(self, path: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        """Read what surrounds `backend` in the checkpoint folder `path`; `config` stands for its tokenizer_config.json.

        Raises:
            InputError: unreadable files.
        """
        self.path = path
        self._backend = backend
        config = _json(path / "tokenizer_config.json") if config is None else config
        self.template, self.template_origin = _template(path, config)
        added = backend.get_added_tokens_decoder()
        self.added: dict[str, int] = {token.content: i for i, token in added.items()}
        self.special: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
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
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            given = _json(self.path / name).get("eos_token_id")
            found += [i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int)]
        token = self._backend.token_to_id(self._variables.get("eos_token", ""))
        return tuple(dict.fromkeys(found + ([token] if token is not None else [])))

    @functools.cached_property
    def size(self) -> int:
        """Number of token ids, special ones included; a model's embedding may be padded beyond it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _compiled(self) -> template.Template:
        if self.template is None:
            raise InputError(
                f"{self.path}: no chat template, looked for chat_template.jinja and for chat_template in tokenizer_config.json. "
                "Calibrate a base model with sources of `kind: text`; for a chat model copy its template back"
            )
        return template.Template(self.template, f"{self.path / self.template_origin}")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`. `special`: the name of a special token, such as <|im_end|>, is that token; else it is ordinary text."""
        self._backend.encode_special_tokens = not special
        return self._backend.encode(text, add_special_tokens=False).ids

    def to_json(self) -> str:
        """The whole of it as a tokenizer.json."""
        return str(self._backend.to_str(pretty=True))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """A chat as the template writes it. Raises InputError if there is no template or if it refuses the chat."""
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            return self._compiled.render(variables | self._variables)
        except template.FAILURES as error:
            roles = ", ".join(message["role"] for message in messages)
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
