"""A few numbers by which the base of an adapter is known again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaworks.core.board import base_parameters
from deltaworks.core.quantized import is_coded
from deltaworks.core.sharding import is_dtensor, size_of

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta


def base_marks(delta: Delta) -> dict[str, Any]:
    """The sizes of an adapter's base, and single values of up to eight of its tensors.

    They are taken when the adapter is attached: later the base may be merged into, or sharded.
    """
    replaced = tuple({f"{i.place.path}." for i in delta.attached if i.member >= len(delta.members)})
    with delta.board.whole():
        base = [each for each in base_parameters(delta.model) if not each[0].startswith(replaced)]
    plain = [(name, parameter) for name, parameter in base if not is_coded(parameter)]  # the same in every quantization
    chosen = plain[:: max(1, len(plain) // 8)][:8]
    values = {}
    for name, parameter in chosen:
        flat = parameter.detach().reshape(-1)
        if flat.numel() and flat.device.type != "meta" and not is_dtensor(flat):
            values[name] = [round(float(v), 8) for v in flat[:: max(1, flat.numel() // 4)][:4].float().cpu()]
    return {
        "class": type(delta.model).__name__,
        "parameters": sum(size_of(parameter) for _, parameter in base),
        "values": values,
    }
