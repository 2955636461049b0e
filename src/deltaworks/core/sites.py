"""Sites: operations of a model with tuners around them, and how a wrapped module runs.

A wrapped module is the same object; only its class becomes a subclass of its own class, made here, whose
``forward`` folds the acting tuners around ``super().forward``. Parameters keep their names, ``isinstance`` stays
true, and unwrapping gives the class back.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.anatomy import Anatomy, Place
from deltaworks.core.attention import ConfigView
from deltaworks.core.board import Board, Tap
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Factors, Tokens, Tuner, inserted, removed

WEIGHT_KINDS = ("linear", "conv1d", "conv2d", "embedding", "norm", "parameters")


class Site:
    """One place of one model, as a tuner sees it while it is made.

    ``shape`` is (out, in) of the weight as a matrix; for sub-layers and blocks ``width`` is the number of
    features that leave it. Parameters made here are float32, on the device of the place, and random only
    through the adapter's seed and the path of the place.
    """

    def __init__(
        self, place: Place, model: nn.Module, anatomy: Anatomy, seed: int, shared: dict[Hashable, Any]
    ) -> None:
        self.place, self.model, self.anatomy = place, model, anatomy
        self.module = model.get_submodule(place.path)
        self.seed, self.member = seed, 0
        self._shared = shared
        self._generator: torch.Generator | None = None
        self.taps: list[tuple[nn.Module, Tap]] = []

    @property
    def matrix(self) -> Tensor:
        """The base weight as the matrix [out, in] that a tuner's ``weight`` gets (1-D for norms)."""
        return part_of(self.place, to_matrix(self.place.kind, base_tensors(self.module)["weight"]))

    @property
    def shape(self) -> tuple[int, int]:
        matrix = self.matrix
        return (matrix.shape[0], matrix.shape[1]) if matrix.dim() == 2 else (matrix.shape[0], 1)

    @property
    def bias(self) -> Tensor | None:
        """The base bias [out], if there is one."""
        bias = base_tensors(self.module).get("bias")
        return bias if bias is None else part_of(self.place, bias)

    @property
    def width(self) -> int:
        """Features of the residual stream at this place."""
        for place in self.anatomy.places:
            if place.stack == self.place.stack and place.part is None and place.role in ("attention.o", "mlp.down"):
                return self._matrix_of(place).shape[0]
        config = getattr(self.module, "config", None) or getattr(self.model, "config", None)
        width = getattr(config, "hidden_size", None)
        if width is None:
            raise UserError(f"the width of {self.place.path!r} cannot be found in {type(self.model).__name__}")
        return int(width)

    @property
    def heads(self) -> tuple[int, int]:
        """(key/value heads, features of a head) of a ``keyvalue`` place."""
        attention = self.module
        names = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
        size = next(
            (getattr(attention, name) for name in names if isinstance(getattr(attention, name, None), int)), None
        )
        role = self.place.role.split(".")[0]
        for place in self.anatomy.places:
            if place.role == f"{role}.k" and place.path.startswith(self.place.path + ".") and size:
                start, stop = place.part or (0, self._matrix_of(place).shape[0])
                return (stop - start) // size, size
        raise UserError(f"the key and value heads of {self.place.path!r} cannot be found")

    def _matrix_of(self, place: Place) -> Tensor:
        return to_matrix(place.kind, base_tensors(self.model.get_submodule(place.path))["weight"])

    def check_rank(self, rank: int) -> None:
        """Raises UserError where a rank is larger than the layer allows."""
        out, inner = self.shape
        if rank > min(out, inner):
            raise UserError(
                f"rank {rank} is larger than {self.place.path!r} allows ({out} x {inner}): "
                f"use at most {min(out, inner)}, or other targets"
            )

    @property
    def trunk(self) -> Place | None:
        """The trunk that this place belongs to."""
        trunks = (place for place in self.anatomy.places if place.kind == "trunk")
        return next((place for place in trunks if place.stack == self.place.stack), None)

    @property
    def causal(self) -> bool:
        """Whether the attention around this place sees only the tokens before."""
        trunk = self.model if self.trunk is None else self.model.get_submodule(self.trunk.path)
        return is_causal(trunk)

    @property
    def device(self) -> torch.device:
        tensor = next(self.module.parameters(), None)
        tensor = tensor if tensor is not None else next(self.model.parameters(), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def generator(self) -> torch.Generator:
        """Random numbers (on the CPU) that depend on the adapter's seed and on this place alone."""
        if self._generator is None:
            name = f"{self.seed}/{self.place.path}/{self.place.role}"
            self._generator = torch.Generator().manual_seed(stable_hash(name))
        return self._generator

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """One object for all sites of this adapter that ask with the same key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, device=self.device))

    def ones(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(shape, device=self.device))

    def normal(self, *shape: int, std: float = 1.0) -> nn.Parameter:
        """N(0, std^2) entries."""
        return self._random(shape, lambda tensor: tensor.normal_(0, std, generator=self.generator))

    def truncated(self, *shape: int, std: float) -> nn.Parameter:
        """N(0, std^2) entries, drawn again beyond two standard deviations."""
        ends = (-2 * std, 2 * std)
        return self._random(shape, lambda tensor: nn.init.trunc_normal_(tensor, 0.0, std, *ends, self.generator))

    def uniform(self, *shape: int, bound: float) -> nn.Parameter:
        """U(-bound, bound) entries."""
        return self._random(shape, lambda tensor: tensor.uniform_(-bound, bound, generator=self.generator))

    def kaiming(self, *shape: int) -> nn.Parameter:
        """U(-1/sqrt(in), 1/sqrt(in)) with in = shape[-1]: Kaiming-uniform with a = sqrt 5, as nn.Linear has it."""
        return self.uniform(*shape, bound=shape[-1] ** -0.5)

    def _random(self, shape: tuple[int, ...], fill: Callable[[Tensor], Tensor]) -> nn.Parameter:
        if self.device.type == "meta":
            return nn.Parameter(torch.empty(shape, device="meta"))
        return nn.Parameter(fill(torch.empty(shape)).to(self.device))

    def watch(self, path: str, side: str) -> Tap:
        """The "input", "output" or token "mask" of another module, as it passes in each forward."""
        tap = Tap(side)
        self.taps.append((self.model.get_submodule(path), tap))
        return tap


def is_causal(trunk: nn.Module) -> bool:
    """Whether self-attention in a trunk sees only the tokens before."""
    return any(getattr(module, "is_causal", False) is True for module in trunk.modules())


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def base_tensors(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters by name, as they are in the base."""
    return dict(module._parameters)


def to_matrix(kind: str, weight: Tensor) -> Tensor:
    """A weight as [out, in]: Conv1D and embeddings are stored transposed, convolutions have more dimensions."""
    if kind in ("conv1d", "embedding"):
        return weight.t()
    return weight.flatten(1) if kind == "conv2d" else weight


def from_matrix(kind: str, matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_matrix``."""
    if kind in ("conv1d", "embedding"):
        return matrix.t()
    return matrix.view(like.shape) if kind == "conv2d" else matrix


def part_of(place: Place, tensor: Tensor) -> Tensor:
    return tensor if place.part is None else tensor[place.part[0] : place.part[1]]


def with_part(place: Place, whole: Tensor, part: Tensor) -> Tensor:
    if place.part is None:
        return part
    return torch.cat([whole[: place.part[0]], part, whole[place.part[1] :]])


# ---------------------------------------------------------------------------- running


def effective(tuners: list[Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The module's parameters with the form 1 and 2 tuners applied, in order."""
    changed = dict(tensors)
    for tuner in tuners:
        place = tuner.place
        if tuner.gives("weight") or tuner.gives("factors"):
            whole = to_matrix(place.kind, changed["weight"])
            new = tuner.weight(part_of(place, whole)).to(whole.dtype)
            changed["weight"] = from_matrix(place.kind, with_part(place, whole, new), tensors["weight"])
        if tuner.gives("bias"):
            bias = changed.get("bias")
            if bias is None and place.part is not None:
                bias = torch.zeros_like(changed["weight"][0])
            new = tuner.bias(bias if bias is None else part_of(place, bias))
            if new is not None:
                new = new.to(tensors["weight"].dtype)
                changed["bias"] = new if bias is None else with_part(place, bias, new)
        if tuner.gives("tensor"):
            for name, tensor in changed.items():
                if tensor is not None:
                    changed[name] = tuner.tensor(name, tensor)
    return changed


def low_rank(module: Any, place: Place, factors: Factors, x: Tensor) -> Tensor:
    """``scale * B A x`` for one kind of operation, in the dtype of its output."""
    A, B, scale = factors
    if place.kind == "embedding":
        # an embedding is a linear layer on one-hot vectors: A x is a column of A
        dtype = module._parameters["weight"].dtype
        return F.linear(F.embedding(x, A.t().to(dtype)), B.to(dtype)) * scale
    A, B = A.to(x.dtype), B.to(x.dtype)
    if place.kind == "conv2d":
        kernel = A.view(A.shape[0], module.in_channels, *module.kernel_size)
        inner = module._conv_forward(x, kernel, None)
        return F.conv2d(inner, B[:, :, None, None]) * scale
    return F.linear(F.linear(x, A), B) * scale


def added(place: Place, y: Tensor, change: Tensor) -> Tensor:
    """y with the change in the features of the place (the channels of a convolution are in dimension 1)."""
    if place.part is None:
        return y + change
    start, stop = place.part
    return y + F.pad(change, (start, y.shape[-1] - stop))


class Operation:
    """``base`` for tuners around a module whose first argument is a tensor and whose output holds one first."""

    def __init__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.run, self.rest, self.kwargs = run, args[1:], kwargs
        self.output: Any = None
        self.keyword = "" if args else next(iter(kwargs))
        self.x = args[0] if args else kwargs[self.keyword]

    def __call__(self, x: Any) -> Tensor:
        if not self.keyword:
            self.output = self.run(x, *self.rest, **self.kwargs)
        else:
            self.output = self.run(**{**self.kwargs, self.keyword: x})
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def replaced(self, y: Tensor) -> Any:
        """The output with its tensor replaced."""
        return (y, *self.output[1:]) if isinstance(self.output, tuple) else y


def run_weights(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """A module with weight: effective weights inside, low-rank products added, operations around, in order."""
    operation = Operation(run, args, kwargs)

    def plain(x: Any) -> Tensor:
        return operation(x)

    base: Callable[[Any], Tensor] = plain
    heavy = [tuner for tuner in tuners if tuner.form() == 2 and not tuner.gives("around")]
    heavy += [tuner for tuner in tuners if tuner.form() == 1 and not has_product(module, tuner)]
    if heavy:

        def weighted(x: Any) -> Tensor:
            module._effective = effective(heavy, base_tensors(module))
            try:
                return operation(x)
            finally:
                module._effective = None

        base = weighted
    for tuner in tuners:
        if tuner not in heavy:
            base = functools.partial(run_light, module, tuner, base)
    return operation.replaced(base(operation.x))


def has_product(module: Any, tuner: Any) -> bool:
    """Whether form 1 runs as a product beside the operation, rather than through the effective weight."""
    kind = tuner.place.kind
    if kind == "embedding":  # not where a subclass looks up something else than its input
        return module._plain_class.forward is nn.Embedding.forward
    return kind in ("linear", "conv1d") or (kind == "conv2d" and module.groups == 1)


def run_light(module: nn.Module, tuner: Any, base: Callable[[Any], Tensor], x: Any) -> Tensor:
    """One tuner of form 1 or 3 around ``base``."""
    place = tuner.place
    if tuner.gives("around"):
        if place.part is None:
            return tuner.around(base, x)
        start, stop = place.part
        y = base(x)

        def part(new: Any) -> Tensor:
            return (y if new is x else base(new))[..., start:stop]

        return torch.cat([y[..., :start], tuner.around(part, x), y[..., stop:]], dim=-1)
    y = base(x)
    dropped = F.dropout(x, tuner.dropout, module.training) if tuner.dropout and x.is_floating_point() else x
    return added(place, y, low_rank(module, place, tuner.factors(), dropped).to(y.dtype))


def run_rows(module: Any, run: Callable[..., Any], board: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A module with weight and one adapter per row of its input (dimension 0)."""
    operation = Operation(run, args, kwargs)
    x, rows = operation.x, board.rows
    if x.shape[0] != rows.shape[0]:
        raise UserError(f"dw.rows names {rows.shape[0]} rows but the batch that reached a layer has {x.shape[0]}")
    chosen = [list(module.deltas[name]) if name in module.deltas else [] for name in board.row_names]
    y = operation(x)
    if all(
        tuner.form() == 1 and not tuner.gives("around") and tuner.place.kind in ("linear", "conv1d")
        for tuners in chosen
        for tuner in tuners
    ):
        return operation.replaced(y + stacked_rows(chosen, rows.to(x.device), x, y))
    pieces = list(y.unbind(0))
    for position, tuners in enumerate(chosen):
        members = (rows == position).nonzero().flatten().tolist()
        if tuners and members:
            part = run_weights(module, run, tuners, (x[members], *operation.rest), operation.kwargs)
            part = part[0] if isinstance(part, tuple) else part
            for place, row in enumerate(members):
                pieces[row] = part[place]
    return operation.replaced(torch.stack(pieces))


def is_product(tuner: Any) -> bool:
    """Whether a tuner can be one slice of a batched low-rank product."""
    return tuner.form() == 1 and not tuner.dropout and tuner.place.kind in ("linear", "conv1d")


def stacked_rows(chosen: list[list[Any]], rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The low-rank changes of a mixed batch as two batched products: x [batch, ..., in], y [batch, ..., out]."""
    ranks = [sum(tuner.factors().A.shape[0] for tuner in tuners) for tuners in chosen]
    rank = max([*ranks, 1])
    A = x.new_zeros(len(chosen) + 1, rank, x.shape[-1])
    B = x.new_zeros(len(chosen) + 1, y.shape[-1], rank)
    banks_A, banks_B = list(A.unbind(0)), list(B.unbind(0))
    for position, tuners in enumerate(chosen):
        if tuners:
            parts = [(tuner.place, *tuner.factors()) for tuner in tuners]
            down = torch.cat([a.to(x.dtype) for _, a, _, _ in parts])
            up = torch.cat(
                [
                    F.pad((b * scale).to(x.dtype), (0, 0, place.part[0], y.shape[-1] - place.part[1]))
                    if place.part
                    else (b * scale).to(x.dtype)
                    for place, _, b, scale in parts
                ],
                dim=1,
            )
            missing = rank - down.shape[0]
            banks_A[position] = F.pad(down, (0, 0, 0, missing))
            banks_B[position] = F.pad(up, (0, missing))
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    inner = torch.bmm(flat, torch.stack(banks_A)[rows].transpose(1, 2))  # [batch, tokens, rank]
    return torch.bmm(inner, torch.stack(banks_B)[rows].transpose(1, 2)).view(y.shape)


def run_around(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """A residual sub-layer or a block. Where the input is read by another module, that module's tap holds it."""
    operation = Operation(run, args, kwargs)
    base: Callable[[Any], Tensor] = operation
    x = operation.x
    tap = module.__dict__.get("_entry_tap")
    if tap is not None:
        inside, x = operation.x, tap.value

        def fixed(_: Any) -> Tensor:
            return operation(inside)

        base = fixed
    for tuner in tuners:
        base = functools.partial(tuner.around, base)
    return operation.replaced(base(x))


def run_trunk(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """The stack of blocks: tuners see token embeddings and mask, virtual tokens are removed from the output."""
    call = dict(zip(module._argument_names, args, strict=False)) | kwargs
    embeds, mask = call.get("inputs_embeds"), call.get("attention_mask")
    if embeds is None:
        embeds = module.get_input_embeddings()(call["input_ids"])
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    cache = call.get("past_key_values")
    cached = cache.get_seq_length() if cache is not None else 0
    result: list[Any] = [None]

    def base(tokens: Tokens) -> Tensor:
        changed = tokens.embeds is not embeds or tokens.inserted[1]
        new = trunk_arguments(module, call, tokens) if changed else {}
        if tokens.embeds is not embeds:
            new |= {"input_ids": None, "inputs_embeds": tokens.embeds}
        result[0] = run(**call | new)
        at, count = tokens.inserted
        if count and not tokens.cached and not module._keeps_inserted:
            return removed(result[0][0], at, count, mask)
        return result[0][0]

    around: Callable[[Any], Tensor] = base
    for tuner in tuners:
        around = functools.partial(tuner.around, around)
    hidden = around(Tokens(embeds, mask, cached, arguments=call))
    output = result[0]
    pooler = getattr(module, "pooler", None)
    derived = [pooler(hidden)] if pooler is not None and hidden is not output[0] else []
    if isinstance(output, tuple):
        return (hidden, *derived, *output[1 + len(derived) :])
    output.last_hidden_state = hidden
    if derived:
        output.pooler_output = derived[0]
    return output


def trunk_arguments(module: Any, call: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    """What a trunk's forward gets in place of its arguments: mask, positions and types that match the embeddings."""
    new: dict[str, Any] = {}
    at, count = tokens.inserted
    length = tokens.embeds.shape[1]
    if module._longest is not None and tokens.cached + length > module._longest:
        raise UserError(
            f"{count} virtual tokens and {tokens.cached + length - count} real ones are more than the "
            f"{module._longest} positions of the model: shorten the prompt or the input"
        )
    mask = call.get("attention_mask")
    if mask is not None and tokens.mask is None:
        raise UserError("virtual tokens need an attention mask of shape [batch, length], not a prepared one")
    if mask is not None:
        ones = mask.new_ones(mask.shape[0], count)
        new["attention_mask"] = inserted(ones, mask, at, mask)
        for tap in module._taps:
            if tap.side == "mask":
                tap.value = new["attention_mask"]
    types = call.get("token_type_ids")
    if types is not None and not tokens.cached:
        new["token_type_ids"] = inserted(types.new_zeros(types.shape[0], count), types, at, mask)
    positions = trunk_positions(module, call, tokens)
    if positions is not None:
        new["position_ids"] = positions
    return new


def trunk_positions(module: Any, call: dict[str, Any], tokens: Tokens) -> Tensor | None:
    """Position ids [batch, length] with the virtual tokens; None where the trunk's own are right."""
    positions, mask, (at, count) = call.get("position_ids"), tokens.mask, tokens.inserted
    batch, length = tokens.embeds.shape[:2]
    if module._first_position is not None and positions is None:
        if tokens.cached:
            return None
        # positions count what is not padding, by its token id where the ids are known
        ids = call.get("input_ids")
        real = mask if ids is None else ids.ne(module._first_position - 1).long()
        if real is None:
            return None
        real = inserted(real.new_ones(batch, count), real, at, mask)
        return (real.cumsum(-1) * real + module._first_position - 1)[:, -length:].long()
    if positions is None and mask is not None and module._counts_positions:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -(length if tokens.cached else length - count) :]
    if positions is None:
        return None
    if tokens.cached:
        return positions + count
    positions = positions.expand(batch, -1)
    own = torch.arange(at, at + count, device=positions.device, dtype=positions.dtype).expand(batch, count)
    return inserted(own, torch.where(positions < at, positions, positions + count), at, mask)


class Selected:
    """Tuners of one shape under several adapters, with the acting one chosen by a tensor: one graph for all."""

    def __init__(self, tuners: list[Tuner], index: Tensor) -> None:
        self.template = tuners[0]
        members = [dict(tuner.named_parameters()) | dict(tuner.named_buffers()) for tuner in tuners]
        self.values = {
            name: torch.stack([member[name] for member in members]).index_select(0, index.to(value.device)).squeeze(0)
            for name, value in members[0].items()
        }

    def __getattr__(self, name: str) -> Any:
        if name in ("factors", "weight", "bias", "tensor", "around"):
            return functools.partial(self._call, name)
        return getattr(self.template, name)

    def _call(self, form: str, *arguments: Any) -> Any:
        return torch.func.functional_call(self.template, self.values, (form, *arguments))


# ---------------------------------------------------------------------------- wrapping


def acting(module: Any) -> list[Any]:
    """The tuners of a wrapped module that act now."""
    board: Board = module._board
    if torch.compiler.is_compiling() and board.single and module._alike and len(module.deltas) == len(board.deltas) > 1:
        columns = zip(*module.deltas.values(), strict=True)
        return [Selected(list(column), board.index) for column in columns]
    if not len(module.deltas):  # only watched: a graph through here need not know who acts
        return []
    return [tuner for name in board.active if name in module.deltas for tuner in module.deltas[name]]


def forward_wrapped(module: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of every wrapped module: ``run`` is the forward of its own class."""
    taps: list[Tap] = module._taps
    for tap in taps:
        if tap.side == "input":
            tap.value = args[0] if args else next(iter(kwargs.values()))
        elif tap.side == "mask":
            mask = (dict(zip(module._argument_names, args, strict=False)) | kwargs).get("attention_mask")
            tap.value = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if module._widens:
        kwargs = widened(module, args, kwargs)
    board: Board = module._board
    if board.rows is not None:
        named = any(name in module.deltas for name in board.row_names)
        output = run_rows(module, run, board, args, kwargs) if named else run(*args, **kwargs)
    else:
        tuners = acting(module)
        for kinds, runner in RUNNERS:
            mine = [tuner for tuner in tuners if tuner.place.kind in kinds]
            if mine:
                run = functools.partial(_call_runner, runner, module, run, mine)
        output = run(*args, **kwargs)
    for tap in taps:
        if tap.side == "output":
            tap.value = output[0] if isinstance(output, tuple) else output
    entry = module.__dict__.get("_entry_tap")
    if entry is not None:
        entry.value = None
    return output


def _call_runner(runner: Any, module: Any, run: Any, tuners: list[Any], *args: Any, **kwargs: Any) -> Any:
    return runner(module, run, tuners, args, kwargs)


def run_heads(module: Any, run: Callable[..., Any], tuners: list[Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """An attention module: its attention function is ours for the time of the call."""
    module._attending = (tuners, args[0] if args else kwargs["hidden_states"])
    try:
        return run(*args, **kwargs)
    finally:
        module._attending = None


def widened(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments where its encoder's output holds virtual tokens that the mask does not know."""
    call = dict(zip(module._argument_names, args, strict=False)) | kwargs
    states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
    if states is not None and mask is not None and "encoder_attention_mask" in kwargs:
        missing = states.shape[1] - mask.shape[1]
        if missing > 0:
            ones = mask.new_ones(mask.shape[0], missing)
            return {**kwargs, "encoder_attention_mask": inserted(ones, mask, 0, mask)}
    return kwargs


RUNNERS: tuple[tuple[tuple[str, ...], Callable[..., Any]], ...] = (
    (("keyvalue",), run_heads),
    (WEIGHT_KINDS, run_weights),
    (("sublayer", "block"), run_around),
    (("trunk",), run_trunk),
)


@functools.cache
def wrapped_class(cls: Any, names: tuple[str, ...], attends: bool) -> type[nn.Module]:
    """A subclass of ``cls`` that folds tuners around its forward and can show effective parameters."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward_wrapped(self, functools.partial(cls.forward, self), args, kwargs)

    def shown(name: str) -> property:
        def get(self: Any) -> Any:
            values = self.__dict__.get("_effective")
            return self._parameters[name] if values is None else values[name]

        return property(get)

    namespace: dict[str, Any] = {name: shown(name) for name in names}
    namespace["__reduce_ex__"] = lambda self, _: (_restored, (cls, names, attends), self.__dict__)
    namespace |= {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if attends:
        namespace["config"] = property(
            lambda self: self.__dict__["config"] if self.__dict__.get("_attending") is None else self._config_view
        )
    return type(cls.__name__, (cls,), namespace)


def _restored(cls: type[nn.Module], names: tuple[str, ...], attends: bool) -> nn.Module:
    """An empty wrapped module, for copying and pickling: the class itself cannot be found by its name."""
    made = wrapped_class(cls, names, attends)
    return made.__new__(made)


def is_wrapped(module: nn.Module) -> bool:
    return "_board" in module.__dict__


def wrap(module: Any, board: Board) -> None:
    """Make ``module`` foldable, in place; nothing changes while it has no tuners and no taps."""
    if is_wrapped(module):
        return
    plain = type(module)
    attends = hasattr(module.__dict__.get("config"), "_attn_implementation")
    names = inspect.signature(plain.forward).parameters
    state = {
        "_board": board,
        "_plain_class": plain,
        "_taps": [],
        "_alike": False,
        "_widens": False,
        "_keeps_inserted": False,
        "_counts_positions": False,
        "_longest": None,
        "_first_position": None,
        "_argument_names": tuple(name for name in names if name != "self"),
        "_effective": None,
    }
    if attends:
        state |= {"_attending": None, "_config_view": ConfigView(module.config)}
    module.__dict__.update(state)
    module.deltas = nn.ModuleDict()
    module.__class__ = wrapped_class(plain, tuple(module._parameters), attends)


def unwrap(module: Any) -> None:
    """Give the module its own class back once nothing stands around it."""
    if len(module.deltas) or module._taps or module._widens:
        return
    module.__class__ = module._plain_class
    del module._modules["deltas"]
    for name in (*STATE, "_attending", "_config_view", "_entry_tap"):
        module.__dict__.pop(name, None)


STATE = (
    "_board", "_plain_class", "_taps", "_alike", "_widens", "_keeps_inserted",
    "_counts_positions", "_longest", "_first_position", "_argument_names", "_effective",
)  # fmt: skip
