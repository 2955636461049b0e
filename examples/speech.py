"""Whisper hears a new speaker: LoRA in the encoder, the decoder and the attention between them.

    python examples/speech.py                                            # a small one, voices made of tones
    python examples/speech.py --data data/fsdd                           # the same one, pretrained on five speakers
    python examples/speech.py --model openai/whisper-tiny --data data/fsdd

DATA holds ``fsdd.npz``, the Free Spoken Digit Dataset as arrays ``wave, offset, digit, speaker, test``. The first five
speakers are the base's own (a real checkpoint needs none), the last is the new one.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import deltaworks as dw

RATE = 16_000
BEGIN, END, DIGITS = 0, 1, 2  # tokens of the small model; digit d is DIGITS + d
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def small_whisper() -> nn.Module:
    sizes = {f"{stack}_{what}": size for stack in ("encoder", "decoder") for what, size in SIZES.items()}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **sizes,
            vocab_size=DIGITS + 10,
            d_model=48,
            num_mel_bins=40,
            max_source_positions=50,
            max_target_positions=8,
            dropout=0.0,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=END,
            decoder_start_token_id=BEGIN,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


def voices(count: int, pitch: float, seed: int) -> tuple[list[np.ndarray], Tensor]:
    """Ten words, each of two tones that follow one another, in one voice."""
    draw = np.random.default_rng(seed)
    digits = draw.integers(10, size=count)
    time = np.arange(RATE // 2) / RATE
    waves = []
    for digit in digits:
        voice = pitch * (1 + 0.05 * draw.standard_normal())
        first, second = (voice * 250 * 1.3**step for step in (digit % 5, 4 - digit // 2))
        word = np.concatenate([np.sin(2 * np.pi * tone * time) for tone in (first, second)])
        waves.append((0.3 * word + 0.02 * draw.standard_normal(len(word))).astype(np.float32))
    return waves, torch.from_numpy(digits)


def read_fsdd(folder: Path) -> tuple[list[np.ndarray], Tensor, Tensor, Tensor]:
    """Clips at 16 kHz, their digits, speakers, and whether each is for the test."""
    with np.load(folder / "fsdd.npz") as data:
        wave, offset = data["wave"].astype(np.float32) / 32768, data["offset"]
        clips = [wave[start:stop] for start, stop in pairwise(offset)]
        twice = [np.interp(np.arange(2 * len(c)) / 2, np.arange(len(c)), c).astype(np.float32) for c in clips]
        digit, speaker, test = (torch.from_numpy(data[key].astype(np.int64)) for key in ("digit", "speaker", "test"))
        return twice, digit, speaker, test.bool()


class Listener:
    """A Whisper with what turns clips into its input and digits into its tokens."""

    def __init__(self, source: str | None) -> None:
        if source:
            self.model: nn.Module = transformers.WhisperForConditionalGeneration.from_pretrained(source)
            self.hear = transformers.WhisperFeatureExtractor.from_pretrained(source)
            tokenizer = transformers.WhisperTokenizer.from_pretrained(source, language="en", task="transcribe")
            words = tokenizer(NAMES, padding=True, return_tensors="pt")
            # the model puts the first token in front itself
            self.answers = words.input_ids.masked_fill(words.attention_mask == 0, -100)[:, 1:]
            self.spell = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True).strip()
        else:
            self.model = small_whisper()
            # one second instead of Whisper's thirty: a mel spectrum of 100 frames
            self.hear = transformers.WhisperFeatureExtractor(feature_size=40, chunk_length=1)
            self.answers = torch.tensor([[DIGITS + digit, END] for digit in range(10)])
            self.spell = lambda tokens: " ".join(NAMES[token - DIGITS] for token in tokens if token >= DIGITS)

    def features(self, clips: list[np.ndarray]) -> Tensor:
        """Clips -> log-mel spectra [clips, bins, frames]."""
        return self.hear(clips, sampling_rate=RATE, return_tensors="pt").input_features

    def fit(self, groups: list, x: Tensor, digits: Tensor, steps: int) -> None:
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (16,))
            self.model(input_features=x[rows], labels=self.answers[digits[rows]]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(self, x: Tensor, digits: Tensor) -> float:
        """How often the likeliest of the ten answers is right, token by token."""
        right = 0
        for features, digit in zip(x.split(1), digits, strict=True):
            labels = self.answers
            states = self.model.get_encoder()(features).last_hidden_state.expand(10, -1, -1)
            logits = self.model(encoder_outputs=(states,), labels=labels).logits.log_softmax(-1)
            scores = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, 0).sum(-1)
            right += int(scores.argmax() == digit)
        return right / len(digits)

    def writes(self, x: Tensor) -> list[str]:
        """What the model writes of its own accord."""
        return [self.spell(row) for row in self.model.generate(x, max_new_tokens=6, do_sample=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Whisper checkpoint")
    parser.add_argument("--data", type=Path, help="a folder with fsdd.npz")
    parser.add_argument("--method", default="lora[rank=8]", help="what is attached (%(default)s)")
    parser.add_argument("--pretraining", type=int, default=250, help="steps of the small model alone (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of the adapter (%(default)s)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    listener = Listener(chosen.model)
    if chosen.data:
        clips, digits, speakers, test = read_fsdd(chosen.data)
        x, new = listener.features(clips), speakers == 5
        known, seen, unseen = ((x[rows], digits[rows]) for rows in (~new & ~test, new & ~test, new & test))
    else:
        parts = (voices(600, 1.0, seed=1), voices(100, 1.15, seed=2), voices(60, 1.15, seed=3))
        known, seen, unseen = ((listener.features(clips), digits) for clips, digits in parts)
    if not chosen.model:
        listener.fit([{"params": listener.model.parameters(), "lr": 2e-3}], *known, steps=chosen.pretraining)
    delta = dw.attach(listener.model, chosen.method)
    before = listener.accuracy(*unseen)
    listener.fit(delta.parameter_groups(3e-3), *seen, steps=chosen.steps)
    after = listener.accuracy(*unseen)
    print(f"{chosen.method} trains {delta.report().trainable:,} values on {len(seen[1])} words of the new speaker:")
    print(f"{before:.1%} of the others were understood before, {after:.1%} are now")
    wanted = [NAMES[digit] for digit in unseen[1][:5]]
    print(f"said {', '.join(wanted)}; written {', '.join(listener.writes(unseen[0][:5]))}")


if __name__ == "__main__":
    main()
