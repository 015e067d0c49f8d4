"""What an artifact still does that its 16-bit model does: retrieval, tool calls, programs, answers that end and stay in their script.

calibration/behaviour.py says what is asked, `marking` which answers are right. Checkpoint and artifacts get the same questions:

    retrieval       both read the same document in the lockstep pass of `fidelity`, right answers included; an answer is right if each of its
                    tokens is ranked first. KL divergence and top-1 agreement are those of the answers' tokens
    everything else greedy answers in bf16, weights dequantized, the whole model in memory; where it does not fit, they are left out
    tool calls      the KL divergence is of the structure tokens of right calls (name, keys, braces), read like a document

With w answers that went wrong, r that came right, of n questions of which the checkpoint has b right, the loss (w - r) / n is held against
`gates.behaviour` times b / n, and against `BROKEN` of that where an answer that is not right is a broken one (it loops, it is in another script):

    fail          the loss is proven beyond that, by Agresti and Min's interval, and McNemar's exact test proves that there is one at all;
                  Holm over the kinds of questions, at `BEHAVIOUR`
    pass          the loss is proven within it, each kind at `ASKED`
    inconclusive  neither
    unable        b is less than `ABLE` of n: the checkpoint itself cannot do it, and nothing is judged

Questions count as independent, which those about one document are not quite. References: McNemar (1947); Agresti and Min (2005);
Liu et al., Lost in the Middle (2023), for facts at depths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qquant.calibration import Tokenizer
from qquant.calibration.behaviour import LENGTHS, BehaviourText, OpenQuestion
from qquant.checks import captured, marking, sanity, statistics
from qquant.checks.decoding import Chooser
from qquant.checks.fidelity import Fidelity, Scored, measure
from qquant.checks.slices import NamedPhase, turns
from qquant.devices import free_memory, policy
from qquant.families.weights import WeightSource
from qquant.plan.room import answered_together
from qquant.progress import Progress, SharedProgress
from qquant.ranks import Ranks
from qquant.recipe.limits import ASKED, BEHAVIOUR
from qquant.report.behaviour import BehaviourReport, Standing, said, worst
from qquant.report.record import GateReport, Verdict
from qquant.report.slices import Estimate
from qquant.source.checkpoint import Checkpoint

GATE = "worst behaviour"
ABLE = 0.25  # of the questions that the checkpoint must have right
BROKEN = 0.5
CALLS, CODE, ENDLESS, SCRIPT = "tool calls", "code that compiles", "no endless repetition", "script of the question"


@dataclass(frozen=True)
class TokenLoss:
    """Loss on the tokens that matter, float64 [questions]: means per question."""

    kl: NDArray[np.float64]
    same_top: NDArray[np.float64]


@dataclass(frozen=True)
class AnswerPairs:
    """Answers to one kind of question: whether artifact and checkpoint have each of them right."""

    name: str
    right: Sequence[bool]
    right_baseline: Sequence[bool]
    read: TokenLoss | None = None


@dataclass(frozen=True)
class Asking:
    """Who is asked what: a checkpoint and its artifacts, the questions, and how they are read."""

    checkpoint: Checkpoint
    artifacts: Mapping[str, WeightSource]
    text: BehaviourText
    tokenizer: Tokenizer
    device: torch.device


def pairs(asking: Asking, progress: Progress) -> dict[str, list[AnswerPairs]]:
    """Artifact -> its answers to every kind of question, each beside the checkpoint's. Raises NumericalError as `measure`."""
    by_name = _retrieved(asking, NamedPhase(progress, "retrieval"))
    structure = _structure(asking, NamedPhase(progress, "calls"))
    if sanity.fits(asking.checkpoint, asking.device):
        for name, answered in _answered(asking, progress).items():
            first, *others = answered
            by_name[name] += [replace(first, read=structure.get(name)), *others]
    return by_name


def of_all(mine: Mapping[str, Sequence[AnswerPairs]], ranks: Ranks) -> dict[str, list[AnswerPairs]]:
    """The questions that any rank asked, by artifact."""
    said = ranks.gather({name: [_plain(one) for one in asked] for name, asked in mine.items()})
    return {name: [_pairs(*one) for one in asked] for theirs in said for name, asked in theirs.items()}


def _plain(one: AnswerPairs) -> list[Any]:
    read = None if one.read is None else [one.read.kl.tolist(), one.read.same_top.tolist()]
    return [one.name, list(map(bool, one.right)), list(map(bool, one.right_baseline)), read]


def _pairs(name: str, right: list[bool], theirs: list[bool], read: list[list[float]] | None) -> AnswerPairs:
    return AnswerPairs(name, right, theirs, None if read is None else TokenLoss(*map(np.array, read)))


# Read in lockstep.


