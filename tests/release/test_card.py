"""Model cards: every number from report.json, every name from the manifest, and a check that finds what does not."""

import dataclasses
import errno
import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from ruamel.yaml import YAML
from safetensors import safe_open

from qquant.artifact import verification
from qquant.errors import EnvironmentMissingError, InputError
from qquant.recipe import GptqArtifact
from qquant.release import card, signing
from qquant.release.hub import Folder, Request
from qquant.release.repository import ReleaseSource, as_json, card_facts, complete, read_release
from qquant.release.statements import with_statements
from qquant.resources import data_dir
from qquant.source.checkpoint import Checkpoint
from tests.conftest import write_checkpoint
from tests.torture_release import stand_in_for_signing
from tests.worlds.hub_release import CONTENTS, GGUF, GPTQ, write_build

FACTS = {"tag": "v1", "namespace": "org", "base_model": "Qwen/Qwen1.5-Test-Chat"}
BASE_CARD = """---
license: other
license_name: tongyi-qianwen
license_link: >-
  https://huggingface.co/Qwen/Qwen1.5-Test-Chat/blob/main/LICENSE
language:
- en
- "no"
pipeline_tag: text-generation
tags: [chat]
secret: not copied
---
# Qwen
"""


def releases(build, **facts):
    return {
        repository.name: card.with_card(complete(repository, **FACTS | facts))
        for repository in read_release(build).repositories
    }


def text_of(repository):
    return repository.files["README.md"].content.decode()


def head_of(text):
    return YAML(typ="safe").load(text.split("---\n")[1])


@pytest.fixture
def build(tmp_path):
    folder = write_build(tmp_path / "build")
    (tmp_path / "README.md").write_text(BASE_CARD)
    source = {
        "schema": "qquant-source-1",
        "base_model": None,
        "revision": None,
        "card": card_facts(tmp_path / "README.md"),
    }
    (folder / "source.json").write_bytes(as_json(source | {"licence_file": {"name": "LICENSE", "text": "the terms\n"}}))
    return folder


@pytest.fixture
def written(build, tmp_path):
    """Release folders with cards."""
    Folder(tmp_path / "release").publish(list(releases(build).values()), Request("org"))
    return tmp_path / "release"


def test_head_names_the_base_and_inherits_its_licence(build):
    head = head_of(text_of(releases(build)[GPTQ]))
    results = head.pop("model-index")
    assert head == {
        "base_model": "Qwen/Qwen1.5-Test-Chat",
        "base_model_relation": "quantized",
        "quantized_by": "org",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "tongyi-qianwen",
        "license_link": "https://huggingface.co/Qwen/Qwen1.5-Test-Chat/blob/main/LICENSE",
        "language": ["en", "no"],
        "tags": ["chat", "gptq", "qquant"],
    }
    assert results[0]["results"][0]["metrics"][0]["value"] == 10.25
    assert head_of(text_of(releases(build)[GGUF]))["library_name"] == "gguf"


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ("", "the second half of each scored"),
        ("llama.cpp", "the second half of each scored"),
        ("sliding", "every token scored"),
    ],
)
def test_the_card_says_which_tokens_were_scored(build, protocol, said):
    report = json.loads((build / "report.json").read_text())
    report["conditions"]["text"] |= {"protocol": protocol} if protocol else {}
    (build / "report.json").write_text(json.dumps(report))
    for repository in releases(build).values():
        assert f"40 windows of 512 tokens, {said}, against" in text_of(repository)


def test_the_hubs_own_reader_takes_the_card(build):
    for repository in releases(build).values():
        data = ModelCard(text_of(repository)).data
        assert data.base_model == "Qwen/Qwen1.5-Test-Chat"
        assert data.language == ["en", "no"]
        assert data.eval_results[0].metric_value == 10.25


