"""The methods of huggingface/peft 0.21 that we hold: one row for each, for reading and for writing.

To add one, add a row; ``tests/test_peft.py`` takes a configuration of it. What has no row is P_TUNING and
ADAPTION_PROMPT (no methods here yet), and the types that no method here equals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.sites import is_causal
from deltaworks.store.foreign.peft_types import Field, Name, Shape, Spot, Type, base_added, reshaped
from deltaworks.store.foreign.targets import named


def under(**names: str) -> tuple[Name, ...]:
    """Tensors under the module's path that are alike in both files."""
    return tuple(Name(ours, f"{{path}}.{theirs}") for ours, theirs in names.items())


def at(*kinds: str, names: tuple[Name, ...]) -> dict[str, tuple[Name, ...]]:
    return dict.fromkeys(kinds, names)


def kernel(shape: Shape, spot: Spot) -> Shape:
    """[r, in k k] as the kernel of a convolution [r, in, k, k]."""
    return (shape[0], -1 if shape[1] is None else shape[1] // _area(spot), *spot.module.kernel_size)


def _area(spot: Spot) -> int:
    return int(spot.module.kernel_size[0] * spot.module.kernel_size[1])


# ---- LoRA and AdaLoRA ---------------------------------------------------------------------------------------------

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
            Name("A", "{path}.lora_A.weight", kernel),
            Name("B", "{path}.lora_B.weight", reshaped(after=2)),
            Name("magnitude", "{path}.lora_magnitude_vector", reshaped(1, after=2)),
        ),
        "embedding": under(A="lora_embedding_A", B="lora_embedding_B", magnitude="lora_magnitude_vector"),
    },
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
    return {"rank": end, "initial": start / end, "alpha": alpha * end / (start + 1e-5)}


def _adalora_written(items: list[Any], chosen: Any) -> dict[str, Any]:
    config = items[0].tuner.config
    return {
        "target_r": config.rank,
        "init_r": config.start,
        "lora_alpha": config.alpha * (config.start + 1e-5) / config.rank,
        "total_step": 1,  # peft asks for one; the schedule is that of the next training
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
    sited=("target_r", "init_r", "lora_alpha"),
    written=_adalora_written,
    training=("lora_dropout",),
    idle=(
        "r", "tinit", "tfinal", "deltaT", "beta2", "total_step", "rank_pattern", "use_rslora", "qalora_group_size",
        "megatron_core", "ensure_weight_tying",
    ),
    unsaid=("warmup", "final", "interval"),
    bias="lora_only",
)  # fmt: skip

# ---- products of factors ------------------------------------------------------------------------------------------

LOHA = Type(
    "LOHA",
    "loha",
    fields=(Field("rank", "r", 8, "rank_pattern"), Field("alpha", "alpha", 8, "alpha_pattern")),
    names=at("linear", "conv2d", names=under(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b")),
    training=("rank_dropout", "module_dropout"),
    idle=("use_effective_conv2d",),
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
    idle=("use_effective_conv2d", "rank_dropout_scale"),
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
            Name("projection.A", "base_model.vera_A", optional=True),
            Name("projection.B", "base_model.vera_B", optional=True),
        ),
    ),
    idle=("save_projection",),
    seed=("projection_prng_key", 0),
    bias="vera_only",
)

# ---- rotations and reflections ------------------------------------------------------------------------------------


def _number(value: int) -> int | None:
    return value or None


def _zero(value: int | None) -> int:
    return value or 0


