"""Importance matrices: both formats, against files of llama-imatrix."""

import struct

import pytest
import torch
from gguf import GGUFReader

from qquant.algorithms.gram import Gram
from qquant.errors import InputError
from qquant.formats.gguf import imatrix
from qquant.formats.gguf.quantize import dequantize, quantize
from qquant.solve.moments import Moments
from tests.worlds import GOLDEN


def test_reads_what_llama_imatrix_wrote():
    ours = imatrix.read(GOLDEN / "tiny.imatrix.gguf")
    theirs = {
        tensor.name: torch.from_numpy(tensor.data.copy()).flatten()
        for tensor in GGUFReader(GOLDEN / "tiny.imatrix.gguf").tensors
    }
    assert len(ours.sums) == 42
    for name, sums in ours.sums.items():
        assert torch.equal(sums, theirs[f"{name}.in_sum2"])
        assert ours.counts[name] == int(theirs[f"{name}.counts"])
    assert ours.chunks == 200


def test_both_formats_say_the_same():
    gguf, dat = imatrix.read(GOLDEN / "tiny.imatrix.gguf"), imatrix.read(GOLDEN / "tiny.imatrix.dat")
    assert set(gguf.sums) == set(dat.sums)
    for name in gguf.sums:
        assert torch.allclose(gguf.importance(name), dat.importance(name), rtol=1e-6)
    assert dat.chunks == gguf.chunks
    assert dat.dataset == gguf.dataset


@pytest.mark.parametrize("kind", ["gguf_bytes", "dat_bytes"])
def test_round_trip(tmp_path, kind):
    source = imatrix.read(GOLDEN / "tiny.imatrix.gguf")
    path = tmp_path / "copy"
    path.write_bytes(getattr(source, kind)())
    copy = imatrix.read(path)
    for name in source.sums:
        assert torch.allclose(copy.importance(name), source.importance(name), rtol=1e-6)
    assert copy.chunks == source.chunks


def test_dat_is_byte_for_byte_llama_imatrix_own_format():
    """Same entries, calls and means; the order of entries is llama-imatrix's hash order, so entries are compared."""

    def entries(data):
        (count,) = struct.unpack_from("<i", data)
        place, found = 4, {}
        for _ in range(count):
            (length,) = struct.unpack_from("<i", data, place)
            name = data[place + 4 : place + 4 + length].decode()
            place += 4 + length
            calls, size = struct.unpack_from("<ii", data, place)
            found[name] = (calls, data[place + 8 : place + 8 + 4 * size])
            place += 8 + 4 * size
        return found, data[place:]

    theirs, tail = entries((GOLDEN / "tiny.imatrix.dat").read_bytes())
    ours, our_tail = entries(imatrix.read(GOLDEN / "tiny.imatrix.dat").dat_bytes())
    assert our_tail == tail
    assert {name: calls for name, (calls, _) in ours.items()} == {name: calls for name, (calls, _) in theirs.items()}
    for name, (_, values) in theirs.items():
        got = torch.frombuffer(bytearray(ours[name][1]), dtype=torch.float32)
        assert torch.allclose(got, torch.frombuffer(bytearray(values), dtype=torch.float32), rtol=1e-6)


def test_reader_of_gguf_reads_ours(tmp_path):
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(
        imatrix.Imatrix({"blk.0.attn_q.weight": torch.arange(5.0)}, {"blk.0.attn_q.weight": 7}, "text").gguf_bytes()
    )
    tensors = {tensor.name: tensor.data.tolist() for tensor in GGUFReader(path).tensors}
    assert tensors == {"blk.0.attn_q.weight.in_sum2": [0, 1, 2, 3, 4], "blk.0.attn_q.weight.counts": [7]}


def test_no_count_means_nothing_is_known():
    empty = imatrix.Imatrix({"a": torch.tensor([3.0, 0.0])}, {"a": 0}, "")
    assert empty.importance("a").tolist() == [1, 1]
    assert empty.importance("b") is None


