"""The record of one run: a JSON file that says everything a comparison needs, and nothing reads more."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from operator import mul
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from deltaworks.core.errors import UserError
from deltaworks.store.files import read_json, write_atomically

FORMAT = "deltaworks.record"
SCHEMA_VERSION = 1
PACKAGES = ("deltaworks", "torch", "transformers", "tokenizers", "safetensors", "numpy")

Status = Literal["finished", "diverged", "failed", "interrupted"]

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: non-finite numbers become None, array scalars numbers, the rest text.

    Mappings and sequences are walked; pydantic models are left to pydantic.
    """
    if value is None or isinstance(value, bool | int | str | BaseModel):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item())
    if hasattr(value, "isoformat"):
        return value
    return str(value)


class _Part(BaseModel):
    """What every part of a record shares: unknown fields are errors, NaN and infinities become None."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        return plain(data) if isinstance(data, dict) else data


class Counts(_Part):
    """Sizes of what a run trains and stores."""

    trainable: Count = Field(description="values the method trains, the head not counted")
    changed: Count = Field(description="values of the model that differ after merging, the head not counted")
    stored_bytes: Count = Field(description="bytes of the saved delta on disk")
    head: Count = Field(default=0, description="values of the head that is trained with every method")


class RankOfChange(_Part):
    """Numerical rank of the weight changes of one role."""

    median: Amount
    max: Amount


class ModelFacts(_Part):
    """The frozen model."""

    id: str
    parameters: Count


class DataFacts(_Part):
    """The data set."""

    name: str
    digest: str = Field(description="hash of the data in its order; equal digests may be compared")
    task: str
    labels: list[str] = Field(default_factory=list)
    sizes: dict[str, Count] = Field(default_factory=dict, description="examples by split")


class Trial(_Part):
    """One learning rate that was tried; the score is None where the run diverged."""

    rate: Rate
    score: float | None = Field(default=None, description="on validation rows, after the last step that was made")
    stopped_at: Count | None = Field(default=None, description="step at which the search gave it up; null: at none")


class CurvePoint(_Part):
    """One moment of training: the mean training loss since the last point, the validation score if taken."""

    step: Count
    loss: float | None = None
    validation: float | None = None


class Validation(_Part):
    """Scores on the validation split."""

    last: float | None = None
    best: float | None = None


class Score(_Part):
    """The score on the test split, read once with the final weights.

    Single test examples, in data order, are in ``correct`` where each is right or wrong, else in ``values`` and
    ``weights``: the score is the mean of the values weighted so, as the share of right tokens by the number of tokens.
    """

    metric: str = "accuracy"
    score: float | None = None
    higher_is_better: bool = True
    correct: str | None = Field(
        default=None,
        pattern=r"^[01]*$",
        description="1 for each test example answered right, in data order",
    )
    values: list[float] = Field(default_factory=list, description="score of each test example, where not 0 or 1")
    weights: list[Amount] = Field(default_factory=list, description="of the values; empty: all the same")

    @model_validator(mode="after")
    def _agrees(self) -> "Score":
        if self.weights and len(self.weights) != len(self.values):
            raise ValueError(f"{len(self.weights)} weights do not fit {len(self.values)} values")
        if self.values and self.score is not None:
            weights = self.weights or [1.0] * len(self.values)
            total = sum(weights)
            mean = sum(map(mul, self.values, weights)) / total if total else math.nan
            if not math.isclose(mean, self.score, rel_tol=1e-5, abs_tol=1e-5):
                raise ValueError(f"the score {self.score:g} is not the weighted mean of the values, {mean:g}")
        return self


class Record(_Part):
    """Everything one run leaves behind. Memory is in bytes, time in seconds, rates per second.

    ``details`` is what the method's procedure did, by names that begin with the method's and end with what is counted
    or with the unit (``_percent``, ``_bytes``, ``_seconds``). Each is of one of three kinds:

    - a number: ``"fish_samples": 1024``;
    - numbers by layer: ``"fish_entries": {"encoder.layer.0.output.dense.weight": 812, ...}``;
    - numbers by layer, stack or loss over time, at 40 steps at most, None where there was none yet:
      ``"adalora_rank": {"steps": [5, 10], "values": {"encoder.layer.0.output.dense": [12, 8], ...}}``.
    """

    format: Literal["deltaworks.record"] = "deltaworks.record"
    schema_version: Literal[1] = 1
    run_id: str = Field(default="", pattern=r"^([0-9A-Za-z][0-9A-Za-z_.-]{0,99})?$")
    status: Status
    message: str = ""

    method: str = Field(min_length=1, description="the spec, such as 'lora[rank=16]'")
    name: str = Field(default="", description="for people; the spec where empty")
    family: str = Field(default="", description="path in the taxonomy, such as 'reparametrized/low-rank'")
    paper: str = ""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    targets: str = ""
    sites: Count = 0

    counts: Counts
    rank: dict[str, RankOfChange] = Field(default_factory=dict, description="rank of the change by role")
    model: ModelFacts
    dtypes: dict[str, str] = Field(default_factory=dict, description="such as base, trained, compute")

    optimizer: str = ""
    learning_rates: list[Trial] = Field(default_factory=list)
    learning_rate: Rate | None = None
    learning_rate_split: str = Field(default="", description="the split the learning rate was chosen on")
    searched_on: int | None = Field(default=None, description="seed whose run chose the rate; null: this run did")
    steps: Count
    epochs: Amount | None = None
    batch_size: Annotated[int, Field(ge=1)]
    examples: Count = Field(default=0, description="training examples seen, repetitions counted")
    seed: int = 0

    curve: list[CurvePoint] = Field(default_factory=list)
    validation: Validation = Field(default_factory=Validation)
    test: Score | None = None

    peak_memory_bytes: Count | None = None
    peak_memory_includes: str = Field(default="", description="such as 'resident memory of the process'")
    process_peak_bytes: Count | None = Field(default=None, description="resident memory, libraries included")
    saved_activation_bytes: Count | None = None
    training_samples_per_second: Amount | None = None
    inference_samples_per_second: Amount | None = None
    training_tokens_per_second: Amount | None = None
    inference_tokens_per_second: Amount | None = None
    wall_seconds: Amount | None = None
    processor_seconds: Amount | None = Field(default=None, description="of all cores, in the process of the run")
    hardware: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    merge_error: Amount | None = Field(default=None, description="largest output difference after merging")
    forgetting: float | None = Field(
        default=None, description="rise of the mean loss, in nats per token, on text that was not trained on"
    )
    forgetting_text: str = Field(default="", description="that text, and how much of it was read")

    data: DataFacts
    started: AwareDatetime | None = None
    finished: AwareDatetime | None = None
    details: dict[str, JsonValue] = Field(default_factory=dict, description="what the procedure did: see above")

    @model_validator(mode="after")
    def _complete(self) -> "Record":
        if not self.name:
            self.name = self.method
        if not self.run_id:
            self.run_id = run_key(
                model=self.model.id,
                data_digest=self.data.digest,
                task=self.data.task,
                method=self.method,
                config=self.config,
                targets=self.targets,
                learning_rate=self.learning_rate,
                seed=self.seed,
                steps=self.steps,
                batch_size=self.batch_size,
                dtype=self.dtypes,
            )
        return self

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the record to ``folder/<run_id>.json``, atomically; a rerun of the same run replaces it.

        Raises:
            UserError: the file cannot be written.
            pydantic.ValidationError: a field was set to a value that a record cannot hold.
        """
        checked = type(self).model_validate(self.model_dump())
        path = Path(folder) / f"{checked.run_id}.json"
        text = json.dumps(checked.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, text + "\n")
        return path


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _canonical(value: Any) -> Any:
    """``value`` with 16.0 and 16 made the same, so that equal settings give equal keys."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def run_key(
    *,
    model: str,
    data_digest: str,
    method: str,
    config: Mapping[str, Any],
    learning_rate: float | None,
    seed: int,
    steps: int,
    batch_size: int,
    task: str,
    dtype: str | Mapping[str, str],
    targets: str = "",
) -> str:
    """The run id: 16 hexadecimal digits that are the same wherever and whenever the same run is made."""
    settings = {
        "model": model,
        "data": data_digest,
        "method": method,
        "config": plain(config),
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "task": task,
        "dtype": plain(dtype),
        "targets": targets,
    }
    text = json.dumps(_canonical(plain(settings)), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _parse(path: Path, content: dict[str, Any]) -> Record:
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"the record {str(path)!r} has schema version {version}, this deltaworks reads up to "
            f"{SCHEMA_VERSION}: update deltaworks"
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the record"
        raise UserError(f"the record {str(path)!r} is broken: {place}: {first['msg']}") from error


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record in one file. Raises UserError where it is missing, broken or newer than this library."""
    place = Path(path)
    content = read_json(place)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{str(place)!r} is not the record of a run")
    return _parse(place, content)


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """All records in ``folder``, ordered by method, seed and run id.

    Hidden files, other endings and JSON files that do not call themselves records are ignored.

    Raises:
        UserError: the folder is missing, or a record is broken or newer than this library; names the file.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"there are no records: {str(place)!r} is not a folder")
    records = []
    for path in sorted(place.glob("*.json")):
        if path.name.startswith(".") or not path.is_file():
            continue
        content = read_json(path)
        if isinstance(content, dict) and content.get("format") == FORMAT:
            records.append(_parse(path, content))
    return sorted(records, key=lambda record: (record.method, record.seed, record.run_id))
