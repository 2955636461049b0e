"""The documentation says what is true: its code runs, its printed output is what is printed, its pages are whole.

Of a page, blocks in ``python`` share one namespace, blocks in ``sh`` are commands of ``deltaworks`` and run with small
settings, a block with a ``title`` that is a file name is that file, and one called "prints" is what the block before it
printed. All run in one empty folder, with a stand-in for the Hub.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import scripts
from hub_server import serve
from typer.testing import CliRunner

from deltaworks.cli import app
from deltaworks.core.registry import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONTRIBUTING = "../CONTRIBUTING.md"
PAGES = [*sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")), CONTRIBUTING]
QUICK = ("index.md", "guides/adding-a-method.md", "coming-from-peft.md", "coming-from-adapters.md", CONTRIBUTING)
SMALL = ("steps=2", "epochs=null", "batch_size=4", "limit=60", "test_limit=12", "max_length=24", "curve_points=1")
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A fenced block of a page; ``line`` is where its first line stands."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found[1], found[2] or "", found[3], text[: found.start(3)].count("\n"))


def runs(page: str) -> bool:
    return any(block.language in ("python", "sh") for block in blocks(page))


def run(page: str, folder: Path) -> None:
    """Run every block of a page in order."""
    names: dict[str, object] = {"__name__": "docs"}
    printed = ""
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.title == "prints":
            assert printed.strip() == block.text.strip(), where
        elif "." in block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), names)
            printed = stream.getvalue()
        elif block.language == "sh":
            printed = "".join(command(line, where) for line in block.text.replace("\\\n", " ").splitlines() if line)


def command(line: str, where: str) -> str:
    """What a command prints; what it trains, it trains for two steps."""
    words = shlex.split(line, comments=True)
    assert words[0] == "deltaworks", f"{where}: {line!r} is not ours to run: write it as text"
    small = [word for word in SMALL if words[1] in ("tune", "compare")]
    result = CliRunner().invoke(app, [*words[1:], *small])
    assert result.exit_code == 0, f"{where}: {line}\n{result.output}\n{result.exception!r}"
    return result.output


@pytest.mark.parametrize(
    "page",
    [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES if runs(page)],
)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # methods that a page adds are gone after it
    monkeypatch.setattr("deltaworks.core.registry._registry", dict(registry()))
    with serve(str(tmp_path / "cache")):
        run(page, tmp_path)


def test_every_block_is_of_a_kind_that_runs_or_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "sh", "text", "yaml", "csv"), f"{page}:{block.line}"
            assert block.language != "yaml" or block.title or page == "protocols.md", f"{page}:{block.line}: which file"
            if block.language == "text":
                assert not block.text.startswith("deltaworks"), f"{page}:{block.line}: a command that could run"
            else:  # text is broken by the page
                assert max(map(len, block.text.splitlines())) <= 88, f"{page}:{block.line}: wider than the page"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return scripts.loaded(DOCS / "generate.py")


def test_a_page_of_methods_has_formula_count_options_abilities_and_scores(generate: ModuleType) -> None:
    from deltaworks.core.abilities import abilities

    page = generate.family_page("additive/scaling", abilities("additive/scaling"), registry())
    for piece in (
        "## ia3 {",
        "[arXiv:2205.05638](https://arxiv.org/abs/2205.05638)",
        "```text\n",
        "**Count.**",
        "| `targets` | `*attention.k,*attention.v,mlp.down` |",
        "| merges into the weights | yes |",
        "| banking77, all-MiniLM-L6-v2 | `ia3` | 84.5 % accuracy | 0.01 | 13.8 K | 178 kB |",
    ):
        assert piece in page


def test_a_formula_breaks_where_the_page_does_and_where_it_means_to(generate: ModuleType) -> None:
    from deltaworks.core.abilities import abilities

    page = generate.family_page("reparametrized/low-rank", abilities("reparametrized/low-rank"), registry())
    assert "; the loss gains gamma times the mean over all P and Q of ||P^T P - I||_F" in page
    assert "s = alpha / r (rsLoRA: alpha / sqrt(r)).\nDoRA: W' = m" in page


def test_every_command_and_option_is_in_the_reference(generate: ModuleType) -> None:
    page = generate.commands_page()
    for command in ("methods", "anatomy", "tune", "compare", "report", "plan", "advise", "info", "merge", "push"):
        assert f"## deltaworks {command}\n" in page
    for option in ("--protocol", "--quantize", "--adapters-served", "--private"):
        assert f"| `{option}` |" in page


def test_every_key_of_a_recipe_is_in_the_reference(generate: ModuleType) -> None:
    from deltaworks.train.recipe import Recipe

    page = generate.recipes_page()
    assert all(f"| `{key}` |" in page for key in Recipe.model_fields)
    assert r"a template with \{columns\}" in page  # unescaped braces at the end of a cell are attributes


def test_every_format_and_type_of_peft_is_in_the_reference(generate: ModuleType) -> None:
    page = generate.formats_page()
    assert all(f"## {name} {{" in page for name in ("peft", "diffusers", "vllm", "kohya"))
    assert (
        "| `LORA` | [`lora`](../methods/reparametrized-low-rank.md#lora) | `r`: `rank`, `lora_alpha`: `alpha`" in page
    )


def test_the_types_of_peft_that_the_page_names_are_those_that_are_held() -> None:
    from deltaworks.store.foreign.peft_table import TYPES

    page = (DOCS / "coming-from-peft.md").read_text(encoding="utf-8")
    told = page.partition("The types that are read")[2].partition("[The")[0]
    assert set(re.findall(r"\b[A-Z0-9_]{3,}\b", told)) == {each.peft for each in TYPES}


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))  # strict: a warning is an error
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]+src=\"?https?:|<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)[^>]+href=\"?https?:"
    )
    text = ""
    for page in tmp_path.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not loaded.search(html), page
        text += html
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?https?:", style.read_text(encoding="utf-8")), style
    assert all(f'id="{name}"' in text or f"id={name}" in text for name in registry())
