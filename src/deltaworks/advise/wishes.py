"""What the user wants and has: sizes with units, counts, yes or no; checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from deltaworks.core.errors import UserError, nearest
from deltaworks.train.columns import ROLES
from deltaworks.train.quantizing import Form
from deltaworks.train.recipe import Positive, Whole

_sizes = TypeAdapter(ByteSize)


def _bytes(value: Any) -> Any:
    """A size with its unit as bytes: 24GB is 24e9, 24GiB 24 * 2**30."""
    if not isinstance(value, str):
        return value
    if value.strip().isdecimal():
        raise ValueError(f"{value.strip()} lacks its unit: write {value.strip()}GB, MB or kB")
    try:
        return int(_sizes.validate_python(value))
    except ValidationError:
        raise ValueError(f"{value!r} is no size: write a number with B, kB, MB, GB, KiB, MiB or GiB") from None


Size = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]


class Wishes(BaseModel):
    """A situation as its owner describes it. Sizes are in bytes, lengths in tokens; None is "not said"."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field("minilm", description="minilm, tiny-vit, a folder, module:function, or a Hub id")
    memory: Size | None = Field(None, description="what training may take; default: what the hardware has")
    hardware: str | None = Field(None, description="where it runs; default: this machine")
    data: str | None = Field(None, description="for the recipe: stdlib-docs, a file, a folder, or a Hub id")
    examples: Whole | None = Field(None, description="training examples")
    task: str | None = Field(None, description="default: guessed from the model")
    labels: Annotated[int, Field(ge=2)] = 2
    trials: Whole = Field(3, description="training runs that may go into finding a learning rate")
    epochs: Positive | None = Field(None, description="passes over the data; default: 3, or what a rule says")
    merge: bool = Field(False, description="the result must be one model without adapters")
    adapters_served: Whole = Field(1, description="adapters that answer over one base at the same time")
    storage: Size | None = Field(None, description="bytes that one saved adapter may take")
    batch: Whole = 32
    length: Whole = 256
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="of the base; default: chosen")
    quantize: Form | None = Field(None, description="of the base; default: chosen")
    methods: str | None = Field(None, description="methods asked for, with commas between; wildcards allowed")


def parse_wishes(values: Mapping[str, Any]) -> Wishes:
    """Checked wishes; what is None is left at its default. Raises UserError that names the option and the mend."""
    given = {key: value for key, value in values.items() if value is not None}
    for key in given:
        if key not in Wishes.model_fields:
            raise UserError(f"there is no wish {key!r}: {nearest(key, Wishes.model_fields)}")
    task = given.get("task")
    if task is not None and task not in ROLES:
        raise UserError(f"--task {task!r} is unknown: {nearest(str(task), ROLES)}")
    try:
        return Wishes(**given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        given_as = "" if first["type"] == "value_error" else f" (given: {first['input']!r})"
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise UserError(f"{option}: {reason[:1].lower()}{reason[1:]}{given_as}") from None
