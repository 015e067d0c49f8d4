"""What a finished folder says of itself: its manifest, and its files held against it.

    qquant-manifest.json   {"schema", "artifacts": {name: `ArtifactEntry`}, "release": `ReleaseEntry`, "patches": [`Patch`]}
    report.json            read here too, for everybody above: see `qquant.report.record`
    qquant-provenance.json of a release: the other files are held against the hashes in it

A build writes `artifacts`, `publish` adds `release`, `patch` adds `patches`. Entries of earlier versions are read as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on

from qquant.disk.digest import is_file_of, sha256_of, sha256_of_data
from qquant.disk.output import MANIFEST
from qquant.disk.records import Count, to_plain, typed
from qquant.errors import InputError, UsageError
from qquant.formats import weight_files
from qquant.report.record import Report
from qquant.report.solved import Solved
from qquant.source.untrusted import read_json, require_regular

SCHEMA = "qquant-manifest-1"
REPORT = "report.json"
BOM, STATEMENT, SIGNATURE = "qquant-bom.cdx.json", "qquant-provenance.json", "model.sig"
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
CARD = "README.md"
ADDED = frozenset({CARD, REPORT, BOM, STATEMENT, SIGNATURE, *LICENCES})  # to a build's folder, by `publish` and `sign`

OTHER_MAKING = "says another thing of its making than when it was judged. Run the same `qquant build` again"


@dataclass(frozen=True)
class Payload:
    """One file of a repository: on disk, or in memory."""

    size: int
    sha256: str
    path: Path | None = None
    content: bytes = b""

    @classmethod
    def of(cls, content: bytes) -> Payload:
        """Size and sha256 of a file whose bytes are in memory."""
        return cls(len(content), hashlib.sha256(content).hexdigest(), None, content)

    def read(self) -> bytes:
        """All bytes; meant for small files."""
        return self.path.read_bytes() if self.path else self.content

    def git_oid(self) -> str:
        """The id git gives to these bytes as a blob."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        digest.update(self.read())
        return digest.hexdigest()


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of one file."""

    bytes: Count
    sha256: str


@with_config(ConfigDict(extra="allow"))
class SpecCopy(TypedDict, total=False):
    """An artifact's entry in the recipe of a build; the file holds more of it."""

    name: str
    format: str
    bits: Count
    group_size: int


@with_config(ConfigDict(extra="allow"))
class CalibrationSourceCopy(TypedDict, total=False):
    """A calibration source in the recipe of a build; the file holds more of it."""

    dataset: str | None
    kind: str


@with_config(ConfigDict(extra="allow"))
class CalibrationCopy(TypedDict, total=False):
    """How a recipe asked for calibration; the file holds more of it."""

    sources: list[CalibrationSourceCopy]


@with_config(ConfigDict(extra="allow"))
class RecipeCopy(TypedDict, total=False):
    """The recipe of a build, with every default; the file holds more of it."""

    name: str
    artifacts: list[SpecCopy]
    calibration: CalibrationCopy


@dataclass(frozen=True)
class AdapterFacts:
    """A LoRA adapter that was merged into the checkpoint."""

    name: str
    sha256: str  # of its weights and its config
    base: str | None = None  # the model that it says it was trained on
    revision: str | None = None  # commit of its hub repository


@dataclass(frozen=True)
class Origin:
    """What an artifact is made from."""

    recipe: RecipeCopy = field(default_factory=RecipeCopy)
    inputs: Mapping[str, str] = field(default_factory=dict)  # hashes, versions, device
    adapter: AdapterFacts | None = None


def digest_of(files: Mapping[str, str]) -> str:
    """sha256 over names and hashes of files."""
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


@dataclass(frozen=True)
class ArtifactEntry:
    """One artifact: what it was made from, its files, and how its linears were solved."""

    key: str  # binds it to recipe entry, checkpoint bytes, calibration tokens and versions
    format: str
    files: Mapping[str, FileFacts]
    recipe: RecipeCopy = field(default_factory=RecipeCopy)
    inputs: Mapping[str, str] = field(default_factory=dict)  # hashes, versions, device
    layers: tuple[Solved, ...] = ()
    adapter: AdapterFacts | None = None

    @property
    def digest(self) -> str:
        """sha256 of its files: what a verdict is about."""
        return digest_of({name: facts.sha256 for name, facts in self.files.items()})

    def spec(self, name: str) -> SpecCopy | None:
        """The recipe's entry of artifact `name`."""
        return next((spec for spec in self.recipe.get("artifacts", ()) if spec.get("name") == name), None)


