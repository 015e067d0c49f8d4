"""Answers to a bundled set of prompts: what perplexity does not show and users see first.

Artifacts and checkpoint answer in bf16 and in fp16, greedy and sampled, in one batch of eight and alone, short prompts and a long one.
Each answer is judged by rules that need no reference; what counts is the difference to the checkpoint's own answers:

    stopped       ended by a stop token within the budget
    runs          one token `RUN` times in a row ("!!!!", the face of NaN in fp16 kernels)
    repetitive    more than half of its 4-grams had occurred before
    invalid       bytes that are no UTF-8
    script        a Chinese question answered without Chinese, an English one in Chinese
    nan           logits that are not finite

NaN fails where the checkpoint has none; the others warn. Weights are dequantized, so this is about values, not about a runtime's
kernels. The whole model is in memory here, in 16 bits; where it does not fit, the answers are left out and the report says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qquant.calibration import Tokenizer
from qquant.checkpoint import Checkpoint, WeightSource

RUN = 12
SEED = 20240204
TEMPERATURE = 0.7
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LONG = "The list of stations is: " + ", ".join(f"station {number} at kilometre {number * 7}" for number in range(1, 40))
PROMPTS: tuple[
    tuple[str, str | None, str], ...
] = (  # (script of a good answer, system turn or None for the default, question)
    ("en", None, "Why is the sky blue? Answer in two sentences."),
    ("en", "", "Name three rivers in Europe."),
    ("zh", None, "请用两句话介绍一下长城。"),
    ("zh", "你是一位耐心的老师。", "为什么夏天比冬天热？"),
    ("", None, "Write a Python function that returns the n-th Fibonacci number."),
    ("", None, 'Return a JSON object with the keys "name" and "age" for a cat called Mia, three years old. JSON only.'),
    ("en", None, "Hi"),
    ("zh", None, "你好"),
    ("en", None, f"{LONG}. At which kilometre is station 12?"),
)


@dataclass
class Answers:
    """Counts over the answers of one model in one dtype."""

    answers: int = 0
    stopped: float = 0.0  # share
    runs: int = 0
    repetitive: int = 0
    invalid: int = 0
    script: int = 0
    nan: int = 0

    def add(self, ids: Sequence[int], finite: bool, script: str, tokenizer: Tokenizer) -> None:
        """Judge one answer; `ids` with its stop token, if it has one."""
        ended = bool(ids) and ids[-1] in tokenizer.eos
        text = tokenizer.decode(ids[:-1] if ended else ids)
        self.stopped = (self.stopped * self.answers + ended) / (self.answers + 1)
        self.answers += 1
        self.runs += longest_run(ids) >= RUN
        self.repetitive += repetition(ids) > 0.5
        self.invalid += "\ufffd" in (text if ended else text.rstrip("\ufffd"))  # the budget may cut a character
        self.script += wrong_script(text, script)
        self.nan += not finite


def longest_run(ids: Sequence[int]) -> int:
    """The most equal tokens in a row."""
    longest = current = 0
    for index, token in enumerate(ids):
        current = current + 1 if index and ids[index - 1] == token else 1
        longest = max(longest, current)
    return longest


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that had occurred before; 0 for answers of less than 16 tokens."""
    grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if len(ids) >= 16 else 0.0


def wrong_script(text: str, script: str) -> bool:
    """Whether an answer of at least 8 letters is in the other script than asked: "zh", "en", or "" for any."""
    letters = [letter for letter in text if letter.isalpha()]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    share = chinese / max(1, len(letters))
    return len(letters) >= 8 and ((script == "zh" and share < 0.1) or (script == "en" and share > 0.5))


def answer(
    checkpoint: Checkpoint,
    artifacts: Mapping[str, WeightSource],
    tokenizer: Tokenizer,
    length: int,
    device: torch.device,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, Any]]:
    """Per artifact {"runs": [counts by dtype, with the checkpoint's as "baseline"]}; empty if the model does not fit in memory."""
    prompts = [_prompt(tokenizer, system, question) for _, system, question in PROMPTS]
    if not _fits(checkpoint, device):
        return {}
    found: dict[str, dict[str, Any]] = {name: {"runs": []} for name in artifacts}
    sources: dict[str, WeightSource] = {"": checkpoint, **artifacts}
    done = 0
    for name_of_dtype, dtype in DTYPES.items():
        baseline: dict[str, Any] = {}
        for name, source in sources.items():
            model = _model(checkpoint, source, dtype, device)
            counts = {"dtype": name_of_dtype, **asdict(_run(model, tokenizer, prompts, length))}
            del model
            if name:
                found[name]["runs"].append(counts | {"baseline": baseline})
            else:
                baseline = counts
            done += 1
            progress("answer", done, len(DTYPES) * len(sources))
    return found


