"""What a place is, and what a single module tells of itself: its kind, its features, what its `forward` takes.

The rest of the reading (`stacks`, `blocks`, `sublayers`, `structure`) puts these together into a model.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType

from torch import nn

from deltaworks.core import families
from deltaworks.core.families import ATTENTION, CROSS_ATTENTION, MLP
from deltaworks.core.paths import ancestors, name_of
from deltaworks.core.quantized import is_quantized

KINDS = (
    "linear",
    "conv1d",
    "conv2d",
    "embedding",
    "norm",
    "sublayer",
    "keyvalue",
    "block",
    "trunk",
    "parameters",
    "matrix",
)
LINEAR = ("linear", "conv1d")


@dataclass(frozen=True)
class Place:
    """One operation of the model that a tuner can stand around.

    Attributes:
        path: dotted path of the module that is wrapped; "" is the model itself.
        role: what the operation does, such as "attention.q".
        kind: one of `KINDS`.
        stack: "encoder", "decoder", "vision", "text", ... where the model has several stacks of blocks, else "".
        block: index of the block inside its stack; None outside the blocks.
        part: [start, stop) of the output features, for one projection inside a fused one.
        entry: for a sub-layer whose input is read by another module than `path`: that module's path.
        after_norm: for a sub-layer of a post-norm block: the norm applied to (its output + the residual).
        parameter: name of the weight inside the module.
        expert: index of the matrix in a weight that stacks those of many experts.
        turned: whether that matrix is stored as [in, out].

    Kind "parameters" is a module that multiplies its weights in its own way, as one place; kind "matrix" is one
    matrix of it: of an expert, or of a MultiheadAttention.
    """

    path: str
    role: str
    kind: str
    stack: str = ""
    block: int | None = None
    part: tuple[int, int] | None = None
    entry: str | None = None
    after_norm: str | None = None
    parameter: str = "weight"
    expert: int | None = None
    turned: bool = False

    @property
    def bias(self) -> str:
        """Name of the bias that belongs to the weight, if the module has one."""
        stem = self.parameter.removesuffix("weight")
        return f"{stem}bias" if stem != self.parameter else f"{stem}_bias"

    @property
    def name(self) -> str:
        """What files and targets call it: the path, and which weight of the module: ``mlp.experts.3.up_proj``."""
        if self.expert is not None:
            return f"{self.path}.{self.expert}.{self.parameter}"
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"

    @property
    def whole(self) -> bool:
        """Whether it is all that its module owns, and neither a part nor one of its matrices."""
        return self.part is None and self.kind != "matrix"


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module that owns weights, None of one that owns none."""
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and is_quantized(module)):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
        return "conv1d"
    if next(module.parameters(recurse=False), None) is None:
        return None
    return "norm" if is_norm(module) else "parameters"


def is_norm(module: nn.Module) -> bool:
    return any(re.search(r"Norm(\dd)?$", kind.__name__) for kind in type(module).__mro__)


def is_early_norm(name: str) -> bool:
    """Whether the name of a norm outside the blocks says that it stands in front of them."""
    return "embed" in name or name.startswith("pre")


def is_keyvalue(module: nn.Module) -> bool:
    """Whether a module computes attention through transformers' registry of attention functions."""
    return hasattr(getattr(module, "config", None), "_attn_implementation") and any(
        "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _forwards(type(module))
    )


def section_of(within: Mapping[str, nn.Module], path: str, *, itself: bool = False) -> str:
    """The sub-layer that a module of a block belongs to, from the names and classes around it.

    Args:
        within: the modules of the block by their path inside it.
        path: path of the module.
        itself: whether its own name and class count too.
    """
    owners = [owner for owner in (path, *ancestors(path)) if owner and (itself or owner != path)]
    section = families.section_of(map(name_of, owners), (type(within[owner]).__name__ for owner in owners))
    told = [is_cross for owner in owners if isinstance(is_cross := _is_cross(within[owner]), bool)]
    if section == MLP or not told:
        return section
    return CROSS_ATTENTION if told[0] else ATTENTION


def _is_cross(module: nn.Module) -> object:
    """What an attention says of itself: diffusers uses one class, and one name, for both kinds."""
    return getattr(module, "is_cross_attention", None)


def features_of(module: nn.Module) -> tuple[int, int]:
    """(input, output) features of a linear or of transformers' Conv1D, whose weight is [in, out]."""
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def arguments_of(module: nn.Module) -> set[str]:
    """Names of the arguments that a module's `forward` takes, in its class or in one that it extends."""
    return {
        name
        for code in _forwards(type(module))
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    }


def _forwards(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The code below the decorators of every `forward`, in a module class and in those that it extends."""
    for ancestor in kind.__mro__:
        forward = ancestor.__dict__.get("forward")
        code = getattr(inspect.unwrap(forward) if callable(forward) else None, "__code__", None)
        if code is not None:  # else it is not written in Python
            yield code


def sees_whole_batch(place: Place) -> bool:
    """Whether an operation works on more than the rows of a batch, or on something that all rows share."""
    alone = ("sublayer", "block", "trunk", "keyvalue", "parameters", "matrix")
    return place.kind in alone or place.role in ("embedding.position", "embedding.bias")
