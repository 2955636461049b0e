"""A protocol is data: which methods meet on which model and data, under which settings, with which seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deltaworks.core.errors import UserError, nearest
from deltaworks.core.registry import configure, methods
from deltaworks.train.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Protocol:
    """Methods times seeds over one base recipe; every run has the same data order, head treatment and steps."""

    name: str
    help: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    workers: int = 1
    run_seconds: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def changed(
        self, methods: str | None, seeds: int | None, workers: int | None, settings: Mapping[str, Any]
    ) -> Protocol:
        """The protocol with a caller's choices in place of its own. ``seeds`` counts from 0."""
        recipe = dict(self.recipe)
        for one, other in (("steps", "epochs"), ("epochs", "steps"), ("rates", "factors"), ("factors", "rates")):
            if one in settings:
                recipe.pop(other, None)
        return replace(
            self,
            methods=self.methods if methods is None else tuple(specs_of(methods)),
            seeds=self.seeds if seeds is None else tuple(range(seeds)),
            workers=self.workers if workers is None else workers,
            recipe=recipe | dict(settings),
        )

    def recipes(self) -> list[Recipe]:
        """One recipe for each run, seed by seed. Raises UserError for a wrong setting or an unknown method."""
        for word in ("method", "seed", "out"):
            if word in self.recipe:
                raise UserError(f"a comparison sets {word!r} itself: use --methods, --seeds and --out")
        if not self.methods or not self.seeds or self.workers < 1:
            raise UserError("a comparison needs at least one method, one seed and one worker")
        specs = list(dict.fromkeys(str(configure(spec)) for spec in self.methods))
        return [
            parse_recipe({**self.recipe, "method": spec, "seed": seed}, "the comparison")
            for seed in self.seeds
            for spec in specs
        ]


def specs_of(text: str) -> list[str]:
    """``"lora[rank=4],ia3,prompt*"`` as specs; wildcards are names or families of the registry."""
    found: list[str] = []
    for word in re.split(r",(?![^\[]*\])", text):
        word = word.strip()
        if not word:
            raise UserError(f"--methods {text!r} has an empty part between commas")
        found += methods(word) if "*" in word or "?" in word else [word]
    return found


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "quick",
            "one method of each family on minilm and stdlib-docs, one seed: the demo, under five minutes on two cores",
            methods=(
                "head", "full", "lora", "krona", "ia3", "bitfit", "paca", "houlsby", "prefix-flat", "lst", "mam",
            ),
            workers=2,
            recipe={
                "model": "minilm",
                "data": "stdlib-docs",
                "steps": 60,
                "batch_size": 32,
                "group_by_length": True,
                "max_length": 48,
                "curve_points": 3,
                # so few steps teach a fresh classifier only at a high rate, which is the same for all methods
                "head_rate": 3e-2,
            },
        ),
        Protocol(
            "fair",
            "three learning rates, three seeds, three epochs: for conclusions",
            methods=("head", "full", "lora", "ia3", "bitfit", "houlsby"),
            seeds=(0, 1, 2),
            recipe={
                "model": "minilm",
                "data": "stdlib-docs",
                "epochs": 3,
                "group_by_length": True,
                "factors": [0.3, 1.0, 3.0],
            },
        ),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """Raises UserError with the nearest names."""
    if name not in PROTOCOLS:
        raise UserError(f"the protocol {name!r} is unknown: {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
