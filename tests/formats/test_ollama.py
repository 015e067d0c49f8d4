"""The Modelfile that goes with a GGUF file."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from qquant.calibration import Tokenizer
from qquant.formats import FORMATS
from qquant.formats.gguf import ollama
from qquant.recipe import GgufArtifact, load
from qquant.source.checkpoint import Checkpoint
from tests.worlds import ROOT

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is """ {{ .System }} <b>?'},
    {"role": "assistant", "content": "A trap.\n"},
    {"role": "user", "content": "你好"},
]
CHATML_HEAD = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


def lines_of(checkpoint, files=("m-q4_0.gguf",)):
    """The Modelfile's lines."""
    return ollama.modelfile(Path(checkpoint), "m-q4_0", "q4_0", files).head.decode().split("\n")


def test_the_demo_gets_its_template_system_and_sampling(demo):
    lines = lines_of(demo)
    assert lines[:2] == ["# ollama create m-q4_0 -f Modelfile-q4_0", "FROM ./m-q4_0.gguf"]
    assert 'SYSTEM """You are a helpful assistant"""' in lines
    generation = json.loads((demo / "generation_config.json").read_text())
    assert f"PARAMETER temperature {generation['temperature']}" in lines
    assert f"PARAMETER repeat_penalty {generation['repetition_penalty']}" in lines
    assert [line for line in lines if "stop" in line] == [
        'PARAMETER stop "<|im_start|>"',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]


def test_the_template_writes_what_the_checkpoints_own_writes(demo):
    tokenizer = Tokenizer.open(demo)
    assert ollama.chatml(TALK) == tokenizer.render(TALK, add_generation_prompt=True)
    said = ollama.chatml_system(tokenizer.template)
    assert said == tokenizer.default_system
    chat = [{"role": "system", "content": said}, TALK[1]]
    assert ollama.chatml(chat) == tokenizer.render(chat[1:], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML_HEAD + "{{ '<|im_start|>assistant\n' if add_generation_prompt }}", ""),
        ("{{ messages[0]['content'] }}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for", None),
        (CHATML_HEAD, None),
    ],
)
def test_other_templates_are_left_to_the_files_own_metadata(make_checkpoint, template, expected):
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text(template)
    assert ollama.chatml_system(template) == expected
    written = [line.split(" ")[0] for line in lines_of(folder)]
    assert ("TEMPLATE" in written) == (expected is not None)
    assert "SYSTEM" not in written


def test_a_base_model_gets_the_bare_prompt(make_checkpoint):
    folder = make_checkpoint()
    (folder / "chat_template.jinja").unlink()
    lines = lines_of(folder)
    assert 'TEMPLATE """{{ .Prompt }}"""' in lines
    assert [line for line in lines if "stop" in line] == ['PARAMETER stop "<|endoftext|>"']


def test_a_model_in_parts_has_to_be_joined_first(make_checkpoint):
    recipe = load("demo").model_copy(update={"gguf_split_size": 1_000_000})
    spec = GgufArtifact(name="x", format="gguf", type="q8_0")
    planned = FORMATS["gguf"].plan(Checkpoint.open(make_checkpoint()), spec, recipe, "Model-7B")
    modelfile = planned.files[-1]
    assert modelfile.name == "Modelfile-q8_0"
    assert modelfile.size == len(modelfile.head)
    first = modelfile.head.decode().split("\n")[0]
    assert first.endswith("llama-gguf-split --merge model-7b-q8_0-00001-of-00002.gguf model-7b-q8_0.gguf")
    assert b"\nFROM ./model-7b-q8_0.gguf\n" in modelfile.head


@pytest.mark.oracle
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, in whose template language Modelfiles are written")
def test_go_renders_the_template_as_the_checkpoint_does(demo, tmp_path):
    path = tmp_path / "Modelfile"
    path.write_text("\n".join(lines_of(demo)))
    chat = json.dumps([{key.title(): value for key, value in message.items()} for message in TALK])
    command = ["go", "run", ROOT / "tests" / "oracles" / "modelfile_render.go", path]
    done = subprocess.run(command, input=chat, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout == Tokenizer.open(demo).render(TALK, add_generation_prompt=True)
