"""Where calibration text comes from: bundled corpora, local files, hub datasets; and which of their rows can be used.

A row is a chat or a document. Chats are in the form of OpenAI ({"role", "content"}) or ShareGPT ({"from", "value"}). What cannot be
used is counted by reason, with the place of the first; more than 5 % malformed rows mean that the file is not what it is taken for.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.resources import data_dir, lazy

if TYPE_CHECKING:
    import ruamel.yaml as ruamel

    from qquant import recipe
else:
    ruamel = lazy("ruamel.yaml")
datasets, hub, parquet = lazy("datasets"), lazy("huggingface_hub"), lazy("pyarrow.parquet")

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}]
Row = tuple[str, Any]  # (place, a mapping of columns, or _Unusable)

FIELDS = ("messages", "conversations", "text")
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
}  # fmt: skip
MALFORMED_LIMIT = 0.05
MAX_FILE = 2**30  # bytes of a local source


@dataclass
class Drop:
    """Rows of a source that were not used, for one reason."""

    count: int
    first: str  # place of the first, e.g. "line 12"
    malformed: bool


@dataclass
class SourceRecord:
    """What became of one source. Rows are chats or documents: `taken` = `kept` + all of `dropped`."""

    name: str
    kind: str  # "text" or "chat"
    licence: str
    revision: str | None = None  # commit of a hub dataset, sha256 of a file
    taken: int = 0
    kept: int = 0
    dropped: dict[str, Drop] = field(default_factory=dict)
    samples: int = 0  # in the set
    truncated: int = 0  # of the samples
    tokens: int = 0  # in the set

    def drop(self, reason: str, location: str, malformed: bool = True) -> None:
        """Count one row as dropped."""
        entry = self.dropped.setdefault(reason, Drop(0, location, malformed))
        entry.count += 1


class _Unusable(ValueError):
    """Why a row cannot be used."""


@dataclass
class Corpus:
    """The usable rows of one source."""

    record: SourceRecord
    where: str  # for messages
    texts: list[str] = field(default_factory=list)
    chats: list[tuple[str, Messages]] = field(default_factory=list)  # (place, chat)
    ids: list[int] = field(default_factory=list)  # of the texts, joined
    openings: list[str] = field(default_factory=list)  # of what the checkpoint writes; empty where it writes nothing

    def capacity(self, length: int, asked: int) -> int:
        """How many of the `asked` samples it can give."""
        if self.openings:
            return asked
        return len(self.chats) if self.record.kind == "chat" else len(self.ids) // length


def _json_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = _Unusable("not valid JSON")
            yield f"line {number}", row if isinstance(row, (dict, _Unusable)) else _Unusable("not a JSON object")


def require_installed(library: str, what: str) -> None:
    """Raise EnvironmentMissingError where a library of the extra `datasets` is missing; `what` needs it."""
    if importlib.util.find_spec(library) is None:
        raise EnvironmentMissingError(f'{what}: needs the extra: pip install "qquant[datasets]"')


def _parquet_rows(path: Path) -> Iterator[Row]:
    require_installed("pyarrow", str(path))
    try:
        table = parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise InputError(f"{path}: cannot read the parquet file: {error}") from error


def read_file(path: Path) -> bytes:
    """The content of a file, unpacked if its name ends in .gz. Raises InputError if it cannot be read or is too large."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, seen from the working directory. Correct the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot read the file: {error}") from error
    if len(content) > MAX_FILE:
        raise InputError(f"{path}: more than {MAX_FILE} bytes. Calibration needs little: cut the file")
    return content


