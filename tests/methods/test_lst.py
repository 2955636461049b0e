"""Ladder side-tuning: the published count, gates, the structural start, nothing through the backbone."""

from typing import Any

import pytest
import torch
import zoo
from conformance import difference, disturb
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.forms import Tokens
from deltaworks.methods.additive.side.lst import LSTTuner, Rung


def count(delta: dw.Delta) -> int:
    return sum(parameter.numel() for parameter in delta.parameters())


def tuner_of(delta: dw.Delta, which: int = 0) -> LSTTuner:
    tuner = delta.attached[which].tuner
    assert isinstance(tuner, LSTTuner)
    return tuner


def rungs(tuner: LSTTuner) -> list[Rung]:
    return [module for module in tuner.modules() if isinstance(module, Rung)]


def test_count_of_the_paper() -> None:
    delta = dw.attach(zoo.real("t5-base"), "lst", reduction=8, drop="0 4 8")
    assert count(delta) == 3_878_706
    encoder, decoder = tuner_of(delta, 0), tuner_of(delta, 1)
    for tuner, block in ((encoder, 110_784), (decoder, 147_744)):
        assert len(rungs(tuner)) == 9
        bias = 32 * 12  # relative positions, in the first block
        sizes = [sum(p.numel() for p in rung.parameters()) for rung in rungs(tuner)]
        assert sizes == [block + 1 + 73_824 + bias] + [block + 1 + 73_824] * 8
    assert encoder.up is None
    assert sum(p.numel() for p in decoder.up.parameters()) == 74_496


@pytest.mark.parametrize(
    ("name", "drop", "width"),
    [("t5-large", "1 3 5 7 9 11 13 15 17 19 21 23", 128), ("t5-3b", "23", 128), ("t5-11b", "", 128)],
)
def test_counts_of_larger_models(name: str, drop: str, width: int) -> None:
    """d = 1024, d_s = 128; inner width of a head's group and of the feed-forward layer divided by 8."""
    model = zoo.real(name)
    delta = dw.attach(model, "lst", drop=drop)
    config, kept = model.config, 24 - len(drop.split())
    inner, hidden = config.num_heads * config.d_kv // 8, config.d_ff // 8
    down, norm, attention, feed = 1024 * width + width, width, 4 * width * inner, 2 * width * hidden
    expected = kept * (attention + feed + 2 * norm + 1 + down) + kept * (2 * attention + feed + 3 * norm + 1 + down)
    expected += 2 * (down + norm + 32 * config.num_heads) + 1024 * width + 1024
    assert count(delta) == expected


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bert", "roberta", "bart", "qwen2"])
def test_nothing_flows_back_through_the_backbone(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    delta = dw.attach(model, "lst", reduction=2)
    seen: list[str] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                seen.append(path)

        return hook

    blocks = [path for paths in delta.anatomy.blocks.values() for path in paths]
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules():
            module.register_forward_hook(watch(f"{block}.{path}"))
    model.get_input_embeddings().register_forward_hook(lambda *values: values[2].requires_grad_(True))
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *values: embedded.append(values[2]))
    zoo.loss_of(name, model, inputs).backward()
    assert not seen
    assert all(tensor.grad is None for tensor in embedded if tensor.is_leaf)
    trained = {id(parameter) for parameter in delta.parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in trained) for parameter in model.parameters())


def saved_bytes(depth: int) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **options))
    dw.attach(model, "lst", drop=" ".join(str(block) for block in range(1, depth)))
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(60).view(2, 30), labels=torch.arange(60).view(2, 30)).loss
    loss.backward()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_the_backward_pass_keeps_nothing_of_deeper_backbones() -> None:
    assert saved_bytes(6) == saved_bytes(2)


def test_gates() -> None:
    """mu starts at 1/2; large gates ignore the backbone after D_0; small ones give D_l h_l alone."""
    model, inputs = zoo.ZOO["llama"]()
    tuner = tuner_of(dw.attach(model, "lst", reduction=2))
    read: dict[int, Tensor] = {}
    for number, rung in enumerate(rungs(tuner)):
        assert torch.sigmoid(rung.gate / rung.temperature).item() == 0.5
        rung.block.register_forward_pre_hook(lambda _, args, number=number: read.update({number: args[0]}))
    first, second = rungs(tuner)
    zoo.output_of("llama", model, inputs)
    start = tuner.start(tuner.first.value)
    torch.testing.assert_close(read[0], (start + first.down(first.tap.value)) / 2)
    with torch.no_grad():
        first.gate.fill_(50.0)
        second.gate.fill_(-50.0)
    zoo.output_of("llama", model, inputs)
    torch.testing.assert_close(read[0], start)
    torch.testing.assert_close(read[1], second.down(second.tap.value))


