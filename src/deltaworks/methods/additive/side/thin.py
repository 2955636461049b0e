"""A thin copy of a trunk: the same architecture with fewer features, cut out of the original's weights.

Structural pruning by weight norm, as LST starts its side network (Sung et al., 2022, arXiv:2206.06522, section 3.3):
the features of the residual stream, of each head and of each feed-forward layer that carry the strongest weights stay.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaworks.core.anatomy import Anatomy, Place, anatomy
from deltaworks.core.errors import UserError
from deltaworks.core.sites import Site, stable_hash
from deltaworks.core.weights import base_tensors, part_of, to_matrix

DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
INNER = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
HEAD = ("head_dim", "d_kv")


class Projection(nn.Module):
    """x W^T + b in the dtype of x; W [out, in]."""

    def __init__(self, site: Site, inner: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = site.kaiming(out, inner), site.uniform(out, bound=inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def thin_copy(site: Site, reduction: int, kept: Sequence[int]) -> tuple[Any, list[str]]:
    """The thin trunk without its embeddings, and the paths of its blocks.

    It reads ``inputs_embeds`` [batch, length, width / reduction] and adds neither positions nor types to them.
    Raises UserError where the trunk's class cannot be made thin.
    """
    trunk: Any = site.module
    kind = trunk.__dict__.get("_plain_class", type(trunk))
    config = thin_config(trunk.config, reduction, kept)
    seed = stable_hash(f"{site.seed}/{site.place.path}/side")
    device = "meta" if site.device.type == "meta" else "cpu"
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            side = kind(config).float()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"a thin copy of {kind.__name__} cannot be made with reduction {reduction}: {error}") from None
    found = anatomy(side)
    if device != "meta":
        prune(site, side, found, kept)
    blocks = next(iter(found.blocks.values()))
    inside = tuple(f"{path}." for path in blocks)
    for path, module in list(side.named_modules()):
        if isinstance(module, nn.Embedding) and not path.startswith(inside):
            side.set_submodule(path, Silent())
    for place in found.places:
        if place.role == "norm.embedding":
            side.set_submodule(place.path, nn.Identity())
    if getattr(side, "pooler", None) is not None:
        side.pooler = None
    return side.to(site.device), blocks


class Silent(nn.Module):
    """In the place of an embedding whose sum the side network does not want."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1), persistent=False)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.zero


