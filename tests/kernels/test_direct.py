"""A product called again: on a stand-in of the compiled kernel that reads addresses, what is handed over and how little is done."""

import copy
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from qquant.algorithms.grid import Integers
from qquant.kernels import direct, many_rows, wq_mm
from qquant.kernels.dequant import dequant
from qquant.runtime.linears import QuantLinear

SIZES = ("M", "N", "K", "tiles", "groups", "splits")
POINTERS = ("x_at", "words_at", "params_at", "bias_at", "y_at", "partial_at", "counters_at")
FLAGS = (
    "BN",
    "BM",
    "SPLIT",
    "STAGES",
    "BITS",
    "PARTS",
    "TILES_PER_GROUP",
    "RAGGED",
    "SYMMETRIC",
    "BIAS",
    "INLINE",
    "WIDE",
)


def at(address, shape, dtype):
    """The tensor at an address."""
    count = torch.Size(shape).numel()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = (ctypes.c_char * (count * size)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype, count=count).view(shape)


class Kernel:
    """What `triton.jit` gives, as far as `direct` uses it: launched with tensors once, then by addresses."""

    arg_names = (*POINTERS, *SIZES, *FLAGS, "AHEAD", "UNROLL", "EARLY")

    def __init__(self):
        self.launches, self.calls = 0, []

    def __getitem__(self, grid):
        def launch(*given, **chosen):
            self.launches += 1
            self.fixed = [chosen[name] for name in self.arg_names if name in chosen]
            self._product(*[value.data_ptr() for value in given[:7]], *given[7:], *self.fixed)
            return SimpleNamespace(run=self._run, function=7, packed_metadata=(4, 1, 0))

        return launch

    def _run(self, x, y, z, stream, function, metadata, *rest):
        assert rest[:3] == (None, None, None)
        assert (z, stream, function, metadata) == (1, 0, 7, (4, 1, 0))
        self.calls.append((x, y))
        self._product(*rest[3:])

    def _product(self, x, words, params, bias, y, partial, counters, m, n, k, tiles, groups, splits, *flags):
        named = dict(zip(self.arg_names[13:], flags, strict=True))
        assert list(flags) == self.fixed
        scales = torch.float16 if named["SYMMETRIC"] else torch.int32
        weight = dequant(
            at(words, (n, 16 * tiles), torch.int32),
            at(params, (n, groups), scales),
            named["BITS"],
            k // groups,
            torch.float32,
        )
        out = at(x, (m, k), torch.bfloat16).float() @ weight.T
        if named["BIAS"]:
            out += at(bias, (n,), torch.bfloat16).float()
        if named["SPLIT"]:
            at(partial, (splits, m, n), torch.float32).fill_(7)  # there is so much room
        assert int(at(counters, (1,), torch.int32)) == 0
        at(y, (m, n), torch.bfloat16).copy_(out)


@pytest.fixture
def kernel(monkeypatch):
    """The stand-in, and a CPU that passes for a GPU."""
    found = Kernel()
    monkeypatch.setattr(wq_mm, "_kernel", found)
    monkeypatch.setattr(wq_mm, "config_for", lambda *_: wq_mm.Config(64, 3, 4, 4))
    zeros = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(wq_mm, "counters_of", lambda _: SimpleNamespace(get=lambda _: zeros))
    monkeypatch.setattr(direct, "usable", lambda x: x.dtype == torch.bfloat16 and direct._plain(x))
    monkeypatch.setattr(direct, "_sums", {})
    return found


def linear(bias=True, bits=4, zeros=False, rows=96, columns=256, group=64):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, columns // group, generator=generator) * 0.01 + 0.001).half()
    points = torch.randint(0, 1 << bits, scales.shape, generator=generator).float() if zeros else None
    given = torch.randn(rows, generator=generator).bfloat16() if bias else None
    return QuantLinear(Integers(codes, scales, points, bits), given, "test")


def expected(module, x):
    weight = dequant(module.qweight, module.params, module.bits, module.group_size, torch.float32)
    return (x.float() @ weight.T + (0 if module.bias is None else module.bias.float())).bfloat16()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bits": 8, "zeros": True}])