def test_commands_name_this_repository_and_its_files(build):
    for name, repository in releases(build).items():
        text = text_of(repository)
        assert set(re.findall(r"\b(?:org|Qwen)/[\w.-]*\w", text.split("---\n", 2)[2])) == {
            f"org/{name}", "Qwen/Qwen1.5-Test-Chat",
        }  # fmt: skip
        for file in re.findall(r"--hf-file (\S+)", text):
            assert file in repository.files
    gguf, gptq = text_of(releases(build)[GGUF]), text_of(releases(build)[GPTQ])
    assert f"llama-cli --hf-repo org/{GGUF} --hf-file qwen1_5-test-chat-q4_0.gguf\n" in gguf
    assert f"ollama run hf.co/org/{GGUF}:Q4_0\n" in gguf
    assert f"https://huggingface.co/org/{GGUF}" in gguf
    assert f"vllm serve org/{GPTQ}\n" in gptq
    assert f"sglang.launch_server --model-path org/{GPTQ}\n" in gptq
    assert "vllm" not in gguf
    assert "llama" not in gptq


OPTIONS = {  # that the pinned llama.cpp has, of those that pages name
    "llama-cli": {"-m", "--hf-repo", "--hf-file"},
    "llama-server": {"-m", "--hf-repo", "--hf-file"},
    "llama-gguf-split": {"--merge"},
}


def test_programs_of_llama_cpp_have_every_option_that_is_printed(build):
    root = data_dir("recipes").parent
    pages = [text_of(repository) for repository in releases(build).values()]
    pages += [
        path.read_text()
        for path in (root / "README.md", root / "recipes/GUIDE.md", root / "recipes/README.md")
        if path.is_file()
    ]
    printed = 0
    for line in "\n".join(pages).splitlines():
        program, *words = line.split("#")[0].split() or [""]
        if program in OPTIONS:
            printed += 1
            assert {word for word in words if word.startswith("-")} <= OPTIONS[program], line
    assert printed >= 4


def test_a_head_that_is_stored_once_is_told(build):
    assert "tie_word_embeddings" in text_of(releases(build)[GPTQ])
    assert "auto-gptq 0.7.1 does not tie them" in text_of(releases(build)[GPTQ])
    assert "tie_word_embeddings" not in text_of(releases(build)[GGUF])


