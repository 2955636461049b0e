"""Every example runs as it stands, and on the data it is for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scripts
import torch

import deltaworks as dw

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared"
slow = pytest.mark.slow
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the data and models beside the checkout are not there")


def ran(name: str, *arguments: str, limit: float = 1800) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def module(name: str) -> ModuleType:
    """An example as a module."""
    return scripts.loaded(EXAMPLES / f"{name}.py", f"example_{name}")


def percents(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d)%", text)]


@slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_says_how_to_use_it(name: str) -> None:
    help_text = ran(name, "--help")
    assert "usage:" in help_text.lower()
    assert f"examples/{name}.py" in help_text or name == "train_tiny_lm"


@slow
def test_images() -> None:
    lines = [line for line in ran("images").splitlines() if "right" in line]
    scores = {" ".join(line.split()[:2]): percents(line)[0] for line in lines}
    for family in ("vit", "dinov2"):
        assert scores[f"{family} lora[rank=8]"] > scores[f"{family} head"]


@slow
def test_clip_gains_from_both_towers() -> None:
    (before, vision), (_, text), (_, both) = (percents(line) for line in ran("clip").splitlines() if "->" in line)
    assert min(vision, text) > before
    assert both > before + 20


@slow
def test_segmentation() -> None:
    rows = {line.split()[0]: percents(line) for line in ran("segment").splitlines()[1:]}
    assert rows["lora[rank=8]"][1] > rows["head"][1] > rows["head"][0]


@slow
def test_speech() -> None:
    before, after = percents(ran("speech"))
    assert after > before + 20


@slow
@with_shared
def test_speech_of_people() -> None:
    before, after = percents(ran("speech", "--data", str(SHARED / "data" / "fsdd")))
    assert after > before


@slow
def test_diffusion_files_compute_the_same() -> None:
    text = ran("diffusion")
    for before, after in re.findall(r"subject (\S+) -> (\S+)", text):
        assert float(after) < 0.8 * float(before)
    differences = [float(number) for number in re.findall(r"differs by (\S+)", text)]
    assert len(differences) == 2
    assert max(differences) < 1e-5


@slow
def test_keywords() -> None:
    rows = {line.split()[0]: percents(line) for line in ran("keywords").splitlines()[1:]}
    assert len(rows) == 6
    assert all(after > before + 30 for before, after in rows.values())


@slow
@with_shared
def test_the_published_keyword_model_learns_digits() -> None:
    keywords = module("keywords")
    folder = SHARED / "models" / "kwt1"
    model, front = keywords.load_kwt(folder)
    with np.load(folder / "reference_io.npz") as reference:
        waves, logits = torch.from_numpy(reference["x"]), torch.from_numpy(reference["logits"])
    with torch.no_grad():
        torch.testing.assert_close(model(keywords.cepstra(waves, front)), logits, rtol=0, atol=2e-4)
    roles = {place.role for place in dw.anatomy(model).select("linear")}
    assert roles == {*(f"attention.{part}" for part in "qkvo"), "mlp.up", "mlp.down"}
    arguments = ["--model", str(folder), "--data", str(SHARED / "data" / "fsdd"), "--clips", "300", "--epochs", "4"]
    text = ran("keywords", *arguments, "--methods", "head,lora[rank=4]")
    head, lora = (percents(line)[1] for line in text.splitlines()[1:])
    assert lora > head
