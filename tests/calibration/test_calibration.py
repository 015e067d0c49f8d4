"""Calibration: the share of default system turns, samples by weight and seed, the set on disk."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from qquant import calibration
from qquant.calibration import CalibrationSet, Tokenizer
from qquant.calibration import sources as sources_module
from qquant.calibration.draw import allot, shuffled
from qquant.errors import InputError
from qquant.recipe import Source
from qquant.resources import data_dir
from tests.worlds.chats import END, PLAIN, START, chat_file, chats_spec, many, spec, talk

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


def test_a_share_of_one_makes_no_system_turn_up(tiny, tmp_path):
    """Chats of one's own as they are: some with a system turn, which stays, the others with the template's."""
    path = chat_file(tmp_path / "c.jsonl", many(6, system="You are a pirate.") + many(4))
    found = calibration.load(chats_spec(path, samples=10, length=512, default_system_share=1.0), tiny, True)
    assert {system_of(sample, tiny) for sample in found.tokens} == {"You are a pirate.", tiny.default_system}
    assert (found.chats.own_system, found.chats.default_system, found.chats.varied_system) == (6, 4, 0)


def test_a_chat_with_the_default_text_counts_as_default(tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(8, system=tiny.default_system))
    assert calibration.load(chats_spec(path, default_system_share=1.0), tiny, True).chats.default_system == 8
    mixed = calibration.load(chats_spec(path, default_system_share=0.5, length=512), tiny, True)
    assert [tiny.decode(sample).count(f"{START}system") for sample in mixed.tokens] == [1] * 8
    assert [system_of(sample, tiny) for sample in mixed.tokens].count(tiny.default_system) == 4


def test_a_share_that_cannot_be_had_is_an_error(tokenizer_folder, tiny, tmp_path):
    path = chat_file(tmp_path / "c.jsonl", many(8, system="You are a pirate.") + many(2))
    with pytest.raises(InputError, match=r"is 0\.5, which is 4 of 8 chats, but only 2 come without .* at most 0\.250"):
        calibration.load(chats_spec(path, default_system_share=0.5), tiny, True)
    with pytest.raises(InputError, match=r"has no default system turn, but .*share is 0\.5\. Set it to 0"):
        calibration.load(chats_spec(path, default_system_share=0.5), Tokenizer.open(tokenizer_folder(PLAIN)), True)


# ---- samples


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


def test_a_chat_model_without_template_is_an_error_even_for_texts(tokenizer_folder, book):
    bare = Tokenizer.open(tokenizer_folder(chat_template__jinja=None))
    with pytest.raises(InputError, match="no chat template"):
        calibration.load(spec(Source(path=str(book))), bare, True)
    assert len(calibration.load(spec(Source(path=str(book))), bare, False).tokens) == 8


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


def test_importing_is_light():
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'jinja2', 'tokenizers', 'huggingface_hub', 'pyarrow'}"
    program = f"import sys, qquant.calibration; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", program], check=True)
