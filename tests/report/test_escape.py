"""Texts of strangers in every place where they are shown: HTML, Markdown, a terminal, XML, the log of a workflow."""

import ast
import contextlib
import json
import re
from xml.etree import ElementTree

import pytest

from qquant.cli import main, terminal
from qquant.cli.tables import Column, print_table, table_of
from qquant.cli.terminal import console
from qquant.formats.gguf.container import Field, header_bytes
from qquant.report import ci, escape, html
from qquant.report.record import Report, Verdict
from tests.report.test_report import Page, artifact, report
from tests.worlds import ROOT

HOSTILE = (
    "<script>alert(1)</script>", '<img src=x onerror="alert(1)">', "x[/red][bold]", "\x1b]0;owned\x07\x1b[2J", "a\x00b\x0b",
    "too far\n::error::x\n  ::stop-commands::y", "| a | b |", "`code` ![x](http://x/y.png)", "\u202egnp.exe", "\ud83d\ude00 \ufffe",
)  # fmt: skip


def hostile(text) -> Report:
    verdict = Verdict("fail", (text, f"mean KL divergence {text}"), (), text, (text,))
    return report(artifact(text, verdict=verdict), artifact("b"), warnings=(text,))


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_it_as_text(text):
    page = html.render(hostile(text))
    found = Page(page)
    assert not {"script", "img"} & set(found.tags)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_has_no_marks_of_it(text):
    for shown in (hostile(text).to_markdown(), ci.github(hostile(text))):
        assert "<" not in shown
        assert not re.search(r"(?<!\\)(?:!\[|\]\(|`)", shown)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", shown)
        (row,) = [line for line in shown.split("\n") if "4.50" in line and "| b |" not in line[:6]]
        assert len(re.findall(r"(?<!\\)\|", row)) == 9


@pytest.mark.parametrize("text", HOSTILE)
def test_xml_is_well_formed(text):
    suites = ElementTree.fromstring(ci.junit(hostile(text)).encode("utf-8", "surrogatepass"))
    assert suites.get("failures") != "0" or suites.get("skipped") != "0"


@pytest.mark.parametrize("text", HOSTILE)
def test_one_workflow_command_a_reason(text):
    lines = ci.commands(hostile(text)).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("::error title=") for line in lines)


@pytest.mark.parametrize("text", HOSTILE)
def test_neither_terminal_nor_log_is_steered(text, tmp_path, capsys):
    (tmp_path / "report.json").write_text(hostile(text).to_json(), "utf-8", "surrogatepass")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path)])
    assert caught.value.code in (3, 5)  # 5: half a pair of surrogates
    shown = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", shown)
    assert not re.search(r"(?m)^\s*::", shown)


@pytest.mark.parametrize("text", HOSTILE)
def test_one_sink_prints_everything(text, capsys, monkeypatch):
    terminal.echo(f"a warning: {text}\n{text}")
    terminal.echo(text, nl=False, err=True)
    for width in ("140", "60", "30"):
        monkeypatch.setenv("COLUMNS", width)
        print_table([Column("a title", words=True), Column("b")], [(text, text)], text)
    terminal.echo_json(json.dumps({"a": text}, ensure_ascii=False))
    out, err = capsys.readouterr()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", out + err)
    assert not re.search(r"(?m)^\s*::", out)
    assert json.loads(out[out.index('{"a"') :]) == {"a": text.encode("utf-16", "surrogatepass").decode("utf-16")}


def test_nothing_is_printed_beside_the_sink():
    """`terminal.echo` and its like are the only ones that print; tables by `tables.print_table`, whose cells are lines of text."""
    calls = []
    for path in sorted((ROOT / "qquant" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "click.echo",
                "click.secho",
                "print",
                "sys.stdout.write",
            ):
                calls.append(path.name)
    assert calls == ["terminal.py"] * 2


def strange_gguf(path, text):
    head, _, size = header_bytes(
        [Field("general.architecture", "str", text), Field(f"x.{text}", "str", text)], [(text, (32,), 0, 128)]
    )
    path.write_bytes(head + bytes(size - len(head)))
    return path


@pytest.mark.parametrize("text", HOSTILE[:-1])
@pytest.mark.parametrize("more", [(), ("--json",), ("--tensors",)], ids=["plain", "json", "tensors"])
def test_what_a_file_holds_is_shown_as_text(text, more, tmp_path, capsys):
    path = strange_gguf(tmp_path / "model.gguf", text)
    with contextlib.suppress(SystemExit):
        main(["inspect", str(path), *more])
    shown = "".join(capsys.readouterr())
    assert len(shown) > 20
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", shown)
    assert not re.search(r"(?m)^\s*::", shown)


def test_a_table_shows_marks_of_rich(capsys):
    console().print(table_of(hostile("x[/red]"), 140))
    assert "x[/red]" in capsys.readouterr().out


def test_what_is_said_stays_readable():
    plain = "mean KL divergence 0.06 is above the limit 0.05 (95 % interval 0.055 to 0.066, 40 windows): gguf-q4_0"
    for sink in (escape.visible, escape.in_line, escape.in_lines, escape.markdown, escape.xml):
        assert sink(plain) == plain
    assert escape.in_lines("a\nb") == "a\nb"
    assert escape.in_line("a\nb\x1b") == r"a\nb\x1b"
