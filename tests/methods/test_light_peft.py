"""Light-PEFT: masks equal cuts, the sheet's numbers, a base that is really smaller, checkpoints, refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from conformance import begin, difference, disturb
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deltaworks as dw
from deltaworks.core.cutting import PREFIX, RANKS, Cut, shrink
from deltaworks.core.layers import observed
from deltaworks.core.units import heads, neurons
from deltaworks.methods.procedures.importance import above, masked, module_score, penalty, rank_scores

CUTTABLE = ("bert", "roberta", "llama", "mistral", "qwen2", "vit", "gpt2", "bart", "clip", "whisper")


def attached(family: str, spec: str = "lora[rank=4]+light-peft[estimate=6]") -> tuple[nn.Module, Any, dw.Delta]:
    model, inputs = zoo.ZOO[family]()
    return model, inputs, dw.attach(model, spec)


def cut(family: str, spec: str = "lora[rank=4]+light-peft[estimate=6]") -> tuple[nn.Module, Any, dw.Delta]:
    """An adapter that has estimated, cut and moved on."""
    model, inputs, delta = attached(family, spec)
    begin(delta, family, inputs)
    disturb(delta)
    return model, inputs, delta


def base_size(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".deltas." not in name)


def procedure_of(delta: dw.Delta) -> Any:
    return getattr(delta.procedure, "members", [delta.procedure])[-1]


def some_masks(units: list[Any], seed: int = 0) -> list[nn.Parameter]:
    """Ones, and about a third zeros, but never all."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(each.count, generator=generator) for each in units]
    return [nn.Parameter(((values > 1 / 3) | (values == values.max())).float()) for values in drawn]


# ---- the sheet's checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CUTTABLE)
def test_masks_of_one_change_nothing_and_masks_of_zero_are_the_cut(family: str) -> None:
    """Checks 1 and 2, with an adapter that has moved, so that its own slices are compared as well (check 5)."""
    model, inputs, delta = attached(family)
    disturb(delta)
    units = procedure_of(delta).units
    assert {each.what for each in units} == {"heads", "neurons"}
    plain = zoo.output_of(family, model, inputs)
    with masked(model, units, [nn.Parameter(torch.ones(each.count)) for each in units]):
        assert difference(zoo.output_of(family, model, inputs), plain) < 1e-6
    masks = some_masks(units)
    with masked(model, units, masks):
        expected = zoo.output_of(family, model, inputs)
    assert difference(expected, plain) > 1e-3
    removed = {each.name: (mask == 0).nonzero().flatten() for each, mask in zip(units, masks, strict=True)}
    assert sum(map(len, removed.values())) > len(units)
    shrink(delta, Cut(model, units, removed), {})
    assert difference(zoo.output_of(family, model, inputs), expected) < 1e-5


def test_quantile() -> None:
    """Check 3: the quantile of 0..15 at 1/3 is 5.0, so 6..15 stay; equal values leave the largest, 0 leaves all."""
    assert above(torch.arange(16.0), 1 / 3).nonzero().flatten().tolist() == list(range(6, 16))
    assert above(torch.ones(4), 0.5).tolist() == [True, False, False, False]
    assert above(torch.tensor([-3.0, 1.0, 2.0]), 0.3).tolist() == [False, True, True]  # signed: the negative goes
    assert above(torch.arange(4.0), 0.0).all()


def test_penalty() -> None:
    """Check 4: 24 layers of 16 heads and 4,096 neurons, all masks 1: 1e-4 * 24 * 4112 = 9.8688."""
    masks = [nn.Parameter(torch.ones(size)) for _ in range(24) for size in (16, 4096)]
    assert float(penalty(masks, 1e-4).detach()) == pytest.approx(9.8688, rel=1e-6)


