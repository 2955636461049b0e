"""What a row of the table of peft's methods says: their fields beside our options, their tensors beside ours.

A row serves reading and writing. What it does not name must be at a value that says nothing, else it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from deltaworks.core.places import Place

Shape = tuple[int | None, ...]


class Spot(NamedTuple):
    """A tuner, and the module and the place that it stands around."""

    tuner: Any
    module: Any
    place: Place


@dataclass(frozen=True)
class Field:
    """Our option, their field and the value that theirs has where it is not given.

    ``pattern`` is their field that gives other values to some modules, by their names.
    """

    ours: str
    theirs: str
    default: Any
    pattern: str | None = None
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Name:
    """A tensor of our tuner, and what follows the module's path in their file.

    ``shape`` gives their shape from ours (None: any size); the values stand in the same order, changed by ``read`` to
    ours and by ``write`` to theirs. ``when`` says for which tuners the name stands. ``columns`` are those of their
    tensor that are ours, where it holds several of ours side by side.
    """

    ours: str
    theirs: str
    shape: Callable[[Shape, Spot], Shape] = lambda shape, spot: shape
    read: Callable[[Tensor, Spot], Tensor] = lambda tensor, spot: tensor
    write: Callable[[Tensor, Spot], Tensor] = lambda tensor, spot: tensor
    when: Callable[[Spot], bool] = lambda spot: True
    columns: Callable[[Spot], slice] | None = None


@dataclass(frozen=True)
class Type:
    """One type of peft beside one method of ours.

    Attributes:
        names: tensors by the kind of place; only at these kinds does peft have the type.
        says: fields whose values tell this row from others of its type.
        site: more options of ours for one module, of their configuration, the place and the model.
        sited: the fields that ``site`` reads.
        written: more fields of theirs, of the tuners with their places and ``target_modules``.
        shaped: our options that ``written`` or the tensors tell, so that they may differ between modules.
        training: their fields without a counterpart that act in training alone.
        idle: their fields that say nothing by themselves.
        unsaid: our options without a counterpart that act in training alone.
        seed: their field that holds our seed, and the value that it has where it is not given.
        bias: the value of ``bias`` for the biases of adapted modules, where the type trains biases.
        holds: whether the type can say a tuner of ours.
        starts: the values of their field for the start under which ours starts as theirs does.
        begins: more fields that act in training alone, and the value of theirs that ours trains by.
        whole: it stands around the model, so it has no ``target_modules``.
        made: only what the method has made is stored, which another method of ours holds; it cannot be attached afresh.
    """

    peft: str
    method: str
    fields: tuple[Field, ...]
    names: Mapping[str, tuple[Name, ...]]
    says: Mapping[str, Any] = field(default_factory=dict)
    site: Callable[[Mapping[str, Any], Any, Any], dict[str, Any]] = lambda data, place, model: {}
    sited: tuple[str, ...] = ()
    written: Callable[[list[Any], Any], dict[str, Any]] = lambda items, chosen: {}
    shaped: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    seed: tuple[str, int] | None = None
    bias: str | None = None
    holds: Callable[[Any], bool] = lambda tuner: True
    starts: tuple[Any, ...] = (True,)
    begins: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False
    made: bool = False

    @property
    def prefix(self) -> str:
        """What stands in front of a module's path: what wraps the model as a whole does not wrap it twice."""
        return "base_model." if self.whole else "base_model.model."


def reshaped(*before: int, after: int = 0) -> Callable[[Shape, Spot], Shape]:
    """A shape with sizes of 1 in front of ours and behind it."""
    return lambda shape, spot: (*before, *shape, *[1] * after)


def under(**names: str) -> tuple[Name, ...]:
    """Tensors under the module's path that are alike in both files."""
    return tuple(Name(ours, f"{{path}}.{theirs}") for ours, theirs in names.items())


def at(*kinds: str, names: tuple[Name, ...]) -> dict[str, tuple[Name, ...]]:
    return dict.fromkeys(kinds, names)


def base_added(ours: str, theirs: str, parameter: str) -> Name:
    """A change of ours whose sum with a parameter of the base is theirs."""
    return Name(
        ours,
        theirs,
        read=lambda tensor, spot: tensor.float() - spot.module._parameters[parameter].detach().float(),
        write=lambda tensor, spot: tensor + spot.module._parameters[parameter].detach().float(),
    )
