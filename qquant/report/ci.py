"""Reports for machines that watch builds: JUnit XML, and a summary for GitHub's step page.

One test case per gate, named artifact.gate: a fail is a failure, an inconclusive gate an error, a waived fail is skipped with the waiver as
its message, so that it shows and does not block. Findings of structure and answers stand in a case of their own.
"""

from __future__ import annotations

from xml.etree import ElementTree

from qquant.report.escape import command, command_property, markdown, xml
from qquant.report.record import TITLES, ArtifactReport, Report

MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "waived": "⚠️"}
KINDS = {"fail": "failure", "inconclusive": "error"}


def junit(*reports: Report) -> str:
    """The reports as JUnit XML."""
    suites = ElementTree.Element("testsuites", name=f"qquant {', '.join(report.model for report in reports)}")
    for model, artifact in [(report.model, artifact) for report in reports for artifact in report.artifacts]:
        suite = ElementTree.SubElement(suites, "testsuite", name=f"{model}.{artifact.name}")
        _findings(suite, artifact)
        for gate in artifact.verdict.gates:
            case = ElementTree.SubElement(suite, "testcase", classname=artifact.name, name=gate.name)
            numbers = f"{gate.value:.6g}, limit {gate.limit:g}, {gate.between(digits=6)}"
            _result(case, gate.outcome, numbers, artifact.verdict.waiver)
        _count(suite)
    _count(suites)
    for element in suites.iter():
        element.text = xml(element.text) if element.text else element.text
        for key, value in element.items():
            element.set(key, xml(value))
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, "unicode", xml_declaration=True) + "\n"


def _findings(suite: ElementTree.Element, artifact: ArtifactReport) -> None:
    """What is no matter of degree: findings that belong to no gate."""
    verdict = artifact.verdict
    gated = any(gate.outcome != "pass" for gate in verdict.gates)
    faults = verdict.faults or (() if gated else verdict.reasons)  # a record of an earlier version has no faults apart
    case = ElementTree.SubElement(suite, "testcase", classname=artifact.name, name="structure and answers")
    _result(case, "fail" if faults else "pass", "\n".join(faults), artifact.verdict.waiver)


def _result(case: ElementTree.Element, outcome: str, text: str, waiver: str) -> None:
    if outcome == "fail" and waiver:
        ElementTree.SubElement(case, "skipped", message=f"{waiver} ({text})")
    elif outcome in KINDS:
        first = text.partition("\n")[0]
        ElementTree.SubElement(case, KINDS[outcome], message=first, type=outcome).text = text
    elif text:
        ElementTree.SubElement(case, "system-out").text = text


def _count(element: ElementTree.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(len(list(element.iter(tag)))))


def github(report: Report) -> str:
    """The report as Markdown for the summary page of a step, which GitHub names in GITHUB_STEP_SUMMARY."""
    text = report.to_markdown()
    lines = [f"{MARKS[report.outcome]} **{markdown(report.model)}**: {TITLES[report.outcome]}", ""]
    return "\n".join(lines) + text.partition("\n")[2].lstrip("\n")


def commands(report: Report) -> str:
    """Workflow commands that GitHub shows beside the run, one line per reason."""
    kinds = {"fail": "error", "inconclusive": "error", "waived": "warning"}
    lines = [
        f"::{kinds[artifact.verdict.outcome]} title={command_property(artifact.name)}::{command(reason)}"
        for artifact in report.artifacts
        if artifact.verdict.outcome in kinds
        for reason in artifact.verdict.lines
    ]
    return "".join(f"{line}\n" for line in lines)