def test_the_sliced_adapter_is_the_adapter_on_what_is_kept() -> None:
    """Check 5: rows of B for q, k, v and up, columns of A for o and down; q, k, v, o keep the same heads."""
    model, _, delta = attached("llama")
    disturb(delta)
    old = {item.key: copy.deepcopy(item.tuner) for item in delta.attached}
    units = procedure_of(delta).units
    removed = {each.name: torch.tensor([0] if each.what == "heads" else [3, 5, 60]) for each in units}
    shrink(delta, Cut(model, units, removed), {})
    x = torch.randn(5, 64)
    heads_left, neurons_left = torch.arange(16, 32), torch.tensor([i for i in range(64) if i not in (3, 5, 60)])
    for item in delta.attached:
        A, B, scale = item.tuner.factors()
        A0, B0, _ = old[item.key].factors()
        wide = x[:, : A0.shape[1]]
        whole = F.linear(F.linear(wide, A0), B0) * scale
        kept = {"q": heads_left, "k": torch.arange(8, 16), "v": torch.arange(8, 16)}
        kept |= {"o": heads_left, "gate": neurons_left, "up": neurons_left, "down": neurons_left}
        index = kept[item.place.role.partition(".")[2]]
        if item.place.role in ("attention.o", "mlp.down"):
            zeroed = torch.zeros_like(wide).index_copy(1, index, wide[:, index])
            expected = F.linear(F.linear(zeroed, A0), B0) * scale
            assert difference(F.linear(F.linear(wide[:, index], A), B) * scale, expected) < 1e-6
        else:
            assert difference(F.linear(F.linear(wide, A), B) * scale, whole[:, index]) < 1e-6


def test_rank_score() -> None:
    """Check 6: A row (1, -1), gradient (.2, .4): .1; B column (2), gradient (.5): 1; together 1.1."""
    tuner = nn.Module()
    tuner.A, tuner.B = nn.Parameter(torch.tensor([[1.0, -1.0]])), nn.Parameter(torch.tensor([[2.0]]))
    tuner.A.grad, tuner.B.grad = torch.tensor([[0.2, 0.4]]), torch.tensor([[0.5]])
    torch.testing.assert_close(rank_scores(tuner), torch.tensor([1.1]))


def test_module_score_by_hand() -> None:
    before, change = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 1.0], [4.0, 0.0]]])
    assert float(module_score(before, change, None)) == pytest.approx(1.1)  # (1/5 + 4/2) / 2
    assert float(module_score(before, change, torch.tensor([[1, 0]]))) == pytest.approx(0.2)
    assert float(module_score(torch.zeros(1, 1, 2), change[:, :1], None)) == 0.0  # infinite


