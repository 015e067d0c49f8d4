"""Chat templates: Jinja from strangers, run in a sandbox and within bounds.

The settings are those that transformers gives templates (`trim_blocks`, `lstrip_blocks`, loop controls, `tojson` without HTML escapes,
`raise_exception`, `{% generation %}`), with these differences:

    attributes    only the methods in METHODS, on text, mappings and lists; nothing that begins with an underscore (jinja's sandbox)
    filters       only those in FILTERS
    work          STEPS per rendering: one for each call and each item of a loop or of a filter's input, and one for each
                  TEXT_PER_STEP characters that are put together; no value longer than VALUE_LIMIT, no power, no % on text
    time          `strftime_now` tells TODAY, so that the same recipe gives the same tokens on any day

The syntax tree is rewritten before it is compiled, so that every loop and every `~` is metered; nothing is computed while compiling.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from qquant.errors import InputError

SIZE_LIMIT = 200_000  # characters of a template
STEPS = 1_000_000
TEXT_PER_STEP = 64
VALUE_LIMIT = 1 << 20  # characters or items
OUTPUT_LIMIT = 1 << 22  # characters
TODAY = datetime(2024, 2, 5)
FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError,
)  # fmt: skip
TEXT_METHODS = (
    "strip lstrip rstrip split rsplit splitlines startswith endswith replace join lower upper title capitalize swapcase find rfind "
    "index rindex count partition rpartition removeprefix removesuffix isdigit isalpha isalnum isspace isupper islower isnumeric"
)
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(TEXT_METHODS.split()),
    dict: frozenset(("items", "keys", "values", "get")),
    list: frozenset(("index", "count")),
    tuple: frozenset(("index", "count")),
    int: frozenset(),
    float: frozenset(),
    bytes: frozenset(),
}
FILTER_NAMES = (
    "abs capitalize count d default dictsort e escape first float groupby int items join last length list lower map max min reject "
    "rejectattr replace reverse round safe select selectattr sort string striptags sum title trim truncate unique upper wordcount"
)
FILTERS = frozenset(FILTER_NAMES.split())
GLOBALS = ("range", "dict", "namespace", "cycler", "joiner")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here its content passes through."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metering(NodeTransformer):
    """Sends what loops run over, and what `~` joins, through the environment's meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "metered", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment whose templates can neither reach out nor run away."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.left = STEPS
        self.globals = {name: self.globals[name] for name in GLOBALS}
        self.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
        self.filters = {name: self._metered(self.filters[name]) for name in FILTERS}
        self.filters |= {"tojson": self._json, "indent": self._indent, "metered": self.meter, "joined": self._joined}

    def spend(self, steps: int) -> None:
        """Take `steps` from what is left of this rendering."""
        self.left -= steps
        if self.left < 0:
            raise jinja2.TemplateRuntimeError(f"it takes more than {STEPS:,} steps")

    def meter(self, value: Any) -> Any:
        """`value`, after its size was taken from the steps; of iterators, as they are used."""
        if isinstance(value, str):
            self._bound(len(value))
        elif isinstance(value, Sized):
            self.spend(1 + len(value))
        elif isinstance(value, Iterator):
            return self._counted(value)
        return value

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item

    def _bound(self, size: int) -> None:
        if size > VALUE_LIMIT:
            raise jinja2.TemplateRuntimeError(f"a value of more than {VALUE_LIMIT:,} characters or items")
        self.spend(1 + size // TEXT_PER_STEP)

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        place = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def metered(*given: Any, **named: Any) -> Any:
            arguments = list(given)
            if len(arguments) > place:
                arguments[place] = self.meter(arguments[place])
                self._foresee(function.__name__.removeprefix("do_"), arguments[place:])
            return function(*arguments, **named)

        return metered

    def _foresee(self, name: str, arguments: list[Any]) -> None:
        """Bound the result of the calls that can make more of what they are given: (text, ...) of replace, (text or list, ...) of join."""
        if name == "replace" and len(arguments) > 2:
            text, old, new = (str(argument) for argument in arguments[:3])
            self._bound(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join":
            separator = next((str(argument) for argument in arguments if isinstance(argument, str)), "")
            items = next((argument for argument in arguments if isinstance(argument, list | tuple)), ())
            self._bound(sum(len(item) + len(separator) for item in items if isinstance(item, str)))

    def _joined(self, parts: Iterable[Any]) -> str:
        words = [str(part) for part in parts]
        self._bound(sum(map(len, words)))
        return "".join(words)

    def _json(self, value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise jinja2.TemplateRuntimeError(f"tojson with an indent of {indent}")
        unknown = set(options) - {"separators", "sort_keys"}
        if unknown:
            raise jinja2.TemplateRuntimeError(f"tojson has no option {min(unknown)}")
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
        self._bound(len(text))
        return text

    def _indent(self, text: str, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        if not isinstance(width, int) or not 0 <= width <= 64:
            raise jinja2.TemplateRuntimeError(f"indent of {width}")
        lines = str(text).split("\n")
        self._bound(len(text) + width * len(lines))
        pad = " " * width
        return "\n".join(
            pad + line if (number or first) and (line or blank) else line for number, line in enumerate(lines)
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Metering().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def wrap_str_format(self, value: Any) -> None:
        """No formatting with widths: `str.format` is not among METHODS."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have `obj.attr`."""
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, and count it."""
        self.spend(1)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._bound(len(owner))
            self._foresee(function.__name__, [owner, *args])
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, for operators whose result can be large."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            raise jinja2.TemplateRuntimeError(f"the operator {operator} is not for templates")
        if numbers:
            result = super().call_binop(context, operator, left, right)
            if abs(result) > 1 << 63:
                raise jinja2.TemplateRuntimeError("a number beyond 63 bits")
            return result
        sizes = [len(side) if isinstance(side, Sized) else side for side in (left, right)]
        if all(isinstance(size, int) for size in sizes):
            self._bound(sizes[0] + sizes[1] if operator == "+" else max(0, sizes[0]) * max(0, sizes[1]))
        return super().call_binop(context, operator, left, right)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class Template:
    """A compiled chat template."""

    def __init__(self, source: str, origin: str) -> None:
        """Compile `source`; `origin` is where it stands. Raises InputError if it does not parse, or is too long."""
        if len(source) > SIZE_LIMIT:
            raise InputError(f"{origin}: a chat template of {len(source):,} characters; the limit is {SIZE_LIMIT:,}")
        self.environment = Sandbox()
        try:
            self.compiled = self.environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{origin}, line {error.lineno}: the chat template does not parse: {error.message}"
            ) from error
        except (*FAILURES, SyntaxError) as error:
            raise InputError(f"{origin}: the chat template does not compile: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises one of FAILURES if the template refuses, fails, or goes beyond its bounds."""
        self.environment.left = STEPS
        pieces, size = [], 0
        for piece in self.compiled.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > OUTPUT_LIMIT:
                raise jinja2.TemplateRuntimeError(f"it writes more than {OUTPUT_LIMIT:,} characters")
        return "".join(pieces)
