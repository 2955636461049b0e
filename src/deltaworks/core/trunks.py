"""The trunk of a model with its tuners: virtual tokens, and the mask, positions and types that grow with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.forms import Tokens, inserted, removed


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
        changed = tokens.embeds is not embeds or tokens.inserted[1] or tokens.behind
        new = trunk_arguments(module, call, tokens) if changed else {}
        if tokens.embeds is not embeds:
            new |= {"input_ids": None, "inputs_embeds": tokens.embeds}
        result[0] = run(**call | new)
        at, count = tokens.inserted
        if count and not tokens.cached and not tokens.kept and not module._keeps_inserted:
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
    if module._longest is not None and tokens.cached + length + tokens.behind > module._longest:
        raise UserError(
            f"{count + tokens.behind} virtual tokens and {tokens.cached + length - count} real ones are more than the "
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
    positions = _inserted_positions(module, call, tokens)
    if not tokens.behind:
        return positions
    if "position_ids" not in module._argument_names:
        raise UserError(f"{type(module).__name__} takes no positions, so its text cannot be moved back by a prefix")
    if positions is None:
        length = tokens.embeds.shape[1]
        positions = torch.arange(tokens.cached, tokens.cached + length, device=tokens.embeds.device)[None]
    return positions + tokens.behind


def _inserted_positions(module: Any, call: dict[str, Any], tokens: Tokens) -> Tensor | None:
    """Position ids for the text and the virtual tokens in it; None where the trunk's own are right."""
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