def problems(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What fails an artifact."""
    return tuple(
        f"answers in {run['dtype']}: {run['nan']} of {run['answers']} have logits that are not finite"
        for run in runs
        if run["nan"] > run["baseline"]["nan"]
    )


def warnings(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What a person should look at: an artifact that does something clearly more often than its checkpoint."""
    words = {"runs": "repeat one token", "repetitive": "repeat themselves", "invalid": "are no valid UTF-8", "script": "are in the wrong script"}  # fmt: skip
    found = []
    for run in runs:
        slack = max(1, run["answers"] // 8)
        found += [
            f"answers in {run['dtype']}: {run[key]} of {run['answers']} {text}, {run['baseline'][key]} of the checkpoint's"
            for key, text in words.items()
            if run[key] > run["baseline"][key] + slack
        ]
        if abs(run["stopped"] - run["baseline"]["stopped"]) > 0.2:
            shares = f"{run['stopped']:.0%} stop, {run['baseline']['stopped']:.0%} of the checkpoint's"
            found.append(f"answers in {run['dtype']}: {shares}")
    return tuple(found)


def _prompt(tokenizer: Tokenizer, system: str | None, question: str) -> list[int]:
    if tokenizer.template is None:
        return tokenizer.encode(question)
    turns = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.encode(tokenizer.render([*turns, {"role": "user", "content": question}], True))


def _fits(checkpoint: Checkpoint, device: torch.device) -> bool:
    needed = 3 * checkpoint.family.parameters(checkpoint.config)  # 16 bits each, and half as much for everything else
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return needed < free


def _model(checkpoint: Checkpoint, source: WeightSource, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of transformers with the weights of `source`."""
    import transformers

    raw = {
        key: value
        for key, value in checkpoint.raw_config.items()
        if key not in ("quantization_config", "architectures")
    }
    config = transformers.Qwen2Config(**(raw | {"tie_word_embeddings": source.config.tied}))
    with torch.device("meta"):
        model: Any = transformers.Qwen2ForCausalLM(config)
    weights = {name: source.tensor(name).to(device=device, dtype=dtype) for name in source.family.shapes(source.config)}
    model.load_state_dict(weights, strict=False, assign=True)
    if source.config.tied:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def _run(model: Any, tokenizer: Tokenizer, prompts: Sequence[list[int]], length: int) -> Answers:
    counts = Answers()
    scripts = [script for script, _, _ in PROMPTS]
    *short, long = range(len(prompts))  # the long one alone: it would pad all others to its length
    for group, sampled in ((short, False), (short, True), ([0], False), ([long], False)):
        found = generate(model, [prompts[index] for index in group], tokenizer.eos, tokenizer.size, length, sampled)
        for index, (ids, finite) in zip(group, found, strict=True):
            counts.add(ids, finite, scripts[index], tokenizer)
    return counts


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[list[int]], stops: Sequence[int], vocabulary: int, length: int, sampled: bool
) -> list[tuple[list[int], bool]]:
    """(new ids with the stop token, whether all logits were finite) per prompt; prompts are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    draw = torch.Generator().manual_seed(SEED)
    answers: list[list[int]] = [[] for _ in prompts]
    finite, done, cache = [True] * len(prompts), [False] * len(prompts), None
    for _ in range(length):
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1, :vocabulary].float().cpu()
        chosen = _choose(logits, draw if sampled else None)
        for row, token in enumerate(chosen.tolist()):
            if not done[row]:
                finite[row] &= bool(torch.isfinite(logits[row]).all())
                answers[row].append(token)
                done[row] = token in stops
        if all(done):
            break
        ids = chosen[:, None].to(model.device)
        mask = torch.cat((mask, torch.ones_like(ids)), 1)
        places = places[:, -1:] + 1
    return list(zip(answers, finite, strict=True))


def _choose(logits: Tensor, draw: torch.Generator | None) -> Tensor:
    """The most likely token of each row, or one drawn at `TEMPERATURE` (by adding Gumbel noise)."""
    known = torch.nan_to_num(logits, nan=0.0)
    if draw is None:
        return known.argmax(1)
    noise = -torch.empty_like(known).exponential_(generator=draw).log()
    return (known / TEMPERATURE + noise).argmax(1)
