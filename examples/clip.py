"""CLIP learns new words and new pictures with LoRA on both towers; its zero-shot accuracy before and after.

    python examples/clip.py                                              # a small one, pictures drawn here
    python examples/clip.py --model openai/clip-vit-base-patch32 --data photos/

DATA is a folder of pictures beside ``captions.tsv``, whose lines are a file name, a tab and the caption; the last fifth
of the lines is the test, where each picture is compared with every caption.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import deltaworks as dw

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "violet": (1, 0, 1)}
SHAPES = ("disc", "square", "cross", "ring")
WORDS = {word: number for number, word in enumerate(("<pad>", "<begin>", "<end>", *COLOURS, *SHAPES))}
MEAN, STD = (torch.tensor(three).view(3, 1, 1) for three in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)))


def draw(colour: str, shape: str, noise: torch.Generator) -> Tensor:
    """A picture [3, 16, 16] of one thing, somewhere near the middle."""
    y, x = (torch.arange(16.0) - 7.5 + torch.randn(2, 1, generator=noise)).unbind(0)
    y, x = y[:, None], x[None]
    radius = (x**2 + y**2).sqrt()
    filled = {
        "disc": radius < 4.5,
        "square": (x.abs() < 4) & (y.abs() < 4),
        "cross": ((x.abs() < 1.5) | (y.abs() < 1.5)) & (x.abs() < 5.5) & (y.abs() < 5.5),
        "ring": (radius > 3) & (radius < 5.5),
    }[shape]
    paint = torch.tensor(COLOURS[colour], dtype=torch.float32).view(3, 1, 1)
    picture = torch.where(filled, paint, torch.tensor(0.5)) + 0.1 * torch.randn(3, 16, 16, generator=noise)
    return (picture.clamp(0, 1) - MEAN) / STD


def drawn(kinds: list[tuple[str, str]], each: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Pictures, which caption each has, and the captions as tokens."""
    noise = torch.Generator().manual_seed(seed)
    pictures = torch.stack([draw(*kind, noise) for kind in kinds for _ in range(each)])
    ids = torch.tensor([[WORDS[word] for word in ("<begin>", *kind, "<end>")] for kind in kinds])
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return pictures, torch.arange(len(kinds)).repeat_interleave(each), texts


def read(folder: Path, source: str, side: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of files."""
    from PIL import Image

    lines = [line.split("\t") for line in (folder / "captions.tsv").read_text().splitlines()]
    captions = list(dict.fromkeys(caption for _, caption in lines))
    pictures = []
    for name, _ in lines:
        image = Image.open(folder / name).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pictures.append((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD)
    texts = transformers.AutoTokenizer.from_pretrained(source)(captions, padding=True, return_tensors="pt")
    return torch.stack(pictures), torch.tensor([captions.index(caption) for _, caption in lines]), dict(texts)


def small_clip() -> nn.Module:
    tower: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4, "projection_dim": 32}
    text = tower | {"vocab_size": len(WORDS), "max_position_embeddings": 8, "eos_token_id": WORDS["<end>"]}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text | {"bos_token_id": WORDS["<begin>"], "pad_token_id": WORDS["<pad>"]},
            vision_config=tower | {"image_size": 16, "patch_size": 4},
            projection_dim=32,
        )
    )


def fit(model: nn.Module, groups: list, data: tuple[Tensor, Tensor, dict[str, Tensor]], steps: int) -> None:
    """Contrast each picture of a batch with all captions of the batch."""
    pictures, which, texts = data
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    count = min(16, len(texts["input_ids"]))
    for _ in range(steps):
        chosen = torch.randperm(len(texts["input_ids"]), generator=draw)[:count]  # one picture of each caption
        of = [(which == one).nonzero().flatten() for one in chosen]
        rows = torch.stack([own[torch.randint(len(own), (1,), generator=draw)] for own in of]).flatten()
        batch = {key: value[chosen] for key, value in texts.items()}
        model(**batch, pixel_values=pictures[rows], return_loss=True).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def zero_shot(model: nn.Module, data: tuple[Tensor, Tensor, dict[str, Tensor]]) -> float:
    """How often the nearest of all captions is the picture's own."""
    pictures, which, texts = data
    guesses = [model(**texts, pixel_values=part).logits_per_image.argmax(-1) for part in pictures.split(64)]
    return float((torch.cat(guesses) == which).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a CLIP checkpoint")
    parser.add_argument("--data", type=Path, help="a folder of pictures with captions.tsv")
    parser.add_argument("--method", default="lora[rank=8]", help="what is attached (%(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="steps of the adapter (%(default)s)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.model and chosen.data:
        model = transformers.CLIPModel.from_pretrained(chosen.model)
        pictures, which, texts = read(chosen.data, chosen.model, model.config.vision_config.image_size)
        cut = len(which) * 4 // 5
        seen, unseen = (pictures[:cut], which[:cut], texts), (pictures[cut:], which[cut:], texts)
    else:
        kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        new = [kind for kind in kinds if kind[0] == "violet" or kind[1] == "ring"]
        model = small_clip()
        known = drawn([kind for kind in kinds if kind not in new], 100, seed=1)
        fit(model, [{"params": model.parameters(), "lr": 2e-3}], known, steps=400)
        seen, unseen = drawn(new, 40, seed=2), drawn(new, 30, seed=3)
    before = zero_shot(model, unseen)
    for targets in ("vision:linear", "text:linear", "linear"):
        torch.manual_seed(0)
        tuned = copy.deepcopy(model)
        delta = dw.attach(tuned, chosen.method, targets=targets)
        fit(tuned, delta.parameter_groups(2e-3), seen, chosen.steps)
        after = zero_shot(tuned, unseen)
        print(f"{chosen.method} on {targets:<14}{delta.report().trainable:>8,} trained{before:>8.1%} ->{after:>7.1%}")


if __name__ == "__main__":
    main()
