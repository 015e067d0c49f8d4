"""llama_quantize.py SOURCE.gguf TARGET.gguf TYPE [--imatrix FILE.gguf]: what llama-quantize does, through libllama.

The importance matrix is a GGUF file (`NAME.in_sum2`, `NAME.counts`, three `imatrix.*` keys); its entries go to libllama
as sum of squares / count, and the four `quantize.imatrix.*` keys are written into the target as llama-quantize does.
With TYPE f32 and --requantize libllama dequantizes a quantized file: its logits then show how llama.cpp reads the blocks,
without the 8-bit rounding of activations that its quantized multiplications add.
Prints JSON: bytes, seconds and peak memory.
"""

import argparse
import ctypes
from pathlib import Path

import llama_cpp as c
import numpy as np
from gguf import GGUFReader
from llama_model import start
from quantizing import Stopwatch

FTYPES = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): value
    for name, value in vars(c).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_")
} | {"f32": c.LLAMA_FTYPE_ALL_F32}


def read_imatrix(path):
    """({weight name: float32 mean of squares}, first data set's name or None, number of chunks)."""
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    entries = {}
    for name in [name for name in tensors if name.endswith(".in_sum2")]:
        weight = name.removesuffix(".in_sum2")
        sums = np.atleast_2d(tensors[name])
        counts = tensors[f"{weight}.counts"].reshape(-1, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            entries[weight] = np.where(counts > 0, sums / counts, np.float32(1)).astype(np.float32).ravel()
    datasets = reader.get_field("imatrix.datasets").contents()
    return entries, datasets[0] if datasets else None, reader.get_field("imatrix.chunk_count").contents()


def imatrix_array(entries):
    """The entries as libllama takes them: an array that ends with a null name."""
    array = (c.llama_model_imatrix_data * (len(entries) + 1))()
    for slot, (name, values) in zip(array, entries.items(), strict=False):
        data = (ctypes.c_float * values.size)(*values)
        slot.name, slot.data, slot.size = name.encode(), data, values.size
    return array


def override_array(pairs):
    """Metadata to add, strings or integers, as an array that ends with an empty key."""
    array = (c.llama_model_kv_override * (len(pairs) + 1))()
    for slot, (key, value) in zip(array, pairs.items(), strict=False):
        slot.key = key.encode()
        if isinstance(value, str):
            slot.tag, slot.value.val_str = c.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
        else:
            slot.tag, slot.value.val_i64 = c.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return array


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("type", type=str.lower, choices=sorted(FTYPES))
    parser.add_argument("--imatrix")
    parser.add_argument("--pure", action="store_true", help="one type for every matrix")
    parser.add_argument("--requantize", action="store_true", help="take a quantized source (with f32: dequantize it)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    watch = Stopwatch()
    start()
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FTYPES[args.type], args.threads, args.pure
    params.allow_requantize = args.requantize
    if args.imatrix:
        entries, dataset, chunks = read_imatrix(args.imatrix)
        pairs = {"quantize.imatrix.file": args.imatrix}
        if dataset is not None:
            pairs["quantize.imatrix.dataset"] = dataset
        pairs |= {"quantize.imatrix.entries_count": len(entries), "quantize.imatrix.chunks_count": int(chunks)}
        imatrix, overrides = imatrix_array(entries), override_array(pairs)
        params.imatrix, params.kv_overrides = imatrix, overrides
    status = c.llama_model_quantize(args.source.encode(), str(args.target).encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")
    watch.report(bytes=args.target.stat().st_size)


if __name__ == "__main__":
    main()
