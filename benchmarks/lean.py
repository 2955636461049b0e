"""What training and serving cost beside peft: memory, time, files and graphs, as ratios measured in one run.

    python benchmarks/lean.py all            # every figure, then the table; `make bench`; half an hour of one core
    python benchmarks/lean.py steps          # one figure
    python benchmarks/lean.py profile        # which tensors and operations a step of LoRA has more than the floor
    python benchmarks/lean.py table          # results/lean.md from results/lean.json
    python benchmarks/lean.py gpu            # 1B and 8B on a CUDA device (benchmarks/lean_gpu.py)

The model is a Llama of random bfloat16 weights: 6 layers of width 768, SwiGLU of 2,048, 12 heads, 4 x 256 tokens. The
floor is the same model with all weights frozen and a gradient that flows to the first block. Floor, full fine-tuning,
peft and deltaworks get the same input, whose embeddings ask for a gradient, and the loss is the mean of the last hidden
states: the head is the same for all and has a figure of its own. peft has its defaults.

Saved activations are the bytes of all storages that a forward pass makes and that live after it with the loss held,
whoever holds them; beside it (``hooks``) what autograd packs, which misses what closures hold and counts what nodes
held that are gone. Times are processor time of one thread; contenders alternate step by step, and a ratio is the median
over the repeats, with its quartiles.
"""

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.store.records import versions
from deltaworks.train.measure import _address, _LiveBytes, hardware, step_memory

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parents[1]
RANK = 16
Step = Callable[[], Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, width inside the gated product, heads."""

    layers: int
    width: int
    inner: int
    heads: int


@dataclass(frozen=True)
class Setting:
    """The sizes of all figures."""

    model: Shape = Shape(6, 768, 2048, 12)
    shallow: Shape = Shape(2, 768, 2048, 12)  # for what is done with every method
    deep: Shape = Shape(32, 128, 352, 2)  # 224 linear layers
    huge: Shape = Shape(32, 4096, 11008, 32)  # 7B
    small: Shape = Shape(2, 64, 128, 2)
    rows: int = 4
    length: int = 256
    repeats: int = 15
    served: int = 32  # adapters in one batch
    loaded: int = 64
    switched: int = 10
    tokens: int = 4096
    vocabulary: int = 128_256
    methods: tuple[str, ...] = ()  # all


FULL = Setting()
TINY = Setting(
    model=Shape(2, 32, 64, 2), shallow=Shape(2, 32, 64, 2), deep=Shape(2, 32, 64, 2), huge=Shape(2, 32, 64, 2),
    small=Shape(2, 32, 64, 2), rows=2, length=8, repeats=2, served=3, loaded=4, switched=3, tokens=64, vocabulary=512,
    methods=("lora", "hut", "ia3"),
)  # fmt: skip


@dataclass
class Row:
    """One line of the table: a ratio, or a number of ``unit``."""

    what: str
    ours: float
    limit: float
    peft: float | None = None
    unit: str = ""
    least: bool = False  # whether ``limit`` is the least instead of the most
    spread: tuple[float, float] | None = None  # quartiles
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.ours >= self.limit if self.least else self.ours <= self.limit


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
FIGURES: dict[str, Callable[[Setting], list[Row]]] = {}
Out = Annotated[Path, typer.Option(help="where the figures are kept")]
Repeats = Annotated[int, typer.Option(help="of what is timed; 0: as many as the benchmark has")]
Tiny = Annotated[bool, typer.Option(help="sizes that say nothing, to try the benchmark")]


def figure(measure: Callable[[Setting], list[Row]]) -> Callable[[Setting], list[Row]]:
    """Register a figure, with a subcommand of its name."""
    FIGURES[measure.__name__] = measure

    def command(
        tiny: Tiny = False, threads: int = 1, repeats: Repeats = 0, out: Out = RESULTS / "lean.json"
    ) -> None:  # fmt: skip
        take([measure.__name__], tiny, threads, repeats, out)

    app.command(measure.__name__, help=(measure.__doc__ or "").partition("\n")[0])(command)
    return measure


# ---------------------------------------------------------------------------------- models


def llama(shape: Shape, *, dtype: torch.dtype = torch.bfloat16, vocabulary: int = 256, **options: Any) -> Any:
    """A frozen causal model whose embeddings ask for a gradient, so that it flows to the first block."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, use_cache=False, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.train().requires_grad_(False).enable_input_require_grads()
    return model


def ours(method: str, shape: Shape, **options: Any) -> Any:
    model = llama(shape)
    dw.attach(model, method, targets="linear", **options)
    return model


def theirs(config: peft.PeftConfig, shape: Shape) -> Any:
    return under_peft(llama(shape), config)


def under_peft(model: nn.Module, config: peft.PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def lora_of_peft(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, target_modules="all-linear", **options)


def full(shape: Shape) -> Any:
    return llama(shape).requires_grad_(True)


def text(rows: int, length: int) -> Batch:
    ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def hidden_loss(model: Any, batch: Batch) -> Tensor:
    return model.get_decoder()(**batch).last_hidden_state.mean()


def language_loss(model: Any, batch: Batch) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


def forget(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


# ---------------------------------------------------------------------------------- memory


def kept(model: nn.Module, loss_of: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes of one forward and backward pass, after one that fills caches (``cached``)."""
    with _LiveBytes() as counter:
        loss_of().backward()
        forget(model)
        gc.collect()
        cached = counter.now
    with _LiveBytes() as counter:
        loss = loss_of()
        gc.collect()
        alive = counter.now
        loss.backward()
    forget(model)
    return {"saved": alive, "hooks": step_memory(model, loss_of).saved, "peak": counter.peak, "cached": cached}


def over(one: dict[str, int], other: dict[str, int], *keys: str) -> dict[str, float]:
    return {key: round(one[key] / other[key], 3) for key in keys or ("saved", "hooks", "peak")}


@figure
def saved(setting: Setting) -> list[Row]:
    """Saved activations of LoRA on all linears over the frozen floor, with dropout, and of DoRA."""
    shape, batch = setting.model, text(setting.rows, setting.length)
    contenders: dict[str, Callable[[], Any]] = {
        "floor": partial(llama, shape),
        "full": partial(full, shape),
        "peft": partial(theirs, lora_of_peft(), shape),
        "peft, dropout": partial(theirs, lora_of_peft(lora_dropout=0.05), shape),
        "peft, DoRA": partial(theirs, lora_of_peft(use_dora=True), shape),
        "ours": partial(ours, "lora", shape, rank=RANK),
        "ours, dropout": partial(ours, "lora", shape, rank=RANK, dropout=0.05),
        "ours, DoRA": partial(ours, "lora", shape, rank=RANK, dora=True),
        "ours, DoRA and dropout": partial(ours, "lora", shape, rank=RANK, dora=True, dropout=0.05),
        "ours, full": partial(ours, "full", shape),
    }
    found = {}
    for name, make in contenders.items():
        model = make()
        found[name] = kept(model, partial(hidden_loss, model, batch))
    ratio = {name: over(bytes, found["floor"]) for name, bytes in found.items()}
    names = {"": "LoRA on all linears", ", dropout": "the same with dropout 0.05", ", DoRA": "DoRA on all linears"}
    return [
        Row(
            f"saved activations, {what}, over the frozen floor",
            ratio[f"ours{suffix}"]["saved"],
            limit,
            ratio[f"peft{suffix}"]["saved"],
            detail={} if suffix else {"over the floor": ratio, "bytes": found},
        )
        for (suffix, what), limit in zip(names.items(), (0.75, 0.80, 0.85), strict=True)
    ]


# ---------------------------------------------------------------------------------- time


def clock() -> float:
    """Processor time where one thread works, since other processes then cost nothing."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(work: Step) -> float:
    started = clock()
    work()
    return clock() - started


def side_by_side(contenders: dict[str, Step], repeats: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of every contender in each repeat; all take their turn in each, beginning with another one."""
    names, seconds = list(contenders), defaultdict(list)
    for turn in range(-warm, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            passed = seconds_of(contenders[name])
            if turn >= 0:
                seconds[name].append(passed)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> tuple[float, tuple[float, float]]:
    """Median of the ratios by repeat, and their quartiles."""
    ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return round(middle, 3), (round(low, 3), round(high, 3))


def training_step(model: Any, batch: Batch) -> Step:
    def step() -> None:
        hidden_loss(model, batch).backward()
        forget(model)

    return step


@figure
def steps(setting: Setting) -> list[Row]:
    """Time of forward and backward over the frozen floor: LoRA, DoRA and PaCA on all linears, and full fine-tuning."""
    shape, batch = setting.model, text(setting.rows, setting.length)
    models = {
        "floor": llama(shape),
        "full": full(shape),
        "peft": theirs(lora_of_peft(), shape),
        "peft, DoRA": theirs(lora_of_peft(use_dora=True), shape),
        "ours": ours("lora", shape, rank=RANK),
        "ours, dropout": ours("lora", shape, rank=RANK, dropout=0.05),
        "ours, DoRA": ours("lora", shape, rank=RANK, dora=True),
        "ours, PaCA": ours("paca", shape, rank=RANK),
    }
    seconds = side_by_side({name: training_step(model, batch) for name, model in models.items()}, setting.repeats)
    detail = {
        "over the floor": {name: ratio(seconds, name, "floor") for name in models},
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
    }
    lora, lora_spread = ratio(seconds, "ours", "floor")
    dora, dora_spread = ratio(seconds, "ours, DoRA", "ours")
    paca, paca_spread = ratio(seconds, "ours, PaCA", "ours")
    return [
        Row(
            "step time over the frozen floor, LoRA on all linears", lora, 1.15, ratio(seconds, "peft", "floor")[0],
            spread=lora_spread, detail=detail,
        ),
        Row(
            "step time of DoRA over LoRA", dora, 1.25, ratio(seconds, "peft, DoRA", "peft")[0], spread=dora_spread
        ),
        Row("step time of PaCA over LoRA", paca, 0.95, spread=paca_spread),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- every method


def of_methods(setting: Setting) -> Sequence[str]:
    return setting.methods or dw.methods()


def begun(method: str, setting: Setting, batch: Batch) -> dw.Delta:
    """A method at its defaults on a Llama with biases, its procedure begun."""
    delta = dw.attach(llama(setting.shallow, attention_bias=True, mlp_bias=True), method)
    single = [{key: value[:1] for key, value in batch.items()}]
    delta.procedure.begin(dw.Run(10, [batch] * 4, language_loss, single * 4))
    return delta


@figure
def methods(setting: Setting) -> list[Row]:
    """Saved activations of every method over the frozen floor; beside it HRA of peft."""
    batch = text(setting.rows, setting.length)
    floor_model = llama(setting.shallow, attention_bias=True, mlp_bias=True)
    floor = kept(floor_model, partial(language_loss, floor_model, batch))
    del floor_model
    found: dict[str, dict[str, float]] = {}
    for method in of_methods(setting):
        delta = begun(method, setting, batch)

        def loss(delta: dw.Delta = delta) -> Tensor:
            return delta.procedure.loss(language_loss(delta.model, batch))

        found[method] = over(kept(delta.model, loss), floor)
        show(f"  {method:24}{found[method]['saved']:8.3f}{found[method]['peak']:8.3f}")
    other = under_peft(
        llama(setting.shallow, attention_bias=True, mlp_bias=True),
        peft.HRAConfig(target_modules="all-linear"),
    )
    beside = over(kept(other, partial(language_loss, other, batch)), floor)
    worst = max(found, key=lambda method: found[method]["saved"])
    detail = {"floor": floor, "over the floor": found, "HRA of peft": beside}
    what = f"saved activations, the worst of {len(found)} methods over the frozen floor ({worst})"
    return [Row(what, found[worst]["saved"], 1.5, beside["saved"], detail=detail)]


@figure
def stored(setting: Setting) -> list[Row]:
    """Bytes of files for each trained value, every method after three steps; beside it RandLoRA of peft."""
    batch = text(2, 16)
    found: dict[str, dict[str, float]] = {}
    for method in of_methods(setting):
        delta = begun(method, setting, batch)
        trained = sum(parameter.numel() for parameter in delta.parameters())
        optimizer = torch.optim.AdamW(delta.parameter_groups(1e-3), fused=True)
        delta.procedure.optimizing(optimizer)
        for _ in range(3):
            delta.procedure.loss(language_loss(delta.model, batch)).backward()
            delta.procedure.gradients()
            optimizer.step()
            delta.procedure.stepped()
            optimizer.zero_grad()
        delta.procedure.end()
        trained = max(trained, sum(parameter.numel() for parameter in delta.parameters()))
        with tempfile.TemporaryDirectory() as folder:
            delta.save(folder)
            file = in_files(folder)
        values = sum(tensor.numel() * tensor.element_size() for tensor in delta.tensors().values())
        found[method] = {"trained": trained, "file": file / trained, "values": values / trained}
        show(f"  {method:24}{trained:10,}{found[method]['file']:8.3f}{found[method]['values']:8.3f}")
    other = under_peft(llama(setting.shallow), peft.RandLoraConfig(target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in other.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        beside = in_files(folder) / trained
    worst = max(found, key=lambda method: found[method]["file"])
    what = f"bytes in files for each trained value, the worst of {len(found)} methods ({worst})"
    return [Row(what, found[worst]["file"], 4.1, beside, " B", detail={"bytes for each value": found})]


def in_files(folder: str | Path) -> int:
    """Bytes of tensors with their headers."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


# ---------------------------------------------------------------------------------- many adapters


def names(count: int) -> list[str]:
    return [f"a{number}" for number in range(count)]


@figure
def rows(setting: Setting) -> list[Row]:
    """Inference on a batch with another LoRA in each row, over the base without adapters."""
    called = names(setting.served)
    base, own, other = (llama(setting.model).eval() for _ in range(3))
    for name in called:
        dw.attach(own, "lora", rank=RANK, targets="linear", name=name)
    other = under_peft(other, lora_of_peft())
    for name in called:
        other.add_adapter(name, lora_of_peft())
    other.eval()
    turn = iter(range(10**9))

    def ordered() -> list[str]:
        """Every call has other adapters in its rows."""
        first = next(turn) % len(called)
        return called[first:] + called[:first]

    def mixed(batch: Batch) -> None:
        with dw.rows(own, ordered()):
            own(**batch)

    detail = {}
    for length in (32, 1, 128):
        batch = text(setting.served, length)
        contenders: dict[str, Step] = {
            "base": lambda batch=batch: base(**batch),
            "ours": partial(mixed, batch),
            "peft": lambda batch=batch: other(**batch, adapter_names=ordered()),
        }
        with torch.no_grad():
            seconds = side_by_side(contenders, max(2, setting.repeats // (3 if length == 128 else 1)))
        detail[length] = {name: ratio(seconds, name, "base") for name in ("ours", "peft")}
        detail[length]["seconds"] = statistics.median(seconds["base"])
    middle, spread = detail[32]["ours"]
    what = f"{setting.served} rows of 32 tokens with {setting.served} adapters, over the base's forward"
    return [Row(what, middle, 1.3, detail[32]["peft"][0], spread=spread, detail={"by length": detail})]


@figure
def loads(setting: Setting) -> list[Row]:
    """Loading one adapter after another, and switching between them, on a model of 224 linear layers."""
    count, shape = setting.loaded, setting.deep
    with tempfile.TemporaryDirectory() as scratch:
        mine, other = Path(scratch, "ours"), Path(scratch, "peft")
        dw.attach(llama(shape), "lora", rank=RANK, targets="linear").save(mine)
        theirs(lora_of_peft(), shape).save_pretrained(other)
        passes = [our_loads(shape, mine, count) for _ in range(3)]
        their_loads, their_switches = loads_of_peft(shape, other, count)
    ratios = [late(each) / each[0] for each, _ in passes]
    detail = {
        "ours, seconds": [statistics.median(each) for each in zip(*(loads for loads, _ in passes), strict=True)],
        "ours, over the second": statistics.median(late(each) / each[1] for each, _ in passes),
        "peft, seconds": their_loads,
    }
    sites = 7 * shape.layers
    return [
        Row(
            f"loading adapter {count} over the first, {sites} layers", statistics.median(ratios), 1.1,
            late(their_loads) / their_loads[0], spread=(min(ratios), max(ratios)), detail=detail,
        ),
        Row(
            f"switch between {count} adapters on {sites} layers", statistics.median(passes[-1][1]), 2,
            statistics.median(their_switches), " ms",
        ),
    ]  # fmt: skip


def our_loads(shape: Shape, folder: Path, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each load, milliseconds of each switch afterwards."""
    model = llama(shape)
    loads = [seconds_of(partial(dw.load, model, folder, name=name)) for name in names(count)]
    return loads, [1e3 * seconds_of(partial(dw.switch, model, name)) for name in names(count)]


def loads_of_peft(shape: Shape, folder: Path, count: int) -> tuple[list[float], list[float]]:
    first, *others = names(count)
    base, started = llama(shape), clock()
    model = peft.PeftModel.from_pretrained(base, folder, adapter_name=first)
    loads = [clock() - started]
    loads += [seconds_of(partial(model.load_adapter, folder, name)) for name in others]
    return loads, [1e3 * seconds_of(partial(model.set_adapter, name)) for name in others[:10]]


def late(seconds: list[float]) -> float:
    """The last, as the median of three neighbours."""
    return statistics.median(seconds[-3:])


@figure
def attaching(setting: Setting) -> list[Row]:
    """Attaching LoRA to all linears of a 7B Llama on the meta device."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(3):
        with torch.device("meta"):
            mine, other = (llama(setting.huge, vocabulary=32_000) for _ in range(2))
        found["ours"].append(seconds_of(lambda m=mine: dw.attach(m, "lora", rank=RANK, targets="linear")))
        found["peft"].append(seconds_of(lambda m=other: under_peft(m, lora_of_peft())))
    what = "attaching LoRA to a 7B Llama on the meta device"
    return [Row(what, statistics.median(found["ours"]), 2, statistics.median(found["peft"]), " s")]


@figure
def graphs(setting: Setting) -> list[Row]:
    """Graphs that torch.compile makes while adapters take turns."""
    called = names(setting.switched)
    own, other = llama(setting.small), under_peft(llama(setting.small), lora_of_peft())
    for name in called:
        dw.attach(own, "lora", rank=RANK, targets="linear", name=name)
        other.add_adapter(name, lora_of_peft())
    batch, found = text(2, 8), {}
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            found["training" if graded else "inference"] = {
                "ours": compiled(own, partial(dw.switch, own), called, batch),
                "peft": compiled(other, other.set_adapter, called, batch),
            }
    what = f"graphs compiled for {len(called)} adapters in turn"
    inference = found["inference"]
    return [Row(what, inference["ours"], 1, inference["peft"], detail={"graphs": found})]


def compiled(model: Any, switch: Callable[[str], Any], called: Sequence[str], batch: Batch) -> int:
    """How many graphs there are after every adapter has acted once."""
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    with config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        fast = torch.compile(model.get_decoder(), backend="eager")
        for name in called:
            switch(name)
            fast(**batch)
    return counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------------------- the loss


@figure
def loss(setting: Setting) -> list[Row]:
    """Peak memory of the frozen head with cross entropy, forward and backward, over the plain computation."""
    from deltaworks.train.losses import summed_cross_entropy

    sizes = setting.tokens, setting.model.width, setting.vocabulary
    chunked = loss_peak(lambda x, w, y: summed_cross_entropy(x, w, None, y), "cpu", *sizes)
    # tensors have their sizes there and need no eight gigabytes
    naive = loss_peak(plain_cross_entropy, "meta", *sizes)
    what = f"cross entropy of {sizes[0]:,} tokens, {sizes[2]:,} words, peak memory over the plain one"
    return [Row(what, chunked / naive, 0.15, 1.0, detail={"bytes": {"ours": chunked, "plain": naive}})]


def plain_cross_entropy(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers has it: the logits in float32."""
    return F.cross_entropy(F.linear(states, weight).float(), labels)


def loss_peak(loss_of: Callable[..., Tensor], device: str, tokens: int, width: int, vocabulary: int) -> int:
    """Bytes beside the states and the weight."""
    torch.manual_seed(0)
    with torch.device(device):
        states = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        weight = 0.02 * torch.randn(vocabulary, width, dtype=torch.bfloat16)
        labels = torch.randint(vocabulary, (tokens,))
    with _LiveBytes() as counter:
        loss_of(states, weight, labels).backward()
    return counter.peak


# ---------------------------------------------------------------------------------- profiles


class Traced(_LiveBytes):
    """Which operations made the storages that live, and of what shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = set(self.live)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        shapes = {
            _address(leaf): f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
            for leaf in torch.utils._pytree.tree_leaves(result)
            if isinstance(leaf, Tensor)
        }
        for reference in set(self.live) - before:
            storage = reference()
            self.makers[reference] = f"{func} {shapes.get(storage._cdata, '') if storage is not None else ''}"
        return result

    def summary(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for reference, size in self.live.items():
            found[self.makers[reference]] += size
        return dict(found.most_common())


@app.command()
def profile(spec: str = f"lora[rank={RANK}]", tiny: Tiny = False, out: Out = RESULTS / "lean.json") -> None:
    """What a training step of a method keeps and computes, by operation, beside the floor; into lean.json too."""
    quiet(1)
    setting = TINY if tiny else FULL
    batch = text(setting.rows, setting.length)
    models = {"floor": llama(setting.model), "ours": ours(spec, setting.model)}
    found: dict[str, Any] = {"saved": {}, "milliseconds": {}}
    for name, model in models.items():
        training_step(model, batch)()
        with Traced() as counter:
            value = hidden_loss(model, batch)
            gc.collect()
            found["saved"][name] = counter.summary()
            value.backward()
        forget(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as timed:
            for _ in range(3):
                training_step(model, batch)()
        found["milliseconds"][name] = {
            event.key: round(event.self_cpu_time_total / 3e3, 2)
            for event in sorted(timed.key_averages(), key=lambda event: -event.self_cpu_time_total)[:30]
        }
    for what, by in found.items():
        show(f"{what:>60}{'floor':>14}{'ours':>14}")
        for key in list(dict.fromkeys([*by["ours"], *by["floor"]]))[:30]:
            show(f"{key[-60:]:>60}{by['floor'].get(key, 0):>14,}{by['ours'].get(key, 0):>14,}")
    with kept_in(out) as stored:
        stored.setdefault("profiles", {})[spec] = found


# ---------------------------------------------------------------------------------- the table


def show(line: str) -> None:
    print(line, flush=True)


def quiet(threads: int) -> None:
    """One contender must not pay for pages that another one gave back: freed memory stays with the process (glibc)."""
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest there is
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def commit() -> str:
    """The commit that is measured; "-dirty" where sources differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def kept_in(out: Path) -> Iterator[dict[str, Any]]:
    """What the file holds, written back with what is added."""
    found = json.loads(out.read_text()) if out.exists() else {}
    yield found
    found["machine"] = hardware(torch.device("cpu"))
    found["versions"] = versions() | {"peft": peft.__version__}
    out.write_text(json.dumps(found, indent=1) + "\n")


def take(chosen: Sequence[str], tiny: bool, threads: int, repeats: int, out: Path, keep: bool = False) -> None:
    """Measure figures and keep them."""
    quiet(threads)
    setting = TINY if tiny else FULL
    setting = replace(setting, repeats=repeats or setting.repeats)
    made_of = {"commit": commit(), "versions": versions() | {"peft": peft.__version__}, "threads": threads}
    made_of["setting"] = json.loads(json.dumps(asdict(setting)))
    there = json.loads(out.read_text()).get("figures", {}) if out.exists() else {}
    for name in chosen:
        if keep and {key: there.get(name, {}).get(key) for key in made_of} == made_of:
            continue
        started = time.perf_counter()
        lines = FIGURES[name](setting)
        for line in lines:
            show(f"{name:10} {line.what:70} {shown(line.ours, line.unit):>9}   peft {shown(line.peft, line.unit)}")
        with kept_in(out) as found:
            took = {"seconds": round(time.perf_counter() - started), "rows": [asdict(line) for line in lines]}
            found.setdefault("figures", {})[name] = made_of | took
        gc.collect()


@app.command("all")
def every(
    keep: Annotated[bool, typer.Option(help="leave out what was measured of this commit already")] = False,
    tiny: Tiny = False, threads: int = 1, repeats: Repeats = 0, out: Out = RESULTS / "lean.json",
) -> None:  # fmt: skip
    """All figures, then the table."""
    take(list(FIGURES), tiny, threads, repeats, out, keep)
    table(out)


@app.command()
def gpu(out: Out = RESULTS / "lean.json") -> None:
    """Throughput and peak memory of 1B and 8B Llamas on a CUDA device, beside peft under the Trainer."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here, so the rows of the GPU are not measured.")
        raise typer.Exit
    import lean_gpu

    with kept_in(out) as found:
        device = torch.cuda.get_device_name()
        lines = [asdict(Row(**line)) for line in lean_gpu.measure()]
        found.setdefault("figures", {})["gpu"] = {"commit": commit(), "device": device, "rows": lines}
    table(out)


def shown(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    number = f"{value:,.0f}" if value >= 100 or (value == int(value) and not unit) else f"{value:.3g}"
    return number + unit


@app.command()
def table(out: Out = RESULTS / "lean.json") -> None:
    """Print the table, and write it with the details beside the figures."""
    found = json.loads(out.read_text())
    lines = list(targets(found))
    print("\n".join(lines))
    page = ["# Lean", "", f"Machine: {found['machine']}. Made by [benchmarks/lean.py](../lean.py), which says how.", ""]
    page += ["Versions: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + ".", ""]
    out.with_suffix(".md").write_text("\n".join([*page, *lines, *details(found)]) + "\n")


def targets(found: dict[str, Any]) -> Iterator[str]:
    """The figures beside their targets."""
    yield f"| figure | peft {found['versions']['peft']} | deltaworks | target | met |"
    yield "|---|---|---|---|---|"
    for name in [*FIGURES, "gpu"]:
        for stored in found["figures"].get(name, {"rows": []})["rows"]:
            row = Row(**stored)
            spread = f" ({shown(row.spread[0])} to {shown(row.spread[1])})" if row.spread else ""
            sign = ">=" if row.least else "<="
            yield (
                f"| {row.what} | {shown(row.peft, row.unit)} | {shown(row.ours, row.unit)}{spread} "
                f"| {sign} {shown(row.limit, row.unit)} | {'yes' if row.met else 'no'} |"
            )


def details(found: dict[str, Any]) -> Iterator[str]:
    """What stands behind the figures: contenders that are no target, every method, profiles."""
    figures = {name: each["rows"][0]["detail"] for name, each in found["figures"].items() if each["rows"]}
    if "saved" in figures:
        yield from ("", "Saved activations over the floor: storages that live, what autograd packs, and the peak.", "")
        yield from grid(figures["saved"]["over the floor"])
    if "steps" in figures:
        yield from ("", "Time of a step over the floor: median and quartiles.", "")
        by = figures["steps"]["over the floor"]
        yield from grid({name: {"median": m, "from": low, "to": high} for name, (m, (low, high)) in by.items()})
    if "rows" in figures:
        yield from ("", "Another adapter in each row, over the base, by tokens in a row.", "")
        yield from grid(
            {n: {"ours": by["ours"][0], "peft": by["peft"][0]} for n, by in figures["rows"]["by length"].items()}
        )
    if "methods" in figures:
        yield from (
            "",
            "Every method, over the floor; and bytes in files for each trained value, after three steps.",
            "",
        )
        files = figures.get("stored", {}).get("bytes for each value", {})
        ratios = {**figures["methods"]["over the floor"], "HRA of peft": figures["methods"]["HRA of peft"]}
        ordered = sorted(ratios, key=lambda name: -ratios[name]["saved"])
        yield from grid({name: {**ratios[name], "bytes": files.get(name, {}).get("file")} for name in ordered})
    for spec, by in found.get("profiles", {}).items():
        for what, heading in (("saved", "Bytes that a step keeps"), ("milliseconds", "Milliseconds of a step")):
            yield from ("", f"{heading}, {spec}, by operation.", "")
            keys = list(dict.fromkeys([*by[what]["ours"], *by[what]["floor"]]))[:16]
            yield from grid({key: {side: by[what][side].get(key) for side in ("floor", "ours")} for key in keys})


def grid(cells: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A table of numbers, with the names of its rows and columns."""
    columns = list(next(iter(cells.values())))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in cells.items():
        yield f"| {name} | {' | '.join(shown(row.get(column)) for column in columns)} |"


if __name__ == "__main__":
    sys.modules.setdefault("lean", sys.modules["__main__"])
    app()