def test_split_files_are_named_by_their_first_part(tmp_path):
    parts = [f"qwen1_5-test-chat-q8_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    files = [*parts, "Modelfile-q8_0"]
    text = text_of(releases(write_build(tmp_path / "b", contents={GGUF: {"q8_0": files}}))[GGUF])
    assert f"--hf-file {parts[0]}" in text
    assert parts[1] not in text
    assert "3 parts" in text
    assert "ollama run" not in text  # it does not read split files
    whole = "qwen1_5-test-chat-q8_0"
    assert f"llama-gguf-split --merge {parts[0]} {whole}.gguf" in text
    assert f"ollama create {whole} -f Modelfile-q8_0" in text


def test_commands_for_a_folder_that_has_the_file(tmp_path):
    files = ["qwen1_5-test-chat-q8_0.gguf", "Modelfile-q8_0"]
    lines = text_of(releases(write_build(tmp_path / "b", contents={GGUF: {"q8_0": files}}))[GGUF]).split("\n")
    for program in ("llama-cli -m", "llamafile -m", "lms import"):
        assert any(line.startswith(f"{program} {files[0]}") for line in lines)
    assert "ollama create qwen1_5-test-chat-q8_0 -f Modelfile-q8_0" in lines


def test_table_conditions_and_origin(build):
    text = text_of(releases(build)[GGUF])
    assert "| q8_0 | 50,000 | 4.50 | 10.250 | 1.0123 | 0.02130 | 95.12 % | pass |" in text
    assert "| 16-bit checkpoint |  | 16.00 | 10.125 |" in text
    assert "bundled:wikitext-2-test, 40 windows of 512 tokens" in text
    assert f"- calibration: 8 samples, 384 tokens, `{'ab' * 32}`" in text


def test_the_dataset_is_one_of_the_hub_and_numbers_have_the_digits_of_the_table(build):
    content = card.head(releases(build)[GGUF].manifest, releases(build)[GGUF].report)
    result = content["model-index"][0]["results"][0]
    assert result["dataset"] == {
        "name": "WikiText-2 raw, test", "type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test",
    }  # fmt: skip
    assert result["metrics"][0]["value"] == 10.25
    row = dataclasses.replace(releases(build)[GGUF].report.artifacts[0], perplexity=102.42953484309572)
    assert card._result(row, releases(build)[GGUF].report)["metrics"][0]["value"] == 102.43


def test_gates_and_waivers_are_on_the_card(tmp_path):
    gate = {"name": "mean KL divergence", "outcome": "fail", "value": 0.25, "low": 0.21, "high": 0.28, "limit": 0.1,
            "p_within": 1.0, "p_beyond": 0.001, "detectable": 0.02, "windows": 40}  # fmt: skip
    waived = {"outcome": "waived", "reasons": [], "gates": [gate], "waiver": "waived by me until 2099-01-01: known"}
    text = text_of(releases(write_build(tmp_path / "b", outcomes={"gptq-int4": waived}))[GPTQ])
    assert "| gptq-int4 | mean KL divergence | 0.25 | 0.21 to 0.28 | 0.1 | fail |" in text
    assert "## Known to miss a gate" in text
    assert "- **gptq-int4**: waived by me until 2099-01-01: known" in text


def test_nothing_says_where_it_was_built(build):
    for repository in releases(build).values():
        assert all(str(build).encode() not in payload.read() for payload in repository.files.values())


def test_a_fresh_card_has_no_problems(written):
    for folder in written.iterdir():
        assert card.problems(folder) == []


CHANGES = {
    "a measurement": ("10.250", "10.150", r"is '\| q8_0 .*10\.150.* give '\| q8_0 .*10\.250"),
    "a percentage": ("95.12 %", "98.12 %", r"98\.12 %"),
    "a file name": ("test-chat-q8_0.gguf", "test-chat-q9_0.gguf", r"q9_0\.gguf"),
    "a repository": (f"hf.co/org/{GGUF}:Q8_0", f"hf.co/org/{GPTQ}:Q8_0", "GPTQ-Int4:Q8_0"),
    "the model index": ("value: 10.25", "value: 9.25", r"model-index is .*9\.25"),
    "the relation": ("base_model_relation: quantized", "base_model_relation: finetune", "base_model_relation is"),
    "the licence": ("license_name: tongyi-qianwen", "license_name: mit", "license_name is"),
    "a mark": ("<!-- qquant: end -->", "", "marks around the generated part"),
    "the head": ("---\nbase_model:", "---\n: [", "head is not valid YAML"),
    "added numbers": ("<!-- qquant: end -->", "<!-- qquant: end -->\n\nMMLU is 71.3 here.", r"71\.3 in the added text"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found(written, change):
    old, new, message = CHANGES[change]
    path = written / GGUF / "README.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found = card.problems(written / GGUF)
    assert found
    assert re.search(message, "\n".join(found)), found


def test_a_changed_report_is_found(written):
    path = written / GGUF / "report.json"
    report = json.loads(path.read_text())
    report["artifacts"][0]["kl_divergence"] = 0.5
    path.write_text(json.dumps(report))
    assert re.search(r"README\.md:\d+: is .*0\.02130.* give .*0\.50000", "\n".join(card.problems(written / GGUF)))


def test_text_may_be_added(written):
    path = written / GGUF / "README.md"
    path.write_text(
        path.read_text().replace("---\nbase", "---\nnew_version: org/x\nbase")
        + "\nPerplexity is 10.250; see 3 notes.\n"
    )
    assert card.problems(written / GGUF) == []


def test_a_build_folder_has_no_card_yet(build):
    with pytest.raises(InputError, match=r"README\.md: not found"):
        card.problems(build / GPTQ)


def verify(*arguments):
    command = [sys.executable, "-m", "qquant.cli", "verify", "--bytes", *map(str, arguments)]  # no real weights
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_what_publish_adds_is_no_strange_file(written):
    assert verification.unlisted(written / GPTQ) == ()
    (written / GPTQ / "notes.txt").write_text("mine")
    assert verification.unlisted(written / GPTQ) == ("notes.txt",)


def test_the_command_checks_files_and_card(written):
    done = verify("--card", written / GPTQ)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    readme = written / GPTQ / "README.md"
    readme.write_text(readme.read_text().replace("10.250", "9.250"))
    done = verify("--card", written / GPTQ)
    assert done.returncode == 5
    assert "9.250" in done.stderr
    weights = written / GPTQ / "model-00001-of-00002.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    done = verify(written / GPTQ)
    assert done.returncode == 5
    assert "model-00001-of-00002.safetensors: does not match" in done.stderr


def test_source_facts_of_a_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path / "Qwen1.5-Test-Chat")
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE").write_text("the terms\n")
    facts = json.loads(ReleaseSource.of(Checkpoint.open(folder), {"gptq": {"vllm": [1]}}).to_json())
    assert facts["tensor_parallel"] == {"gptq": {"vllm": [1], "sglang": [], "without_padding": []}}
    assert facts["card"]["license_name"] == "tongyi-qianwen"
    assert "secret" not in facts["card"]
    assert facts["licence_file"] == {"name": "LICENSE", "text": "the terms\n"}
    assert facts["base_model"] is None  # a local folder is no hub id


def test_the_servers_are_given_the_sizes_they_accept(build):
    (name,) = CONTENTS[GPTQ]
    source = json.loads((build / "source.json").read_text())
    source["tensor_parallel"] = {name: {"vllm": [1, 2, 4], "sglang": [1, 2], "without_padding": [1]}}
    (build / "source.json").write_bytes(as_json(source))
    found = releases(build)
    assert "(tensor-parallel sizes that fit this shape: vLLM 1, 2, 4; SGLang 1, 2)" in text_of(found[GPTQ])
    assert "tensor-parallel" not in text_of(found[GGUF])


def test_fallback_types_are_named(build):
    report = json.loads((build / "report.json").read_text())
    (row,) = [row for row in report["artifacts"] if row["name"] == "q4_0"]
    row["fallbacks"] = ["blk.0.ffn_down.weight: q6_k -> q8_0", "blk.1.ffn_down.weight: q4_k -> q5_0"]
    (build / "report.json").write_text(json.dumps(report))
    expected = "\nq4_0: 2 tensors could not have the type of the mix, e.g. blk.0.ffn_down.weight: q6_k -> q8_0.\n"
    assert expected in text_of(releases(build)[GGUF])


@pytest.mark.parametrize(
    "text", ["", "no head", "---\n[1, 2\n---\n", "---\n- a list\n---\n", "x\n---\nlicense: mit\n---\n"]
)
def test_cards_without_a_head_say_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card_facts(tmp_path / "README.md") == {}


@pytest.mark.parametrize("value", ["no", "1.5", "a: b", "- x", "ünï", "plain-word", "multi\nline", "#", ""])
def test_yaml_keeps_every_text(value):
    content = {"a": value, "b": [value, {"c": value, "d": [1.5, None, True]}], "e": {"f": value}}
    assert YAML(typ="safe").load(card.yaml(content)) == content


def test_contents_cover_both_kinds():
    assert set(CONTENTS) == {GPTQ, GGUF}


def test_the_statement_covers_every_other_file(build):
    for repository in releases(build).values():
        stated = with_statements(repository)
        statement = json.loads(stated.files["qquant-provenance.json"].content)
        subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
        assert subjects == {n: p.sha256 for n, p in stated.files.items() if n != "qquant-provenance.json"}
        assert statement["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"] == {"sha256": "c0ffee"}
        assert with_statements(repository).digest == stated.digest  # no times: the same build is the same release


def test_the_bill_names_model_data_and_numbers(build):
    bill = json.loads(with_statements(releases(build)[GGUF]).files["qquant-bom.cdx.json"].content)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    model = bill["metadata"]["component"]
    assert model["licenses"] == [{"license": {"name": "tongyi-qianwen"}}]
    assert {file["name"] for file in model["components"]} >= {"qwen1_5-test-chat-q8_0.gguf", "README.md", "LICENSE"}
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "perplexity", "value": "10.25", "slice": "q8_0"} in metrics
    assert [c["name"] for c in bill["components"]] == ["Qwen/Qwen1.5-Test-Chat"]
    references = {model["bom-ref"], *(c["bom-ref"] for c in bill["components"])}
    assert {d["ref"] for d in bill["dependencies"]} | {
        r for d in bill["dependencies"] for r in d["dependsOn"]
    } == references


def test_a_tokenizer_that_transformers_reads_otherwise_is_on_the_card_of_a_folder(build):
    path = build / "report.json"
    content = json.loads(path.read_text())
    assert not any("AutoTokenizer reads" in text_of(repository) for repository in releases(build).values())
    read = {"tokens": 100, "differing": {"books-en": 7}, "example": "['a'] in the file, ['b'] there"}
    path.write_text(json.dumps(content | {"conditions": content["conditions"] | {"tokenizer": read}}))
    cards = {name: " ".join(text_of(repository).split()) for name, repository in releases(build).items()}
    assert "Mind the tokenizer: transformers' AutoTokenizer reads at least 7 of 100 tokens otherwise" in cards[GPTQ]
    assert "AutoTokenizer reads" not in cards[GGUF]


def test_signing_needs_its_extra(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(EnvironmentMissingError, match=r"pip install 'qquant\[sign\]'"):
        signing.sign(written / GPTQ)


def test_half_a_signature_is_never_in_a_folder(written, monkeypatch, tmp_path):
    """A disk that is full while the library writes; then another that is not."""
    library, folder = stand_in_for_signing(), written / GPTQ
    monkeypatch.setitem(sys.modules, "model_signing", library)
    before = sorted(path.name for path in folder.iterdir())

    def full(self, model, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(library.signing.Config, "sign", full)
        with pytest.raises(EnvironmentMissingError, match="No space left"):
            signing.sign(folder, tmp_path / "key.pem")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert len(signing.sign(folder, tmp_path / "key.pem").read_bytes()) == 25_000
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "model.sig"])


def test_a_signed_folder_is_verified_by_the_reference_package(written, tmp_path):
    model_signing = pytest.importorskip("model_signing", reason="the extra `sign`")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    key.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    folder = written / GPTQ
    signature = signing.sign(folder, key)

    def check():
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
        hashing = model_signing.hashing.Config().set_ignored_paths(paths=[signature])
        config.set_hashing_config(hashing).verify(folder, signature)

    check()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="mismatch|hash"):
        check()