def _retrieved(asking: Asking, progress: Progress) -> dict[str, list[AnswerPairs]]:
    by_name: dict[str, list[AnswerPairs]] = {name: [] for name in asking.artifacts}
    for hidden in asking.text.hidden:
        text = Scored(torch.as_tensor(hidden.windows, dtype=torch.int64), hidden.first, asking.tokenizer.size)
        for group in turns(asking.artifacts, hidden.length * asking.checkpoint.config.hidden, asking.device):
            for name, every_token in measure(asking.checkpoint, group, text, asking.device, progress).items():
                answers = [
                    _span(every_token, row, span, hidden.first)
                    for row, spans in enumerate(hidden.answers)
                    for span in spans
                ]
                right, theirs = (
                    [bool(getattr(one, key).all()) for one in answers] for key in ("right", "right_baseline")
                )
                by_name[name].append(AnswerPairs(f"retrieval, {hidden.length:,} tokens", right, theirs, _read(answers)))
    return by_name


def _span(every_token: Fidelity, row: int, span: tuple[int, int], first: int) -> Fidelity:
    """The tokens of an answer at positions `span` of document `row`."""
    columns = slice(span[0] - 1 - first, span[1] - 1 - first)
    return Fidelity(**{name: column[row, columns] for name, column in vars(every_token).items()})


def _read(parts: Sequence[Fidelity]) -> TokenLoss:
    return TokenLoss(
        np.array([part.mean_kl for part in parts], np.float64), np.array([part.top1 for part in parts], np.float64)
    )


def _structure(asking: Asking, progress: Progress) -> dict[str, TokenLoss]:
    calls = asking.text.calls
    if not len(calls.windows):
        return {}
    text = Scored(torch.as_tensor(calls.windows, dtype=torch.int64), calls.first, asking.tokenizer.size)
    structure = torch.as_tensor(calls.structure[:, calls.first + 1 :])
    by_name = {}
    for name, every_token in measure(asking.checkpoint, asking.artifacts, text, asking.device, progress).items():
        rows = range(len(structure))
        by_name[name] = _read(
            [
                Fidelity(**{key: column[row][structure[row]] for key, column in vars(every_token).items()})
                for row in rows
            ]
        )
    return by_name


# Answered.


def _answered(asking: Asking, progress: Progress) -> dict[str, list[AnswerPairs]]:
    sources: dict[str, WeightSource] = {"": asking.checkpoint, **asking.artifacts}
    marks: dict[str, dict[str, list[bool]]] = {}
    groups = together(asking)
    for number, (name, source) in enumerate(sources.items()):
        share = SharedProgress(progress, number, len(sources))
        share.advance("behaviour", 0, len(asking.text.questions))
        share.at(f"model {number + 1} of {len(sources)}")
        answers = _answers(source, asking, groups, share)
        marks[name] = _marks(answers, asking.text.questions, asking.tokenizer)
    theirs = marks.pop("")
    return {name: [AnswerPairs(kind, mine[kind], theirs[kind]) for kind in mine] for name, mine in marks.items()}


