"""An embedded data set without a download: the docstrings of the running Python's standard library.

The task is to say which package a docstring comes from. The sources are parsed, never imported or run.
"""

import ast
import random
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGES = 16
ROWS_PER_PACKAGE = 250
FEWEST_WORDS = 5
TEST_FRACTION = 0.2
SPLIT_SEED = 0
# folders that hold tests, third-party packages, compiled files or generated tables
LEFT_OUT = frozenset(
    {
        *("test", "tests", "idle_test", "turtledemo", "__phello__"),
        *("site-packages", "dist-packages", "_bundled"),
        *("lib-dynload", "__pycache__", "pydoc_data"),
    }
)


@lru_cache(maxsize=1)
def docstrings() -> tuple[tuple[str, str], ...]:
    """Every (first paragraph, top-level package) of the standard library, unique, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts[:-1]) and not inside.parts[0].startswith("config-"):
            for paragraph in _first_paragraphs(path):
                seen.setdefault(paragraph, inside.parts[0].removesuffix(".py"))
    return tuple(seen.items())


def read_standard_library() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training and the test rows, ``{"text": paragraph, "label": package}``.

    The 16 packages with the most docstrings, at most 250 each, split 80/20 within each package. The split
    depends only on the Python version.
    """
    by_package: dict[str, list[str]] = {}
    for text, package in docstrings():
        by_package.setdefault(package, []).append(text)
    counts = Counter({package: len(texts) for package, texts in sorted(by_package.items())})
    generator = random.Random(SPLIT_SEED)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for package, _ in sorted(counts.most_common(PACKAGES)):
        texts = by_package[package]
        chosen = generator.sample(texts, min(len(texts), ROWS_PER_PACKAGE))
        rows = [{"text": text, "label": package} for text in chosen]
        held_out = round(TEST_FRACTION * len(rows))
        test += rows[:held_out]
        train += rows[held_out:]
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def python_version() -> str:
    """``"Python 3.11.9"``: the docstrings, and so the digest of the data, differ between versions."""
    return "Python " + ".".join(str(part) for part in sys.version_info[:3])


def _first_paragraphs(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not the user's concern
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and deliberately broken files are part of some installations
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(paragraph.split()) >= FEWEST_WORDS:
                yield paragraph
