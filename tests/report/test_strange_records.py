"""Records of strangers: a wrong field anywhere is one InputError, or is read; nothing else is ever raised."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qquant.artifact import verification
from qquant.artifact.manifest import Manifest, verify_files
from qquant.checks import evidence, regression
from qquant.cli.tables import table_of
from qquant.errors import InputError, QQuantError
from qquant.release import card
from qquant.release.hub import Folder, Request
from qquant.release.repository import complete, read_release
from qquant.release.statements import with_statements
from qquant.report import ci, html
from qquant.report.record import Report
from tests.report.test_report import everything
from tests.worlds.hub_release import GPTQ, write_build
from tests.worlds.mutations import mutations

STRIDE = int(os.environ.get("QQUANT_MUTATIONS", "41"))  # 1: all of them, minutes


def survives(read, content, stride, *accepted):
    """How often `read` refused; it raises nothing else."""
    refused = count = 0
    for path, strange, changed in mutations(content, stride):
        count += 1
        try:
            read(changed)
        except (InputError, *accepted):
            refused += 1
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))} = {str(strange)[:40]!r}: {error!r}") from error
    assert count > 50
    return refused


def views(content):
    report = Report.from_json(content)
    (
        html.render(report),
        report.to_markdown(),
        ci.junit(report),
        ci.github(report),
        ci.commands(report),
        report.to_json(),
    )
    table_of(report, 100), report._repr_html_()


def test_every_field_of_a_report():
    content = json.loads(everything().to_json())
    views(content)
    assert survives(views, content, STRIDE) > 50


@pytest.fixture
def build(tmp_path):
    folder = write_build(tmp_path / "build", size=40)
    return folder


def release_of(folder):
    for repository in read_release(folder).repositories:
        with_statements(card.with_card(complete(repository, "v1", "org")))


@pytest.mark.parametrize("name", ["report.json", "source.json", f"{GPTQ}/qquant-manifest.json"])
def test_every_field_of_what_publish_reads(build, name):
    path = build / name
    content = json.loads(path.read_text())

    def read(changed):
        path.write_text(json.dumps(changed))
        release_of(build)

    survives(read, content, max(1, STRIDE // 8), QQuantError)


@pytest.mark.parametrize("name", ["report.json", "qquant-manifest.json"])
def test_every_field_of_what_verify_reads(build, tmp_path, name):
    repositories = [card.with_card(complete(one, "v1", "org")) for one in read_release(build).repositories]
    Folder(tmp_path / "release").publish(repositories, Request("org"))
    path = tmp_path / "release" / GPTQ / name
    content = json.loads(path.read_text())

    def read(changed):
        path.write_text(json.dumps(changed))
        verify_files(path.parent)
        card.problems(path.parent)
        verification.unlisted(path.parent)

    survives(read, content, max(1, STRIDE // 8), QQuantError)


def test_a_refusal_says_where_and_what():
    entry = {"key": "0", "format": "gptq", "files": {}, "layers": [{"name": "w", "error": "x"}]}
    with pytest.raises(InputError, match=r"m: artifacts\.a\.layers\.0\.linear\.error: .*, got x"):
        Manifest.from_json({"schema": "qquant-manifest-1", "artifacts": {"a": entry}}, "m")


@pytest.mark.parametrize("wrong", ["1", True, 1.5, -1, 1 << 63, None, [1]])
def test_a_count_is_a_count_and_nothing_is_converted(wrong):
    files = {"a": {"bytes": wrong, "sha256": "0" * 64}}
    entry = {"key": "0", "format": "gptq", "files": files}
    with pytest.raises(InputError, match=r"m: artifacts\.a\.files\.a\.bytes: "):
        Manifest.from_json({"schema": "qquant-manifest-1", "artifacts": {"a": entry}}, "m")


def test_values_are_cut_before_they_are_said():
    facts = evidence.Facts("t", "a", 9, "sliding", "b", "c")
    with pytest.raises(InputError, match=r"measured with tokens_sha256 'xxx.*x, not 'b'") as caught:
        evidence.require_comparable(facts, replace(facts, name="y" * 5000, tokens_sha256="x" * 5000), "before")
    assert len(str(caught.value)) < 1000


def test_every_field_of_evidence(build):
    facts = evidence.Facts("t", "a", 9, "sliding", "b", "c")
    arrays = {
        "nll": np.zeros((4, 8), np.int8), "kl": np.zeros((4, 8), np.uint8), "top1": np.zeros((4, 1), np.uint8), "means": np.ones((3, 4)),
    }  # fmt: skip
    head = {"schema": evidence.SCHEMA, "tokens": 8, "facts": vars(facts)}
    names = [row["name"] for row in json.loads((build / "report.json").read_text())["artifacts"]]
    (build / "evidence").mkdir()
    paths = [build / "evidence" / f"{name}.safetensors" for name in names]
    for path in paths:
        save_file(arrays, path, {"evidence": json.dumps(head)})
    assert {change.outcome for change in regression.compare(build, build)} == {"equal"}

    def read(changed):
        save_file(arrays, paths[0], {"evidence": json.dumps(changed)})
        regression.compare(build, build)

    survives(read, head, 1)
    save_file(load_file(paths[1]), paths[0], {"evidence": json.dumps(head)})
    for name, array in arrays.items():
        for other in (
            array[:1],
            array.astype(np.float32),
            array.reshape(-1),
            np.zeros((0, 0)),
            np.full(array.shape, np.nan),
        ):
            save_file({**arrays, name: np.ascontiguousarray(other)}, paths[0], {"evidence": json.dumps(head)})
            try:
                regression.compare(build, build)
            except InputError:
                continue
            assert (name, bool(np.isnan(other).all())) == ("means", True), "only numbers that are not finite are read"
