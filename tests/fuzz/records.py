"""Mutations of our own records, which are files of strangers too: targets of `tests.fuzz.strangers`, by structure and as text.

    report      every view of it: page, Markdown, JUnit, workflow commands, table          journal     of a draft: what is continued
    manifest, source            what `publish` reads                                       evidence    head and arrays: `compare`
    published                   report and manifest of a release folder: what `verify` and a card read

Besides what counts for all targets, none of this may happen: a page, a summary or a workflow that is steered by a text; a release of files
whose bytes are not those that were judged; a unit of a journal that is not the one that was written.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from safetensors.numpy import save_file

from qquant.artifact import verification
from qquant.artifact.draft import Draft
from qquant.artifact.journal import Journal, JournalUnit
from qquant.artifact.manifest import read_report, verify_files
from qquant.checks import evidence, regression
from qquant.cli.tables import table_of
from qquant.formats.planned import PlannedArtifact, small_file
from qquant.recipe import GgufArtifact
from qquant.release import card
from qquant.release.hub import Folder, Request
from qquant.release.repository import complete, read_release
from qquant.release.statements import with_statements
from qquant.report import ci, html
from qquant.report.solved import LinearRecord
from tests.fuzz.strangers import mutated_json, mutated_text
from tests.report.test_escape import HOSTILE
from tests.report.test_report import everything
from tests.worlds.hub_release import GPTQ, write_build
from tests.worlds.mutations import STRANGE

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202e]")


def mutated(draw: random.Random, content: Any) -> bytes:
    """A record with one to three fields changed, or its text."""
    if draw.random() < 0.15:
        return mutated_text(draw, json.dumps(content)).encode("utf-8", "surrogatepass")
    for _ in range(draw.choice([1, 1, 2, 3])):
        content = mutated_json(draw, content) if draw.random() < 0.5 else strange(draw, content)
    return json.dumps(content).encode()


def strange(draw: random.Random, value: Any) -> Any:
    """A JSON value with one place, at any depth, replaced by something that should not be there."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, result = draw.choice(keys), value.copy()
        result[key] = strange(draw, value[key])
        return result
    alike = [other for other in (*STRANGE[1:], *HOSTILE, 0.5, 2.0, 10**6) if type(other) is type(value)]
    return draw.choice(alike if alike and draw.random() < 0.7 else STRANGE[1:])


