"""Train tiny-lm, the small causal base that ships with deltaworks, on a folder of English text.

    python examples/train_tiny_lm.py train CORPUS --minutes 90          # stop it and run it again: it goes on
    python examples/train_tiny_lm.py export src/deltaworks/train/tiny_lm
    python examples/train_tiny_lm.py evaluate src/deltaworks/train/tiny_lm CORPUS/wikitext2_test.txt.gz

On two cores: torchrun --nproc-per-node 2 examples/train_tiny_lm.py train CORPUS. The CORPUS holds gzip-compressed
UTF-8 files, a paragraph a line and an empty line between works; `SHARES` names them. The rate follows warm-up, plateau
and decay (Hu et al., 2024, arXiv:2404.06395), so that the decay may begin whenever time runs out. What is random is
the first weights and the order of the blocks, both from the seed, so a run that was stopped goes on as if it was not.
"""

import gzip
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaworks.store.files import replacing

# the part of the training tokens that each group of files gives; modern prose first
SHARES = {
    "openstax_*": 0.55,
    "eltec_english_novels": 0.25,
    "us_presidential_speeches": 0.08,
    "tinystories_lowercase": 0.10,
    "tiny_shakespeare": 0.02,
}
LEFT_OUT = ("openstax_introduction_business",)  # its preface states CC BY-NC-SA, against the licence file beside it
VALIDATION = "wikitext2_valid"
STRAIGHT = str.maketrans("‘’“”", "''\"\"")  # as most people type

END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 6144
TOKENIZER_BYTES = 24_000_000  # of text that the vocabulary is learned from
CONTEXT = 512  # tokens

BATCH = 8  # blocks of CONTEXT tokens in an optimizer step
MICROBATCH = 4  # blocks that go through the model together: what fits the processor's cache
PLATEAU_CONTEXT = 256  # tokens, before the decay: a fifth faster, and the decay is enough for the far positions
RATE = 3e-3
WARMUP = 100  # steps
DECAY = 0.25  # of the run
WEIGHT_DECAY = 0.1
CLIP = 1.0
CHECKPOINT, CHECKPOINT_SECONDS = "checkpoint.pt", 240.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False)]
Out = Annotated[Path, typer.Option(help="folder of the tokenizer, the blocks, the checkpoint and the log")]
OUT = Path("runs/tiny-lm")


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=1, rms_norm_eps=1e-5,
        )
    )  # fmt: skip


# ---- text to blocks -------------------------------------------------------------------------------------


def files_of(corpus: Path, group: str) -> list[Path]:
    paths = [path for path in sorted(corpus.glob(f"{group}.txt.gz")) if path.name.split(".")[0] not in LEFT_OUT]
    if not paths:
        raise typer.BadParameter(f"{corpus} holds no {group}.txt.gz")
    return paths


