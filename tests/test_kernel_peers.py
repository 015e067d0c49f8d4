"""What of `tests/bench/kernel_peers.py` needs no GPU: what it says without one, the packing, and that one broken peer stops nobody."""

import subprocess
import sys
from argparse import Namespace

import torch

from tests.bench import kernel_peers, peer_products
from tests.bench.peer_products import Layer, Peer, Prepared
from tests.worlds import importing

LIKE_GPTQMODEL = """
  #define COMMON_GET_IF(W_TYPE, STAGES)              \\
    COMMON_GET_IF_M234(W_TYPE, 4, 8, 128, STAGES)
    if (false) {
    }
    COMMON_GET_IF(vllm::kU4, pipe_stages)
    COMMON_GET_IF(vllm::kU4B8, pipe_stages)
    ACT_GET_IF(vllm::kU4B8, pipe_stages)
"""


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "tests.bench.kernel_peers", "--out", str(tmp_path / "out"), "--only", "marlin"]
    environment = importing(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "no CUDA device, so there is nothing to time; not installed: marlin\n"
    assert not (tmp_path / "out").exists()


def test_scales_are_the_same_in_every_format():
    scales = Layer.random(256, 64, "cpu").scales
    assert torch.equal(scales.half().float(), scales.float())


def test_marlin_has_every_64_scales_transposed():
    scales = torch.arange(128 * 3).view(128, 3)
    found = peer_products.marlin_scales(scales)
    expected = [scales[64 * block + row + 8 * column] for block in range(2) for row in range(8) for column in range(8)]
    assert torch.equal(found, torch.stack(expected, 1))


def test_of_marlin_only_the_kernels_of_this_bench_are_compiled(tmp_path):
    (tmp_path / "gptq_marlin.cu").write_text(LIKE_GPTQMODEL)
    (tmp_path / "gptq_marlin_bf16.cu").write_text('#include "gptq_marlin.cu"\n')
    files = peer_products.marlin_sources(tmp_path, tmp_path / "build")
    choice = (tmp_path / "build" / "gptq_marlin.cu").read_text()
    assert choice.count("\n_GET_IF(vllm::kU4B8, ") == 15
    assert "kU4," not in choice
    assert "ACT" not in choice
    assert "COMMON_GET_IF_M234(W_TYPE, 4, 8, 128, STAGES)" in choice
    kernels = [path for path in files if path.name.startswith("kernel_")]
    assert len({path.read_text() for path in kernels}) == 15
    before = {path: path.stat().st_mtime_ns for path in kernels}
    peer_products.marlin_sources(tmp_path, tmp_path / "build")
    assert before == {path: path.stat().st_mtime_ns for path in kernels}, "they would be compiled again"


def test_a_peer_that_breaks_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def plain(layer, options):
        return Prepared(torch.nn.functional.linear, (layer.weight.bfloat16(),))

    def broken(layer, options):
        raise ValueError("no such shape\nand more of it")

    def wide_only(layer, options):
        def product(x, weight):
            if len(x) < 2:
                raise NotImplementedError("one row")
            return x @ weight.T

        return Prepared(product, (layer.weight.bfloat16() * 2,))

    peers = {"ours": Peer(plain), "cublas": Peer(broken), "torch": Peer(wide_only)}
    monkeypatch.setattr(kernel_peers, "PEERS", peers)
    monkeypatch.setattr(Layer, "random", lambda columns, outputs, made=Layer.random: made(columns, outputs, "cpu"))
    monkeypatch.setattr(kernel_peers, "timed_graph", lambda calls, windows: calls[0]())
    monkeypatch.setattr(kernel_peers, "host_us", lambda call: 1.0)
    monkeypatch.setattr(kernel_peers, "contest", lambda calls: {name: (7.0, 0.01) for name in calls})
    options = Namespace(out=tmp_path, rows=[1, 4])
    cells = kernel_peers.measured((256, 64), list(peers), options, {})
    found = {(cell["rows"], cell["peer"]): cell for cell in cells}
    assert len(found) == 6
    assert found[1, "ours"]["of_ours"] == found[4, "ours"]["of_ours"] == 1
    assert found[1, "ours"]["error"] < 5e-3
    assert found[1, "cublas"]["failed"] == found[4, "cublas"]["failed"] == "ValueError: no such shape"
    assert found[1, "torch"]["failed"] == "NotImplementedError: one row"
    assert not kernel_peers.right(found[4, "torch"]), "twice as much is another product"
    printed = capsys.readouterr().out
    assert "256x64 cublas FAILED: ValueError: no such shape" in printed
    assert "WRONG" in printed
    assert "one row" in (tmp_path / "failures.log").read_text()
    table = kernel_peers.tables(cells)
    assert "| 256 x 64, M = 1 | 7.0 (1.00) |  |  |" in table


def test_what_cannot_be_compiled_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = Namespace(out=tmp_path, shapes=[(256, 64)], rows=[1, 4], marlin=None, workers=1, patience=60)
    failed = kernel_peers.compile_all(["cublas", "ours"], options)
    assert set(failed) == {("ours", (256, 64), 1), ("ours", (256, 64), 4)}
    assert "no CUDA device" in failed["ours", (256, 64), 1]


def test_the_first_error_of_a_compiler_is_what_is_told():
    text = "FAILED: x.o\nx.cu(3): error: expected a ;\nx.cu(9): error: more\nRuntimeError: Error building"
    assert kernel_peers.in_one_line(RuntimeError(text)) == "RuntimeError: x.cu(3): error: expected a ;"
    text = "Traceback\nKeyError: 'a'\nValueError: b\nexit 1"
    assert kernel_peers.in_one_line(RuntimeError(text)) == "RuntimeError: ValueError: b"
