"""A recipe: everything that decides a training run, flat, checked, and the same for one run and for a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltaworks.core.errors import UserError, nearest
from deltaworks.core.registry import Config, configure
from deltaworks.train.quantizing import Form, Quantization

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=1)]
Checkpointing = Annotated[
    Literal[False, "block", "selective", "offload"],
    BeforeValidator(lambda given: "block" if given is True else given or False),
]
Settings = TypeVar("Settings", bound=BaseModel)


class Recipe(BaseModel):
    """One training run. Lengths are in tokens, sizes in examples, rates are learning rates of AdamW."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), frozen=True)

    model: str = Field("minilm", description="minilm, tiny-lm, tiny-vit, a folder, module:function, or a Hub id")
    data: str = Field("stdlib-docs", description="stdlib-docs, stdlib-text, a file, a folder, or a Hub id")
    method: str = Field("lora", description="a method with its options, such as lora[rank=16], or a sum of methods")

    task: str | None = Field(None, description="classification, pairs, causal, seq2seq or images; default: guessed")
    columns: dict[str, str] | None = Field(
        None, description="role to column, as text=title,label=topic, or to a template with {columns}"
    )
    test: str | None = Field(None, description="a file with the test rows, where the data does not hold them")
    limit: Whole | None = Field(None, description="most training examples")
    limit_per_class: Whole | None = Field(None, description="most training examples of each class")
    test_limit: Whole | None = Field(None, description="most test examples")
    validation: float = Field(0.1, ge=0, lt=1, description="fraction of the training rows that rates are chosen on")
    data_seed: int = Field(0, description="decides splits and limits")
    max_length: Whole = Field(256, description="most tokens of an example")
    target_length: Whole | None = Field(None, description="most tokens of a target; default: max_length")
    score: Literal["rouge-l", "exact match", "last number"] | None = Field(
        None, description="of what the model writes for the test prompts; default: right tokens after true ones"
    )
    beams: Whole = Field(1, description="beams of the search when the model writes")

    steps: Whole | None = Field(None, description="optimizer steps; default: from epochs")
    epochs: Positive | None = Field(None, description="passes over the training data; default: 3")
    batch_size: Whole = 32
    group_by_length: bool = Field(False, description="batches of examples of like length: less padding")
    packing: bool = Field(False, description="causal: short examples side by side in one row, without padding")
    rates: list[Positive] | None = Field(
        None, description="learning rates to try; default: factors of the method's own"
    )
    factors: list[Positive] = Field([1.0], min_length=1, description="multiples of the method's own rate to try")
    tried: bool = Field(False, description="multiples of all rates that the method's own was chosen from")
    search: Literal["grid", "halving"] = Field("grid", description="halving gives bad rates up early (optuna)")
    searched_on: int | None = Field(None, ge=0, description="seed whose run chooses the rate for this one")
    chosen_rate: Positive | None = Field(None, description="the rate that the run of that seed chose")
    head_rate: Positive | None = Field(None, description="rate of a fresh head; default: that of the method")
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.06, ge=0, lt=1, description="fraction of the steps in which the rate rises")
    decay: Literal["linear", "cosine"] = Field("linear", description="how the rate falls to 0 after that")
    clip: Positive = Field(1.0, description="largest norm of the gradient")
    seed: int = Field(0, ge=0, description="decides the head, the adapter, the order of the data and dropout")

    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the base weights")
    quantize: Form | None = Field(
        None, description="nf4, fp4 or int8 (bitsandbytes), int8wo or int4wo (torchao): of linear layers in the blocks"
    )
    double_quantization: bool = Field(True, description="quantize the scales of nf4 and fp4 too")
    bfloat16: bool = Field(False, description="compute in bfloat16 by autocast")
    gradient_checkpointing: Checkpointing = Field(
        False, description="compute activations again in the backward pass: block (or true), selective or offload"
    )
    compile: bool = Field(False, description="compile each block with torch.compile")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    threads: Whole | None = Field(None, description="threads of the processor; default: torch's choice")
    curve_points: Whole = Field(10, description="validation scores taken during training")
    ranks: bool = Field(True, description="measure the rank of the change, where it takes seconds")
    forgetting: str | None = Field(
        None, description="text to measure forgetting on, as data, or none; default: stdlib-text for language models"
    )
    out: str | None = Field(None, description="folder for adapter, record and model card")

    @model_validator(mode="before")
    @classmethod
    def _embedded(cls, values: Any) -> Any:
        """Without a model, text is continued by the decoder that comes with the package."""
        if not isinstance(values, dict) or "model" in values:
            return values
        writes = values.get("task") == "causal" or values.get("data") == "stdlib-text"
        return {**values, "model": "tiny-lm"} if writes else values

    @field_validator("rates", "factors", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        return [value] if isinstance(value, int | float) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _paired(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",")]
        if not all(role.strip() and column.strip() for role, _, column in pairs):
            raise ValueError("write it as text=title,label=topic")
        return {role.strip(): column.strip() for role, _, column in pairs}

    @field_validator("rates")
    @classmethod
    def _some(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not value:
            raise ValueError("give at least one rate")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs both say how long to train: give one of them")
        return self

    @model_validator(mode="after")
    def _another_search(self) -> Recipe:
        if self.search == "halving" and self.curve_points < 2:
            raise ValueError("search=halving compares scores during training: give curve_points of at least 2")
        if self.searched_on == self.seed:
            raise ValueError(f"searched_on={self.seed} is the seed of this run, which searches itself: leave it out")
        if self.chosen_rate is not None and self.searched_on is None:
            raise ValueError("chosen_rate comes from the run of another seed: add searched_on, or give rates")
        return self

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantized."""
        return None if self.quantize is None else Quantization(self.quantize, self.double_quantization)

    def config(self) -> Config:
        """The configuration of the method. Raises UserError for an unknown method or option."""
        return configure(self.method)

    def tried_rates(self, config: Config) -> list[float]:
        """The learning rates of the search, ascending."""
        if self.rates is not None:
            return sorted(set(self.rates))
        # a method that is made of others has a rate of its own; several methods take that of the slowest
        decides = config if config.name else min(config.parts(), key=lambda part: part.learning_rate)
        if self.tried:
            own = {decides.learning_rate, *decides.tried}
        # what trains the head alone is held to the rate that every other method trains it with
        elif self.head_rate and decides.targets == "head":
            own = {self.head_rate}
        else:
            own = {decides.learning_rate}
        return sorted({rate * factor for rate in own for factor in self.factors})

    def trained_rates(self, config: Config) -> list[float]:
        """The learning rates that this run trains: all that are tried, or the one that another seed's run chose.

        Raises UserError where that rate is missing or is not one of those tried.
        """
        tried = self.tried_rates(config)
        if self.searched_on is None:
            return tried
        if self.chosen_rate is None:
            raise UserError(f"the rate is chosen by the run of seed {self.searched_on}: give it as chosen_rate")
        if not any(math.isclose(self.chosen_rate, rate) for rate in tried):
            listed = ", ".join(f"{rate:g}" for rate in tried)
            raise UserError(f"chosen_rate={self.chosen_rate:g} is not among the rates tried: {listed}")
        return [self.chosen_rate]


def parse_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A checked recipe. Raises UserError that names the wrong key with the nearest right one, or the wrong value."""
    return parse(Recipe, values, source)


def parse(kind: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """Settings of any kind, checked as a recipe is; ``source`` is what errors call the place they come from."""
    for key in values:
        if key not in kind.model_fields:
            raise UserError(f"{source} has no key {key!r}: {nearest(str(key), kind.model_fields)}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if place and not isinstance(first["input"], Mapping) else ""
        raise UserError(f"{source}: {place + ': ' if place else ''}{reason[:1].lower()}{reason[1:]}{given}") from None


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["rates=[1e-3]", "steps=10"]`` as values, each read as YAML. Raises UserError for a word without '='."""
    import yaml

    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{word!r} is not a setting: write it as key=value, such as steps=100")
        try:
            # a list of pairs such as columns=text=title,label=topic is left to the recipe
            values[key.strip()] = yaml.safe_load(text) if key.strip() != "method" else text
        except yaml.YAMLError:
            values[key.strip()] = text
    return values


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with ``key=value`` words in place of its own values.

    Raises:
        UserError: the file is missing, is not YAML (names the line), or holds a wrong key or value.
    """
    source = f"the recipe {str(path)!r}"
    return parse_recipe(read_settings(path, source) | parse_overrides(overrides), source)


def read_settings(path: str | Path, source: str) -> dict[str, Any]:
    """The lines of a YAML file, unchecked. Raises UserError where it is missing or holds something else."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else "it is not a text file"
        raise UserError(f"{source} cannot be read: {reason.lower() or error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{source} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{source} must hold lines such as 'model: minilm', not a {type(values).__name__}")
    return values or {}
