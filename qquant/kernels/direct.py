"""A product called again: `wq_mm` of the same weights for as many rows as before, with nothing worked out twice.

On its way to the GPU an operator of Python costs 60 to 90 us a call, of which the kernel itself needs 10: arguments are sorted by the
dispatcher, shapes checked, launch choices looked up, and Triton looks at every argument to find the binary that it compiled. For the
same module, rows and type all of it comes out the same. So the first call goes through Triton's launcher and keeps what it found;
later ones hand addresses to the compiled kernel: one allocation (the result) and one launch.

    y, call = Call.first(x, weights)   Triton's own launch, and a call that answers later
    y = call(x)                        None where it is not the same after all: another stream, a capture, an odd address, gradients

`ManyRows` does the same for `many_rows`, whatever the number of rows while K is cut up the same way, and `Unpacking` for `dequant`,
whose result is multiplied with where there are still more.

Calls on one stream follow each other, so they share counters (`wq_mm.Counters`) and the memory of partial sums.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from qquant.kernels import dequant, jit, many_rows, wq_mm
from qquant.kernels.jit import blocks, starts_early
from qquant.kernels.launcher import ALIGNED, capturing, compiled, current_device, current_stream, in_order
from qquant.kernels.unpack import WORDS, check_group

_sums: dict[tuple[int, int], Tensor] = {}  # partial sums, by device and stream


@dataclass(frozen=True)
class PackedWeights:
    """The weights of a product, as `wq_mm` takes them, contiguous."""

    qweight: Tensor
    params: Tensor
    bias: Tensor | None
    bits: int
    group_size: int

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return len(self.qweight)


def usable(x: Tensor) -> bool:
    """Whether `first` may be asked, of `Call` for up to `wq_mm.MAX_ROWS` rows, of the class of `for_many` for more."""
    there = jit.AVAILABLE and not jit.INTERPRETED and x.is_cuda and type(x) is Tensor
    return there and x.numel() > 0 and x.dtype in (torch.bfloat16, torch.float16) and _plain(x)


def _plain(x: Tensor) -> bool:
    wanted = x.requires_grad and torch.is_grad_enabled()
    return x.is_contiguous() and x.data_ptr() % ALIGNED == 0 and not wanted and not capturing()


class Call:
    """What a product needs besides x; see the head of this file."""

    __slots__ = ("_arguments", "_device", "_grid", "_keep", "_kernel", "_last", "_outputs", "_run", "_stream", "weights")  # fmt: skip

    def __init__(self, weights: PackedWeights, device: int, stream: int) -> None:
        self.weights, self._device, self._stream, self._outputs = weights, device, stream, weights.outputs

    @classmethod
    def first(cls, x: Tensor, weights: PackedWeights) -> tuple[Tensor, Call]:
        """(y, the call): x [..., K] that is `usable`, launched the ordinary way."""
        device = x.get_device()
        made = cls(weights, device, current_stream(device))
        with torch.cuda.device(device):
            return made._launch(x), made

    def _launch(self, x: Tensor) -> Tensor:
        weights, outputs, columns = self.weights, self._outputs, x.shape[-1]
        rows = x.numel() // columns
        config = wq_mm.config_for(x.device, weights.bits, rows, columns, outputs)
        counters = wq_mm.counters_of(x.device).get(blocks(outputs, config.rows))
        sums = _partial_sums(x.device, self._stream, config.splits * rows * outputs if config.splits > 1 else 0)
        y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
        sizes = (rows, outputs, columns, weights.qweight.shape[1] // WORDS, weights.params.shape[1], config.splits)
        symmetric, biased = weights.params.dtype == torch.float16, weights.bias is not None
        early = starts_early(x.device)
        constexprs = wq_mm.constants(rows, columns, weights.bits, weights.group_size, config, symmetric, biased, early)
        self._grid = blocks(outputs, config.rows), config.splits
        middle = (weights.qweight, weights.params, y if weights.bias is None else weights.bias)
        kernel = wq_mm._kernel
        launched = kernel[self._grid](x, *middle, y, sums if sums is not None else y, counters, *sizes, **constexprs)
        self._kernel = compiled(launched)
        self._run = self._kernel.run
        self._keep = counters, sums
        bias = None if weights.bias is None else weights.bias.data_ptr()
        self._arguments = weights.qweight.data_ptr(), weights.params.data_ptr(), bias
        self._last = counters.data_ptr(), *sizes, *in_order(kernel, constexprs)
        return y

    def __call__(self, x: Tensor) -> Tensor | None:
        """X [..., K] -> [..., N], or None if the ordinary way must be taken."""
        device = self._device
        if (
            not _plain(x)
            or x.get_device() != device
            or current_device() != device
            or current_stream(device) != self._stream
        ):
            return None
        qweight, params, bias = self._arguments
        y = x.new_empty(*x.shape[:-1], self._outputs)
        made, sums, kernel = y.data_ptr(), self._keep[1], self._kernel
        self._run(
            self._grid[0], self._grid[1], 1, self._stream, kernel.function, kernel.packed_metadata, None, None, None,
            x.data_ptr(), qweight, params, made if bias is None else bias, made, made if sums is None else sums.data_ptr(), *self._last,
        )  # fmt: skip
        return y


class ManyRows:
    """`many_rows` of the same weights again; `first` and the call as of `Call`."""

    __slots__ = ("_arguments", "_bias", "_config", "_constexprs", "_counters", "_device", "_kernel", "_last", "_stream", "weights")  # fmt: skip

    def __init__(self, weights: PackedWeights, x: Tensor, config: many_rows.Config) -> None:
        device = x.get_device()
        self.weights, self._config, self._device, self._stream = weights, config, device, current_stream(device)

    @classmethod
    def first(cls, x: Tensor, weights: PackedWeights) -> tuple[Tensor, ManyRows]:
        """(y, the call): x [..., K] that is `usable`, launched the ordinary way."""
        columns = x.shape[-1]
        config = many_rows.config_for(x.device, weights.bits, x.numel() // columns, columns, weights.outputs)
        made = cls(weights, x, config)
        with torch.cuda.device(x.get_device()):
            return made._launch(x), made

    def _sized(self, x: Tensor) -> tuple[tuple[int, int, int], tuple[int, ...], Tensor | None]:
        """(grid, sizes, memory of partial sums) for the rows of x."""
        rows, outputs, config, weights = x.numel() // x.shape[-1], self.weights.outputs, self._config, self.weights
        grid = many_rows.grid(rows, outputs, config)
        sizes = (rows, outputs, weights.qweight.shape[1] // WORDS, weights.params.shape[1], config.splits)
        needed = config.splits * rows * outputs if config.splits > 1 else 0
        return grid, sizes, _partial_sums(x.device, self._stream, needed)

    def _launch(self, x: Tensor) -> Tensor:
        weights, columns, config = self.weights, x.shape[-1], self._config
        check_group(columns, weights.group_size, weights.bits)
        most = many_rows.grid(many_rows.MOST_ROWS[weights.bits], weights.outputs, config)
        self._counters = wq_mm.counters_of(x.device).get(most[0] * most[1])
        symmetric, biased = weights.params.dtype == torch.float16, weights.bias is not None
        self._constexprs = many_rows.constants(
            columns, weights.bits, weights.group_size, config, symmetric, biased, starts_early(x.device)
        )
        grid, sizes, sums = self._sized(x)
        y = torch.empty((*x.shape[:-1], weights.outputs), dtype=x.dtype, device=x.device)
        kernel, middle = (
            many_rows._kernel,
            (weights.qweight, weights.params, y if weights.bias is None else weights.bias),
        )
        tiles = many_rows.tiles_of(x, config, self._constexprs)
        launched = kernel[grid](
            tiles, *middle, y, y if sums is None else sums, self._counters, *sizes, **self._constexprs
        )
        self._kernel = compiled(launched)
        self._arguments = weights.qweight.data_ptr(), weights.params.data_ptr()
        self._bias = None if weights.bias is None else weights.bias.data_ptr()
        self._last = in_order(kernel, self._constexprs)
        return y

    def __call__(self, x: Tensor) -> Tensor | None:
        """X [..., K] -> [..., N], or None if the ordinary way must be taken."""
        device = self._device
        if (
            not _plain(x)
            or x.get_device() != device
            or current_device() != device
            or current_stream(device) != self._stream
        ):
            return None
        grid, sizes, sums = self._sized(x)
        y = x.new_empty(*x.shape[:-1], self.weights.outputs)
        made, kernel = y.data_ptr(), self._kernel
        kernel.run(
            *grid, self._stream, kernel.function, kernel.packed_metadata, None, None, None,
            many_rows.tiles_of(x, self._config, self._constexprs), *self._arguments, made if self._bias is None else self._bias, made,
            made if sums is None else sums.data_ptr(), self._counters.data_ptr(), *sizes, *self._last,
        )  # fmt: skip
        return y


class Unpacking:
    """`dequant` of the same weights again; `first` and the call as of `Call`."""

    __slots__ = ("_device", "_dtype", "_head", "_kernel", "_last", "_shape", "_stream", "weights")

    def __init__(self, weights: PackedWeights, x: Tensor) -> None:
        device = x.get_device()
        self.weights, self._dtype, self._device, self._stream = weights, x.dtype, device, current_stream(device)

    @classmethod
    def first(cls, x: Tensor, weights: PackedWeights) -> tuple[Tensor, Unpacking]:
        """(the matrix [N, K] in x's dtype, the call)."""
        made = cls(weights, x)
        with torch.cuda.device(x.get_device()):
            return made._launch(x), made

    def _launch(self, x: Tensor) -> Tensor:
        weights, rows, columns = self.weights, self.weights.outputs, x.shape[-1]
        check_group(columns, weights.group_size, weights.bits)
        tiles, groups = weights.qweight.shape[1] // WORDS, weights.params.shape[1]
        sizes = (rows, columns, tiles, groups, weights.group_size)
        constexprs = dequant.constants(columns, weights.bits, weights.params.dtype == torch.float16)
        grid, kernel = dequant.grid(rows, tiles), dequant._kernel
        out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        launched = kernel[grid](weights.qweight, weights.params, out, *sizes, **constexprs)
        self._kernel = compiled(launched)
        self._shape = rows, columns
        launch = (*grid, 1, self._stream, self._kernel.function, self._kernel.packed_metadata, None, None, None)
        self._head = (*launch, weights.qweight.data_ptr(), weights.params.data_ptr())
        self._last = *sizes, *in_order(kernel, constexprs)
        return out

    def __call__(self, x: Tensor) -> Tensor | None:
        """The matrix [N, K], or None if the ordinary way must be taken."""
        device = self._device
        if (
            capturing()
            or x.get_device() != device
            or current_device() != device
            or current_stream(device) != self._stream
        ):
            return None
        out = x.new_empty(self._shape)
        self._kernel.run(*self._head, out.data_ptr(), *self._last)
        return out


def for_many(x: Tensor, bits: int, outputs: int) -> tuple[type[ManyRows | Unpacking], Hashable]:
    """Which class answers for more rows than `wq_mm` takes, and what its calls of the same weights have to be told apart by."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    if rows <= many_rows.most_rows(x.device, bits, columns):
        return ManyRows, many_rows.config_for(x.device, bits, rows, columns, outputs)
    return Unpacking, None


def _partial_sums(device: torch.device, stream: int, count: int) -> Tensor | None:
    """Float32 memory that every product of this stream may use until it is done."""
    if not count:
        return None
    key = device.index or 0, stream
    if key not in _sums or len(_sums[key]) < count:
        _sums[key] = torch.empty(count, dtype=torch.float32, device=device)
    return _sums[key]
