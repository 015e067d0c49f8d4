"""Transcripts of tool use: ReAct as Qwen1.5 was taught it, and calls as JSON. The tools are invented, their results are computed or drawn.

A scenario is drawn as a `Case`: question, steps and final answer in one of its languages. Calibration and held-out transcripts have different
scenarios (`tools_calibration`, `tools_heldout`), tools, values and wordings of the instructions.
"""

import random
from typing import Any

from cases import Case, Tool, dumps
from tools_calibration import CALIBRATION, CALIBRATION_TOOLS
from tools_heldout import HELDOUT, HELDOUT_TOOLS

REACT = """Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {question}"""
REACT_TOOL = "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {about} Parameters: {parameters} Format the arguments as a JSON object."
OTHER_REACT = """Solve what the user asks; these helpers may be called:

{tools}

Write in this order, one item a line.
Question: what is asked
Thought: a short consideration
Action: exactly one of [{names}]
Action Input: arguments, a JSON object
Observation: filled in by the helper
(go on with Thought, Action, Action Input and Observation until nothing is missing)
Thought: why the result suffices
Final Answer: the reply

Question: {question}"""
OTHER_TOOL = "- {name} ({human}). {about} Arguments: {parameters}"
JSON_SYSTEM = """You can call functions. To call one, reply with a JSON object {"name": ..., "arguments": {...}} and nothing else. When you have what you need, reply to the user in plain text.

Functions:
"""
OTHER_JSON = """Functions below are at your disposal.
A reply that is a list [{"function": ..., "parameters": {...}}] is executed and its output comes back; any other reply goes to the user.

"""


def react(case: Case, tools: list[Tool], heldout: bool) -> list[dict]:
    """One answer with all its steps, the observations among them."""
    line = OTHER_TOOL if heldout else REACT_TOOL
    described = "\n\n".join(
        line.format(name=t.name, human=t.human, about=t.about, parameters=dumps(t.listed())) for t in tools
    )
    prompt = (OTHER_REACT if heldout else REACT).format(
        tools=described, names=", ".join(t.name for t in tools), question=case.question
    )
    text = ""
    for step in case.steps:
        text += f"Thought: {step.thought}\nAction: {step.tool.name}\nAction Input: {dumps(step.arguments)}\nObservation: {dumps(step.result)}\n"
    text += f"Thought: {case.done}\nFinal Answer: {case.final}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def calls(case: Case, tools: list[Tool], heldout: bool) -> list[dict]:
    """Calls and results as turns of JSON."""
    listed = [t.schema() for t in tools]
    system = OTHER_JSON + dumps(listed) if heldout else JSON_SYSTEM + "\n".join(map(dumps, listed))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": case.question}]
    for step in case.steps:
        call: Any = {"name": step.tool.name, "arguments": step.arguments}
        if heldout:
            call = [{"function": step.tool.name, "parameters": step.arguments}]
        result = {"output": step.result} if heldout else {"name": step.tool.name, "result": step.result}
        messages += [{"role": "assistant", "content": dumps(call)}, {"role": "user", "content": dumps(result)}]
    return [*messages, {"role": "assistant", "content": case.final}]


def chats(heldout: bool, count: int) -> list[dict]:
    """`count` transcripts, two of three in ReAct, no question twice."""
    draw = random.Random("tools, held out" if heldout else "tools")
    scenarios, tools = (HELDOUT, HELDOUT_TOOLS) if heldout else (CALIBRATION, CALIBRATION_TOOLS)
    written: list[dict] = []
    asked: set[str] = set()
    while len(written) < count:
        case = scenarios[len(written) % len(scenarios)](draw)
        if case.question in asked:
            case = draw.choice(scenarios)(draw)
            if case.question in asked:
                continue
        asked.add(case.question)
        used = list({step.tool.name: step.tool for step in case.steps}.values())
        offered = used + [t for t in draw.sample(tools, draw.randrange(3)) if t not in used]
        draw.shuffle(offered)
        form = react if draw.random() < 0.67 else calls
        written.append({"messages": form(case, offered, heldout)})
    return written
