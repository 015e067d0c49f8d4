"""GGUF files and importance matrices of strangers: refused where the reference reader refuses, and where it hangs."""

import struct
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qquant.errors import InputError
from qquant.formats.gguf import container, imatrix
from qquant.formats.gguf.container import Field, header_bytes, read_header
from qquant.formats.gguf.source import GgufSource
from tests.worlds.strange import FAST, numbers, refused


def by_gguf(path):
    import gguf

    gguf.GGUFReader(path)


# --- F19: GGUF ---------------------------------------------------------------------------------------------------------


def gguf_file(path, fields=(), tensors=(("t", (2, 32), 0, 256),), data=None):
    head, _, size = header_bytes([Field("general.architecture", "str", "qwen2"), *fields], tensors)
    path.write_bytes(head + b"\0" * (size - len(head) if data is None else data))
    return path


def test_the_49_bytes_that_hang_the_reference_reader(tmp_path):
    """One array of 2**40 values of a kind that the reference reads without looking at the file's end."""
    path = tmp_path / "x.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**40)
    )
    assert path.stat().st_size == 49
    began = time.process_time()
    with pytest.raises(InputError, match=r"array of 1,099,511,627,776 values"):
        read_header(path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("buffer", [1, 9, 30, 1 << 20])
def test_strings_are_the_same_from_a_buffer_of_any_size(tmp_path, monkeypatch, buffer):
    """One by one (a buffer of nothing) and buffered: the same texts, and of a file that ends at any byte the same complaint."""
    texts = ["", "a", "word", "x" * 50, "", "\u6f22\u5b57", "end"]
    path = gguf_file(tmp_path / "x.gguf", [Field("tokens", "[str]", texts), Field("after", "u32", 7)])
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"word", b"w\xffrd"))

    def said(size, content=None):
        monkeypatch.setattr(container, "BUFFER", size)
        if content is not None:
            path.write_bytes(content)
        try:
            return {key: field.value for key, field in read_header(path).fields.items()}
        except InputError as error:
            return str(error)

    assert said(buffer) == said(0)
    assert said(buffer)["tokens"] == [text.replace("word", "w\ufffdrd") for text in texts]
    for stop in range(len(whole) - 256):
        assert said(buffer, whole[:stop]) == said(0)
    at = whole.index(b"word") - 8
    for length in (2**63, 1000, 45):
        assert said(buffer, whole[:at] + struct.pack("<Q", length) + whole[at + 8 :]) == said(0)


@FAST
@given(
    st.integers(0, 400),
    st.one_of(st.binary(min_size=1, max_size=12), numbers.map(lambda n: struct.pack("<Q", n % 2**64))),
)
def test_strange_gguf_files(place, at, bytes_):
    fields = [Field("a", "[str]", ["x", "y"]), Field("general.alignment", "u32", 32), Field("b", "[i32]", [1, 2])]
    path = gguf_file(place / "x.gguf", fields, [("t", (2, 32), 0, 256), ("u", (3, 32), 8, 102)])
    data = bytearray(path.read_bytes())
    data[at : at + len(bytes_)] = bytes_
    path.write_bytes(data)
    refused(read_header, path, by_gguf)


@pytest.mark.parametrize(("number", "name"), [(31, "q4_0_4_4"), (40, "nvfp4"), (999, "of number 999")])
def test_a_type_whose_blocks_are_not_known_is_named(tmp_path, number, name):
    path = gguf_file(tmp_path / "x.gguf", tensors=[("t", (2, 64), number, 256)])
    with pytest.raises(InputError, match=rf"tensor 't': type {name}: .*; known: f32, f16, "):
        read_header(path)


