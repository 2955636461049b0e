"""Synthetic runs that look like real ones, for the tests of records, verdicts and reports."""

import datetime
import math
import random
from typing import Any

from deltaworks.store.records import (
    Counts,
    CurvePoint,
    DataFacts,
    ModelFacts,
    RankOfChange,
    Record,
    Score,
    Trial,
    Validation,
)

MODEL_PARAMETERS = 22_713_216
TEST_EXAMPLES = 600
HEAD = 29_645

# spec, name, family, trainable parameters, true accuracy, memory in GB, training samples per second
METHODS: list[tuple[str, str, str, int, float, float, float]] = [
    ("head", "Head only", "baseline", 0, 0.842, 0.61, 410.0),
    ("full", "Full fine-tuning", "baseline", MODEL_PARAMETERS, 0.921, 1.62, 118.0),
    ("lora[rank=16]", "LoRA", "reparametrized/low-rank", 589_824, 0.918, 0.98, 171.0),
    ("dora[rank=16]", "DoRA", "reparametrized/low-rank", 617_472, 0.920, 1.21, 122.0),
    ("ia3", "(IA)³", "additive/scaling", 18_432, 0.893, 0.88, 205.0),
    ("bitfit", "BitFit", "selective/by-type", 26_112, 0.896, 0.79, 233.0),
    ("houlsby[reduction=16]", "Houlsby adapter", "additive/adapters", 304_128, 0.915, 0.95, 164.0),
    ("prefix[length=30]", "Prefix tuning", "additive/prompts", 276_480, 0.887, 1.04, 150.0),
    (
        "prefix[length=30]+parallel[reduction=2]",
        "MAM",
        "hybrid/prefix-and-adapter",
        1_460_000,
        0.913,
        1.31,
        128.0,
    ),
    ("lst[reduction=8]", "Ladder side-tuning", "additive/side", 402_000, 0.884, 0.66, 240.0),
    ("adalora[rank=16]", "AdaLoRA", "reparametrized/rank-budget", 884_736, 0.911, 1.15, 133.0),
    ("vera[rank=256]", "VeRA", "reparametrized/fixed-projection", 24_576, 0.899, 1.02, 168.0),
    ("ln", "LayerNorm tuning", "selective/by-type", 9_984, 0.889, 0.78, 229.0),
    ("fish-mask[keep=0.005]", "FISH mask", "selective/by-importance", 113_566, 0.905, 1.55, 119.0),
    ("mola[experts=4]", "MoLA", "mixture/experts", 2_359_296, 0.914, 1.44, 97.0),
    ("oft[blocks=8]", "OFT", "reparametrized/orthogonal", 442_368, 0.912, 1.18, 126.0),
    ("prompt[length=20]", "Prompt tuning", "additive/prompts", 7_680, 0.861, 1.01, 152.0),
    ("compacter", "Compacter", "additive/adapters", 31_104, 0.902, 0.97, 149.0),
    ("krona", "KronA", "reparametrized/kronecker", 36_864, 0.904, 0.94, 166.0),
    ("unipelt", "UniPELT", "hybrid/gated", 1_120_000, 0.916, 1.39, 101.0),
]


