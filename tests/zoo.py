"""Models for the tests, built from configurations: nothing is downloaded.

``ZOO`` holds tiny models that run in milliseconds, one for each family the library knows and three that it
was told nothing about. ``real`` builds the published shapes on the meta device: sizes without storage.
"""

from collections.abc import Callable
from functools import wraps
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf  # its names load when used
from torch import Tensor, nn

Inputs = dict[str, Any]
"""The keyword arguments of one forward."""

BATCH, LENGTH, VOCABULARY, CLASSES = 3, 10, 64, 4
WIDTH, HEADS, LAYERS, HIDDEN = 32, 4, 2, 64  # a head is 8 wide
PAD = 0

Build = Callable[[], tuple[nn.Module, Inputs]]

ZOO: dict[str, Build] = {}
"""Name -> a function that builds a fresh ``(model.eval(), inputs)``, the same values at each call."""

UNTOLD = ("plain", "convnet", "mlp")
"""The members of ``ZOO`` that are not from transformers: known to the library by their structure only."""


def seeded(build: Build) -> Build:
    """The same model on every call: its weights and inputs depend on nothing else."""

    @wraps(build)
    def made() -> tuple[nn.Module, Inputs]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = build()
            spread(model)
        return model.eval(), inputs

    return made


def _member(name: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        ZOO[name] = seeded(build)
        return ZOO[name]

    return register


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Values of the size a trained model has.

    The usual initialization (weights near 0, biases 0, norms 1) makes outputs so small and so uniform that
    a wrong merge or a forgotten bias would hide below any tolerance.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.ndim == 0:
            continue  # sinusoidal positions; CLIP's temperature
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        else:
            parameter.normal_(std=1 / sqrt(prod(parameter.shape[1:])))


def loss_of(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """The scalar that the model is trained on: its own loss, or the cross-entropy of fixed labels."""
    if name not in UNTOLD:
        return model(**inputs).loss
    logits = model(**inputs)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % CLASSES)


def output_of(name: str, model: nn.Module, inputs: Inputs) -> Tensor:
    """The main output: logits, or for CLIP the text and image embeddings ``[2 * batch, width]``."""
    output = model(**inputs)
    if name in UNTOLD:
        return output
    if name == "clip":
        return torch.cat([output.text_embeds, output.image_embeds])
    return output.logits


def _tokens(length: int = LENGTH) -> Inputs:
    """Token ids ``[batch, length]``; the last row ends in padding. 0, 1 and 2 are special."""
    ids = torch.randint(3, VOCABULARY, (BATCH, length))
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def _labels(length: int = LENGTH) -> Tensor:
    """Target token ids ``[batch, length]``; -100 is ignored by the loss."""
    labels = torch.randint(3, VOCABULARY, (BATCH, length))
    labels[-1, -2:] = -100
    return labels


def language() -> Inputs:
    tokens = _tokens()
    return tokens | {"labels": tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)}


def _classification() -> Inputs:
    return _tokens() | {"labels": torch.arange(BATCH) % CLASSES}


def _images(size: int = 8) -> Tensor:
    return torch.randn(BATCH, 3, size, size)


# Decoders -----------------------------------------------------------------------------------------------

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@_member("llama")
def llama() -> tuple[nn.Module, Inputs]:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), language()


@_member("mistral")
def mistral() -> tuple[nn.Module, Inputs]:
    """The window is shorter than the sequence, so that it matters."""
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=6)), language()


@_member("qwen2")
def qwen2() -> tuple[nn.Module, Inputs]:
    """Biases on q, k and v; the output head is tied to the embedding."""
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER | {"tie_word_embeddings": True})), language()


@_member("gpt2")
def gpt2() -> tuple[nn.Module, Inputs]:
    """Conv1D layers, q, k and v in one; the output head is tied to the embedding."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=HIDDEN,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.GPT2LMHeadModel(config)
    # it cannot be read from the class name, and the warning about it breaks a full-graph compilation
    model.loss_type = "ForCausalLM"
    return model, language()


# Encoders -----------------------------------------------------------------------------------------------

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
    "num_labels": CLASSES,
}


@_member("bert")
def bert() -> tuple[nn.Module, Inputs]:
    return hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER)), _classification()


@_member("roberta")
def roberta() -> tuple[nn.Module, Inputs]:
    config = hf.RobertaConfig(**_ENCODER, type_vocab_size=1)
    return hf.RobertaForSequenceClassification(config), _classification()


# Encoder-decoders ---------------------------------------------------------------------------------------


def _t5(**changes: Any) -> tuple[nn.Module, Inputs]:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=1,
        decoder_start_token_id=PAD,
        **changes,
    )
    return hf.T5ForConditionalGeneration(config), _tokens() | {"labels": _labels(7)}


@_member("t5")
def t5() -> tuple[nn.Module, Inputs]:
    """Version 1.0: a ReLU between two matrices; the output head is tied to the embedding."""
    return _t5(feed_forward_proj="relu")


@_member("t5-gated")
def t5_gated() -> tuple[nn.Module, Inputs]:
    """Version 1.1: a gated GELU; an output head of its own."""
    return _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


@_member("bart")
def bart() -> tuple[nn.Module, Inputs]:
    config = hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return hf.BartForConditionalGeneration(config), _tokens() | {"labels": _labels(7)}


# Images and sound ---------------------------------------------------------------------------------------


@_member("vit")
def vit() -> tuple[nn.Module, Inputs]:
    config = hf.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    inputs = {"pixel_values": _images(), "labels": torch.arange(BATCH) % CLASSES}
    return hf.ViTForImageClassification(config), inputs


@_member("clip")
def clip() -> tuple[nn.Module, Inputs]:
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_dropout": 0.0,
    }
    text = tower | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = hf.CLIPConfig(
        text_config=text,
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    tokens = _tokens()
    last = tokens["attention_mask"].sum(-1, keepdim=True) - 1
    tokens["input_ids"].scatter_(1, last, 2)  # the embedding of a text is read at its end token
    return hf.CLIPModel(config), tokens | {"pixel_values": _images(), "return_loss": True}


@_member("whisper")
def whisper() -> tuple[nn.Module, Inputs]:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        num_mel_bins=8,
        max_source_positions=LENGTH,
        max_target_positions=64,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    inputs = {"input_features": torch.randn(BATCH, 8, 2 * LENGTH), "labels": _labels(7)}
    return hf.WhisperForConditionalGeneration(config), inputs


# Models that nobody told the library about --------------------------------------------------------------


class PlainBlock(nn.Module):
    """One head of attention and a two-layer feed-forward, each under its own residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))
        self.norm_mid = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width]
        y = self.norm_in(x)
        x = x + self.wo(F.scaled_dot_product_attention(self.wq(y), self.wk(y), self.wv(y)))
        return x + self.contract(F.gelu(self.expand(self.norm_mid(x))))