@pytest.mark.parametrize("host", ["lora[rank=4]", "houlsby[width=4]"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_module_scores_ignore_padding(host: str, family: str) -> None:
    """Check 7."""
    model, inputs, delta = attached(family, f"{host}+light-peft[heads=0]")
    disturb(delta)
    procedure, scores = procedure_of(delta), []
    for filler in (0, 7):
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, filler)
        procedure.seen = {}
        with observed([item.tuner for item in procedure.modules], procedure.see):
            zoo.loss_of(family, model, inputs)
        scores.append([procedure.seen[id(item.tuner)] for item in procedure.modules])
    assert all(total > 0 and count == 1 for total, count in scores[0])
    for (a, _), (b, _) in zip(*scores, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-5)
    with observed(delta.tuners(), lambda *_: None):
        seen = zoo.output_of(family, model, inputs)
    assert (
        torch.equal(seen, zoo.output_of(family, model, inputs))
        or difference(seen, zoo.output_of(family, model, inputs)) < 1e-6
    )


def test_the_score_is_the_norm_of_the_change_over_the_frozen_output() -> None:
    model, inputs, delta = attached("bert")
    disturb(delta)
    procedure = procedure_of(delta)
    item = next(i for i in procedure.modules if i.place.role == "attention.q" and i.place.block == 0)
    seen: dict[str, Tensor] = {}
    layer = model.get_submodule(item.place.path)
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0]))
    with observed([i.tuner for i in procedure.modules], procedure.see):
        zoo.loss_of("bert", model, inputs)
    A, B, scale = item.tuner.factors()
    change = F.linear(F.linear(seen["x"], A), B) * scale
    ratio = change.norm(dim=-1) / F.linear(seen["x"], layer.weight, layer.bias).norm(dim=-1)
    expected = float(ratio[inputs["attention_mask"].bool()].mean().detach())
    total, count = procedure.seen[id(item.tuner)]
    assert count == 1
    assert float(total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("host", ["lora[rank=4]", "houlsby[width=4]"])
def test_what_is_kept_lies_above_the_threshold_and_nothing_else_gets_gradients(host: str) -> None:
    """Check 8."""
    model, inputs, delta = attached("roberta", f"{host}+light-peft[estimate=6, modules=0.5, ranks=0.4]")
    procedure = procedure_of(delta)
    begin(delta, "roberta", inputs)
    scores = torch.tensor(
        [float(total) / count for total, count in (procedure.seen[id(i.tuner)] for i in procedure.modules)]
    )
    assert all(count == 3 for _, count in procedure.seen.values())  # the second half of six steps
    strong = scores.double() > torch.quantile(scores.double(), 0.5)
    ranks = [procedure.ranks[id(i.tuner)] for i, keep in zip(procedure.modules, strong, strict=True) if keep]
    threshold = torch.quantile(torch.cat(ranks).double(), 0.4)
    expected = [int((part.double() > threshold).sum()) for part in ranks]
    keys = [i.key for i, keep in zip(procedure.modules, strong, strict=True) if keep]
    kept = {key: rank for key, rank in zip(keys, expected, strict=True) if rank}
    assert 0 < len(kept) < len(procedure.modules)
    assert delta.procedure.details()["light_peft_rank"] == kept
    assert delta.procedure.details()["light_peft_modules"] == len(kept) == len(delta.attached)
    assert {item.key for item in delta.attached} == set(kept)
    zoo.loss_of("roberta", model, inputs).backward()
    trained = {id(parameter) for parameter in delta.parameters()}
    own = [parameter for name, parameter in model.named_parameters() if ".deltas." in name]
    assert {id(parameter) for parameter in own} == trained
    assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in trained)
    for item in delta.attached:
        rank = item.tuner.A.shape[0] if host.startswith("lora") else item.tuner.D.shape[0]  # type: ignore
        assert rank == kept[item.key]
    if host.startswith("lora"):
        assert all(item.tuner.factors().scale == 1.0 for item in delta.attached)  # alpha / 4 still