@dataclass(frozen=True)
class ParallelSizes:
    """Tensor-parallel sizes that servers accept."""

    vllm: tuple[Count, ...] = ()
    sglang: tuple[Count, ...] = ()
    without_padding: tuple[Count, ...] = ()


@dataclass(frozen=True)
class ReleaseEntry:
    """What a release folder says besides: who publishes it as what, and what it was made from."""

    repository: str
    base_model: str | None = None
    revision: str | None = None
    chat: bool | None = None  # by its template; None: not known
    card: Mapping[str, str | tuple[str, ...]] | None = None  # licence, language, tags of the base model's card
    tensor_parallel: ParallelSizes | None = None
    tag: str | None = None
    namespace: str | None = None


@dataclass(frozen=True)
class Patch:
    """One setting that was changed after the release, and the file since."""

    file: str
    key: str
    value: Any
    bytes: Count
    sha256: str
    before: str = ""  # sha256 of the file as it was


@dataclass(frozen=True)
class Manifest:
    """The manifest of a folder."""

    artifacts: Mapping[str, ArtifactEntry] = field(default_factory=dict)
    release: ReleaseEntry | None = None
    patches: tuple[Patch, ...] = ()

    def with_artifact(self, name: str, entry: ArtifactEntry) -> Manifest:
        """This manifest with one artifact more, or another in its place."""
        return replace(self, artifacts={**self.artifacts, name: entry})

    def judged(self, name: str) -> str:
        """The digest of an artifact's files as they were before settings were patched."""
        files = {file: facts.sha256 for file, facts in self.artifacts[name].files.items()}
        for patch in reversed(self.patches):
            if patch.before and files.get(patch.file) == patch.sha256:
                files[patch.file] = patch.before
        return digest_of(files)

    @property
    def files(self) -> dict[str, FileFacts]:
        """Every file of every artifact."""
        return {name: facts for entry in self.artifacts.values() for name, facts in entry.files.items()}

    def to_json(self) -> bytes:
        """The bytes of the manifest's file."""
        content = {"schema": SCHEMA, **to_plain(self)}
        for optional in ("release", "patches"):
            if not content[optional]:
                del content[optional]
        return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Manifest:
        """The manifest of a record; `where` is the file, for messages.

        Raises:
            InputError: it is of another kind, or a field is not what it should be.
        """
        if content.get("schema") != SCHEMA:
            raise InputError(f"{where}: not a manifest that this version of qquant understands")
        return typed(cls, dict(content), where)


def verified(folder: Path, name: str, facts: FileFacts) -> Payload:
    """A file that a manifest names, after it was hashed and compared.

    Raises:
        InputError: it is missing, differs, or lies elsewhere.
    """
    path = _in_folder(folder, name, MANIFEST)
    if not matches(path, facts):
        raise InputError(
            f"{path}: does not match {MANIFEST}; the file is missing, was changed or damaged. Build it again"
        )
    return Payload(facts.bytes, facts.sha256, path)


