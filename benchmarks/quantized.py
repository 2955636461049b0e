"""Memory of a quantized base against bfloat16, and LoRA on it beside peft's: bytes, outputs, gradients, time.

    python benchmarks/quantized.py          # into results/quantized.json and .md; a minute of one core

A llama of 23 million parameters with random weights is written to a folder and loaded in each format. ``bytes`` hold
the base; ``kept`` is what the forward pass of a training step keeps for the backward pass and ``peak`` the most that is
alive beside the model in both. ``error`` is the largest difference of a logit from the bfloat16 base, over the largest
logit. ``off`` compares with peft on the same base: the largest difference of a logit, and of a gradient of A or B, over
their largest, in float32. ``s`` is processor time of one forward and backward pass.
"""

import copy
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.store.records import versions
from deltaworks.train.measure import hardware, model_bytes, step_memory
from deltaworks.train.quantizing import FORMS, Quantization, settle

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
RANK, ROWS, LENGTH = 8, 2, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_IN_PEFT = ("int4wo",)  # its LoRA refuses torchao's four bits
Row = dict[str, Any]


def load(folder: Path, quantization: Quantization | None, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {}
    if quantization is not None:
        with torch.device("meta"):
            body = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder), dtype=dtype)
        options = quantization.options(body, dtype, torch.device("cpu"))
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    model.config.use_cache = False
    settle(model)
    return model.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, SIZES["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def measured(model: nn.Module) -> Row:
    """Bytes and seconds of a training step."""

    def loss() -> Tensor:
        return model(**batch()).loss

    memory = step_memory(model, loss)
    started = time.process_time()
    for _ in range(3):
        loss().backward()
    return {"kept": memory.saved, "peak": memory.peak, "seconds": (time.process_time() - started) / 3}


def under_peft(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def beside_peft(folder: Path, quantization: Quantization | None) -> dict[str, float]:
    """The same LoRA on the same base in float32, with B away from zero."""
    model = load(folder, quantization, torch.float32)
    other = under_peft(copy.deepcopy(model))
    delta = dw.attach(model, "lora", rank=RANK, alpha=RANK, targets=TARGETS)
    generator, pairs = torch.Generator().manual_seed(1), []
    for item in delta.attached:
        twin, tuner = other.base_model.model.get_submodule(item.place.path), item.tuner
        for name, side in (("A", twin.lora_A), ("B", twin.lora_B)):
            own, theirs = getattr(tuner, name), side["default"].weight
            own.data.copy_(0.05 * torch.randn(own.shape, generator=generator))
            theirs.data.copy_(own.data)
            pairs.append((own, theirs))
    logits = [each(**batch()).logits.detach() for each in (model, other)]
    for each in (model, other):
        each(**batch()).loss.backward()
    return {"logits": off(*logits), "gradients": max(off(own.grad, theirs.grad) for own, theirs in pairs)}


def table(rows: list[Row]) -> str:
    lines = ["| base | bytes | of bfloat16 | error | method | kept | peak | s |", "|---|---|---|---|---|---|---|---|"]
    whole = rows[0]["base"]
    for row in rows:
        for method, found in row["methods"].items():
            lines.append(
                f"| {row['format']} | {row['base']:,} | {row['base'] / whole:.3f} | {row['error']:.3f} | {method} "
                f"| {found['kept']:,} | {found['peak']:,} | {found['seconds']:.2f} |"
            )
    lines += ["", "| base | off from peft: logits | gradients |", "|---|---|---|"]
    lines += [f"| {r['format']} | {r['off']['logits']:.1e} | {r['off']['gradients']:.1e} |" for r in rows if r["off"]]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(folder)
        exact = load(folder, None, torch.bfloat16)(**batch()).logits.float()
        for form in (None, "nf4 (single quantization)", *FORMS):
            quantization = None if form is None else Quantization(form.split()[0], " " not in form)
            model = load(folder, quantization, torch.bfloat16)
            row: Row = {"format": form or "bfloat16", "base": model_bytes(model), "methods": {}, "off": None}
            row["error"] = off(model(**batch()).logits.float(), exact)
            for method in (f"lora[rank={RANK}]", f"hut[rank={RANK}]"):
                delta = dw.attach(model, method)
                row["methods"][method] = measured(model)
                delta.detach()
            if form not in NOT_IN_PEFT:
                row["methods"]["lora of peft"] = measured(under_peft(model))
                row["off"] = beside_peft(folder, quantization)
            rows.append(row)
            print(row["format"], row["base"], flush=True)
    found = {"versions": versions(), "hardware": hardware(torch.device("cpu")), "sizes": SIZES, "rows": rows}
    (RESULTS / "quantized.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "quantized.md").write_text(f"{__doc__}\n{found['hardware']}\n\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
