"""What each method can do, found by attaching it to small models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from deltaworks.core.delta import Delta, attach
from deltaworks.core.errors import UserError
from deltaworks.core.registry import Config, methods, registry


@dataclass
class Ability:
    """What one method is and can do; ``merge`` and ``rows`` hold the reason where it cannot."""

    name: str
    family: str
    paper: str
    form: int | None
    merge: str | None
    rows: str | None
    identity: bool
    learning_rate: float
    limits: dict[str, str]
    options: dict[str, dict[str, Any]]


def ability(config: type[Config], probes: list[Any]) -> Ability:
    """Found by attaching the method to small models until one takes it; ``form`` is None where none does."""
    delta = _probed(config, probes)
    limits = dict(config.limits)
    fields = [field for field in dataclasses.fields(config) if field.init]
    return Ability(
        name=config.name,
        family=config.family,
        paper=config.paper,
        form=None if delta is None else max(tuner.form() for tuner in delta.tuners()),
        merge="no probe takes it" if delta is None else delta.limit("merge"),
        rows="no probe takes it" if delta is None else delta.limit("rows"),
        identity=config.identity,
        learning_rate=config.learning_rate,
        limits={key: text for key, text in limits.items() if key not in ("merge", "rows")},
        options={
            field.name: {"default": field.default, "help": field.metadata.get("help", "")}
            for field in fields
            if field.default is not dataclasses.MISSING
        },
    )


def _probed(config: type[Config], probes: list[Any]) -> Delta | None:
    for model in probes:
        try:
            delta = attach(model, config(**config.small))
        except UserError:
            continue
        delta.detach()
        return delta
    return None


def probe_models() -> list[Any]:
    """An encoder and an encoder-decoder of a few thousand parameters, with every kind of place."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng():
        encoder = BertForSequenceClassification(
            BertConfig(
                vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=64,
            )
        )  # fmt: skip
        both = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        )
    return [encoder.eval(), both.eval()]


def abilities(pattern: str = "*") -> list[Ability]:
    """The methods whose name or family matches. Raises UserError where none does."""
    names = methods(pattern)
    known, probes = registry(), probe_models()
    return [ability(known[name], probes) for name in names]
