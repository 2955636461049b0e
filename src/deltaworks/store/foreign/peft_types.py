"""The methods of huggingface/peft that we hold, as one table: their fields and our options, their tensors and ours.

A row says all that reading and writing need, in both directions. A ``Field`` pairs an option with a field, a ``Name``
a tensor with a tensor. What a row does not name must be at a value that says nothing, else it is an error.
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
    ours and by ``write`` to theirs. ``when`` says for which tuners the name stands.
    """

    ours: str
    theirs: str
    shape: Callable[[Shape, Spot], Shape] = lambda shape, spot: shape
    read: Callable[[Tensor, Spot], Tensor] = lambda tensor, spot: tensor
    write: Callable[[Tensor, Spot], Tensor] = lambda tensor, spot: tensor
    when: Callable[[Spot], bool] = lambda spot: True


@dataclass(frozen=True)
class Type:
    """One type of peft beside one method of ours.

    Attributes:
        names: tensors by the kind of place; only at these kinds does peft have the type.
        says: fields whose values tell this row from others of its type.
        training: their fields without a counterpart that act in training alone.
        idle: their fields that say nothing by themselves.
        unsaid: our options without a counterpart that act in training alone.
        seed: their field that holds our seed.
        site: more options of ours for one module, of their configuration and the place.
        written: more fields of theirs, of the tuners with their places.
        bias: the value of ``bias`` for the biases of adapted modules, where the type trains biases.
        shaped: our options that the tensors or ``written`` tell, so that they may differ between modules.
        holds: whether the type can say a configuration of ours.
        starts: the values of their field for the start under which ours starts as theirs does.
        whole: it stands around the model, so it has no ``target_modules``.
    """

    peft: str
    method: str
    fields: tuple[Field, ...]
    names: Mapping[str, tuple[Name, ...]]
    says: Mapping[str, Any] = field(default_factory=dict)
    training: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    seed: str | None = None
    site: Callable[[Mapping[str, Any], Any], dict[str, Any]] = lambda data, place: {}
    written: Callable[[list[Any]], dict[str, Any]] = lambda items: {}
    bias: str | None = None
    shaped: tuple[str, ...] = ()
    holds: Callable[[Any], bool] = lambda config: True
    starts: tuple[Any, ...] = (True,)
    whole: bool = False


def kernel(shape: Shape, spot: Spot) -> Shape:
    """[r, in k k] as the kernel of a convolution [r, in, k, k]."""
    return (shape[0], spot.module.in_channels // spot.module.groups, *spot.module.kernel_size)


def pointwise(shape: Shape, spot: Spot) -> Shape:
    return (*shape, 1, 1)


def channels(shape: Shape, spot: Spot) -> Shape:
    return (1, *shape, 1, 1)


def under(**names: str) -> tuple[Name, ...]:
    """Names whose tensors are alike."""
    return tuple(Name(ours, f"{{path}}.{theirs}") for ours, theirs in names.items())


def base_added(ours: str, theirs: str, parameter: str) -> Name:
    """A change of ours whose sum with a parameter of the base is theirs."""
    return Name(
        ours,
        theirs,
        read=lambda tensor, spot: tensor.float() - spot.module._parameters[parameter].detach().float(),
        write=lambda tensor, spot: tensor + spot.module._parameters[parameter].detach().float(),
    )


LORA_LINEAR = under(A="lora_A.weight", B="lora_B.weight", magnitude="lora_magnitude_vector")

LORA = Type(
    "LORA",
    "lora",
    fields=(
        Field("rank", "r", 8, "rank_pattern"),
        Field("alpha", "lora_alpha", 8, "alpha_pattern"),
        Field("dropout", "lora_dropout", 0.0),
        Field("rslora", "use_rslora", False),
        Field("dora", "use_dora", False),
        Field("pissa", "init_lora_weights", True, read=lambda start: start == "pissa", write=lambda pissa: True),
    ),
    names={
        "linear": LORA_LINEAR,
        "conv1d": LORA_LINEAR,
        "conv2d": (
            Name("A", "{path}.lora_A.weight", kernel),
            Name("B", "{path}.lora_B.weight", pointwise),
            Name("magnitude", "{path}.lora_magnitude_vector", channels),
        ),
        "embedding": under(A="lora_embedding_A", B="lora_embedding_B", magnitude="lora_magnitude_vector"),
    },
    idle=("qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying"),
    unsaid=("ratio",),
    starts=(True, "pissa"),
    bias="lora_only",
    holds=lambda config: not config.pissa,
)

TYPES: tuple[Type, ...] = (LORA,)
