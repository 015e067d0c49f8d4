"""What texts cannot give is told before the work: too few of them, too long or none, and chats that a template refuses."""

import pytest

from qquant import pipeline, recipe
from qquant.cli import main
from qquant.errors import InputError
from qquant.plan.beside import beside
from qquant.plan.capacity import Free, require_memory
from qquant.plan.plan import Plan
from qquant.plan.texts import examine, shortfall
from qquant.recipe.changes import Flags, changed
from qquant.report.solved import LinearRecord, warnings_of
from qquant.source.checkpoint import Checkpoint
from tests.worlds.builds import BASE


def test_calibration_that_runs_out_is_one_line(make_checkpoint, tmp_path):
    folder, short = make_checkpoint(), tmp_path / "short.txt"
    short.write_text("Ships and sailors. " * 40)
    asked = changed(BASE, Flags(settings=(f"calibration.sources=[{{path: {short}}}]", "calibration.samples=500")))
    (line,) = Plan.of(asked, Checkpoint.open(folder)).texts.warnings
    assert line.startswith("calibration: ")
    assert "of 500 samples" in line
    assert "of 16,000 tokens" in line
    assert shortfall(500, 16_000, asked.calibration) == ()
    many = [LinearRecord(f"w{i}", 0.0, inputs=64 + i, tokens=31) for i in range(42)]
    assert warnings_of(many) == ["42 linears, w0 first: 31 calibration tokens for 105 inputs; give more samples"]


def test_a_check_text_is_counted_before_it_is_promised(make_checkpoint, tmp_path):
    folder, short = make_checkpoint(), tmp_path / "held.txt"
    short.write_text("Ships and sailors. " * 200)
    asked = changed(BASE, Flags(settings=(f"checks.text={short}", "checks.windows=400", "checks.max_windows=800")))
    plan = Plan.of(asked, Checkpoint.open(folder))
    assert plan.looks == [plan.texts.windows]
    assert 0 < plan.texts.windows < 400
    assert plan.texts.warnings == (f"{short}: {plan.texts.windows} of 400 windows of 32 tokens: the text has no more",)
    fewer, more = (changed(asked, Flags(settings=(f"checks.windows={n}",))) for n in (2, 4))
    assert Plan.of(fewer, Checkpoint.open(folder)).reach("gptq")[0].detectable > (
        Plan.of(more, Checkpoint.open(folder)).reach("gptq")[0].detectable
    )


def test_memory_is_foreseen_for_the_text_that_is_there(make_checkpoint, tmp_path):
    """A build of fifty chats was refused for the memory of the millions of tokens that its recipe would have taken."""
    source, few = Checkpoint.open(make_checkpoint()), tmp_path / "few.txt"
    few.write_text("Ships and sailors. " * 200)
    of_few = changed(BASE, Flags(settings=(f"calibration.sources=[{{path: {few}}}]", "calibration.samples=8")))
    much = changed(of_few, Flags(settings=("calibration.samples=60000",)))
    plan, other = Plan.of(much, source), Plan.of(of_few, source)
    assert plan.texts.tokens < 4000
    assert (plan.memory, plan.disk, plan.tokens) < (2 * other.memory, 2 * other.disk, 4000)
    assert all(cost.memory < 2 * other.memory for cost in beside(much, source, plan, None))
    require_memory(much, source, plan, Free("cpu", 4 * other.memory, 4 * other.memory))


@pytest.mark.parametrize("setting", ["calibration.sources=[{path: none.jsonl}]", "checks.text=none.txt"])
def test_a_text_that_is_not_there_is_missed_by_plan(make_checkpoint, setting):
    with pytest.raises(InputError, match="not found, and c"):
        Plan.of(changed(BASE, Flags(settings=(setting,))), Checkpoint.open(make_checkpoint()))


def test_a_template_whose_answers_do_not_end_is_told_by_plan(tokenizer_folder):
    good = examine(BASE, tokenizer_folder()).warnings
    assert good == ()
    odd = tokenizer_folder("{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] }}\n{% endfor %}")
    (told,) = examine(BASE, odd).warnings
    assert told.startswith("answers in chats will not end with their turn")
    assert "ends an answer with" in told
    chats = changed(BASE, Flags(settings=("calibration.sources=[{bundled: chat-en, kind: chat}]",)))
    assert examine(chats, odd).warnings[0].startswith("the build will refuse to calibrate on chats")


def test_windows_beyond_the_models_positions_are_told(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint())
    (told,) = pipeline.beyond(4096, checkpoint)
    assert told.startswith("windows of 4,096 tokens, and the model has 512 positions")
    assert pipeline.beyond(512, checkpoint) == []


def test_a_users_own_chats_get_no_invented_system_turns():
    own = changed(BASE, Flags(sources=({"path": "chats.jsonl", "kind": "chat"},)))
    assert own.calibration.default_system_share == 1


def test_a_users_own_texts_get_a_background_that_the_recipe_names():
    """What the checkpoint writes itself, and recipes that nobody changed, get none."""
    own = changed(BASE, Flags(sources=({"path": "chats.jsonl", "kind": "chat"},)))
    assert own.calibration.background == 0.05
    assert "background: 0.05" in recipe.dump(own, brief=True)
    assert recipe.parse(recipe.dump(own)) == own
    declined = ("calibration.background=0",)
    assert changed(BASE, Flags(sources=({"path": "a.txt"},), settings=declined)).calibration.background == 0
    assert changed(BASE, Flags(sources=({"generated": True},))).calibration.background == 0
    assert {recipe.load(name).calibration.background for name in recipe.names()} == {0}


def test_a_build_that_will_refuse_its_chats_says_so_once(make_checkpoint, tmp_path, capsys):
    """What its plan found out is not tried again: a template that runs away takes its seconds once, and the answer is one line."""
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\nname: chats\ncalibration: {sources: [{bundled: chat-en, kind: chat}], samples: 2, length: 32}\n"
        "checks: {windows: 2, length: 32}\nartifacts: [{name: q4_0, format: gguf, type: q4_0}]\n"
    )
    asked = ["--recipe", str(tmp_path / "recipe.yaml")]
    with pytest.raises(SystemExit) as caught:
        main(["build", str(folder), *asked, "--out", str(tmp_path / "out")])
    assert caught.value.code == InputError.exit_code
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert "the chat template refuses a chat" in said
    assert "never" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(folder), *asked])
    assert caught.value.code == 0
    assert "the build will refuse to calibrate on chats" in capsys.readouterr().out