def decoded(content: bytes, path: Path) -> str:
    """The text of a file, lines ended by a line feed. Raises InputError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: no UTF-8 text at byte {error.start} (0x{content[error.start]:02x}). Convert it to UTF-8"
        ) from error


def file_rows(path: Path, content: bytes) -> Iterator[Row]:
    """The rows of a .jsonl or .txt file, packed or not. Raises InputError for another kind of file."""
    form = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    match form:
        case "jsonl":
            return _json_rows(content.splitlines())
        case "txt":
            return iter([("line 1", {"text": decoded(content, path)})])
        case _:
            raise InputError(
                f"{path}: a calibration source is a .jsonl, .parquet or .txt file, not .{form}. Convert it"
            )


@contextlib.contextmanager
def _hub_errors(source: recipe.Source) -> Iterator[None]:
    """Say what the hub's many errors mean: a wrong name, or no way to the hub."""
    # The HTTP library below the hub's client raises errors of its own; which library it is depends on the client's version.
    http = lazy(type(hub.get_session()).__module__.partition(".")[0])
    name = f"{source.dataset}, split {source.split}" + (f", revision {source.revision}" if source.revision else "")
    no_such_dataset = (
        hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError, hub.errors.HFValidationError,
        datasets.exceptions.DatasetNotFoundError,
    )  # fmt: skip
    try:
        yield
    except no_such_dataset as error:
        raise InputError(f"{name}: no such dataset on the hub: {error}") from error
    except (OSError, hub.errors.HfHubHTTPError, http.HTTPError) as error:
        raise EnvironmentMissingError(
            f"{name}: the hub cannot be reached: {error}. Use a bundled corpus or a local file, or go online and run the same command again"
        ) from error
    # An unknown configuration or split, or a dataset that needs code of its own.
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{name}: the dataset cannot be read: {error}") from error


def _hub_rows(source: recipe.Source) -> tuple[str, Iterator[Row]]:
    """(commit, rows) of a hub dataset, streamed in its own order."""
    require_installed("datasets", str(source.dataset))
    with _hub_errors(source):
        commit = hub.HfApi().dataset_info(source.dataset, revision=source.revision).sha
        stream = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=commit, streaming=True
        )

    def rows() -> Iterator[Row]:
        with _hub_errors(source):
            for number, row in enumerate(stream, start=1):
                yield f"row {number}", row

    return commit, rows()


