"""`qquant matrix`, `publish`, `patch`, `sign`: from a release's plan to its repositories."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qquant.cli.command import command
from qquant.cli.options import EXITS, JSON
from qquant.cli.terminal import counted, echo
from qquant.errors import PartlyPublishedError, UsageError

if TYPE_CHECKING:
    from qquant.release.hub.request import Published

NAMESPACE = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


MATRIX = """\b
A MATRIX file (revision and model may be left out):
  version: 1
  name: qwen1.5-chat
  cells:
    - {checkpoint: Qwen/Qwen1.5-7B-Chat, recipe: qwen1.5-chat, revision: main, model: Qwen1.5-7B-Chat}
"""


@command(epilog=MATRIX, example="matrix release.yaml")
@click.argument("matrix", type=click.Path(path_type=Path))
@click.option("--shard", metavar="I/N", help="Only part I of N of the cells; default: all.")
@click.option("--github-matrix", is_flag=True, help="Print the jobs as `strategy.matrix` of GitHub Actions takes them.")
@JSON
def matrix(matrix: Path, shard: str | None, github_matrix: bool, as_json: bool) -> None:
    """Plan a release: the checkpoints of a MATRIX file times the artifacts of their recipes.

    Sizes, repositories, licences, fallbacks and tensor-parallel sizes before and after padding, from headers alone.
    """
    from qquant.release import matrix as cells

    jobs = cells.plan(cells.shard(cells.load(matrix), shard))
    broken = [f"{job.model}: {job.problem}" for job in jobs if job.plan is None]
    if github_matrix:
        echo(json.dumps(cells.github_matrix(jobs)))
    elif as_json:
        echo(json.dumps(cells.to_dict(jobs), indent=2))
    else:
        for job in jobs:
            echo("\n".join(cells.lines(job)))
        total = sum(job.plan.disk for job in jobs if job.plan)
        echo(f"{counted(len(jobs), 'job')}, {total:,} bytes of disk in all")
    if broken:
        raise UsageError("\n".join(broken))


@command(epilog=EXITS, surplus="--namespace {}", example="publish release --namespace my-organisation")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["hf", "modelscope", "dir"]), default="hf", show_default=True)
@click.option(
    "--namespace",
    default="",
    help="User or organisation that will own the repositories; default: none, which --to dir allows.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="With --to dir: where the release folders go; default: none."
)
@click.option(
    "--only",
    multiple=True,
    metavar="ARTIFACT",
    help="Publish these artifacts only; may be repeated; default: all that passed.",
)
@click.option("--tag", default="v1", show_default=True, help="Tag of the release; never moved once it is set.")
@click.option(
    "--signed",
    type=click.Path(path_type=Path, file_okay=False),
    help="Release folders (--out of --to dir) that `qquant sign` signed; their model.sig is published, too; default: unsigned.",
)
@click.option(
    "--base-model", help="Hub id of the checkpoint, where the build had a local folder; default: what the build knows."
)
@click.option("--collection", help="Title of a collection that gets every repository; default: none.")
@click.option("--private", is_flag=True, help="Create repositories that only the namespace can read.")
@click.option("--pr", is_flag=True, help="Stage on a pull request, and merge it once it is verified.")
@click.option("--no-merge", is_flag=True, help="With --pr: leave the verified pull request open.")
@click.option("--endpoint", help="Another hub; default: huggingface.co.")
@click.option("--dry-run", is_flag=True, help="Look and say what would be uploaded; change nothing.")
@JSON
def publish(
    folder: Path, to: str, namespace: str, out: Path | None, only: tuple[str, ...], tag: str, signed: Path | None,
    base_model: str | None,
    collection: str | None, private: bool, pr: bool, no_merge: bool, endpoint: str | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Publish what passed: FOLDER is the output of `qquant build`; one repository per artifact folder.

    A repository changes in one step from what it was to the whole release, after every byte was staged, downloaded again and
    compared. The same command continues an interrupted one.
    """
    from qquant.release import card, hub, signing, statements
    from qquant.release.repository import HUB_ID, complete, read_release
    from qquant.report.escape import in_line

    if to == "dir" and out is None:
        raise UsageError("--to dir needs --out FOLDER")
    if namespace and not NAMESPACE.fullmatch(namespace):
        raise UsageError(f"--namespace {namespace!r}: a user or organisation has letters, digits and . _ - only")
    if base_model and not HUB_ID.fullmatch(base_model):
        raise UsageError(f"--base-model {base_model!r}: an id of a hub is NAMESPACE/NAME")
    if to != "dir" and not namespace:
        raise UsageError(f"--to {to} needs --namespace USER_OR_ORGANISATION")
    release = read_release(folder, only)
    for name, reason in release.refused.items():
        echo(f"not published: {in_line(name)}: {in_line(reason)}", err=True)
    repositories = [
        statements.with_statements(card.with_card(complete(repository, tag, namespace, base_model)))
        for repository in release.repositories
    ]
    _warn({what: None for repository in repositories for what in card.unknown(repository.manifest)})
    if signed:
        repositories = [signing.with_signature(repository, signed) for repository in repositories]
    request = hub.Request(
        namespace, tag, private=private, pull_request=pr, merge=not no_merge, collection=collection, dry_run=dry_run
    )
    done = hub.destination(to, out, endpoint, lambda text: echo(text, err=True)).publish(repositories, request)
    if as_json:
        echo(json.dumps({"schema": "qquant-published-1", "repositories": [vars(result) for result in done]}, indent=2))
    else:
        _tell(done)
    if done and all(result.state == "unchanged" for result in done):
        echo(f"nothing to publish: {tag} is there with these bytes, nothing was changed", err=True)
    if release.refused:
        raise PartlyPublishedError(f"published without {', '.join(release.refused)}, as said above")