def test_cached_activations_of_the_backbone_give_the_same_output() -> None:
    model, inputs = zoo.ZOO["llama"]()
    tuner = tuner_of(dw.attach(model, "lst", reduction=2))
    calls: list[tuple[Tokens, Tensor]] = []
    tuner.register_forward_hook(lambda *_: None)
    plain = tuner.around
    tuner.around = lambda base, x: calls.append((x, plain(base, x))) or calls[-1][1]  # type: ignore[method-assign]
    zoo.output_of("llama", model, inputs)
    tokens, expected = calls[0]
    # the taps still hold the activations: the backbone itself is not asked again
    again = plain(lambda _: torch.zeros_like(expected), tokens)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "t5-gated", "llama", "gpt2", "bert", "bart", "qwen2"])
def test_without_reduction_the_side_blocks_are_those_of_the_backbone(name: str) -> None:
    model, _ = zoo.ZOO[name]()
    delta = dw.attach(model, "lst", reduction=1)
    compared = 0
    for item in delta.attached:
        for path, rung in zip(delta.anatomy.blocks[item.place.stack], rungs(item.tuner), strict=True):
            block = dict(model.get_submodule(path).named_parameters())
            for key, value in rung.block.named_parameters():
                assert torch.equal(value, block[key]), key
                compared += 1
    assert compared > 10


def test_the_thin_copy_is_cut_out_of_the_backbone() -> None:
    """Rows and columns of every side matrix are those of one set of features."""
    model, _ = zoo.ZOO["llama"]()
    tuner = tuner_of(dw.attach(model, "lst", reduction=2, drop="0"))
    (rung,) = rungs(tuner)
    whole, thin = model.model.layers[1].mlp, rung.block.mlp
    columns = [
        j
        for j in range(32)
        if any(torch.isin(thin.up_proj.weight[:, i], whole.up_proj.weight[:, j]).all() for i in range(16))
    ]
    assert len(columns) == 16
    energy = sum(
        (
            part.weight.square().sum(
                0 if part.weight.shape[1] == 32 and name.split(".")[-1] not in ("o_proj", "down_proj") else 1
            )
        )
        for layer in model.model.layers
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear)
    )
    assert columns == energy.topk(16).indices.sort().values.tolist()


def test_dropped_blocks_own_nothing() -> None:
    model, _ = zoo.ZOO["t5"]()
    sizes = {drop: count(dw.attach(zoo.ZOO["t5"]()[0], "lst", reduction=2, drop=drop)) for drop in ("", "0", "1")}
    assert sizes["0"] == sizes["1"] < sizes[""]
    with pytest.raises(dw.UserError, match="names '2', but the blocks are 0 to 1"):
        dw.attach(model, "lst", drop="2")
    with pytest.raises(dw.UserError, match="leaves no side block"):
        dw.attach(model, "lst", drop="0 1")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bart"])
def test_generates_with_the_cache_of_the_backbone(name: str, beams: int) -> None:
    model, inputs = zoo.ZOO[name]()
    disturb(dw.attach(model, "lst", reduction=2))
    prompt = {"input_ids": inputs["input_ids"][:2], "attention_mask": inputs["attention_mask"][:2]}
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "pad_token_id": 0}
    cached, plain = (model.generate(**prompt, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_cache_filled_without_the_side_network_is_refused() -> None:
    from transformers import DynamicCache

    model, inputs = zoo.ZOO["llama"]()
    delta = dw.attach(model, "lst", reduction=2)
    cache = DynamicCache()
    with delta.disabled():
        model(input_ids=inputs["input_ids"], past_key_values=cache)
    with pytest.raises(dw.UserError, match="filled without the side network"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)


def test_a_decoder_without_its_encoder_is_refused() -> None:
    model, inputs = zoo.ZOO["t5"]()
    delta = dw.attach(model, "lst", reduction=2)
    with delta.disabled():
        encoded = model.get_encoder()(inputs["input_ids"])
    with pytest.raises(dw.UserError, match="needs the encoder run"):
        model(encoder_outputs=encoded, labels=inputs["labels"])


def test_the_start_depends_on_the_seed_alone() -> None:
    outputs = []
    for manual, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(manual)
        model, inputs = zoo.ZOO["bert"]()
        dw.attach(model, "lst", reduction=2, seed=seed)
        outputs.append(zoo.output_of("bert", model, inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert difference(outputs[1], outputs[2]) > 1e-3