def test_groups_that_were_never_active_are_not_lost():
    """llama.cpp's search stores them as zeros: so do we with such an importance, and not with the mended one."""
    weight = torch.randn(4, 512)
    sums = torch.rand(512) + 0.1
    sums[256:] = 0
    sums[3] = 0
    found = imatrix.Imatrix({"a": sums}, {"a": 10}, "", "my.gguf")
    importance = found.importance("a")
    assert torch.equal(importance[:256], sums[:256] / 10), "single zeros and all else stay"
    assert torch.equal(importance[256:], (sums.mean() * 1e-6 / 10).expand(256))
    for kind in ("q4_0", "q5_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"):
        lost, kept = (dequantize(quantize(weight, kind, row), kind)[:, 256:] for row in (sums / 10, importance))
        assert not lost.any()
        plain = dequantize(quantize(weight, kind), kind)[:, 256:]
        assert (kept - weight[:, 256:]).square().mean() < 1.2 * (plain - weight[:, 256:]).square().mean()
    assert found.remarks() == [
        "my.gguf: 257 channels of 1 weights are zero; 16 whole groups of 16 are, and count 1e-06 of the mean"
    ]


def test_odd_values_are_reported():
    given = {"flat": torch.full((8,), 2.0), "unused": torch.zeros(8), "good": torch.arange(1.0, 9.0)}
    found = imatrix.Imatrix(given, {"flat": 3, "unused": 0, "good": 3}, "", "x.dat")
    assert found.remarks() == [
        "x.dat: 1 weights were never used, first unused: all channels count the same",
        "x.dat: 1 weights have one value for all channels, first flat",
    ]
    assert imatrix.Imatrix({"good": given["good"]}, {"good": 3}, "").remarks() == []
    assert imatrix.Imatrix({"zero": torch.zeros(8)}, {"zero": 3}, "").importance("zero").tolist() == pytest.approx(
        [1 / 3] * 8
    )


def test_a_constant_channel_counts_its_square_and_silent_ones_are_exported_mended(tmp_path):
    x = torch.randn(64, 32)
    x[:, 0], x[:, 1], x[:, 16:] = 3.0, 0.0, 0.0
    gram = Gram.zeros(32)
    gram.add(x)
    moments = Moments(tmp_path)
    importance = moments.importance("any", gram)
    assert importance[0] == pytest.approx(9)
    assert importance[1] == 0
    assert (importance[16:] > 0).all()
    moments.save(0, {"qkv": gram})
    stored = moments.load(0)
    exported = imatrix.Imatrix({"a": stored["qkv"]}, {"a": int(stored["tokens"])}, "")
    assert torch.equal(exported.sums["a"] / 64, importance), "others compute what we used"
    assert torch.equal(exported.importance("a"), importance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_cannot_be_are_refused(tmp_path, value):
    path = tmp_path / "bad.gguf"
    path.write_bytes(imatrix.Imatrix({"a": torch.tensor([1.0, value])}, {"a": 4}, "").gguf_bytes())
    with pytest.raises(InputError, match="a holds NaN, infinity or a negative value"):
        imatrix.read(path)


@pytest.mark.parametrize("cut", [0, 3, 10, 500, 20000])
@pytest.mark.parametrize("name", ["tiny.imatrix.dat", "tiny.imatrix.gguf"])
def test_truncated_files_are_refused(tmp_path, name, cut):
    path = tmp_path / name
    path.write_bytes((GOLDEN / name).read_bytes()[:cut])
    with pytest.raises(InputError):
        imatrix.read(path)


def test_a_model_is_not_an_importance_matrix(tmp_path):
    from qquant.formats.gguf.container import Field, header_bytes

    path = tmp_path / "model.gguf"
    path.write_bytes(header_bytes([Field("general.type", "str", "model")], [])[0])
    with pytest.raises(InputError, match="general.type is 'model', not an importance matrix"):
        imatrix.read(path)


def test_an_entry_without_values_is_refused(tmp_path):
    """Found by tests/fuzz/strangers.py."""
    name = b"blk.0.attn_q.weight"
    path = tmp_path / "empty.dat"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, 0))
    with pytest.raises(InputError, match="has no values"):
        imatrix.read(path)
