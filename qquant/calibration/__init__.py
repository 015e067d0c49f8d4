"""What the model reads while it is measured: texts and chats become one seeded, hashed, accounted set of token samples.

    sources --sources.py--> texts, chats --tokenizer.py, chats.py--> samples --samples.py--> CalibrationSet

Texts    the documents of a source are joined by a blank line and cut into windows of `length` tokens, without overlap; as many as are
         asked for are drawn, one from each of as many equal stretches, so that they spread over the whole source.
Chats    one chat is one sample, rendered with the checkpoint's own template, never packed with another, never padded, cut to its first
         `length` *tokens* (the published recipe of Qwen slices the list of texts instead, so it truncates nothing).
System   a model behaves differently under the default system turn of its template and under others, so `default_system_share` of the
         chats carry it. Chats that bring a system turn keep it; the rest get one of calibration/system-turns.yaml, in their language.
Stop     a model that never saw its end-of-turn token while it was measured forgets to stop, so each assistant turn is followed by it.
Counts   rows read = rows kept + rows dropped, by reason, with the place of the first. No sample is used twice.

`heldout` reads the evaluation texts, `require_apart` refuses those that a set was drawn from. Nothing here imports torch.
Left out: images and tools in chats, packing, `.json` arrays.
"""

from qquant.calibration.heldout import heldout, require_apart, shared_runs
from qquant.calibration.samples import CalibrationSet, load
from qquant.calibration.sources import corpora, heldout_texts
from qquant.calibration.tokenizer import Tokenizer

__all__ = ["CalibrationSet", "Tokenizer", "corpora", "heldout", "heldout_texts", "load", "require_apart", "shared_runs"]
