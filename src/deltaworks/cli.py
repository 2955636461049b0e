"""The command line. What a command needs is imported inside it, so that help is quick."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(
    name="deltaworks",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Every parameter-efficient fine-tuning method behind one call, compared on your own model and data.",
)
OUT = Path("runs/comparison")
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings of the recipe, such as steps=100")
]


class WithCheckpointing(TyperCommand):
    """A command whose ``--checkpointing`` may stand alone, and is of blocks then: Typer wants a value after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = zip(args, [*args[1:], "--"], strict=True)
        bare = [at for at, (word, after) in enumerate(following) if word == "--checkpointing" and after[:1] == "-"]
        for at in bare[:1]:
            args = [*args[: at + 1], "block", *args[at + 1 :]]
        return super().parse_args(ctx, args)


def command(
    example: str, parser: type[TyperCommand] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command. A user's mistake is one line on standard error and status 2, an interruption 130."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*values: Any, **named: Any) -> None:
            try:
                function(*values, **named)
                sys.stdout.flush()
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                raise SystemExit(130) from None
            except BrokenPipeError:  # the reader of a pipe has seen enough: what is left must go nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(1) from None
            except ValueError as error:
                if type(error).__name__ != "UserError":  # its module is not imported here: help must be quick
                    raise
                print(f"deltaworks: {error}", file=sys.stderr)
                raise SystemExit(2) from None

        app.command(epilog=f"Example: {example}", cls=parser)(guarded)
        return guarded

    return register


@command("deltaworks methods 'low-rank*'")
def methods(
    pattern: Annotated[str, typer.Argument(help="wildcard on names or families")] = "*",
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
) -> None:
    """List the methods: taxonomy, paper, form, default rate, and what each can do."""
    from deltaworks.listing import print_methods

    print_methods(pattern, as_json=json, as_markdown=markdown)


@command("deltaworks anatomy minilm")
def anatomy(
    model: Annotated[str, typer.Argument(help="minilm, tiny-lm, a folder, module:function, or a Hub id")],
    task: Annotated[str | None, typer.Option(help="load it for this task; default: the first that fits")] = None,
) -> None:
    """Show what a model is made of: the roles that targets are written in."""
    from deltaworks.listing import print_anatomy

    print_anatomy(model, task)


@command("deltaworks tune examples/minilm.yaml method=lora[rank=16] out=runs/lora")
def tune(
    recipe: Annotated[Path, typer.Argument(help="a YAML file with lines such as 'model: minilm'")],
    settings: Settings = None,
) -> None:
    """Train one adapter as a recipe says; save it with its record and a model card."""
    from deltaworks.train.recipe import read_recipe
    from deltaworks.train.tune import tune as run

    run(read_recipe(recipe, settings or []))


@command("deltaworks compare --methods head,lora,ia3 steps=60")
def compare(
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="minilm, tiny-lm, a folder, module:function, or a Hub id")] = None,
    data: Annotated[str | None, typer.Option(help="stdlib-docs, stdlib-text, a file, a folder, or a Hub id")] = None,
    methods: Annotated[str | None, typer.Option(help="methods with commas between; wildcards allowed")] = None,
    protocol: Annotated[
        str,
        typer.Option(help="quick, fair, survey, survey-small, peft-bench, or your.yaml: what is not given is its"),
    ] = "quick",
    seeds: Annotated[int | None, typer.Option(min=1, help="number of seeds")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="runs side by side; they share the cores")] = None,
    data_root: Annotated[Path | None, typer.Option(help="folder of the data sets that the protocol names")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the runs over a Ray cluster")] = "local",
    out: Annotated[Path, typer.Option(help="folder of records and report; run again to continue")] = OUT,
    keep_adapters: Annotated[bool, typer.Option("--keep-adapters", help="keep the trained adapters")] = False,
) -> None:
    """Compare methods head to head, each run in a process of its own, and write a report."""
    from deltaworks.compare.protocols import find_protocol
    from deltaworks.compare.run import compare as run
    from deltaworks.train.recipe import parse_overrides

    given: dict[str, Any] = parse_overrides(settings or [])
    given |= {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    chosen = find_protocol(protocol).changed(methods, seeds, workers, data_root, given)
    run(chosen, out, engine=engine, keep_adapters=keep_adapters)


@command("deltaworks report runs/comparison")
def report(folder: Annotated[Path, typer.Argument(help="the folder of a comparison; it holds records/")]) -> None:
    """Write the page of a comparison again, from its records."""
    from rich.console import Console

    from deltaworks.compare.live import summary
    from deltaworks.compare.report import write_report
    from deltaworks.store.records import read_records

    page = write_report(folder)
    summary(Console(), read_records(folder / "records"), page)


@command("deltaworks plan minilm --method lora[rank=16] --batch 32 --length 128", WithCheckpointing)
def plan(
    model: Annotated[
        str, typer.Argument(help="as above, or a config.json; of a Hub id only the configuration is read")
    ],
    method: Annotated[str, typer.Option(help="a method with its options")] = "lora",
    batch: Annotated[int, typer.Option(help="rows of a batch")] = 8,
    length: Annotated[int, typer.Option(help="tokens of a row")] = 128,
    task: Annotated[str | None, typer.Option(help="default: the first that the model can do")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of weights and arithmetic")] = "float32",
    quantize: Annotated[
        str | None, typer.Option(help="nf4, fp4, int8, int8wo or int4wo, for the linear layers of the base")
    ] = None,
    double_quantization: Annotated[
        bool, typer.Option("--double-quantization/--single-quantization", help="of the scales of nf4 and fp4")
    ] = True,
    checkpointing: Annotated[
        str | None, typer.Option(help="compute blocks again to save memory: block (or no word), selective or offload")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="a name such as rtx-4090; default: this machine; here: measure it anew")
    ] = None,
    labels: Annotated[int, typer.Option(help="number of classes")] = 2,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a run would need, before a weight is loaded: memory, arithmetic, time."""
    from deltaworks.advise.estimate import estimate
    from deltaworks.advise.plan import as_json, as_text

    found = estimate(
        model, method, batch=batch, length=length, task=task, dtype=dtype, quantize=quantize,
        double_quantization=double_quantization, checkpointing=checkpointing, hardware=hardware, labels=labels,
    )  # fmt: skip
    print(as_json(found) if json else as_text(found))


@command("deltaworks advise --task classification --examples 5000 --memory 24GB --storage 1MB")
def advise(
    model: Annotated[str | None, typer.Option(help="minilm, tiny-lm, a folder, module:function, or a Hub id")] = None,
    task: Annotated[str | None, typer.Option(help="classification, pairs, causal, seq2seq or images")] = None,
    labels: Annotated[int | None, typer.Option(help="number of classes")] = None,
    data: Annotated[str | None, typer.Option(help="for the recipe: a file, a folder, or a Hub id")] = None,
    examples: Annotated[int | None, typer.Option(help="number of training examples")] = None,
    memory: Annotated[str | None, typer.Option(help="such as 24GB; default: what the hardware has")] = None,
    hardware: Annotated[str | None, typer.Option(help="where it will run; default: this machine")] = None,
    trials: Annotated[int | None, typer.Option(help="runs for finding a learning rate; default: 3")] = None,
    epochs: Annotated[float | None, typer.Option(help="default: 3, or what a rule says")] = None,
    merge: Annotated[bool | None, typer.Option("--merge", help="the result must be one merged model")] = None,
    adapters_served: Annotated[int | None, typer.Option(help="adapters that answer over one base")] = None,
    storage: Annotated[str | None, typer.Option(help="most that one adapter may store, such as 1MB")] = None,
    batch: Annotated[int | None, typer.Option(help="rows of a batch; default: 32")] = None,
    length: Annotated[int | None, typer.Option(help="tokens of a row; default: 256")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the base; default: what fits")] = None,
    quantize: Annotated[str | None, typer.Option(help="such as nf4, for the base; default: what fits")] = None,
    methods: Annotated[str | None, typer.Option(help="methods you have in mind; wildcards allowed")] = None,
    records: Annotated[Path | None, typer.Option(help="folder of a comparison of yours")] = None,
    write: Annotated[Path | None, typer.Option(help="file for the recipe that deltaworks tune runs")] = None,
    json: Annotated[bool, typer.Option("--json", help="print all of it as JSON")] = False,
) -> None:
    """Advise on a method: published rules, predicted memory and time, and your own runs where you have them."""
    wanted = dict(locals())
    from deltaworks.advise.show import print_advice

    own, recipe, as_json = (wanted.pop(name) for name in ("records", "write", "json"))
    print_advice(wanted, records=own, write=recipe, as_json=as_json)


@command("deltaworks info runs/lora")
def info(adapter: Annotated[str, typer.Argument(help="a folder that holds an adapter, or its id on the Hub")]) -> None:
    """Say what a saved adapter is, without loading its base."""
    from deltaworks.listing import print_adapter
    from deltaworks.store.hub import located

    print_adapter(located(adapter))


@command("deltaworks merge runs/lora --out merged")
def merge(
    adapter: Annotated[Path, typer.Argument(help="a folder written by deltaworks tune")],
    out: Annotated[Path, typer.Option(help="folder for the merged model")],
    model: Annotated[str | None, typer.Option(help="the base; default: that of the adapter's recipe")] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="leave a quantized base quantized, at the cost that is printed")
    ] = False,
) -> None:
    """Merge an adapter into its base model, a quantized one made plain; check the outputs, and save the result."""
    from deltaworks.train.tune import merge as run

    run(adapter, out, model, requantize=requantize)


@command("deltaworks export runs/lora --format peft --out exported")
def export(
    adapter: Annotated[
        str, typer.Argument(help="a folder that holds an adapter, ours or peft's, or its id on the Hub")
    ],
    out: Annotated[Path, typer.Option(help="folder for what is written")],
    format: Annotated[
        str, typer.Option(help="peft, diffusers, vllm, kohya, merged (the whole model), or deltaworks")
    ] = "peft",
    model: Annotated[str | None, typer.Option(help="the base; default: what the adapter says")] = None,
    task: Annotated[str | None, typer.Option(help="load the base for this task; default: the first that fits")] = None,
    labels: Annotated[
        int | None, typer.Option(min=1, help="number of classes, without a record; default: what the files say")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="cut the change to a LoRA of this rank, and say its error")
    ] = None,
) -> None:
    """Write an adapter for another library, or merge it; say what that loses, refuse what it cannot express."""
    from deltaworks.store.hub import located
    from deltaworks.train.export import export as run

    run(located(adapter), format, out, source=model, task=task, labels=labels, rank=rank)


@command("deltaworks push runs/lora user/name")
def push(
    adapter: Annotated[Path, typer.Argument(help="a folder written by deltaworks tune, or by save")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hugging Face Hub; made where it is missing")],
    private: Annotated[bool | None, typer.Option("--private", help="where it is made, make it private")] = None,
    revision: Annotated[str | None, typer.Option(help="the branch to push to; default: main")] = None,
) -> None:
    """Upload an adapter, its model card, record and recipe to the Hugging Face Hub."""
    from deltaworks.store.hub import push as run

    print(run(adapter, repo_id, private=private, revision=revision))


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