class Records:
    """A build's output folder, a release of it, evidence and a journal, to be mutated one file at a time."""

    def __init__(self, place: Path) -> None:
        self.build = write_build(place / "build", size=40)
        self.report_content = json.loads(everything().to_json())
        repositories = [card.with_card(complete(one, "v1", "org")) for one in read_release(self.build).repositories]
        Folder(place / "release").publish(repositories, Request("org"))
        self.release = place / "release" / GPTQ
        self.bytes = {path.name: path.read_bytes() for path in (self.build / GPTQ).iterdir()}
        self._write_evidence()
        spec = GgufArtifact(name="a", format="gguf", type="q4_0")
        self.plan = PlannedArtifact("a", spec, "folder", (small_file("x.json", {}),), 1, {})
        self.partial = place / "partial"
        self.units = [
            JournalUnit(f"block {n}", {}, (LinearRecord(f"w{n}", 0.5 + n),), {"solve": 1.5}) for n in range(3)
        ]
        draft = Draft(self.plan, self.partial, "key")
        draft.open()
        for unit in self.units:
            draft.journalled(unit)
        self.journal_bytes = draft.journal.read_bytes()

    def _write_evidence(self) -> None:
        facts = evidence.Facts("t", "a", 9, "sliding", "b", "c")
        self.arrays = {
            "nll": np.zeros((4, 8), np.int8), "kl": np.zeros((4, 8), np.uint8), "top1": np.zeros((4, 1), np.uint8), "means": np.ones((3, 4)),
        }  # fmt: skip
        self.head = {"schema": evidence.SCHEMA, "tokens": 8, "facts": vars(facts)}
        (self.build / "evidence").mkdir()
        names = [row["name"] for row in json.loads((self.build / "report.json").read_text())["artifacts"]]
        self.evidence_paths = [self.build / "evidence" / f"{name}.safetensors" for name in names]
        for path in self.evidence_paths:
            save_file(self.arrays, path, {"evidence": json.dumps(self.head)})

    def targets(self) -> dict[str, Callable[[random.Random], None]]:
        """By name: try one input."""
        return {
            "report": self.report, "manifest": self.manifest, "source": self.source, "published": self.published,
            "evidence": self.evidence, "journal": self.journal,
        }  # fmt: skip

    def report(self, draw: random.Random) -> None:
        """report.json, in every view."""
        path = self.build / "views.json"
        path.write_bytes(mutated(draw, self.report_content))
        read = read_report(path)
        junit = ci.junit(read)
        ElementTree.fromstring(junit.encode("utf-8", "surrogatepass"))
        page, markdown, commands = html.render(read), read.to_markdown() + ci.github(read), ci.commands(read)
        table_of(read, 100), read._repr_html_(), read.to_json()
        assert not STEERING.search(page + markdown + commands), "a character that steers"
        assert "<script>alert" not in page, "a tag of a stranger in the page"
        assert "<" not in markdown, "a tag in a summary"
        assert all(line.startswith("::") for line in commands.splitlines()), "a line that is no command"

    def manifest(self, draw: random.Random) -> None:
        """A manifest in the output folder of a build."""
        self._published_by(self.build / GPTQ / "qquant-manifest.json", draw)

    def source(self, draw: random.Random) -> None:
        """source.json."""
        self._published_by(self.build / "source.json", draw)

    def _published_by(self, path: Path, draw: random.Random) -> None:
        kept = path.read_bytes()
        try:
            path.write_bytes(mutated(draw, json.loads(kept)))
            released = [
                with_statements(card.with_card(complete(one, "v1", "org")))
                for one in read_release(self.build).repositories
            ]
        finally:
            path.write_bytes(kept)
        for repository in released:
            if repository.name == GPTQ:
                weights = {name for name in self.bytes if name.endswith((".safetensors", "config.json"))}
                assert weights <= repository.files.keys(), "a release without a file that was judged"
                for name in weights:
                    assert repository.files[name].read() == self.bytes[name], "a release of other bytes"

    def published(self, draw: random.Random) -> None:
        """Report or manifest of a release folder."""
        path = self.release / draw.choice(["report.json", "qquant-manifest.json"])
        kept = path.read_bytes()
        try:
            path.write_bytes(mutated(draw, json.loads(kept)))
            verify_files(self.release)
            card.problems(self.release)
            verification.unlisted(self.release)
        finally:
            path.write_bytes(kept)

    def evidence(self, draw: random.Random) -> None:
        """Evidence of one artifact: its head, or an array of another shape or kind."""
        arrays, head = dict(self.arrays), json.dumps(self.head).encode()
        if draw.random() < 0.7:
            head = mutated(draw, self.head)
        else:
            name = draw.choice(list(arrays))
            shape = draw.choice([(4, 8), (1, 8), (8,), (0, 0), (4, 8, 1), (3, 4), (4, 1), (4, 9)])
            kind = draw.choice([np.int8, np.uint8, np.float32, np.float64, np.int64])
            arrays[name] = np.full(shape, draw.choice([0, 1, 127, -1 if kind != np.uint8 else 1])).astype(kind)
        path = self.evidence_paths[0]
        save_file(arrays, path, {"evidence": head.decode("utf-8", "replace")})
        try:
            regression.compare(self.build, self.build)
        finally:
            save_file(self.arrays, path, {"evidence": json.dumps(self.head)})

    def journal(self, draw: random.Random) -> None:
        """The journal of a draft: a line changed as data, or any byte."""
        data = bytearray(self.journal_bytes)
        if draw.random() < 0.5:
            lines = self.journal_bytes.split(b"\n")
            number = draw.randrange(len(lines) - 1)
            lines[number] = mutated(draw, json.loads(lines[number]))
            data = bytearray(b"\n".join(lines))
        else:
            for _ in range(draw.choice([1, 1, 3])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        again = Draft(self.plan, self.partial, "key")
        again.journal.write_bytes(bytes(data))
        again.open()
        written = {unit.unit: unit for unit in self.units}
        assert all(written.get(name) == unit for name, unit in again.units.items()), "a unit that nobody wrote"
        head, units, whole = Journal(again.journal).read()
        assert head is not None, "a journal that cannot be continued"
        assert whole, "a journal that was not put right"
        assert units == list(again.units.values()), "a journal that says another thing"