class Plain(nn.Module):
    """A transformer whose names no table holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, WIDTH)
        self.stages = nn.ModuleList(PlainBlock(WIDTH, HIDDEN) for _ in range(LAYERS))
        self.final = nn.LayerNorm(WIDTH)
        self.readout = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, 12] -> [batch, classes]
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.readout(self.final(x).mean(1))


class ConvBlock(nn.Module):
    """Two 3x3 convolutions under a residual, the second one grouped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:  # [batch, width, height, width of the image]
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm(x))))))


class ConvNet(nn.Module):
    """A small residual network; the stem has a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(WIDTH) for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 3, height, width] -> [batch, classes]
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


@_member("plain")
def plain() -> tuple[nn.Module, Inputs]:
    return Plain(), {"x": torch.randn(BATCH, LENGTH, 12)}


@_member("convnet")
def convnet() -> tuple[nn.Module, Inputs]:
    return ConvNet(), {"x": _images()}


@_member("mlp")
def mlp() -> tuple[nn.Module, Inputs]:
    layers = [nn.Linear(12, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
    return nn.Sequential(*layers), {"input": torch.randn(BATCH, 12)}


# Published shapes ---------------------------------------------------------------------------------------


def _real_bert(layers: int, width: int, heads: int) -> nn.Module:
    config = hf.BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width
    )
    return hf.BertModel(config)


def _real_t5(width: int, hidden: int, head: int, heads: int, layers: int) -> nn.Module:
    config = hf.T5Config(d_model=width, d_ff=hidden, d_kv=head, num_heads=heads, num_layers=layers)
    return hf.T5ForConditionalGeneration(config)


def _real_llama(layers: int, width: int, hidden: int, heads: int, **changes: Any) -> nn.Module:
    config = hf.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=heads,
        **changes,
    )
    return hf.LlamaForCausalLM(config)


def _real_gpt2(layers: int, width: int, heads: int, positions: int) -> nn.Module:
    config = hf.GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=positions)
    return hf.GPT2LMHeadModel(config)


def _real_roberta() -> nn.Module:
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return hf.RobertaModel(config)


_REAL: dict[str, Callable[[], nn.Module]] = {
    "roberta-base": _real_roberta,
    "bert-base": lambda: _real_bert(12, 768, 12),
    "bert-large": lambda: _real_bert(24, 1024, 16),
    "deberta-v3-base": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(
            vocab_size=128100,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        )
    ),
    "t5-base": lambda: _real_t5(768, 3072, 64, 12, 12),
    "t5-large": lambda: _real_t5(1024, 4096, 64, 16, 24),
    "t5-3b": lambda: _real_t5(1024, 16384, 128, 32, 24),
    "t5-11b": lambda: _real_t5(1024, 65536, 128, 128, 24),
    "bart-large": lambda: hf.BartModel(hf.BartConfig()),
    "llama-7b": lambda: _real_llama(32, 4096, 11008, 32),
    "llama3-8b": lambda: _real_llama(32, 4096, 14336, 32, num_key_value_heads=8, vocab_size=128256),
    "llama-3.2-3b": lambda: _real_llama(
        28, 3072, 8192, 24, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True
    ),
    "gpt2-medium": lambda: _real_gpt2(24, 1024, 16, 1024),
    "gpt3": lambda: _real_gpt2(96, 12288, 96, 2048),
}

REAL = tuple(_REAL)
"""The names that ``real`` knows."""


def real(name: str) -> nn.Module:
    """A fresh model of the published shape on the meta device: encoders bare, the others with their LM head.

    BART is bare too, as it is counted in the literature.
    """
    with torch.device("meta"):
        return _REAL[name]().eval()
