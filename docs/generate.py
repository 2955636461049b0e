"""The pages that are made from the code: methods from the registry, commands, recipes; run by mkdocs-gen-files."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from deltaworks.cli import app
from deltaworks.compare.wording import show_bytes, show_count
from deltaworks.core.abilities import Ability, abilities
from deltaworks.core.registry import Config, registry
from deltaworks.listing import FORMS, markdown
from deltaworks.store import foreign
from deltaworks.store.foreign.peft_table import TYPES
from deltaworks.store.foreign.peft_types import Type
from deltaworks.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = {"banking77": "banking77, all-MiniLM-L6-v2", "e2e_nlg": "e2e_nlg, a small decoder"}
DOES = {"merge": "merges into the weights", "rows": "another adapter for each row of a batch"}


# ---- methods --------------------------------------------------------------------------------------------


def method_pages() -> dict[str, str]:
    """Path -> text: an overview, and a page for each family."""
    found, configs = abilities(), registry()
    families: dict[str, list[Ability]] = defaultdict(list)
    for each in found:
        families[each.family].append(each)
    pages = {page_of(family): family_page(family, members, configs) for family, members in families.items()}
    return {"methods/index.md": overview(found), **pages}


def page_of(family: str) -> str:
    return f"methods/{family.replace('/', '-')}.md"


def overview(found: Sequence[Ability]) -> str:
    """The table of all methods, each linked to its family's page."""
    table = markdown(list(found))
    for each in found:
        link = f"[`{each.name}`]({Path(page_of(each.family)).name}#{each.name})"
        table = table.replace(f"| `{each.name}` |", f"| {link} |")
    return (
        "---\nhide: [toc]\n---\n\n"  # room for the table
        "# Methods\n\n"
        f"{len(found)} methods, by family. Form: what the method gives, strongest first (1 low-rank factors, 2 a "
        "weight, 3 an operation); a stronger form implies the weaker ones. Rows: another adapter for each row of one "
        "batch. At step 0: whether the output of the model is unchanged when the adapter is attached.\n\n"
        "`deltaworks methods` prints the same in a terminal, `deltaworks methods --json` with every option.\n\n"
        f"{cited(table)}\n"
    )


def family_page(family: str, members: Sequence[Ability], configs: dict[str, type[Config]]) -> str:
    """One family: for each file of it the paper, the formula and the counts; for each method what it can do."""
    modules: dict[str, list[Ability]] = defaultdict(list)
    for each in members:
        modules[configs[each.name].__module__].append(each)
    parts = [f"# {family}\n"]
    for module, twins in modules.items():
        header = inspect.getdoc(inspect.getmodule(configs[twins[0].name])) or ""
        for each in twins:
            parts.append(f"## {each.name} {{ #{each.name} }}\n")
            if each is twins[0]:
                parts.append(header_section(header, module))
            else:
                parts.append(f"From the same paper and file as [`{twins[0].name}`](#{twins[0].name}).\n")
            parts += [facts_table(each, configs[each.name]), options_table(configs[each.name]), scores_table(each.name)]
    return "\n".join(part for part in parts if part)


def header_section(header: str, module: str) -> str:
    """The docstring of a method file: its title, its paper, the formula as it stands, counts and departures."""
    title, _, rest = header.partition("\n")
    labels = r"Paper|Formula|Count|Departure"
    pieces = re.split(rf"^({labels})s?:", rest.strip(), flags=re.MULTILINE)
    told = {"": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}
    lines = [title, ""]
    for label, text in told.items():
        if not text.strip():
            continue
        if label == "Formula":
            lines += ["```text", unwrapped(textwrap.dedent("         " + text.strip("\n")).strip()), "```", ""]
        else:
            words = linked(" ".join(text.split()))
            lines += [f"**{label}.** {words[:1].upper()}{words[1:]}" if label else words, ""]
    source = f"src/{module.replace('.', '/')}.py"
    return "\n".join([*lines, f"Source: `{source}`\n"])


