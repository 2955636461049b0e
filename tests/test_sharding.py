"""FSDP2 in two processes: the run of one, the base in halves, the adapter saved once and whole."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from zoo import ZOO

import deltaworks as dw
from deltaworks.core.errors import UserError
from deltaworks.core.sharding import is_sharded, size_of, whole
from deltaworks.store.checkpoint import resume
from deltaworks.train.devices import Team
from deltaworks.train.sharding import keep_whole, needs_whole

HERE = Path(__file__).parent
STEPS, ROWS = 6, 24
CLIP = 0.1

HAND = {
    "factors": {"method": "lora[rank=2]"},
    "half-base": {"method": "lora[rank=2]", "dtype": "bfloat16"},
    "half": {"method": "lora[rank=2]", "mixed": "bf16"},
    "weight": {"method": "oft[block=4]"},
    "around": {"method": "houlsby[reduction=4]+prefix-flat[length=3]"},
    "head": {"method": "ia3", "also": ["head", "embedding"]},
    "lean": {"method": "lora[rank=2]", "checkpointing": True},
    "shared": {"method": "said[dimension=60]"},
    "budget": {"method": "adalora[rank=2, interval=1]"},
    "masks": {"method": "fish[keep=0.05]"},
}
TRAINER = {
    "trainer": {"method": "lora[rank=2]"},
    "trainer-budget": {"method": "adalora[rank=2, interval=1]"},
    "trainer-masks": {"method": "fish[keep=0.05]"},
    "trainer-rest": {"method": "lisa[layers=1]"},
    "replicas-masks": {"method": "fish[keep=0.05]", "sharded": False},
    "replicas-budget": {"method": "adalora[rank=2, interval=1]", "sharded": False},
}

ZERO = ("factors", "weight", "around")


def model_of(dtype: str = "float32") -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, max_position_embeddings=48, **sizes))
    return model.to(getattr(torch, dtype))


def rows() -> Tensor:
    return torch.randint(0, 40, (ROWS, 10), generator=torch.Generator().manual_seed(3))


def dataset() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows()]


def attached(case: dict[str, Any]) -> dw.Delta:
    delta = dw.attach(model_of(case.get("dtype", "float32")), case["method"], also=case.get("also", []), seed=1)
    if case.get("checkpointing"):
        delta.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    delta.model.train()
    return delta


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def by_hand(case: dict[str, Any], accelerator: Any = None, team: Team | None = None) -> tuple[list[float], dw.Delta]:
    """A loop as accelerate's users write it: losses of the whole batches of four rows, and the adapter."""
    team = team or Team()
    delta = attached(case)
    model, loose = delta.model, team.size > 1 and needs_whole(delta)
    delta.procedure.begin(dw.Run(STEPS, rows().split(4), loss_of, rows().split(1)))
    if loose:
        keep_whole(delta, accelerator.state.fsdp_plugin)
    optimizer: Any = torch.optim.AdamW(delta.parameter_groups(1e-2))
    delta.procedure.optimizing(optimizer)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in rows().split(4):
        part = batch[team.rank :: team.size]
        with torch.autocast("cpu", torch.bfloat16) if case.get("mixed") else contextlib.nullcontext():
            loss = loss_of(model, part)
        losses.append(team.sum(float(loss.detach())) / team.size)
        delta.procedure.loss(loss).backward()
        if loose:
            team.average(delta.parameters())
        clip = torch.nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
        clip(model.parameters(), CLIP)
        delta.procedure.gradients()
        optimizer.step()
        delta.procedure.stepped()
        optimizer.zero_grad()
    delta.procedure.end()
    return losses, delta


