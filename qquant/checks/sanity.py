"""Answers to a bundled set of prompts: what perplexity does not show and users see first.

Artifacts and checkpoint answer in bf16 and in fp16:

    short, batch 8     all short prompts together, greedy and sampled (seeded)
    short, batch 1     each alone, greedy
    long, batch 1, 8   a list of 39 stations, and questions about it, greedy

Each answer is judged by rules that need no reference; what counts is the difference to the checkpoint's answer to the same prompt:

    stopped       ended by a stop token within the budget
    runs          one token `RUN` times in a row ("!!!!", the face of NaN in fp16 kernels)
    repetitive    more than half of its 4-grams had occurred before
    invalid       bytes that are no UTF-8
    script        a Chinese question answered without Chinese, an English one in Chinese
    nan           logits that are not finite

NaN fails where the checkpoint has none. Stopping less often and runs fail where they are proven (McNemar's exact test on the pairs);
every other difference of more than `SLACK` answers is a warning. Weights are dequantized, so this is about values, not about a runtime's
kernels; what the fp16 run forebodes, the head-room in fp16 (fidelity.py) says by block. The whole model is in memory here, in 16 bits; where it does not fit, the answers are left out and the report says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qquant.calibration import Tokenizer
from qquant.checkpoint import Checkpoint, WeightSource
from qquant.checks.statistics import mcnemar
from qquant.gates import ASKED

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
)
STATIONS = (12, 3, 39, 20, 7, 31, 16, 25)
LONG_PROMPTS = tuple(("en", None, f"{LONG}. At which kilometre is station {number}?") for number in STATIONS)
SLACK = 0.125  # of the answers


@dataclass(frozen=True)
class Group:
    """Prompts that are answered together."""

    prompts: tuple[tuple[str, str | None, str], ...]
    sampled: bool = False


GROUPS = (
    Group(PROMPTS),
    Group(PROMPTS, sampled=True),
    *(Group((prompt,)) for prompt in PROMPTS),
    Group(LONG_PROMPTS[:1]),
    Group(LONG_PROMPTS),
)


@dataclass
class Answers:
    """What each answer of one model in one dtype did, in the order of `GROUPS`."""

    stopped: list[bool] = field(default_factory=list)
    runs: list[bool] = field(default_factory=list)
    repetitive: list[bool] = field(default_factory=list)
    invalid: list[bool] = field(default_factory=list)
    script: list[bool] = field(default_factory=list)
    nan: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], finite: bool, script: str, tokenizer: Tokenizer) -> None:
        """Judge one answer; `ids` with its stop token, if it has one."""
        ended = bool(ids) and ids[-1] in tokenizer.eos
        text = tokenizer.decode(ids[:-1] if ended else ids)
        self.stopped.append(ended)
        self.runs.append(longest_run(ids) >= RUN)
        self.repetitive.append(repetition(ids) > 0.5)
        self.invalid.append("\ufffd" in (text if ended else text.rstrip("\ufffd")))  # the budget may cut a character
        self.script.append(wrong_script(text, script))
        self.nan.append(not finite)

    def counts(self) -> dict[str, float]:
        """How many of the answers; of those that stopped, the share."""
        number = len(self.stopped)
        counted: dict[str, float] = {name: sum(which) for name, which in vars(self).items()}
        return {"answers": number} | counted | {"stopped": counted["stopped"] / max(1, number)}

    def proven_worse(self, baseline: Answers) -> list[str]:
        """Names of what fails if it is worse beyond chance, and is."""
        pairs = {
            "stopped": [(not mine, not theirs) for mine, theirs in zip(self.stopped, baseline.stopped, strict=True)],
            "runs": list(zip(self.runs, baseline.runs, strict=True)),
        }
        found = []
        for name, both in pairs.items():
            worse, better = sum(mine > theirs for mine, theirs in both), sum(theirs > mine for mine, theirs in both)
            if mcnemar(worse, better) <= ASKED / len(pairs):
                found.append(name)
        return found


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
    if not _fits(checkpoint, device):
        return {}
    found: dict[str, dict[str, Any]] = {name: {"runs": []} for name in artifacts}
    sources: dict[str, WeightSource] = {"": checkpoint, **artifacts}
    done = 0
    for name_of_dtype, dtype in DTYPES.items():
        baseline = Answers()
        for name, source in sources.items():
            model = _model(checkpoint, source, dtype, device)
            answers = _run(model, tokenizer, length)
            del model
            if name:
                more = {"dtype": name_of_dtype, "worse": answers.proven_worse(baseline), "baseline": baseline.counts()}
                found[name]["runs"].append(answers.counts() | more)
            else:
                baseline = answers
            done += 1
            progress("answer", done, len(DTYPES) * len(sources))
    return found


WORDS = {
    "runs": "repeat one token",
    "repetitive": "repeat themselves",
    "invalid": "are no valid UTF-8",
    "script": "are in the wrong script",
}


def problems(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What fails an artifact."""
    found = []
    for run in runs:
        where, number, theirs = f"answers in {run['dtype']}", run["answers"], run["baseline"]
        if run["nan"] > theirs["nan"]:
            found.append(f"{where}: {run['nan']} of {number} have logits that are not finite")
        if "runs" in run["worse"]:
            found.append(f"{where}: {run['runs']} of {number} repeat one token, {theirs['runs']} of the checkpoint's")
        if "stopped" in run["worse"]:
            found.append(f"{where}: {run['stopped']:.0%} stop, {theirs['stopped']:.0%} of the checkpoint's")
    return tuple(found)


def warnings(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What a person should look at: an artifact that does something clearly more often than its checkpoint."""
    found = []
    for run in runs:
        where, theirs = f"answers in {run['dtype']}", run["baseline"]
        found += [
            f"{where}: {run[key]} of {run['answers']} {text}, {theirs[key]} of the checkpoint's"
            for key, text in WORDS.items()
            if run[key] > theirs[key] + max(1, SLACK * run["answers"]) and key not in run["worse"]
        ]
        if abs(run["stopped"] - theirs["stopped"]) > SLACK and "stopped" not in run["worse"]:
            found.append(f"{where}: {run['stopped']:.0%} stop, {theirs['stopped']:.0%} of the checkpoint's")
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


def _run(model: Any, tokenizer: Tokenizer, length: int) -> Answers:
    answers = Answers()
    for group in GROUPS:
        prompts = [_prompt(tokenizer, system, question) for _, system, question in group.prompts]
        found = generate(model, prompts, tokenizer.eos, tokenizer.size, length, group.sampled)
        for (script, _, _), (ids, finite) in zip(group.prompts, found, strict=True):
            answers.add(ids, finite, script, tokenizer)
    return answers


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
