"""What the runners share that call llama.cpp's converter (.oracles/llama/tools, by llama-tools.sh).

It names a pre-tokenizer by a hash of the token ids of a test text, which it knows for Qwen's vocabulary and not for one trained on
other text, so that an unknown hash is taken for qwen2; and it wants to import sentencepiece before it sees that Qwen has no such model.
"""

import sys
import types
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / ".oracles" / "llama" / "tools"


def take_unknown_for_qwen2(text_model):
    """Let the converter's class `TextModel` pass with tokenizers of Qwen's kind that are not Qwen's."""
    known = text_model.get_vocab_base_pre

    def pre_tokenizer(model, tokenizer):
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            return "qwen2"

    text_model.get_vocab_base_pre = pre_tokenizer
    sys.modules.setdefault("sentencepiece", types.SimpleNamespace(SentencePieceProcessor=None))
