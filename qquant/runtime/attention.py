"""Attention of transformers whose rotary positions are one launch: its own class and its own code, with another function for the rotation.

Transformers rotates queries and keys by ten launches, where a decoder block's products are four, and has no setting for it. So a
subclass runs the code of transformers' `forward` with our rotation under the name that the code asks for, whatever else a version does there.
Transformers' modules and classes stay as they are; a version whose code asks for no such name keeps its class, and what our kernel
(`qquant.kernels.elementwise`) does not serve goes to transformers' function.
"""

from __future__ import annotations

import dis
import functools
import types
from typing import Any

from torch import nn

from qquant.kernels import elementwise

ROTATION = "apply_rotary_pos_emb"  # (query, key, cosine, sine) -> (query, key), in transformers


def with_rotation(module: nn.Module) -> nn.Module:
    """The module itself, of a class with our rotation if its code asks for one."""
    module.__class__ = rotating(type(module))
    return module


class Rotating:
    """What tells such a subclass, which is made anew where a pickle is read."""

    theirs: type[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (self.theirs,), self.__dict__


_made: dict[type[Any], type[Any]] = {}  # by transformers' class


def rotating(base: type[Any]) -> type[Any]:
    """A subclass of an attention class, which keeps its name; the class itself if its code asks for no rotation, or has ours."""
    if base not in _made:
        forward = None if issubclass(base, Rotating) else _with_rotation(base.forward)
        held = {"forward": forward, "theirs": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _made[base] = base if forward is None else type(base.__name__, (Rotating, base), held)
    return _made[base]


def _empty(base: type[Any]) -> Any:
    return object.__new__(rotating(base))


def _with_rotation(function: Any) -> Any:
    """The function, or what it wraps, with other globals; None if they are not asked for the rotation."""
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        theirs = getattr(function, "__globals__", {}).get(ROTATION)
        if theirs is None or not any(
            step.opname == "LOAD_GLOBAL" and step.argval == ROTATION for step in dis.get_instructions(function)
        ):
            return None
        names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
        return _copied(function, names | {ROTATION: _rotation(theirs)}, function.__closure__)
    inner = _with_rotation(wrapped)
    cells = function.__closure__ or ()
    if inner is None or not any(cell.cell_contents is wrapped for cell in cells):
        return None
    inside = tuple(types.CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells)
    copied = _copied(function, function.__globals__, inside)
    copied.__wrapped__ = inner
    return copied


def _copied(function: Any, names: dict[str, Any], closure: Any) -> Any:
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function, updated=())


def _rotation(theirs: Any) -> Any:
    """Transformers' function, with one launch where that is possible."""

    @functools.wraps(theirs)
    def rotation(query: Any, key: Any, cosine: Any, sine: Any, *others: Any, **more: Any) -> Any:
        found = None if others or more else elementwise.rotated(query, key, cosine, sine)
        return theirs(query, key, cosine, sine, *others, **more) if found is None else found

    return rotation