def together(asking: Asking) -> list[list[int]]:
    """Questions that are answered together, by their indices: of one task, prompts of like lengths, as many as there is room for.

    That changes the last bits of logits on hardware whose products depend on how many rows they have, so an answer may part from itself
    where two tokens are as good as equal. Checkpoint and artifacts are asked in the same groups.
    """
    config, questions = asking.checkpoint.config, asking.text.questions
    free = free_memory(asking.device) - 2 * asking.checkpoint.family.parameters(config)
    itemsize = 4 if asking.device.type == "cpu" else 2  # of keys and values, see `decoding`
    groups = []
    for task, length in LENGTHS.items():
        mine = [index for index, one in enumerate(questions) if one.task == task]
        mine.sort(key=lambda index: len(questions[index].prompt))
        if mine:
            longest = len(questions[mine[-1]].prompt) + length
            most = answered_together(config, longest, itemsize, policy(asking.device).answered, free)
            groups += [part.tolist() for part in np.array_split(mine, -(-len(mine) // most))]
    return groups


def _marks(
    answers: Sequence[Sequence[int]], questions: Sequence[OpenQuestion], tokenizer: Tokenizer
) -> dict[str, list[bool]]:
    """Kind of question -> whether each answer is right, in the order of the questions."""
    marks: dict[str, list[bool]] = {CALLS: [], CODE: [], ENDLESS: [], SCRIPT: []}
    for question, ids in zip(questions, answers, strict=True):
        ended = bool(ids) and ids[-1] in tokenizer.eos
        text = tokenizer.decode(ids[:-1] if ended else ids)
        match question.task:
            case "tools":
                marks[CALLS].append(marking.calls_right(text, question.calls))
            case "code":
                marks[CODE].append(marking.compiles(_opened(text, question), question.function))
            case "talk":
                marks[SCRIPT].append(marking.in_script(text, question.text))
        marks[ENDLESS].append(not marking.loops(ids, tokenizer.eos))
    return marks


def _opened(text: str, question: OpenQuestion) -> str:
    """A program with the mark of its beginning where that stood in the question."""
    return f"```python\n{text}" if question.opened else text


def _answers(
    source: WeightSource, asking: Asking, groups: Sequence[Sequence[int]], progress: Progress
) -> list[list[int]]:
    """Ids of the greedy answers of one model, which is in memory until they are given."""
    model = captured.decoder(source, torch.bfloat16, asking.device)
    questions, chooser = asking.text.questions, Chooser(asking.tokenizer.size, asking.tokenizer.eos)
    ids_of: dict[int, list[int]] = {}
    for rows in groups:
        length = LENGTHS[questions[rows[0]].task]
        answers = model.answer([questions[row].prompt for row in rows], length, chooser)
        ids_of |= {row: answer.ids for row, answer in zip(rows, answers, strict=True)}
        progress.advance("behaviour", len(ids_of), len(questions))
        progress.check_stop()
    return [ids_of[index] for index in range(len(questions))]


# The verdict.


def judge(answered: Sequence[AnswerPairs], limit: float | None) -> tuple[tuple[BehaviourReport, ...], Verdict | None]:
    """Every kind of question with what is proven of it, and the verdict of the gate on the worst; None: there is none."""
    losses = [_loss(one, limit) for one in answered]
    asked = [index for index, one in enumerate(answered) if limit is not None and _able(one)]
    beyond = dict(zip(asked, statistics.holm([losses[index].beyond for index in asked]), strict=True))
    rows = []
    for index, (one, loss) in enumerate(zip(answered, losses, strict=True)):
        standing: Standing = "measured" if _able(one) else "unable"
        if index in beyond:
            within = loss.within <= ASKED
            standing = "fail" if beyond[index] <= BEHAVIOUR else "pass" if within else "inconclusive"
        rows.append(_row(one, loss, standing))
    return tuple(rows), _verdict(rows, losses) if asked else None


def _able(one: AnswerPairs) -> bool:
    return sum(one.right_baseline) >= ABLE * max(1, len(one.right_baseline))


@dataclass(frozen=True)
class _Loss:
    """What is proven of a loss against its limit."""

    to_wrong: int
    to_right: int
    value: float
    interval: tuple[float, float]
    limit: float | None
    within: float
    beyond: float
    worse: float  # McNemar
    detectable: float


def _loss(one: AnswerPairs, limit: float | None) -> _Loss:
    change = np.array(one.right, np.int64) - np.array(one.right_baseline, np.int64)
    to_wrong, to_right, count = int((change < 0).sum()), int((change > 0).sum()), max(1, len(change))
    share = (BROKEN if one.name in (ENDLESS, SCRIPT) else 1.0) * sum(one.right_baseline) / count
    most = None if limit is None else limit * share
    tested, interval = statistics.flips(to_wrong, to_right, count, most or 0.0)
    worse = statistics.mcnemar(to_wrong, to_right)
    beyond = max(tested.p_beyond, worse)
    return _Loss(
        to_wrong,
        to_right,
        tested.mean,
        (-interval[1], -interval[0]),
        most,
        tested.p_within,
        beyond,
        worse,
        tested.detectable,
    )


def _row(one: AnswerPairs, loss: _Loss, standing: Standing) -> BehaviourReport:
    judged = standing not in ("unable", "measured")
    return BehaviourReport(
        name=one.name,
        questions=len(one.right),
        right=sum(one.right),
        right_baseline=sum(one.right_baseline),
        to_wrong=loss.to_wrong,
        to_right=loss.to_right,
        p_worse=loss.worse,
        lost=Estimate(loss.value, *loss.interval),
        standing=standing,
        limit=loss.limit if judged else None,
        kl_divergence=_estimate(one.read.kl, 0.0, np.inf) if one.read else None,
        top1_agreement=_estimate(one.read.same_top, 0.0, 1.0) if one.read else None,
    )


def _estimate(values: NDArray[np.float64], least: float, most: float) -> Estimate:
    low, high = statistics.interval(values)
    return Estimate(float(values.mean()), max(least, low), min(most, high))


def _verdict(rows: Sequence[BehaviourReport], losses: Sequence[_Loss]) -> Verdict:
    outcome = statistics.worst([row.standing for row in rows])
    shown = worst(rows)
    assert shown is not None
    loss = losses[rows.index(shown)]
    gate = GateReport(
        GATE,
        outcome,
        loss.value,
        loss.limit or 0.0,
        *loss.interval,
        loss.within,
        loss.beyond,
        loss.detectable,
        shown.questions,
    )
    return Verdict(outcome, _reasons(rows, shown, outcome), (gate,))


def _reasons(rows: Sequence[BehaviourReport], shown: BehaviourReport, outcome: str) -> tuple[str, ...]:
    if outcome == "pass":
        return ()
    others = [row.name for row in rows if row.standing == outcome and row is not shown]
    also = f"; so {'do' if len(others) > 1 else 'does'} {', '.join(others)}" if others else ""
    lost = f"{shown.lost.value:.1%} lost, 95 % interval {shown.lost.low:.1%} to {shown.lost.high:.1%}"
    word = "more than" if outcome == "fail" else "which cannot be told from"
    return (f"{GATE}: {shown.name}: {said(shown)} ({lost}), {word} the limit {shown.limit:.1%}{also}",)
