"""The Modelfile with which `ollama create NAME -f Modelfile-q4_k_m` makes a GGUF file a model of Ollama.

    FROM ./qwen1_5-7b-chat-q4_k_m.gguf
    TEMPLATE   ChatML in Go's template language, where the checkpoint's own template writes ChatML; the bare prompt where the
               checkpoint has no template. For any other template the line is left out: Ollama then looks at the file's metadata.
    SYSTEM     what that template says when nobody sets a system message
    PARAMETER  sampling of generation_config.json, and the texts on which an answer ends

Ollama reads no models in parts, so the Modelfile of one names the file that llama-gguf-split joins them to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qquant.calibration.template import Template
from qquant.errors import InputError
from qquant.formats.gguf.metadata import chat_template
from qquant.formats.planned import PlannedFile
from qquant.source.confined import Refused
from qquant.source.untrusted import read_json

CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
PLAIN = "{{ .Prompt }}"
STOPS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # of generation_config.json, and Ollama's names
QUOTES = '"""'


def name(type_name: str) -> str:
    """File name of the Modelfile of a GGUF type."""
    return f"Modelfile-{type_name}"


def modelfile(checkpoint: Path, stem: str, type_name: str, files: Sequence[str]) -> PlannedFile:
    """The Modelfile for `files` of the checkpoint in folder `checkpoint`; `stem` is the file name without .gguf."""
    content = "\n".join(_lines(checkpoint, stem, type_name, files)).encode()
    return PlannedFile(name(type_name), len(content), content)


def _lines(checkpoint: Path, stem: str, type_name: str, files: Sequence[str]) -> Iterator[str]:
    settings, generation = (
        read_json(checkpoint / name) if (checkpoint / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    if len(files) > 1:
        yield f"# Ollama reads no model in parts. First: llama-gguf-split --merge {files[0]} {stem}.gguf"
    yield f"# ollama create {stem} -f {name(type_name)}"
    yield f"FROM ./{stem}.gguf"
    text = chat_template(checkpoint, settings)
    if text is None:
        yield f"TEMPLATE {QUOTES}{PLAIN}{QUOTES}"
    else:
        system = chatml_system(text)
        if system is not None:
            yield f"TEMPLATE {QUOTES}{CHATML}{QUOTES}"
        if system and QUOTES not in system:
            yield f"SYSTEM {QUOTES}{system}{QUOTES}"
    for key, parameter in PARAMETERS.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"PARAMETER {parameter} {value}"
    yield from (f'PARAMETER stop "{stop}"' for stop in (STOPS if text is not None else STOPS[2:]))
    yield ""


@functools.cache  # every file of a checkpoint asks
def chatml_system(text: str) -> str | None:
    """The system message that chat template `text` adds by itself, "" if none; None if it does not write ChatML."""
    talk = [{"role": role, "content": f"a {role}"} for role in ("system", "user", "assistant", "user")]
    try:
        chats = [{"messages": messages} for messages in (talk, talk[1:2])]
        written, alone = Template(text, "chat template").render(chats, {"add_generation_prompt": True, "tools": None})
    except (InputError, Refused):
        return None
    rest = chatml(talk[1:2])
    opening, closing = "<|im_start|>system\n", "<|im_end|>\n"
    if written != chatml(talk) or not alone.endswith(rest):
        return None
    before = alone.removesuffix(rest)
    if not before:
        return ""
    framed = before.startswith(opening) and before.endswith(closing)
    return before[len(opening) : -len(closing)] if framed else None


def chatml(messages: Sequence[Mapping[str, str]]) -> str:
    """A chat as `CHATML` writes it."""
    said = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return f"{said}<|im_start|>assistant\n"
