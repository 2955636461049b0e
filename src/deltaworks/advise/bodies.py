"""Models on the meta device, built from their configuration alone, and batches for them: no weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaworks.core.errors import UserError, nearest
from deltaworks.train import models
from deltaworks.train.columns import ROLES
from deltaworks.train.pooled import PooledClassifier

TASKS = ("classification", "causal", "seq2seq", "images", "pairs")  # the first that fits is taken


@dataclass
class Body:
    """A model without values: ``head`` names the modules that are fresh for the task, as in ``Loaded``."""

    model: nn.Module
    task: str
    name: str
    head: list[str]


def build(source: str | Path, task: str | None, labels: int, dtype: str) -> Body:
    """The model on the meta device, for a task (default: what its configuration says it was trained for).

    ``source`` is what ``load_model`` takes, or a file config.json. Raises UserError where it is not known, or cannot
    do the task.
    """
    source = str(source)
    if task is not None and task not in ROLES:
        raise UserError(f"the task {task!r} is not known; {nearest(task, ROLES)}")
    if dtype not in models.DTYPES:
        raise UserError(f"the dtype {dtype!r} is not known; {nearest(dtype, models.DTYPES)}")
    names = [str(label) for label in range(labels)]
    with models._quiet(), torch.device("meta"):
        if source == "tiny-vit":
            wanted = models._Wanted(task or "images", names, models.DTYPES[dtype])
            loaded = models._tiny_vit(wanted, None)
            return Body(loaded.model.train(), "images", "tiny-vit", loaded.head)
        module, colon, function = source.partition(":")
        if colon and module.replace(".", "").isidentifier() and function.isidentifier():
            loaded = models._from_function(source, module, function, models.DTYPES[dtype])
            model = loaded.model.to("meta")
            return Body(model.train(), task or task_of(model, source), source, [])
        config, folder, name = find_config(source)
        if (
            folder is not None
            and (folder / "modules.json").is_file()
            and (task or TASKS[0]) in ("classification", "pairs")
        ):
            return sentence_encoder(config, folder, task or TASKS[0], name, names, dtype)
        return from_config(config, task, name, names, dtype)


def find_config(source: str) -> tuple[Any, Path | None, str]:
    """A model's configuration, the folder it lies in (None for the Hub), and the model's name."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if source == "minilm":
        folder, version = models._minilm_folder()
        path, name = folder, f"all-MiniLM-L6-v2 ({models.MINILM_PACKAGE} {version})"
    elif source == "tiny-lm":
        path, name = models.TINY_LM, source
    elif path.is_file():
        name = f"{path.resolve().parent.name}/{path.name}"
    elif path.is_dir():
        name = path.resolve().name
        if not (path / "config.json").is_file():
            raise UserError(f"the folder {source} holds no config.json; give a folder written by save_pretrained")
    else:
        return on_hub(source), None, source
    if path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"the file {source} is no configuration of a model ({error})") from None
    config = models.explained(name, AutoConfig.from_pretrained, str(path))
    return config, path if path.is_dir() else path.parent, name


def on_hub(source: str) -> Any:
    """The configuration of a model on the Hub: its only file that is read."""
    from transformers import AutoConfig

    from deltaworks.store.hub import HUB_ID, hub_is_reachable
    from deltaworks.train.hub import cached_model

    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise UserError(f"the model folder {source} does not exist; check the path")
    hint = nearest(source, models.BUILT_IN)
    if "/" not in source and hint.startswith("did you mean"):
        raise UserError(f"the model {source!r} is not known; {hint}")
    if hub_is_reachable():
        return models.explained(source, AutoConfig.from_pretrained, source)
    if (folder := cached_model(source)) is None:
        raise UserError(
            f"the model {source!r} is no local folder, and the Hugging Face Hub cannot be reached from here and has no "
            f"cached copy of it; give a folder or a config.json, or one of {', '.join(models.BUILT_IN)}"
        )
    return models.explained(source, AutoConfig.from_pretrained, str(folder))


