"""SegFormer colours every pixel by its class: the decoder alone beside LoRA in the encoder.

    python examples/segment.py                                                        # a small one, pictures drawn here
    python examples/segment.py --model nvidia/segformer-b0-finetuned-ade-512-512 --data scenes.npz

DATA is an ``.npz`` file of ``x`` (uint8, [images, height, width, 3]) and ``y`` (uint8, the class of each pixel, 255 for
none); the last fifth of the images is the test.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import deltaworks as dw

METHODS = {"head": 3e-3, "bitfit": 3e-3, "lora[rank=8]": 3e-3}
"""Methods, with the learning rates they are trained at. The head is the decoder; all train it."""
SIDE, CLASSES = 32, 4


def scenes(count: int, inverted: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, 32, 32] of a disc, a square and a bar over a ground, and the class of each pixel."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    centres = 6 + 20 * torch.rand(count, 3, 2, 1, 1, generator=draw)
    dy, dx = (y - centres[:, :, 0]).abs(), (x - centres[:, :, 1]).abs()  # [count, 3, 32, 32]
    things = [dx[:, 0] ** 2 + dy[:, 0] ** 2 < 30, (dx[:, 1] < 5) & (dy[:, 1] < 5), dy[:, 2] < 2]
    classes = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for number, filled in enumerate(things, start=1):
        classes[filled] = number
    paint = torch.tensor([[0.2, 0.3, 0.2], [0.8, 0.3, 0.2], [0.7, 0.4, 0.2], [0.6, 0.5, 0.3]])
    picture = paint[classes].permute(0, 3, 1, 2) + 0.15 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return (1 - picture if inverted else picture) * 4 - 2, classes


def small_segformer() -> nn.Module:
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[2, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[24, 48],
            patch_sizes=[5, 3],
            strides=[2, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=48,
            num_labels=CLASSES,
        )
    )


def fit(model: nn.Module, groups: list, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (min(16, len(x)),))
        model(pixel_values=x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def mean_iou(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Intersection over union of each class that occurs, averaged."""
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in x.split(16)])
    guesses = nn.functional.interpolate(logits, y.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
    known, scores = y != 255, []
    for number in y[known].unique():
        own, guessed = (y == number) & known, (guesses == number) & known
        scores.append(float((own & guessed).sum() / (own | guessed).sum()))
    return sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a SegFormer checkpoint")
    parser.add_argument("--data", type=Path, help="an .npz file of x and y")
    parser.add_argument("--steps", type=int, default=120, help="steps of each method (%(default)s)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.data:
        with np.load(chosen.data) as file:
            x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"].astype(np.int64))
        mean, std = (torch.tensor(three) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = ((x / 255 - mean) / std).permute(0, 3, 1, 2)
    else:
        x, y = scenes(160, inverted=True, seed=2)
    if chosen.model:
        base = transformers.SegformerForSemanticSegmentation.from_pretrained(
            chosen.model, num_labels=int(y[y != 255].max()) + 1, ignore_mismatched_sizes=True
        )
    else:
        base = small_segformer()
        fit(base, [{"params": base.parameters(), "lr": 3e-3}], *scenes(256, inverted=False, seed=1), steps=250)
    cut = len(x) * 4 // 5
    print(f"{'method':<16}{'trained':>10}{'before':>10}{'after':>10}   mean intersection over union")
    for method, rate in METHODS.items():
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        delta = dw.attach(model, method, also=[] if method == "head" else ["head"])
        before = mean_iou(model, x[cut:], y[cut:])
        fit(model, delta.parameter_groups(rate), x[:cut], y[:cut], chosen.steps)
        trained = sum(parameter.numel() for parameter in delta.parameters())
        print(f"{method:<16}{trained:>10,}{before:>10.1%}{mean_iou(model, x[cut:], y[cut:]):>10.1%}", flush=True)


if __name__ == "__main__":
    main()
