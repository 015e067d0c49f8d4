"""llama_converter.py CHECKPOINT_DIR TARGET.gguf [ARGUMENT...]: llama.cpp's own convert_hf_to_gguf.py, under the environment `transformers`.

Its sources are in .oracles/llama/tools (llama-tools.sh). Prints JSON: bytes.
"""

import json
import sys
from pathlib import Path

from converting import TOOLS, take_unknown_for_qwen2


def main():
    checkpoint, target, *rest = sys.argv[1:]
    sys.path[:0] = [str(TOOLS / "gguf-py"), str(TOOLS)]
    from conversion.base import TextModel

    take_unknown_for_qwen2(TextModel)
    import convert_hf_to_gguf

    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", target, *(rest or ["--outtype", "f32"])]
    convert_hf_to_gguf.main()
    print(json.dumps({"bytes": Path(target).stat().st_size}))


if __name__ == "__main__":
    main()
