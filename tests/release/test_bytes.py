"""A verdict belongs to bytes: no other bytes are published, shown on a card or compared under it; what still holds is not measured again."""

import json

import pytest

from qquant import pipeline
from qquant.artifact.manifest import manifest_of, verify_files
from qquant.artifact.verification import verify
from qquant.checks import evidence
from qquant.errors import GateFailedError, InputError
from qquant.plan.plan import Plan
from qquant.release import card
from qquant.release.hub import Folder, Request
from qquant.release.repository import complete, read_release
from qquant.release.statements import with_statements
from qquant.source.checkpoint import Checkpoint
from tests.source.test_checkpoint import low_rank, write_adapter
from tests.worlds.builds import ARTIFACTS, CPU, HEAD, load_recipe, quiet
from tests.worlds.hub_release import GGUF, GPTQ, write_build

NAMED = {"gptq": "{name: a, format: gptq, bits: 4, group_size: 32, gates: {defaults: false}}", "gguf": "{name: a, format: gguf, type: q4_0, gates: {defaults: false}}"}  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Names of the artifacts that were measured, in the order of the reviews."""
    measured, review = [], pipeline.review

    def counting(checkpoint, candidates, *given):
        measured.append([candidate.name for candidate in candidates])
        return review(checkpoint, candidates, *given)

    monkeypatch.setattr(pipeline, "review", counting)
    return measured


def test_another_artifact_of_a_judged_name_is_not_published(make_checkpoint, build, monkeypatch, tmp_path):
    """Recipe A, then recipe B with the same name, killed before its check: B's bytes have no verdict, A's keep theirs."""
    folder = make_checkpoint()
    monkeypatch.setitem(ARTIFACTS, "a", NAMED["gptq"])
    build(folder, "a")
    monkeypatch.setitem(ARTIFACTS, "a", NAMED["gguf"])
    monkeypatch.setattr(pipeline, "review", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(folder, "a")
    found = read_release(tmp_path / "out")
    assert [repository.name for repository in found.repositories] == ["model-GPTQ-Int4"]
    assert "judged other bytes" in found.refused["a"]


def test_the_release_record_is_there_before_an_artifact_is(make_checkpoint, build, monkeypatch, tmp_path):
    def dying(place):
        if place == "after a folder got its name":
            raise KeyboardInterrupt

    monkeypatch.setattr("qquant.artifact.draft.crash_point", dying)
    with pytest.raises(KeyboardInterrupt):
        build(make_checkpoint(), "gptq-int4")
    assert (tmp_path / "out" / "model-GPTQ-Int4").is_dir()
    assert (tmp_path / "out" / "source.json").is_file()


def test_nothing_is_published_without_the_release_record(tmp_path):
    folder = write_build(tmp_path / "build")
    (folder / "source.json").unlink()
    with pytest.raises(InputError, match=r"source\.json: not found"):
        read_release(folder)


def test_a_release_record_names_a_base_model_as_hubs_do(tmp_path):
    folder = write_build(tmp_path / "build")
    content = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps(content | {"base_model": "a/b\u202e"}))
    with pytest.raises(InputError, match=r"source\.json: base_model: .* is not an id of a hub"):
        read_release(folder)


def test_what_still_holds_is_not_measured_again(make_checkpoint, build, counted, tmp_path):
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int4", "gguf-q4_0")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    build(folder, "gptq-int4", "gguf-q4_0")
    assert counted == [["gptq-int4", "gguf-q4_0"]]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    build(folder, "gptq-int4", "gguf-q4_0", "gguf-q8_0")
    assert counted[1:] == [["gguf-q8_0"]]


@pytest.mark.parametrize("change", ["windows", "gates", "bytes", "evidence"])
def test_another_question_is_asked_again(make_checkpoint, build, counted, monkeypatch, change):
    folder = make_checkpoint()
    _, out = build(folder, "gptq-int4")
    text = HEAD
    if change == "windows":
        text = HEAD.replace("windows: 3", "windows: 4")
    elif change == "gates":
        monkeypatch.setitem(
            ARTIFACTS,
            "gptq-int4",
            ARTIFACTS["gptq-int4"].replace("defaults: false", "defaults: false, kl_divergence: 9"),
        )
    elif change == "bytes":
        report = json.loads((out / "report.json").read_text())
        report["artifacts"][0]["sha256"] = "0" * 64
        (out / "report.json").write_text(json.dumps(report))
    else:
        (out / evidence.FOLDER / "gptq-int4.safetensors").unlink()
    build(folder, "gptq-int4", text=text)
    assert counted == [["gptq-int4"]] * 2


def test_artifacts_that_are_left_alone_keep_their_verdicts(make_checkpoint, build, counted, tmp_path):
    folder = make_checkpoint()
    whole, out = build(folder, "gptq-int4", "gguf-q4_0")
    loaded, checkpoint = load_recipe(tmp_path, ["gptq-int4", "gguf-q4_0"]), Checkpoint.open(folder)
    again = pipeline.build(loaded, checkpoint, Plan.of(loaded, checkpoint, ["gguf-q4_0"]), out, CPU, quiet)
    assert {row.name for row in again.artifacts} == {"gptq-int4", "gguf-q4_0"}
    assert set(again.warnings) == set(whole.warnings)
    assert len(read_release(out).repositories) == 2
    other = load_recipe(tmp_path, ["gptq-int4", "gguf-q4_0"], HEAD.replace("windows: 3", "windows: 4"))
    changed = pipeline.build(other, checkpoint, Plan.of(other, checkpoint, ["gguf-q4_0"]), out, CPU, quiet)
    assert [row.name for row in changed.artifacts] == ["gguf-q4_0"]
    assert any("gptq-int4: was judged under other conditions" in warning for warning in changed.warnings)


def test_a_merged_adapter_is_named_wherever_the_origin_is(make_checkpoint, build, tmp_path):
    folder = make_checkpoint()
    adapter = write_adapter(tmp_path / "my-lora", low_rank(), base_model_name_or_path="/home/me/Qwen1.5-0.5B-Chat")
    base = Checkpoint.open(folder)
    report, out = build(folder, "gptq-int4", adapter=adapter)
    entry = manifest_of(out / "model-GPTQ-Int4").artifacts["gptq-int4"]
    assert (entry.adapter.name, entry.adapter.base) == ("my-lora", "Qwen1.5-0.5B-Chat")
    assert entry.inputs["base"] == base.content_hash() != entry.inputs["checkpoint"]
    assert report.conditions.inputs["adapter"] == entry.adapter.sha256
    (repository,) = read_release(out).repositories
    stated = with_statements(card.with_card(complete(repository, "v1", "org", "Qwen/Qwen1.5-0.5B-Chat")))
    assert (
        f"`my-lora`, trained on `Qwen1.5-0.5B-Chat`, sha256 `{entry.adapter.sha256}`"
        in stated.files["README.md"].content.decode()
    )
    statement = json.loads(stated.files["qquant-provenance.json"].content)
    materials = {
        one["name"]: one["digest"]["sha256"]
        for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert materials["Qwen/Qwen1.5-0.5B-Chat"] == base.content_hash()
    assert materials["LoRA adapter my-lora"] == entry.adapter.sha256
    bill = json.loads(stated.files["qquant-bom.cdx.json"].content)
    assert entry.adapter.sha256 in json.dumps(bill["components"])


@pytest.mark.parametrize("missing", [False, True])
def test_a_row_of_other_bytes_is_refused_by_publish(tmp_path, missing):
    folder = write_build(tmp_path / "build")
    report = json.loads((folder / "report.json").read_text())
    for row in report["artifacts"]:
        if row["name"] == "q4_0":
            row["sha256"] = "" if missing else "0" * 64
    (folder / "report.json").write_text(json.dumps(report))
    found = read_release(folder)
    assert set(found.refused) == {"q4_0"}
    assert "same `qquant build` again" in found.refused["q4_0"]


def test_a_row_of_other_bytes_is_refused_by_card_verify_and_compare(tmp_path):
    folder = write_build(tmp_path / "build")
    repositories = [card.with_card(complete(one, "v1", "org")) for one in read_release(folder).repositories]
    Folder(tmp_path / "release").publish(repositories, Request("org"))
    place = tmp_path / "release" / GPTQ
    assert card.problems(place) == []
    report = json.loads((place / "report.json").read_text())
    report["artifacts"][0]["sha256"] = "0" * 64
    (place / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="judged other bytes"):
        card.problems(place)
    with pytest.raises(InputError, match="judged other bytes"):
        evidence.of_report(place)
    with pytest.raises(InputError, match="judged other bytes"):
        verify(place)


ELSEWISE = {
    "recipe": {"name": "another", "artifacts": []},
    "inputs": {"checkpoint": "c0ffee", "qquant": "0.2.0"},
    "layers": [{"name": "w", "error": 0.5}],
    "key": "1",
    "adapter": {"name": "my-lora", "sha256": "ab" * 32},
}


@pytest.mark.parametrize("field", ELSEWISE)
def test_a_manifest_that_tells_another_making_is_refused(tmp_path, field):
    """What stands in card and provenance is what was there when the artifact was judged."""
    folder = write_build(tmp_path / "build")
    path = folder / GGUF / "qquant-manifest.json"
    content = json.loads(path.read_text())
    content["artifacts"]["q8_0"][field] = ELSEWISE[field]
    path.write_text(json.dumps(content))
    found = read_release(folder)
    assert set(found.refused) == {"q8_0"}
    assert "says another thing of its making" in found.refused["q8_0"]
    with pytest.raises(InputError, match="q8_0: .* says another thing of its making"):
        evidence.of_report(folder)


@pytest.mark.parametrize("gone", ["entry", "entries", "folder"])
def test_an_artifact_that_was_judged_and_is_not_there_is_told(tmp_path, gone):
    folder = write_build(tmp_path / "build")
    path = folder / GGUF / "qquant-manifest.json"
    content = json.loads(path.read_text())
    del content["artifacts"]["q8_0"]
    if gone != "entry":
        content["artifacts"] = {}
    path.write_text(json.dumps(content))
    if gone == "folder":
        path.unlink()
    found = read_release(folder)
    assert set(found.refused) == ({"q8_0"} if gone == "entry" else {"q8_0", "q4_0"})
    assert "in no manifest" in found.refused["q8_0"]
    assert not read_release(folder, only=["gptq-int4"]).refused


def test_a_build_says_what_it_judged(make_checkpoint, build):
    _, out = build(make_checkpoint(), "gptq-int4")
    path = out / "model-GPTQ-Int4" / "qquant-manifest.json"
    content = json.loads(path.read_text())
    content["artifacts"]["gptq-int4"]["layers"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="says another thing of its making"):
        evidence.of_report(out)
    with pytest.raises(GateFailedError, match="says another thing of its making"):
        read_release(out)


@pytest.mark.parametrize("name", ["qquant-manifest.json", "report.json", "qquant-bom.cdx.json"])
def test_a_file_that_is_not_what_the_provenance_vouches_for_is_refused(tmp_path, name):
    folder = write_build(tmp_path / "build")
    repositories = [
        with_statements(card.with_card(complete(one, "v1", "org"))) for one in read_release(folder).repositories
    ]
    Folder(tmp_path / "release").publish(repositories, Request("org"))
    place = tmp_path / "release" / GPTQ
    verify_files(place)
    with (place / "README.md").open("a") as file:
        file.write("Text of ours.\n")  # which `verify --card` looks at
    verify_files(place)
    content = json.loads((place / name).read_text())
    (place / name).write_text(json.dumps(content))  # the same, written otherwise
    with pytest.raises(InputError, match=f"{name}: is not the file that qquant-provenance.json vouches for"):
        verify_files(place)
