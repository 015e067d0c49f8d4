"""Calibration: the checkpoint's tokenizer and template, sources, shares, stop tokens, the set on disk, held-out texts."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from qquant import calibration
from qquant.calibration import CalibrationSet, Tokenizer
from qquant.calibration import chats as chats_module
from qquant.calibration import sources as sources_module
from qquant.calibration.draw import allot, shuffled
from qquant.errors import EnvironmentMissingError, InputError, UsageError
from qquant.recipe import Calibration, Source
from qquant.resources import data_dir

TINY = data_dir("recipes") / "demo" / "tiny-qwen1.5"
START, END = "<|im_start|>", "<|im_end|>"

# Qwen1.5's templates: 2024-02-06 (the last turn stays open), and 2024-04-30 (every turn is closed).
FEBRUARY = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
APRIL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer.open(TINY)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the demo checkpoint's tokenizer; `write` changes files of it."""

    def make(template=None, **files):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "config.json",
            "generation_config.json",
            "chat_template.jinja",
        ):
            shutil.copy(TINY / name, folder / name)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        for name, content in files.items():
            file = folder / name.replace("__", ".")
            file.unlink() if content is None else file.write_text(
                content if isinstance(content, str) else json.dumps(content)
            )
        return folder

    return make


def talk(*turns, system=None):
    """A chat of alternating user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]


def chat_file(path, chats):
    path.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats))
    return path


def many(count, **options):
    return [
        talk(f"What is {i} plus {i}?", f"It is {2 * i}.", "And one more?", f"{2 * i + 1}.", **options)
        for i in range(count)
    ]


def spec(*sources, **options):
    return Calibration(sources=sources, **{"samples": 8, "length": 64, "default_system_share": 0.0, **options})


def chats_spec(path, **options):
    return spec(Source(path=str(path), kind="chat"), **options)


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
def test_rendering_is_that_of_transformers(checkpoint, template):
    from transformers import AutoTokenizer

    folder = checkpoint(template)
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


def test_vocab_and_merges_make_the_same_tokenizer(checkpoint, tiny):
    folder = split_tokenizer(checkpoint(added_tokens__json={"<|endoftext|>": 8189, START: 8190, END: 8191}))
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


def test_vocab_and_merges_without_ids_of_the_special_tokens_are_refused(checkpoint):
    with pytest.raises(InputError, match=r"no file says the id of <\|.*Copy tokenizer\.json"):
        Tokenizer.open(split_tokenizer(checkpoint()))


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
def test_unreadable_tokenizers_are_named(checkpoint, files, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.open(checkpoint(**files))


def test_the_template_file_comes_before_the_configuration_and_default_before_other_names(checkpoint):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": APRIL}]
    assert Tokenizer.open(checkpoint(PLAIN, tokenizer_config__json={"chat_template": "other"})).template == PLAIN
    assert (
        Tokenizer.open(checkpoint(chat_template__jinja=None, tokenizer_config__json={"chat_template": named})).template
        == APRIL
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}\n{{ m.role }", r"chat_template\.jinja, line 2: the chat template does not parse"),
        ("{{ raise_exception('no system turns') }}", r"refuses a chat of \(user\): no system turns"),
        ("{{ messages.append(1) }}", r"refuses a chat of \(user\): .*unsafe"),
        ("{{ ''.__class__.__mro__ }}{{ x.y }}", r"refuses a chat of \(user\)"),
        ("{{ messages[0]['content'] + 1 }}", r"refuses a chat of \(user\): can only concatenate"),
    ],
)
def test_faulty_templates_are_named(checkpoint, template, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.open(checkpoint(template)).render(talk("hi"))


def test_a_missing_template_says_what_base_models_do(checkpoint):
    tokenizer = Tokenizer.open(checkpoint(chat_template__jinja=None))
    with pytest.raises(InputError, match=r"no chat template, .*`kind: text`"):
        tokenizer.render(talk("hi"))


@pytest.mark.parametrize(
    ("template", "default"),
    [(FEBRUARY, "You are a helpful assistant"), (APRIL, "You are a helpful assistant."), (PLAIN, None)],
)
def test_the_default_system_turn_is_found(checkpoint, template, default):
    assert Tokenizer.open(checkpoint(template)).default_system == default


def test_stop_tokens_come_from_every_file_that_names_them(checkpoint):
    folder = checkpoint(generation_config__json={"eos_token_id": [5, 8189]}, config__json={"eos_token_id": 6})
    assert Tokenizer.open(folder).eos == (5, 8189, 6, 8191)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"template": PLAIN.replace(END, "</s>")}, r"ends an answer with '</s>.*, which is no added token"),
        ({"generation_config__json": {}, "config__json": {}, "tokenizer_config__json": {"eos_token": "<|endoftext|>"}},
         r"ends an answer with <\|im_end\|> \(id 8191\), but generation stops on \[8189\] only"),
    ],
)  # fmt: skip
def test_an_end_of_turn_that_does_not_stop_is_refused(checkpoint, files, message):
    with pytest.raises(InputError, match=message):
        _ = Tokenizer.open(checkpoint(**files)).end_of_turn


# ---- chats and their stop tokens


def answers_are_closed(ids, tokenizer):
    """Whether the part after every `<|im_start|>assistant` ends with `<|im_end|>`; independent of the code under test."""
    text = tokenizer.decode(ids)
    parts = text.split(f"{START}assistant\n")[1:]
    return len(parts) > 0 and all(END in part and START not in part.split(END)[0] for part in parts)


def test_every_assistant_turn_ends_with_the_stop_token(tiny):
    ids = calibration.samples.chat_tokens(tiny, talk("a", "b ", "c", "d\n\n", "e", "f"), "here")
    assert answers_are_closed(ids, tiny)
    assert ids.count(tiny.end_of_turn) == 7  # with the default system turn


def test_the_template_of_february_is_refused(checkpoint):
    tokenizer = Tokenizer.open(checkpoint(FEBRUARY))
    closed = talk("a", "b", "c")  # the answer is not the last turn
    assert answers_are_closed(chats_module.chat_tokens(tokenizer, closed, "x"), tokenizer)
    with pytest.raises(InputError) as caught:
        chats_module.chat_tokens(tokenizer, talk("a", "b", "c", "the last words"), "chats.jsonl, line 7")
    message = str(caught.value)
    assert "chats.jsonl, line 7: assistant turn 2 of 2 does not end with <|im_end|> (id 8191)" in message
    assert "the last words" in message
    assert "renders nothing" in message
    assert "April 2024 closes every turn" in message


def test_the_template_of_february_stops_a_build(checkpoint, tmp_path):
    path = chat_file(tmp_path / "chats.jsonl", many(20))
    with pytest.raises(InputError, match="assistant turn 2 of 2 does not end with"):
        calibration.load(chats_spec(path), Tokenizer.open(checkpoint(FEBRUARY)), True)


def test_the_end_is_checked_on_ids_not_on_text(checkpoint):
    """After an answer stands the *name* of the token, made of ordinary letters: no stop token."""
    fake = PLAIN.replace("+ '<|im_end|>\n'", "+ ('<|im_end|>' if not loop.last else '<|im_end' + '|') + '\n'")
    with pytest.raises(InputError, match=r"assistant turn 2 of 2 .* renders '<\|im_end\|\\n'"):
        chats_module.chat_tokens(Tokenizer.open(checkpoint(fake)), talk("a", "b", "c", "d"), "x")


def test_a_template_may_strip_answers_but_not_change_them(checkpoint):
    stripping = PLAIN.replace("m['content']", "m['content'] | trim")
    tokenizer = Tokenizer.open(checkpoint(stripping))
    assert answers_are_closed(chats_module.chat_tokens(tokenizer, talk("a", " b ", "c", "\nd"), "x"), tokenizer)
    for change in ("m['content'] | upper", "(m['content'] if m['role'] != 'assistant' else '')"):
        changing = Tokenizer.open(checkpoint(PLAIN.replace("m['content']", change)))
        with pytest.raises(InputError, match="changes or leaves out assistant turn 1"):
            chats_module.chat_tokens(changing, talk("a", "b"), "x")


def test_answers_that_look_like_other_parts_of_the_chat_are_found(tiny):
    private = chr(0xF0000) + chr(0xF0001)
    for turns in (
        ("b", "b", "b", "b"),
        ("user\nb", "assistant\n", "system", "\n"),
        (private, private, private, private),
    ):
        assert answers_are_closed(chats_module.chat_tokens(tiny, talk(*turns), "x"), tiny)


# ---- system turns


def system_of(ids, tokenizer):
    text = tokenizer.decode(ids)
    return re.match(re.escape(START) + r"system\n(.*?)" + re.escape(END), text, re.DOTALL).group(1)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.25, 5), (0.33, 7), (1.0, 20)])
def test_the_share_of_default_system_turns_is_met(tiny, tmp_path, share, wanted):
    path = chat_file(tmp_path / "c.jsonl", many(60))
    found = calibration.load(chats_spec(path, samples=20, length=512, default_system_share=share), tiny, True)
    systems = [system_of(sample, tiny) for sample in found.tokens]
    assert systems.count(tiny.default_system) == found.chats.default_system == wanted
    assert found.chats.varied_system == 20 - wanted
    assert found.provenance()["chats"]["default_system_share"] == wanted / 20
    if share == 0.0:
        assert len(set(systems)) == 12  # all of the English turns of system-turns.yaml


def test_own_system_turns_are_kept_and_the_language_is_that_of_the_chat(tiny, tmp_path):
    own = many(10, system="You are a pirate.")
    chinese = [talk(f"今天是{i}号吗？", f"是的，今天是{i}号。") for i in range(10)]
    path = chat_file(tmp_path / "c.jsonl", own + chinese)
    found = calibration.load(chats_spec(path, samples=20, length=512, default_system_share=0.25), tiny, True)
    turns = sources_module.read_yaml(data_dir("calibration") / "system-turns.yaml")
    systems = [system_of(sample, tiny) for sample in found.tokens]
    assert systems.count("You are a pirate.") == found.chats.own_system == 10
    assert found.chats.default_system == 5
    others = [system for system in systems if system not in ("You are a pirate.", tiny.default_system)]
    assert len(others) == 5
    assert set(others) <= set(turns["zh"])


def test_chats_without_a_system_turn_are_preferred_where_the_share_needs_them(tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(30, system="You are a pirate.") + many(10))
    found = calibration.load(chats_spec(path, samples=10, default_system_share=1.0), tiny, True)
    assert found.chats.default_system == 10


def test_a_chat_with_the_default_text_counts_as_default(tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(8, system=tiny.default_system))
    assert calibration.load(chats_spec(path, default_system_share=1.0), tiny, True).chats.default_system == 8
    mixed = calibration.load(chats_spec(path, default_system_share=0.5, length=512), tiny, True)
    assert [tiny.decode(sample).count(f"{START}system") for sample in mixed.tokens] == [1] * 8
    assert [system_of(sample, tiny) for sample in mixed.tokens].count(tiny.default_system) == 4


def test_a_share_that_cannot_be_had_is_an_error(checkpoint, tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(8, system="You are a pirate.") + many(2))
    with pytest.raises(InputError, match=r"is 0\.5, which is 4 of 8 chats, but only 2 come without .* at most 0\.250"):
        calibration.load(chats_spec(path, default_system_share=0.5), tiny, True)
    with pytest.raises(InputError, match=r"has no default system turn, but .*share is 0\.5\. Set it to 0"):
        calibration.load(chats_spec(path, default_system_share=0.5), Tokenizer.open(checkpoint(PLAIN)), True)


# ---- samples


def prose(count):
    return "\n\n".join(
        f"Paragraph {i} tells of {i * 7919 % 1000} ships and {i * 104729 % 1000} sailors." for i in range(count)
    )


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(prose(400))
    return path


def test_text_windows_are_aligned_distinct_and_spread(tiny, book):
    found = calibration.load(spec(Source(path=str(book)), samples=10), tiny, False)
    ids = tiny.encode(book.read_text(), special=False)
    windows = [tuple(ids[at : at + 64]) for at in range(0, len(ids) - 63, 64)]
    places = sorted(windows.index(tuple(sample.tolist())) for sample in found.tokens)
    assert len(set(places)) == 10
    total = len(windows)
    assert all(i * total // 10 <= place < (i + 1) * total // 10 for i, place in enumerate(places))
    assert found.chats is None
    assert all(sample.dtype == np.int32 and sample.shape == (64,) for sample in found.tokens)


def test_the_same_recipe_gives_the_same_set_and_another_seed_another(tiny, book, tmp_path):
    chats = chat_file(tmp_path / "c.jsonl", many(30))
    sources = (Source(path=str(book)), Source(path=str(chats), kind="chat"))
    first, again = (calibration.load(spec(*sources, default_system_share=0.25), tiny, True) for _ in range(2))
    other = calibration.load(spec(*sources, default_system_share=0.25, seed=1), tiny, True)
    assert first.sha256 == again.sha256
    assert first.provenance() == again.provenance()
    assert first.sha256 != other.sha256
    windows = [calibration.load(spec(sources[0], seed=seed), tiny, False).tokens for seed in range(3)]
    assert len({frozenset(tuple(sample.tolist()) for sample in drawn) for drawn in windows}) == 3
    of_text = [len(sample) == 64 and START not in tiny.decode(sample) for sample in first.tokens]
    assert of_text.count(True) == 4
    assert of_text not in (sorted(of_text), sorted(of_text, reverse=True))  # the sources are mixed
    assert len({tuple(sample.tolist()) for sample in first.tokens}) == 8


def test_the_order_of_a_known_seed_is_fixed_for_all_time():
    assert shuffled(0, "samples", 8) == sorted(
        range(8), key=lambda i: hashlib.sha256(f"0:samples:{i}".encode()).digest()[:8]
    )
    assert shuffled(7, "x", 5) == [0, 2, 3, 1, 4]


@pytest.mark.parametrize(
    ("weights", "capacities", "total", "expected"),
    [
        ([1, 1], [9, 9], 8, [4, 4]),
        ([3, 1], [9, 9], 8, [6, 2]),
        ([1, 1, 1], [9, 9, 9], 8, [3, 3, 2]),
        ([1, 1], [2, 9], 8, [2, 6]),
        ([1, 1], [2, 3], 8, [2, 3]),
        ([1000, 0.001], [99, 99], 8, [7, 1]),
        ([5, 1, 1], [1, 2, 99], 10, [1, 2, 7]),
    ],
)
def test_samples_are_allotted_by_weight_and_capacity(weights, capacities, total, expected):
    assert allot(weights, capacities, total) == expected


def test_what_a_source_lacks_goes_to_the_others_and_is_said(tiny, book, tmp_path):
    chats = chat_file(tmp_path / "c.jsonl", many(2))
    found = calibration.load(spec(Source(path=str(book)), Source(path=str(chats), kind="chat")), tiny, True)
    assert [source.samples for source in found.sources] == [6, 2]
    assert found.notes == ("c.jsonl: 2 samples, its share is 4: the source has no more",)


def test_too_little_text_gives_fewer_samples_and_never_repeats(tiny, tmp_path):
    chats = chat_file(tmp_path / "c.jsonl", many(3) + many(3))
    found = calibration.load(chats_spec(chats), tiny, True)
    assert len(found.tokens) == 3
    assert found.sources[0].dropped["repeated"].count == 3
    assert "3 samples of the 8 asked for: the sources have no more, nothing is repeated" in found.notes


def test_a_source_listed_twice_is_refused(tiny, book):
    with pytest.raises(InputError, match=r"no usable row, 1 read, dropped: 1 repeated"):
        calibration.load(spec(Source(path=str(book)), Source(path=str(book))), tiny, False)


def test_chats_are_cut_in_tokens_and_keep_their_beginning(tiny, tmp_path):
    long = talk("Tell me everything.", "word " * 500, "And?", "No more.")
    short = talk("Hi", "Hello")
    found = calibration.load(
        chats_spec(chat_file(tmp_path / "c.jsonl", [long, short]), samples=2, default_system_share=1.0), tiny, True
    )
    whole = {len(ids): ids for ids in (tiny.encode(tiny.render(chat)) for chat in (long, short))}
    lengths = sorted(len(sample) for sample in found.tokens)
    assert lengths == [min(whole), 64]
    for sample in found.tokens:
        full = whole[max(whole)] if len(sample) == 64 else whole[min(whole)]
        assert sample.tolist() == full[: len(sample)]
    assert found.sources[0].truncated == 1
    assert found.sources[0].tokens == sum(lengths)


def test_a_source_shorter_than_one_sample_is_an_error(tiny, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Only a few words.")
    with pytest.raises(
        InputError, match=r"short\.txt: \d+ tokens, fewer than one sample of 64\. Lower calibration\.length"
    ):
        calibration.load(spec(Source(path=str(path))), tiny, False)


def test_a_chat_model_without_template_is_an_error_even_for_texts(checkpoint, book):
    bare = Tokenizer.open(checkpoint(chat_template__jinja=None))
    with pytest.raises(InputError, match="no chat template"):
        calibration.load(spec(Source(path=str(book))), bare, True)
    assert len(calibration.load(spec(Source(path=str(book))), bare, False).tokens) == 8


# ---- sources


def test_every_file_form_gives_the_same_chats(tiny, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = many(10, system="Be brief.")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in chats]
    parts = [[{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat] for chat in chats]
    column = [{"conversations": chat[1:], "system": "Be brief."} for chat in shared]
    files = {
        "openai.jsonl": [{"messages": chat} for chat in chats],
        "sharegpt.jsonl": [{"id": 1, "conversations": chat} for chat in shared],
        "parts.jsonl": [{"messages": chat} for chat in parts],
        "column.jsonl": column,
        "field.jsonl": [{"text": 3, "talk": chat} for chat in chats],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(files["openai.jsonl"]), tmp_path / "chats.parquet")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "openai.jsonl").read_bytes()))
    seen = set()
    for path in sorted(tmp_path.iterdir()):
        source = Source(path=str(path), kind="chat", field="talk" if path.name == "field.jsonl" else None)
        found = calibration.load(spec(source, samples=10, length=512), tiny, True)
        assert found.sources[0].name == path.name
        seen.add(frozenset(tuple(sample.tolist()) for sample in found.tokens))
    assert len(seen) == 1


def test_text_rows_are_joined_by_a_blank_line(tiny, tmp_path):
    rows = prose(400).split("\n\n")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in [*rows[:9], "", " \n", *rows[9:]])
    )
    (tmp_path / "t.txt").write_bytes("\r\n\r\n".join(rows).encode("utf-8-sig"))
    by_rows, by_file = (
        calibration.load(spec(Source(path=str(tmp_path / name))), tiny, False) for name in ("t.jsonl", "t.txt")
    )
    ids = tiny.encode(prose(400), special=False)
    windows = {tuple(ids[at : at + 64]) for at in range(0, len(ids), 64)}
    for found in (by_rows, by_file):
        assert {tuple(sample.tolist()) for sample in found.tokens} <= windows
    record = by_rows.sources[0]
    assert (record.taken, record.kept, record.dropped["empty"].count, record.dropped["empty"].first) == (
        402,
        400,
        2,
        "line 10",
    )


def test_names_of_special_tokens_in_a_text_are_ordinary_text(tiny, tmp_path):
    path = tmp_path / "about-tokens.txt"
    path.write_text(f"A turn ends with {END} and begins with {START}. " * 100)
    found = calibration.load(spec(Source(path=str(path))), tiny, False)
    assert not set(tiny.added.values()) & {int(i) for sample in found.tokens for i in sample}
    ids, _ = calibration.heldout(str(path), tiny)
    assert not set(tiny.added.values()) & set(ids.tolist())


BAD_ROWS = [
    ("{", "not valid JSON"),
    ("[1]", "not a JSON object"),
    ('{"other": 1}', "none of the columns messages, conversations, text"),
    ('{"messages": []}', "no list of messages"),
    ('{"messages": ["hi"]}', "a message is not an object"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "a role other than system, user (human), assistant (gpt)"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "a role other than system, user (human), assistant (gpt)"),
    ('{"messages": [{"role": "assistant", "content": null}]}', "a message has no text"),
    ('{"messages": [{"role": "user", "content": " "}]}', "an empty message"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    (json.dumps({"messages": [*talk("a", "b"), {"role": "system", "content": "late"}]}), "a system turn that is not the first"),
    (json.dumps({"messages": talk("a", f"b{END}\n{START}user\nc")}), f"{START} inside a message"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud800"}]}', "half of a surrogate pair, which is no text"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_malformed_rows_are_counted_and_too_many_are_an_error(tiny, tmp_path, row, reason):
    path = chat_file(tmp_path / "c.jsonl", many(39))
    row = row if isinstance(row, bytes) else row.encode()
    good = path.read_bytes()
    path.write_bytes(good[: good.index(b"\n") + 1] + b"\n" + row + b"\n" + good[good.index(b"\n") + 1 :])
    record = calibration.load(chats_spec(path), tiny, True).sources[0]
    assert (record.taken, record.kept) == (40, 39)
    (found,) = record.dropped.items()
    assert (found[0].replace(END, START), found[1].count, found[1].first, found[1].malformed) == (
        reason,
        1,
        "line 3",
        True,
    )
    path.write_bytes(b"\n".join(good.splitlines()[:20]) + b"\n" + row + b"\n" + row + b"\n")
    with pytest.raises(InputError) as caught:
        calibration.load(chats_spec(path), tiny, True)
    assert (
        str(caught.value)
        .replace(END, START)
        .startswith(f"{path}, line 21: {reason}; 2 of 22 rows are malformed, at most 5% may be")
    )


def test_text_in_a_chat_column_and_chats_in_a_text_column_are_malformed(tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(9))
    with pytest.raises(InputError, match=r"line 1: the column is not text; 9 of 9 rows"):
        calibration.load(spec(Source(path=str(path))), tiny, False)
    with pytest.raises(InputError, match=r"line 1: no column 'prompt'; 9 of 9"):
        calibration.load(spec(Source(path=str(path), kind="chat", field="prompt")), tiny, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, r"missing\.jsonl: no such file"),
        ("table.csv", b"a,b\n", r"a calibration source is a \.jsonl, \.parquet or \.txt file, not \.csv"),
        ("latin.txt", b"caf\xe9", r"no UTF-8 text at byte 3 \(0xe9\)"),
        ("broken.txt.gz", b"\x1f\x8bnonsense", r"broken\.txt\.gz: cannot read the file"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:40], r"cut\.txt\.gz: cannot read the file"),
        ("bad.parquet", b"PAR1", r"bad\.parquet: cannot read the parquet file"),
        ("empty.jsonl", b"", r"no usable row, 0 read, dropped: none"),
        ("blank.txt", b" \n", r"no usable row, 1 read, dropped: 1 empty"),
    ],
)
def test_unreadable_files_are_named(tiny, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        calibration.load(spec(Source(path=str(path))), tiny, False)


def test_a_folder_and_a_huge_file_are_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot read the file"):
        calibration.load(spec(Source(path=str(tmp_path))), tiny, False)
    path = tmp_path / "big.txt"
    path.write_text("x" * 101)
    monkeypatch.setattr(sources_module, "MAX_FILE", 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        calibration.load(spec(Source(path=str(path))), tiny, False)


def test_provenance_names_files_without_their_folders(tiny, book):
    found = calibration.load(spec(Source(path=str(book))), tiny, False)
    assert str(book.parent) not in json.dumps(found.provenance())
    assert found.sources[0].revision == f"sha256:{hashlib.sha256(book.read_bytes()).hexdigest()}"


# ---- the hub


class Hub:
    """Stands for huggingface_hub and datasets: a dataset of `rows`, or an error."""

    def __init__(self, monkeypatch, rows=(), info_error=None, row_error=None):
        def dataset_info(_, name, revision=None):
            if info_error is not None:
                raise info_error
            self.asked = (name, revision)
            return type("Info", (), {"sha": "c0ffee"})

        def load_dataset(name, config, *, split, revision, streaming):
            self.loaded = (name, config, split, revision, streaming)
            return self.stream(rows, row_error)

        monkeypatch.setattr(sources_module.hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(sources_module.datasets, "load_dataset", load_dataset)
        self.read = 0

    def stream(self, rows, error):
        for row in rows:
            self.read += 1
            yield row
        if error is not None:
            raise error


def test_a_hub_dataset_is_streamed_pinned_and_read_no_further_than_needed(tiny, monkeypatch):
    hub = Hub(monkeypatch, [{"messages": chat} for chat in many(500)])
    source = Source(dataset="someone/chats", config="en", split="test", revision="main", kind="chat")
    found = calibration.load(spec(source, samples=10), tiny, True)
    assert hub.asked == ("someone/chats", "main")
    assert hub.loaded == ("someone/chats", "en", "test", "c0ffee", True)
    assert hub.read == 80
    record = found.sources[0]
    assert (record.name, record.revision, record.taken, record.samples) == ("someone/chats/en:test", "c0ffee", 80, 10)


def test_an_unreachable_hub_is_an_environment_error(tiny, monkeypatch):
    import httpx2

    source = Source(dataset="someone/chats", kind="chat")
    for error in (httpx2.ConnectError("Name or service not known"), ConnectionError("offline mode is enabled")):
        Hub(monkeypatch, info_error=error)
        with pytest.raises(
            EnvironmentMissingError,
            match=r"someone/chats, split train: the hub cannot be reached: .*Use a bundled corpus",
        ):
            calibration.load(spec(source), tiny, True)
    Hub(monkeypatch, [{"messages": chat} for chat in many(5)], row_error=httpx2.ReadTimeout("timed out"))
    with pytest.raises(EnvironmentMissingError, match="timed out"):
        calibration.load(spec(source), tiny, True)


def test_an_unknown_dataset_or_split_is_an_input_error(tiny, monkeypatch):
    import datasets

    source = Source(dataset="someone/chats", kind="chat")
    Hub(monkeypatch, info_error=datasets.exceptions.DatasetNotFoundError("no"))
    with pytest.raises(InputError, match="no such dataset on the hub"):
        calibration.load(spec(source), tiny, True)
    Hub(monkeypatch, row_error=ValueError("Unknown split"))
    with pytest.raises(InputError, match="the dataset cannot be read: Unknown split"):
        calibration.load(spec(source), tiny, True)


# ---- on disk


@pytest.fixture
def saved(tiny, book, tmp_path):
    chats = chat_file(tmp_path / "c.jsonl", [*many(30), talk("a", "a")])
    with chats.open("a") as stream:
        stream.write("{}\n")
    sources = (Source(path=str(book)), Source(path=str(chats), kind="chat"))
    found = calibration.load(spec(*sources, default_system_share=0.25), tiny, True)
    found.save(tmp_path / "saved")
    return found, tmp_path / "saved"


def test_a_saved_set_opens_equal_and_saves_to_the_same_bytes(saved, tmp_path):
    found, folder = saved
    again = CalibrationSet.open(folder)
    assert [sample.tolist() for sample in again.tokens] == [sample.tolist() for sample in found.tokens]
    assert again.provenance() == found.provenance()
    assert again.sources == found.sources
    again.save(tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    said = json.loads((folder / "provenance.json").read_text())
    assert said["sha256"] == found.sha256
    assert said["sources"][1]["dropped"] == {
        "none of the columns messages, conversations, text": {"count": 1, "first": "line 32", "malformed": True}
    }


def test_the_hash_covers_ids_and_lengths(saved):
    found, _ = saved
    merged = (np.concatenate(found.tokens[:2]), *found.tokens[2:])
    changed = (found.tokens[0] + np.int32(1), *found.tokens[1:])
    for tokens in (merged, changed):
        assert CalibrationSet(tokens, (), None, 8, 64, 0).sha256 != found.sha256


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "calibration.safetensors",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            r"sha256 [0-9a-f]{64}, provenance\.json says",
        ),
        ("calibration.safetensors", lambda data: data[:-9], r"no saved calibration"),
        (
            "calibration.safetensors",
            lambda data: data.replace(b"lengths", b"lenghts"),
            r"no saved calibration: KeyError",
        ),
        ("provenance.json", lambda data: data[:-9], r"no saved calibration: JSONDecodeError"),
        ("provenance.json", lambda data: b"[]", r"no saved calibration"),
        ("provenance.json", lambda data: data.replace(b'"asked"', b'"asced"'), r"no saved calibration: KeyError"),
        ("provenance.json", None, r"provenance\.json: no such file; a saved calibration is"),
        ("calibration.safetensors", None, r"calibration\.safetensors: no such file"),
    ],
)
def test_a_damaged_set_is_refused(saved, file, change, message):
    _, folder = saved
    data = (folder / file).read_bytes()
    if change is None:
        (folder / file).unlink()
    else:
        assert change(data) != data
        (folder / file).write_bytes(change(data))
    with pytest.raises(InputError, match=message):
        CalibrationSet.open(folder)


def test_lengths_that_do_not_fit_the_tokens_are_refused(saved):
    import safetensors.numpy

    _, folder = saved
    for lengths, tokens in (([3, 2], [1, 2, 3, 4]), ([0, 4], [1, 2, 3, 4])):
        arrays = {"lengths": np.array(lengths, np.int32), "tokens": np.array(tokens, np.int32)}
        safetensors.numpy.save_file(arrays, folder / "calibration.safetensors")
        with pytest.raises(InputError, match="lengths and tokens do not fit each other"):
            CalibrationSet.open(folder)


# ---- held-out texts


def as_set(*samples):
    return CalibrationSet(tuple(np.array(sample, np.int32) for sample in samples), (), None, len(samples), 64, 0)


def test_shared_runs_are_those_of_a_slow_search():
    random = np.random.default_rng(0)
    for run in (1, 2, 5):
        samples = [random.integers(0, 4, size) for size in (1, 3, 30, 40)]
        text = random.integers(0, 4, 60).astype(np.int32)
        runs = {tuple(sample[i : i + run]) for sample in samples for i in range(len(sample) - run + 1)}
        slow = [i for i in range(60 - run + 1) if tuple(text[i : i + run]) in runs]
        assert calibration.shared_runs(as_set(*samples), text, run).tolist() == slow
        assert calibration.overlap(as_set(*samples), text, run) == len(slow)


def test_a_collision_of_hashes_invents_nothing(monkeypatch):
    module = sys.modules["qquant.calibration.heldout"]
    monkeypatch.setattr(module, "_run_hashes", lambda ids, run: np.zeros(len(ids) - run + 1, np.uint64))
    assert calibration.overlap(as_set(range(40)), np.arange(100, 140, dtype=np.int32)) == 0


def test_runs_do_not_reach_across_samples_and_short_texts_share_none():
    text = np.arange(40, dtype=np.int32)
    assert calibration.overlap(as_set(range(20), range(20, 40)), text) == 0
    assert calibration.overlap(as_set(range(5)), text) == 0
    assert calibration.overlap(as_set(range(40)), text[:31]) == 0
    assert calibration.overlap(as_set(range(40)), text[:32]) == 1


def test_calibrating_on_the_text_that_judges_is_an_error_that_shows_it(tiny, book):
    found = calibration.load(spec(Source(path=str(book))), tiny, False)
    ids, record = calibration.heldout(str(book), tiny)
    assert record == {
        "name": "book.txt", "kind": "text", "licence": "unknown", "tokens": len(ids), "sha256": hashlib.sha256(book.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert calibration.overlap(found, ids) == 8 * (64 - 31)
    with pytest.raises(
        InputError,
        match=r"shares 264 runs of 32 tokens with the calibration set, the first at token \d+: '.*(ships|sailors)",
    ):
        calibration.require_apart(found, ids, tiny)
    calibration.require_apart(found, tiny_ids(tiny, "Something else entirely. " * 20), tiny)


def tiny_ids(tokenizer, text):
    return np.array(tokenizer.encode(text), np.int32)


def test_heldout_chats_are_rendered(tiny, tmp_path):
    path = chat_file(tmp_path / "h.jsonl", many(2))
    ids, record = calibration.heldout(str(path), tiny)
    assert tiny.decode(ids) == "".join(tiny.render(chat) for chat in many(2))
    assert record["kind"] == "chat"


def test_unknown_names_are_usage_errors(tiny, tmp_path):
    with pytest.raises(
        UsageError, match=r"no held-out text 'bundled:wiki'; there are bundled:wikitext-2-test, bundled:"
    ):
        calibration.heldout("bundled:wiki", tiny)
    with pytest.raises(UsageError, match=r"no bundled corpus 'wiki'; there are chat-en, chat-zh"):
        calibration.load(spec(Source(bundled="wiki")), tiny, False)
    with pytest.raises(UsageError, match=r"chat-en is `kind: chat`, the recipe says text"):
        calibration.load(spec(Source(bundled="chat-en")), tiny, False)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="an empty evaluation text"):
        calibration.heldout(str(tmp_path / "empty.txt"), tiny)


# ---- what is bundled


def texts(entry):
    """The text of a bundled file; of chats, what was said."""
    content = entry.read().decode()
    if entry.kind == "text":
        return content
    return "\n\n".join(
        m["content"] for line in content.splitlines() for m in json.loads(line)["messages"] if m["role"] != "system"
    )


def word_runs(text, size):
    words = re.findall(r"\w+", text.lower())
    return [hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)]


def han_runs(text, size):
    letters = "".join(re.findall("[\u4e00-\u9fff]", text))
    return [letters[i : i + size] for i in range(len(letters) - size + 1)]


def test_manifests_describe_the_files():
    entries = [*calibration.corpora().values(), *calibration.heldout_texts().values()]
    assert sum(entry.size for entry in entries) <= 6_000_000
    for entry in entries:
        assert len(entry.read()) == entry.size
        assert entry.licence
        assert entry.origin
        assert f"| `{entry.name}` | {entry.size:,} |" in (data_dir("calibration") / "README.md").read_text()
    listed = {entry.file for entry in entries}
    there = {path.relative_to(data_dir("calibration")).as_posix() for path in data_dir("calibration").glob("[ch]*/*.*")}
    assert listed == there
    for entry in entries:
        if entry.file.endswith(".gz"):  # packed without name and time: the same text gives the same file
            packed = (data_dir("calibration") / entry.file).read_bytes()
            assert packed[3] == 0
            assert packed[4:8] == bytes(4)


def test_a_changed_bundled_text_is_refused(tmp_path, monkeypatch):
    shutil.copytree(data_dir("calibration"), tmp_path / "calibration")
    (tmp_path / "calibration/corpora/docs-zh.txt.gz").write_bytes(gzip.compress(b"other"))
    entry = calibration.corpora()["docs-zh"]
    monkeypatch.setattr(sources_module, "data_dir", lambda name: tmp_path / name)
    with pytest.raises(
        InputError, match=r"docs-zh\.txt\.gz: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}: the bundled text was changed"
    ):
        entry.read()


def test_no_heldout_text_shares_a_run_with_a_calibration_text():
    """13 words, or 26 Chinese characters, whatever stands between them."""
    heldout = {name: texts(entry) for name, entry in calibration.heldout_texts().items()}
    words = {run: name for name, text in heldout.items() for run in word_runs(text, 13)}
    letters = {run: name for name, text in heldout.items() for run in han_runs(text, 26)}
    assert len(words) > 200_000
    assert len(letters) > 30_000
    shared = []
    for name, entry in calibration.corpora().items():
        text = texts(entry)
        shared += [(name, words[run]) for run in word_runs(text, 13) if run in words]
        shared += [(name, letters[run], run) for run in han_runs(text, 26) if run in letters]
    assert shared == []


def test_the_bundled_chats_are_many_varied_and_well_formed():
    corpora, chats = calibration.corpora(), {}
    for name, file in (
        ("chat-en", corpora["chat-en"]),
        ("chat-zh", corpora["chat-zh"]),
        ("test", calibration.heldout_texts()["chat-test"]),
    ):
        chats[name] = [json.loads(line)["messages"] for line in file.read().decode().splitlines()]
    calibrating = chats["chat-en"] + chats["chat-zh"]
    assert len(calibrating) >= 160
    assert 0.35 <= len(chats["chat-zh"]) / len(calibrating) <= 0.45
    assert sum(chat[0]["role"] == "system" for chat in calibrating) >= 20
    assert sum(sum(m["role"] == "user" for m in chat) > 1 for chat in calibrating) >= 30
    answers = [m["content"] for chat in calibrating for m in chat if m["role"] == "assistant"]
    assert len({json.dumps(chat) for chat in calibrating + chats["test"]}) == len(calibrating) + len(chats["test"])
    assert len(set(answers)) > 0.98 * len(answers)  # a classifier answers with the same word twice
    assert min(map(len, answers)) < 30
    assert max(map(len, answers)) > 1500
    for chat in calibrating + chats["test"]:
        turns = [m["role"] for m in chat if m["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(m["content"] == m["content"].strip() and m["content"] for m in chat)


def test_bundled_sources_calibrate_the_demo_checkpoint(tiny):
    names = calibration.corpora()
    sources = tuple(Source(bundled=name, kind=entry.kind) for name, entry in names.items())
    found = calibration.load(spec(*sources, samples=32, length=256, default_system_share=0.25), tiny, True)
    assert len(found.tokens) == 32
    assert [source.samples for source in found.sources] == [4] * 8
    assert found.chats.default_system == 2
    assert all(not source.dropped for source in found.sources)
    assert found.notes == ()
    ids, record = calibration.heldout("bundled:wikitext-2-test", tiny)
    assert record["licence"] == "CC-BY-SA-3.0"
    calibration.require_apart(found, ids, tiny)


def test_importing_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'jinja2', 'tokenizers', 'huggingface_hub', 'pyarrow'}"
    program = f"import sys, qquant.calibration; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", program], check=True)