def _content(value: Any) -> str:
    """The text of a message: a string, or a list of {"type": "text", "text": ...} parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _Unusable("a message has no text")
    return value


def _messages(row: Mapping[str, Any], value: Any) -> Messages:
    """A chat in the form of OpenAI (role, content) or ShareGPT (from, value). Raises _Unusable."""
    if not isinstance(value, (list, tuple)) or not value:
        raise _Unusable("no list of messages")
    chat: Messages = []
    for message in value:
        if not isinstance(message, dict):
            raise _Unusable("a message is not an object")
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise _Unusable("a role other than system, user (human), assistant (gpt)")
        text = _content(message.get("content", message.get("value")))
        if not text.strip() and role != "system":
            raise _Unusable("an empty message")
        chat.append({"role": ROLES[role], "content": text})
    if chat[0]["role"] != "system" and isinstance(row.get("system"), str) and row["system"]:
        chat.insert(0, {"role": "system", "content": row["system"]})
    if any(message["role"] == "system" for message in chat[1:]):
        raise _Unusable("a system turn that is not the first")
    if not any(message["role"] == "assistant" for message in chat):
        raise _Unusable("no assistant turn")
    return chat


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    special: frozenset[str]  # names of special tokens, which no message may contain
    seen: set[bytes] = field(default_factory=set)  # hashes of the rows kept so far, of all sources


def collect(
    corpus: Corpus, rows: Iterable[Row], reading: Reading, column: str | None = None, enough: int | None = None
) -> None:
    """Sort rows into `corpus`, until it has `enough` chats or characters; `column` as Source.field of the recipe.

    Raises InputError above 5 % malformed rows, or if no row is left.
    """
    record, size = corpus.record, 0
    for location, row in rows:
        record.taken += 1
        try:
            if isinstance(row, _Unusable):
                raise row
            name = column or next((key for key in FIELDS if key in row), None)
            if name not in row:
                raise _Unusable(f"no column {column!r}" if column else f"none of the columns {', '.join(FIELDS)}")
            size += _keep(corpus, location, row, row[name], reading)
        except _Unusable as error:
            record.drop(str(error), location)
        if enough is not None and size >= enough:
            break
    malformed = {reason: drop for reason, drop in record.dropped.items() if drop.malformed}
    count = sum(drop.count for drop in malformed.values())
    if count > MALFORMED_LIMIT * record.taken:
        reason, drop = next(iter(malformed.items()))
        raise InputError(
            f"{corpus.where}, {drop.first}: {reason}; {count} of {record.taken} rows are malformed, at most "
            f"{MALFORMED_LIMIT:.0%} may be. Expected a list of messages (role and content, or from and value) under `messages` or "
            "`conversations` for `kind: chat`, a string under `text` for `kind: text`; `field` names another column"
        )
    if not record.kept:
        dropped = ", ".join(f"{drop.count} {reason}" for reason, drop in record.dropped.items()) or "none"
        raise InputError(
            f"{corpus.where}: no usable row, {record.taken} read, dropped: {dropped}. Leave this source out or correct it"
        )


def _keep(corpus: Corpus, location: str, row: Mapping[str, Any], value: Any, reading: Reading) -> int:
    """Add one row to `corpus` unless it is empty or repeated; the size it adds, in chats or characters. Raises _Unusable."""
    chat = _messages(row, value) if corpus.record.kind == "chat" else []
    if corpus.record.kind == "text" and not isinstance(value, str):
        raise _Unusable("the column is not text")
    for message in chat:
        if token := next((name for name in reading.special if name in message["content"]), None):
            raise _Unusable(f"{token} inside a message")
    try:
        key = hashlib.sha256(json.dumps(chat or value, ensure_ascii=False).encode()).digest()
    except UnicodeEncodeError:
        raise _Unusable("half of a surrogate pair, which is no text") from None
    if not chat and not value.strip():
        corpus.record.drop("empty", location, malformed=False)
    elif key in reading.seen:
        corpus.record.drop("repeated", location, malformed=False)
    else:
        reading.seen.add(key)
        corpus.record.kept += 1
        if chat:
            corpus.chats.append((location, chat))
        else:
            corpus.texts.append(value)
        return 1 if chat else len(value)
    return 0


@dataclass(frozen=True)
class Bundled:
    """An entry of calibration/corpora.yaml or heldout.yaml."""

    name: str
    file: str
    kind: str
    language: str
    licence: str
    origin: str
    sha256: str  # of the unpacked text
    size: int  # bytes, unpacked; `bytes` in the manifest

    def read(self) -> bytes:
        """The unpacked text. Raises InputError if it is not the one the manifest lists."""
        path = data_dir("calibration") / self.file
        content = read_file(path)
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise InputError(
                f"{path}: sha256 {digest}, expected {self.sha256}: the bundled text was changed. Install qquant again"
            )
        return content


def read_yaml(path: Path) -> Any:
    """The content of a bundled YAML file."""
    return ruamel.YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


@functools.cache
def _manifest(name: str) -> dict[str, Bundled]:
    entries = read_yaml(data_dir("calibration") / f"{name}.yaml")
    return {entry["name"]: Bundled(size=entry.pop("bytes"), **entry) for entry in entries}


def corpora() -> dict[str, Bundled]:
    """The bundled calibration texts, by name."""
    return dict(_manifest("corpora"))


def heldout_texts() -> dict[str, Bundled]:
    """The bundled evaluation texts, by name."""
    return dict(_manifest("heldout"))


def open_source(source: recipe.Source, reading: Reading, enough: int) -> Corpus:
    """Read one source of a recipe; `enough` chats or characters of a hub dataset. Raises InputError, EnvironmentMissingError, UsageError."""
    limit = None
    if source.bundled is not None:
        entry = corpora().get(source.bundled)
        if entry is None:
            raise UsageError(
                f"calibration.sources: no bundled corpus {source.bundled!r}; there are {', '.join(corpora())}"
            )
        if entry.kind != source.kind:
            raise UsageError(
                f"calibration.sources: the bundled corpus {entry.name} is `kind: {entry.kind}`, the recipe says {source.kind}"
            )
        record = SourceRecord(entry.name, entry.kind, entry.licence, f"sha256:{entry.sha256}")
        where, rows = entry.name, file_rows(Path(entry.file), entry.read())
    elif source.path is not None:
        path = Path(source.path)
        content = read_file(path)
        # Only the name: provenance is published, folders of the machine are private.
        record = SourceRecord(path.name, source.kind, "unknown", f"sha256:{hashlib.sha256(content).hexdigest()}")
        where, rows = str(path), _parquet_rows(path) if path.suffix.lower() == ".parquet" else file_rows(path, content)
    else:
        commit, rows = _hub_rows(source)
        name = f"{source.dataset}/{source.config}" if source.config else str(source.dataset)
        record, where, limit = SourceRecord(f"{name}:{source.split}", source.kind, "see the hub", commit), name, enough
    corpus = Corpus(record, where)
    collect(corpus, rows, reading, source.field, limit)
    return corpus
