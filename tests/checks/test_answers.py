"""Answers to the bundled prompts: the rules that judge them, what is beyond chance, and the decoder that gives them."""

import pytest
import torch

from qquant.calibration import Tokenizer
from qquant.checks import decoding, sanity
from qquant.progress import Quiet
from qquant.report.record import AnswerRun
from qquant.source.checkpoint import Checkpoint
from tests.worlds.watched import Told

quiet = Quiet()

CPU = torch.device("cpu")


def test_rules_that_judge_an_answer(demo):
    assert sanity.longest_run([1, 1, 2, 2, 2, 3]) == 3
    assert sanity.longest_run([]) == 0
    assert sanity.repetition([1, 2, 3, 4] * 8) > 0.8
    assert sanity.repetition(list(range(32))) == 0
    assert sanity.wrong_script("the quick brown fox", "zh")
    assert sanity.wrong_script("长城是中国古代的防御工程", "en")
    assert not sanity.wrong_script("长城是中国古代的防御工程", "zh")
    assert not sanity.wrong_script("OK", "zh")
    tokenizer = Tokenizer.open(demo)
    counts = sanity.AnswerMarks()
    counts.add(tokenizer.encode("!") * 30, True, "en", tokenizer)
    counts.add([*tokenizer.encode("It is blue."), tokenizer.eos[0]], True, "en", tokenizer)
    counts.add([7], False, "", tokenizer)
    counted = counts.counts()
    assert [getattr(counted, key) for key in ("answers", "runs", "repetitive", "nan")] == [3, 1, 1, 1]
    assert counted.stopped == pytest.approx(1 / 3)


def test_prompts_are_those_that_break_models():
    short = [group for group in sanity.GROUPS if len(group.prompts) == 8 and group.prompts == sanity.PROMPTS]
    assert [group.sampled for group in short] == [False, True]
    alone = [group.prompts[0] for group in sanity.GROUPS if len(group.prompts) == 1]
    assert set(sanity.PROMPTS) <= set(alone), "every prompt in batches of 1 and 8"
    assert sanity.LONG_PROMPTS[0] in alone
    assert any(group.prompts == sanity.LONG_PROMPTS for group in sanity.GROUPS)
    systems = {system for _, system, _ in sanity.PROMPTS}
    assert None in systems, "the template's default system turn"
    assert "" in systems, "an empty one"
    assert {script for script, _, _ in sanity.PROMPTS} == {"en", "zh", ""}


def answers(**columns):
    no = [False] * len(sanity.QUESTIONS)
    return sanity.AnswerMarks(
        **{name: columns.get(name, no) for name in ("stopped", "runs", "repetitive", "invalid", "script", "nan")}
    )


def run_of(one, other, dtype="bf16"):
    """The answers of `one` beside those of `other`, as a report has them."""
    worse = tuple(one.proven_worse(other))
    return AnswerRun(**vars(one.counts()), dtype=dtype, worse=worse, baseline=other.counts())


def test_worse_beyond_chance_fails_and_chance_does_not():
    """Twelve answers that no longer stop, or that repeat one token, are no chance; two are."""

    def of(stopping, running, count=33):
        runs = [index < running for index in range(count)]
        return answers(stopped=[index < stopping for index in range(count)], runs=runs)

    baseline = of(30, 1)
    assert of(18, 1).proven_worse(baseline) == ["stopped"]
    assert of(30, 13).proven_worse(baseline) == ["runs"]
    assert of(28, 3).proven_worse(baseline) == []
    assert of(33, 0).proven_worse(baseline) == []
    assert sanity.warnings([run_of(of(28, 3), baseline, "fp16")]) == ()
    assert sanity.problems([run_of(of(18, 13), baseline, "fp16")]) == (
        "answers in fp16: 13 of 33 repeat one token, 1 of the checkpoint's",
        "answers in fp16: 55% stop, 91% of the checkpoint's",
    )


def warned(mine, theirs, name="repetitive"):
    one, other = answers(**{name: mine}), answers(**{name: theirs})
    return sanity.warnings([run_of(one, other)])


def test_an_answer_alone_and_in_a_batch_is_one_pair():
    """Seven questions answered worse in both ways are seven pairs, which may be chance, and not fourteen."""
    assert len(set(sanity.QUESTIONS)) == 24
    never = [False] * len(sanity.QUESTIONS)
    short = sanity.PROMPTS[:7]
    twice = [prompt in short and not sampled for prompt, sampled in sanity.QUESTIONS]
    assert sum(twice) == 14
    assert sanity.flips(twice, never) == (7, 0)
    assert sanity.flips(never, twice) == (0, 7)
    assert warned(twice, never) == ()
    once = [prompt == sanity.PROMPTS[0] and not sampled for prompt, sampled in sanity.QUESTIONS]
    first = [True] + [False] * (len(once) - 1)
    assert sanity.flips(once, first) == (1, 0), "one of two answers more"


