"""Wrapping: a module stays the same object and folds the tuners around it into its forward.

Only its class changes, to a subclass of its own class that is made here. Parameters keep their names, ``isinstance``
stays true, and unwrapping gives the class back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.attention import ConfigView
from deltaworks.core.board import Board, Tap
from deltaworks.core.lean.neighbours import computed, lean_forward
from deltaworks.core.mixing import run_rows
from deltaworks.core.quantized import is_quantized, product, steady
from deltaworks.core.running import RUNNERS
from deltaworks.core.showing import acting, shown
from deltaworks.core.trunks import widened


def forward_wrapped(module: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of every wrapped module: ``run`` is the forward of its own class."""
    args, kwargs = computed(args), computed(kwargs)
    taps: list[Tap] = [tap for tap in module._taps if not tap.graded or torch.is_grad_enabled()]
    for tap in taps:
        if tap.side == "input":
            tap.value = args[0] if args else next(iter(kwargs.values()))
        elif tap.side == "mask":
            mask = (dict(zip(module._argument_names, args, strict=False)) | kwargs).get("attention_mask")
            tap.value = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if module._widens:
        kwargs = widened(module, args, kwargs)
    if module._reads:
        run = functools.partial(_run_reading, module, run)
    if is_quantized(module):
        run = functools.partial(product, module, run)
    board: Board = module._board
    if board.rows is not None:
        output = run_rows(module, run, board, args, kwargs)
    else:
        tuners = acting(module)
        if module._lean is not None and not tuners:
            run = functools.partial(module._lean, run)
        for kinds, runner in RUNNERS:
            mine = [tuner for tuner in tuners if tuner.place.kind in kinds]
            if mine:
                run = functools.partial(_call_runner, runner, module, run, mine)
        output = run(*args, **kwargs)
    for tap in taps:
        if tap.side == "output":
            tap.value = output[0] if isinstance(output, tuple) else output
        elif tap.side == "call":
            tap.value = (args, kwargs, output)
    entry = module.__dict__.get("_entry_tap")
    if entry is not None:
        entry.value = None
    return output


def _call_runner(runner: Any, module: Any, run: Any, tuners: list[Any], *args: Any, **kwargs: Any) -> Any:
    return runner(module, run, tuners, args, kwargs)


@functools.cache
def wrapped_class(cls: Any, names: tuple[str, ...], attends: bool) -> type[nn.Module]:
    """A subclass of ``cls`` that folds tuners around its forward and can show effective parameters."""

    plain = cls.forward  # looked up here: a class that dynamo takes for an operation has no attributes in a graph

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward_wrapped(self, self._own_forward or functools.partial(plain, self), args, kwargs)

    def shown(name: str) -> property:
        def get(self: Any) -> Any:
            values = self.__dict__.get("_effective")
            return self._parameters[name] if values is None else values[name]

        return property(get)

    namespace: dict[str, Any] = {name: shown(name) for name in names}
    namespace["__reduce_ex__"] = lambda self, _: (_restored, (cls, names, attends), self.__dict__)
    namespace |= {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if issubclass(cls, nn.Sequential):  # which runs all that it holds, but not its tuners
        namespace["__iter__"] = lambda self: iter([held for name, held in self._modules.items() if name != "deltas"])
        namespace["__len__"] = lambda self: len(self._modules) - 1
    if attends:
        namespace["config"] = property(
            lambda self: self.__dict__["config"] if self.__dict__.get("_attending") is None else self._config_view
        )
    return type(cls.__name__, (cls,), namespace)


def _restored(cls: type[nn.Module], names: tuple[str, ...], attends: bool) -> nn.Module:
    """An empty wrapped module, for copying and pickling: the class itself cannot be found by its name."""
    made = wrapped_class(cls, names, attends)  # type: ignore[arg-type]
    return made.__new__(made)


def _run_reading(module: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module that reads the parameters of others without calling them."""
    with ExitStack() as stack:
        for other in module._reads:
            stack.enter_context(shown(other))
        return run(*args, **kwargs)


def _no_fast_path(*_: Any) -> None:
    """A hook that is never called: torch's encoder layer takes its fast path, past our forwards, if it has none."""


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
        "_kinds": {},
        "_bank": None,
        "_widens": False,
        "_reads": [],
        "_keeps_inserted": False,
        "_counts_positions": False,
        "_longest": None,
        "_first_position": None,
        "_argument_names": tuple(name for name in names if name != "self"),
        "_effective": None,
        "_quantized": is_quantized(module),
        "_repacks": steady(module),
        "_lean": lean_forward(module),
        # accelerate's hooks, of a model that lies on several devices, replace it on the module itself
        "_own_forward": module.__dict__.pop("forward", None),
    }
    if attends:
        state |= {"_attending": None, "_config_view": ConfigView(module.config)}
    module.__dict__.update(state)
    module.deltas = nn.ModuleDict()
    module.deltas.register_forward_pre_hook(_no_fast_path)
    module.__class__ = wrapped_class(plain, tuple(module._parameters), attends)  # type: ignore[arg-type]


def stand_in(new: Any, module: Any) -> None:
    """Let a module that takes the place of a wrapped one have its tuners too."""
    wrap(new, module._board)
    new.deltas = module.deltas
    for name in ("_taps", "_alike", "_kinds", "_bank"):
        new.__dict__[name] = module.__dict__[name]


def unwrap(module: Any) -> None:
    """Give the module its own class back once nothing stands around it."""
    reads = any(is_wrapped(other) and len(other.deltas) for other in module._reads)
    needed = (is_quantized(module) or module._lean is not None) and module._board.deltas
    if len(module.deltas) or module._taps or module._widens or reads or needed:
        return
    if module._repacks:
        module.support_avx512bf16_for_cpu = True
    if module._own_forward is not None:
        module.__dict__["forward"] = module._own_forward
    module.__class__ = module._plain_class
    del module._modules["deltas"]
    for name in (*STATE, "_attending", "_config_view", "_entry_tap"):
        module.__dict__.pop(name, None)


STATE = (
    "_board",
    "_plain_class",
    "_taps",
    "_alike",
    "_kinds",
    "_bank",
    "_widens",
    "_reads",
    "_keeps_inserted",
    "_counts_positions",
    "_longest",
    "_first_position",
    "_argument_names",
    "_effective",
    "_quantized",
    "_repacks",
    "_lean",
    "_own_forward",
)
