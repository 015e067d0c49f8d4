"""The checkpoint's tokenizer and template: as transformers has them, with every answer closed by a stop token."""

import json

import pytest

from qquant import calibration
from qquant.calibration import Tokenizer
from qquant.calibration import chats as chats_module
from qquant.errors import InputError
from tests.worlds.chats import APRIL, END, FEBRUARY, PLAIN, START, TINY, chat_file, chats_spec, many, talk

# ---- tokenizer and template


TEXTS = [
    "Hello, y'all! How are you?", "  indented\n\n\tcode = 1_000\r\n", "我想在苹果工作1314151天～", "ﬁ Å ½ é e\u0301", "", " ", "🚀🦙",
    f"{START}user\nhi{END}\n", "<|endoftext|>a<|endoftext|>",
]  # fmt: skip


def test_encode_and_decode_are_those_of_transformers(tiny):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(TINY))
    for text in TEXTS:
        assert tiny.encode(text) == theirs(text)["input_ids"], text
        assert tiny.decode(tiny.encode(text)) == theirs.decode(theirs(text)["input_ids"]), text


MIXED = (
    "{%- for m in messages %}\n  {% if loop.first %}\n{{ m | tojson }}{% endif %}\n{% endfor %}{{ eos_token }}"
    "{% generation %}x{% endgeneration %}{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, FEBRUARY, APRIL, MIXED])
def test_rendering_is_that_of_transformers(tokenizer_folder, template):
    from transformers import AutoTokenizer

    folder = tokenizer_folder(template)
    ours, theirs = Tokenizer.open(folder), AutoTokenizer.from_pretrained(str(folder))
    for chat in (
        talk("<b> & \"quotes\" 'here'"),
        talk("你好", " spaced \n", "go on", system=""),
        talk("a", "b", system="S"),
    ):
        for prompt in (False, True):
            assert ours.render(chat, prompt) == theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
        assert ours.encode(ours.render(chat)) == theirs.apply_chat_template(chat, return_dict=True)["input_ids"]


def test_special_tokens_are_read_as_text_on_demand(tiny):
    assert tiny.encode(END) == [tiny.special[END]]
    as_text = tiny.encode(END, special=False)
    assert len(as_text) > 1
    assert tiny.special[END] not in as_text
    assert tiny.decode(as_text) == END


def split_tokenizer(folder):
    """Replace tokenizer.json by the vocab.json and merges.txt that it was made of."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({token: i for token, i in model["vocab"].items() if i < 8189}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def test_vocab_and_merges_make_the_same_tokenizer(tokenizer_folder, tiny):
    folder = split_tokenizer(tokenizer_folder(added_tokens__json={"<|endoftext|>": 8189, START: 8190, END: 8191}))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [START, END],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    parts = Tokenizer.open(folder)
    assert parts.special == tiny.special
    assert parts.eos == tiny.eos
    assert [parts.encode(text) for text in TEXTS] == [tiny.encode(text) for text in TEXTS]


def test_vocab_and_merges_without_ids_of_the_special_tokens_are_refused(tokenizer_folder):
    with pytest.raises(InputError, match=r"no file says the id of <\|.*Copy tokenizer\.json"):
        Tokenizer.open(split_tokenizer(tokenizer_folder()))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer__json": None}, r"no tokenizer, looked for tokenizer\.json, and for vocab\.json with merges\.txt"),
        ({"tokenizer__json": '{"model": {"voc'}, r"tokenizer\.json: not valid JSON.* Copy the file again"),
        ({"tokenizer__json": "[]"}, r"tokenizer\.json: must be a JSON mapping"),
        ({"tokenizer__json": {"model": {}}}, r"no `model` with `vocab` and `merges`"),
        ({"tokenizer__json": {"model": {"vocab": {"a": 0}, "merges": ["a b"]}}}, r"merge 0 is 'a b', expected two tokens"),
        ({"tokenizer_config__json": "{"}, r"tokenizer_config\.json: not valid JSON"),
        ({"chat_template__jinja": None, "tokenizer_config__json": {"chat_template": 3}}, r"chat_template is a int, expected text"),
        ({"chat_template__jinja": None, "tokenizer_config__json": {"chat_template": [{"name": "rag", "template": ""}]}},
         r"chat_template names \['rag'\], none of them is `default`"),
    ],
)  # fmt: skip
def test_unreadable_tokenizers_are_named(tokenizer_folder, files, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.open(tokenizer_folder(**files))


def test_the_template_file_comes_before_the_configuration_and_default_before_other_names(tokenizer_folder):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": APRIL}]
    assert Tokenizer.open(tokenizer_folder(PLAIN, tokenizer_config__json={"chat_template": "other"})).template == PLAIN
    assert (
        Tokenizer.open(
            tokenizer_folder(chat_template__jinja=None, tokenizer_config__json={"chat_template": named})
        ).template
        == APRIL
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}\n{{ m.role }", r"chat_template\.jinja, line 2: the chat template does not parse"),
        ("{{ raise_exception('no system turns') }}", r"refuses a chat of \(user\): no system turns"),
        ("{{ messages.append(1) }}", r"refuses a chat of \(user\): .*(unsafe|undefined)"),
        ("{{ ''.__class__.__mro__ }}{{ x.y }}", r"refuses a chat of \(user\)"),
        ("{{ messages[0]['content'] + 1 }}", r"refuses a chat of \(user\): can only concatenate"),
    ],
)
def test_faulty_templates_are_named(tokenizer_folder, template, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.open(tokenizer_folder(template)).render(talk("hi"))


def test_a_missing_template_says_what_base_models_do(tokenizer_folder):
    tokenizer = Tokenizer.open(tokenizer_folder(chat_template__jinja=None))
    with pytest.raises(InputError, match=r"no chat template, .*`kind: text`"):
        tokenizer.render(talk("hi"))


@pytest.mark.parametrize(
    ("template", "default"),
    [(FEBRUARY, "You are a helpful assistant"), (APRIL, "You are a helpful assistant."), (PLAIN, None)],
)
def test_the_default_system_turn_is_found(tokenizer_folder, template, default):
    assert Tokenizer.open(tokenizer_folder(template)).default_system == default


def test_stop_tokens_come_from_every_file_that_names_them(tokenizer_folder):
    folder = tokenizer_folder(generation_config__json={"eos_token_id": [5, 8189]}, config__json={"eos_token_id": 6})
    assert Tokenizer.open(folder).eos == (5, 8189, 6, 8191)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"template": PLAIN.replace(END, "</s>")}, r"ends an answer with '</s>.*, which is no added token"),
        ({"generation_config__json": {}, "config__json": {}, "tokenizer_config__json": {"eos_token": "<|endoftext|>"}},
         r"ends an answer with <\|im_end\|> \(id 8191\), but generation stops on \[8189\] only"),
    ],
)  # fmt: skip
def test_an_end_of_turn_that_does_not_stop_is_refused(tokenizer_folder, files, message):
    with pytest.raises(InputError, match=message):
        _ = Tokenizer.open(tokenizer_folder(**files)).end_of_turn


# ---- chats and their stop tokens


def chat_tokens(tokenizer, chat, where):
    """Of one chat."""
    (ids,) = chats_module.chat_tokens(tokenizer, [(where, chat)])
    return ids


def answers_are_closed(ids, tokenizer):
    """Whether the part after every `<|im_start|>assistant` ends with `<|im_end|>`; independent of the code under test."""
    text = tokenizer.decode(ids)
    parts = text.split(f"{START}assistant\n")[1:]
    return len(parts) > 0 and all(END in part and START not in part.split(END)[0] for part in parts)


def test_every_assistant_turn_ends_with_the_stop_token(tiny):
    ids = chat_tokens(tiny, talk("a", "b ", "c", "d\n\n", "e", "f"), "here")
    assert answers_are_closed(ids, tiny)
    assert ids.count(tiny.end_of_turn) == 7  # with the default system turn


def test_the_template_of_february_is_refused(tokenizer_folder):
    tokenizer = Tokenizer.open(tokenizer_folder(FEBRUARY))
    closed = talk("a", "b", "c")  # the answer is not the last turn
    assert answers_are_closed(chat_tokens(tokenizer, closed, "x"), tokenizer)
    with pytest.raises(InputError) as caught:
        chat_tokens(tokenizer, talk("a", "b", "c", "the last words"), "chats.jsonl, line 7")
    message = str(caught.value)
    assert "chats.jsonl, line 7: assistant turn 2 of 2 does not end with <|im_end|> (id 8191)" in message
    assert "the last words" in message
    assert "renders nothing" in message
    assert "April 2024 closes every turn" in message


def test_the_template_of_february_stops_a_build(tokenizer_folder, tmp_path):
    path = chat_file(tmp_path / "chats.jsonl", many(20))
    with pytest.raises(InputError, match="assistant turn 2 of 2 does not end with"):
        calibration.load(chats_spec(path), Tokenizer.open(tokenizer_folder(FEBRUARY)), True)


def test_the_end_is_checked_on_ids_not_on_text(tokenizer_folder):
    """After an answer stands the *name* of the token, made of ordinary letters: no stop token."""
    fake = PLAIN.replace("+ '<|im_end|>\n'", "+ ('<|im_end|>' if not loop.last else '<|im_end' + '|') + '\n'")
    with pytest.raises(InputError, match=r"assistant turn 2 of 2 .* renders '<\|im_end\|\\n'"):
        chat_tokens(Tokenizer.open(tokenizer_folder(fake)), talk("a", "b", "c", "d"), "x")


def test_a_template_may_strip_answers_but_not_change_them(tokenizer_folder):
    stripping = PLAIN.replace("m['content']", "m['content'] | trim")
    tokenizer = Tokenizer.open(tokenizer_folder(stripping))
    assert answers_are_closed(chat_tokens(tokenizer, talk("a", " b ", "c", "\nd"), "x"), tokenizer)
    for change in ("m['content'] | upper", "(m['content'] if m['role'] != 'assistant' else '')"):
        changing = Tokenizer.open(tokenizer_folder(PLAIN.replace("m['content']", change)))
        with pytest.raises(InputError, match="changes or leaves out assistant turn 1"):
            chat_tokens(changing, talk("a", "b"), "x")


def test_answers_that_look_like_other_parts_of_the_chat_are_found(tiny):
    private = chr(0xF0000) + chr(0xF0001)
    for turns in (
        ("b", "b", "b", "b"),
        ("user\nb", "assistant\n", "system", "\n"),
        (private, private, private, private),
    ):
        assert answers_are_closed(chat_tokens(tiny, talk(*turns), "x"), tiny)
