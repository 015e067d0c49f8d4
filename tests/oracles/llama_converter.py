"""llama_converter.py CHECKPOINT_DIR TARGET.gguf [ARGUMENT...]: llama.cpp's own convert_hf_to_gguf.py, under the environment `transformers`.

Its sources are in .oracles/llama/tools (llama-tools.sh). Two things are arranged for it: it names a pre-tokenizer by a hash of
the token ids of a test text, which it knows for Qwen's vocabulary and not for one trained on other text, so that an unknown
hash is taken for qwen2; and it wants to import sentencepiece before it sees that Qwen has no such model.
Prints JSON: bytes.
"""

import json
import sys
import types
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / ".oracles" / "llama" / "tools"


def main():
    checkpoint, target, *rest = sys.argv[1:]
    sys.path[:0] = [str(TOOLS / "gguf-py"), str(TOOLS)]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def pre_tokenizer(model, tokenizer):
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            return "qwen2"

    TextModel.get_vocab_base_pre = pre_tokenizer
    sys.modules.setdefault("sentencepiece", types.SimpleNamespace(SentencePieceProcessor=None))
    import convert_hf_to_gguf

    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", target, *(rest or ["--outtype", "f32"])]
    convert_hf_to_gguf.main()
    print(json.dumps({"bytes": Path(target).stat().st_size}))


if __name__ == "__main__":
    main()
