"""Runs the steps of a GitHub workflow on this machine: its shell lines in its order, with the expressions that it uses put in.

What `uses:` names is not run. `pip` is recorded, not run; `qquant` is this tree's. Expressions: a name with dots, fromJSON(name),
`name && 'text' || 'text'`, always(). Anything else is an error, so that a new one is noticed.
"""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

TOKEN = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
CHOICE = re.compile(r"(\S+) && '([^']*)' \|\| '([^']*)'")


def load(path):
    return YAML(typ="safe", pure=True).load(path)


def expressions(value):
    """Every expression in a piece of a workflow."""
    if isinstance(value, str):
        yield from TOKEN.findall(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions(item)


@dataclass
class Runner:
    """A machine with a checkout in `folder`; `context` is what expressions may name."""

    folder: Path
    context: dict
    log: list = field(default_factory=list)  # (line of shell, exit status, output)

    def __post_init__(self):
        tools = self.folder / ".tools"
        tools.mkdir()
        lines = {
            "qquant": f'exec "{sys.executable}" -m qquant "$@"',
            "pip": f'echo "$@" >> "{tools}/pip.log"',
        }
        for name, line in lines.items():
            (tools / name).write_text(f"#!/bin/sh\n{line}\n")
            (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
        self.path = f"{tools}:{os.environ['PATH']}"

    def value(self, expression):
        choice = CHOICE.fullmatch(expression)
        if choice:
            return choice[2] if self.value(choice[1]) else choice[3]
        if expression.startswith("fromJSON("):
            return json.loads(self.value(expression.removeprefix("fromJSON(").removesuffix(")")))
        found = self.context
        for key in expression.split("."):
            found = found[key]
        return found

    def text(self, value):
        """With its expressions put in; an expression alone keeps its type."""
        if not isinstance(value, str):
            return value
        whole = TOKEN.fullmatch(value)
        return self.value(whole[1]) if whole else TOKEN.sub(lambda match: str(self.value(match[1])), value)

    def job(self, job, environment=()):
        """Run the steps of a job; its outputs. Steps after a failed one run only `if: always()`."""
        outer = {key: str(self.text(value)) for key, value in job.get("env", {}).items()}
        failed = False
        steps = self.context.setdefault("steps", {})
        for number, step in enumerate(job["steps"]):
            if "run" not in step or (failed and step.get("if") != "always()"):
                continue
            output, summary = self.folder / f".output-{number}", self.folder / ".summary"
            output.touch()
            inner = {key: str(self.text(value)) for key, value in step.get("env", {}).items()}
            given = {"PATH": self.path, "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
            run = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=self.folder, capture_output=True, text=True,
                env=os.environ | dict(environment) | outer | inner | given, timeout=300, check=False,
            )  # fmt: skip
            self.log.append((step["run"], run.returncode, run.stdout + run.stderr))
            failed = failed or run.returncode != 0
            pairs = (line.split("=", 1) for line in output.read_text().splitlines())
            steps[step.get("id", str(number))] = {"outputs": dict(pairs)}
        self.failed = failed
        return {key: self.text(value) for key, value in job.get("outputs", {}).items()}
