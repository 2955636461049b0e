"""The loss of a causal language model with a frozen head, without logits for all tokens at once.

For a state x [d] with the label y, a head W [V, d] with bias b [V] and z = W x + b,

    loss(x) = log sum_v exp(z_v) - z_y,        d loss / d x = W^T (softmax(z) - onehot(y)).

W is frozen, so this is all that its backward pass has to know, and both are had from the same z. They are computed
for a chunk of states at a time while the loss is; only d loss / d x [tokens, d] is kept. The plain computation holds
z, its float32 copy, their softmax and the gradient, each [tokens, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaworks.core.calibration import evaluating
from deltaworks.core.errors import UserError
from deltaworks.core.sharding import is_partitioned
from deltaworks.core.showing import acting
from deltaworks.core.wrapping import is_wrapped

IGNORED = -100  # a label that no loss and no score counts
CHUNK = 128 * 2**20  # bytes of the float32 logits of a chunk: enough rows for a product to be worth its weight's way
TOKENS = 4  # on which a model is asked what it does with its logits


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses of states [n, d] under labels [n]; gradients for the states alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        kind = states.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else states.dtype
        wide = torch.promote_types(dtype, torch.float32)
        counted = (labels != IGNORED).nonzero()[:, 0]  # rows with a label
        total = torch.zeros((), dtype=wide, device=states.device)
        gradient = states.new_empty(len(counted) if ctx.needs_input_grad[0] else 0, states.shape[1], dtype=dtype)
        rows = max(1, CHUNK // (weight.shape[0] * wide.itemsize))
        with torch.autocast(kind, enabled=False) if cast else nullcontext():
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(counted), rows):
                chunk = counted[start : start + rows]
                right = labels[chunk, None]  # [rows, 1]
                z = F.linear(states[chunk].to(dtype), weight, bias).to(wide)  # [rows, V]
                highest, z_right = z.amax(-1, keepdim=True), z.gather(-1, right)
                sums = z.sub_(highest).exp_().sum(-1, keepdim=True)
                total += (sums.log() + highest - z_right).sum()
                if len(gradient):
                    z.div_(sums).scatter_add_(-1, right, z.new_full((1, 1), -1.0).expand_as(right))
                    torch.mm(z.to(dtype), weight, out=gradient[start : start + rows])
                del z  # before the next chunk's is made
        ctx.save_for_backward(gradient, counted)
        ctx.like = states.shape, states.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, counted = ctx.saved_tensors
        shape, dtype = ctx.like
        whole = gradient.new_zeros(shape, dtype=dtype)
        return whole.index_copy_(0, counted, (gradient * upstream).to(dtype)), None, None, None


def summed_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The cross entropy in nats of frozen logits ``states @ weight.T + bias``, summed over what is not `IGNORED`.

    Args:
        states: [n, d]; under autocast they and the head are taken in its dtype.
        weight: [V, d], which gets no gradient.
        bias: [V] or None, likewise.
        labels: [n], in [0, V) or `IGNORED`: of such rows nothing is computed.

    Returns:
        A scalar in float32, or wider where the states are. It can be differentiated once.
    """
    return _ChunkedCrossEntropy.apply(states, weight, bias, labels)  # type: ignore[no-untyped-call]


@contextmanager
def frozen_head(model: nn.Module) -> Iterator[None]:
    """While ``model`` computes its loss in here, its frozen head is multiplied chunk by chunk; its logits are zeros.

    For causal models of transformers whose head is a plain linear layer that nothing trains, acts on or watches, and
    whose loss is transformers' own of the logits as the head gives them, which is tried once on a few tokens. Others
    (scaled or capped logits, an encoder-decoder, a head with an adapter) run as they always do, and so does a model
    while no gradients are recorded. Raises UserError where the model was called without labels, or with other ones.
    """
    head = _plain_head(model)
    if head is None or not _passes_on(model, head):
        yield
        return
    seam = _Seam(head)
    with seam.sewn(model):
        yield
    if seam.states is not None or not seam.unchanged:
        raise UserError(
            f"{type(model).__name__} computed no loss of all its logits, which stand for nothing else here: give it "
            f"labels, with {IGNORED} for what does not count, or call it outside of frozen_head"
        )


class _Seam:
    """What stands in place of a head and of the loss behind it: the first hands its input to the second."""

    def __init__(self, head: Any) -> None:
        self.head = head
        self.states: Tensor | None = None
        self.logits: Tensor | None = None
        self.unchanged = True

    @contextmanager
    def sewn(self, model: Any) -> Iterator[None]:
        own = model.__dict__.get("_loss_function")
        self.head.forward, model.loss_function = self.multiply, self.loss
        try:
            yield
        finally:
            del self.head.forward, model._loss_function
            if own is not None:
                model.loss_function = own

    def multiply(self, states: Tensor) -> Tensor:
        """In place of logits [..., V] a single zero that is seen everywhere; float32, so that no copy is made."""
        self.states = states
        self.logits = torch.zeros((), device=states.device).expand(*states.shape[:-1], self.head.weight.shape[0])
        return self.logits

    def loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None,
        ignore_index: int = IGNORED, shift_labels: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """The mean loss of the states as ``transformers`` computes it: labels are shifted, or are so already."""
        states, self.states = self.states, None
        self.unchanged = logits is self.logits and vocab_size == logits.shape[-1] and ignore_index == IGNORED
        if states is None or not self.unchanged:
            return logits.new_full((), torch.nan)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        targets = shift_labels.to(states.device).reshape(-1)
        total = summed_cross_entropy(states.flatten(0, -2), self.head.weight, self.head.bias, targets)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _plain_head(model: Any) -> Any:
    """The head whose product can be taken over; None where there is none, or where it is acted on or watched."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not torch.is_grad_enabled() or model.__dict__.get("_compiled_call_impl") is not None:
        return None
    if getattr(head, "_plain_class", type(head)).forward is not nn.Linear.forward or "forward" in head.__dict__:
        return None
    parameters = list(head.parameters(recurse=False))
    if any(p.requires_grad or type(p.data) is not Tensor or is_partitioned(p) for p in parameters):
        return None
    if is_wrapped(head) and (acting(head) or head._taps or head._board.rows is not None or head._own_forward):
        return None
    watched = is_wrapped(model) and any(tap.side in ("output", "call") for tap in model._taps)
    if watched or head._forward_hooks or model._forward_hooks:
        return None
    from transformers.loss.loss_utils import ForCausalLMLoss

    return head if getattr(model, "loss_function", None) is ForCausalLMLoss else None


_passing: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _passes_on(model: Any, head: Any) -> bool:
    """Whether a model gives its loss function the very tensor that its head gave."""
    if model not in _passing:
        seam = _Seam(head)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=head.weight.device)
        with evaluating(model), torch.no_grad(), seam.sewn(model):
            try:
                model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
            except Exception:  # it wants more than text, or writes into its logits
                seam.unchanged = False
        _passing[model] = seam.states is None and seam.unchanged
    return _passing[model]
