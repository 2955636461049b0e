"""The command line: quick help, one line for a mistake, and each command on a tiny model."""

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_data import SETTINGS, write_letters

import deltaworks as dw
from deltaworks import cli
from deltaworks.store.records import read_record

Call = Callable[..., tuple[int, str, str]]
COMMANDS = ("methods", "anatomy", "tune", "compare", "advise", "info", "merge", "export", "push")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process: (exit status, standard output, standard error)."""
    monkeypatch.chdir(Path(__file__).parent)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaworks", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = {**SETTINGS, "data": str(write_letters(tmp_path)), "method": "lora[rank=2]", "out": str(tmp_path / "out")}
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items()))
    return path


def test_help_needs_less_than_a_second_of_the_processor() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-m", "deltaworks", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert all(command in shown.stdout for command in COMMANDS)


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys, deltaworks.cli; print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_is_understood(command: str, call: Call) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    example = " ".join(out.partition("Example: ")[2].split())
    words = shlex.split(example)
    assert words[:2] == ["deltaworks", command]
    parsed = cli.typer.main.get_command(cli.app).make_context("deltaworks", words[1:], resilient_parsing=False)
    group = parsed.command
    name, sub, rest = group.resolve_command(parsed, [*parsed._protected_args, *parsed.args])
    assert name == command
    sub.make_context(command, rest)  # every option and argument is known


def test_methods_lists_what_the_registry_holds(call: Call) -> None:
    status, out, _ = call("methods", "--json")
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert status == 0
    assert found.keys() == set(dw.methods())
    assert (found["lora"]["form"], found["lora"]["merge"]) == (1, None)
    assert "weight" in found["houlsby"]["merge"]
    assert found["houlsby"]["form"] == 3
    assert found["lora"]["options"]["rank"] == {"default": 8, "help": found["lora"]["options"]["rank"]["help"]}
    assert all(entry["form"] in (1, 2, 3) for entry in found.values())
    status, out, _ = call("methods", "low-rank*")
    assert status == 0
    assert "lora" in out
    assert "houlsby" not in out


def test_anatomy_of_a_function(call: Call) -> None:
    status, out, _ = call("anatomy", "tiny_models:classifier")
    assert status == 0
    assert "attention.q" in out


def test_tune_then_info_then_merge(call: Call, recipe: Path, tmp_path: Path) -> None:
    status, out, err = call("tune", recipe, "steps=30")
    assert (status, err) == (0, "")
    folder = tmp_path / "out"
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {
        "README.md", "adapter", "adapter.json", "recipe.yaml", "record.json",
    }  # fmt: skip
    record = read_record(folder / "record.json")
    assert (record.steps, record.method, record.status) == (30, "lora[rank=2]", "finished")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: deltaworks\n")
    assert "`lora[rank=2]`" in card

    status, out, _ = call("info", folder)
    assert status == 0
    for piece in ("lora[rank=2]", "BertForSequenceClassification", "float32", "accuracy"):
        assert piece in out

    status, out, err = call("merge", folder, "--out", tmp_path / "merged")
    assert status == 0, err
    assert "largest output difference" in out
    check_transformers_reads(tmp_path / "merged", folder)


def check_transformers_reads(merged: Path, adapter: Path) -> None:
    """The merged folder gives the outputs of the classifier with its adapter."""
    import tiny_models
    import transformers

    base, read = tiny_models.classifier(), transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    dw.load(base, adapter)
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(tokens).logits, base(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_merged_model_that_was_pruned_has_files_that_transformers_reads(
    call: Call, recipe: Path, tmp_path: Path
) -> None:
    status, _, err = call("tune", recipe, "steps=10", "method=lora[rank=2]+light-peft[estimate=4, heads=0]")
    assert (status, err) == (0, "")
    assert call("merge", tmp_path / "out", "--out", tmp_path / "merged")[0] == 0
    check_transformers_reads(tmp_path / "merged", tmp_path / "out")


def test_merge_of_a_model_that_transformers_does_not_know(call: Call, recipe: Path, tmp_path: Path) -> None:
    words = ["model=tiny_models:plain", "method=lora[rank=2, targets=first]"]
    status, _, err = call("tune", recipe, *words)
    assert status == 0, err
    status, _, err = call("merge", tmp_path / "out", "--out", tmp_path / "merged")
    assert status == 0, err
    import tiny_models

    model = tiny_models.plain()
    before = model.first.weight.clone()
    model.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert not torch.equal(model.first.weight, before)


def test_merging_what_cannot_be_merged_says_why(call: Call, recipe: Path, tmp_path: Path) -> None:
    assert call("tune", recipe, "method=houlsby[reduction=4]")[0] == 0
    status, _, err = call("merge", tmp_path / "out", "--out", tmp_path / "merged")
    assert status == 2
    assert "cannot be merged" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["methods", "lorra"], "did you mean 'lora'"),
        (["anatomy", "minilmm"], "did you mean 'minilm'"),
        (["tune", "none.yaml"], "'none.yaml' cannot be read"),
        (["tune", "RECIPE", "metod=lora"], "did you mean 'method'"),
        (["tune", "RECIPE", "method=lorra"], "did you mean 'lora'"),
        (["tune", "RECIPE", "method=lora[rnk=2]"], "did you mean 'rank'"),
        (["tune", "RECIPE", "method=lora[rank=0]"], "rank=0 must be at least 1"),
        (["tune", "RECIPE", "method=lora[rank=99]"], "rank"),
        (["tune", "RECIPE", "method=lora[targets=attention.quary]"], "did you mean 'attention.query|'attention.q"),
        (["tune", "RECIPE", "columns=text=txt"], "txt"),
        (["tune", "RECIPE", "data=nowhere.jsonl"], "nowhere.jsonl"),
        (["tune", "RECIPE", "model=tiny_models:clasifier"], "did you mean 'classifier'"),
        (["tune", "RECIPE", "model=tiny_models:broken"], "no weights here"),
        (["tune", "RECIPE", "device=cuda:77"], "device 'cuda:77' cannot be used"),
        (["tune", "RECIPE", "out=/dev/null/sub"], "/dev/null/sub"),
        (["compare", "--methods", "lora,,ia3"], "empty part"),
        (["compare", "--methods", "lorra"], "did you mean 'lora'"),
        (["compare", "--protocol", "quik"], "did you mean 'quick'"),
        (["compare", "seed=3"], "use --methods, --seeds and --out"),
        (["info", "nowhere"], "there is no adapter folder 'nowhere'"),
        (["merge", "nowhere", "--out", "x"], "'nowhere' has no record.json"),
        (["push", "nowhere", "user/name"], "'nowhere' holds no adapter to push"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str], sentence: str, call: Call, recipe: Path, tmp_path: Path
) -> None:
    named = [str(recipe) if word == "RECIPE" else word for word in words]
    if words[0] == "compare":
        named += ["--out", str(tmp_path / "comparison")]
    status, _, err = call(*named)
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("deltaworks: ")
    assert any(part.strip("'") in err for part in sentence.split("|")), err
    assert "Traceback" not in err


def test_a_diverging_tune_saves_no_adapter_but_its_record(call: Call, recipe: Path, tmp_path: Path) -> None:
    status, _, err = call("tune", recipe, "rates=1e6")
    assert status == 2
    assert "diverged" in err
    assert read_record(tmp_path / "out" / "record.json").status == "diverged"
    assert not (tmp_path / "out" / "adapter.json").exists()


def test_an_interruption_is_one_line_and_status_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deltaworks.listing.print_methods", interrupted)
    status, _, err = call("methods")
    assert (status, err.strip()) == (130, "interrupted")


def test_an_unknown_command_or_option_is_explained(call: Call) -> None:
    for words in (["metods"], ["methods", "--jsn"], ["compare", "--seeds", "0"]):
        status, _, err = call(*words)
        assert status == 2
        assert "Traceback" not in err
        assert "Usage" in err


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{shlex.quote(sys.executable)} -m deltaworks methods --json | head -c 1"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ})
    assert "Traceback" not in shown.stderr