def unwrapped(text: str) -> str:
    """A line of the file that ends within a sentence goes on; the page breaks it at its own width."""
    return re.sub(r"(?<![.;:])\n(?=\S)", " ", text)


def linked(text: str) -> str:
    """With ``cited``; what Markdown would read as marks is escaped outside of code."""
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", text)
    pieces[::2] = [re.sub(r"([*_<>{}\[\]|])", r"\\\1", piece) for piece in pieces[::2]]
    return cited("".join(pieces))


def cited(text: str) -> str:
    """arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", text)


def facts_table(each: Ability, config: type[Config]) -> str:
    """What a method is and can do, with the reason where it cannot."""
    limits = {"merge": each.merge, "rows": each.rows}
    rows = {
        "form": "none" if each.form is None else f"{each.form}, {FORMS[each.form]}",
        "stands around": ", ".join(config.kinds) or "what its parts stand around",
        **{DOES[key]: "yes" if reason is None else f"no: {linked(general(reason))}" for key, reason in limits.items()},
        "at step 0": "the model's output is unchanged" if each.identity else "the model's output changes",
        "learning rate": f"{each.learning_rate:g}"
        + (f", the best of {', '.join(f'{rate:g}' for rate in sorted(config.tried))}" if config.tried else ""),
        **{f"limit: {key}": linked(text) for key, text in each.limits.items()},
    }
    return table(("", ""), rows.items())


def general(reason: str) -> str:
    """A reason without the path in the model that it was found on."""
    return re.sub(r" \([\w.]+\)", "", reason)


def options_table(config: type[Config]) -> str:
    """Every field of the configuration with its default, its bounds and its meaning."""
    rows = []
    for field in dataclasses.fields(config):
        if not field.init or field.default is dataclasses.MISSING:
            continue
        least, most = field.metadata.get("least"), field.metadata.get("most")
        words = [str(choice) for choice in field.metadata.get("choices") or ()]
        bounds = f"from {least:g}" if least is not None else ""
        bounds += f"{' ' if bounds else ''}to {most:g}" if most is not None else ""
        allowed = bounds or ", ".join(f"`{word}`" for word in words)
        default = (
            str(field.default).lower() if field.default is None or isinstance(field.default, bool) else field.default
        )
        rows.append((f"`{field.name}`", f"`{default}`", allowed, linked(field.metadata.get("help", ""))))
    return table(("option", "default", "allowed", "meaning"), rows)


def scores_table(name: str) -> str:
    """What it reached in the repository's own benchmarks, where it was run."""
    rows = []
    for file, task in TASKS.items():
        for run in json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8")):
            if run["method"].partition("[")[0] != name or run["status"] != "finished":
                continue
            seeds = len(run["scores"])
            rows.append((
                task,
                f"`{run['method']}`",
                f"{100 * run['score']:.1f} % {run['metric']}" + (f" ({seeds} seeds)" if seeds > 1 else ""),
                f"{run['rate']:g}",
                show_count(run["trainable"]),
                show_bytes(run["stored_bytes"]),
            ))  # fmt: skip
    if not rows:
        return ""
    titles = ("measured on", "method", "test score", "rate", "trainable", "stored")
    return table(titles, rows)


# ---- commands and recipes -------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options, from the command line itself."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line\n",
        "A user's mistake is one line on standard error and status 2; an interruption is status 130. `KEY=VALUE` "
        "arguments are settings of a [recipe](recipes.md).\n",
    ]
    for name, command in group.commands.items():
        parameters = [each for each in command.params if each.name != "help"]
        words = [named(each) for each in parameters if each.param_type_name == "argument"]
        options = ["[OPTIONS]"] if len(words) < len(parameters) else []
        usage = " ".join(["deltaworks", name, *options, *words])
        example = (command.epilog or "").removeprefix("Example: ")
        parts.append(f"## deltaworks {name}\n\n{command.help}\n\n```text\n{usage}\n```\n")
        parts.append(table(("", "", "default"), map(parameter_row, parameters)))
        parts.append(f"Example: `{example}`\n")
    return "\n".join(parts)


