"""An adapter as the configuration and the tensors of a peft checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError
from deltaworks.core.rows import Rows
from deltaworks.store.foreign import lost, targets
from deltaworks.store.foreign.lowering import Lowered, check_base, effective_of, lowered, method_items
from deltaworks.store.foreign.peft_matrices import stacked
from deltaworks.store.foreign.peft_slots import TOKENS, slots
from deltaworks.store.foreign.peft_table import LORA, TYPES
from deltaworks.store.foreign.peft_types import Spot, Type

if TYPE_CHECKING:
    from deltaworks.core.building import Attached
    from deltaworks.core.delta import Delta

VERSION = "0.21.2"
"""The version of peft whose format is written."""
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass
class Written:
    """What a row says of an adapter: fields, tensors, adapted modules, and the biases [out] that changed."""

    row: Type
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    paths: list[str]
    biases: dict[str, Tensor]


def written(
    delta: Delta, rank: int | None = None, rows: Sequence[Type] = TYPES
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors: of a type among ``rows``, else as LoRA. Raises UserError for what cannot be said."""
    check_base(delta)
    names = targets.module_names(delta.model)
    row = None if rank is not None else native(_tuned(delta), rows)
    made = _as_lora(delta, rank, names) if row is None else _as_itself(delta, row, names)
    row, tensors = made.row, made.tensors
    config = getattr(delta.model, "config", None)
    data: dict[str, Any] = {"peft_type": row.peft, "peft_version": VERSION, "inference_mode": True, **made.fields}
    data["base_model_name_or_path"] = getattr(config, "_name_or_path", None) or None
    data |= _bias_fields(delta, row, made.biases, set(made.paths), tensors)
    data |= _saved_fields(delta, row, tensors)
    data["task_type"] = _task(delta.model, row, data.get("modules_to_save", []))
    if not row.whole and any(type(delta.model.get_submodule(path)).__name__ == "Conv1D" for path in made.paths):
        data["fan_in_fan_out"] = True
    return data, {key: value.float() if value.dtype == torch.float64 else value for key, value in tensors.items()}


def _tuned(delta: Delta) -> list[Attached]:
    """The tuners of the methods but for those that train biases, which every type says in its own field."""
    return [item for item in method_items(delta) if item.tuner.config.name != "bitfit"]


def _as_lora(delta: Delta, rank: int | None, names: Sequence[str]) -> Written:
    """As LoRA: its own factors, or cut to a rank."""
    whole = lowered(delta, rank, LORA.names)
    if rank is not None:
        lost(whole.loss(rank))
    weights, parameters = stacked(delta, whole.weights)
    paths = [name for name in weights if name in names]
    fields, tensors = lora_file(weights)
    fields |= {"target_modules": targets.ends(paths, names)}
    fields |= {"target_parameters": parameters} if parameters else {}
    return Written(LORA, fields, tensors, paths, whole.biases)


def _as_itself(delta: Delta, row: Type, names: Sequence[str]) -> Written:
    """As the type that the row is for."""
    items = _tuned(delta)
    paths = [item.place.path for item in items]
    chosen = {} if row.whole else {"target_modules": targets.ends(paths, names)}
    fields = chosen | _fields(row, items, delta.seed) | row.written(items, chosen.get("target_modules"))
    others = [item.tuner for item in method_items(delta) if item not in items]
    biases = {tuner.place.path: effective_of(delta, [tuner])["bias"] for tuner in others}
    return Written(row, fields, _tensors(delta, row), paths, biases)


