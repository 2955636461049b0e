"""Prompt tuning against real tokens, and the positions of virtual tokens in padded batches."""

import pytest
import torch
import zoo
from torch import Tensor

import deltaworks as dw

TOKENS = torch.tensor([5, 9, 11])
DECODERS = ("llama", "mistral", "qwen2", "gpt2")
ENCODER_DECODERS = ("t5", "t5-gated", "bart")


def left_padded(inputs: zoo.Inputs) -> tuple[Tensor, Tensor]:
    """The ids and the mask with the padding of each row in front."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    shifts = (mask == 0).sum(1).tolist()
    rows = [(torch.roll(i, n), torch.roll(m, n)) for i, m, n in zip(ids, mask, shifts, strict=True)]
    return torch.stack([row for row, _ in rows]), torch.stack([row for _, row in rows])


def with_tokens(name: str, attention: str = "sdpa") -> tuple[torch.nn.Module, zoo.Inputs, dw.Delta]:
    """A model whose prompt holds the embeddings of TOKENS."""
    model, inputs = zoo.ZOO[name]()
    model.set_attn_implementation(attention)
    delta = dw.attach(model, "prompt", length=3)
    trunk = model.get_submodule(delta.attached[0].place.path)
    with torch.no_grad():
        delta.parameters()[0].copy_(trunk.get_input_embeddings()(TOKENS))
    return model, inputs, delta


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS, "bert", "roberta"])
@torch.no_grad()
def test_real_embeddings_equal_real_tokens_in_padded_batches(name: str, side: str, attention: str) -> None:
    """Checks 1, 3, 5: every padded row equals a single run on its text with the tokens written out."""
    if side == "left" and name in ("bert", "roberta", "bart"):
        pytest.skip("its base itself answers differently to text behind padding: positions count from the left")
    model, inputs, delta = with_tokens(name, attention)
    ids, mask = left_padded(inputs) if side == "left" else (inputs["input_ids"], inputs["attention_mask"])
    rest = {"decoder_input_ids": inputs["labels"].clamp(min=0)} if name in ENCODER_DECODERS else {}
    outputs = model(input_ids=ids, attention_mask=mask, **rest).logits
    at = 1 if name in ("bert", "roberta") else 0  # their first token is pooled
    for row in range(zoo.BATCH):
        text = ids[row][mask[row].bool()]
        tokens = torch.cat([text[:at], TOKENS, text[at:]])[None]
        with delta.disabled():
            single = model(input_ids=tokens, **{key: value[row : row + 1] for key, value in rest.items()}).logits[0]
        output = outputs[row]
        if name in DECODERS:
            output, single = output[mask[row].bool()], single[len(TOKENS) :]
        torch.testing.assert_close(output, single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model, inputs, _ = with_tokens(name)
    ids, mask = left_padded(inputs)
    words = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    words |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": 63}
    cached, plain = (model.generate(**words, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)


def test_prompt_of_length_zero_is_the_base() -> None:
    for name in ("llama", "roberta", "t5"):
        model, inputs = zoo.ZOO[name]()
        before = zoo.output_of(name, model, inputs)
        dw.attach(model, "prompt", length=0)
        torch.testing.assert_close(zoo.output_of(name, model, inputs), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "length", "count"),
    [
        ("t5-large", 20, 20_480),
        ("t5-3b", 20, 20_480),
        ("t5-11b", 20, 20_480),
        ("llama-3.2-3b", 200, 614_400),
        ("llama-7b", 5, 20_480),
        ("llama-7b", 100, 409_600),
    ],
)
def test_counts(name: str, length: int, count: int) -> None:
    """P d; d = 4096 stands for T5-XXL too."""
    delta = dw.attach(zoo.real(name), "prompt", length=length)
    assert sum(parameter.numel() for parameter in delta.parameters()) == count


def test_the_embedding_table_has_no_gradient() -> None:
    model, inputs = zoo.ZOO["gpt2"]()  # tied to the output head
    delta = dw.attach(model, "prompt", length=3)
    zoo.loss_of("gpt2", model, inputs).backward()
    assert delta.parameters()[0].grad.abs().min() > 0
    assert model.get_input_embeddings().weight.grad is None


@torch.no_grad()
def test_the_order_of_the_rows_matters() -> None:
    for name in ("gpt2", "llama", "t5", "bert"):
        model, inputs, delta = with_tokens(name)
        before = zoo.output_of(name, model, inputs)
        delta.parameters()[0].copy_(delta.parameters()[0].flip(0))
        assert (zoo.output_of(name, model, inputs) - before).abs().max() > 1e-3


def test_initial_rows() -> None:
    model, _ = zoo.ZOO["llama"]()
    table = model.get_input_embeddings().weight
    E = dw.attach(model, "prompt", length=20).parameters()[0]
    assert all(bool((table == row).all(1).any()) for row in E)
    assert E.dtype == torch.float32
    uniform = dw.attach(model, "prompt", name="other", length=20, init="uniform").parameters()[0]
    assert uniform.min() < -0.4  # +-0.5, not [0, 0.5)
    assert 0.4 < uniform.max() <= 0.5
    assert abs(uniform.mean()) < 0.05
    again = dw.attach(model, "prompt", name="again", length=20).parameters()[0]
    assert torch.equal(again, E)
    assert not torch.equal(dw.attach(model, "prompt", name="seeded", length=20, seed=1).parameters()[0], E)


@torch.no_grad()
def test_two_prompts_act_one_after_the_other() -> None:
    model, inputs, _ = with_tokens("gpt2")
    ids = inputs["input_ids"][:1]
    more = dw.attach(model, "prompt", length=1, name="more")
    more.parameters()[0].copy_(model.get_input_embeddings()(torch.tensor([7])))
    dw.switch(model, ["default", "more"])
    both = model(input_ids=ids).logits
    dw.switch(model, None)
    orders = [
        torch.cat(parts)[None] for parts in ([torch.tensor([7]), TOKENS, ids[0]], [TOKENS, torch.tensor([7]), ids[0]])
    ]
    errors = [(model(input_ids=order).logits[:, 4:] - both).abs().max() for order in orders]
    assert min(errors) < 1e-5 < max(errors)


def test_errors_are_plain() -> None:
    model, inputs = zoo.ZOO["bert"]()
    dw.attach(model, "prompt", length=60)  # 60 + 10 > 64 positions
    with pytest.raises(dw.UserError, match="more than the 64 positions"):
        model(**inputs)
    model, inputs = zoo.ZOO["roberta"]()
    dw.attach(model, "prompt", length=54)  # positions begin behind the padding index
    with pytest.raises(dw.UserError, match="more than the 63 positions"):
        model(**inputs)
    model, inputs = zoo.ZOO["gpt2"]()
    dw.attach(model, "prompt", length=2, position=11)
    with pytest.raises(dw.UserError, match="position 11"):
        model(**inputs)
    for name in ("vit", "clip", "whisper"):
        model, _ = zoo.ZOO[name]()
        with pytest.raises(dw.UserError, match="makes its embeddings itself"):
            dw.attach(model, "prompt")
        assert not any("_board" in module.__dict__ for module in model.modules())
    model, _ = zoo.ZOO["llama"]()
    delta = dw.attach(model, "prompt")
    with pytest.raises(dw.UserError, match="cannot be merged"):
        delta.merge()
