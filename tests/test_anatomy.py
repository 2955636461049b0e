"""What anatomy finds, against models that are run: roles, parts, groups, ties, sub-layers and targets."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from torch import Tensor, nn

from deltaworks.core.anatomy import KINDS, Anatomy, Place, anatomy
from deltaworks.core.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS: dict[str, Any] = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
NARROW: dict[str, Any] = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}

# families beyond those of tests/zoo.py
MORE: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    ),
    "opt-350m": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            do_layer_norm_before=False,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16, decoder_sparse_step=1)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**EXPERTS | {"head_dim": 8})),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**NARROW)),
    "deberta": lambda: hf.DebertaModel(hf.DebertaConfig(**SIZES)),
    "deberta-v2": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(**SIZES | {"position_buckets": 8}, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**SIZES, embedding_size=16)),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**SIZES, embedding_size=16)),
    "esm": lambda: hf.EsmForMaskedLM(hf.EsmConfig(**SIZES, mask_token_id=3)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)
    ),
    "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "bert-base": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**SEQ2SEQ)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**IMAGE, mlp_ratio=2)),
    "dinov2-swiglu": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**IMAGE, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**IMAGE, intermediate_size=64, vocab_size=64, layer_scale_init_value=0.0)
    ),
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZES)),
    "gpt1": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**GROUPED, head_dim=8)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=16)),
    "nomic": lambda: hf.NomicBertModel(hf.NomicBertConfig(**SIZES)),
    "torch-pre": lambda: TorchEncoder(norm_first=True),
    "torch-post": lambda: TorchEncoder(norm_first=False),
}
FAMILIES = [*zoo.ZOO, *MORE]


class TorchEncoder(nn.Module):
    """torch's own layers, whose dropouts are numbered and whose norm comes where they are told."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids)))


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and the inputs of one forward."""
    if name in zoo.ZOO:
        return zoo.ZOO[name]()
    torch.manual_seed(0)
    model = MORE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if name in ("dinov2", "dinov2-swiglu", "beit"):
        return model, {"pixel_values": torch.randn(2, 3, 8, 8)}
    inputs = {"input_ids": torch.randint(3, 64, (2, 7))}
    return model, inputs


def found(name: str) -> Anatomy:
    return anatomy(build(name)[0])


def counts(places: list[Place]) -> Counter[str]:
    return Counter(place.role for place in places)


def paths(places: list[Place]) -> list[str]:
    return [place.path for place in places]


# ---- roles ----------------------------------------------------------------------------------------------

QKVO = ("attention.q", "attention.k", "attention.v", "attention.o")
CROSS = ("cross_attention.q", "cross_attention.k", "cross_attention.v", "cross_attention.o")
GATED = ("mlp.gate", "mlp.up", "mlp.down")
PLAIN = ("mlp.up", "mlp.down")
NORMS = ("norm.attention", "norm.mlp")


def twice(*roles: str, **more: int) -> dict[str, int]:
    """Each role once in each of two blocks, and `more`, where "_" stands for "."."""
    return dict.fromkeys(roles, 2) | {role.replace("_", ".", 1): count for role, count in more.items()}


def four(*roles: str) -> dict[str, int]:
    return dict.fromkeys(roles, 4)


ONE_FINAL = {"norm.final": 1, "embedding.token": 1}
BERT_EMBEDDINGS = {"embedding.token": 1, "embedding.position": 1, "embedding.type": 1, "norm.embedding": 1}
FUSED = ("attention.qkv", "attention.q", "attention.k", "attention.v", "attention.o")
LLAMA = twice(*QKVO, *GATED, *NORMS) | ONE_FINAL | {"head": 1}
BERT = twice(*QKVO, *PLAIN, *NORMS) | BERT_EMBEDDINGS
SEQ2SEQ_ROLES = four(*QKVO, *PLAIN, *NORMS) | twice(*CROSS, "norm.cross_attention") | {"head": 1}

ROLES: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"norm.other": 4},
    "gemma": LLAMA,
    "gemma2": LLAMA | {"norm.attention": 4, "norm.mlp": 4},
    "phi3": twice(*FUSED, *GATED, "mlp.gate_up", *NORMS) | ONE_FINAL | {"head": 1},
    "gpt2": twice(*FUSED, *PLAIN, *NORMS) | ONE_FINAL | {"embedding.position": 1, "head": 1},
    "gpt-neox": twice("attention.qkv", "attention.o", *PLAIN, *NORMS) | ONE_FINAL | {"head": 1},
    "mixtral": twice(*QKVO, *NORMS, "mlp.router", "mlp.experts") | ONE_FINAL | {"head": 1},
    "qwen2-moe": twice(*QKVO, *GATED, *NORMS, "mlp.experts") | ONE_FINAL | {"mlp.router": 4, "head": 1},
    "qwen3-moe": twice(*QKVO, *NORMS, "mlp.router", "mlp.experts") | ONE_FINAL | {"norm.other": 4, "head": 1},
    "bert": BERT | {"pooler": 1, "head": 1},
    "bert-base": BERT | {"pooler": 1},
    "bert-mlm": BERT | {"head": 4},
    "roberta": BERT | {"head": 2},
    "distilbert": twice(*QKVO, *PLAIN, *NORMS)
    | {"embedding.token": 1, "embedding.position": 1, "norm.embedding": 1, "head": 2},
    "deberta": twice("attention.qkv", "attention.o", *PLAIN, *NORMS, "other")
    | {"embedding.token": 1, "embedding.position": 1, "norm.embedding": 1},
    "deberta-v2": twice(*QKVO, *PLAIN, *NORMS)
    | {"attention.position": 4, "embedding.token": 1, "embedding.position": 2, "norm.embedding": 1}
    | {"pooler": 1, "head": 1},
    "t5": SEQ2SEQ_ROLES | {"embedding.token": 3, "embedding.bias": 2, "norm.final": 2},
    "t5-gated": SEQ2SEQ_ROLES | {"mlp.gate": 4, "embedding.token": 3, "embedding.bias": 2, "norm.final": 2},
    "bart": SEQ2SEQ_ROLES | {"embedding.token": 3, "embedding.position": 2, "norm.embedding": 2},
    "whisper": SEQ2SEQ_ROLES | {"embedding.token": 1, "embedding.position": 2, "norm.final": 2, "other": 2},
    "vit": twice(*QKVO, *PLAIN, *NORMS) | {"embedding.position": 1, "embedding.patch": 1, "norm.final": 1, "head": 1},
    "dinov2": twice(*QKVO, *PLAIN, *NORMS, other=4)
    | {"embedding.position": 1, "embedding.patch": 1, "norm.final": 1, "head": 1},
    "clip": four(*QKVO, *PLAIN, *NORMS)
    | {"embedding.token": 2, "embedding.position": 2, "embedding.patch": 1}
    | {"norm.embedding": 1, "norm.final": 2, "head": 2, "other": 1},
    "plain": twice(*QKVO, *PLAIN, *NORMS) | {"norm.final": 1, "head": 1, "other": 1},
    "convnet": {"conv": 5, "norm.other": 4, "head": 1},
    "mlp": {"linear": 2, "head": 1},
}
WEIGHTED = ("linear", "conv1d", "conv2d", "embedding", "norm", "parameters")


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    weighted = [place for place in found(name).places if place.kind in WEIGHTED]
    assert counts(weighted) == ROLES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_one_place(name: str) -> None:
    model, _ = build(name)
    places = anatomy(model).places
    owners = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    whole = [place.path for place in places if place.kind in WEIGHTED and place.part is None]
    assert sorted(whole) == sorted(owners)
    assert {place.kind for place in places} <= set(KINDS)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    indices = [order[place.path] for place in places]
    assert indices == sorted(indices)


def test_sample_of_paths() -> None:
    bert, t5, gpt2 = found("bert"), found("t5"), found("gpt2")
    assert bert.blocks == {"": ["bert.encoder.layer.0", "bert.encoder.layer.1"]}
    assert paths(bert.select("attention.o@0")) == ["bert.encoder.layer.0.attention.output.dense"]
    assert paths(bert.select("mlp.down@1")) == ["bert.encoder.layer.1.output.dense"]
    assert t5.blocks["decoder"] == ["decoder.block.0", "decoder.block.1"]
    assert paths(t5.select("cross_attention.v@0")) == ["decoder.block.0.layer.1.EncDecAttention.v"]
    assert paths(t5.select("norm.mlp@0")) == [
        "encoder.block.0.layer.1.layer_norm",
        "decoder.block.0.layer.2.layer_norm",
    ]
    assert paths(gpt2.select("mlp.up")) == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert {place.kind for place in gpt2.select("linear")} == {"conv1d"}
    assert paths(found("whisper").select("decoder:mlp.up@0")) == ["model.decoder.layers.0.fc1"]
    assert paths(found("dinov2").select("embedding.patch")) == ["dinov2.embeddings.patch_embeddings.projection"]
    assert paths(found("plain").select("attention.o@0")) == ["stages.0.wo"]


@pytest.mark.parametrize(
    ("name", "trunks"),
    [
        ("llama", [("model", "")]),
        ("bert", [("bert", "")]),
        ("bert-base", [("", "")]),
        ("gpt2", [("transformer", "")]),
        ("t5", [("encoder", "encoder"), ("decoder", "decoder")]),
        ("bart", [("model.encoder", "encoder"), ("model.decoder", "decoder")]),
        ("whisper", [("model.encoder", "encoder"), ("model.decoder", "decoder")]),
        ("clip", [("text_model", "text"), ("vision_model", "vision")]),
        ("vit", [("vit", "")]),
        ("plain", []),
    ],
)
def test_trunks(name: str, trunks: list[tuple[str, str]]) -> None:
    places = [place for place in found(name).places if place.kind == "trunk"]
    assert [(place.path, place.stack) for place in places] == trunks


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama", "model.layers.0.self_attn"),
        ("bert", "bert.encoder.layer.0.attention.self"),
        ("t5", "encoder.block.0.layer.0.SelfAttention"),
        ("gpt2", "transformer.h.0.attn"),
        ("vit", "vit.layers.0.attention"),
    ],
)
def test_keyvalue(name: str, path: str) -> None:
    places = found(name).select("attention.kv", {"keyvalue"})
    assert places[0].path == path
    assert len(places) == (4 if name == "t5" else 2)


def test_keyvalue_needs_the_attention_interface() -> None:
    for name in ("bloom", "deberta", "torch-pre", "plain"):
        assert not [place for place in found(name).places if place.kind == "keyvalue"]
    assert len(found("t5").select("cross_attention.kv")) == 2


# ---- fused projections, groups, ties ---------------------------------------------------------------------


def test_parts_of_gpt2_are_thirds() -> None:
    spans = {place.role: place.part for place in found("gpt2").places if place.part and place.block == 0}
    assert spans == {"attention.q": (0, 32), "attention.k": (32, 64), "attention.v": (64, 96)}


def test_parts_of_grouped_queries_are_unequal() -> None:
    spans = {place.role: place.part for place in found("phi3").places if place.part and place.block == 1}
    assert spans == {
        "attention.q": (0, 32),
        "attention.k": (32, 48),
        "attention.v": (48, 64),
        "mlp.gate": (0, 64),
        "mlp.up": (64, 128),
    }


def test_parts_compute_what_the_model_computes() -> None:
    """The rows of `part` are the query: scaling those of q and k inversely leaves the output as it was."""
    for name in ("gpt2", "phi3"):
        model, inputs = build(name)
        before = model(**inputs).logits
        for place in anatomy(model).places:
            factor = {"attention.q": 2.0, "attention.k": 0.5}.get(place.role)
            if place.part is not None and factor is not None:
                layer = model.get_submodule(place.path)
                rows = slice(*place.part)
                assert isinstance(layer.weight, Tensor)
                weight = layer.weight.data.T if place.kind == "conv1d" else layer.weight.data
                weight[rows] *= factor
                if layer.bias is not None:
                    layer.bias.data[rows] *= factor  # type: ignore[index, operator]
        torch.testing.assert_close(model(**inputs).logits, before)


def test_interleaved_projections_have_no_parts() -> None:
    for name in ("gpt-neox", "bloom", "deberta"):
        places = found(name)
        assert not [place for place in places.places if place.part]
        with pytest.raises(UserError, match=r"fused into 'attention.qkv' and cannot be told apart"):
            places.select("attention.q")


def test_whole_or_part() -> None:
    gpt2 = found("gpt2")
    assert counts(gpt2.select("attention", {"conv1d"})) == {"attention.qkv": 2, "attention.o": 2}
    assert counts(gpt2.select("attention.[qv]")) == {"attention.q": 2, "attention.v": 2}
    assert counts(gpt2.select("attention.qkv")) == {"attention.qkv": 2}
    assert counts(gpt2.select(["attention.q", "linear"]))["attention.q"] == 0
    assert counts(found("llama").select("attention.qkv")) == twice("attention.q", "attention.k", "attention.v")


def test_groups() -> None:
    def names(name: str) -> Counter[tuple[str, ...]]:
        return Counter(tuple(sorted(place.role for place in group)) for group in found(name).groups())

    qkv, kv = ("attention.k", "attention.q", "attention.v"), ("cross_attention.k", "cross_attention.v")
    gated = ("mlp.gate", "mlp.up")
    assert names("llama") == {qkv: 2, gated: 2}
    assert names("bert") == {qkv: 2}
    assert names("t5-gated") == {qkv: 4, kv: 2, gated: 4}
    assert names("gpt2") == {}
    assert names("qwen2-moe") == {qkv: 2, gated: 2}


@pytest.mark.parametrize(
    "name", ["llama", "gpt-neox", "bert", "t5-gated", "bart", "whisper", "clip", "qwen2-moe", "plain"]
)
def test_groups_read_the_same_input(name: str) -> None:
    model, inputs = build(name)
    groups = anatomy(model).groups()
    seen: dict[str, Tensor] = {}
    for group in groups:
        for place in group:
            keep = lambda _, arguments, path=place.path: seen.__setitem__(path, arguments[0])  # noqa: E731
            model.get_submodule(place.path).register_forward_pre_hook(keep)
    model(**inputs)
    for group in groups:
        assert len({id(seen[place.path]) for place in group}) == 1


def test_tied() -> None:
    assert found("llama").tied == []
    assert found("qwen2").tied == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert found("gpt2").tied == [["transformer.wte.weight", "lm_head.weight"]]
    assert found("t5").tied == [
        ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    ]
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.data)  # another parameter over the same storage
    assert anatomy(nn.Sequential(first, second)).tied == [["0.weight", "1.weight"]]


# ---- sub-layers, verified by running the model -----------------------------------------------------------


def first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else next(item for item in value if isinstance(item, Tensor))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("convnet", "mlp")])
def test_sublayers_add_up(name: str) -> None:
    """Pre-norm: block output = block input + all exits. Post-norm: exit + residual is the input of `after_norm`.

    And the entry reads the output of a norm of the block (pre-norm) or the residual itself.
    """
    model, inputs = build(name)
    places = anatomy(model)
    sublayers = places.select("all", {"sublayer"})
    expected = 3 if name in ("t5", "t5-gated", "bart", "whisper", "mbart") else 2
    assert len({place.role for place in sublayers}) == expected
    given: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            given[path] = first_tensor((*arguments, *keywords.values()))
            gave[path] = first_tensor(output)

        return hook

    with torch.no_grad():
        for whole in places.select("block"):
            for path, module in model.get_submodule(whole.path).named_modules(prefix=whole.path):
                module.register_forward_hook(watch(path), with_kwargs=True)
        model(**inputs)
    blocks = {path: (stack, i) for stack, found in places.blocks.items() for i, path in enumerate(found)}
    for block, (stack, index) in blocks.items():
        own = [place for place in sublayers if (place.stack, place.block) == (stack, index)]
        assert sorted(place.role for place in own if place.role != "cross_attention") == ["attention", "mlp"]
        normed = [gave[path] for path in gave if path.startswith(block + ".") and "norm" in path.lower()]
        normed += [gave[path] for path in gave if path.startswith(block + ".") and ".ln_" in path]
        total = given[block]
        for place in own:
            entry = place.entry or place.path
            if place.after_norm:
                residual = given[entry].reshape(gave[place.path].shape)
                summed = given[place.after_norm].reshape(residual.shape)
                torch.testing.assert_close(summed, gave[place.path] + residual)
            else:
                total = total + gave[place.path].reshape(total.shape)
                # no norm stands before the first attention of ModernBERT, and before none of OLMo 2
                bare = [given[entry]] if name in ("modernbert", "olmo2") else []
                assert any(torch.equal(other, given[entry]) for other in normed + bare)
        if not any(place.after_norm for place in own):
            torch.testing.assert_close(gave[block].reshape(total.shape), total)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "t5", "vit", "dinov2", "mixtral", "bloom", "gpt-neox", "gemma2", "whisper"]
)
def test_a_block_without_its_sublayers_is_the_identity(name: str) -> None:
    model, inputs = build(name)
    places = anatomy(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def zero(_: nn.Module, __: Any, output: Any) -> Any:
        return torch.zeros_like(output) if isinstance(output, Tensor) else (output[0] * 0, *output[1:])

    for place in places.select("all", {"sublayer"}):
        model.get_submodule(place.path).register_forward_hook(zero)
    for place in places.select("block"):
        keep = lambda _, given, output: seen.append((first_tensor(given), first_tensor(output)))  # noqa: E731
        model.get_submodule(place.path).register_forward_hook(keep)
    model(**inputs)
    assert seen
    for given, output in seen:
        torch.testing.assert_close(output, given)


def test_sublayers_of_bert() -> None:
    attention, mlp = found("bert").select("attention@0,mlp@0", {"sublayer"})
    layer = "bert.encoder.layer.0."
    assert (attention.path, attention.entry, attention.after_norm) == (
        layer + "attention.output.dropout",
        layer + "attention.self",
        layer + "attention.output.LayerNorm",
    )
    assert (mlp.path, mlp.entry, mlp.after_norm) == (
        layer + "output.dropout",
        layer + "intermediate",
        layer + "output.LayerNorm",
    )


def test_sublayers_of_other_families() -> None:
    def exits(name: str, targets: str) -> list[tuple[str, str | None, str | None]]:
        places = found(name).select(targets, {"sublayer"})
        return [(place.path, place.entry, place.after_norm) for place in places]

    assert exits("llama", "mlp@0") == [("model.layers.0.mlp", None, None)]
    assert exits("vit", "attention@0") == [("vit.layers.0.attention", None, None)]
    assert exits("gpt2", "attention@1") == [("transformer.h.1.attn", None, None)]
    layer = "decoder.block.0.layer."
    assert exits("t5", "decoder:cross_attention@0") == [(layer + "1.dropout", layer + "1.EncDecAttention", None)]
    assert exits("t5", "decoder:mlp@0") == [(layer + "2.dropout", layer + "2.DenseReluDense", None)]
    layer = "model.decoder.layers.0."
    assert exits("whisper", "decoder:mlp@0") == [(layer + "fc2", layer + "fc1", None)]
    assert exits("bart", "decoder:mlp@0") == [(layer + "fc2", layer + "fc1", layer + "final_layer_norm")]
    assert exits("bart", "decoder:cross_attention@0") == [
        (layer + "encoder_attn", None, layer + "encoder_attn_layer_norm")
    ]


# ---- targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama", "attention.q", {"attention.q": 2}),
        ("llama", "attention.[qv]", {"attention.q": 2, "attention.v": 2}),
        ("llama", "mlp.*", {"mlp.gate": 2, "mlp.up": 2, "mlp.down": 2}),
        ("llama", "attention.q, mlp.up", {"attention.q": 2, "mlp.up": 2}),
        ("llama", ["attention.q", "q_proj"], {"attention.q": 2}),
        ("llama", "linear", twice(*QKVO, *GATED)),
        ("llama", "linear@0", dict.fromkeys((*QKVO, *GATED), 1)),
        ("llama", "head", {"head": 1}),
        ("llama", "q_proj,v_proj", {"attention.q": 2, "attention.v": 2}),
        ("llama", "*.q_proj", {"attention.q": 2}),
        ("llama", "model.layers.*.mlp.up_proj", {"mlp.up": 2}),
        ("llama", "self_attn.o_proj@-1", {"attention.o": 1}),
        ("llama", r"re:model\.layers\.[0-9]{1,2}\.mlp\.(up|down)_proj", {"mlp.up": 2, "mlp.down": 2}),
        ("llama", "attention.q@0-1", {"attention.q": 2}),
        ("llama", "attention.q@-2--1", {"attention.q": 2}),
        ("llama", "norm", {"norm.attention": 2, "norm.mlp": 2, "norm.final": 1}),
        ("t5", "decoder:attention.q", {"attention.q": 2}),
        ("t5", "decoder:attention.q@-1", {"attention.q": 1}),
        ("t5", "decoder:linear@0", dict.fromkeys((*QKVO, *CROSS, *PLAIN), 1)),
        ("bert", "output.dense", {"attention.o": 2, "mlp.down": 2}),
        ("mlp", "linear", {"linear": 2}),
        ("mlp", "head", {"head": 1}),
    ],
)
def test_select(name: str, targets: str | list[str], expected: dict[str, int]) -> None:
    assert counts(found(name).select(targets, kinds=WEIGHTED)) == expected


def test_select_all_is_every_place() -> None:
    for name in FAMILIES:
        places = found(name)
        assert places.select("all") == [place for place in places.places if place.part is None]


def test_select_keeps_model_order_and_kinds() -> None:
    llama = found("llama")
    assert llama.select("mlp,attention.q") == llama.select("attention.q,mlp")
    assert {place.kind for place in llama.select("attention")} == {"linear", "sublayer", "keyvalue"}
    assert paths(llama.select("attention", {"sublayer"})) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert paths(llama.select("block")) == llama.blocks[""]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("attention.x", r"target 'attention.x' matches nothing in LlamaForCausalLM: did you mean 'attention\.\w+'"),
        ("q_prj", r"target 'q_prj' .*did you mean 'q_proj'"),
        ("attention.q,mpl.up", r"target 'mpl.up' .*'mlp.up'"),
        ("attention.q@7", r"target 'attention.q@7' .*it has blocks 0-1"),
        ("decoder:attention.q", r"it has one stack of blocks"),
        ("re:q_proj", r"target 're:q_proj' .*must match a whole path"),
        ("re:(", r"is not a regular expression"),
        ("mlp@x", r"cannot be read"),
        ("", r"no target is given"),
        ([], r"no target is given"),
    ],
)
def test_errors_name_the_item_and_the_nearest(targets: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        found("llama").select(targets)


def test_error_of_stack_and_of_kind() -> None:
    with pytest.raises(UserError, match=r"target 'decodr:mlp' .*did you mean 'decoder'"):
        found("t5").select("decodr:mlp")
    with pytest.raises(UserError, match=r"target 'encoder:cross_attention' .*: only 'decoder' has it"):
        found("t5").select("encoder:cross_attention")
    with pytest.raises(UserError, match=r"target 'linear' .*in ConvNet: it has no linear layer in its blocks"):
        found("convnet").select("linear")
    with pytest.raises(UserError, match=r"'norm' matches only places of kind norm .*but kind conv1d or linear"):
        found("llama").select("norm", {"linear", "conv1d"})


# ---- models that no table knows; meta device; the printed tree -------------------------------------------


def test_unknown_names_are_told_by_shape() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_att = nn.ModuleDict({"first": nn.Linear(8, 24), "mix": nn.Linear(8, 8)})
            self.widen, self.same, self.shrink = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Block(), Block(), Block()), nn.Linear(8, 2))
    places = anatomy(model)
    assert places.blocks == {"": ["1.0", "1.1", "1.2"]}
    assert [
        (place.path, place.role) for place in places.places if place.kind == "linear" and place.block in (None, 0)
    ] == [
        ("0", "other"),
        ("1.0.my_att.first", "attention.qkv"),
        ("1.0.my_att.mix", "attention.other"),
        ("1.0.widen", "mlp.up"),
        ("1.0.same", "linear"),
        ("1.0.shrink", "mlp.down"),
        ("2", "head"),
    ]
    assert len(places.select("linear")) == 15


def test_multihead_attention_is_never_a_linear() -> None:
    """torch reads the weight of `out_proj` without calling it, so nothing that stands around it would run."""
    places = found("torch-post").select("attention", WEIGHTED)
    assert {(place.role, place.kind) for place in places} == {
        ("attention.qkv", "parameters"),
        ("attention.o", "parameters"),
    }


def test_decoders_with_cross_attention() -> None:
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    gpt2 = anatomy(hf.GPT2LMHeadModel(config))
    assert {place.role: place.part for place in gpt2.select("cross_attention.[qkv]@0")} == {
        "cross_attention.q": None,
        "cross_attention.k": (0, 32),
        "cross_attention.v": (32, 64),
    }
    assert paths(gpt2.select("norm.cross_attention@0")) == ["transformer.h.0.ln_cross_attn"]
    decoder = hf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    (cross,) = anatomy(hf.BertLMHeadModel(decoder)).select("cross_attention@1", {"sublayer"})
    layer = "bert.encoder.layer.1.crossattention."
    assert (cross.path, cross.entry, cross.after_norm) == (
        layer + "output.dropout",
        layer + "self",
        layer + "output.LayerNorm",
    )


def test_hybrids_and_hierarchies() -> None:
    mamba = hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    places = anatomy(hf.MambaForCausalLM(mamba))
    assert paths(places.select("all", {"sublayer"})) == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]
    assert len(places.select("linear")) == 8
    swin = hf.SwinConfig(image_size=8, patch_size=1, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=2)
    places = anatomy(hf.SwinForImageClassification(swin))
    assert places.blocks[""][2] == "swin.encoder.layers.1.blocks.0"
    assert paths(places.select("attention.q@2")) == ["swin.encoder.layers.1.blocks.0.attention.q_proj"]
    assert paths(places.select("head")) == ["classifier"]
    convnext = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=8, patch_size=1)
    places = anatomy(hf.ConvNextForImageClassification(convnext))
    assert len(places.blocks[""]) == 4
    assert counts(places.select("linear")) == {"mlp.up": 4, "mlp.down": 4}


def test_stacks_of_a_vision_language_model() -> None:
    vision = IMAGE | {"model_type": "clip_vision_model", "intermediate_size": 64}
    config = hf.LlavaConfig(text_config=GROUPED | {"model_type": "llama"}, vision_config=vision, image_token_index=63)
    llava = anatomy(hf.LlavaForConditionalGeneration(config))
    assert list(llava.blocks) == ["vision", "text"]
    assert paths(llava.select("text:mlp.up@-1")) == ["model.language_model.layers.1.mlp.up_proj"]
    assert paths(llava.select("trunk")) == ["model.vision_tower", "model.language_model"]


def test_one_block_is_a_stack() -> None:
    config = hf.LlamaConfig(**GROUPED | {"num_hidden_layers": 1})
    assert anatomy(hf.LlamaForCausalLM(config)).blocks == {"": ["model.layers.0"]}


def test_seven_billion_parameters_on_meta() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig())
    places = anatomy(model)
    assert len(places.select("linear")) == 7 * 32
    tree = str(places)
    assert "layers.0-31" in tree
    assert "32 x LlamaDecoderLayer" in tree
    assert tree.splitlines()[0].split() == ["LlamaForCausalLM", "6,738,415,616"]


@pytest.mark.parametrize("name", FAMILIES)
def test_tree_names_every_role(name: str) -> None:
    model, _ = build(name)
    places = anatomy(model)
    tree = str(places)
    for place in places.places:
        assert (place.role if place.part is None else "{}[{}:{}]".format(place.role[-1], *place.part)) in tree
    assert len({len(line) for line in tree.splitlines() if not line.startswith("tied")}) == 1
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in tree.splitlines()[0]
