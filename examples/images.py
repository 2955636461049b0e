"""ViT and DINOv2 classify images: a linear probe beside LoRA, under the Hugging Face Trainer.

    python examples/images.py                                               # small ones, pictures drawn here
    python examples/images.py --model facebook/dinov2-base --data pets.npz  # a real one

DATA is an ``.npz`` file of ``x`` (uint8, [images, height, width, 3]) and ``y`` (numbers of the classes); the last fifth
of the images is the test.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import deltaworks as dw

METHODS = {"head": 1e-2, "lora[rank=8]": 5e-3}
"""Methods, with the learning rates they are trained at."""
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24}
MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, intermediate_size=128, patch_size=6, num_labels=4)
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SMALL, mlp_ratio=2, patch_size=6, num_labels=4)
    ),
}


def stripes(count: int, angles: list[float], seed: int) -> tuple[Tensor, Tensor]:
    """Striped pictures [count, 24, 24, 3] as uint8, and which of the angles (in degrees) the stripes have."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(angles), (count,), generator=draw)
    angle = torch.tensor(angles)[labels].deg2rad() + 0.05 * torch.randn(count, generator=draw)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    width, phase = torch.rand(2, count, 1, 1, generator=draw)
    wave = torch.sin(along * (0.8 + 0.4 * width) + 6 * phase)
    colour = torch.rand(count, 1, 1, 3, generator=draw)
    picture = 128 + 90 * wave[..., None] * colour + 20 * torch.randn(count, 24, 24, 3, generator=draw)
    return picture.clamp(0, 255).to(torch.uint8), labels


def rows(pictures: Tensor, labels: Tensor, model: nn.Module) -> list[dict[str, Any]]:
    """Pictures as the model reads them: [3, side, side], of its size, with the mean and deviation of its training."""
    side = model.config.image_size
    x = pictures.permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
    known = {"image_mean": 3 * [0.5], "image_std": 3 * [0.5]}
    if source := model.config._name_or_path:
        known |= transformers.BaseImageProcessor.get_image_processor_dict(source)[0]
    mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return [{"pixel_values": (image - mean) / std, "labels": label} for image, label in zip(x, labels, strict=True)]


def settings(rate: float, epochs: int) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir="runs/images",
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def compare(name: str, base: nn.Module, data: tuple[Tensor, Tensor], epochs: int) -> None:
    """Train each method on the first four fifths, and print what it gets right of the rest."""
    pictures, labels = data
    every, cut = rows(pictures, labels, base), len(labels) * 4 // 5
    seen, unseen = every[:cut], every[cut:]
    for method, rate in METHODS.items():
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        delta = dw.attach(model, method, also=[] if method == "head" else ["head"])
        trainer = dw.DeltaTrainer(
            delta, args=settings(rate, epochs), train_dataset=seen, eval_dataset=unseen, compute_metrics=accuracy
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        score = trainer.evaluate()["eval_accuracy"]
        print(f"{name:<10}{method:<16}{delta.report().trainable:>10,} trained{score:>10.1%} right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint for image classification")
    parser.add_argument("--data", type=Path, help="an .npz file of x and y")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images (%(default)s)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.data:
        with np.load(chosen.data) as file:
            data = torch.from_numpy(file["x"]), torch.from_numpy(file["y"].astype(np.int64))
    else:
        data = stripes(600, [10.0, 30.0, 60.0, 80.0, 100.0, 120.0, 150.0, 170.0], seed=2)
    classes = int(data[1].max()) + 1
    if chosen.model:
        model = transformers.AutoModelForImageClassification.from_pretrained(
            chosen.model, num_labels=classes, ignore_mismatched_sizes=True
        )
        compare(chosen.model, model, data, chosen.epochs)
        return
    for name, build in MODELS.items():
        model = build()
        known = rows(*stripes(1000, [0.0, 45.0, 90.0, 135.0], seed=1), model)
        trainer = transformers.Trainer(model, args=settings(1e-3, 5), train_dataset=known)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        model.classifier, model.config.num_labels = nn.Linear(model.classifier.in_features, classes), classes
        compare(name, model, data, chosen.epochs)


if __name__ == "__main__":
    main()
