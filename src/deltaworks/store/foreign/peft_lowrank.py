"""The rows of peft's table whose change is low-rank factors, or a product of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.weights import base_tensors, matrix_of
from deltaworks.store.foreign import lost
from deltaworks.store.foreign.peft_types import Field, Name, Shape, Spot, Type, at, reshaped, under
from deltaworks.store.foreign.targets import patterned


def kernel(shape: Shape, spot: Spot) -> Shape:
    """[r, in k k] as the kernel of a convolution [r, in, k, k]."""
    return (shape[0], -1 if shape[1] is None else shape[1] // _area(spot), *spot.module.kernel_size)


def _ungrouped(shape: Shape, spot: Spot) -> Shape:
    """The same for LoRA: of a convolution with groups, theirs sees the channels of all of them."""
    _check_groups(spot.module, spot.place.path)
    return kernel(shape, spot)


def _check_groups(module: Any, path: str) -> None:
    groups = getattr(module, "groups", 1)
    if groups != 1:
        raise UserError(
            f"peft's LORA at {path!r}, a convolution of {groups} groups, adds between groups, where "
            "the weight has nothing: leave it out of the targets, or merge"
        )


def _area(spot: Spot) -> int:
    return int(spot.module.kernel_size[0] * spot.module.kernel_size[1])


def _lora(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    """What a place takes of it: no more ranks than its weight has, and for DoRA dropout at linear layers alone."""
    _check_groups(model.get_submodule(place.path), place.path)
    options: dict[str, Any] = {}
    rank = patterned(data.get("rank_pattern") or {}, place.path, data.get("r", 8))
    most = min(matrix_of(place, base_tensors(model.get_submodule(place.path))[place.parameter]).shape)
    if rank > most:
        lost(f"rank {rank} is more than a weight of {most} inputs or outputs has: there {most} make the same changes")
        alpha = patterned(data.get("alpha_pattern") or {}, place.path, data.get("lora_alpha", 8))
        options |= {"rank": most, "alpha": alpha * (most / rank) ** (0.5 if data.get("use_rslora") else 1.0)}
    rate = data.get("lora_dropout", 0.0)
    if rate and data.get("use_dora") and place.kind not in ("linear", "conv1d"):
        lost(f"lora_dropout={rate} acts in training alone and is not held for DoRA at a {place.kind}")
        options["dropout"] = 0.0
    return options


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
        **at(
            "linear",
            "conv1d",
            names=under(A="lora_A.weight", B="lora_B.weight", magnitude="lora_magnitude_vector"),
        ),
        "conv2d": (
            Name("A", "{path}.lora_A.weight", _ungrouped),
            Name("B", "{path}.lora_B.weight", reshaped(after=2)),
            Name("magnitude", "{path}.lora_magnitude_vector", reshaped(1, after=2)),
        ),
        "embedding": under(A="lora_embedding_A", B="lora_embedding_B", magnitude="lora_magnitude_vector"),
        "matrix": under(A="lora_A.weight", B="lora_B.weight"),
    },
    site=_lora,
    sited=("target_parameters",),
    idle=("qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying"),
    unsaid=("ratio",),
    bias="lora_only",
    holds=lambda tuner: not tuner.config.pissa,
    starts=(True, "pissa"),
)


def _adalora(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    """Theirs divides alpha by the rank at the start (and 1e-5), ours by the rank at the end."""
    end, start = data.get("target_r", 8), data.get("init_r", 12)
    alpha = data.get("lora_alpha", 8)
    alpha = alpha if alpha > 0 else start
    if data.get("beta2", 0.85) != data.get("beta1", 0.85):
        lost(f"beta2={data['beta2']!r} acts in training alone: here both averages go by beta1")
    steps = {"warmup": data.get("tinit", 0), "final": data.get("tfinal", 0), "interval": data.get("deltaT", 1)}
    return {"rank": end, "initial": start / end, "alpha": alpha * end / (start + 1e-5), **steps}


def _adalora_written(items: list[Any], chosen: Any) -> dict[str, Any]:
    """A schedule in steps is theirs too; of one in shares of a run, the next training says the steps."""
    config = items[0].tuner.config
    for name in ("warmup", "final"):
        share = getattr(config, name)
        if 0 < share < 1 and share != getattr(type(config)(), name):
            lost(f"{name}={share!r}, a share of the run, acts in training alone and peft's ADALORA counts steps")
    warmup, final = int(config.warmup), int(config.final)
    return {
        "target_r": config.rank,
        "init_r": config.start,
        "lora_alpha": config.alpha * (config.start + 1e-5) / config.rank,
        "tinit": warmup,
        "tfinal": final,
        "deltaT": config.interval,
        "beta2": config.beta,
        "total_step": warmup + final + 1,  # peft asks for more than the two
    }


def triplets(dimension: int) -> Any:
    """``write`` that gives the triplets that were pruned, which are not stored, back as zeros."""

    def write(tensor: Tensor, spot: Spot) -> Tensor:
        more = spot.tuner.config.start - tensor.shape[dimension]
        return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - dimension) + (0, more))

    return write


ADALORA = Type(
    "ADALORA",
    "adalora",
    fields=(Field("gamma", "orth_reg_weight", 0.5), Field("beta", "beta1", 0.85)),
    names=at(
        "linear",
        "conv1d",
        names=(
            Name("P", "{path}.lora_B", lambda shape, spot: (shape[0], None), write=triplets(1)),
            Name(
                "L",
                "{path}.lora_E",
                lambda shape, spot: (None, 1),
                read=lambda tensor, spot: tensor[:, 0],
                write=triplets(0),
            ),
            Name("Q", "{path}.lora_A", lambda shape, spot: (None, shape[1]), write=triplets(0)),
        ),
    ),
    site=_adalora,
    sited=("target_r", "init_r", "lora_alpha", "tinit", "tfinal", "deltaT", "beta2"),
    written=_adalora_written,
    training=("lora_dropout",),
    idle=(
        "r", "total_step", "rank_pattern", "use_rslora", "qalora_group_size", "megatron_core", "ensure_weight_tying",
    ),
    bias="lora_only",
)  # fmt: skip

# ---- products of factors ------------------------------------------------------------------------------------------


def _flat(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    """No options: a kernel that theirs has as a factor of its own is refused."""
    size = getattr(model.get_submodule(place.path), "kernel_size", (1, 1))
    if data.get("use_effective_conv2d") and set(size) != {1}:
        raise UserError(
            f"use_effective_conv2d=True at {place.path!r} makes a factor of the kernel, which is not held here: "
            "turn it off"
        )
    return {}


LOHA = Type(
    "LOHA",
    "loha",
    fields=(Field("rank", "r", 8, "rank_pattern"), Field("alpha", "alpha", 8, "alpha_pattern")),
    names=at("linear", "conv2d", names=under(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b")),
    training=("rank_dropout", "module_dropout"),
    site=_flat,
    sited=("use_effective_conv2d",),
)


def _scale(spot: Spot) -> float:
    """Theirs over ours: without a factor of low rank ours has none."""
    return float(spot.tuner.config.alpha / spot.tuner.config.rank / spot.tuner.scale)


def _lokr(kernel: Any) -> tuple[Name, ...]:
    def scaled(name: str, which: int, shape: Any, whole: bool) -> Name:
        return Name(
            f"B.{which}",
            name,
            shape,
            read=lambda tensor, spot: tensor * _scale(spot),
            write=lambda tensor, spot: tensor / _scale(spot),
            when=lambda spot: (len(spot.tuner.B) == 1) is whole,
        )

    def same(shape: Shape, spot: Spot) -> Shape:
        return shape

    return (
        Name("A.0", "{path}.lokr_w1", when=lambda spot: len(spot.tuner.A) == 1),
        Name("A.0", "{path}.lokr_w1_a", when=lambda spot: len(spot.tuner.A) == 2),
        Name("A.1", "{path}.lokr_w1_b"),
        scaled("{path}.lokr_w2", 0, kernel, True),
        scaled("{path}.lokr_w2_a", 0, same, False),
        Name("B.1", "{path}.lokr_w2_b"),
    )


LOKR = Type(
    "LOKR",
    "lokr",
    fields=(
        Field("rank", "r", 8, "rank_pattern"),
        Field("alpha", "alpha", 8, "alpha_pattern"),
        Field("both", "decompose_both", False),
        Field(
            "factor",
            "decompose_factor",
            -1,
            read=lambda factor: None if factor == -1 else factor,
            write=lambda factor: -1 if factor is None else factor,
        ),
    ),
    names={"linear": _lokr(reshaped()), "conv2d": _lokr(kernel)},
    training=("rank_dropout", "module_dropout"),
    site=_flat,
    sited=("use_effective_conv2d",),
    idle=("rank_dropout_scale",),
    holds=lambda tuner: tuner.config.alpha > 0,
)

VERA = Type(
    "VERA",
    "vera",
    fields=(Field("rank", "r", 256), Field("initial", "d_initial", 0.1), Field("dropout", "vera_dropout", 0.0)),
    names=at(
        "linear",
        "conv1d",
        names=(
            *under(b="vera_lambda_b", d="vera_lambda_d"),
            Name("projection.A", "base_model.vera_A"),
            Name("projection.B", "base_model.vera_B"),
        ),
    ),
    idle=("save_projection",),
    seed=("projection_prng_key", 0),
    bias="vera_only",
)
