"""The rules of the house, kept by reading the files: how long they are, what a method's header says, which way the
arrows between the packages point, and that nothing names somebody's home folder."""

import ast
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = "deltaworks"
METHODS = SOURCE / PACKAGE / "methods"

LONGEST = 400
LONGEST_METHOD = 150

# what each package may import beside itself; what is not named here (the command line, the front door) may all
BELOW: dict[str, set[str]] = {
    "core": set(),
    "methods": {"core"},
    "store": {"core"},
    "train": {"core", "store"},
    "compare": {"core", "store", "train"},
    "advise": {"core", "store", "train", "compare"},
}
# the front door to files: these functions of the handle fetch the formats when they are called
LAZY = (f"{PACKAGE}/core/delta.py", ("attach", "save", "push_to_hub"), f"{PACKAGE}.store")

YEAR = re.compile(r"(?<!arXiv:)\b(?:19|20)\d\d\b(?!\.\d)")
HOME = re.compile(r"(?<![\w.~/-])/(?:home|Users)/\w")


def assert_none(broken: Iterable[str]) -> None:
    """Fail with every rule that is broken, a line each."""
    report = "\n".join(broken)
    assert not report, report


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def sources(folder: Path = SOURCE) -> list[Path]:
    return sorted(path for path in files(folder) if path.suffix == ".py")


def files(folder: Path = ROOT) -> Iterator[Path]:
    """All files below a folder that git does not ignore."""
    ignored = [".git", *(line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines())]

    def kept(name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in ignored)

    for place, folders, names in os.walk(folder):
        folders[:] = filter(kept, folders)
        yield from (Path(place, name) for name in filter(kept, names))


# ---- sizes and headers ----------------------------------------------------------------------------------


def test_no_source_file_is_too_long() -> None:
    sizes = {named(path): lines_of(path) for path in sorted(files(SOURCE)) if path.suffix != ".safetensors"}
    assert_none(f"{name} has {size} lines" for name, size in sizes.items() if size > LONGEST)


def registers_a_method(tree: ast.Module) -> bool:
    return any(
        isinstance(call, ast.Call)
        and (getattr(call.func, "id", None) == "method" or getattr(call.func, "attr", None) == "method")
        for call in ast.walk(tree)
    )


def header_lacks(docstring: str) -> list[str]:
    """What the header of a method file does not tell."""
    told = {
        "the paper with its year": YEAR.search(docstring),
        "a line 'Formula'": re.search(r"^Formula\b", docstring, re.MULTILINE),
        "a line 'Count'": re.search(r"^Count\b", docstring, re.MULTILINE),
    }
    return [what for what, found in told.items() if not found]


def test_method_files_are_short_and_name_paper_formula_and_count() -> None:
    wrong = []
    for path in sources(METHODS):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "__init__.py" or not registers_a_method(tree):
            continue
        if lines_of(path) > LONGEST_METHOD:
            wrong.append(f"{named(path)} has {lines_of(path)} lines")
        wrong += [f"{named(path)} lacks {what}" for what in header_lacks(ast.get_docstring(tree) or "")]
    assert_none(wrong)


def test_a_year_is_not_the_number_of_a_paper() -> None:
    header = "A method.\n\nPaper: A Title, Someone et al., {}.\nFormula: W' = W.\nCount: none."
    assert header_lacks(header.format("2020, arXiv:2002.08307")) == []
    assert header_lacks(header.format("arXiv:2002.08307")) == ["the paper with its year"]


# ---- arrows ---------------------------------------------------------------------------------------------


def imports(node: ast.AST, folder: tuple[str, ...], function: str = "") -> Iterator[tuple[str, str]]:
    """(function that it stands in or "", dotted name) of every import below `node`, in a file of `folder`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((function, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = folder[: len(folder) + 1 - child.level] if child.level else ()
            module = ".".join([*above, *([child.module] if child.module else [])])
            yield from ((function, f"{module}.{alias.name}") for alias in child.names)
        else:
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from imports(child, folder, inner)


def arrows_up(name: str, text: str) -> list[str]:
    """The imports of the file `name` (relative to src) that its package may not make."""
    folder = tuple(name.split("/")[:-1])
    package = folder[1] if len(folder) > 1 else ""
    if package not in BELOW:
        return []
    tree = ast.parse(text)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    composes = "hybrid" in folder or "parts" in functions
    wrong = []
    for function, target in imports(tree, folder):
        top, _, rest = target.partition(".")
        to = rest.partition(".")[0]
        if top != PACKAGE or to in BELOW[package]:
            continue
        if name == LAZY[0] and function in LAZY[1] and target.startswith(LAZY[2] + "."):
            continue
        # a method may use what lies beside it; one that is made of others (a hybrid, or by `parts`) any method
        beside = target.startswith(".".join(folder) + ".")
        if to != package or (package == "methods" and not beside and not composes):
            wrong.append(f"{name} imports {target}")
    return wrong


def test_arrows_between_packages_point_down() -> None:
    assert_none(
        arrow
        for path in sources()
        for arrow in arrows_up(path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("deltaworks/core/a.py", "from deltaworks.core import families", True),
        ("deltaworks/core/a.py", "from deltaworks.store.files import read_json", False),
        ("deltaworks/core/a.py", "if True:\n    import deltaworks.methods.hybrid", False),
        ("deltaworks/core/a.py", "from ..train import loop", False),
        ("deltaworks/core/a.py", "from . import families", True),
        ("deltaworks/core/a.py", "from deltaworks import attach", False),
        ("deltaworks/core/delta.py", "def save():\n    from deltaworks.store.checkpoint import save", True),
        ("deltaworks/core/delta.py", "from deltaworks.store.checkpoint import save", False),
        ("deltaworks/methods/hybrid/a.py", "from deltaworks.methods.selective.b import B", True),
        ("deltaworks/methods/additive/side/a.py", "from deltaworks.methods.additive.side.b import B", True),
        ("deltaworks/methods/additive/side/a.py", "from deltaworks.methods.selective.b import B", False),
        (
            "deltaworks/methods/additive/side/a.py",
            "from deltaworks.methods.selective.b import B\nclass A:\n    def parts(self): ...",
            True,
        ),
        ("deltaworks/methods/hybrid/a.py", "from deltaworks.store.files import read_json", False),
        ("deltaworks/compare/a.py", "import numpy\nfrom deltaworks.train.loop import train", True),
        ("deltaworks/cli/a.py", "from deltaworks.compare.report import write_report", True),
        ("deltaworks/cli.py", "from deltaworks.methods.hybrid.b import B", True),
    ],
)
def test_the_arrows_that_are_seen(name: str, text: str, allowed: bool) -> None:
    assert (arrows_up(name, text) == []) is allowed


# ---- the machine ----------------------------------------------------------------------------------------


def test_no_file_names_somebodys_home() -> None:
    found = []
    for path in sorted(files()):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if match := HOME.search(line):
                found.append(f"{named(path)}:{number} says {match[0]!r}")
    assert_none(found)