@pytest.mark.parametrize("host", ["lora[rank=4]", "houlsby[width=4]"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_saved_and_loaded(host: str, family: str, tmp_path: Path) -> None:
    """Check 9, exactly."""
    model, inputs, delta = cut(family, f"{host}+light-peft[estimate=6]")
    expected = zoo.output_of(family, model, inputs)
    delta.save(tmp_path)
    fresh, _ = zoo.ZOO[family]()
    loaded = dw.load(fresh, tmp_path)
    assert torch.equal(zoo.output_of(family, fresh, inputs), expected)
    shapes = [(name, p.shape) for name, p in model.named_parameters()]
    assert [(name, p.shape) for name, p in fresh.named_parameters()] == shapes
    assert loaded.procedure.details() == delta.procedure.details()
    begin(loaded, family, inputs)  # there is nothing left to estimate
    assert torch.equal(zoo.output_of(family, fresh, inputs), expected)
    original, _ = zoo.ZOO[family]()
    loaded.detach()
    state = original.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert [str(m) for m in fresh.modules()] == [str(m) for m in original.modules()]


# ---- how much smaller -----------------------------------------------------------------------------------------------


def test_counts_of_roberta_large() -> None:
    """6 of 16 heads go in each layer: 1,572,864 of its 4,194,304 weights; of 98,304 neurons 32,768 (2,048 each)."""
    import transformers as hf

    with torch.device("meta"):
        model: Any = hf.RobertaModel(
            hf.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    whole = base_size(model)
    delta = dw.attach(model, "lora[rank=8]+light-peft")
    procedure, generator = procedure_of(delta), torch.Generator().manual_seed(0)
    assert len(procedure.modules) == 144
    for item in procedure.modules:
        procedure.seen[id(item.tuner)] = (float(torch.rand((), generator=generator)), 1)
        procedure.ranks[id(item.tuner)] = torch.rand(8, generator=generator)
    procedure.cut([torch.randn(each.count, generator=generator) for each in procedure.units])
    attention = 24 * (1_572_864 + 3 * 6 * 64)
    assert whole - base_size(model) == attention + 32_768 * (2 * 1024 + 1)
    details = delta.procedure.details()
    assert list(details["light_peft_heads"].values()) == [10] * 24
    assert sum(details["light_peft_neurons"].values()) == 98_304 - 32_768
    assert details["light_peft_modules"] <= 36  # a quarter of 144; fewer where all ranks of one go
    assert sum(details["light_peft_rank"].values()) == 36 * 8 - 144
    expected = 0
    for item in delta.attached:
        out, inner = model.get_submodule(item.place.path).weight.shape
        expected += details["light_peft_rank"][item.key] * (out + inner)
    assert sum(p.numel() for p in delta.parameters()) == expected


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_forward_pass_multiplies_less(family: str) -> None:
    """By the weights that went, once for each token, and by two products [T, T] x [T, 8] for each of 4 query heads."""
    model, inputs, delta = cut(family, "houlsby[width=2]+light-peft[estimate=6]")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    inputs.pop("labels")

    def multiplied() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
        weights = sum(p.numel() for n, p in model.named_parameters() if ".deltas." not in n and p.dim() == 2)
        return counter.get_total_flops() // 2, weights

    for item in list(delta.attached):
        delta.drop(item)
    small, small_weights = multiplied()
    with delta.board.whole():
        big, big_weights = multiplied()
    tokens = zoo.BATCH * zoo.LENGTH
    assert big - small == tokens * (big_weights - small_weights) + 4 * 2 * tokens * zoo.LENGTH * 8
    assert small < 0.7 * big


# ---- living with it -------------------------------------------------------------------------------------------------


def test_merged_it_is_a_small_plain_model() -> None:
    model, inputs, delta = cut("llama")
    expected = zoo.output_of("llama", model, inputs)
    delta.merge()
    assert difference(zoo.output_of("llama", model, inputs), expected) < 1e-5
    delta.unmerge()
    assert torch.equal(zoo.output_of("llama", model, inputs), expected)
    size = base_size(model)
    delta.merge(keep_base=False)
    assert base_size(model) == sum(p.numel() for p in model.parameters()) == size < 22_688
    assert difference(zoo.output_of("llama", model, inputs), expected) < 1e-5
    assert model.get_submodule("model.layers.0.self_attn.q_proj").out_features == 16
    again = dw.attach(model, "lora[rank=2]")
    assert zoo.output_of("llama", model, inputs).isfinite().all()
    again.detach()


def test_another_adapter_finds_the_whole_base() -> None:
    model, inputs, one = cut("bert")
    first, small = zoo.output_of("bert", model, inputs), base_size(model)
    two = dw.attach(model, "lora[rank=2]", name="two")
    disturb(two)
    second = zoo.output_of("bert", model, inputs)
    assert base_size(model) == 22_500
    dw.switch(model, "default")
    assert base_size(model) == small
    assert torch.equal(zoo.output_of("bert", model, inputs), first)
    with pytest.raises(dw.UserError, match="no other one can act beside it"):
        dw.switch(model, ["default", "two"])
    assert torch.equal(zoo.output_of("bert", model, inputs), first)
    with dw.rows(model, [None, "two", "two"]):
        mixed = zoo.output_of("bert", model, inputs)
    assert difference(mixed[1:], second[1:]) < 1e-5
    assert torch.equal(zoo.output_of("bert", model, inputs), first)
    with pytest.raises(dw.UserError, match="no other row can share it"), dw.rows(model, ["default", None, "two"]):
        pass
    with pytest.raises(dw.UserError, match="no adapter is called"):
        dw.attach(model, "lora", name="three", targets="attention.q") and dw.switch(model, "four")
    dw.switch(model, "default")
    with pytest.raises(dw.UserError, match="matches nothing"):
        dw.attach(model, "lora", name="five", targets="nowhere")
    assert torch.equal(zoo.output_of("bert", model, inputs), first)
    with pytest.raises(dw.UserError, match="no other one can act beside it"):
        two.merge()
    dw.switch(model, None)
    assert one.report(ranks=True).trainable == sum(p.numel() for p in one.parameters())
    assert base_size(model) == 22_500
    one.merge()
    assert difference(zoo.output_of("bert", model, inputs), first) < 1e-5
    with pytest.raises(dw.UserError, match="no other one can act beside it"):
        dw.switch(model, "two")
    one.unmerge()
    dw.switch(model, "two")
    one.detach()
    assert torch.equal(zoo.output_of("bert", model, inputs), second)


def steps(model: nn.Module, delta: dw.Delta, inputs: Any, count: int) -> None:
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for _ in range(count):
        delta.procedure.loss(zoo.loss_of("roberta", model, inputs)).backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()


def test_resuming_in_the_middle_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    spec = "lora[rank=4]+light-peft[estimate=4]"
    model, inputs, whole = attached("roberta", spec)
    begin(whole, "roberta", inputs)
    steps(model, whole, inputs, 9)
    half, _, stopped = attached("roberta", spec)
    begin(stopped, "roberta", inputs)
    steps(half, stopped, inputs, 4)
    stopped.save(tmp_path, training=True)
    rest, _, going = attached("roberta", spec)
    from deltaworks.store.checkpoint import resume

    resume(going, tmp_path)
    begin(going, "roberta", inputs)
    steps(rest, going, inputs, 5)
    assert going.tensors().keys() == whole.tensors().keys()
    assert all(torch.equal(going.tensors()[key], value) for key, value in whole.tensors().items())
    assert torch.equal(zoo.output_of("roberta", rest, inputs), zoo.output_of("roberta", model, inputs))
    resume(going, tmp_path)  # the best checkpoint of a run, into the adapter that ran
    assert all(torch.equal(a, b) for a, b in zip(going.parameters(), stopped.parameters(), strict=True))
    other = {**stopped.tensors(), RANKS: stopped.tensors()[RANKS] + 1}
    with pytest.raises(dw.UserError, match="otherwise than the checkpoint"):
        going.restore(other)


def test_checkpoints_hold_small_index_lists_and_are_checked(tmp_path: Path) -> None:
    _, _, delta = cut("bert")
    tensors = delta.tensors()
    lists = {key: value for key, value in tensors.items() if key.startswith(PREFIX)}
    assert len(lists) == 5  # heads and neurons of two layers, and the ranks
    assert all(value.dtype == torch.int32 for value in lists.values())
    assert sum(len(value) for key, value in lists.items() if key != RANKS) == 2 * 2 + 43
    assert sum(value.numel() for key, value in tensors.items() if key not in lists) == sum(
        p.numel() for p in delta.parameters()
    )
    name = next(key for key in lists if "attention" in key)
    wrongs = [
        ({name: torch.tensor([4], dtype=torch.int32)}, "ascending indices of some of 4 units"),
        ({name: torch.tensor([1, 1], dtype=torch.int32)}, "ascending indices"),
        ({name: torch.arange(4, dtype=torch.int32)}, "ascending indices"),
        ({name: torch.tensor([0.5])}, "ascending indices"),
        ({PREFIX + "nowhere": torch.tensor([0], dtype=torch.int32)}, "'nowhere', which cannot be cut here"),
        ({RANKS: lists[RANKS][:-1]}, "does not tell the ranks of 12 tuners"),
        ({RANKS: torch.full((12,), 9, dtype=torch.int32)}, "names rank 9"),
    ]
    for wrong, sentence in wrongs:
        fresh, _, loaded = attached("bert")
        with pytest.raises(dw.UserError, match=sentence):
            loaded.restore({**tensors, **wrong})
        loaded.detach()
        assert base_size(fresh) == 22_500


@pytest.mark.parametrize(
    ("spec", "tuners"),
    [
        ("lora[rank=4]+deft+light-peft[estimate=4, modules=0.3]", 6),
        ("lora[rank=4]+light-peft[estimate=4, modules=0.95]+ist[interval=2]", 1),
    ],
)
def test_it_learns_with_another_procedure_beside_it(spec: str, tuners: int) -> None:
    model, inputs, delta = attached("roberta", spec)
    begin(delta, "roberta", inputs)
    assert len(delta.tuners()) == tuners
    first = zoo.loss_of("roberta", model, inputs).item()
    steps(model, delta, inputs, 12)
    delta.procedure.end()
    assert float(zoo.loss_of("roberta", model, inputs)) < first


def trainer_of(folder: Path) -> dw.DeltaTrainer:
    from transformers import TrainingArguments

    model, _ = zoo.ZOO["bert"]()
    for module in model.modules():  # so that the random state matters
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    tokens = torch.randint(3, 64, (24, 10), generator=torch.Generator().manual_seed(5))
    data: Any = [{"input_ids": row, "attention_mask": torch.ones(10), "labels": row[0] % 4} for row in tokens]
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        disable_tqdm=True, save_steps=3, use_cpu=True,
    )  # fmt: skip
    delta = dw.attach(model, "lora[rank=4]+light-peft[estimate=4]", also=["head"], seed=3)
    return dw.DeltaTrainer(delta, arguments, train_dataset=data)


def test_the_trainer_resumes_a_cut_adapter(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    assert base_size(whole.delta.model) < 22_500
    going = trainer_of(tmp_path / "going")
    going.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert going.delta.tensors().keys() == whole.delta.tensors().keys()
    assert all(torch.equal(going.delta.tensors()[key], value) for key, value in whole.delta.tensors().items())


def test_layers_without_heads_to_cut_keep_them() -> None:
    """T5: the position bias is shared by all layers, but the neurons go, gated or not."""
    for family in ("t5", "t5-gated"):
        model, inputs, delta = cut(family, "lora[rank=4]+light-peft[heads=0, estimate=6]")
        assert delta.procedure.details()["light_peft_heads"] == {}
        assert sum(delta.procedure.details()["light_peft_neurons"].values()) == 4 * 64 - 86
        with delta.disabled():
            fresh, _ = zoo.ZOO[family]()
            fresh.requires_grad_(False)
            assert torch.equal(zoo.output_of(family, model, inputs), zoo.output_of(family, fresh, inputs))
    model, inputs, delta = cut("bert", "lora[rank=4]+light-peft[heads=0, neurons=0, estimate=6]")
    assert base_size(model) == 22_500
    assert delta.procedure.details()["light_peft_modules"] < 12


@pytest.mark.parametrize(
    ("family", "spec", "sentence"),
    [
        ("t5", "lora+light-peft", "position bias is one for all layers"),
        ("plain", "lora+light-peft", "does not go through transformers' attention functions"),
        ("mlp", "lora+light-peft", "no heads that could be cut"),
        ("mlp", "lora+light-peft[heads=0]", "no neurons that could be cut"),
        ("bert", "adalora[rank=2]+light-peft", "cannot be sliced with its weight"),
        ("bert", "lora[rank=2, dora=true]+light-peft", "cannot be sliced with its weight"),
        ("gpt2", "lora[rank=2, targets=attention.q]+light-peft", "cannot be sliced with its weight"),
        ("bert", "bitfit[targets=norm]+light-peft", "no low-rank products or bottlenecks"),
    ],
)
def test_what_it_refuses(family: str, spec: str, sentence: str) -> None:
    model, _ = zoo.ZOO[family]()
    with pytest.raises(dw.UserError, match=sentence) as error:
        dw.attach(model, spec)
    assert "\n" not in str(error.value)
    assert not any("_board" in module.__dict__ for module in model.modules())


def test_norms_over_all_heads_and_quantized_weights_are_refused() -> None:
    import transformers as hf

    settings = {**zoo.DECODER, "num_key_value_heads": 4}
    olmo = hf.Olmo2ForCausalLM(hf.Olmo2Config(**settings))
    with pytest.raises(dw.UserError, match="normalizes them together"):
        heads(olmo, dw.anatomy(olmo))
    qwen = hf.Qwen3ForCausalLM(hf.Qwen3Config(**settings, head_dim=8))  # its norms are those of single heads
    assert [each.count for each in heads(qwen, dw.anatomy(qwen))] == [4, 4]
    model, _ = zoo.ZOO["llama"]()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(dw.UserError, match="is quantized"):
        neurons(model, dw.anatomy(model))


def test_what_it_needs() -> None:
    _, _, delta = attached("bert")
    with pytest.raises(dw.UserError, match="trains before it cuts"):
        delta.procedure.begin(dw.Run(steps=3))
    assert str(dw.attach(zoo.ZOO["bert"]()[0], "light-peft[host='lora[rank=2]']").members[0]) == "lora[rank=2]"
