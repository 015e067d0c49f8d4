"""Sources of calibration: files of every form, malformed rows, datasets of the hub."""

import gzip
import hashlib
import json

import pytest

from qquant import calibration
from qquant.calibration import sources as sources_module
from qquant.errors import EnvironmentMissingError, InputError
from qquant.recipe import Source
from tests.worlds.chats import END, START, chat_file, chats_spec, many, prose, spec, talk

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