def broken_gguf():
    whole = [("t", (2, 32), 0, 256), ("u", (2, 32), 0, 256)]
    yield (
        "nested array",
        lambda p: p.write_bytes(
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"k"
            + struct.pack("<IIQIQ", 9, 9, 1, 4, 0)
            + b"\0" * 64
        ),
    )
    yield "five dimensions", lambda p: gguf_file(p, tensors=[("t", (1, 1, 1, 1, 32), 0, 128)])
    yield "empty tensor", lambda p: gguf_file(p, tensors=[("t", (0, 32), 0, 0)])
    yield "unknown type", lambda p: gguf_file(p, tensors=[("t", (2, 32), 99, 256)])
    yield "not whole blocks", lambda p: gguf_file(p, tensors=[("t", (2, 33), 8, 68)])
    yield "ends beyond", lambda p: gguf_file(p, data=100)
    yield "overflow", lambda p: gguf_file(p, tensors=[("t", (2**40, 2**40), 0, 64)])
    yield "overlap", lambda p: gguf_file(p, tensors=[(whole[0][0], whole[0][1], 0, 32), whole[1]])
    yield "alignment of 64 bits", lambda p: gguf_file(p, [Field("general.alignment", "u64", 32)])
    yield "alignment of 3", lambda p: gguf_file(p, [Field("general.alignment", "u32", 3)])
    yield "repeated field", lambda p: gguf_file(p, [Field("general.architecture", "str", "qwen2")])
    yield "repeated tensor", lambda p: gguf_file(p, tensors=[whole[0], whole[0]])
    yield "other byte order", lambda p: p.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    yield "no GGUF", lambda p: p.write_bytes(b"GGML" + b"\0" * 100)
    yield "empty", lambda p: p.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "make"), list(broken_gguf()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_malformed_gguf_files_are_refused(tmp_path, name, make):
    make(tmp_path / "x.gguf")
    with pytest.raises(InputError):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.key_length", "context_length"])
@pytest.mark.parametrize("value", [2**31, -1, 0, 1.5])
def test_gguf_numbers_that_no_model_has(tmp_path, key, value):
    good = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 1}
    good |= {"attention.head_count_kv": 1, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-6, key: value}
    kinds = {int: "i64", float: "f64"}
    fields = [Field(f"qwen2.{name}", kinds[type(number)], number) for name, number in good.items()]
    began = time.process_time()
    with pytest.raises(InputError):
        GgufSource.open(gguf_file(tmp_path / "x.gguf", fields, [("token_embd.weight", (8, 32), 0, 1024)]))
    assert time.process_time() - began < 2


def test_many_and_long_values_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "ELEMENT_LIMIT", 100)
    with pytest.raises(InputError, match="array of 60 values"):
        read_header(gguf_file(tmp_path / "x.gguf", [Field("a", "[u8]", [1] * 60), Field("b", "[u8]", [1] * 60)]))
    monkeypatch.setattr(container, "HEADER_LIMIT", 1000)
    with pytest.raises(InputError, match="string of 2,000 bytes"):
        read_header(gguf_file(tmp_path / "x.gguf", [Field("a", "str", "x" * 2000)]))


@FAST
@given(st.sampled_from(["gguf", "dat"]), st.integers(0, 600), st.binary(min_size=1, max_size=8))
def test_strange_importance_matrices(place, kind, at, noise):
    good = imatrix.Imatrix({"blk.0.attn_q.weight": torch.rand(8), "blk.0.attn_k.weight": torch.rand(8)}, {"blk.0.attn_q.weight": 5, "blk.0.attn_k.weight": 5}, "d")  # fmt: skip
    data = bytearray(good.gguf_bytes() if kind == "gguf" else good.dat_bytes())
    data[at : at + len(noise)] = noise
    (place / "i").write_bytes(data)
    try:
        imatrix.read(place / "i")
    except InputError:
        return


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -1.0])
def test_counts_that_are_none(tmp_path, count):
    head, _, _ = header_bytes(
        [Field("general.type", "str", "imatrix")], [("a.counts", (1,), 0, 4), ("a.in_sum2", (8,), 0, 32)]
    )
    (tmp_path / "i").write_bytes(head + struct.pack("<f", count) + b"\0" * 28 + b"\0" * 32)
    with pytest.raises(InputError, match="was counted"):
        imatrix.read(tmp_path / "i")
