"""A protocol is data: which methods meet in which worlds (model and data), under which settings, with which seeds.

The package's own are the YAML files beside this module; a user's own file is read the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, count, islice, product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deltaworks.core.errors import UserError, nearest
from deltaworks.core.registry import configure, methods, split
from deltaworks.train.recipe import Positive, Recipe, Whole, parse, parse_recipe, read_settings

SHIPPED = Path(__file__).parent
OF_THE_COMPARISON = ("method", "seed", "out", "searched_on", "chosen_rate")
"""Fields of a recipe that a comparison sets for each of its runs."""

DATA_SETS = ("data", "test", "forgetting")
"""Fields of a recipe that may name a data set of the data root or of the Hub."""

RIVALS: dict[str, tuple[str, ...]] = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "rates": ("factors", "tried"),
    "factors": ("rates",),
    "tried": ("rates",),
}
"""Settings that another one takes the place of."""


class Protocol(BaseModel):
    """Methods times seeds in every world; the runs of one world share data order, head treatment, steps and search."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("", description="default: that of the file")
    help: str = ""
    methods: tuple[str, ...] = Field(description="specs such as lora[rank=4]; wildcards are names or families")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    search: Literal["each", "first"] = Field(
        "each", description="who tries the learning rates: the run of each seed, or that of the first for the others"
    )
    workers: Whole = Field(1, description="runs side by side")
    run_seconds: Positive | None = Field(None, description="after which a run is stopped; default: never")
    settings: dict[str, Any] = Field(default_factory=dict, description="fields of the recipe, for all worlds")
    worlds: tuple[dict[str, Any], ...] = Field(
        ({},),
        min_length=1,
        description="fields of the recipe for one world each, before those of settings; with lists as model and data, "
        "every pair is a world; methods may stand here too, in place of the protocol's",
    )
    hub: dict[str, str] = Field(default_factory=dict, description="name of a data set to its id on the Hub")
    data_root: Path | None = Field(None, description="folder in which named data sets lie as folders of that name")

    @field_validator("methods", mode="before")
    @classmethod
    def _specs(cls, value: Any) -> Any:
        return tuple(specs_of(value))

    def changed(
        self,
        methods: str | None = None,
        seeds: int | None = None,
        workers: int | None = None,
        data_root: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Protocol:
        """The protocol with a caller's choices in place of its own, in every world.

        Other data take the worlds' own settings away, which were made for theirs. ``seeds`` is how many: the first
        ones of the protocol, then the smallest numbers that are not among them.
        """
        given = dict(settings or {})
        fitting = {"model"} if "data" in given else None
        worlds = [
            _over({key: value for key, value in world.items() if fitting is None or key in fitting}, given)
            for world in self.worlds
        ]
        update: dict[str, Any] = {"settings": _over(self.settings, given), "worlds": tuple(worlds)}
        if methods is not None:
            update["methods"] = tuple(specs_of(methods))
            update["worlds"] = tuple({k: v for k, v in world.items() if k != "methods"} for world in worlds)
        if seeds is not None:
            others = (seed for seed in count() if seed not in self.seeds)
            update["seeds"] = tuple(islice(chain(self.seeds, others), seeds))
        if workers is not None:
            update["workers"] = workers
        if data_root is not None:
            update["data_root"] = data_root
        return self.model_copy(update=update)

    def recipes(self) -> list[list[Recipe]]:
        """The runs of each world, seed by seed. Raises UserError for a wrong setting or an unknown method."""
        if not self.seeds or self.workers < 1:
            raise UserError("a comparison needs at least one seed and one worker")
        if self.data_root is not None and not self.data_root.is_dir():
            raise UserError(f"the data root {str(self.data_root)!r} is not a folder")
        found: list[list[Recipe]] = []
        for world in self.worlds:
            settings = _over(self.settings, world)
            specs = specs_of(settings.pop("methods", self.methods))
            if not specs:
                raise UserError("a comparison needs at least one method")
            pairs = product(_listed(settings, "model"), _listed(settings, "data"))
            for pair in pairs:
                runs = self._runs(settings | {k: v for k, v in zip(("model", "data"), pair, strict=True) if v}, specs)
                if runs not in found:
                    found.append(runs)
        return found

    def _runs(self, settings: dict[str, Any], specs: Iterable[str]) -> list[Recipe]:
        for word in OF_THE_COMPARISON:
            if word in settings:
                raise UserError(f"a comparison sets {word!r} itself: use --methods, --seeds and --out")
        places = {key: self._place(settings[key]) for key in DATA_SETS if isinstance(settings.get(key), str)}
        once = dict.fromkeys(str(configure(spec)) for spec in specs)
        source = f"the protocol {self.name!r}" if self.name else "the comparison"
        recipes = []
        for seed, spec in product(self.seeds, once):
            recipe = parse_recipe({**settings, **places, "method": spec, "seed": seed}, source)
            if self.search == "first" and seed != self.seeds[0] and len(recipe.tried_rates(recipe.config())) > 1:
                recipe = recipe.model_copy(update={"searched_on": self.seeds[0]})
            recipes.append(recipe)
        return recipes

    def _place(self, data: str) -> str:
        """Where named data are: in the data root, or else on the Hub; anything else is a place itself."""
        if self.data_root is not None and (self.data_root / data).exists():
            return str(self.data_root / data)
        return self.hub.get(data, data)

    def trainings(self) -> int:
        """How often a model is trained: once for each rate of a search, and once for each run that does not search."""
        runs = [run for world in self.recipes() for run in world]
        return sum(len(run.tried_rates(run.config())) if run.searched_on is None else 1 for run in runs)


def _over(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with ``others`` in their place, and in the place of what these rule out."""
    ruled_out = {rival for key in others for rival in RIVALS.get(key, ())}
    return {key: value for key, value in settings.items() if key not in ruled_out} | dict(others)


def _listed(settings: dict[str, Any], key: str) -> list[Any]:
    value = settings.pop(key, None)
    return value if isinstance(value, list) else [value]


def specs_of(given: str | Iterable[str]) -> list[str]:
    """``"lora[rank=4],ia3,prompt*"``, or such texts, as specs; wildcards are names or families of the registry."""
    words = split(given, ",") if isinstance(given, str) else [word for text in given for word in split(text, ",")]
    specs: list[str] = []
    for word in filter(None, words):
        wild = "[" not in word and ("*" in word or "?" in word)
        specs += methods(word) if wild else [word]
    return specs


def read_protocol(path: Path) -> Protocol:
    """The protocol in a YAML file. Raises UserError for a missing or broken file, and for a wrong key or value."""
    source = f"the protocol {str(path)!r}"
    return parse(Protocol, {"name": path.stem, **read_settings(path, source)}, source)


def find_protocol(name: str) -> Protocol:
    """A protocol of the package, or the one in a file. Raises UserError with the nearest names."""
    if name.endswith((".yaml", ".yml")):
        return read_protocol(Path(name))
    if name not in shipped():
        raise UserError(f"the protocol {name!r} is unknown: {nearest(name, shipped())}; a file of yours ends in .yaml")
    return read_protocol(SHIPPED / f"{name}.yaml")


def shipped() -> list[str]:
    """Names of the protocols of the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