def a_record(**changes: Any) -> Record:
    """One finished run; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "status": "finished",
        "method": "lora[rank=16]",
        "name": "LoRA",
        "family": "reparametrized/low-rank",
        "paper": "Hu et al. 2021, arXiv:2106.09685",
        "config": {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "linear"},
        "targets": "linear",
        "sites": 36,
        "counts": Counts(trainable=589_824, changed=10_616_832, stored_bytes=2_361_344, head=HEAD),
        "rank": {"attention.q": RankOfChange(median=16, max=16), "mlp.up": RankOfChange(median=15, max=16)},
        "model": ModelFacts(id="all-MiniLM-L6-v2", parameters=MODEL_PARAMETERS),
        "dtypes": {"base": "float32", "trained": "float32"},
        "optimizer": "AdamW",
        "learning_rates": [
            Trial(rate=1e-4, score=0.88),
            Trial(rate=3e-4, score=0.91),
            Trial(rate=1e-3, score=0.9),
        ],
        "learning_rate": 3e-4,
        "learning_rate_split": "validation",
        "steps": 600,
        "epochs": 3.0,
        "batch_size": 16,
        "examples": 9600,
        "curve": [CurvePoint(step=step, loss=1 / step, validation=0.9) for step in (100, 200, 300)],
        "validation": Validation(last=0.91, best=0.912),
        "test": Score(metric="accuracy", score=0.91),
        "peak_memory_bytes": 980_000_000,
        "peak_memory_includes": "resident memory of the process",
        "training_samples_per_second": 171.0,
        "inference_samples_per_second": 640.0,
        "wall_seconds": 61.0,
        "hardware": "2 CPU cores, 8 GB",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "deltaworks": "0.1.0"},
        "data": DataFacts(
            name="Banking77",
            digest="4f1c",
            task="text classification",
            labels=["card_arrival", "card_lost"],
            sizes={"train": 3200, "validation": 400, "test": TEST_EXAMPLES},
        ),
        "started": datetime.datetime(2026, 3, 1, 9, 0, tzinfo=datetime.UTC),
        "finished": datetime.datetime(2026, 3, 1, 9, 2, tzinfo=datetime.UTC),
    }
    return Record(**{**fields, **changes})


def _curve(chance: random.Random, steps: int, reached: float, diverges: bool) -> list[CurvePoint]:
    points = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        loss = 0.25 + 3.9 * math.exp(-5 * done) + chance.gauss(0, 0.05)
        if diverges and done > 0.4:
            loss = math.nan
        score = None
        if step % 60 == 0 and not (diverges and done > 0.4):
            score = reached * (1 - 0.8 * math.exp(-6 * done)) + chance.gauss(0, 0.004)
        points.append(CurvePoint(step=step, loss=loss, validation=score))
        if diverges and done > 0.45:
            break
    return points


def some_records(count: int, seeds: int = 1, trouble: bool = True, salt: int = 0) -> list[Record]:
    """``count`` methods times ``seeds`` runs each; with ``trouble`` some of many diverge or fail."""
    chance = random.Random(salt)
    hardness = [chance.random() for _ in range(TEST_EXAMPLES)]
    records = []
    for index in range(count):
        spec, name, family, trainable, accuracy, memory, speed = METHODS[index % len(METHODS)]
        repetition = index // len(METHODS)
        if repetition:
            spec = f"{spec.split('[')[0]}[scale={repetition + 1}]" + ("+parallel" if "+" in spec else "")
            trainable = int(trainable * 1.9**repetition)
            memory, speed, accuracy = memory * 1.06, speed * 0.93, accuracy - 0.006 * repetition
        if repetition and family == "baseline":
            spec, name, family, trainable = (
                "loha[rank=8]" if index % 2 else "lokr[rank=8]",
                "",
                "reparametrized/product",
                90_000 * index,
            )
        for seed in range(seeds):
            luck = chance.gauss(0, 0.004)
            right = [(0.75 * hard + 0.25 * chance.random()) < accuracy + luck - 0.035 for hard in hardness]
            score = sum(right) / len(right)
            diverges = trouble and index in (7, 23) and (seeds == 1 or seed == 1)
            fails = trouble and index == 15 and seed == 0
            status = "diverged" if diverges else "failed" if fails else "finished"
            rate = chance.choice([1e-4, 3e-4, 1e-3, 3e-3])
            records.append(
                a_record(
                    status=status,
                    message={
                        "diverged": "the loss became NaN at step 250 with learning rate 0.003",
                        "failed": "out of memory: 2.1 GB asked for, 1.4 GB free at block 4",
                        "finished": "",
                    }[status],
                    method=spec,
                    name=name,
                    family=family,
                    config={"spec": spec, "dropout": 0.0},
                    counts=Counts(
                        trainable=trainable,
                        changed=min(MODEL_PARAMETERS, trainable * 18),
                        stored_bytes=4 * (trainable + HEAD) + 1500,
                        head=HEAD,
                    ),
                    learning_rates=[
                        Trial(rate=r, score=score - abs(math.log(r / rate)) / 50) for r in (1e-4, 3e-4, 1e-3, 3e-3)
                    ],
                    learning_rate=rate,
                    seed=seed,
                    curve=_curve(chance, 600, accuracy - 0.004, diverges),
                    validation=Validation(last=score - 0.004, best=score - 0.002),
                    test=None if status != "finished" else Score(score=score, correct="".join("01"[r] for r in right)),
                    peak_memory_bytes=int(memory * 1e9 * chance.uniform(0.99, 1.01)),
                    training_samples_per_second=speed * chance.uniform(0.97, 1.03),
                    inference_samples_per_second=640 - 90 * (memory - 0.6) + chance.gauss(0, 6),
                    wall_seconds=9600 / speed * chance.uniform(1.05, 1.12),
                    merge_error=None if family.startswith("additive") else 3e-6,
                )
            )
    return records