def named(parameter: Any) -> str:
    """A parameter as it is typed."""
    if parameter.param_type_name == "option":
        return ", ".join(parameter.opts)
    word = parameter.metavar or parameter.name.upper()
    return word if parameter.required or word.startswith("[") else f"[{word}]"


def parameter_row(parameter: Any) -> tuple[str, str, str]:
    default = "" if parameter.default in (None, False, ()) else f"`{parameter.default}`"
    return f"`{named(parameter)}`", linked(parameter.help or ""), "required" if parameter.required else default


def recipes_page() -> str:
    """Every key of a recipe, from the model that checks it."""
    rows = []
    for name, field in Recipe.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append((f"`{name}`", default, linked(field.description or "")))
    return (
        "# Recipes\n\n"
        "A recipe is a flat YAML file: everything that decides one training run. `deltaworks tune recipe.yaml "
        "key=value` takes other values for this run; a wrong key is an error that names the nearest right one. "
        "Lengths are in tokens, sizes in examples, rates are learning rates of AdamW.\n\n"
        + table(("key", "default", "meaning"), rows)
    )


def formats_page() -> str:
    """The formats of other libraries, and the types of peft beside our methods."""
    parts = [
        "# Formats\n",
        "`delta.save(folder, format=...)` and `deltaworks export` write them; `dw.load` recognises those it reads. "
        "Ours, `deltaworks`, is one safetensors file and `adapter.json`.\n",
    ]
    for name in foreign.FORMATS:
        module = import_module(f"deltaworks.store.foreign.{name}")
        does = [word for word, function in (("read", "read"), ("written", "write")) if hasattr(module, function)]
        text = linked(" ".join((inspect.getdoc(module) or "").split()))
        parts.append(f"## {name} {{ #{name} }}\n\n{' and '.join(does).capitalize()}. {text}\n")
        if name == "peft":
            parts.append(
                table(
                    ("type of peft", "method", "its field: our option", "at", "acts in training alone"),
                    map(type_row, TYPES),
                )
            )
    return "\n".join(parts)


def type_row(row: Type) -> tuple[str, ...]:
    says = "".join(f", `{key}={value!r}`" for key, value in row.says.items()) + (", read alone" if row.made else "")
    fields = ", ".join(f"`{each.theirs}`: `{each.ours}`" for each in row.fields)
    family = Path(page_of(registry()[row.method].family)).name
    link = f"[`{row.method}`](../methods/{family}#{row.method})"
    return f"`{row.peft}`{says}", link, fields, ", ".join(row.names), ", ".join(f"`{name}`" for name in row.training)


def examples_page() -> str:
    """What each file of examples/ says of itself."""
    parts = ["# Examples\n", "Files of `examples/`; each runs in a checkout as its head says.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        parts.append(f"## {path.name}\n\n{told}\n")
    return "\n".join(parts)


def contributing_page() -> str:
    """CONTRIBUTING.md, its links to files of the repository as plain names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"`\1`", text)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(titles), " | ".join("---" for _ in titles), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def pages() -> dict[str, str]:
    """Path below docs/ -> text of every generated page."""
    return {
        **method_pages(),
        "reference/commands.md": commands_page(),
        "reference/formats.md": formats_page(),
        "reference/recipes.md": recipes_page(),
        "guides/examples.md": examples_page(),
        "contributing.md": contributing_page(),
    }


def build() -> None:
    """Hand the pages to mkdocs, and the families to its navigation."""
    import mkdocs_gen_files

    made = pages()
    for path, text in made.items():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)
    families = [path for path in made if path.startswith("methods/") and not path.endswith("index.md")]
    for entry in mkdocs_gen_files.FilesEditor.current().config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *families]


if __name__ == "<run_path>":  # by mkdocs-gen-files
    build()
