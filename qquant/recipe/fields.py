"""What the models of a recipe share: a strict base, and the types of their fields.

pydantic checks types and ranges, field by field. Its `Literal` compares with `==`, so `true` would pass as 1 and 4.0
as 4: `Whole` and `Truth` close that. What no single field shows (two origins of one text, a repeated name) stands in
`conflicts` of each model. It runs when a model is made, and before that on the plain data of a file, because pydantic
does not come to it where a field is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from qquant.recipe.words import Location, key_path

if TYPE_CHECKING:
    from typing import Self

Conflict = tuple[Location, str]


def _whole(value: object) -> object:
    if type(value) is not int:
        raise PydanticCustomError("literal_error", "not a whole number")
    return value


def _truth(value: object) -> object:
    if type(value) is not bool:
        raise PydanticCustomError("literal_error", "not a truth value")
    return value


Whole = BeforeValidator(_whole)
Truth = BeforeValidator(_truth)
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
AtLeast1 = Annotated[float, Field(ge=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @staticmethod
    def conflicts(values: Mapping[str, Any]) -> Iterator[Conflict]:  # noqa: ARG004 - for those that have some
        """What is impossible among the `values` of every field."""
        yield from ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for location, message in self.conflicts(self.model_dump()):
            raise ValueError(f"{key_path(location)}: {message}")
        return self