def _oft(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    if data.get("use_cayley_neumann", True) and data.get("num_cayley_neumann_terms", 5) != 5:
        raise UserError("peft's OFT with num_cayley_neumann_terms other than 5 has no counterpart here")
    return {"eps": data.get("eps", 6e-5) if data.get("coft") else None}


def _constrained(tensor: Tensor, spot: Spot) -> Tensor:
    """peft keeps blocks as the last step left them and cuts them to the radius when they are used."""
    eps = spot.tuner.config.eps
    if eps is None:
        return tensor
    norm = 2**0.5 * tensor.norm(dim=1, keepdim=True)
    radius = eps / len(tensor) ** 0.5
    return tensor * (radius / norm.clamp(min=radius))


def _oft_written(items: list[Any], chosen: Any) -> dict[str, Any]:
    eps = items[0].tuner.config.eps
    return {"coft": eps is not None} | ({} if eps is None else {"eps": eps})


OFT = Type(
    "OFT",
    "oft",
    fields=(
        Field("block", "oft_block_size", 32, read=_number, write=_zero),
        Field("blocks", "r", 0, read=_number, write=_zero),
        Field("share", "block_share", False),
        Field("series", "use_cayley_neumann", True),
        Field("dropout", "module_dropout", 0.0),
    ),
    names={"linear": (Name("triangle", "{path}.oft_R.weight", read=_constrained),)},
    site=_oft,
    sited=("coft", "eps", "num_cayley_neumann_terms"),
    written=_oft_written,
    bias="oft_only",
)

BOFT = Type(
    "BOFT",
    "boft",
    fields=(
        Field("block", "boft_block_size", 4, read=_number, write=_zero),
        Field("blocks", "boft_block_num", 0, read=_number, write=_zero),
        Field("factors", "boft_n_butterfly_factor", 1),
    ),
    names={
        "linear": (Name("blocks", "{path}.boft_R"), Name("scale", "{path}.boft_s", reshaped(after=1))),
    },
    training=("boft_dropout",),
    bias="boft_only",
)

HRA = Type(
    "HRA",
    "hra",
    fields=(Field("rank", "r", 8), Field("gram_schmidt", "apply_GS", False)),
    names=at("linear", "conv2d", names=under(u="hra_u")),
    unsaid=("penalty",),
    bias="hra_only",
)

# ---- others -------------------------------------------------------------------------------------------------------

FOURIERFT = Type(
    "FOURIERFT",
    "fourierft",
    fields=(Field("frequencies", "n_frequency", 1000, "n_frequency_pattern"), Field("alpha", "scaling", 150.0)),
    names=at("linear", "conv1d", names=under(spectrum="fourierft_spectrum")),
    site=lambda data, place, model: {"init": "zeros" if data.get("init_weights") else "normal"},
    written=lambda items, chosen: {"init_weights": items[0].tuner.config.init == "zeros"},
    seed=("random_loc_seed", 777),
    bias="fourier_only",
    starts=(True, False),
)

MISS = Type(
    "MISS",
    "miss",
    fields=(Field("rank", "r", 64), Field("dropout", "miss_dropout", 0.0)),
    names={"linear": under(block="miss_block")},
    site=lambda data, place, model: {"width": data.get("mini_r", 1) if data.get("init_weights") == "mini" else None},
    sited=("mini_r",),
    written=lambda items, chosen: (
        {} if (width := items[0].tuner.config.width) is None else {"init_weights": "mini", "mini_r": width}
    ),
    bias="MiSS_only",
    holds=lambda tuner: tuner.config.blocks == "inputs",
    starts=(True, "mini"),
)

BAT = Type(
    "MISS",
    "bat",
    fields=(Field("rank", "r", 64),),
    names={"linear": under(blocks="miss_block")},
    says={"init_weights": "bat"},
    bias="MiSS_only",
    training=("miss_dropout",),
    idle=("mini_r",),
    holds=lambda tuner: tuner.config.blocks == "outputs",
    starts=("bat",),
)


def _ia3(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    """Which side of the weight is scaled, where it is not the one that the role says."""
    inner = data.get("feedforward_modules") or []
    columns = named(inner, place.path) if isinstance(inner, str) else place.path.endswith(tuple(inner))
    return {"scales": "auto" if columns == place.role.endswith(".down") else "columns" if columns else "rows"}


def _ia3_written(items: list[Any], chosen: list[str] | str) -> dict[str, Any]:
    """Which modules have their inputs scaled, in entries of ``target_modules``, as peft asks."""
    inner = [item.place.path for item in items if item.tuner.columns]
    outer = [item.place.path for item in items if not item.tuner.columns]
    if isinstance(chosen, str):
        return {"feedforward_modules": "|".join(map(re.escape, inner))}
    names = [name for name in chosen if any(path.endswith(name) for path in inner)]
    if any(path.endswith(tuple(names)) for path in outer):
        return {"feedforward_modules": inner, "target_modules": [*inner, *outer]}
    return {"feedforward_modules": names}


IA3 = Type(
    "IA3",
    "ia3",
    fields=(),
    names=at(
        "linear",
        "conv1d",
        names=(
            Name(
                "scale",
                "{path}.ia3_l",
                lambda shape, spot: (1, *shape) if spot.tuner.columns else (*shape, 1),
            ),
        ),
    ),
    site=_ia3,
    sited=("feedforward_modules",),
    written=_ia3_written,
    shaped=("scales",),
)

LN_TUNING = Type(
    "LN_TUNING",
    "ln",
    fields=(),
    names={
        "norm": (
            base_added("gain", "{path}.ln_tuning_layers.weight", "weight"),
            base_added("shift", "{path}.ln_tuning_layers.bias", "bias"),
        ),
    },
    holds=lambda tuner: tuner.config.shift and not tuner.config.relative,
)


def _tokens(tensor: Tensor, spot: Spot) -> Tensor:
    """peft gives an encoder-decoder twice the tokens and reads the first half, those of the encoder."""
    return tensor[: len(spot.tuner.E)]


def _position(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    """In front of the first token; the classifier of an encoder reads the first virtual one."""
    return {"position": 0, "kept": data.get("task_type") == "SEQ_CLS" and not is_causal(model)}


PROMPT_TUNING = Type(
    "PROMPT_TUNING",
    "prompt",
    fields=(Field("length", "num_virtual_tokens", None),),
    names={"trunk": (Name("E", "prompt_embeddings", lambda shape, spot: (None, shape[1]), read=_tokens),)},
    site=_position,
    idle=(
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "token_dim",
        "num_transformer_submodules", "num_attention_heads", "num_layers",
    ),
    unsaid=("init",),
    written=lambda items, chosen: {"num_transformer_submodules": 1, "token_dim": items[0].tuner.E.shape[1]},
    shaped=("position", "kept"),
    holds=lambda tuner: tuner.position == 0,
    starts=(True,),
    whole=True,
)  # fmt: skip

TYPES: tuple[Type, ...] = (
    LORA, ADALORA, LOHA, LOKR, VERA, OFT, BOFT, HRA, FOURIERFT, MISS, BAT, IA3, LN_TUNING, PROMPT_TUNING,
)  # fmt: skip
