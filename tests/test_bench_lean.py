"""The benchmark of lean training on sizes that say nothing: every figure is measured, kept and shown."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scripts
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lean.py"


@pytest.fixture(scope="module")
def lean() -> ModuleType:
    pytest.importorskip("peft")
    return scripts.loaded(SCRIPT)


def test_what_lives_is_counted(lean: ModuleType) -> None:
    """What a closure holds is counted, a result that is let go is not."""
    weight = torch.randn(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def held() -> torch.Tensor:
        hidden = (x @ weight).relu()  # 4 * 8 floats, kept by relu
        _ = hidden * 2
        return torch.utils.checkpoint.checkpoint(lambda h: (h.exp() * h).sum(), hidden, use_reentrant=False)

    found = lean.kept(torch.nn.Linear(1, 1), held)
    assert found["saved"] == 4 * 8 * 4 + 4, "the state and the loss"
    assert found["cached"] == 4 * 8 * 4, "the gradient of x"


def test_ratios_are_taken_repeat_by_repeat(lean: ModuleType) -> None:
    seconds = {"one": [2.0, 4.0, 9.0], "other": [1.0, 1.0, 3.0]}
    assert lean.ratio(seconds, "one", "other") == (3.0, (2.5, 3.5))


def test_contenders_take_turns(lean: ModuleType) -> None:
    calls: list[str] = []
    found = lean.side_by_side({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=2, warm=1)
    assert "".join(calls) == "cababcbca"
    assert {name: len(each) for name, each in found.items()} == {"a": 2, "b": 2, "c": 2}


def test_peaks_on_meta_are_those_on_cpu(lean: ModuleType) -> None:
    peaks = [lean.loss_peak(lean.plain_cross_entropy, device, 64, 16, 512) for device in ("cpu", "meta")]
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-3)
    assert peaks[0] == pytest.approx(64 * 512 * 3 * 4, rel=1e-3), "log softmax, its gradient and that of the logits"


def test_targets_say_what_is_met(lean: ModuleType) -> None:
    rows = [lean.Row("less", 1.0, 1.1, 2.0, spread=(0.9, 1.05)), lean.Row("more", 1.4, 1.5, 1.0, " x", least=True)]
    found = {"versions": {"peft": "1"}, "figures": {"gpu": {"rows": [lean.asdict(row) for row in rows]}}}
    table = list(lean.targets(found))
    assert table[2:] == ["| less | 2 | 1 (0.9 to 1.05) | <= 1.1 | yes |", "| more | 1 x | 1.4 x | >= 1.5 x | no |"]


@pytest.mark.slow
def test_every_figure(lean: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "lean.json"
    command = [sys.executable, str(SCRIPT)]
    for words in (["all"], ["profile"], ["all", "--keep"]):
        done = subprocess.run(
            [*command, *words, "--tiny", "--out", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert set(found["figures"]) == set(lean.FIGURES)
    assert all(row["ours"] > 0 for figure in found["figures"].values() for row in figure["rows"])
    assert found["machine"]
    page = out.with_suffix(".md").read_text()
    assert page.count("| yes |") + page.count("| no |") == sum(len(f["rows"]) for f in found["figures"].values())
    assert "| lora | " in page


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["floor", "peft", "ours"])
def test_the_contenders_of_the_gpu_on_a_cpu(contender: str) -> None:
    script = SCRIPT.with_name("lean_gpu.py")
    command = [sys.executable, str(script), "tiny", contender, "--device", "cpu", "--length", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert "error" not in found
    assert len(found["seconds"]) == 12
