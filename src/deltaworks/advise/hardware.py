"""What a machine can do: a table of accelerators, and a quick measurement of this one."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaworks.advise.phantom import Phantom
from deltaworks.core.delta import attach
from deltaworks.core.errors import UserError, nearest
from deltaworks.store.files import write_atomically
from deltaworks.train import measure

EFFICIENCY = 0.5  # of the peak rates of a datasheet that training reaches
LAUNCH = 5e-6  # seconds that an accelerator needs to start an operation
HERE = "here"
PATIENCE = 0.3  # seconds that each number of this machine is measured for
REMEMBERED = 24 * 3600  # seconds


@dataclass(frozen=True)
class Hardware:
    """A device: memory in bytes, bandwidth in bytes/s, FLOP/s by dtype, of which ``efficiency`` is reached.

    ``launch`` are the seconds that each operation takes beside its work; ``source`` says where the numbers are from.
    """

    name: str
    device: str
    memory: int
    bandwidth: float
    rates: dict[str, float]
    efficiency: float
    launch: float
    source: str

    def seconds(self, operations: Sequence[tuple[int, int]], dtype: str) -> float:
        """A roofline: each operation takes as long as its arithmetic or its data, whichever is longer.

        ``operations`` are pairs of floating-point operations and bytes moved.
        """
        rate, bandwidth = self.efficiency * self.rates[dtype], self.efficiency * self.bandwidth
        return sum(max(flops / rate, size / bandwidth) + self.launch for flops, size in operations)


@functools.cache
def table() -> dict[str, Hardware]:
    """The accelerators that are known, by name."""
    import yaml

    rows = yaml.safe_load(resources.files(__package__).joinpath("hardware.yaml").read_text(encoding="utf-8"))
    return {row["name"]: _from_row(row) for row in rows}


def _from_row(row: dict[str, Any]) -> Hardware:
    rates = {dtype: 1e12 * row[dtype] for dtype in ("float32", "bfloat16", "float16")}
    memory, bandwidth = int(1e9 * row["memory"]), 1e9 * row["bandwidth"]
    return Hardware(row["name"], "cuda", memory, bandwidth, rates, EFFICIENCY, LAUNCH, row["source"])


def find_hardware(name: str | None) -> Hardware:
    """The hardware of this name; by default this machine, which "here" measures anew.

    Raises UserError with the nearest names.
    """
    if name in (None, HERE):
        return here(again=name == HERE)
    known = table()
    key = str(name).lower().replace(" ", "-").removeprefix("nvidia-")
    if key not in known:
        raise UserError(f"the hardware {name!r} is not known; {nearest(key, [*known, HERE])}")
    return known[key]


# ---------------------------------------------------------------------- this machine


def here(device: str | None = None, *, again: bool = False) -> Hardware:
    """This machine, measured in about two seconds, or ``again``.

    What is measured is remembered for a day in the user's cache folder: the next day need not be as busy.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, threads = measure.hardware(torch.device(device)), torch.get_num_threads()
    key = f"{name}, {threads} threads, torch {torch.__version__}"
    file = cache_folder() / "hardware.json"
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    with contextlib.suppress(KeyError, TypeError):
        if not again and abs(time.time() - known[key]["when"]) < REMEMBERED:
            return Hardware(**known[key]["found"])
    with torch.random.fork_rng():
        found = measured(device, name)
    entry = {"when": time.time(), "found": asdict(found)}
    with contextlib.suppress(OSError, UserError):  # or it is measured again the next time
        write_atomically(file, json.dumps({**known, key: entry}, indent=1))
    return found


def cache_folder() -> Path:
    """Where measurements of this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaworks"


def measured(device: str, name: str) -> Hardware:
    """Matrix products of the size of a small transformer's, a copy, and steps of a network of two sizes.

    A tiny network takes what operations take beside their work, Python included; a larger one shows how much of the
    rates is reached where each operation comes once, after others.
    """
    rates = {}
    size = 4096 if device == "cuda" else 512
    for dtype in ("float32", "bfloat16", "float16"):
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        rates[dtype] = 2 * size**3 / seconds_of(partial(torch.matmul, left, right), device)
    large = torch.zeros(1 << (28 if device == "cuda" else 24), device=device)
    copy = torch.empty_like(large)
    bandwidth = 2 * 4 * large.numel() / seconds_of(lambda: copy.copy_(large), device)
    found = Hardware(name, device, memory_of(device), bandwidth, rates, 1.0, 0.0, "measured here")
    (tiny, operations), (real, work) = (_of_network(width, device) for width in (8, size // 2))
    launch = tiny / len(operations)
    ideal = found.seconds(work, "float32")
    return replace(found, launch=launch, efficiency=ideal / max(ideal, real - launch * len(work)))


def _of_network(width: int, device: str) -> tuple[float, list[tuple[int, int]]]:
    """Seconds and operations of a forward and a backward pass through four blocks with LoRA, ``width`` tokens."""

    def step(model: nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()
        model.zero_grad()

    def made() -> nn.Module:
        sizes = [(width, 4 * width), (4 * width, width)] * 4
        layers = ((nn.LayerNorm(inner), nn.Linear(inner, out), nn.GELU()) for inner, out in sizes)
        model = nn.Sequential(*(layer for three in layers for layer in three))
        attach(model, "lora[rank=4]", targets="*")
        return model.train()

    phantom = Phantom(device)
    with torch.device("meta"), phantom:
        model, x = made(), torch.zeros(width, width)
        phantom.operations.clear()
        step(model, x)
    with torch.device(device):
        model, x = made(), torch.zeros(width, width)
    return seconds_of(partial(step, model, x), device), phantom.operations


def memory_of(device: str) -> int:
    """Bytes of the device, or of the machine."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """The shortest time of many calls: whatever else the machine does only makes them longer."""
    found: list[float] = []
    end = time.perf_counter() + PATIENCE
    while len(found) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)
