"""Report pages as a browser lays them out, on a phone and on a desk: nothing is cut off, and numbers can be reached whatever the names."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from qquant.report.html import family, render
from qquant.report.record import Verdict
from tests.report.test_report import GATE, SPEED, artifact, report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG = "a_fine_tune_of_2026-11-29T10_20_30_with_a_name_that_nobody_would_type-q8_0.gguf"
REASON = f"{LONG}: top-1 agreement: About 43 windows decide: --max-windows={'4' * 60}"
MEASURE = """
const page = document.querySelector("iframe").contentDocument, wide = innerWidthOfFrame;
page.querySelectorAll("details").forEach((part) => (part.open = true));
const sticky = [...page.querySelectorAll(".scroll > table:not(.heat) td:first-child")];
const shown = page.defaultView.getComputedStyle(page.querySelector(WIDE ? "svg.wide" : "svg.narrow")).display;
document.title = JSON.stringify({
  scrolls: page.documentElement.scrollWidth,
  first: Math.max(...sticky.map((cell) => cell.getBoundingClientRect().width / cell.closest(".scroll").clientWidth)),
  picture: shown,
  lines: sticky.every((cell) => page.defaultView.getComputedStyle(cell).borderTopWidth === "1px"),
});
"""


def laid_out(text, width, tmp_path):
    """What a page measures in a frame of `width` CSS pixels."""
    script = MEASURE.replace("innerWidthOfFrame", str(width)).replace("WIDE", json.dumps(width > 640))
    frame = f'<iframe srcdoc="{html.escape(text)}" style="border:0;width:{width}px;height:900px"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}<script>onload = () => {{{script}}}</script>")
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=3000", "--window-size=1400,1000", "--dump-dom", str(tmp_path / "frame.html")],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("pages", [1, 2], ids=["one", "family"])
def test_nothing_is_cut_off(pages, width, tmp_path):
    verdict = Verdict("inconclusive", gates=(replace(GATE, outcome="inconclusive"),), reasons=(REASON,))
    one = report(artifact(LONG, verdict=verdict, speed=SPEED), artifact("gptq-int4", speed=SPEED))
    text = render(one) if pages == 1 else family({LONG: one, "out": one})
    found = laid_out(text, width, tmp_path)
    assert found["scrolls"] <= width
    assert found["first"] < 0.75, "the first column stays while others scroll past; it must leave them room"
    assert found["picture"] != "none"
    assert found["lines"], "above a cell, since what stays in place paints over the line below the cell before it"
