"""What was measured on every token, kept beside the report, so that a later release is compared without the old model.

OUT/evidence/<artifact>.safetensors, about 2 bytes a token and 24 bytes a window:

    nll  int8  [W, S]   NLL of artifact - checkpoint: code = round(127 asinh(d / 1e-4) / asinh(64 / 1e-4)), 6 % of the value
    kl   uint8 [W, S]   KL divergence:                code = round(255 asinh(x / 1e-6) / asinh(64 / 1e-6)), 4 %
    top1 uint8 [W, ceil(S / 8)]                       1: the same token first; most significant bit first
    means float64 [3, W]                              window means of NLL difference, KL divergence, disagreement: exact
    slices float64 [n]                                of `profile: release`: window means of KL divergence, slice after slice

The codes are for pictures and single tokens. Verdicts resample windows, so they only need the exact means. The metadata says which
text, protocol and checkpoint; only measurements on the same tokens are compared. Bytes depend on nothing else (no times, no paths).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qquant.artifact.manifest import read_report, require_judged
from qquant.checks.fidelity import Fidelity
from qquant.disk.records import Count, to_plain, typed
from qquant.disk.writes import make_folder, write_synced
from qquant.errors import InputError, UsageError
from qquant.report.conditions import TextFacts
from qquant.source.untrusted import parse_json

FOLDER = "evidence"
SCHEMA = "qquant-evidence-1"
NLL = (1e-4, 127)  # where the scale turns logarithmic, and the largest code
KL = (1e-6, 255)
LARGEST = 64.0  # nats; beyond is stored as this
LOSSES = ("nll", "kl", "top1")
SAID = 70  # characters of a value in a message: a sha256 with its quotes
TEXT = ("name", "sha256", "length", "protocol", "tokens_sha256")  # what two measurements must share


@dataclass(frozen=True)
class Facts:
    """What was read, how, and against which checkpoint."""

    name: str  # of the text
    sha256: str
    length: Count
    protocol: str
    tokens_sha256: str
    checkpoint: str

    @classmethod
    def of(cls, text: TextFacts, checkpoint: str) -> Facts:
        """The facts of a text, with the fingerprint of a checkpoint."""
        return cls(text.name, text.sha256, text.length, text.protocol, text.tokens_sha256, checkpoint)


@dataclass(frozen=True)
class SliceMeans:
    """What was measured on a slice: KL divergence by window, float64 [windows], and sha256 of the tokens that were read."""

    tokens_sha256: str
    kl: NDArray[np.float64]


@dataclass(frozen=True)
class _SliceFacts:
    name: str
    windows: Count
    tokens_sha256: str


@dataclass(frozen=True)
class _EvidenceHead:
    schema: str
    tokens: Count  # scored in each window
    facts: Facts
    slices: tuple[_SliceFacts, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Per token and per window, of one artifact."""

    facts: Facts
    nll: NDArray[np.float64]  # [W, S], NLL of the artifact minus the checkpoint's
    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    means: Mapping[str, NDArray[np.float64]]  # exact, [W]
    slices: Mapping[str, SliceMeans] = field(default_factory=dict)  # by name; none: they were not measured

    @property
    def digest(self) -> str:
        """sha256 of what verdicts rest on."""
        rows = [*(self.means[loss] for loss in LOSSES), *(one.kl for one in self.slices.values())]
        return hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.means["nll"])


def compress(value: NDArray[np.float64], scale: float, codes: int) -> NDArray[np.int64]:
    """Codes of magnitude 0 ... codes, linear below `scale` and logarithmic above; what is not finite is the largest."""
    finite = np.nan_to_num(value, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST).clip(-LARGEST, LARGEST)
    return np.rint(codes * np.arcsinh(finite / scale) / np.arcsinh(LARGEST / scale)).astype(np.int64)


def expand(code: NDArray[Any], scale: float, codes: int) -> NDArray[np.float64]:
    """The values that codes stand for, float64."""
    return np.sinh(code.astype(np.float64) * np.arcsinh(LARGEST / scale) / codes) * scale


