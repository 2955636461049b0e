"""LoRA on Llamas of 1B and 8B on one CUDA device: tokens per second and peak memory beside peft under the Trainer.

    python benchmarks/lean.py gpu                         # every contender in a process of its own; minutes
    python benchmarks/lean_gpu.py 1B ours                 # one of them, as JSON
    python benchmarks/lean_gpu.py tiny ours --device cpu  # to try the script where there is no GPU

Random bfloat16 weights, random tokens, length 2,048, rank 16 on all linears, bfloat16 autocast, fused AdamW. peft and
deltaworks train under the same Trainer with the same arguments and batches, each at its defaults and with gradient
checkpointing. The floor is forward and backward of the unmodified frozen model in a plain loop, its embeddings asking
for a gradient. A step is timed from the start of its forward pass to the end of its optimizer step, the device waited
for; the first steps warm up. The peak is what torch had allocated at most, weights included.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from torch.utils.data import Dataset

import deltaworks as dw

LENGTH, RANK = 2048, 16
WARM, STEPS = 4, 12
LLAMA_3 = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES: dict[str, tuple[dict[str, Any], int]] = {  # the configuration, and rows in a batch
    "1B": (
        LLAMA_3
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
        4,
    ),
    "8B": (LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}, 2),
    "tiny": (
        {
            "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
        },
        2,
    ),
}  # fmt: skip
CONTENDERS = ("floor", "peft", "ours", "peft, checkpointing", "ours, checkpointing")


class RandomText(Dataset[dict[str, Any]]):
    """Rows of random tokens."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, vocabulary, (rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Clock(transformers.TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.started = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(self.now() - self.started)
        if len(self.seconds) == WARM and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def llama(config: dict[str, Any], device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        full = transformers.LlamaConfig(**config, max_position_embeddings=LENGTH, use_cache=False)
        return transformers.AutoModelForCausalLM.from_config(
            full, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()


def trained(contender: str, model: Any, rows: int, length: int, clock: Clock) -> None:
    """Steps under the Trainer."""
    who, _, checkpointing = contender.partition(", ")
    data = RandomText(rows * (WARM + STEPS), length, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=rows, max_steps=WARM + STEPS, learning_rate=1e-4,
            bf16=True, optim="adamw_torch_fused", gradient_checkpointing=bool(checkpointing), save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=clock.device.type == "cpu",
            dataloader_pin_memory=clock.device.type == "cuda",
        )  # fmt: skip
        common: dict[str, Any] = {"args": arguments, "train_dataset": data, "callbacks": [clock]}
        trainer: Any
        if who == "peft":
            config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = transformers.Trainer(model=peft.get_peft_model(model, config), **common)
        else:
            trainer = dw.DeltaTrainer(dw.attach(model, "lora", rank=RANK, targets="linear"), **common)
        trainer.train()


def floor(model: Any, rows: int, length: int, clock: Clock) -> None:
    """Forward and backward of the frozen model."""
    model.requires_grad_(False).enable_input_require_grads()
    data = RandomText(rows, length, model.config.vocab_size)
    batch = {"input_ids": data.ids.to(clock.device), "labels": data.ids.to(clock.device)}
    for _ in range(WARM + STEPS):
        clock.on_step_begin(None, None, None)
        model(**batch).loss.backward()
        clock.on_step_end(None, None, None)


def run(
    size: Annotated[str, typer.Argument(help=", ".join(SIZES))],
    contender: Annotated[str, typer.Argument(help="; ".join(CONTENDERS))],
    device: str = "cuda",
    length: int = LENGTH,
) -> None:
    """Print what one contender takes, as one line of JSON."""
    transformers.logging.set_verbosity_error()
    config, rows = SIZES[size]
    clock = Clock(torch.device(device))
    found: dict[str, Any] = {}
    try:
        model = llama(config, clock.device)
        found["weights"] = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        if contender == "floor":
            floor(model, rows, length, clock)
        else:
            trained(contender, model, rows, length, clock)
        seconds = clock.seconds[WARM:]
        found |= {"tokens_per_second": rows * length / statistics.median(seconds), "seconds": seconds}
    except torch.cuda.OutOfMemoryError:
        found["error"] = "out of memory"
    except Exception:
        found["error"] = traceback.format_exc(limit=-3)
    if clock.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


def measure(sizes: tuple[str, ...] = ("1B", "8B"), device: str = "cuda") -> Iterator[dict[str, Any]]:
    """The rows of the table; contenders that fail are in the detail with the reason."""
    for size in sizes:
        found: dict[str, dict[str, Any]] = {}
        for contender in CONTENDERS:
            command = [sys.executable, __file__, size, contender, "--device", device]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.strip().splitlines()
            found[contender] = (
                json.loads(lines[-1]) if lines and done.returncode == 0 else {"error": done.stderr[-500:]}
            )
            print(
                size, contender, {key: value for key, value in found[contender].items() if key != "seconds"}, flush=True
            )
        yield from compared(size, found)


def compared(size: str, found: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All over peft at its defaults, which is 1 by definition."""
    targets = (("tokens per second", "tokens_per_second", 1.5), ("peak memory", "peak_bytes", 0.5))
    for what, key, limit in targets:
        taken = {contender: one[key] for contender, one in found.items() if key in one and "error" not in one}
        if {"ours", "peft"} <= taken.keys():
            ratios = {contender: value / taken["peft"] for contender, value in taken.items()}
            yield {
                "what": f"{what} of {size}, {SIZES[size][1]} x {LENGTH:,} tokens, over peft under the Trainer",
                "ours": ratios["ours"],
                "limit": limit,
                "peft": 1.0,
                "least": limit > 1,
                "detail": {"over peft": ratios, "measured": found},
            }


if __name__ == "__main__":
    typer.run(run)
