"""A case of tool use: a question in one of the languages, the calls that answer it with their results, and the answer."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Draw = random.Random


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    human: str
    about: str
    parameters: dict[str, tuple[str, str, bool]]  # name: (type, description, required)

    def listed(self) -> list[dict]:
        """The parameters as Qwen's ReAct prompt has them."""
        return [
            {"name": name, "description": about, "required": required, "schema": {"type": kind}}
            for name, (kind, about, required) in self.parameters.items()
        ]

    def schema(self) -> dict:
        """The tool as JSON schema."""
        properties = {name: {"type": kind, "description": about} for name, (kind, about, _) in self.parameters.items()}
        required = [name for name, (_, _, needed) in self.parameters.items() if needed]
        return {
            "name": self.name,
            "description": self.about,
            "parameters": {"type": "object", "properties": properties, "required": required},
        }


@dataclass(frozen=True)
class Step:
    """One call and what it returned."""

    thought: str
    tool: Tool
    arguments: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Case:
    """A question, the calls that answer it, and the answer."""

    question: str
    steps: list[Step]
    done: str  # the last thought
    final: str


Scenario = Callable[[Draw], Case]


def dumps(value: Any) -> str:
    """JSON in the letters of the language."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
