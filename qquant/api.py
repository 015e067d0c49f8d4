"""qquant from Python: three calls, in the words of the command line.

    import qquant
    report = qquant.build("Qwen/Qwen1.5-0.5B-Chat", types=["q4_k_m"], out="release")
    report.to_frame()                                   # or just `report` in a notebook
    report = qquant.check("model-q4_k_m.gguf", "Qwen/Qwen1.5-0.5B-Chat", max_kl=0.05)
    model = qquant.load("release/Qwen1.5-0.5B-Chat-GGUF/qwen1_5-0_5b-chat-q4_k_m.gguf")

`import qquant` is cheap: torch is imported by the first call. Verdicts are in the report and raise nothing; what the command line ends
with (exit 2, 5, 6, 7, 9) is an exception of `qquant.errors` here. Progress appears as on a terminal.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qquant import devices, pipeline
from qquant.cli.display import Display
from qquant.cli.options import checks_and_gates, given_imatrix
from qquant.plan.asked import Asked
from qquant.plan.plan import Plan
from qquant.progress import Progress, Quiet
from qquant.recipe.changes import Flags
from qquant.runtime.loading import load
from qquant.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    from qquant.recipe import Recipe
    from qquant.recipe.artifacts import FormatName
    from qquant.recipe.efforts import EffortName
    from qquant.report.record import Report

__all__ = ["build", "check", "load"]

Place = str | PathLike[str]


def build(
    checkpoint: Place,
    recipe: Place | Recipe | None = None,
    out: Place = "release",
    *,
    only: Sequence[str] = (),
    format: FormatName | None = None,
    bits: Literal[4, 8] | None = None,
    group_size: int | None = None,
    types: Sequence[str] = (),
    size: str | None = None,
    calibration: Place | Sequence[Place] = (),
    settings: Mapping[str, object] | None = None,
    effort: EffortName | None = None,
    adapter: Place | None = None,
    revision: str | None = None,
    name: str | None = None,
    imatrix: Place | None = None,
    device: str = "auto",
    progress: Progress | bool = True,
) -> Report:
    """The report of artifacts built into the folder `out` and checked against `checkpoint`; the same call continues an interrupted one.

    Args:
        checkpoint: a folder, or a hub id, of the 16-bit model.
        recipe: a bundled name, a YAML file, or a `Recipe`; by default the published one that fits the checkpoint.
        out: a folder that is new, empty, or of an earlier run.
        only: names of the recipe's artifacts; by default all.
        format: build one artifact of this format instead, with `bits`, `group_size` or (gguf) `types` or `size`.
        bits: per weight.
        group_size: weights that share a scale; -1 is a whole row.
        types: GGUF types, such as ["q4_k_m", "q8_0"].
        size: a GGUF file of at most this size, such as "4.4GB", its types chosen by what each tensor loses.
        calibration: your texts or chats (.jsonl, .txt, .parquet) instead of the recipe's.
        settings: changes of the recipe by dotted key, such as {"calibration.samples": 64, "artifacts.awq.group_size": 64}.
        effort: "fast", "default" or "best": how long the solvers may take, where the recipe does not say it.
        adapter: a PEFT LoRA folder to merge first.
        revision: branch, tag or commit of a hub checkpoint.
        name: of the model in folder and file names; by default the checkpoint's.
        imatrix: an importance matrix for GGUF files, instead of the measured one.
        device: "cpu", "cuda", "cuda:1", or "auto".
        progress: False shows nothing; or an object of your own.

    Raises:
        UsageError: the recipe, or what the arguments make of it, is not valid.
        InputError: a file is missing, damaged, or does not fit.
        EnvironmentMissingError: disk, memory, a device or the hub is missing.
        NumericalError: NaN or infinity.
        LockedError: another build writes to `out`.
    """
    sources = [calibration] if isinstance(calibration, str | PathLike) else calibration
    changes = tuple(f"{key}={json.dumps(value)}" for key, value in (settings or {}).items())
    flags = Flags(format, bits, group_size, tuple(types), (), changes, effort, size)
    place = Path(recipe) if isinstance(recipe, PathLike) else recipe
    lora = None if adapter is None else Path(adapter)
    asked = Asked(str(checkpoint), place, revision, lora, flags, tuple(Path(source) for source in sources))
    wanted, source = asked.open()
    plan = Plan.of(wanted, source, only, name, given_imatrix(None if imatrix is None else Path(imatrix), source))
    for warning in plan.warnings:
        warnings.warn(warning, stacklevel=2)
    with _shown(progress) as display:
        return pipeline.build(wanted, source, plan, Path(out), devices.named(device), display)


def check(
    artifacts: Place | Sequence[Place],
    checkpoint: Place,
    *,
    revision: str | None = None,
    profile: Literal["default", "release"] = "default",
    text: Place = "bundled:wikitext-2-test",
    also: Sequence[Place] = (),
    windows: int = 40,
    max_windows: int | None = None,
    length: int = 512,
    protocol: Literal["llama.cpp", "sliding"] = "llama.cpp",
    max_perplexity_ratio: float | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    defaults: bool = True,
    adapter: Place | None = None,
    out: Place | None = None,
    device: str = "auto",
    progress: Progress | bool = True,
) -> Report:
    """The report of artifacts made by any tool, measured against the checkpoint they came from.

    Args:
        artifacts: one, or several: GPTQ or AWQ folders, GGUF files.
        checkpoint: a folder, or a hub id, of the 16-bit model.
        revision: branch, tag or commit of a hub checkpoint.
        profile: "release" also measures by language, kind of text and position, with a gate on the worst of them.
        text: held-out text: bundled:NAME or a file.
        also: further texts, measured and not gated.
        windows: of text.
        max_windows: read on up to so many where a gate is inconclusive.
        length: tokens per window.
        protocol: score the second half of each window, or ("sliding") all of it.
        max_perplexity_ratio: fail above this ratio to the checkpoint.
        max_kl: fail above this mean KL divergence, in nats per token.
        min_top1: fail below this top-1 agreement, 0 to 1.
        defaults: hold what is not said to the limits of the artifact's format and size.
        adapter: the PEFT LoRA folder that was merged when they were built.
        out: keep report and evidence in this folder.
        device: "cpu", "cuda", "cuda:1", or "auto".
        progress: False shows nothing; or an object of your own.

    Raises:
        UsageError: a limit or number is out of range.
        InputError: a file is missing, damaged, or of another model.
        EnvironmentMissingError: memory, a device or the hub is missing.
    """
    paths = [artifacts] if isinstance(artifacts, str | PathLike) else artifacts
    numbers = {
        "profile": profile,
        "windows": windows,
        "max_windows": max_windows,
        "length": length,
        "protocol": protocol,
    }
    asked = numbers | {"text": str(text), "texts": tuple(map(str, also))}
    limits = {"perplexity_ratio": max_perplexity_ratio, "kl_divergence": max_kl, "top1_agreement": min_top1}
    checks, gates = checks_and_gates(asked, limits | {"defaults": defaults})
    source = Checkpoint.open(str(checkpoint), revision, None if adapter is None else Path(adapter))
    kept = None if out is None else Path(out)
    with _shown(progress) as display:
        return pipeline.check(
            [Path(path) for path in paths], source, checks, gates, devices.named(device), display, kept
        )


@contextmanager
def _shown(progress: Progress | bool) -> Iterator[Progress]:
    """A display for True, nothing for False, else the caller's own object."""
    if progress is True:
        with Display() as display:
            yield display
    else:
        yield Quiet() if progress is False else progress
