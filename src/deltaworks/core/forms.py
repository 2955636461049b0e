"""The three forms a tuner can take, strongest first; the engine derives every other capability from them.

==== =================== ====================================================== =========================
form the tuner gives     meaning                                                the engine derives
==== =================== ====================================================== =========================
1    ``factors()``       the change of the weight is ``scale * B @ A``          form 2, rows, exact LoRA export
2    ``weight(W)``       the effective weight (and ``bias(b)``) from the base   form 3, merge, rank, quantized bases
3    ``around(base, x)`` the new output, calling ``base(x)`` when it wants      forward, save, load, switch, counts
==== =================== ====================================================== =========================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.errors import UserError


class Factors(NamedTuple):
    """A low-rank change ``scale * B @ A``. Shapes: A [rank, in], B [out, rank]."""

    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0


class Heads(NamedTuple):
    """What an attention computes from, as a ``keyvalue`` site sees it.

    Shapes: query [batch, heads, length, head_dim]; key, value [batch, kv_heads, keys, head_dim]; hidden
    [batch, length, width] is the input of the attention module. ``scaling`` multiplies the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    scaling: float

    def prepend(self, key: Tensor, value: Tensor) -> Heads:
        """The same call with more keys and values in front, visible to every query.

        Shapes: [kv_heads, length, head_dim] for all rows, or [batch, kv_heads, length, head_dim]. Features that
        another tuner added behind the model's own are zero here.
        """
        batch, features = self.key.shape[0], self.key.shape[-1]
        key, value = (
            F.pad(extra.to(self.key.dtype), (0, features - extra.shape[-1])).expand(batch, *extra.shape[-3:-1], -1)
            for extra in (key, value)
        )
        return self._replace(key=torch.cat([key, self.key], dim=2), value=torch.cat([value, self.value], dim=2))


class Tokens(NamedTuple):
    """What a ``trunk`` (the stack of blocks with its embeddings) reads.

    Shapes: embeds [batch, length, width]; mask [batch, cached + length] or None. ``cached`` counts the positions
    that a key/value cache already holds. ``inserted`` is (position, count) of virtual tokens, which the engine
    removes from the output again unless they are ``kept``. ``arguments`` are all that the trunk was called with, by
    name. ``behind`` is by how many positions the text is moved back.
    """

    embeds: Tensor
    mask: Tensor | None
    cached: int
    inserted: tuple[int, int] = (0, 0)
    arguments: Mapping[str, Any] = MappingProxyType({})
    kept: bool = False
    behind: int = 0

    def insert(self, prompt: Tensor, at: int = 0, *, kept: bool = False) -> Tokens:
        """The same input with virtual tokens ``prompt`` [count, width] in front of each row's real token ``at``.

        While decoding with a cache, which holds them already, they are only noted. Raises UserError where other
        virtual tokens stand at another position.
        """
        if not prompt.shape[-2]:
            return self
        position, count = self.inserted
        if count and position != at:
            raise UserError(f"virtual tokens stand at position {position} already, so none can stand at {at}")
        noted = self._replace(inserted=(at, count + prompt.shape[-2]), kept=kept or self.kept)
        if self.cached:
            return noted
        prompt = prompt.to(self.embeds.dtype).expand(self.embeds.shape[0], *prompt.shape[-2:])
        return noted._replace(embeds=inserted(prompt, self.embeds, at, self.mask))


def inserted(new: Tensor, rows: Tensor, at: int, mask: Tensor | None) -> Tensor:
    """``rows`` with ``new`` in front of position ``at``, counted from the first real token of each row.

    Shapes: new [batch, count, ...], rows [batch, length, ...], mask [batch, length or more] or None.
    """
    if mask is None:
        return torch.cat([rows[:, :at], new, rows[:, at:]], dim=1)
    count, start = new.shape[1], starts(mask, at)
    place = torch.arange(rows.shape[1] + count, device=rows.device)
    source = torch.where(place < start, place + count, torch.where(place < start + count, place - start, place))
    return taken(torch.cat([new, rows], dim=1), source)


def removed(rows: Tensor, at: int, count: int, mask: Tensor | None) -> Tensor:
    """The inverse of ``inserted``: [batch, length + count, ...] to [batch, length, ...]."""
    if mask is None:
        return torch.cat([rows[:, :at], rows[:, at + count :]], dim=1)
    place = torch.arange(rows.shape[1] - count, device=rows.device)
    return taken(rows, torch.where(place < starts(mask, at), place, place + count))


def starts(mask: Tensor, at: int) -> Tensor:
    """Where each row's real token ``at`` stands, [batch, 1]: padding may be on the left."""
    return ((mask.cumsum(1) == 0).sum(1, keepdim=True) + at).clamp(max=mask.shape[1])


def taken(rows: Tensor, source: Tensor) -> Tensor:
    """The entries ``source`` [batch, length] of dimension 1."""
    source = source.view(*source.shape, *[1] * (rows.dim() - 2))
    return rows.gather(1, source.expand(-1, -1, *rows.shape[2:]))


