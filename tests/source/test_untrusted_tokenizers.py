"""Tokenizers and templates of strangers: one InputError; none hangs, reaches out, or tells one day from another."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qquant import recipe
from qquant.calibration import Tokenizer
from qquant.calibration.template import FAILURES, Template
from qquant.errors import InputError
from qquant.plan.plan import Plan
from qquant.source import vocabulary
from qquant.source.checkpoint import Checkpoint
from tests.worlds.strange import FAST, values

# --- F14: tokenizers ---------------------------------------------------------------------------------------------------


@settings(deadline=5000, max_examples=25)
@given(st.sampled_from(["model", "vocab", "merges", "added_tokens", "pre_tokenizer", "normalizer", "decoder"]), values)
def test_strange_tokenizers(strange_folder, part, value):
    path = strange_folder / "tokenizer.json"
    before = path.read_bytes()
    content = json.loads(before)
    (content["model"] if part in ("vocab", "merges") else content)[part] = value
    path.write_text(json.dumps(content))
    try:
        Tokenizer.open(strange_folder)
    except InputError:
        pass
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update(a=-1), "has the id -1"),
        (lambda c: c["model"]["vocab"].update(a=2**40), "has the id"),
        (lambda c: c["model"]["vocab"].update(newone=5), "used twice"),
        (lambda c: c["added_tokens"].append({"id": 5, "content": "x"}), "id 5 is"),
        (lambda c: c["added_tokens"].append({"id": "5", "content": "x"}), "expected `content`, and an `id`"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+$"), "can take forever"),
        (lambda c: c.update(pre_tokenizer={"type": "Nonsense"}), "no tokenizer"),
    ],
)
def test_tokenizer_faults_are_named(make_checkpoint, change, message):
    folder = make_checkpoint()
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Tokenizer.open(folder)


def test_tokenizer_of_another_model_is_refused_by_plan(make_checkpoint):
    folder = make_checkpoint(vocab_size=4096)
    with pytest.raises(InputError, match=r"token 8191 .* lies beyond vocab_size 4096"):
        Checkpoint.open(folder).require_tokenizer()


@settings(deadline=5000, max_examples=25)
@given(
    st.sampled_from(["generation_config.json", "tokenizer_config.json"]),
    st.dictionaries(
        st.sampled_from(
            ["temperature", "top_k", "repetition_penalty", "bos_token", "eos_token", "chat_template", "add_bos_token"]
        ),
        values,
    ),
)
def test_strange_settings(strange_folder, name, content):
    """What plan writes into a GGUF file is planned from any settings, or they are refused."""
    loaded = recipe.load("demo")
    before = (strange_folder / name).read_bytes()
    (strange_folder / name).write_text(json.dumps(content))
    try:
        Plan.of(loaded, Checkpoint.open(strange_folder), ["gguf-q8_0"])
    except InputError:
        pass
    finally:
        (strange_folder / name).write_bytes(before)


@pytest.mark.parametrize(
    "processor", [5, [], {"processors": 3}, {"processors": [None, {"type": "TemplateProcessing", "single": [1, 2]}]}]
)
def test_strange_post_processors(make_checkpoint, processor):
    from qquant.formats.gguf.metadata import _added_around

    assert _added_around({"post_processor": processor}, {}) == {}


# --- F21: templates ----------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "x" * 2000}], "add_generation_prompt": False}
RUNAWAY = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ ['a'] * 1000000000 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set a = messages[0].content.replace('x', messages[0].content) %}{{ a.replace('x', a) }}",
    "{% set a = messages[0].content|replace('x', messages[0].content) %}{{ a|replace('x', a) }}",
    "{{ messages[0].content.ljust(1000000000) }}",
    "{{ messages[0].content|center(1000000000) }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '{:>1000000000}'.format(5) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ (5).to_bytes(10000000000, 'big') }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% set ns = namespace(x=9) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 / 0 }}",
    "{{ messages[10 ** 3].content }}",
    "{{ lipsum() }}",
    "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
    "{{ 'x' * 1000 }}" * 9000,
]


@pytest.mark.parametrize("source", RUNAWAY, ids=lambda source: source[:50])
def test_templates_cannot_run_away_or_reach_out(source):
    began = time.process_time()
    with pytest.raises((InputError, *FAILURES)):
        Template(source, "test").render(CHAT)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ messages['__class__'] }}"]
)
def test_what_templates_may_not_see_is_not_there(source):
    assert Template(source, "test").render(CHAT) == ""


@FAST
@given(st.text(st.sampled_from("{%}} for if in messages x[]().|~*+-'\"0123456789\n"), max_size=60))
def test_no_template_crashes(source):
    try:
        Template("{{" + source + "}}", "test").render(CHAT)
    except (InputError, *FAILURES):
        return


def test_templates_tell_the_same_day_every_day():
    assert Template("{{ strftime_now('%d %b %Y') }}", "test").render(CHAT) == "05 Feb 2024"


def test_a_template_that_fails_is_the_checkpoints_fault(make_checkpoint):
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    with pytest.raises(InputError, match="the chat template refuses"):
        Tokenizer.open(folder).render([{"role": "user", "content": "hi"}])
    assert vocabulary.read(folder).largest == 8191