def by_trainer(case: dict[str, Any], folder: Path, resumed: bool = False, **options: Any) -> dw.DeltaTrainer:
    """The same run under the Trainer; in each of several processes on two rows of each batch."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = count > 1 and case.get("sharded", True)
    if sharded:
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4 // count, learning_rate=1e-2,
        max_grad_norm=CLIP, report_to="none", disable_tqdm=True, logging_steps=1, use_cpu=True, save_strategy="steps",
        save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, **options,
    )  # fmt: skip
    if sharded:
        pretend_gpus()
    data = dataset()
    trainer = dw.DeltaTrainer(attached(case), arguments, train_dataset=data, eval_dataset=data[:8])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumed else None)
    return trainer


def losses_of(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pretend_gpus() -> None:
    """accelerate shards on devices alone: it is told that these processes have some."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def sharder(case: dict[str, Any]) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    pretend_gpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return Accelerator(fsdp_plugin=plugin, mixed_precision=case.get("mixed", "no"))


def by_deepspeed(case: dict[str, Any]) -> tuple[list[float], dw.Delta]:
    """The hand-written loop with DeepSpeed's engine: ZeRO-3, with every tensor in pieces, however small."""
    import deepspeed
    from deepspeed.comm import torch as communication

    communication.build_shm_op = lambda: None  # compiles for minutes
    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    delta, losses = attached(case), []
    optimizer = torch.optim.AdamW(delta.parameter_groups(1e-2))
    engine, *_ = deepspeed.initialize(model=delta.model, optimizer=optimizer, config=settings)
    team = Team(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    for batch in rows().split(4):
        loss = loss_of(engine, batch[team.rank :: team.size])
        losses.append(team.sum(float(loss.detach())) / team.size)
        engine.backward(loss)
        engine.step()
    return losses, delta


def in_zero3(folder: Path) -> None:
    """In each of the processes: what ZeRO-3 gives and holds, and the adapter that is saved."""
    found = {}
    for name in ZERO:
        losses, delta = by_deepspeed(HAND[name])
        base: list[Any] = [p for p in delta.model.parameters() if not p.requires_grad]
        delta.save(folder / name)
        found[name] = {
            "losses": losses,
            "sharded": is_sharded(delta),
            "gathered": sum(p.numel() for p in base),
            "held": sum(p.ds_tensor.numel() for p in base),
            "base": sum(map(size_of, base)),
        }
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    """In each of the processes: every case, what it gave as JSON and what it saved as adapters."""
    found: dict[str, Any] = {}
    for name, case in TRAINER.items():
        trainer = by_trainer(case, folder / name)
        again = by_trainer(case, folder / name, resumed=True)
        trainer.save_model(str(folder / name / "final"))
        again.save_model(str(folder / name / "again"))
        found[name] = {"losses": losses_of(trainer), "again": losses_of(again)}
    try:
        by_trainer({"method": "id3[keep=0.05]", "sharded": False}, folder / "refused")
    except UserError as error:
        found["refused"] = str(error)
    pretend_gpus()
    for name, case in HAND.items():
        losses, delta = by_hand(case, sharder(case), Team(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
        shards = {id(p): p for p in delta.model.parameters() if not p.requires_grad}.values()
        sharded = is_sharded(delta)
        with whole(delta) as writes:
            assert writes == (dist.get_rank() == 0 or not sharded)
        if dist.get_rank() == 0 or sharded:
            delta.save(folder / name)
        found[name] = {
            "losses": losses,
            "sharded": sharded,
            "base": sum(p.numel() for p in shards),
            "held": sum(p.to_local().numel() for p in shards),
            "dtypes": sorted({str(p.dtype) for p in delta.parameters()}),
        }
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch(str(folder))
    return folder


def values_of(delta: dw.Delta) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in delta.tensors().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", HAND)
def test_a_loop_with_accelerate_gives_the_run_of_one_process(shared_run: Path, name: str) -> None:
    case = HAND[name]
    found, other = (json.loads((shared_run / f"found-{rank}.json").read_text())[name] for rank in (0, 1))
    losses, delta = by_hand(case)
    half = "mixed" in case or "dtype" in case
    assert found["losses"] == other["losses"]
    # bfloat16 shards round the weights, autocast in one process only the products
    assert found["losses"] == pytest.approx(losses, abs=1e-2 if half else 2e-6)
    assert found["dtypes"] == ["torch.float32"]
    assert found["sharded"] == (name not in ("shared", "budget", "masks"))
    assert found["held"] + other["held"] == found["base"]
    assert abs(found["held"] - other["held"]) <= 0.05 * found["base"]
    saved = dw.load(model_of(case.get("dtype", "float32")), shared_run / name)
    assert sum(value.numel() for value in saved.parameters()) == sum(value.numel() for value in delta.parameters())
    expected = values_of(delta)
    for key, value in values_of(saved).items() if not half else ():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["factors", "budget", "masks"])
def test_a_loop_with_accelerate_in_one_process_is_a_plain_loop(name: str) -> None:
    from accelerate import Accelerator

    losses, delta = by_hand(HAND[name])
    found, other = by_hand(HAND[name], Accelerator(cpu=True))
    assert found == losses
    for key, value in values_of(other).items():
        assert torch.equal(value, values_of(delta)[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_gives_the_run_of_one_process(shared_run: Path, tmp_path: Path, name: str) -> None:
    found, other = (json.loads((shared_run / f"found-{rank}.json").read_text())[name] for rank in (0, 1))
    alone = by_trainer(TRAINER[name], tmp_path)
    assert found == other
    assert found["losses"] == pytest.approx(losses_of(alone), abs=2e-4)  # the log rounds them
    assert found["again"] == pytest.approx(found["losses"], abs=2e-4)
    expected = values_of(alone.delta)
    for last in ("final", "again", "checkpoint-6"):
        saved = dw.load(model_of(), shared_run / name / last)
        for key, value in values_of(saved).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-4)
    files = {path.name.split("-")[0] for path in (shared_run / name / "checkpoint-6").rglob("*") if path.is_file()}
    optimizer = "optimizer.bin" if TRAINER[name].get("sharded", True) else "optimizer.pt"
    state = {optimizer, "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"}
    assert files - {"adapter_config.json", "adapter_model.safetensors"} == {"adapter.json", "adapter", *state}
    kept = torch.load(shared_run / name / "checkpoint-6" / optimizer, weights_only=True)["state"]
    sizes = {key: entry["exp_avg"].numel() for key, entry in kept.items() if "exp_avg" in entry}
    assert sum(sizes.values()) <= sum(parameter.numel() for parameter in alone.delta.parameters())


@pytest.mark.slow
def test_a_method_that_decides_by_its_own_rows_is_refused(shared_run: Path) -> None:
    refused = {json.loads((shared_run / f"found-{rank}.json").read_text())["refused"] for rank in (0, 1)}
    assert refused == {"id3[keep=0.05] decides by what each process sees for itself: train it in one process"}


@pytest.mark.slow
def test_zero3_gives_the_run_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launch(str(tmp_path), "zero3")
    for name in ZERO:
        found, other = (json.loads((tmp_path / f"found-{rank}.json").read_text())[name] for rank in (0, 1))
        losses, delta = by_hand(HAND[name])
        assert found["losses"] == other["losses"] == pytest.approx(losses, abs=2e-6)
        assert found["sharded"]
        assert found["gathered"] == 0  # saving has gathered nothing of the base
        assert found["held"] + other["held"] == found["base"]
        expected = values_of(delta)
        for key, value in values_of(dw.load(model_of(), tmp_path / name)).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-4)


class Partition:
    """Stands for DeepSpeed: ``GatheredParameters`` gives each parameter its values, and takes them again."""

    def __init__(self, parameters: list[Any]) -> None:
        self.asked: list[tuple[int, Any]] = []
        for parameter in parameters:
            parameter.full, parameter.ds_numel = parameter.data, parameter.numel()
            self._empty(parameter)

    def _empty(self, parameter: Any) -> None:
        parameter.data, parameter.ds_status = torch.empty(0), SimpleNamespace(name="NOT_AVAILABLE")

    @contextlib.contextmanager
    def gathered(self, parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
        self.asked += [(id(parameter), modifier_rank) for parameter in parameters]
        for parameter in parameters:
            parameter.data, parameter.ds_status = parameter.full.clone(), SimpleNamespace(name="AVAILABLE")
        yield
        for parameter in parameters:
            if modifier_rank is not None:
                parameter.full = parameter.data
            self._empty(parameter)


def test_of_a_partitioned_model_the_adapter_alone_is_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = dw.attach(model_of(), "lora[rank=2]", seed=1)
    expected = values_of(delta)
    partition = Partition(list(delta.model.parameters()))
    zero = SimpleNamespace(GatheredParameters=partition.gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    delta.save(tmp_path / "first", training=True)
    own = {id(parameter) for parameter in delta.parameters()}
    assert {key for key, _ in partition.asked} == own
    assert {rank for _, rank in partition.asked} == {None}
    for key, value in values_of(dw.load(model_of(), tmp_path / "first")).items():
        assert torch.equal(value, expected[key])
    for parameter in delta.parameters():
        parameter.full = torch.zeros_like(parameter.full)  # type: ignore[attr-defined]
    resume(delta, tmp_path / "first")
    with whole(delta):
        assert all(torch.equal(value, expected[key]) for key, value in values_of(delta).items())
    assert all(parameter.numel() == 0 for parameter in delta.model.parameters())
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    delta.save(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with pytest.raises(UserError, match="DeepSpeed has partitioned the model already"):
        dw.attach(delta.model, "lora[rank=2]", name="late")


def test_what_stays_whole() -> None:
    """What decides over time, and what is one tensor for several blocks."""
    whole_ones = {
        method: needs_whole(dw.attach(ZOO["llama"]()[0], method))
        for method in ("lora", "houlsby", "said", "adalora", "vera", "lora+deft", "ia3")
    }
    expected = {"lora": False, "houlsby": False, "said": True, "adalora": True, "lora+deft": True, "ia3": False}
    assert {key: whole_ones[key] for key in expected} == expected


def test_an_adapter_that_is_not_sharded_is_as_it_was() -> None:
    delta = dw.attach(ZOO["bert"]()[0], "lora[rank=2]")
    before = [id(parameter) for parameter in delta.parameters()]
    with whole(delta, write=True) as writes:
        assert writes
        assert [id(parameter) for parameter in delta.parameters()] == before


def test_refusals() -> None:
    class Plugin:
        cpu_ram_efficient_loading = True
        ignored_modules: Any = None

    delta = dw.attach(ZOO["bert"]()[0], "adalora")
    with pytest.raises(UserError, match="set cpu_ram_efficient_loading to false"):
        keep_whole(delta, Plugin())
    plugin = Plugin()
    plugin.cpu_ram_efficient_loading, plugin.ignored_modules = False, "a.*"
    with pytest.raises(UserError, match="give ignored_modules as modules"):
        keep_whole(delta, plugin)
    plugin.ignored_modules = None
    keep_whole(delta, plugin)
    assert plugin.ignored_modules == delta.tuners()
    with pytest.raises(UserError, match="cannot be trained while FSDP2 shards the base: its nuclear norm"):
        keep_whole(dw.attach(ZOO["bert"]()[0], "sara"), Plugin())


@pytest.mark.slow
def test_the_example_runs_and_its_configurations_are_read(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    folder = HERE.parent / "examples" / "sharded"
    out = tmp_path / "out"
    command = [sys.executable, str(folder / "train.py"), "--steps", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name.split("-")[0] for path in out.iterdir()} >= {"adapter.json", "adapter"}
    assert load_config_from_file(str(folder / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    pytest.importorskip("deepspeed")
    assert HfTrainerDeepSpeedConfig(str(folder / "zero3.json")).is_zero3()


def launch(*arguments: str) -> None:
    """This file in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *arguments], cwd=HERE, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]


if __name__ == "__main__":
    (in_zero3 if sys.argv[2:] == ["zero3"] else main)(Path(sys.argv[1]))