def test_a_card_begins_with_what_its_reader_asks(build):
    """Not whether one may publish it, which somebody decided."""
    text = text_of(releases(build)[GGUF])
    assert "Publish?" not in text
    lines = text.split("\n")
    first = lines.index("- **Checked** measured, without limits.")
    assert lines[first + 1].startswith("- **Smallest** ")
    assert first < lines.index("## How to run it")


def test_what_a_card_cannot_say_is_told_to_the_publisher(build):
    manifest = releases(build)[GGUF].manifest
    bare = dataclasses.replace(manifest, release=dataclasses.replace(manifest.release, base_model=None, card={}))
    assert [what.partition(" (")[0] for what in card.unknown(bare)] == ["base model", "licence"]
    full = dataclasses.replace(manifest.release, base_model="a/b", card={"license": "mit"})
    assert card.unknown(dataclasses.replace(manifest, release=full)) == []


def test_a_tied_head_is_stored_once(built):
    """So says its config, and so say recipe and card: auto-gptq 0.7.1, which ties nothing, would read a head of zeros."""
    folder = next(built[1].glob("*-Int4"))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {"model.embed_tokens.weight", "lm_head.weight"} & {*file.keys()} == {"model.embed_tokens.weight"}
    assert "auto-gptq 0.7.1 reads zeros" in GptqArtifact.__doc__