def write(path: Path, measured: Fidelity, facts: Facts, slices: Mapping[str, SliceMeans] | None = None) -> None:
    """Store what was measured on a text, and on slices by name."""
    slices = slices or {}
    means = measured.window_means()
    content: dict[str, NDArray[Any]] = {
        "nll": compress((measured.nll - measured.nll_baseline).numpy(), *NLL).astype(np.int8),
        "kl": compress(measured.kl.numpy(), *KL).astype(np.uint8),
        "top1": np.packbits(measured.same_top.numpy(), axis=1),
        "means": np.stack([means[name] for name in LOSSES]),
    }
    if slices:
        content["slices"] = np.concatenate([one.kl for one in slices.values()])
    read_slices = tuple(_SliceFacts(name, len(one.kl), one.tokens_sha256) for name, one in slices.items())
    head = to_plain(_EvidenceHead(SCHEMA, measured.nll.shape[1], facts, read_slices))
    if not slices:
        del head["slices"]
    make_folder(path.parent)
    # One key: the library writes several in random order.
    write_synced(path, save(content, {"evidence": json.dumps(head, sort_keys=True)}))


def read(path: Path) -> Evidence:
    """The evidence that a file holds.

    Raises:
        InputError: damaged, or of another kind.
    """
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {})["evidence"]
            head = typed(_EvidenceHead, parse_json(text.encode()), str(path))
            names = ("nll", "kl", "top1", "means", *(("slices",) if head.slices else ()))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            content = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path}: damaged evidence: {error}. Check the artifact again") from None
    if head.schema != SCHEMA:
        raise InputError(f"{path}: is not evidence of this version of qquant")
    rows = shapes["means"][-1] if shapes["means"] else 0
    wanted = {
        "nll": ((rows, head.tokens), "int8"),
        "kl": ((rows, head.tokens), "uint8"),
        "top1": ((rows, -(-head.tokens // 8)), "uint8"),
        "means": ((len(LOSSES), rows), "float64"),
        "slices": ((sum(one.windows for one in head.slices),), "float64"),
    }
    for name, (shape, kind) in ((name, wanted[name]) for name in names):
        if shapes[name] != shape or str(content[name].dtype) != kind or 0 in shape:
            have = f"{content[name].dtype} {list(shapes[name])}"
            raise InputError(
                f"{path}: damaged evidence: {name} is {have}, not {kind} {list(shape)}. Check the artifact again"
            )
    same = np.unpackbits(content["top1"], axis=1, count=head.tokens).astype(bool)
    means = dict(zip(LOSSES, content["means"], strict=True))
    slices = dict(_slices(head.slices, content["slices"])) if head.slices else {}
    return Evidence(head.facts, expand(content["nll"], *NLL), expand(content["kl"], *KL), same, means, slices)


def _slices(facts: Sequence[_SliceFacts], means: NDArray[np.float64]) -> Iterator[tuple[str, SliceMeans]]:
    start = 0
    for one in facts:
        yield one.name, SliceMeans(one.tokens_sha256, means[start : start + one.windows])
        start += one.windows


def of_report(path: Path) -> dict[str, Evidence]:
    """Evidence by artifact, for a report.json or the folder that holds one.

    Raises:
        UsageError: there is no report, or no evidence beside it.
    """
    report = path / "report.json" if path.is_dir() else path
    if not report.is_file():
        raise UsageError(f"{path}: no report.json; give the output folder of a build, or its report.json")
    content = read_report(report)
    require_judged(report.parent, content)
    names = [row.name for row in content.artifacts]
    files = {name: report.parent / FOLDER / f"{file_name(name)}.safetensors" for name in names}
    missing = [path for path in files.values() if not path.is_file()]
    if missing or not files:
        raise UsageError(
            f"{missing[0] if missing else report}: no evidence beside the report; keep the folder {FOLDER}/ with it"
        )
    return {name: read(path) for name, path in files.items()}


def paths_of(path: Path) -> dict[str, str]:
    """Where each artifact of a report lay, by its name."""
    rows = read_report(path / "report.json" if path.is_dir() else path).artifacts
    return {row.name: row.path.rstrip("/") for row in rows}


def file_name(artifact: str) -> str:
    """A name that a file system takes, for an artifact's name or path."""
    return artifact.strip("/").replace("/", "~").replace("\\", "~")


def require_comparable(now: Facts | TextFacts, then: Facts, where: str) -> None:
    """Raise InputError unless both were measured on the same tokens in the same way."""
    for key in TEXT[1:]:  # a text of another name is the same text
        ours, theirs = getattr(now, key), getattr(then, key)
        if ours != theirs:
            theirs, ours, then_name, name = (repr(said)[:SAID] for said in (theirs, ours, then.name, now.name))
            raise InputError(
                f"{where}: measured with {key} {theirs}, not {ours} of {then_name}, here {name}; the two cannot be paired. "
                "`qquant check --out` measures the earlier artifact again on this text"
            )
