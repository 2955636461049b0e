"""AdaLoRA: the schedule, the scores, the masks and what is stored, with numbers computed by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conformance import frozen_output
from torch import Tensor, nn

import deltaworks as dw


def toy(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))


def attached(spec: str, layers: int = 2) -> tuple[nn.Sequential, dw.Delta, Any]:
    model = toy(layers)
    delta = dw.attach(model, spec, targets=",".join(str(layer) for layer in range(layers)))
    return model, delta, delta.procedure


def train(model: nn.Module, delta: dw.Delta, steps: int, first: int = 0, rate: float = 0.05) -> list[int]:
    """The hand loop of core/procedure.py; the kept triplets after each step."""
    optimizer = torch.optim.AdamW(delta.parameter_groups(rate))
    ranks = []
    for step in range(first, steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = delta.procedure.loss((model(x) - x.roll(1, dims=1)).square().mean())
        loss.backward()
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
        ranks.append(sum(int(tuner.L.count_nonzero()) for tuner in delta.tuners()))  # type: ignore[union-attr, operator]
    return ranks


def test_identity_at_the_start_and_merge() -> None:
    base = frozen_output("bert")
    model, inputs = zoo.ZOO["bert"]()
    delta = dw.attach(model, "adalora")
    assert torch.equal(zoo.output_of("bert", model, inputs), base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    moved = zoo.output_of("bert", model, inputs)
    assert (moved - base).abs().max() > 0.01
    delta.merge()
    torch.testing.assert_close(zoo.output_of("bert", model, inputs), moved, rtol=1e-5, atol=1e-5)


def test_change_is_the_scaled_product() -> None:
    """s P diag(L) Q with alpha 6, rank 2: s = 3."""
    _, delta, _ = attached("adalora[rank=2,alpha=6]", layers=1)
    tuner: Any = delta.tuners()[0]
    assert tuner.P.shape == (8, 3)
    with torch.no_grad():
        tuner.L.copy_(torch.tensor([1.0, 0.0, -2.0]))
    expected = 3 * (torch.outer(tuner.P[:, 0], tuner.Q[0]) - 2 * torch.outer(tuner.P[:, 2], tuner.Q[2]))
    torch.testing.assert_close(tuner.weight(torch.zeros(8, 8)), expected)
    assert float(tuner.P.detach().std()) == pytest.approx(0.02, rel=0.5)


def test_budget() -> None:
    """b(0) = b0, b(T - t_f) = bT, half-way bT + (b0 - bT) / 8; it never rises."""
    _, _, procedure = attached("adalora[rank=2,initial=3,warmup=20,final=40]")
    procedure.begin(dw.Run(steps=100))
    assert [procedure.budget(step) for step in (0, 20, 40, 60, 80, 100)] == [12, 12, 5, 4, 4, 4]
    assert procedure.budget(40) == 4 + (12 - 4) / 8
    budgets = [procedure.budget(step) for step in range(101)]
    assert budgets == sorted(budgets, reverse=True)


def test_shares_of_the_run_and_too_few_steps() -> None:
    _, _, procedure = attached("adalora[rank=4]")
    procedure.begin(dw.Run(steps=100))
    assert (procedure.warmup, procedure.final) == (10, 50)
    _, _, procedure = attached("adalora[rank=4,warmup=60,final=0.4]")
    procedure.begin(dw.Run(steps=101))
    assert (procedure.warmup, procedure.final) == (60, 40)
    with pytest.raises(dw.UserError, match=r"warmup=60, final=40 take all 100 steps"):
        procedure.begin(dw.Run(steps=100))


def test_exactly_the_budget_stays_and_it_is_global() -> None:
    model, delta, procedure = attached("adalora[rank=2,initial=2,warmup=5,final=10,interval=1]", layers=3)
    procedure.begin(dw.Run(steps=40))
    ranks = train(model, delta, 40)
    assert ranks[:5] == [12] * 5
    assert ranks[5:] == [procedure.budget(step) for step in range(6, 41)]
    assert ranks[-10:] == [6] * 10
    kept = [int(tuner.L.count_nonzero()) for tuner in delta.tuners()]  # type: ignore[union-attr, operator]
    assert len(set(kept)) > 1, "matrices share one budget"
    told = procedure.details()["adalora_rank"]
    assert told["steps"] == list(range(2, 41, 2))
    assert [(name, ranks[0]) for name, ranks in told["values"].items()] == [("0", 4), ("1", 4), ("2", 4)]
    assert [ranks[-1] for ranks in told["values"].values()] == kept


def test_the_largest_scores_stay_over_all_matrices() -> None:
    _, delta, procedure = attached("adalora[rank=1,initial=2]")
    tuners: Any = delta.tuners()
    for tuner in tuners:
        nn.init.ones_(tuner.L)
    procedure.mask(torch.tensor([[0.3, 0.1], [0.2, 0.9]]), 2)
    assert [tuner.L.tolist() for tuner in tuners] == [[1, 0], [0, 1]]
    nn.init.ones_(tuners[0].L)
    procedure.mask(torch.tensor([[0.3, 0.4], [0.2, 0.1]]), 2)
    assert [tuner.L.tolist() for tuner in tuners] == [[1, 1], [0, 0]]


def test_a_masked_triplet_can_return() -> None:
    model, delta, procedure = attached("adalora[rank=1,initial=2,warmup=1,final=1,interval=3]")
    procedure.begin(dw.Run(steps=10))
    ranks = train(model, delta, 5)
    assert ranks[2] < 4, "masked at step 3"
    assert ranks[3] == 4, "its P, Q and the moments of L go on"


def test_penalty() -> None:
    """0 for orthonormal P and Q; for P = 2 I (2 x 2): ||4 I - I||_F = 3 sqrt 2 = 4.243."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2))
    delta = dw.attach(model, "adalora[rank=2,initial=1,gamma=0.5]", targets="0")
    tuner: Any = delta.tuners()[0]
    with torch.no_grad():
        tuner.P.copy_(torch.eye(2))
        tuner.Q.copy_(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    assert float(tuner.penalty().detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        tuner.P.copy_(2 * torch.eye(2))
    assert float(tuner.penalty().detach()) == pytest.approx(4.2426, abs=1e-4)
    # the mean over P and Q, times gamma
    assert float(delta.procedure.loss(torch.tensor(1.0)).detach()) == pytest.approx(1 + 0.5 * 4.2426 / 2, abs=1e-4)


def test_moving_averages() -> None:
    """I = 1, 3: Ibar = .15, .5775; the uncertainty takes in |1 - .15| = .85 and |3 - .5775| = 2.4225."""
    _, delta, procedure = attached("adalora[rank=1,initial=1]", layers=1)
    procedure.begin(dw.Run(steps=100))
    tuner: Any = delta.tuners()[0]
    nn.init.ones_(tuner.L)
    seen = []
    for gradient in (-1.0, 3.0):
        tuner.P.grad = tuner.Q.grad = None
        tuner.L.grad = torch.tensor([gradient])
        procedure.stepped()
        seen.append(procedure.scores["0.L"].flatten().tolist())
    assert seen[0] == pytest.approx([0.15, 0.15 * 0.85])
    assert seen[1] == pytest.approx([0.5775, 0.85 * 0.15 * 0.85 + 0.15 * 2.4225])


def test_score_of_a_triplet() -> None:
    """s(L_i) + the mean of s(P_ji) over j + the mean of s(Q_ij) over j; s = .15 I * .15 * .85 I after one step."""
    _, delta, procedure = attached("adalora[rank=1,initial=2]", layers=1)
    tuner: Any = delta.tuners()[0]
    for parameter in tuner.parameters():
        nn.init.ones_(parameter)
    tuner.L.grad = torch.tensor([1.0, 0.0])
    tuner.P.grad = torch.zeros(8, 2)
    tuner.P.grad[0, 1] = 2.0
    tuner.Q.grad = torch.zeros(2, 8)
    tuner.Q.grad[1, :4] = 1.0
    unit = 0.15 * 0.15 * 0.85
    kept: list[Tensor] = []
    procedure.mask = lambda scores, _: kept.append(scores[0])
    procedure.begin(dw.Run(steps=1))
    procedure.stepped()
    assert kept[0].tolist() == pytest.approx([unit, 4 * unit / 8 + unit / 2])


def test_a_saved_file_holds_the_kept_triplets_only(tmp_path: Path) -> None:
    model, delta, procedure = attached("adalora[rank=1,initial=4,interval=1]")
    procedure.begin(dw.Run(steps=20))
    assert train(model, delta, 20)[-1] == 2
    procedure.end()
    tensors = delta.tensors()
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * (8 + 8 + 1)
    x = torch.randn(4, 8)
    expected = model(x)
    delta.save(tmp_path / "adapter")
    fresh = toy()
    again = dw.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), expected, rtol=1e-6, atol=1e-6)
    assert {name: tensor.shape for name, tensor in again.tensors().items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    tuner: Any = again.tuners()[0]
    with pytest.raises(dw.UserError, match=r"with r <= 4 are needed"):
        tuner.restore({"P": torch.ones(8, 5), "L": torch.ones(5), "Q": torch.ones(5, 8)})
    with pytest.raises(dw.UserError, match="are needed"):
        tuner.restore({"P": torch.ones(8, 2), "L": torch.ones(1), "Q": torch.ones(2, 8)})
    with pytest.raises(dw.UserError, match="are needed"):
        tuner.restore({"P": torch.ones(8, 2), "Q": torch.ones(2, 8)})


def test_resuming_in_the_middle_goes_on_as_if_nothing_happened(tmp_path: Path) -> None:
    """Plain SGD has no state of its own, so all that counts is the adapter's and its procedure's."""

    def run(model: nn.Module, delta: dw.Delta, first: int, last: int) -> None:
        delta.procedure.begin(dw.Run(steps=30))
        for step in range(first, last):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            delta.procedure.loss((model(x) - x.roll(1, dims=1)).square().mean()).backward()
            with torch.no_grad():
                for parameter in delta.parameters():
                    parameter.sub_(0.5 * parameter.grad)
            delta.procedure.stepped()
            model.zero_grad()

    spec = "adalora[rank=1,initial=3,interval=2]"
    model, delta, _ = attached(spec)
    run(model, delta, 0, 30)
    half, stopped, _ = attached(spec)
    run(half, stopped, 0, 13)
    stopped.save(tmp_path / "half", training=True)
    resumed = toy()
    going = dw.load(resumed, tmp_path / "half")
    run(resumed, going, 13, 30)
    for mine, theirs in zip(going.parameters(), delta.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert going.procedure.details() == delta.procedure.details()
    with pytest.raises(dw.UserError, match="fit no matrix of this adapter"):
        going.procedure.resume({"step": 1, "history": [], "scores": {"0.P": torch.ones(2, 1, 1)}})


SIX = "attention.q,attention.k,attention.v,attention.o,mlp.up,mlp.down"


def test_published_counts() -> None:
    """DeBERTaV3-base, six matrices of 12 blocks: 12 (4 * 1537 + 2 * 3841) = 165,960 for each rank of the mean."""
    delta = dw.attach(zoo.real("deberta-v3-base"), "adalora[rank=8]", targets=SIX)
    assert len(delta.tuners()) == 72
    assert delta.report().trainable == 12 * 165_960
    procedure: Any = delta.procedure
    procedure.begin(dw.Run(steps=1000))
    assert procedure.budget(1000) == 576
    tuner: Any = delta.tuners()[0]
    assert sum(tensor.numel() for tensor in tuner.stored().values()) == 12 * 1537
