"""`qquant run`: ask an artifact something."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qquant import devices
from qquant.cli.command import command
from qquant.cli.options import DEVICE, EXITS, JSON, REVISION, Number
from qquant.cli.terminal import begins, echo, echo_json
from qquant.errors import UsageError

if TYPE_CHECKING:
    from qquant.runtime.answering import Answerer, AnswerSettings


@command(
    epilog=EXITS,
    surplus="one PROMPT in quotes",
    example="run release/Qwen1.5-0.5B-Chat-AWQ 'What is the capital of France?'",
)
@click.argument("artifact")
@click.argument("prompt", required=False)
@click.option("--system", help="The system turn; default: the one that the chat template adds, if any.")
@click.option("--no-system", is_flag=True, help="An empty system turn instead of the template's own.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text, without the chat template.")
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@REVISION
@click.option("--greedy", is_flag=True, help="Always the likeliest token.")
@click.option("--temperature", type=Number(min=0, min_open=True), help="Default: the artifact's own.")
@click.option("--top-p", type=Number(0, 1, min_open=True), help="Default: the artifact's own.")
@click.option("--top-k", type=click.IntRange(min=1), help="Default: the artifact's own.")
@click.option("--repetition-penalty", type=Number(min=0, min_open=True), help="Default: the artifact's own.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Sample the same answer again; default: another one each time."
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the activations; default: the artifact's own.",
)
@click.option("--paths", "show_paths", is_flag=True, help="Say on stderr what runs for every linear.")
@DEVICE
@JSON
def run(
    artifact: str, prompt: str | None, revision: str | None, system: str | None, no_system: bool, raw: bool, max_new_tokens: int, greedy: bool,
    temperature: float | None, top_p: float | None, top_k: int | None, repetition_penalty: float | None, seed: int | None,
    dtype: str | None, show_paths: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Answer PROMPT with an artifact: a GPTQ or AWQ folder, a GGUF file, or a checkpoint; words appear as they come.

    PROMPT may be - for standard input. Without one, on a terminal, a conversation begins: an empty line ends it, Ctrl-C stops an answer.
    """
    if system is not None and no_system:
        raise UsageError("--system and --no-system contradict each other")
    if greedy and (temperature or top_p or top_k):
        raise UsageError("--greedy takes the likeliest token: leave out --temperature, --top-p and --top-k")
    if prompt is None and (as_json or raw or not sys.stdin.isatty()):
        raise UsageError("give a PROMPT (or - to read it from standard input); a conversation needs a terminal")
    begins(f"loading {artifact}")
    from qquant.runtime.answering import Answerer, AnswerSettings

    settings = AnswerSettings(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    answerer = Answerer.open(artifact, devices.named(device), dtype, revision)
    if show_paths:
        for name, path in answerer.paths().items():
            echo(f"{name}: {path}", err=True)
    if answerer.runs_on and not raw:
        what = "Answers go on until another stop token or --max-new-tokens; --raw continues plain text"
        echo(f"warning: {answerer.runs_on}. {what}", err=True)
    turns = [] if system is None and not no_system else [{"role": "system", "content": system or ""}]
    if prompt is None:
        _talk(answerer, turns, settings)
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = answerer.encode(text) if raw else answerer.encode_chat([*turns, {"role": "user", "content": text}])
    _answer(answerer, ids, settings, lambda _: None, as_json)


def _answer(
    answerer: Answerer, ids: list[int], settings: AnswerSettings, hear: Callable[[str], None], as_json: bool = False
) -> None:
    """Stream the answer (or print it as JSON); `hear` is told every piece as it comes."""

    def write(piece: str) -> None:
        hear(piece)
        if not as_json:
            echo(piece, nl=False)

    answer = answerer.answer(ids, settings, write)
    if as_json:
        content: dict[str, Any] = {"schema": "qquant-answer-1", "answer": answer.text, "stopped": answer.stopped}
        content |= {"prompt_tokens": len(ids), "tokens": answer.tokens, "load_seconds": round(answerer.load_seconds, 3)}
        content |= {"seconds_to_first": round(answer.to_first, 3), "seconds": round(answer.seconds, 3)}
        content |= {"tokens_per_second": answer.rate and round(answer.rate, 2)}
        echo_json(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        echo()
        rate = f", then {answer.rate:.1f} tokens/s" if answer.rate else ""
        echo(
            f"loaded in {answerer.load_seconds:.1f} s; {len(ids)} tokens read, {answer.to_first:.2f} s to the first "
            f"of {answer.tokens}{rate}",
            err=True,
        )


def _talk(answerer: Answerer, turns: list[dict[str, str]], settings: AnswerSettings) -> None:
    """A conversation, with line editing and history where Python has them; Ctrl-C stops an answer, and what was said of it stays."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - edits the lines of `input`
    echo("An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.", err=True)
    while True:
        try:
            question = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
        except click.Abort:
            return
        if not question:
            return
        turns.append({"role": "user", "content": question})
        said: list[str] = []
        try:
            _answer(answerer, answerer.encode_chat(turns), settings, said.append)
        except KeyboardInterrupt:
            echo("\n(stopped)", err=True)
        turns.append({"role": "assistant", "content": "".join(said)})
