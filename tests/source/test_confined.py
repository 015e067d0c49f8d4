"""Templates, tokenizers and their regular expressions in a process of their own: none runs away, reaches out, or tells one day from another."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qquant.calibration import Tokenizer
from qquant.calibration.template import Template
from qquant.calibration.tokenizer import Backend
from qquant.errors import InputError
from qquant.source import confined
from qquant.source.confined import Confined, Refused
from tests.worlds.strange import FAST

CHAT = {"messages": [{"role": "user", "content": "x" * 2000}], "add_generation_prompt": False}
DOUBLED = "{% set ns = namespace(x=['x']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
LONG = "{% set d = 'ab' * 500000 %}"


def rendered(source):
    return Template(source, "test").render([CHAT], {})[0]


@pytest.fixture
def hurried(monkeypatch):
    """One second of processor time instead of four: there are many."""
    monkeypatch.setattr(confined, "SECONDS", 1)


RUNAWAY = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 100000000000 }}",
    "a long list": "{{ ['a'] * 100000000000 }}",
    "a text doubled": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a text joined": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "replace": "{% set a = messages[0].content.replace('x', messages[0].content) %}{{ a.replace('x', a) }}",
    "replace filter": "{% set a = messages[0].content|replace('x', messages[0].content) %}{{ a|replace('x', a) }}",
    "padding": "{{ messages[0].content.ljust(100000000000) }}",
    "center": "{{ messages[0].content|center(100000000000) }}",
    "a wide number": "{{ '%100000000000d' % 5 }}",
    "a wide field": "{{ '{:>100000000000}'.format(5) }}",
    "format": "{{ '{0.__class__}'.format(messages) }}{{ none.x.y }}",
    "bytes": "{{ (5).to_bytes(10000000000, 'big') }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "an indent": "{{ messages|tojson(indent=100000000000) }}",
    "a macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion": "{% for i in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "the order of methods": "{{ messages.__class__.__mro__.x }}",
    "subclasses": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "a change": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "a division": "{{ 1 / 0 }}",
    "no such message": "{{ messages[10 ** 3].content }}",
    "chance": "{{ lipsum() }}",
    "a chance filter": "{{ messages|random }}",
    "parentheses": "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
    "a long output": "{{ 'x' * 1000 }}" * 9000,
    "a list doubled, printed": DOUBLED + "{{ ns.x }}",
    "a list doubled, as JSON": DOUBLED + "{{ ns.x|tojson }}",
    "a list doubled, compared": DOUBLED + "{% set y = ns.x %}" + DOUBLED + "{{ ns.x == y }}",
    "a tuple doubled, as a key": DOUBLED.replace("[ns.x, ns.x]", "(ns.x, ns.x)").replace("['x']", "('x',)")
    + "{{ {ns.x: 1} }}",
    "round to 10^9 places": "{{ 1.5|round(1000000000, 'ceil') }}",
    "sums of lists": "{{ ([[1] * 1000] * 100000)|sum(start=[]) }}",
    "join": LONG + "{{ ([1] * 10000)|join(d) }}",
    "in": LONG + "{% for i in range(99999) %}{{ (d ~ 'x') in [d, d, d] }}{% endfor %}",
    "equal texts": LONG + "{% set e = 'ab' * 500000 %}{% for i in range(99999) %}{{ (d ~ i) == (e ~ i) }}{% endfor %}",
    "slices": LONG + "{% for i in range(99999) %}{% set y = d[1:] %}{% endfor %}",
    "sort": LONG + "{{ range(99999)|map('string')|map('replace', '1', d)|sort|length }}",
    "unique": LONG + "{% for i in range(99999) %}{{ [d ~ i, d ~ i]|unique|list|length }}{% endfor %}",
    "count": LONG + "{% for i in range(99999) %}{{ [d, d, d].count(d ~ '') }}{% endfor %}",
    "JSON of shared lists": LONG + "{{ ([[d] * 1000] * 1000)|tojson }}",
    "text of shared texts": LONG + "{{ ([[d] * 1000] * 1000)|string }}",
    "escape": LONG + "{{ ([[d] * 1000] * 1000)|escape }}",
    "groupby": LONG + "{{ range(99999)|map('string')|map('replace', '1', d)|groupby('x') }}",
    "a macro doubled": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% else %}x{% endif %}{% endmacro %}{{ m(60) }}",
    "a block doubled": "{% set x = 'x' * 1000 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x|length }}",
}


@pytest.mark.parametrize("name", RUNAWAY)
def test_templates_cannot_run_away_or_reach_out(name, hurried):
    with pytest.raises((InputError, Refused)) as caught:
        rendered(RUNAWAY[name])
    assert len(str(caught.value).splitlines()) == 1
    assert rendered("{{ 1 + 1 }}") == "2", "the next one is rendered"


@pytest.mark.parametrize(
    "source", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ messages['__class__'] }}"]
)
def test_what_templates_may_not_see_is_not_there(source):
    assert rendered(source) == ""


@FAST
@given(st.text(st.sampled_from("{%}} for if in messages x[]().|~*+-'\"0123456789\n"), max_size=60))
def test_no_template_crashes(source):
    try:
        rendered("{{" + source + "}}")
    except (InputError, Refused):
        return


def test_templates_tell_the_same_day_every_day():
    assert rendered("{{ strftime_now('%d %b %Y') }}") == "05 Feb 2024"


def test_a_template_that_fails_is_the_checkpoints_fault(make_checkpoint):
    folder = make_checkpoint()
    (folder / "chat_template.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    with pytest.raises(InputError, match="the chat template refuses"):
        Tokenizer.open(folder).render([{"role": "user", "content": "hi"}])


def test_of_many_chats_the_one_that_fails_is_named(tokenizer_folder):
    tokenizer = Tokenizer.open(
        tokenizer_folder("{{ messages[0].content }}{% if messages|length > 1 %}{{ raise_exception('two') }}{% endif %}")
    )
    one, two = (
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
    )
    assert tokenizer.render_all([one, one]) == ["a", "a"]
    with pytest.raises(InputError, match=r"refuses a chat of \(user, assistant\): two"):
        tokenizer.render_all([one, two, one])


# --- tokenizers -----------------------------------------------------------------------------------------------------------

A = "a" * 1400


def pattern(regex):
    """Cut text by a regular expression."""
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}}


STRANGE = {
    "a repeated group": pattern("(a+)+b"),
    "alternatives": pattern("(a|a)" * 40 + "b"),
    "two ways": pattern("(?:a|aa)" * 60 + "b"),
    "what may be there": pattern("(?:a?)" * 60 + "a" * 60 + "b"),
    "a normalizer that replaces nothing": {
        "normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    },
    "normalizers that double": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 28,
        }
    },
    "a map of garbage": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "QUFB" * 100}},
}


def refusal(work):
    """What an InputError says, None where there is none."""
    try:
        work()
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("name", STRANGE)
def test_tokenizers_cannot_run_away(demo, name, hurried):
    content = json.loads((demo / "tokenizer.json").read_text())
    said = refusal(lambda: Backend(json.dumps(content | STRANGE[name]), "test").encode([A], False))
    assert said is None or len(said.splitlines()) == 1
    assert Tokenizer.open(demo).decode(Tokenizer.open(demo).encode("fine")) == "fine"


def test_the_limits_are_those_that_are_promised():
    """5 s and 2 GiB, on the clock of the child, also where the library does not come back."""
    for name, content in (
        ("template", DOUBLED + "{{ ns.x == [ns.x, 1] }}{{ ns.x }}"),
        ("template", RUNAWAY["text of shared texts"]),
        (
            "template",
            "{% set l = [1] * 1000000 %}{% for i in range(99999) %}{% set x = l[1:] %}{% endfor %}",
        ),  # compiled as a list
    ):
        confined._end_all()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with pytest.raises(Refused):
            Confined(name, content).ask("render", many=[CHAT], shared={})
        confined._end_all()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
        assert after.ru_maxrss < 2 << 20 or after.ru_maxrss == before.ru_maxrss, "KiB, the most of any child so far"


def test_more_memory_than_is_promised_is_not_given():
    """A little below 2 GiB there is room, above there is not: what the template holds, not what it takes in time."""
    held = "{{ ('a' * (messages|length * SIZE))|length }}"
    assert rendered(held.replace("SIZE", str(1 << 30))) == str(1 << 30)
    with pytest.raises((InputError, Refused), match="takes more than 2 GiB of memory"):
        rendered(held.replace("SIZE", str(2 << 30)))


@pytest.mark.parametrize("size", [100, confined.SMALL])
def test_what_went_beyond_its_limits_is_not_tried_again(hurried, monkeypatch, size):
    """A plan asks a template for chats and for Ollama, its build again; where it took a long chat to run away, others are answered."""
    template = Confined("template", "{% if messages %}" + RUNAWAY["loops"] + f"{{% endif %}}fine {size}")
    long = {"messages": [{"role": "user", "content": "x" * size}]}
    with pytest.raises(Refused, match="processor time") as first:
        template.ask("render", many=[long], shared={})
    others = [long, {"messages": []}]
    with monkeypatch.context() as patch:
        patch.setattr(confined, "_start", lambda _: pytest.fail("it is tried again"))
        for chat in others if size < confined.SMALL else others[:1]:
            with pytest.raises(Refused) as second:
                template.ask("render", many=[chat], shared={})
            assert str(second.value) == str(first.value)
    if size >= confined.SMALL:
        assert template.ask("render", many=others[1:], shared={})[1] == f"fine {size}".encode()


def test_a_tokenizer_that_was_refused_once_is_asked_again(demo, monkeypatch):
    """A busy machine may take from one text what the next has: only templates are remembered."""
    ask, refused = confined._Child.ask, []

    def once(child, request, content):
        if request["do"] == "encode" and not refused:
            refused.append(request)
            raise Refused("it takes more than 4 s of processor time", beyond=True)
        return ask(child, request, content)

    monkeypatch.setattr(confined._Child, "ask", once)
    tokenizer = Tokenizer.open(demo)
    with pytest.raises(InputError, match="processor time"):
        tokenizer.encode("ships and sailors")
    assert len(tokenizer.encode("ships and sailors")) > 0
    assert len(refused) == 1


def test_processor_time_is_counted_from_a_request(hurried):
    """Requests that take half of it each are all answered by one child."""
    template = Confined("template", "{% for i in range(n) %}{% for j in range(9999) %}{% endfor %}{% endfor %}fine")
    template.ask("render", many=[{"n": 1}], shared={})
    child = confined._children["template"]
    before = child_seconds(child)
    count = 0
    while child_seconds(child) - before < 2:
        count += 1
        assert template.ask("render", many=[{"n": 100}], shared={})[1] == b"fine"
    assert confined._children["template"] is child, "it is the same"
    assert count > 1


def child_seconds(child):
    """Processor time of a child so far."""
    user, system = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# --- the child ------------------------------------------------------------------------------------------------------------


def test_one_child_answers_many_and_is_gone_with_its_parent(tmp_path):
    rendered("{{ 1 }}")
    child = confined._children["template"].process.pid
    rendered("{{ 2 }}")
    assert confined._children["template"].process.pid == child
    code = (
        "from qquant.source import confined; from qquant.calibration.template import Template; "
        "Template('{{ 1 }}', 'x').render([{}], {}); print(confined._children['template'].process.pid, flush=True); input()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    status, ends = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < ends:
        time.sleep(0.01)
    assert not status.exists() or status.read_text().split()[2] == "Z"


@pytest.mark.parametrize("text", ["{{ 2 }}", "{# " + "x" * 190_000 + " #}"], ids=["answers nothing", "reads nothing"])
def test_a_child_that_hangs_is_gone_within_five_seconds(text, monkeypatch):
    assert confined.IDLE <= 5
    monkeypatch.setattr(confined, "IDLE", 0.6)
    rendered("{{ 1 }}")
    child = confined._children["template"]
    os.kill(child.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises((InputError, Refused), match="does not answer"):
        rendered(text)
    assert time.monotonic() - began < 30, "not the limit of wall time"
    assert not child.alive
    assert rendered("{{ 1 + 1 }}") == "2"


def test_a_child_at_work_is_not_idle(monkeypatch):
    monkeypatch.setattr(confined, "IDLE", 0.1)
    monkeypatch.setattr(confined, "LOOK", 0.05)
    loops = "{% for j in range(40) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    assert rendered(loops + "x") == "x"


def test_threads_share_a_child():
    found = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: rendered(f"{{{{ {number} }}}}")}))
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(16)}


def test_an_answer_that_was_not_waited_for_is_nobody_elses(monkeypatch):
    """A signal ends the build in the middle of a request: the next one has a new child."""

    def interrupted(*_):
        raise KeyboardInterrupt

    rendered("{{ 1 }}")
    with monkeypatch.context() as patch:
        patch.setattr(confined._Child, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered("{{ 'old' }}")
    assert rendered("{{ 'new' }}") == "new"


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/hostname')",
        "__import__('os').listdir('/')",
        "__import__('socket').socket()",
        "__import__('os').system('true')",
    ],
)
def test_a_job_without_files_has_none(code):
    """Whatever it does: here its work is this code."""
    run = f"import sys, runpy; child = runpy.run_path(sys.argv[1]); child['JOBS']['template'] = (lambda: str, lambda *_: {code}); child['serve']('template')"
    asked = b"".join(
        struct.pack("<II", len(text), 0) + text
        for text in (json.dumps({"do": do, "with": "k", "seconds": 4}).encode() for do in ("make", "render"))
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", run, str(confined.CHILD)], input=asked, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"it asks for" in done.stdout
