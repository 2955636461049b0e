"""The types of the fields of a peft configuration: one check before any of them is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from deltaworks.core.errors import UserError
from deltaworks.store.foreign.peft_types import Type


class Kind(NamedTuple):
    """What the values of a field are, and the words for it."""

    words: str
    holds: Callable[[Any], bool]


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple | set) and all(map(holds, value))


def _mapping_to(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(k, str) and holds(v) for k, v in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


TEXTS = Kind("a list of names", _list_of(_is_text))
EXPRESSION = Kind("a regular expression or a list of names", lambda value: _is_text(value) or TEXTS.holds(value))
WHOLE = Kind("a whole number", _is_whole)
WHOLES = Kind("a whole number or a list of them", lambda value: _is_whole(value) or _list_of(_is_whole)(value))
ROWS = Kind(
    "a list of whole numbers, or one for each name",
    lambda value: _list_of(_is_whole)(value) or _mapping_to(_list_of(_is_whole))(value),
)
NUMBER = Kind("a number", _is_number)
BIAS = Kind(
    "'none', 'all' or '..._only'", lambda value: _is_text(value) and bool(re.fullmatch("none|all|.*_only", value))
)

EMPTIABLE: dict[str, Kind] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), EXPRESSION),
    **dict.fromkeys(("modules_to_save", "target_parameters"), TEXTS),
    "layers_to_transform": WHOLES,
    "trainable_token_indices": ROWS,
    "bias": BIAS,
}
"""Fields that may be null."""
NUMBERS: dict[str, Kind] = {
    **dict.fromkeys(("r", "target_r", "init_r", "mini_r", "tinit", "tfinal", "deltaT", "num_virtual_tokens"), WHOLE),
    **dict.fromkeys(("oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor"), WHOLE),
    **dict.fromkeys(("n_frequency", "decompose_factor", "projection_prng_key", "random_loc_seed"), WHOLE),
    **dict.fromkeys(("lora_alpha", "alpha", "scaling", "eps", "d_initial"), NUMBER),
    **dict.fromkeys(("orth_reg_weight", "beta1", "beta2", "lora_dropout", "vera_dropout"), NUMBER),
}
"""Fields that may not."""


def check_values(row: Type, data: Mapping[str, Any]) -> None:
    """Raises UserError for a field whose value is of another type, or a regular expression that is none."""
    patterns = {own.pattern: NUMBERS[own.theirs] for own in row.fields if own.pattern}
    for field, kind in patterns.items():
        each = Kind(f"names, each with {kind.words}", _mapping_to(kind.holds))
        _check(row, data, field, each, empty=True)
    for field, kind in EMPTIABLE.items():
        _check(row, data, field, kind, empty=True)
    for field, kind in NUMBERS.items():
        _check(row, data, field, kind, empty=False)
    for field, text, expression in _expressions(data, patterns):
        try:
            re.compile(expression)
        except re.error as error:
            raise UserError(f"{field}: {text!r} is no regular expression ({error}): correct it") from None


def _check(row: Type, data: Mapping[str, Any], field: str, kind: Kind, *, empty: bool) -> None:
    value = data.get(field)
    if field in data and not (empty and value is None) and not kind.holds(value):
        raise UserError(f"peft's {row.peft} with {field}={value!r:.60}: {field} is {kind.words}")


def _expressions(data: Mapping[str, Any], patterns: Mapping[str, Kind]) -> Iterator[tuple[str, str, str]]:
    """Field, text and what is compiled of it, as the comparisons compile it."""
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(text := data.get(field), str):
            yield field, text, text
    own = data.get("layers_pattern") or []
    for text in [own] if isinstance(own, str) else own:
        yield "layers_pattern", text, rf"\.{text}\."
    for field in patterns:
        for text in data.get(field) or {}:
            yield field, text, f"({text})"
