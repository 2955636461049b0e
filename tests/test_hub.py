"""Adapters pushed to and loaded from a stand-in for the Hub, over HTTP, by the Hub's own client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, serve
from huggingface_hub import ModelCard
from toy import Toy

import deltaworks as dw
from deltaworks.store import hub as store_hub
from deltaworks.store.hub import push


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve(str(tmp_path / "cache")) as stand_in:
        yield stand_in


def trained() -> tuple[Toy, dw.Delta]:
    model = Toy(32)
    delta = dw.attach(model, "lora", rank=2)
    torch.manual_seed(1)
    for parameter in delta.parameters():
        parameter.data.normal_()
    return model, delta


def test_an_adapter_comes_back_from_the_hub(hub: Hub) -> None:
    model, delta = trained()
    address = delta.push_to_hub("ada/support", private=True)
    assert address.endswith("/ada/support")
    assert hub.private == {"ada/support": True}
    names = hub.repositories["ada/support"].keys() - {".gitattributes"}
    assert {name.partition("-")[0] for name in names} == {"adapter.json", "adapter", "README.md"}

    x, other = torch.randn(2, 5, 32), Toy(32)
    loaded = dw.load(other, "ada/support", name="support")
    assert torch.equal(other(x), model(x))
    assert loaded.config == delta.config


def test_pushing_again_replaces_and_the_newest_is_loaded(hub: Hub) -> None:
    model, delta = trained()
    delta.push_to_hub("ada/support")
    before = hub.commit("ada/support")
    for parameter in delta.parameters():
        parameter.data.mul_(2)
    delta.push_to_hub("ada/support", commit_message="twice as much")
    assert hub.messages == ["Push an adapter with deltaworks", "twice as much"]
    x, other = torch.randn(2, 5, 32), Toy(32)
    dw.load(other, "ada/support", revision="main")
    assert torch.equal(other(x), model(x))
    with pytest.raises(dw.UserError, match="no such revision"):
        dw.load(Toy(32), "ada/support", revision=before)


def test_nothing_but_the_adapter_moves(hub: Hub, tmp_path: Path) -> None:
    _, delta = trained()
    delta.save(tmp_path / "own")
    for name in ("optimizer.pt", "training_args.bin", ".env", "notes.txt"):
        (tmp_path / "own" / name).write_bytes(b"secret")
    push(tmp_path / "own", "ada/own")
    assert not {"optimizer.pt", "training_args.bin", ".env", "notes.txt"} & hub.repositories["ada/own"].keys()

    hub.repositories["ada/own"] |= {"adapter_model.bin": b"\x80pickle", "evil.pkl": b"\x80", "model.safetensors": b""}
    dw.load(Toy(32), "ada/own")
    assert {name.partition("-")[0] for name in hub.fetched} == {"adapter.json", "adapter"}


def test_the_card_that_is_pushed(hub: Hub) -> None:
    _, delta = trained()
    delta.push_to_hub("ada/support")
    text = hub.repositories["ada/support"]["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data == {"library_name": "deltaworks", "tags": ["deltaworks", "peft", "lora"]}
    assert 'delta = dw.load(model, "ada/support")' in text
    assert f"{sum(parameter.numel() for parameter in delta.parameters()):,} values" in text


def test_what_is_pushed_in_the_format_of_peft_is_what_peft_reads(hub: Hub) -> None:
    from peft import PeftModel

    model, delta = trained()
    delta.push_to_hub("ada/peft", format="peft")
    names = hub.repositories["ada/peft"].keys() - {".gitattributes"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert ModelCard(hub.repositories["ada/peft"]["README.md"].decode()).data.library_name == "peft"

    x, ours = torch.randn(2, 5, 32), Toy(32)
    theirs = PeftModel.from_pretrained(Toy(32), str(store_hub.fetch("ada/peft")))
    dw.load(ours, "ada/peft")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_repository_without_an_adapter(hub: Hub) -> None:
    hub.repositories["ada/model"] = {"model.safetensors": b"0" * 1000, "adapter_model.bin": b"\x80"}
    with pytest.raises(dw.UserError, match="'ada/model' holds no adapter"):
        dw.load(Toy(32), "ada/model")
    assert hub.fetched == []


def test_without_a_network_the_cache_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model, delta = trained()
    delta.push_to_hub("ada/support")
    dw.load(Toy(32), "ada/support")
    fetched = len(hub.fetched)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    x, other = torch.randn(2, 5, 32), Toy(32)
    dw.load(other, "ada/support")
    assert torch.equal(other(x), model(x))
    assert len(hub.fetched) == fetched


@pytest.mark.parametrize(
    ("closed", "sentence"),
    [
        (None, "does not exist, or is not yours"),
        ((401, ""), "log in with 'hf auth login'"),
        ((403, ""), "log in with 'hf auth login'"),
        ((403, "GatedRepo"), "its owner must grant you access"),
        ((500, ""), "cannot be fetched"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, closed: tuple[int, str] | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if closed is not None:
        hub.closed["ada/closed"] = closed
    model = Toy(32)
    with pytest.raises(dw.UserError, match=sentence) as caught:
        dw.load(model, "ada/closed")
    assert "\n" not in str(caught.value)
    assert "ada/closed" in str(caught.value)
    if closed is not None:
        with pytest.raises(dw.UserError, match="cannot be pushed") as caught:
            trained()[1].push_to_hub("ada/closed")
        assert "\n" not in str(caught.value)


def test_mistakes_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_hub, "hub_is_reachable", lambda: False)
    _, delta = trained()
    with pytest.raises(dw.UserError, match="'ada/x' cannot be fetched: it is no local folder"):
        dw.load(Toy(32), "ada/x")
    with pytest.raises(dw.UserError, match="cannot be reached"):
        delta.push_to_hub("ada/x")
    with pytest.raises(dw.UserError, match="holds no adapter to push"):
        push(tmp_path, "ada/x")
    with pytest.raises(dw.UserError, match="write it as 'user/name'"):
        delta.push_to_hub("ada/x/y")
    with pytest.raises(dw.UserError, match="has no revision 'v1'"):
        dw.load(Toy(32), tmp_path, revision="v1")