def test_a_model_that_repeats_itself_by_chance_is_no_warning_and_one_that_loops_is():
    """Answers of two equals, each repetitive on one question of six: at most 4 of 100 may be warned of, whatever was asked."""
    draws = torch.Generator().manual_seed(0)

    def by_chance(share):
        kind = {question: bool(torch.rand(1, generator=draws) < share) for question in sanity.QUESTIONS}
        return [kind[question] for question in sanity.QUESTIONS]

    assert sum(bool(warned(by_chance(1 / 6), by_chance(1 / 6))) for _ in range(500)) <= 20
    assert sum(bool(warned(by_chance(3 / 4), by_chance(1 / 6))) for _ in range(100)) >= 90
    assert warned([True] * 33, by_chance(1 / 6))[0].startswith("answers in bf16: 33 of 33 repeat themselves, ")
    assert "100% stop, 0%" in warned([True] * 33, [False] * 33, "stopped")[0]


def test_greedy_answers_equal_transformers(demo):
    import transformers

    checkpoint, tokenizer = Checkpoint.open(demo), Tokenizer.open(demo)
    prompts = [tokenizer.encode("The history of"), tokenizer.encode("In 1912 the ship was")]
    model = decoding.PromptDecoder(checkpoint, torch.float32, CPU)
    ours = model.answer(prompts, 6, decoding.Chooser(tokenizer.size, ()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    for prompt, answered in zip(prompts, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, repetition_penalty=1.0
        )
        assert answered.ids == expected[0, len(prompt) :].tolist()
        assert answered.finite


def test_logits_in_16_bits_are_those_of_transformers(demo):
    """Prompts of different length with a common beginning, in both dtypes: their distance from float32 is rounding, about that of transformers' own pass."""
    import transformers

    checkpoint, tokenizer = Checkpoint.open(demo), Tokenizer.open(demo)
    prompts = [tokenizer.encode(f"The history of the {rest}") for rest in ("town", "railway between two towns")]
    exact = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    for dtype in sanity.DTYPES.values():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=dtype)
        chooser = Kept(tokenizer.size, ())
        decoding.PromptDecoder(checkpoint, dtype, CPU).answer(prompts, 1, chooser)
        for prompt, mine in zip(prompts, chooser.seen[0], strict=True):
            with torch.no_grad():
                truth, other = (
                    model(torch.tensor([prompt])).logits[0, -1, : tokenizer.size].float() for model in (exact, theirs)
                )
            assert float((mine - truth).norm()) < 3 * float((other - truth).norm())


class Kept(decoding.Chooser):
    """Keeps the logits that it chose from."""

    seen = ()

    def choose(self, logits):
        self.seen = (*self.seen, logits.clone())
        return super().choose(logits)


def test_a_draft_changes_nothing(demo):
    """A right guess, one that is wrong in the middle, one wrong from the start, one with a stop token, and answers in a padded batch."""
    checkpoint, tokenizer = Checkpoint.open(demo), Tokenizer.open(demo)
    model = decoding.PromptDecoder(checkpoint, torch.float32, CPU)
    prompts = [tokenizer.encode(text) for text in ("The history of", "In 1912 the ship was on her way to")]
    chooser = decoding.Chooser(tokenizer.size, ())
    batch = model.answer(prompts, 12, chooser)
    for prompt, answered in zip(prompts, batch, strict=True):
        (alone,) = model.answer([prompt], 12, chooser)
        assert alone.ids == answered.ids
        guess = alone.ids
        for draft in (guess, [*guess[:5], guess[5] ^ 1, *guess[6:]], [7] * 12, guess[:3], [*guess, *guess]):
            assert model.answer([prompt], 12, chooser, draft) == [alone]
        stopping = decoding.Chooser(tokenizer.size, (guess[6],))
        until = guess[: guess.index(guess[6]) + 1]
        assert [model.answer([prompt], 12, stopping, draft)[0].ids for draft in ((), guess)] == [until] * 2


def test_overflow_in_fp16_fails_by_name(built, tmp_path):
    """Weights that bf16 carries and fp16 does not: the artifact's answers are NaN in fp16 only."""
    checkpoint = Checkpoint.open(built[0])

    class Loud:
        family, config = checkpoint.family, checkpoint.config

        def tensor(self, name):
            return checkpoint.tensor(name).float() * (1e6 if name.endswith("down_proj.weight") else 1)

        def rows(self, name, start, stop):
            return checkpoint.rows(name, start, stop)

    progress = Told()
    found = sanity.answer(checkpoint, {"loud": Loud()}, Tokenizer.open(built[0]), 2, CPU, progress)["loud"].runs
    progress.require_whole("answer")
    assert progress.within["answer"][-1] == "model 2 of 2 in fp16"
    assert progress.steps["answer"][1] == (8, 4 * 33), "a run of a model is many answers"
    assert [run.dtype for run in found] == ["bf16", "fp16"]
    assert found[0].nan == 0
    assert found[1].nan == found[1].answers == sum(len(group.prompts) for group in sanity.GROUPS) == 33
    assert sanity.problems(found)[0] == "answers in fp16: 33 of 33 have logits that are not finite"