def read(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return stream.read().translate(STRAIGHT)


def documents(path: Path) -> list[str]:
    """The works, sections or stories in a file."""
    text = read(path)
    if path.name.startswith("tinystories"):  # here an empty line ends a paragraph, and a line break the story
        return [story.replace("\n\n", "\n") for story in re.split(r"(?<!\n)\n(?!\n)", text)]
    if path.name.startswith("tiny_shakespeare"):  # here an empty line ends a speech
        return [text]
    return text.split("\n\n")


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on a sample in the proportions of `SHARES`; every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _sample(corpus: Path) -> Iterator[str]:
    generator = random.Random(0)
    for group, share in SHARES.items():
        paragraphs = [line for path in files_of(corpus, group) for text in documents(path) for line in text.split("\n")]
        generator.shuffle(paragraphs)
        size = 0.0
        for paragraph in paragraphs:
            yield paragraph
            size += len(paragraph)
            if size >= share * TOKENIZER_BYTES:
                break


def blocks_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Texts one after the other, an end token before each, cut into uint16 [blocks, CONTEXT]."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)  # the template puts the end token first
    stream = np.concatenate([np.array(text.ids, dtype=np.uint16) for text in encoded])
    return stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


def prepare(corpus: Path, out: Path) -> dict[str, np.ndarray]:
    """The blocks of each group of files, made once; beside them the tokenizer."""
    if not (out / "tokenizer.json").is_file():
        train_tokenizer(corpus).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    blocks = {}
    for group in (*SHARES, VALIDATION):
        kept = out / f"{group.rstrip('_*')}.npy"
        if not kept.is_file():
            texts = [text for path in files_of(corpus, group) for text in documents(path)]
            with replacing(kept) as place, open(place, "wb") as stream:
                np.save(stream, blocks_of(texts, tokenizer))
        blocks[group] = np.load(kept)
    return blocks


def order(blocks: dict[str, np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Blocks without end: a group drawn by its share, then the next of that group's blocks in a fresh shuffle."""
    generator = random.Random(seed)
    waiting: dict[str, list[int]] = {group: [] for group in SHARES}
    while True:
        (group,) = generator.choices(list(SHARES), list(SHARES.values()))
        if not waiting[group]:
            waiting[group] = generator.sample(range(len(blocks[group])), len(blocks[group]))
        yield blocks[group][waiting[group].pop()]


# ---- training -------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come; `decay` is the step at which the rate begins to fall, and for how many steps."""

    step: int = 0
    seconds: float = 0.0
    decay: tuple[int, int] | None = None

    @property
    def finished(self) -> bool:
        return self.decay is not None and self.step >= sum(self.decay)

    def factor(self) -> float:
        """The rate of the next step over the highest: linear up, flat, then 1 - sqrt (Hägele et al., 2024,
        arXiv:2405.18392)."""
        if self.decay is not None and self.step >= self.decay[0]:
            return 1 - math.sqrt((self.step - self.decay[0]) / self.decay[1])
        return min(1.0, (self.step + 1) / WARMUP)


class Run:
    """Model, optimizers and progress: what the checkpoint in `out` holds. Every process has the same."""

    def __init__(self, out: Path, blocks: dict[str, np.ndarray], seed: int) -> None:
        self.out, self.blocks, self.progress = out, blocks, Progress()
        self.model = new_model(seed)
        self.model.set_attn_implementation("eager")  # at this size, and compiled, 1.4 times as fast as the fused kernel
        self.optimizers = optimizers_of(self.model)
        if (out / CHECKPOINT).is_file():
            saved = torch.load(out / CHECKPOINT, weights_only=True)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.progress = Progress(**saved["progress"])
        self.coming = islice(order(blocks, seed), self.progress.step * BATCH, None)
        self.forward = torch.compile(self.model, dynamic=False)

    def save(self) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        with replacing(self.out / CHECKPOINT) as place:
            torch.save(
                {"model": self.model.state_dict(), "optimizers": states, "progress": asdict(self.progress)}, place
            )
        with torch.no_grad():
            parts = torch.from_numpy(self.blocks[VALIDATION][:64].astype(np.int64)).split(MICROBATCH)
            loss = sum(float(loss_of(self.model, part)) for part in parts) / len(parts)
        self.note(validation=loss)

    def note(self, **event: float) -> None:
        line = json.dumps({"step": self.progress.step, "seconds": round(self.progress.seconds), **event})
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def begin_decay(self) -> None:
        step = self.progress.step
        self.progress.decay = (step, max(1, round(step * DECAY / (1 - DECAY))))

    def step(self) -> tuple[float, float]:
        """One optimizer step; the mean loss in nats and the norm of the gradient."""
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        context = PLATEAU_CONTEXT if self.progress.decay is None else CONTEXT
        batch = torch.from_numpy(np.stack(list(islice(self.coming, BATCH))).astype(np.int64))
        parts = batch.split(MICROBATCH)[rank::processes]
        total = torch.zeros(())
        for part in parts:
            loss = loss_of(self.forward, part.view(-1, context)) * len(part) / BATCH
            loss.backward()
            total += loss.detach()
        parameters = list(self.model.parameters())
        if processes > 1:
            for tensor in (total, *(parameter.grad for parameter in parameters)):
                dist.all_reduce(tensor)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * self.progress.factor()
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        return float(total), float(norm)


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for embeddings and gains.

    Muon's steps are scaled to the size of AdamW's (Liu et al., 2025, arXiv:2502.16982), so one rate serves both.
    """
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss in nats of each token after the first of its row; tokens [rows, context]."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@app.command()
def train(
    corpus: Folder,
    out: Out = OUT,
    minutes: Annotated[float, typer.Option(help="of training, the decay included; may change when it goes on")] = 90,
    tokens: Annotated[float, typer.Option(help="most tokens to train on, the decay included")] = 1e8,
    seed: int = 0,
) -> None:
    """Train, or go on where the last checkpoint stands."""
    out.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        prepare(corpus, out)
    if dist.is_initialized():
        dist.barrier()
    run = Run(out, prepare(corpus, out), seed)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    before = saved = time.perf_counter()
    losses: list[float] = []
    while not run.progress.finished:
        done = max(run.progress.step * BATCH * CONTEXT / tokens, run.progress.seconds / (60 * minutes))
        orders = torch.tensor([done >= 1 - DECAY, bool(stopped)])
        if dist.is_initialized():
            dist.broadcast(orders, 0)  # clocks and signals differ between processes
        if run.progress.decay is None and orders[0]:
            run.begin_decay()
        if orders[1]:
            break
        loss, norm = run.step()
        losses.append(loss)
        now = time.perf_counter()
        run.progress.seconds, before = run.progress.seconds + now - before, now
        if first and run.progress.step % 10 == 0:
            run.note(loss=round(sum(losses) / len(losses), 4), norm=round(norm, 3), factor=run.progress.factor())
            losses = []
        if first and now - saved > CHECKPOINT_SECONDS:
            run.save()
            saved = time.perf_counter()
    if first:
        run.save()


# ---- afterwards -----------------------------------------------------------------------------------------


@app.command()
def export(to: Path, out: Out = OUT) -> None:
    """Write the last checkpoint as a folder that transformers reads, in bfloat16."""
    model = new_model(seed=0)
    model.load_state_dict(torch.load(out / CHECKPOINT, weights_only=True)["model"])
    model.bfloat16().save_pretrained(to)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    tokenizer.save_pretrained(to)
    tokenizer.backend_tokenizer.save(str(to / "tokenizer.json"), pretty=False)  # one line, not one for each merge


@app.command()
def evaluate(
    model: Folder,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    plain: Annotated[bool, typer.Option(help="first write the text as people do")] = False,
) -> None:
    """Perplexity and bits per byte of a text; every token after the first half context sees as much before it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    text = written_out(text) if plain else text
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # the end token first
    nats = text_loss(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32), tokens)
    counts = {"tokens": len(tokens) - 1, "words": len(text.split()), "bytes": len(text.encode("utf-8"))}
    found = {
        "nats per token": nats / counts["tokens"],
        "perplexity per token": math.exp(nats / counts["tokens"]),
        "perplexity per word": math.exp(nats / counts["words"]),
        "bits per byte": nats / math.log(2) / counts["bytes"],
    }
    print(json.dumps(counts | {name: round(value, 4) for name, value in found.items()}))


def written_out(text: str) -> str:
    """WikiText, which sets spaces around every sign, as people write."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"\n]*) "', r'"\1"', text)
    text = re.sub(r" ([,.;:!?%)\]]|'\w+|n't)", r"\1", text)
    return re.sub(r"([(\[$£]) ", r"\1", text)


@torch.no_grad()
def text_loss(model: nn.Module, tokens: Tensor) -> float:
    """Summed loss in nats of all tokens [n] after the first, in windows of CONTEXT that overlap by half."""
    half, total = CONTEXT // 2, 0.0
    for start in range(0, max(1, len(tokens) - 1 - half), half):
        window = tokens[start : start + CONTEXT + 1]
        known = half if start else 0  # targets that the window before has counted
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, known:]
        total += float(F.cross_entropy(logits, window[known + 1 :], reduction="sum"))
    return total


if __name__ == "__main__":
    app()
