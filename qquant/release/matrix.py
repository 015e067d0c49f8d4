"""A release: several checkpoints times the artifacts of their recipes, planned from configs and headers alone.

    version: 1
    name: qwen1.5-chat
    cells:
      - {checkpoint: Qwen/Qwen1.5-7B-Chat, recipe: qwen1.5-chat}
      - {checkpoint: Qwen/Qwen1.5-14B-Chat, recipe: padded.yaml, revision: main, model: Qwen1.5-14B-Chat}

A job is one cell: its artifacts share one calibration pass. Jobs are idempotent (a finished build is kept, a killed one continues),
so any scheduler may run them, in any order, twice. A cell that cannot be planned does not hide the others.

Tensor parallel: a rank must hold whole attention heads, and whole groups of the down and output projections; vLLM refuses others
("input size is not aligned with the quantized weight shape"). vLLM and SGLang split the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qquant import recipe as recipes
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.plan.plan import Plan
from qquant.recipe.words import hint, key_path, nearest, shown
from qquant.release.repository import card_facts
from qquant.source.checkpoint import Checkpoint
from qquant.source.padding import PaddedCheckpoint, padded
from qquant.source.rounding import rounded

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LIMIT = 1_000_000  # bytes of a matrix file
Text = Annotated[str, Field(min_length=1, max_length=1024)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Cell(_Strict):
    """One checkpoint and the recipe for it."""

    checkpoint: Text
    recipe: Text
    revision: Text | None = None
    model: Text | None = None  # name in folders and files; default: the checkpoint's


class Matrix(_Strict):
    """The checkpoints and recipes of a whole release."""

    version: Literal[1]
    name: Text
    cells: list[Cell] = Field(min_length=1, max_length=256)


@dataclass(frozen=True)
class Job:
    """A planned cell."""

    cell: Cell
    plan: Plan | None
    facts: dict[str, Any]
    problem: str = ""

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.plan.model if self.plan else self.cell.model or self.cell.checkpoint.rsplit("/", 1)[-1]


def load(path: Path) -> Matrix:
    """Read a matrix file.

    Raises:
        UsageError: it cannot be read, or does not fit; every problem is named.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        if path.stat().st_size > LIMIT:
            raise UsageError(f"{path}: {path.stat().st_size:,} bytes; a matrix has at most {LIMIT:,}")
        content = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
        return Matrix.model_validate(content)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the matrix: {error.strerror}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise UsageError("\n".join(f"{path}: {_told(item)}" for item in error.errors(include_url=False))) from None


def _told(item: ErrorDetails) -> str:
    """One problem of a matrix file in the words of recipes: what is wrong, what is possible, what was meant."""
    *above, last = item["loc"] or ("matrix",)
    where = key_path(item["loc"]) if item["loc"] else "matrix"
    fields = list((Cell if above else Matrix).model_fields)
    match item["type"]:
        case "missing":
            return f"{where}: missing key; needed: {', '.join(_needed(Cell if above else Matrix))}"
        case "extra_forbidden":
            return f"{where}: unknown key; allowed: {', '.join(fields)}{hint(nearest(last, fields))}"
        case "model_type":
            return f"{where}: wrong type, got {shown(item['input'])}; allowed: a mapping of {', '.join(fields)}"
        case "list_type":
            return (
                f"{where}: wrong type, got {shown(item['input'])}; allowed: a list of {{checkpoint: ..., recipe: ...}}"
            )
        case _:
            return f"{where}: {item['msg'][:1].lower()}{item['msg'][1:]}, got {shown(item['input'])}"


def _needed(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def shard(matrix: Matrix, part: str | None) -> list[Cell]:
    """The cells of part "i/n" (1 <= i <= n), every n-th; all of them for None.

    Raises:
        UsageError: not of that form.
    """
    if part is None:
        return list(matrix.cells)
    numbers = part.split("/")
    if (
        len(numbers) != 2
        or not all(number.isdigit() for number in numbers)
        or not 1 <= int(numbers[0]) <= int(numbers[1])
    ):
        raise UsageError(f"--shard {part}: must be i/n with 1 <= i <= n, such as 1/4")
    return list(matrix.cells[int(numbers[0]) - 1 :: int(numbers[1])])


def plan(cells: Sequence[Cell]) -> list[Job]:
    """Every cell planned; one that cannot be has a `problem` instead of a plan."""
    return [_plan(cell) for cell in cells]


def _plan(cell: Cell) -> Job:
    try:
        recipe = recipes.load(cell.recipe)
        source = Checkpoint.open(cell.checkpoint, cell.revision or recipe.revision)
        padded_source = padded(rounded(source, recipe.dtype), recipe)
        planned = Plan.of(recipe, padded_source, (), cell.model)
    except (InputError, UsageError, EnvironmentMissingError) as error:
        return Job(cell, None, {}, str(error))
    return Job(cell, planned, facts(source, padded_source, planned))


def facts(source: Checkpoint, padded_source: Checkpoint, planned: Plan) -> dict[str, Any]:
    """What a release engineer asks of a model besides its files."""
    card = card_facts(source.path / "README.md")
    return {
        "licence": card.get("license_name") or card.get("license"),
        "tied_head": source.config.tied,
        "intermediate": source.config.intermediate,
        "padded_to": padded_source.config.intermediate if isinstance(padded_source, PaddedCheckpoint) else None,
        "tensor_parallel": dict(planned.parallel),
    }


def github_matrix(jobs: Sequence[Job]) -> dict[str, Any]:
    """What `strategy.matrix` of GitHub Actions takes: one entry per job; cells with a problem are left out."""
    return {
        "include": [
            {
                "model": job.model,
                "checkpoint": job.cell.checkpoint,
                "recipe": job.cell.recipe,
                "revision": job.cell.revision or "",
                "disk_gb": -(-job.plan.disk // 10**9),
                "memory_gb": -(-job.plan.memory // 10**9),
            }
            for job in jobs
            if job.plan
        ]
    }


def to_dict(jobs: Sequence[Job]) -> dict[str, Any]:
    """The jobs as plain data, for `--json`."""
    return {
        "schema": "qquant-release-plan-1",
        "jobs": [
            {
                "model": job.model,
                **job.cell.model_dump(exclude={"model"}),
                "problem": job.problem or None,
                **job.facts,
                "plan": job.plan.to_dict() if job.plan else None,
            }
            for job in jobs
        ],
    }


def lines(job: Job) -> list[str]:
    """One job for people."""
    if job.plan is None:
        return [f"{job.model}: cannot be built: {job.problem}"]
    size = "" if job.facts["padded_to"] is None else f", padded {job.facts['intermediate']} -> {job.facts['padded_to']}"
    text = [
        f"{job.model}: licence {job.facts['licence'] or 'unknown'}, {'tied' if job.facts['tied_head'] else 'own'} head{size}"
    ]
    for artifact in job.plan.artifacts:
        sizes = job.facts["tensor_parallel"].get(artifact.name)
        parallel = f"; TP {_shown(sizes['vllm'])} (unpadded {_shown(sizes['without_padding'])})" if sizes else ""
        fallbacks = f"; {len(artifact.fallbacks)} K-quant fallbacks" if artifact.fallbacks else ""
        text.append(
            f"  {artifact.size:>15,}  {artifact.folder}/ {artifact.name}, {len(artifact.files)} files{parallel}{fallbacks}"
        )
    text.append(f"  memory about {job.plan.memory / 1e9:.1f} GB, disk {job.plan.disk:,} bytes")
    return text


def _shown(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes)) or "none"
