"""Chats, templates of Qwen1.5, and calibrations that take them."""

import json

from qquant.recipe import Calibration, Source
from qquant.resources import data_dir

TINY = data_dir("recipes") / "demo" / "tiny-qwen1.5"
START, END = "<|im_start|>", "<|im_end|>"

# Qwen1.5's templates: 2024-02-06 (the last turn stays open), and 2024-04-30 (every turn is closed).
FEBRUARY = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
APRIL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def talk(*turns, system=None):
    """A chat of alternating user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]


def chat_file(path, chats):
    path.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats))
    return path


def many(count, **options):
    return [
        talk(f"What is {i} plus {i}?", f"It is {2 * i}.", "And one more?", f"{2 * i + 1}.", **options)
        for i in range(count)
    ]


def spec(*sources, **options):
    return Calibration(sources=sources, **{"samples": 8, "length": 64, "default_system_share": 0.0, **options})


def chats_spec(path, **options):
    return spec(Source(path=str(path), kind="chat"), **options)


def prose(count):
    return "\n\n".join(
        f"Paragraph {i} tells of {i * 7919 % 1000} ships and {i * 104729 % 1000} sailors." for i in range(count)
    )
