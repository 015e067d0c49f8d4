"""A GGUF file in llama.cpp, through the C functions that llama-cpp-python binds (its `Llama` class samples and caches).

One sequence at a time, cache emptied before each, every position's logits returned. llama.cpp multiplies quantized
weights with activations that it quantizes to 8 bits itself, so its logits on a quantized file are near, not equal to,
those of the dequantized weights; on an f32 file with an f32 cache they agree to rounding.
"""

import ctypes
import sys

import llama_cpp as c
import numpy as np

GGML_TYPE = {"f32": 0, "f16": 1}
ERROR_LEVEL = 4


@c.llama_log_callback
def _log(level, text, _data):
    if level == ERROR_LEVEL:
        sys.stderr.write(text.decode(errors="replace"))


def start():
    """Load llama.cpp's backends; from here on only errors are logged, to stderr."""
    c.llama_log_set(_log, ctypes.c_void_p(0))
    c.llama_backend_init()


class Model:
    """A loaded GGUF model with a context of `context` tokens and a key-value cache of type `cache`."""

    def __init__(self, path, context=512, cache="f16", threads=1):
        start()
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = context
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_TYPE[cache]
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self.vocab = c.llama_model_get_vocab(self.model)
        self.vocab_size = c.llama_vocab_n_tokens(self.vocab)
        self.batch = c.llama_batch_init(context, 0, 1)
        self.length = 0

    def tokenize(self, text, special=False):
        """Token ids int32 of `text`, with whatever the file says about beginning-of-text."""
        data = text.encode()
        ids = (c.llama_token * (len(data) + 8))()
        count = c.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, special)
        if count < 0:
            raise SystemExit(f"llama.cpp cannot tokenize the text ({count})")
        return np.frombuffer(ids, np.int32, count).copy()

    def logits(self, tokens):
        """Float32 [len(tokens), vocabulary] after emptying the cache."""
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        self.length = 0
        return self.extend(tokens)

    def extend(self, tokens):
        """Float32 [len(tokens), vocabulary] of `tokens` appended to what the cache holds."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), self.length + i, 1, 1
            batch.seq_id[i][0] = 0
        status = c.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        self.length += len(tokens)
        pointer = ctypes.cast(c.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (len(tokens), self.vocab_size)).copy()

    def continue_greedily(self, tokens, count):
        """The `count` most likely tokens, int32, that follow `tokens` one after the other."""
        row = self.logits(tokens)[-1]
        chosen = []
        for _ in range(count):
            chosen.append(int(row.argmax()))
            row = self.extend(chosen[-1:])[-1]
        return np.array(chosen, np.int32)
