"""A keyword-spotting transformer learns other words, by several methods side by side.

    python examples/keywords.py                                       # a small one, words made of tones
    python examples/keywords.py --model models/kwt1 --data data/fsdd  # KWT-1 (ten commands) learns spoken digits

MODEL is a folder with ``config.json``, ``model.safetensors`` and ``frontend.safetensors`` of KWT-1 (Berg et al., 2021,
arXiv:2104.00769); DATA holds ``fsdd.npz``, the Free Spoken Digit Dataset as arrays ``wave, offset, digit, test``.
"""

import argparse
import copy
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaworks as dw

RATE, FRAME, STEP, FRAMES, FEATURES = 16_000, 480, 160, 98, 40
METHODS = {"head": 3e-3, "bitfit": 3e-3, "ia3": 1e-2, "lora[rank=4]": 3e-3, "houlsby[width=8]": 3e-3, "full": 3e-4}
"""Methods, with the learning rates they are trained at."""


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, dim], one head
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Norms after the residual sums, as in the paper."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(dim), nn.LayerNorm(dim, eps=1e-6)
        self.mlp, self.norm2 = MLP(dim, hidden), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class KeywordTransformer(nn.Module):
    """Cepstra [batch, 98, 40] -> logits [batch, words]."""

    def __init__(self, dim: int = 64, depth: int = 12, hidden: int = 256, words: int = 12) -> None:
        super().__init__()
        self.patch = nn.Linear(FEATURES, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, FRAMES + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(depth))
        self.head = nn.Linear(dim, words)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch(x)], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def load_kwt(folder: Path) -> tuple[KeywordTransformer, dict[str, Tensor]]:
    """The pretrained model, and the matrices of its front end."""
    config = json.loads((folder / "config.json").read_text())
    model = KeywordTransformer(config["dim"], config["depth"], config["mlp_dim"], len(config["labels"]))
    tensors, shapes = load_file(folder / "model.safetensors"), model.state_dict()
    model.load_state_dict({name: tensor.view_as(shapes[name]) for name, tensor in tensors.items()})
    return model, load_file(folder / "frontend.safetensors")


def usual_front_end() -> dict[str, Tensor]:
    """A Hann window, a Fourier transform up to 4 kHz, 80 triangles of equal width in mel, and a cosine transform."""
    bins, angles = torch.arange(244.0), 2 * torch.pi * torch.outer(torch.arange(244.0), torch.arange(480.0)) / 512
    mel = 2595 * torch.log10(1 + bins * RATE / 512 / 700)
    centres = torch.linspace(0, float(mel[-1]), 82)
    width = centres[1] - centres[0]
    triangles = (1 - (mel[None] - centres[1:-1, None]).abs() / width).clamp(min=0)
    cosine = torch.cos(torch.pi * torch.outer(torch.arange(40.0), torch.arange(80.0) + 0.5) / 80) / 40**0.5
    return {
        "window": torch.hann_window(FRAME),
        "dft_a": angles.cos(),
        "dft_b": angles.sin(),
        "mel": triangles,
        "dct": cosine,
    }


def cepstra(waves: Tensor, front: dict[str, Tensor]) -> Tensor:
    """One second of samples [clips, 16000] in [-1, 1] -> [clips, 98, 40]."""
    frames = waves.unfold(1, FRAME, STEP) * front["window"].view(-1)
    size = ((frames @ front["dft_a"].T) ** 2 + (frames @ front["dft_b"].T) ** 2).sqrt()
    return (size @ front["mel"].T).clamp(min=1e-12).log() @ front["dct"].T


def read_fsdd(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Waves [clips, 16000], digits and whether a clip is for the test."""
    with np.load(folder / "fsdd.npz") as data:
        wave, offset = data["wave"].astype(np.float32) / 32768, data["offset"]
        clips = torch.zeros(len(offset) - 1, RATE)
        for row, (start, stop) in enumerate(pairwise(offset)):
            whole = torch.from_numpy(wave[start:stop])[None, None]  # 8 kHz
            clip = F.interpolate(whole, scale_factor=2, mode="linear", align_corners=False)[0, 0, :RATE]
            clips[row, : len(clip)] = clip
        return clips, torch.from_numpy(data["digit"].astype(np.int64)), torch.from_numpy(data["test"])


def tones(count: int, words: Tensor, pitch: float, seed: int) -> tuple[Tensor, Tensor]:
    """Words of two gliding tones at a speaker's pitch, in noise: waves [count, 16000] and their numbers."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(words), (count,), generator=draw)
    start, end = words[labels].unbind(1)
    time = torch.linspace(0, 1, RATE)
    voice = pitch * (1 + 0.2 * torch.rand(count, 1, generator=draw))
    glide = voice * (start[:, None] * time + (end - start)[:, None] * time**2 / 2)
    loud = torch.sin(torch.pi * time) * (0.1 + 0.2 * torch.rand(count, 1, generator=draw))
    return loud * torch.sin(2 * torch.pi * glide) + 0.02 * torch.randn(count, RATE, generator=draw), labels


def fit(model: nn.Module, groups: list, x: Tensor, y: Tensor, epochs: int) -> None:
    """AdamW, with a linear decay to zero."""
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (len(x) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // 32 * 32].view(-1, 32):
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    guesses = torch.cat([model(part).argmax(-1) for part in x.split(100)])
    return float((guesses == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with KWT-1")
    parser.add_argument("--data", type=Path, help="a folder with fsdd.npz")
    parser.add_argument("--methods", default=",".join(METHODS), help="of: %(default)s")
    parser.add_argument("--clips", type=int, default=600, help="training clips at most (%(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (%(default)s)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.model:
        base, front = load_kwt(chosen.model)
    else:
        base, front = KeywordTransformer(32, 2, 64, words=6), usual_front_end()
        known = 100 * torch.tensor([[2, 2], [2, 8], [8, 2], [5, 5], [8, 8], [5, 9]])
        waves, labels = tones(512, known, pitch=1.0, seed=1)
        fit(base, [{"params": base.parameters(), "lr": 2e-3}], cepstra(waves, front), labels, epochs=6)
    if chosen.data:
        waves, labels, test = read_fsdd(chosen.data)
    else:  # other words, in a higher voice
        unknown = 100 * torch.tensor([[3, 3], [3, 7], [7, 3], [6, 6], [4, 9], [9, 4], [5, 3], [7, 7], [9, 9], [2, 5]])
        waves, labels = tones(900, unknown, pitch=1.5, seed=2)
        test = torch.arange(900) >= 600
    x = cepstra(waves, front)
    seen = (~test).nonzero().flatten()
    seen = seen[torch.randperm(len(seen))[: chosen.clips]]
    base.head = nn.Linear(base.head.in_features, 10)
    print(f"{'method':<20}{'trained':>10}{'before':>10}{'after':>10}")
    for method in chosen.methods.split(","):
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        delta = dw.attach(model, method, also=[] if method in ("head", "full") else ["head"])
        before = accuracy(model, x[test], labels[test])
        fit(model, delta.parameter_groups(METHODS.get(method, 1e-3)), x[seen], labels[seen], chosen.epochs)
        after = accuracy(model, x[test], labels[test])
        trained = sum(parameter.numel() for parameter in delta.parameters())
        print(f"{method:<20}{trained:>10,}{before:>10.1%}{after:>10.1%}", flush=True)


if __name__ == "__main__":
    main()
