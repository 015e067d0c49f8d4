"""Records as files: typed values written as JSON, and read back strictly, whoever wrote the file.

    to_plain    dataclasses -> mappings and lists; numbers that are not finite become text, since JSON has none
    typed       the reverse: every field of its declared type, nothing converted but "inf", "-inf" and "nan"

A record that does not fit is one InputError: which file, which field, which value. Fields that a type does not declare are ignored,
so that a record of a later version can be read; a field with a default may be missing, so that one of an earlier version can.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from qquant.disk.writes import finite
from qquant.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record")
NOT_FINITE = ("inf", "-inf", "nan")
SHOWN = 60  # characters of a value in a message


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NOT_FINITE else value


Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def typed(kind: type[Record], content: Any, where: str) -> Record:
    """The record of type `kind` that a JSON value holds; `where` is the file, for the message.

    Raises:
        InputError: a field is missing, or of another type.
    """
    try:
        record: Record = _adapter(cast(Any, kind)).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the record"
        value = "" if first["type"] == "missing" else f", got {shortened(first['input'])}"
        raise InputError(f"{where}: {shortened(field)}: {first['msg']}{value}. Make it again, or take a copy") from None
    return record


def shortened(value: object) -> str:
    """A value in a message: at most `SHOWN` characters, on one line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def to_plain(record: DataclassInstance) -> dict[str, Any]:
    """What `json.dumps` takes, in the order of the fields."""
    return dict(finite(dataclasses.asdict(record)))