def thin_config(config: Any, reduction: int, kept: Sequence[int]) -> Any:
    """The configuration with widths divided, the number of heads the same, and only the kept blocks."""
    config, heads = copy.deepcopy(config), config.num_attention_heads
    explicit = [name for name in HEAD if isinstance(getattr(config, name, None), int)]
    size = getattr(config, explicit[0]) if explicit else config.hidden_size // heads
    thin = size // reduction
    thin = min(size, max(2, thin - (thin % 2 if size % 2 == 0 else 0)))  # rotary positions turn pairs of features
    inner = {name: getattr(config, name) for name in INNER if isinstance(getattr(config, name, None), int)}
    if getattr(config, "n_inner", 0) is None:
        inner["n_inner"] = 4 * config.hidden_size
    config.hidden_size = max(1, config.hidden_size // reduction) if explicit else heads * thin
    for name in explicit:
        setattr(config, name, thin)
    for name, width in inner.items():
        setattr(config, name, max(1, width // reduction))
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, len(kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[block] for block in kept]
    config.vocab_size = 1
    config.pad_token_id = None if config.pad_token_id is None else 0
    return config


# ---------------------------------------------------------------------------- cutting


def prune(site: Site, side: nn.Module, found: Anatomy, kept: Sequence[int]) -> None:
    """Fill the thin copy with the rows and columns of the strongest squared norm."""
    config: Any = site.module.config
    width = next(place for place in found.places if place.role == "mlp.down")
    narrow = matrix(side, width).shape[0]
    stream = site.shared(("stream", narrow), lambda: strongest(stream_scores(site), narrow))
    ours = [place for place in site.anatomy.places if place.stack == site.place.stack]
    targets = {(place.block, place.role): place for place in found.places if place.kind != "trunk"}
    with torch.no_grad():
        for new, old in enumerate(kept):
            places = {place.role: place for place in ours if place.block == old}
            cuts: Cuts = {}
            for section in ("attention", "cross_attention"):
                if f"{section}.q" in places:
                    thin_q = matrix(side, targets[new, f"{section}.q"])
                    cuts |= head_cuts(site.model, places, section, config.num_attention_heads, len(thin_q))
            if "mlp.down" in places:
                cuts |= inner_cuts(site.model, places, matrix(side, targets[new, "mlp.down"]).shape[1])
            for role, (rows, columns) in cuts.items():
                source, target = places[role], targets[new, role]
                rows, columns = (stream if cut is None else cut for cut in (rows, columns))
                matrix(side, target).copy_(matrix(site.model, source)[rows][:, columns])
                biases = [
                    base_tensors(m.get_submodule(p.path)).get("bias") for m, p in ((side, target), (site.model, source))
                ]
                if biases[0] is not None and biases[1] is not None:
                    part_of(target, biases[0]).copy_(part_of(source, biases[1])[rows])
        copy_the_rest(site, side, found, kept, ours, stream)


def copy_the_rest(
    site: Site, side: nn.Module, found: Anatomy, kept: Sequence[int], ours: list[Place], stream: Tensor
) -> None:
    """Norms along the residual stream, and tables of relative positions, which are one for each head."""
    for target in found.places:
        block = None if target.block is None else kept[target.block]
        alike = [place for place in ours if place.role == target.role and place.kind == target.kind]
        source = next((place for place in alike if place.block == block), alike[0] if alike else None)
        if source is None or not (target.kind == "norm" or target.role == "embedding.bias"):
            continue
        values = base_tensors(site.model.get_submodule(source.path))
        for name, tensor in base_tensors(side.get_submodule(target.path)).items():
            value = values.get(name)
            if tensor is not None and value is not None:
                value = (
                    value if value.shape == tensor.shape else value[stream] if tensor.shape == stream.shape else tensor
                )
                tensor.copy_(value)


def matrix(model: nn.Module, place: Place) -> Tensor:
    """The weight [out, in] of a place, as a view."""
    weight = base_tensors(model.get_submodule(place.path))["weight"]
    assert weight is not None
    return part_of(place, to_matrix(place.kind, weight))


def energy(weight: Tensor, dim: int) -> Tensor:
    return weight.float().square().sum(dim)


def strongest(scores: Tensor, count: int) -> Tensor:
    """Positions of the strongest scores along the last dimension, ascending."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def stream_scores(site: Site) -> Tensor:
    """How much the blocks of the whole model read and write each feature of the residual stream, [width]."""
    total = torch.zeros(site.width, device=site.device)
    for place in site.anatomy.places:
        if place.block is not None and place.kind in ("linear", "conv1d") and place.part is None:
            dim = 1 if place.role.endswith((".o", ".down")) else 0
            scores = energy(matrix(site.model, place), dim)
            total += scores if scores.shape == total.shape else 0
    return total


Cuts = dict[str, tuple[Tensor | None, Tensor | None]]
"""Rows and columns to keep of the matrix of each role; None stands for those of the residual stream."""


def head_cuts(model: nn.Module, places: dict[str, Place], section: str, heads: int, thin_out: int) -> Cuts:
    """The features of each head to keep: one set for q and k (in halves, for rotary positions), one for v and o."""
    q, k, v, o = (matrix(model, places[f"{section}.{part}"]) for part in "qkvo")
    size, thin = len(q) // heads, thin_out // heads
    shared = len(k) // size  # key/value heads, each serving heads / shared query heads
    group = heads // shared
    read = energy(q, 1).view(shared, group, size).sum(1) + energy(k, 1).view(shared, size)
    carried = energy(v, 1).view(shared, size) + energy(o, 0).view(shared, group, size).sum(1)
    if size % 2 == 0 and thin % 2 == 0:
        half = strongest(read.view(shared, 2, size // 2).sum(1), thin // 2)
        matched = torch.cat([half, half + size // 2], dim=1)
    else:
        matched = strongest(read, thin)
    passed = strongest(carried, thin)
    start = torch.arange(heads, device=q.device)[:, None] * size

    def rows(chosen: Tensor, repeats: int) -> Tensor:
        return (start[: shared * repeats] + chosen.repeat_interleave(repeats, 0)).flatten()

    return {
        f"{section}.q": (rows(matched, group), None),
        f"{section}.k": (rows(matched, 1), None),
        f"{section}.v": (rows(passed, 1), None),
        f"{section}.o": (None, rows(passed, group)),
    }


def inner_cuts(model: nn.Module, places: dict[str, Place], thin: int) -> Cuts:
    """The hidden units of the feed-forward layer to keep."""
    into = [role for role in ("mlp.up", "mlp.gate") if role in places]
    scores = energy(matrix(model, places["mlp.down"]), 0)
    for role in into:
        scores = scores + energy(matrix(model, places[role]), 1)
    units = strongest(scores, thin)
    return dict.fromkeys(into, (units, None)) | {"mlp.down": (None, units)}
