"""How long a model takes for the questions of `checks.profile: release`, and what it does to its marks how many are answered at once.

    python -m tests.bench.questions CHECKPOINT [--device cpu] [--ways 8 64 8r 64r] [--every 1]

8: eight at a time, every token's kernels launched one by one; 64r: sixty-four at a time by recorded passes. Printed: steps (prompts and tokens of a
group at once), seconds without loading, answers and marks that are not those of the first way, and the verdict on this way as if it were an artifact.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from qquant.calibration import Tokenizer
from qquant.calibration.behaviour import behaviour_text
from qquant.checks import behaviour
from qquant.checks.captured import CapturedDecoder
from qquant.checks.decoding import PromptDecoder
from qquant.devices import policy
from qquant.progress import Quiet
from qquant.recipe.limits import LOST
from qquant.source.checkpoint import Checkpoint


class Counting:
    """A decoder that counts what it answers."""

    def __init__(self, model):
        self.model, self.steps = model, 0

    def answer(self, prompts, length, chooser):
        """The answers of the decoder."""
        answers = self.model.answer(prompts, length, chooser)
        self.steps += max(len(one.ids) for one in answers)
        return answers


def main():
    """Answer in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=["8", "64", "8r", "64r"])
    parser.add_argument("--every", type=int, default=1, help="of so many questions one")
    options = parser.parse_args()
    checkpoint, device = Checkpoint.open(options.checkpoint), torch.device(options.device)
    tokenizer = Tokenizer.open(checkpoint.path)
    text = behaviour_text(tokenizer, checkpoint.config.positions)
    text = replace(text, questions=text.questions[:: options.every])
    asking = behaviour.Asking(checkpoint, {}, text, tokenizer, device)
    plain = PromptDecoder(checkpoint, torch.bfloat16, device)
    usual, first = policy(device), None
    for way in options.ways:
        counting = Counting(CapturedDecoder(plain) if way.endswith("r") else plain)
        behaviour.policy = lambda _, way=way: replace(usual, answered=int(way.rstrip("r")))
        behaviour.captured.decoder = lambda *_, counting=counting: counting
        processor, start = time.process_time(), time.monotonic()
        answers = behaviour._answers(checkpoint, asking, behaviour.together(asking), Quiet())
        seconds = f"{time.monotonic() - start:6.1f} s, {time.process_time() - processor:6.1f} s of the processor"
        marks = behaviour._marks(answers, text.questions, tokenizer)
        first = first or (answers, marks)
        moved = {kind: sum(a != b for a, b in zip(marks[kind], first[1][kind], strict=True)) for kind in marks}
        pairs = [behaviour.AnswerPairs(kind, marks[kind], first[1][kind]) for kind in marks]
        rows, verdict = behaviour.judge(pairs, LOST)
        print(
            f"{way:>4}: {counting.steps} steps, {seconds}; {sum(a != b for a, b in zip(answers, first[0], strict=True))} of {len(answers)} other answers"
        )
        print(f"      other marks {moved}, right { {kind: sum(marks[kind]) for kind in marks} }")
        print(
            f"      verdict {verdict.outcome if verdict else 'none'}, { {row.name: row.standing for row in rows} }",
            flush=True,
        )


if __name__ == "__main__":
    main()
