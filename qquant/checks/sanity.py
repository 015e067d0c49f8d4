"""Answers to a bundled set of prompts: what perplexity does not show and users see first.

Artifacts and checkpoint answer in bf16 and in fp16:

    short, batch 8     all short prompts together, greedy and sampled (seeded)
    short, batch 1     each alone, greedy, with the answer in the batch as a draft (decoding.py)
    long, batch 8, 1   a list of 39 stations, and questions about it, greedy

Each answer is judged by rules that need no reference; what counts is the difference to the checkpoint's answer to the same prompt:

    stopped       ended by a stop token within the budget
    runs          one token `RUN` times in a row ("!!!!", the face of NaN in fp16 kernels)
    repetitive    more than half of its 4-grams had occurred before
    invalid       bytes that are no UTF-8
    script        a Chinese question answered without Chinese, an English one in Chinese
    nan           logits that are not finite

NaN fails where the checkpoint has none. Everything else counts where it is proven, by McNemar's exact test on pairs of questions: stopping
less often and runs fail, the rest is a warning. A small model repeats itself now and then, its artifacts at other places, and a few answers
more are chance. A question is a prompt and a way to choose; its answers alone and in a batch are two looks at one thing, so that they count as
one pair, worse where more of them are worse than better. Weights are dequantized, so this is about values, not about a runtime's kernels;
what the fp16 run forebodes, the head-room in fp16 (fidelity.py) says by block. The whole model is in memory here, in 16 bits; where it
does not fit, the answers are left out and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qquant.calibration import Tokenizer
from qquant.checks.decoding import Chooser, PromptDecoder
from qquant.checks.statistics import mcnemar
from qquant.devices import free_memory
from qquant.families.weights import WeightSource
from qquant.progress import Progress, SharedProgress
from qquant.recipe.limits import ASKED
from qquant.report import record as report
from qquant.report.record import AnswerCounts, AnswerRun
from qquant.source.checkpoint import Checkpoint

RUN = 12
SEED = 20240204
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LONG = "The list of stations is: " + ", ".join(f"station {number} at kilometre {number * 7}" for number in range(1, 40))
Prompt = tuple[str, str | None, str]  # script of a good answer, system turn or None for the default, question
PROMPTS: tuple[Prompt, ...] = (
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
FAILING = ("stopped", "runs")
WARNING = ("repetitive", "invalid", "script", "stopping")  # the last: more of them stop


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are answered together."""

    prompts: tuple[Prompt, ...]
    sampled: bool = False


GROUPS = (
    PromptGroup(PROMPTS),
    PromptGroup(PROMPTS, sampled=True),
    *(PromptGroup((prompt,)) for prompt in PROMPTS),
    PromptGroup(LONG_PROMPTS),
    PromptGroup(LONG_PROMPTS[:1]),
)

QUESTIONS = tuple((prompt, group.sampled) for group in GROUPS for prompt in group.prompts)


@dataclass
class AnswerMarks:
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

    def counts(self) -> AnswerCounts:
        """How many of the answers; of those that stopped, the share."""
        number = len(self.stopped)
        counted = {name: sum(which) for name, which in vars(self).items() if name != "stopped"}
        return AnswerCounts(number, sum(self.stopped) / max(1, number), **counted)

    def proven_worse(self, baseline: AnswerMarks) -> list[str]:
        """Names of what is worse beyond chance, `FAILING` at `ASKED` for one dtype, `WARNING` at `ASKED` for all dtypes."""
        pairs: dict[str, tuple[Sequence[bool], Sequence[bool]]] = {
            name: (getattr(self, name), getattr(baseline, name)) for name in ("runs", *WARNING[:-1])
        }
        pairs |= {"stopped": (baseline.stopped, self.stopped), "stopping": (self.stopped, baseline.stopped)}
        level = dict.fromkeys(FAILING, ASKED / len(FAILING))
        level |= dict.fromkeys(WARNING, ASKED / len(WARNING) / len(DTYPES))
        return [name for name, both in pairs.items() if mcnemar(*flips(*both)) <= level[name]]


