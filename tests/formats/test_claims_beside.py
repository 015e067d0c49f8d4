"""What a folder's tokenizer files say beside tokenizer.json, and what follows from a file that is not there."""

import json

import pytest

from tests.formats.test_claims import noticed

READ_BESIDE = {  # file that the checkpoint does not have -> content that another tokenizer is made of, and content that changes nothing
    "special_tokens_map.json": ({"eos_token": "<|endoftext|>"}, {"eos_token": {"content": "<|im_end|>"}}),
    "added_tokens.json": ({"hello": 5}, {"<|im_end|>": None}),
    "chat_template.json": ({"chat_template": "{{ messages }}"}, None),
    "vocab.json": ({"a": 1}, {}),
    "merges.txt": ("a b\n", ""),
    "additional_chat_templates/tool_use.jinja": ("{{ messages }}", None),
}


@pytest.mark.parametrize("file", READ_BESIDE)
def test_a_file_beside_the_tokenizer_that_the_checkpoint_does_not_have_is_read(edited, file):
    """transformers takes special and added tokens from such files where tokenizer_config.json has no added_tokens_decoder."""
    checkpoint, found, open_file = edited
    path, _ = open_file("gptq", file)
    path.parent.mkdir(exist_ok=True)
    other, same = READ_BESIDE[file]
    tokenizer = json.loads((checkpoint.path / "tokenizer.json").read_text())
    if file == "added_tokens.json":
        same = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if file == "vocab.json":
        same = tokenizer["model"]["vocab"]
    if file == "merges.txt":
        merges = tokenizer["model"]["merges"]
        same = (
            "#version: 0.2\n" + "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in merges) + "\n"
        )
    if file == "chat_template.json":
        same = {"chat_template": (checkpoint.path / "chat_template.jinja").read_text()}
    path.write_text(other if isinstance(other, str) else json.dumps(other))
    faults, warnings = noticed(found["gptq"], checkpoint)
    assert any(file in text for text in (*faults, *warnings)), (faults, warnings)
    if same is not None:
        path.write_text(same if isinstance(same, str) else json.dumps(same))
        assert noticed(found["gptq"], checkpoint) == ((), ())


def test_a_template_in_tokenizer_config_is_compared_beside_the_one_in_its_own_file(edited):
    """Versions of transformers that know no chat_template.jinja read it, and `tools` take a template of that name."""
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", "tokenizer_config.json")
    own = (checkpoint.path / "chat_template.jinja").read_text()
    path.write_text(json.dumps(content | {"chat_template": own}))
    assert noticed(found["gptq"], checkpoint) == ((), ())
    named = [{"name": "default", "template": own}, {"name": "tool_use", "template": "{{ messages }}"}]
    for other in ("{{ messages }}", named):
        path.write_text(json.dumps(content | {"chat_template": other}))
        assert any("tokenizer_config.json: chat_template" in fault for fault in noticed(found["gptq"], checkpoint)[0])


@pytest.mark.parametrize(
    ("file", "change", "consequence"),
    [
        ("tokenizer_config.json", {"model_max_length": 16}, "longer prompts are refused or cut"),
        ("tokenizer_config.json", {"extra_special_tokens": []}, "other tokens are left out of answers"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.9.json"]}, "the same text gets other tokens"),
    ],
)
def test_settings_of_a_tokenizer_are_named_with_what_follows(edited, file, change, consequence):
    checkpoint, found, open_file = edited
    path, content = open_file("gptq", file)
    path.write_text(json.dumps(content | change))
    assert any(consequence in text for kind in noticed(found["gptq"], checkpoint) for text in kind)


@pytest.mark.parametrize(
    ("file", "consequence"),
    [
        ("generation_config.json", "answers are drawn by a runtime's own settings"),
        ("chat_template.jinja", "a runtime writes no chats"),
        ("tokenizer.json", "a runtime needs a tokenizer from elsewhere"),
    ],
)
def test_what_follows_from_a_missing_file_is_said(edited, file, consequence):
    checkpoint, found, open_file = edited
    path, _ = open_file("gptq", file)
    path.unlink()
    assert any(f"{file}: missing; {consequence}" in warning for warning in noticed(found["gptq"], checkpoint)[1])