def test_later_calls_hand_over_what_the_first_did(kernel, options):
    module = linear(**options)
    for shape in ((1, 1, 256), (1, 256), (4, 1, 256), (1, 1, 256), (2, 2, 256)):
        x = torch.randn(shape).bfloat16()
        assert torch.equal(module(x), expected(module, x))
    assert (kernel.launches, kernel.calls) == (2, [(2, 3)] * 3), "one ordinary launch for one row, one for four"


def test_what_is_not_the_same_goes_the_ordinary_way(kernel, monkeypatch):
    module, x = linear(), torch.randn(1, 256).bfloat16()
    truth = expected(module, x)
    module(x)
    odd = torch.cat([x[0, :1], x[0]])[1:].view(1, 256)
    assert odd.data_ptr() % 16
    striped = torch.stack([x, x], -1)[..., 0]
    for other in (odd, striped, x.clone().requires_grad_()):
        assert torch.allclose(module(other).float(), truth.float(), atol=0.05)
    monkeypatch.setattr(direct, "current_stream", lambda _: 5)
    module(x)
    monkeypatch.undo()
    assert kernel.calls == []


def test_moved_replaced_and_copied_weights_are_used(kernel):
    module, x = linear(), torch.randn(1, 256).bfloat16()
    module(x)
    twin = copy.deepcopy(module)
    twin.qweight.copy_(linear(rows=96, bits=4).qweight.flip(0))
    assert torch.equal(twin(x), expected(twin, x))
    module.bias = torch.nn.Parameter(torch.ones(96).bfloat16(), requires_grad=False)
    for _ in range(3):
        assert torch.equal(module(x), expected(module, x))
    module.to(torch.device("cpu"))
    assert module._calls == {}


def test_a_call_is_an_allocation_and_a_launch(kernel):
    """What Python does for one row the second time: counted, since seconds depend on the machine."""
    module, x = linear(), torch.randn(1, 1, 256).bfloat16()
    kernel._run = lambda *_: None
    module(x)
    seen = []

    def note(frame, event, what):
        if event == "call":
            seen.append(frame.f_code.co_name)
        elif event == "c_call":
            seen.append(what.__name__)

    module(x)
    with torch.inference_mode():
        sys.setprofile(note)
        module(x)
        sys.setprofile(None)
    made = [name for name in seen if name.startswith(("empty", "new_", "zeros", "clone", "contiguous"))]
    assert made == ["new_empty"]
    assert not any("dispatch" in name for name in seen)
    assert len(seen) <= 25, seen


class Unpacks:
    """The same of `dequant`'s kernel."""

    arg_names = (
        "words_at",
        "params_at",
        "out_at",
        *["N", "K", "tiles", "groups", "group_size", "BN", "BITS", "RAGGED", "SYMMETRIC", "INLINE"],
    )

    def __init__(self):
        self.launches = self.calls = 0

    def __getitem__(self, grid):
        def launch(*given, **chosen):
            self.launches += 1
            self.grid, self.fixed = grid, [chosen[name] for name in self.arg_names if name in chosen]
            self._unpack(*[value.data_ptr() for value in given[:3]], *given[3:], *self.fixed)
            return SimpleNamespace(run=self._run, function=7, packed_metadata=(4, 1, 0))

        return launch

    def _run(self, x, y, z, stream, function, metadata, *rest):
        self.calls += 1
        assert ((x, y), z, stream, function, metadata, rest[:3]) == (self.grid, 1, 0, 7, (4, 1, 0), (None,) * 3)
        self._unpack(*rest[3:])

    def _unpack(self, words, params, out, n, k, tiles, groups, group, *flags):
        assert list(flags) == self.fixed
        bits, symmetric = flags[1], flags[3]
        params = at(params, (n, groups), torch.float16 if symmetric else torch.int32)
        weight = dequant(at(words, (n, 16 * tiles), torch.int32), params, bits, group, torch.bfloat16)
        at(out, (n, k), torch.bfloat16).copy_(weight)


