"""Attaching: the adapters of a model, their tensors, counts and what can be done with them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core import merging
from deltaworks.core.anatomy import Anatomy, anatomy
from deltaworks.core.board import Board, Tap, base_parameters, board_of
from deltaworks.core.building import Attached, Builder
from deltaworks.core.cutting import Cut, cut_tensors, shrink_as
from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tuner
from deltaworks.core.installing import install, note_kinds, uninstall
from deltaworks.core.marks import base_marks
from deltaworks.core.places import sees_whole_batch
from deltaworks.core.procedure import Procedure, Procedures
from deltaworks.core.registry import Config, configure
from deltaworks.core.replacing import dequantize
from deltaworks.core.report import Report, report
from deltaworks.core.sharding import is_partitioned, whole
from deltaworks.core.weights import base_tensors, matrix_of, to_matrix


def attach(
    model: nn.Module,
    method: str | Config | Any,
    *,
    name: str = "default",
    also: Sequence[str] | str = (),
    seed: int = 0,
    tied: bool = True,
    **options: Any,
) -> Delta:
    """Put an adapter around operations of ``model``, which stays the same object, changed in place.

    ``method`` is a name, a composition string or a configuration, also one of huggingface/peft (an object or the
    content of its ``adapter_config.json``); ``options`` are its options. ``also`` are targets that are trained in
    full and saved with the adapter: a fresh classifier; with rows behind it, ``embedding.token#32000-32003``, the
    embeddings of new tokens alone, and the same rows of a tied head. ``seed`` decides all that is random. A change of
    a tied weight acts in all its owners; with ``tied=False`` in the targets alone, as in peft without
    ``ensure_weight_tying``, so that it cannot be merged. The base is frozen, the new adapter is the one that acts.
    Returns its handle. Raises UserError for an unknown method, option or target, before anything is changed.
    """
    if not isinstance(method, str | Config):
        from deltaworks.store.foreign import translator  # the front door takes other libraries' configurations too

        method, more, seed, tied = translator(method).translated(model, method, seed)
        also = [*([also] if isinstance(also, str) else also), *more]
    config = configure(method, **options)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"an adapter's name is made of letters, digits, '-' and '_', unlike {name!r}")
    board = board_of(model) or Board()
    if not board.deltas and any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise UserError(
            "the model holds layers of peft: give what its unload() or merge_and_unload() returns, of prompts its "
            "get_base_model()"
        )
    if name in board.deltas:
        raise UserError(f"an adapter called {name!r} is there already: detach it or give another name=")
    if any(delta.merged for delta in board.deltas.values()):
        raise UserError("an adapter is merged into the weights: unmerge it before attaching another one")
    if any(is_partitioned(parameter) for _, parameter in base_parameters(model)):
        raise UserError("DeepSpeed has partitioned the model already: load it before the training arguments are made")
    also = [also] if isinstance(also, str) else list(also)
    with board.whole():
        delta = Delta(model, name, config, also, seed, board, tied)
    install(delta)
    delta.base = base_marks(delta)
    return delta


class Delta:
    """The handle of one adapter on one model: its tuners, its configuration and its procedure."""

    def __init__(
        self, model: nn.Module, name: str, config: Config, also: list[str], seed: int, board: Board, tied: bool
    ) -> None:
        self.model, self.name, self.config, self.also, self.seed, self.board = model, name, config, also, seed, board
        self.tied = tied
        self.members: list[Config] = config.parts()  # the methods that this adapter is made of
        self.merged = False
        self.base: dict[str, Any] = {}  # by which its base is known again
        self.resting: list[nn.Parameter] = []  # trained parameters that get no gradient for a while
        self.anatomy: Anatomy = next(iter(board.deltas.values())).anatomy if board.deltas else anatomy(model)
        self._before: merging.Before = {}
        self.cut: Cut | None = None  # what it takes away from the base while it acts
        self.ranks: dict[str, int] = {}  # what is left of tuners that were cut with it, by key
        builder = Builder(model, self.anatomy, self.members, seed, tied)
        self.attached: list[Attached] = builder.build(also)
        self.keys = [item.key for item in self.attached]  # with those that are taken off
        self._taps: list[tuple[nn.Module, Tap]] = builder.taps
        members = [member.procedure(self) for member in self.members]
        present = [member for member in members if member is not None]
        self.procedure: Procedure = present[0] if len(present) == 1 else Procedures(self, present)

    def watch(self, path: str, side: str, *, graded: bool = False) -> Tap:
        """As ``Site.watch``, for procedures while they are made; ``graded``: only where gradients are recorded."""
        tap = Tap(side, graded)
        self._taps.append((self.model.get_submodule(path), tap))
        return tap

    # ------------------------------------------------------------------ what it holds

    def tuners(self) -> list[Tuner]:
        """Every tuner, in model order."""
        return [item.tuner for item in self.attached]

    def _trained(self) -> Iterator[tuple[Attached, str, nn.Parameter]]:
        resting, seen = {id(parameter) for parameter in self.resting}, set()
        for item in self.attached:
            for name, parameter in item.tuner.named_parameters():
                if id(parameter) not in seen and (parameter.requires_grad or id(parameter) in resting):
                    seen.add(id(parameter))
                    yield item, name, parameter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters with the names they have in files; what is shared comes once."""
        for item, name, parameter in self._trained():
            yield f"{item.key}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """The parameters to train, with those that rest now."""
        return [parameter for _, parameter in self.named_parameters()]

    def parameter_groups(self, rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: each tensor with its method's learning rate and decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for item, name, parameter in self._trained():
            decay = weight_decay if item.tuner.decays else 0.0
            groups.setdefault((rate * item.tuner.rates.get(name, 1.0), decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def tensors(self, *, training: bool = False) -> dict[str, Tensor]:
        """What a checkpoint holds, by name; ``training`` keeps what only further training needs."""
        own = {key: tensor for key, (tensor, canonical) in self._stored(training).items() if key == canonical}
        return own | cut_tensors(self)

    def _stored(self, training: bool) -> dict[str, tuple[Tensor, str]]:
        first: dict[Hashable, str] = {}
        stored = {}
        for item in self.attached:
            own = Tuner.stored(item.tuner) if training else item.tuner.stored()
            parameters = dict(item.tuner.named_parameters())
            for name, tensor in own.items():
                key = f"{item.key}.{name}"
                same: Hashable = key
                if tensor.device.type == "meta":  # no storage to compare
                    same = id(parameters[name]) if name in parameters else key
                elif tensor.numel() > 0:
                    same = (tensor.data_ptr(), tensor.shape, tensor.dtype)
                stored[key] = (tensor, first.setdefault(same, key))
        return stored

    def restore(self, tensors: Mapping[str, Tensor], *, training: bool = False) -> None:
        """Take back what ``tensors`` gave. Raises UserError that names what is missing, left over or misshapen."""
        tensors = shrink_as(self, tensors)
        expected = self._stored(training)
        canonical = {key for key, (_, first) in expected.items() if key == first}
        missing, extra = sorted(canonical - tensors.keys()), sorted(tensors.keys() - canonical)
        loose = {item.key for item in self.attached if type(item.tuner).restore is not Tuner.restore} - {""}
        missing = [key for key in missing if not any(key.startswith(f"{item}.") for item in loose)]
        extra = [key for key in extra if not any(key.startswith(f"{item}.") for item in loose)]
        if missing or extra:
            problem = f"misses {missing[0]!r}" if missing else f"holds {extra[0]!r}, which this model has no place for"
            more = len(missing) + len(extra) - 1
            raise UserError(f"the checkpoint {problem}" + (f" (and {more} more)" if more else ""))
        for key, value in tensors.items():
            if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
                raise UserError(f"the checkpoint's tensor {key!r} holds values that are not finite")
        sharing = {key: tensors[first] for key, (_, first) in expected.items() if key != first and first in tensors}
        owned: dict[str, dict[str, Tensor]] = {item.key: {} for item in self.attached}
        for key, value in {**tensors, **sharing}.items():
            owner = key.rpartition(".")[0]
            while owner not in owned:  # a tensor belongs to the innermost place whose key begins its own
                owner = owner.rpartition(".")[0]
            owned[owner][key.removeprefix(f"{owner}.")] = value
        for item in self.attached:
            # a class that leaves out what only training needs has all of it in a training checkpoint
            every = Tuner.stored(item.tuner).keys()
            try:
                if training and every and owned[item.key].keys() == every:
                    item.tuner.fill(owned[item.key], every)
                else:
                    item.tuner.restore(owned[item.key])
            except UserError as error:
                raise UserError(f"the checkpoint does not fit {item.key!r}: {error}") from None
        if loose:
            self.reshaped()

    def reshaped(self) -> None:
        """To be called after tensors changed their shapes: decides again what one compiled graph can serve."""
        for path in self.paths():
            note_kinds(self.model.get_submodule(path), self.name)

    # ------------------------------------------------------------------ what can be done with it

    def limit(self, what: str) -> str | None:
        """The sentence that says why this adapter cannot do something, or None where it can."""
        for member in self.members:
            if what in member.limits:
                return member.limits[what]
        if what == "merge" and (tuner := next((t for t in self.tuners() if t.form() == 3), None)) is not None:
            return f"{type(tuner).__name__} computes something that no single weight can hold"
        if what == "rows":
            odd = next((item.place for item in self.attached if sees_whole_batch(item.place)), None)
            if odd is not None:
                return f"it stands around {odd.role} ({odd.path or 'the model'}), which sees the whole batch at once"
        return None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter."""
        if self.merged:
            raise UserError(f"adapter {self.name!r} is merged into the weights: unmerge it to disable it")
        before = self.board.wanted
        self.board.show([name for name in before if name != self.name])
        try:
            yield
        finally:
            self.board.show(before)

    def merge(self, *, keep_base: bool = True, requantize: bool = False) -> float:
        """Write the change into the base weights, computed in float32 or wider.

        A quantized weight gives way to a plain one; ``requantize`` quantizes it again, which rounds the change away
        in part. Returns how far rounding can move an output feature of a merged layer, for an input of length one.

        With ``keep_base=False`` the originals are dropped and the wrappers removed: a plain model remains (quantized
        only with ``requantize``), and this handle is spent. Raises UserError for methods that no weight can hold, for
        tied weights, and for weights that cannot be quantized again.
        """
        if limit := self.limit("merge"):
            raise UserError(f"{self.config} cannot be merged: {limit}")
        if self.merged:
            raise UserError(f"adapter {self.name!r} is merged already")
        self.board.fit((*self.board.wanted, self.name))
        values = merging.merged_values(self.model, self.paths(), self.name)
        merging.check_ties(self.anatomy.tied, values)
        self._before = merging.write(self.model, values, self.anatomy.tied, requantize=requantize)
        cost = merging.rounding(self.model, values)
        self.merged = True
        self.board.show(self.board.wanted)
        if not keep_base:
            self._before = {}
            self.merged = False
            self.cut = self.board.cut = None  # a base that was cut stays so
            self.detach()
            if not requantize:
                dequantize(self.model)
        return cost

    def paths(self) -> list[str]:
        """The modules where it has tuners."""
        return list(dict.fromkeys(place.path for item in self.attached for place, _ in item.all))

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        if not self.merged:
            raise UserError(f"adapter {self.name!r} is not merged")
        merging.put_back(self.model, self._before)
        self._before = {}
        self.merged = False
        self.board.show(self.board.wanted)

    def drop(self, item: Attached) -> None:
        """Take one tuner off for good."""
        for place, tuner in item.all:
            deltas: Any = self.model.get_submodule(place.path).deltas
            left = [other for other in deltas[self.name] if other is not tuner]
            del deltas[self.name]
            if left:
                deltas[self.name] = nn.ModuleList(left)
        self.attached = [other for other in self.attached if other is not item]

    def detach(self) -> None:
        """Take the adapter off; the base is bit-identical to what it was, and this handle is spent."""
        if self.merged:
            self.unmerge()
        if self.state == "detached":
            raise UserError(f"adapter {self.name!r} is detached already")
        uninstall(self)

    def change(self, item: Attached) -> Tensor | None:
        """The change of the weight at one place as a float64 matrix [out, in]; None for form 3."""
        place, tuner = item.place, item.tuner
        weight = base_tensors(self.model.get_submodule(place.path)).get(place.parameter)
        if tuner.form() == 3 or weight is None:
            return None
        with torch.no_grad():
            if tuner.gives("tensor"):
                whole = weight.double()
                return to_matrix(place.kind, tuner.tensor(place.parameter, whole) - whole)
            matrix = matrix_of(place, weight).double()
            changes = tuner.gives("weight") or tuner.gives("factors")
            return tuner.weight(matrix).double() - matrix if changes else torch.zeros_like(matrix)

    def report(self, *, ranks: bool = False) -> Report:
        """Counts by role: trainable, changed, stored bytes and, if asked, the rank of the change."""
        with self.board.fitted([self.name]):
            return report(self, ranks=ranks)

    def save(
        self, folder: str | Path, *, training: bool = False, format: str = "deltaworks", rank: int | None = None
    ) -> Path:
        """Write the adapter into ``folder`` as safetensors and JSON; a crash leaves the old or the new one.

        ``format`` is ours or another library's, such as "peft" (see ``store.foreign``); there ``rank`` allows to cut
        the change to a LoRA of that rank, which says its error. ``training`` keeps, in our format, what only further
        training needs. Raises UserError for what the format cannot express. Where processes hold shards of it, every
        one of them must call this; the first one writes.
        """
        from deltaworks.store.checkpoint import save  # the handle is the front door; the formats live in store

        with whole(self) as writes:
            return save(self, folder, training=training, format=format, rank=rank) if writes else Path(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save the adapter with a model card to "user/name" on the Hub (``store.hub.push``); returns the address."""
        from deltaworks.store.hub import push_delta

        return push_delta(self, repo_id, **options)

    @property
    def state(self) -> str:
        """What it does now: "acting", "resting" (another one acts), "merged" or "detached"."""
        if self.board.deltas.get(self.name) is not self:
            return "detached"
        return "merged" if self.merged else "acting" if self.name in self.board.active else "resting"

    def __repr__(self) -> str:
        sites = f"{len(self.attached)} sites, {self.state}"
        return f"Delta({self.name!r}: {self.config} on {type(self.model).__name__}, {sites})"