def _warn(unknown: Iterable[str]) -> None:
    """Say what readers of the cards will look for in vain."""
    for what in unknown:
        echo(f"warning: the cards name no {what}", err=True)


def _tell(done: Iterable[Published]) -> None:
    for result in done:
        echo(f"{result.state}: {result.repository} {result.revision or ''} ({len(result.uploaded)} files)")


@command(
    epilog=EXITS,
    surplus="--repos {}",
    example="patch generation_config.json:top_p=0.8 --repos 'my-organisation/Qwen1.5-*' --dry-run",
)
@click.argument("setting")
@click.option("--repos", multiple=True, required=True, metavar="OWNER/PATTERN", help="Repositories, with * and ?.")
@click.option("--endpoint", help="Another hub; default: huggingface.co.")
@click.option("--dry-run", is_flag=True, help="Show the changes and make none.")
@click.option("--yes", is_flag=True, help="Make them without a question.")
@JSON
def patch(setting: str, repos: tuple[str, ...], endpoint: str | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Change one setting (FILE.json:KEY=VALUE) in all repositories of a family, one commit each.

    Every change is shown as a diff first; without --yes it is asked for.
    """
    from qquant.release import hub

    if not (dry_run or yes or sys.stdin.isatty()):
        raise UsageError("patch asks before it changes anything, and there is nobody to ask; give --yes or --dry-run")

    def show(change: hub.RepositoryChange) -> bool:
        echo(change.diff or f"{change.repository}: has it already", err=as_json)
        return not dry_run and bool(change.diff) and (yes or click.confirm(f"Change {change.repository}?", err=True))

    client = hub.HuggingFace.connect(endpoint, lambda text: echo(text, err=True))
    changes = hub.patch(client, hub.Setting.parse(setting), repos, show)
    if as_json:
        rows = [{"repository": change.repository, "diff": change.diff, "commit": change.commit} for change in changes]
        echo(json.dumps({"schema": "qquant-patched-1", "repositories": rows}, indent=2))
    made = [change for change in changes if change.commit]
    echo(f"{len(made)} of {len(changes)} repositories changed", err=True)


@command(epilog=EXITS, example="sign published/Qwen1.5-0.5B-Chat-AWQ --key private.pem")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Private key (PEM, elliptic curve); default: Sigstore.",
)
@JSON
def sign(folders: tuple[Path, ...], key: Path | None, as_json: bool) -> None:
    """Sign release FOLDERS (of `publish --to dir`): model.sig, which `model_signing verify` checks."""
    from qquant.release import signing

    signed = []
    for folder in folders:
        signed.append(str(signing.sign(folder, key)))
        echo(signed[-1], err=as_json)
    if as_json:
        echo(json.dumps({"schema": "qquant-signed-1", "signatures": signed}, indent=2))
