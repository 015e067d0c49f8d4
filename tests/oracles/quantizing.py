"""What the runners that quantize share: the calibration tokens, the rotary base, the tokenizer files, the report.

transformers 4 reads the rotary base from `rope_theta` and silently takes 10,000 where a config written by transformers 5
has only `rope_parameters`: a tool on top of it would quantize a broken model. So they are told the base.
"""

import json
import os
import resource
import shutil
import time
from pathlib import Path

from safetensors.numpy import load_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")


def read_samples(path):
    """The calibration samples, lists of token ids, from `tokens` int32 [samples, length]."""
    return load_file(path)["tokens"].tolist()


def rope_base(folder):
    """The base of the rotary embedding, wherever config.json states it."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]


def copy_tokenizer(source, target):
    """Put the source's tokenizer files beside the quantized weights."""
    for name in TOKENIZER_FILES:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), Path(target, name))


class Stopwatch:
    """Seconds since it was made, processor seconds and peak memory of the process, as one line of JSON.

    Processor seconds count every thread from the process's start, and children that have ended (compilers).
    """

    def __init__(self):
        self.begin = time.perf_counter()

    def report(self, **more):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        processor = sum(os.times()[:4])
        seconds = {"seconds": round(time.perf_counter() - self.begin, 1), "processor_seconds": round(processor, 1)}
        print(json.dumps({**seconds, "peak_mb": peak, **more}))
