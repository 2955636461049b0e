"""The model card of an adapter: front matter that the Hub indexes, facts, configuration, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from deltaworks.core.registry import Config, as_data
from deltaworks.store.hub import hub_id
from deltaworks.store.records import versions

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from deltaworks.core.delta import Delta


def card(
    config: Config,
    base: str,
    facts: Mapping[str, str],
    loading: str,
    *,
    base_id: str | None = None,
    datasets: Sequence[str] = (),
    pipeline: str | None = None,
    scores: Sequence[EvalResult] = (),
    library: str = "deltaworks",
) -> str:
    """A model card in Markdown.

    ``facts`` are the rows of its table, ``loading`` is Python that ends with the adapter attached. ``base_id`` and
    ``datasets`` are ids on the Hub, by which it lists the adapter beside them; ``pipeline`` is a task of the Hub, as
    "text-classification"; ``scores`` are its measured results; ``library`` can load its files.
    """
    from huggingface_hub import ModelCardData

    title = f"{config} on {base}"
    front = ModelCardData(
        library_name=library,
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        datasets=list(datasets) or None,
        pipeline_tag=pipeline,
        tags=["deltaworks", "peft", *dict.fromkeys(part.name for part in config.parts())],
        model_name=title if scores else None,
        eval_results=list(scores) or None,
    )
    table = "\n".join(f"| {key} | {_cell(text)} |" for key, text in facts.items())
    options = yaml.safe_dump(as_data(config), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{front.to_yaml()}\n---\n\n# {title}\n\n"
        f"An adapter made with deltaworks: {'; '.join(dict.fromkeys(part.paper for part in config.parts()))}.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## How to load it\n\n```python\n{loading}```\n\n"
        f"## Configuration\n\n```yaml\n{options}```\n"
    )


def card_of_delta(delta: Delta, place: str, library: str = "deltaworks") -> str:
    """The card of an adapter in memory, to be loaded from ``place``, a folder or an id on the Hub.

    ``library`` is the one in whose format it was saved.
    """
    from deltaworks.core.report import report

    counts = report(delta)
    source = str(getattr(getattr(delta.model, "config", None), "_name_or_path", ""))
    base_id = hub_id(source)
    kind = type(delta.model).__name__
    found = base_id is not None and _is_of_transformers(delta.model)
    build = f'{kind}.from_pretrained("{base_id}")' if found else "...  # the base that the adapter was trained on"
    imports = f"from transformers import {kind}\n" if found else ""
    facts = {
        "method": f"`{delta.config}`",
        "base": f"{base_id or kind}, {counts.total:,} parameters",
        "trained": f"{counts.trainable:,} values" + (f", {', '.join(delta.also)} in full" if delta.also else ""),
        "stored": f"{counts.stored_bytes:,} bytes",
        "format": f"that of {library}",
        "versions": listed(versions()),
    }
    loading = f'import deltaworks as dw\n{imports}\nmodel = {build}\ndelta = dw.load(model, "{place}")\n'
    return card(delta.config, base_id or kind, facts, loading, base_id=base_id, library=library)


def listed(versions: Mapping[str, str]) -> str:
    """Versions as one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _is_of_transformers(model: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and type(model).__module__.startswith("transformers.")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