@pytest.mark.parametrize("options", [{}, {"bias": False, "bits": 8, "zeros": True}])
def test_many_rows_unpack_by_address(kernel, options, monkeypatch):
    unpacks, module = Unpacks(), linear(**options)
    monkeypatch.setattr("qquant.kernels.dequant._kernel", unpacks)
    weight = dequant(module.qweight, module.params, module.bits, module.group_size, torch.bfloat16)
    for rows in (65, 80, 130):
        x = torch.randn(1, rows, 256).bfloat16()
        assert torch.equal(module(x), torch.nn.functional.linear(x, weight, module.bias))
    assert (unpacks.launches, unpacks.calls, kernel.launches) == (1, 2, 0)


class Many(Kernel):
    """The same of `many_rows`' kernel, which reads x through a descriptor."""

    arg_names = (
        *("x_tiles", *POINTERS[1:]),
        *("M", "N", "tiles", "groups", "splits"),
        *(
            "BN",
            "BM",
            "SPLIT",
            "STAGES",
            "BITS",
            "PARTS",
            "TILES_PER_GROUP",
            "SYMMETRIC",
            "BIAS",
            "INLINE",
            "WIDE",
            "EARLY",
        ),
    )

    def __getitem__(self, grid):
        def launch(x, *given, **chosen):
            self.launches, self.grid = self.launches + 1, grid
            self.fixed = [chosen[name] for name in self.arg_names if name in chosen]
            self._product(x, *[value.data_ptr() for value in given[:6]], *given[6:], *self.fixed)
            return SimpleNamespace(run=self._run, function=7, packed_metadata=(4, 1, 0))

        return launch

    def _run(self, x, y, z, stream, function, metadata, *rest):
        assert (stream, function, metadata, rest[:3]) == (0, 7, (4, 1, 0), (None,) * 3)
        self.calls.append((x, y, z))
        self._product(*rest[3:])

    def _product(self, x, words, params, bias, y, partial, counters, m, n, tiles, groups, splits, *flags):
        assert (x.shape[0], x.strides) == (m, [x.shape[1], 1])
        self.arg_names, names = Kernel.arg_names, self.arg_names
        named = dict(zip(names[12:], flags, strict=True)) | {"AHEAD": 0, "UNROLL": 1, "RAGGED": False}
        self.fixed, fixed = [named[name] for name in self.arg_names[13:]], self.fixed
        super()._product(
            x.base.data_ptr(), words, params, bias, y, partial, counters, m, n, x.shape[1], tiles, groups, splits, *self.fixed
        )  # fmt: skip
        self.arg_names, self.fixed = names, fixed


@pytest.mark.parametrize("options", [{}, {"bias": False, "bits": 8, "zeros": True}])
def test_prompts_of_any_length_share_a_launch(kernel, options, monkeypatch):
    """As long as they are cut up the same way: 65 and 80 rows are, 200 are not."""
    many, module = Many(), linear(**options)
    monkeypatch.setattr(many_rows, "_kernel", many)
    monkeypatch.setattr(many_rows, "most_rows", lambda *_: 256)
    monkeypatch.setattr(many_rows, "config_for", lambda *given: many_rows.Config(splits=2 if given[2] < 100 else 1))
    for rows in (65, 80, 200, 70, 256):
        x = torch.randn(1, rows, 256).bfloat16()
        assert torch.equal(module(x), expected(module, x))
    assert many.launches == 2, "one for two splits, one for one"
    assert many.calls == [(1, 2, 2), (1, 2, 2), (2, 2, 1)]
    assert kernel.launches == 0


@pytest.mark.gpu
def test_host_microseconds_of_a_call_on_a_gpu():
    import time

    module = linear(rows=4096, columns=4096, group=128).to("cuda")
    x = torch.randn(1, 1, 4096, device="cuda").bfloat16()
    plain = torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    assert torch.allclose(module(x).float(), expected(module, x).float(), rtol=2e-2, atol=2e-2)
    with torch.inference_mode():
        for call in (module, plain):
            for _ in range(50):
                call(x)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(200):
                call(x)
            print(f"{type(call).__name__}: {(time.perf_counter() - began) / 200 * 1e6:.1f} us")
            torch.cuda.synchronize()
    assert torch.equal(module(x), module(x))
    for rows in (2, 64, 65, 300, 65, 300):
        x = torch.randn(1, rows, 4096, device="cuda").bfloat16()
        assert torch.allclose(module(x).float(), expected(module, x).float(), rtol=2e-2, atol=2e-2)