def from_config(config: Any, task: str | None, name: str, labels: list[str], dtype: str) -> Body:
    import transformers

    autos = {key: getattr(transformers, each) for key, each in models.AUTO_CLASSES.items()}
    able = [each for each in TASKS if type(config) in autos[each]._model_mapping]
    if task is None:
        trained_for = " ".join(getattr(config, "architectures", None) or [])
        words = {"causal": "CausalLM LMHeadModel", "seq2seq": "ConditionalGeneration", "images": "ImageClassification"}
        said = (key for key, ends in words.items() if key in able and any(end in trained_for for end in ends.split()))
        # a configuration alone may not say it: then what has a decoder writes, and what fills gaps classifies
        fills = trained_for or type(config) in transformers.AutoModelForMaskedLM._model_mapping
        writes = [] if fills else [each for each in ("seq2seq", "causal") if each in able]
        task = next(said, next(iter(writes + able), None))
    if task not in able:
        raise UserError(
            f"{name} is a model of the family {config.model_type!r}, which cannot do the task {task!r}; "
            f"{'it can do ' + ', '.join(able) if able else 'choose another model'}"
        )
    if task in models.LABELLED:
        vars(config).update(models._label_maps(labels))
    if getattr(config, "use_cache", False):
        config.use_cache = False
    for token in ("pad_token_id", "decoder_start_token_id"):  # which the tokenizer gives in training
        if getattr(config, token, None) is None:
            setattr(config, token, 0)
    model = models.explained(name, autos[task].from_config, config, dtype=models.DTYPES[dtype])
    return Body(model.train(), task, name, fresh_head(model) if task in models.LABELLED else [])


def fresh_head(model: Any) -> list[str]:
    """The modules with parameters of a classifier that are not in its pretrained trunk."""
    trunk = getattr(model, "base_model_prefix", "")
    own = (name.rpartition(".")[0] for name, _ in model.named_parameters() if name.partition(".")[0] != trunk)
    return sorted(dict.fromkeys(own))


def sentence_encoder(config: Any, folder: Path, task: str, name: str, labels: list[str], dtype: str) -> Body:
    from transformers import AutoModel

    without_pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta") else {}
    encoder = models.explained(name, AutoModel.from_config, config, dtype=models.DTYPES[dtype], **without_pooler)
    model = PooledClassifier(encoder, len(labels), models._pooling(folder))
    return Body(model.train(), task, name, ["classifier"])


def task_of(model: Any, source: str) -> str:
    """What a model of the user's own does, from its class."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    if "CausalLM" in name or "LMHead" in name:
        return "causal"
    if "ImageClassification" in name:
        return "images"
    if "SequenceClassification" in name:
        return "classification"
    raise UserError(f"what {source!r} is for cannot be seen from {name}: give --task")


def check_length(body: Body, length: int) -> None:
    """Raises UserError for a length that the model has no positions for."""
    config = getattr(body.model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") and most:
        most -= 2  # its positions begin behind the padding index
    if (
        body.task != "images"
        and isinstance(most, int)
        and 0 < most < length
        and not hasattr(config, "relative_attention_num_buckets")
    ):
        raise UserError(
            f"{body.name} has {most} positions, so no input is {length} tokens long: give --length {most} or less"
        )


def batch_for(body: Body, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of full rows on the meta device, under the names that the tasks give them."""
    config: Any = getattr(body.model, "config", None)
    whole: dict[str, Any] = {"dtype": torch.long, "device": "meta"}
    if body.task == "images":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.empty(rows, getattr(config, "num_channels", 3), height, width, device="meta")
        return {"pixel_values": pixels, "labels": torch.empty(rows, **whole)}
    batch = {name: torch.empty(rows, length, **whole) for name in ("input_ids", "attention_mask")}
    if body.task in ("classification", "pairs") and getattr(config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.empty(rows, length, **whole)
    shape = (rows,) if body.task in ("classification", "pairs") else (rows, length)
    return batch | {"labels": torch.empty(shape, **whole)}
