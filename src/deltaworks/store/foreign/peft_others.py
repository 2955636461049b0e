"""The rows of peft's table that are no low-rank factors: rotations, scales, spectra, norms, virtual tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from deltaworks.core.errors import UserError
from deltaworks.core.sites import is_causal
from deltaworks.store.foreign import lost
from deltaworks.store.foreign.peft_types import Field, Name, Spot, Type, at, base_added, reshaped, under
from deltaworks.store.foreign.targets import named


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
    config = items[0].tuner.config
    usual = {"oft_block_size": 32} if config.block is None and config.blocks is None else {}
    return {"coft": config.eps is not None} | ({} if config.eps is None else {"eps": config.eps}) | usual


def _boft_written(items: list[Any], chosen: Any) -> dict[str, Any]:
    config = items[0].tuner.config
    return {"boft_block_size": 4} if config.block is None and config.blocks is None else {}


def _cuts_as_said(tuner: Any) -> bool:
    """Whether the blocks are of the size that is asked for: peft's BOFT takes no nearest one."""
    inner = tuner.blocks.shape[1] * tuner.side
    return bool(tuner.side == (inner / tuner.config.blocks if tuner.config.blocks else tuner.config.block or 4))


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
    written=_boft_written,
    holds=_cuts_as_said,
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
    begins={"prompt_tuning_init": "SAMPLE_VOCAB"},
    whole=True,
)  # fmt: skip


P_TUNING = replace(
    PROMPT_TUNING,
    peft="P_TUNING",
    idle=(
        *PROMPT_TUNING.idle, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
        "encoder_dropout",
    ),
    holds=lambda tuner: False,
    made=True,
)  # fmt: skip


def _heads(which: int) -> Name:
    """The keys (0) or values (1) [kv_heads, l, head_dim] of one block, in [l, 2 blocks kv_heads head_dim]."""

    def columns(spot: Spot) -> slice:
        heads, _, size = spot.tuner.key.shape
        start = (2 * (spot.place.block or 0) + which) * heads * size
        return slice(start, start + heads * size)

    def read(tensor: Tensor, spot: Spot) -> Tensor:
        heads, length, size = spot.tuner.key.shape
        return tensor.reshape(length, heads, size).transpose(0, 1)

    return Name(
        ("key", "value")[which],
        "prompt_embeddings",
        lambda shape, spot: (spot.tuner.key.shape[1], None),
        read=read,
        write=lambda tensor, spot: tensor.transpose(0, 1).flatten(1),
        columns=columns,
    )


def _shifted(data: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if not is_causal(model) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"peft's PREFIX_TUNING of {type(model).__name__} is not held: there the prefix takes part in its positions"
        )
    if getattr(config, "sliding_window", None):
        lost("the prefix is never behind the sliding window here: for longer texts the outputs differ")
    return {"shifted": True}


PREFIX_TUNING = Type(
    "PREFIX_TUNING",
    "prefix-flat",
    fields=(Field("length", "num_virtual_tokens", None),),
    names={"keyvalue": (_heads(0), _heads(1)), "trunk": ()},
    site=_shifted,
    idle=(
        "prefix_projection", "encoder_hidden_size", "token_dim", "num_transformer_submodules", "num_attention_heads",
        "num_layers",
    ),
    shaped=("shifted",),
    holds=lambda tuner: tuner.config.shifted and tuner.config.init == "random",
    starts=(True, None),
    begins={"prefix_projection": False},
    whole=True,
)  # fmt: skip