def nonzero(tensor: Tensor) -> Tensor:
    """The flat positions of what is not zero; on the meta device, which has no values, all of them."""
    try:
        return tensor.flatten().nonzero().flatten()
    except NotImplementedError:
        return torch.arange(tensor.numel(), device=tensor.device)


class Tuner(nn.Module):
    """A small module around one operation of a frozen model. Subclasses override one of the three forms.

    A tuner may override a weaker form too, as a faster way to the same result (the suite holds them equal).
    Trained tensors are float32; ``around`` casts them to the dtype of its input.
    """

    rates: Mapping[str, float] = {}
    """Learning rate of a parameter, by name, as a multiple of the run's."""
    decays: ClassVar[bool] = True
    """Whether weight decay makes sense (not for tensors that start at one)."""
    adds: ClassVar[bool] = True
    """Whether its change of the weight can act together with other adapters' changes."""
    tied: ClassVar[bool] = True
    """Whether its change belongs to the weight, and so acts in every module that owns it."""
    strength: float = 1.0
    """How much of its change acts: less than all of it for a while (see ``layers.damped``)."""
    observer: Callable[[Any, Tensor, Tensor], None] | None = None
    """Who is shown its changes of the output for a while (see ``layers.observed``)."""
    dropout: float = 0.0
    """Dropout on the input of ``A`` (form 1); the engine applies it."""

    place: Any  # the Place it stands at and its method's configuration: set when it is attached
    config: Any

    def factors(self) -> Factors:
        """A, B and scale of a low-rank change."""
        raise NotImplementedError

    def selecting(self) -> Factors | None:
        """The same, with the columns [r] of the input that A selects in its place, for a tuner whose A does that."""
        return None

    def weight(self, weight: Tensor) -> Tensor:
        """The effective weight. ``weight`` is [out, in] (convolutions flattened, embeddings [dim, entries])."""
        A, B, scale = self.factors()
        return weight + (scale * (B @ A)).to(weight.dtype)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The effective bias [out]."""
        return bias

    def tensor(self, name: str, base: Tensor) -> Tensor:
        """The effective value of a parameter that is neither weight nor bias."""
        return base

    def around(self, base: Callable[[Any], Tensor], x: Any) -> Tensor:
        """The new output. ``base`` is the operation as it was."""
        raise NotImplementedError

    def constants(self) -> tuple[Any, ...]:
        """Numbers that a compiled graph takes as fixed: adapters that differ in them cannot share one."""
        return ()

    def forward(self, form: str, *arguments: Any) -> Any:
        """One of the forms by name; exists so that ``torch.func.functional_call`` can reach them."""
        return getattr(self, form)(*arguments)

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the trained values and what cannot be made again from a seed."""
        kept = {name: parameter.detach() for name, parameter in self.named_parameters()}
        unsaved = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self.named_modules()
            for name in module._non_persistent_buffers_set
        }
        return kept | {name: buffer for name, buffer in self.named_buffers() if name not in unsaved}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what ``stored`` gave. Raises UserError where a name or a shape does not fit."""
        self.fill(tensors, self.stored().keys())

    def fill(self, tensors: Mapping[str, Tensor], expected: Collection[str]) -> None:
        """Copy ``tensors`` into the own ones. Raises UserError where they are not exactly the ``expected`` ones."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        expected = set(expected)
        if missing := sorted(expected - tensors.keys()):
            raise UserError(f"tensor {missing[0]!r} is missing")
        if extra := sorted(tensors.keys() - expected):
            raise UserError(f"tensor {extra[0]!r} is not one of {', '.join(sorted(expected))}")
        for name, value in tensors.items():
            if own[name].shape != value.shape:
                raise UserError(f"tensor {name!r} has shape {list(value.shape)}, not {list(own[name].shape)}")
            with torch.no_grad():
                own[name].copy_(value)

    @classmethod
    def gives(cls, form: str) -> bool:
        """Whether this class has a form of its own ("factors", "weight", "around", ...)."""
        return getattr(cls, form) is not getattr(Tuner, form)

    @classmethod
    def form(cls) -> int:
        """The number of the strongest form: 1 factors, 2 weight, 3 around."""
        if cls.gives("factors"):
            return 1
        return 2 if any(cls.gives(form) for form in ("weight", "bias", "tensor")) else 3


class Replacement(Tuner):
    """Trains every parameter of one module in full, as float32 masters beside the frozen originals.

    Parameters that are tied in the base share one master.
    """

    def __init__(self, site: Any) -> None:
        super().__init__()
        held = {name: id(parameter) for name, parameter in site.module.named_parameters(recurse=False)}
        self.masters = nn.ParameterDict(
            {
                name: site.shared(
                    ("master", held.get(name, f"{site.place.path}.{name}")),
                    lambda p=tensor: nn.Parameter(p.detach().float().clone()),
                )
                for name, tensor in site.tensors.items()
            }
        )

    def tensor(self, name: str, base: Tensor) -> Tensor:
        return self.masters[name].to(base.dtype)