def flips(mine: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int]:
    """(questions on which more of my answers are so than of theirs, questions on which less are), for answers in the order of `GROUPS`."""
    balance = dict.fromkeys(QUESTIONS, 0)
    for question, one, other in zip(QUESTIONS, mine, theirs, strict=True):
        balance[question] += one - other
    return sum(more > 0 for more in balance.values()), sum(more < 0 for more in balance.values())


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
    progress: Progress,
) -> dict[str, report.Answers]:
    """Per artifact its counts by dtype beside the checkpoint's; empty if the model does not fit in memory."""
    if not fits(checkpoint, device):
        return {}
    by_name: dict[str, list[AnswerRun]] = {name: [] for name in artifacts}
    sources: dict[str, WeightSource] = {"": checkpoint, **artifacts}
    models = 0
    for name_of_dtype, dtype in DTYPES.items():
        baseline = AnswerMarks()
        for name, source in sources.items():
            share = SharedProgress(progress, models, len(DTYPES) * len(sources))
            share.advance("answer", 0, len(QUESTIONS))
            share.at(f"model {models % len(sources) + 1} of {len(sources)} in {name_of_dtype}")
            answers = _run(PromptDecoder(source, dtype, device), tokenizer, length, share)
            models += 1
            if name:
                worse = tuple(answers.proven_worse(baseline))
                by_name[name].append(
                    AnswerRun(**vars(answers.counts()), dtype=name_of_dtype, worse=worse, baseline=baseline.counts())
                )
            else:
                baseline = answers
    return {name: report.Answers(tuple(runs)) for name, runs in by_name.items()}


WORDS = {"repetitive": "repeat themselves", "invalid": "are no valid UTF-8", "script": "are in the wrong script"}


def problems(runs: Sequence[AnswerRun]) -> tuple[str, ...]:
    """What fails an artifact."""
    faults = []
    for run in runs:
        where, number, theirs = f"answers in {run.dtype}", run.answers, run.baseline
        if run.nan > theirs.nan:
            faults.append(f"{where}: {run.nan} of {number} have logits that are not finite")
        if "runs" in run.worse:
            faults.append(f"{where}: {run.runs} of {number} repeat one token, {theirs.runs} of the checkpoint's")
        if "stopped" in run.worse:
            faults.append(f"{where}: {run.stopped:.0%} stop, {theirs.stopped:.0%} of the checkpoint's")
    return tuple(faults)


def warnings(runs: Sequence[AnswerRun]) -> tuple[str, ...]:
    """What a person should look at: an artifact that is proven to do something more often than its checkpoint."""
    lines = []
    for run in runs:
        where, theirs = f"answers in {run.dtype}", run.baseline
        lines += [
            f"{where}: {getattr(run, key)} of {run.answers} {text}, {getattr(theirs, key)} of the checkpoint's"
            for key, text in WORDS.items()
            if key in run.worse
        ]
        if "stopping" in run.worse:
            lines.append(f"{where}: {run.stopped:.0%} stop, {theirs.stopped:.0%} of the checkpoint's")
    return tuple(lines)


def _prompt(tokenizer: Tokenizer, system: str | None, question: str) -> list[int]:
    if tokenizer.template is None:
        return tokenizer.encode(question)
    turns = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.encode(tokenizer.render([*turns, {"role": "user", "content": question}], True))


def fits(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether the whole model fits into memory in 16 bits."""
    needed = 3 * checkpoint.family.parameters(checkpoint.config)  # 16 bits each, and half as much for everything else
    return needed < free_memory(device)


def _run(model: PromptDecoder, tokenizer: Tokenizer, length: int, progress: Progress) -> AnswerMarks:
    answers, greedy_replies, done = AnswerMarks(), dict[Prompt, list[int]](), 0
    for group in GROUPS:
        prompts = [_prompt(tokenizer, system, question) for _, system, question in group.prompts]
        chooser = Chooser(tokenizer.size, tokenizer.eos, SEED if group.sampled else None)
        draft = greedy_replies.get(group.prompts[0], []) if len(prompts) == 1 else []
        replies = model.answer(prompts, length, chooser, draft)
        for prompt, answered in zip(group.prompts, replies, strict=True):
            answers.add(answered.ids, answered.finite, prompt[0], tokenizer)
            if not group.sampled:
                greedy_replies[prompt] = answered.ids
        done += len(prompts)
        progress.advance("answer", done, len(QUESTIONS))
        progress.check_stop()
    return answers