def _saved_fields(delta: Delta, row: Type, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Adds what is trained beside the methods to the tensors, and says its modules and rows."""
    paths, own, rows = _saved(delta, row.prefix)
    if rows and row is not LORA:
        raise UserError(f"peft's {row.peft} trains no rows of an embedding: only LORA does")
    tensors |= own
    fields: dict[str, Any] = {"modules_to_save": _outermost(delta.model, paths)} if paths else {}
    return fields | ({"trainable_token_indices": rows} if rows else {})


def native(items: Sequence[Attached], rows: Sequence[Type] = TYPES) -> Type | None:
    """The row that says this adapter as it is, or None."""
    configs = list({id(item.tuner.config): item.tuner.config for item in items}.values())
    paths = [item.place.path for item in items]
    if any(item.place.kind == "matrix" for item in items):
        return None
    if any(item.twins for item in items):  # peft would leave the other owners of a tied weight as they are
        return None
    if not items or len(set(paths)) < len(paths) or any(item.place.part is not None for item in items):
        return None
    for row in rows:
        if any(item.tuner.config.name != row.method or not row.holds(item.tuner) for item in items):
            continue
        if any(item.place.kind not in row.names for item in items):
            continue
        free = {own.ours for own in row.fields if own.pattern} | {"targets", *row.unsaid, *row.shaped}
        if all(_same(config, configs[0], free) for config in configs[1:]):
            return row
    return None


def _same(one: Any, other: Any, free: set[str]) -> bool:
    mine, theirs = one.options(), other.options()
    return all(mine[key] == theirs[key] for key in mine if key not in free)


def _fields(row: Type, items: Sequence[Attached], seed: int) -> dict[str, Any]:
    """The fields of a row, and the patterns where modules differ."""
    first = items[0].tuner.config
    fields: dict[str, Any] = dict(row.says)
    for own in row.fields:
        fields[own.theirs] = own.write(getattr(first, own.ours))
        if own.pattern:
            values = {item.place.path: own.write(getattr(item.tuner.config, own.ours)) for item in items}
            fields[own.pattern] = {path: v for path, v in values.items() if v != fields[own.theirs]}
    if row.seed:
        fields[row.seed[0]] = seed
    for option in row.unsaid:
        if getattr(first, option) != getattr(type(first)(), option):
            lost(
                f"{option}={getattr(first, option)!r} acts in training alone and peft's {row.peft} has no field for it"
            )
    return fields


def _tensors(delta: Delta, row: Type) -> dict[str, Tensor]:
    """The tensors of the methods' own rows (biases and whole modules are added by their callers)."""
    found: dict[str, Tensor] = {}
    for slot in slots(delta, row):
        if slot.spot.tuner.config is not None and slot.spot.tuner.config.name == row.method:
            stored = slot.spot.tuner.stored()
            slot.into(found, stored[slot.name.ours] if slot.name.ours in stored else slot.current())
    return found


def _saved(delta: Delta, prefix: str) -> tuple[list[str], dict[str, Tensor], dict[str, list[int]]]:
    """What is trained beside the methods: modules, their tensors and those of rows, and the rows by module."""
    paths: list[str] = []
    tensors: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    stored = delta.tensors()
    for item in delta.attached:
        if item.member < len(delta.members):
            continue
        if isinstance(item.tuner, Rows):
            if f"{item.key}.rows" in stored:  # other owners of a tied weight follow
                rows[item.place.path] = item.tuner.index.tolist()
                tensors[f"{prefix}{item.place.path}{TOKENS}"] = item.tuner.rows.detach()
            continue
        own = {name.partition(".")[2]: value for name, value in item.tuner.stored().items()}
        paths += [place.path for place, _ in item.all]
        tensors |= {f"{prefix}{item.place.path}.{name}": value for name, value in own.items()}
        for twin in item.twins:  # peft parts tied modules that are saved
            tensors |= {f"{prefix}{twin.place.path}.{name}": own[there] for name, there in twin.names.items()}
    return paths, tensors, rows


def lora_file(weights: Mapping[str, Lowered]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and tensors of a LoRA with these factors; ranks and scales that differ become patterns."""
    ranks = {path: one.rank for path, one in weights.items()}
    alphas = {path: one.scale * one.rank for path, one in weights.items()}
    rank = max(ranks.values())
    alpha = next(alphas[path] for path in ranks if ranks[path] == rank)
    fields: dict[str, Any] = {own.theirs: own.default for own in LORA.fields}
    fields |= {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
    }
    return fields, {key: value for path, one in weights.items() for key, value in lora_tensors(path, one).items()}


def lora_tensors(path: str, one: Lowered) -> dict[str, Tensor]:
    """The two tensors of one weight."""
    named = {name.ours: name for name in LORA.names[one.place.kind] if name.ours in ("A", "B")}
    spot = Spot(None, one.module, one.place)
    return {
        name.theirs.format(path=f"{LORA.prefix}{one.path or path}"): value.reshape(
            [int(n or 0) for n in name.shape(tuple(value.shape), spot)]
        )
        for name, value in ((named["A"], one.A), (named["B"], one.B))
    }


def made_for_twins(delta: Delta) -> dict[str, Tensor]:
    """The LoRA that stands for each other owner of a tied weight."""
    found: dict[str, Tensor] = {}
    for item in method_items(delta):
        for twin in item.twins:
            if twin.gives("factors"):
                A, B, _ = twin.factors()
                module = delta.model.get_submodule(twin.place.path)
                found |= lora_tensors(twin.place.path, Lowered(twin.place, module, A.detach(), B.detach()))
    return found


def _bias_fields(
    delta: Delta, row: Type, biases: Mapping[str, Tensor], adapted: set[str], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Adds trained biases to the tensors; with ``bias="all"`` peft expects those that did not change, too."""
    if not biases:
        return {}
    if row.bias is None:
        raise UserError(
            f"peft's {row.peft} holds no trained biases: leave bitfit out, or give a rank to make it a LoRA"
        )
    if odd := [path for path in biases if delta.model.get_submodule(path)._parameters.get("bias") is None]:
        raise UserError(f"{odd[0]!r} has no bias in the base, and peft cannot add one")
    which = row.bias if biases.keys() <= adapted else "all"
    saved = {item.place.path for item in delta.attached if item.member >= len(delta.members)}
    for path in targets.module_names(delta.model):
        bias = delta.model.get_submodule(path)._parameters.get("bias")
        if bias is not None and path not in saved and (which == "all" or path in adapted):
            inner = ".base_layer" if path in adapted else ""
            tensors[f"{row.prefix}{path}{inner}.bias"] = biases.get(path, bias.detach())
    return {"bias": which}


def _outermost(model: nn.Module, saved: Sequence[str]) -> list[str]:
    """Modules that hold exactly the saved ones, as far out as that goes."""
    owners = [path for path in targets.module_names(model) if model.get_submodule(path)._parameters]
    names = list(saved)
    for path in saved:
        outer = path
        while "." in outer:
            above = outer.rpartition(".")[0]
            if not {own for own in owners if own.startswith(f"{above}.") or own == above} <= set(saved):
                break
            outer = above
        names = [name for name in names if not name.startswith(f"{outer}.")]
        names += [outer] * (outer not in names)
    return names


def _task(model: nn.Module, row: Type, saved: Sequence[str]) -> str | None:
    """The task, where peft would not add a head of its own to an adapter that holds none."""
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    heads = targets.HEADS.get(str(task), ())
    if heads and not row.whole and not any(name in saved for name in heads):
        return None
    return task