def _in_folder(folder: Path, name: str, named_by: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or "\0" in name:
        raise InputError(f"{folder / named_by}: {name!r} is not a file of this folder")
    return folder / name


def matches(path: Path, facts: FileFacts) -> bool:
    """Whether a file is there, of its size, with its hash. Raises InputError if it is no regular file of its folder."""
    return path.is_file() and is_file_of(require_regular(path), facts.bytes, facts.sha256)


def verify_files(folder: Path) -> int:
    """Bytes of the files that the manifest of `folder` names, after each was hashed and compared.

    Raises:
        InputError: a file is missing or differs, or is not the one that a release's provenance names; or there is no manifest.
    """
    files = manifest_of(folder).files
    size = sum(verified(folder, name, facts).size for name, facts in files.items())
    if (folder / STATEMENT).is_file():
        _require_vouched(folder, {name: facts.sha256 for name, facts in files.items()})
    return size


@dataclass(frozen=True)
class _Subject:
    """A file, and its hash, in a provenance statement."""

    name: str
    digest: Mapping[str, str]


@dataclass(frozen=True)
class _Statement:
    """What of a provenance statement is held against the files."""

    subject: tuple[_Subject, ...]


def _require_vouched(folder: Path, hashed: Mapping[str, str]) -> None:
    """Raise InputError if a file is not the one that the provenance names; the card, to which text may be added, is compared apart."""
    for subject in typed(_Statement, read_json(folder / STATEMENT), str(folder / STATEMENT)).subject:
        path = _in_folder(folder, subject.name, STATEMENT)
        if subject.name != CARD and path.is_file():
            sha256 = hashed.get(subject.name) or sha256_of(require_regular(path))
            if subject.digest.get("sha256") != sha256:
                raise InputError(f"{path}: is not the file that {STATEMENT} vouches for. Take the release again")


def named_files(manifests: Iterable[Manifest]) -> set[str]:
    """Every file that manifests name."""
    return {name for manifest in manifests for name in manifest.files}


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a finished folder.

    Raises:
        InputError: there is none, or it is malformed.
    """
    return Manifest.from_json(read_json(folder / MANIFEST), str(folder / MANIFEST))


def entry_at(path: Path) -> tuple[str, ArtifactEntry] | None:
    """Name and entry of the artifact at `path`, a folder or a GGUF file; None where no manifest names it. Raises InputError if that is malformed."""
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        return None
    named = manifest_of(folder).artifacts.items()
    return next(((name, entry) for name, entry in named if path.is_dir() or path.name in entry.files), None)


def artifact_bytes(path: Path) -> int:
    """Bytes of an artifact as a build counts them: all files of a folder, or those that the manifest beside a GGUF file lists with it."""
    named = entry_at(path)
    if named is not None:
        return sum(facts.bytes for facts in named[1].files.values())
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return sum(file.stat().st_size for file in weight_files(path))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder in which a build would write.

    Raises:
        UsageError: there is none, so the folder is not ours.
        InputError: it is malformed.
    """
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: already exists and was not made by qquant (no {MANIFEST}). Choose another --out, or move it away"
        )
    return manifest_of(folder)


def artifacts_below(folder: Path) -> list[tuple[Path, str, ArtifactEntry]]:
    """(folder, name, entry) of every artifact in `folder`, or in a folder of it."""
    folders = [path.parent for path in (folder / MANIFEST, *sorted(folder.glob(f"*/{MANIFEST}"))) if path.is_file()]
    return [(below, name, entry) for below in folders for name, entry in manifest_of(below).artifacts.items()]


def records(folder: Path) -> dict[str, str]:
    """A sha256 of all that the manifest of `folder` says of each artifact besides its files: how it was made.

    It is taken of the JSON as it lies there without what is empty, so that other versions of qquant find the same.

    Raises:
        InputError: there is none, or it is malformed.
    """
    content = read_json(folder / MANIFEST)
    names = Manifest.from_json(content, str(folder / MANIFEST)).artifacts
    return {name: sha256_of_data(_said(content["artifacts"][name] | {"files": None})) for name in names}


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: said for key, item in value.items() if (said := _said(item)) not in (None, "", [], {})}
    return [_said(item) for item in value] if isinstance(value, list) else value


def require_judged(folder: Path, report: Report) -> None:
    """Raise InputError if artifacts of `folder` have other bytes, or were made otherwise, than those that its report judged."""
    digests: dict[str, set[str]] = {}
    making: dict[str, set[str]] = {}
    for below in {below for below, _, _ in artifacts_below(folder)}:
        manifest = manifest_of(below)
        for name, record in records(below).items():
            digests.setdefault(name, set()).add(manifest.judged(name))
            making.setdefault(name, set()).add(record)
    for row in report.artifacts:
        if row.sha256 and row.name in digests and row.sha256 not in digests[row.name]:
            raise InputError(
                f"{folder / REPORT}: {row.name}: judged other bytes ({row.sha256[:12]}) than the folder holds "
                f"({min(digests[row.name])[:12]}). Run the same `qquant build` again"
            )
        if row.record and row.name in making and row.record not in making[row.name]:
            raise InputError(f"{folder / REPORT}: {row.name}: {MANIFEST} {OTHER_MAKING}")


def read_report(path: Path) -> Report:
    """The record in a report.json.

    Raises:
        InputError: there is none, or it is malformed.
    """
    return Report.from_json(read_json(path), str(path))
