"""LoRA on a language model whose weights are spread over processes; alone it trains in one.

    python examples/sharded/train.py
    accelerate launch --config_file examples/sharded/fsdp2.yaml examples/sharded/train.py
    deepspeed examples/sharded/train.py --deepspeed examples/sharded/zero3.json

The adapter is attached before anything is sharded: with ZeRO-3, load the model before the training arguments are
made, or transformers partitions it while it loads.
"""

import argparse

import torch
import transformers

import deltaworks as dw


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="an id or folder; without one, a tiny Llama with random weights")
    parser.add_argument("--method", default="lora[rank=8]")
    parser.add_argument("--out", default="runs/sharded")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--deepspeed")
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    given = parser.parse_args()

    torch.manual_seed(0)
    if given.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **sizes))
    delta = dw.attach(model, given.method)

    arguments = transformers.TrainingArguments(
        output_dir=given.out, max_steps=given.steps, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=5, save_strategy="no", report_to="none", deepspeed=given.deepspeed,
    )  # fmt: skip
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog " * 64))
    rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // 44 * 44].view(-1, 44)]
    trainer = dw.DeltaTrainer(delta, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(given.out)  # in every process: each has a part of the adapter, and the first one writes


if __name__ == "__main__":
    main()
