"""Adapters on the Hugging Face Hub: pushed from a folder, fetched by id. Nothing that could be unpickled moves."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deltaworks.core.errors import UserError
from deltaworks.store.files import write_atomically

if TYPE_CHECKING:
    from deltaworks.core.delta import Delta

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
CARD = "README.md"
FETCHED = ("adapter*.json", "adapter*.safetensors", "*lora_weights.safetensors", "record.json", CARD)
"""What is fetched of a repository, whatever else lies in it."""
PUSHED = (*FETCHED, "recipe.yaml")
CONNECT_SECONDS = 3.0


def hub_is_reachable() -> bool:
    """Whether a connection to the Hub opens within 3 seconds.

    The Hub's own clients retry for most of a minute before they give up; asking first lets them look into
    the local cache at once. Behind a proxy only the client can know: True.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def hub_id(source: str) -> str | None:
    """``source`` if it can be the id of a model or data set on the Hub and is no path of this machine."""
    return source if HUB_ID.fullmatch(source) and not Path(source).exists() else None


def located(place: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter: a path of this machine as it is, ``"user/name"`` fetched from the Hub.

    Raises UserError where the Hub or the repository cannot be reached.
    """
    if isinstance(place, Path) or "/" not in place or hub_id(place) is None:
        if revision is not None:
            raise UserError(f"{str(place)!r} is no id on the Hub, so it has no revision {revision!r}: leave that out")
        return Path(place)
    return fetch(place, revision)


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The adapter files of a repository, from the local cache where they did not change. Raises UserError."""
    from huggingface_hub import snapshot_download

    reachable = hub_is_reachable()
    with _explained("fetched", repo_id, reachable=reachable):
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(FETCHED), local_files_only=not reachable)
        )
    if not holds_adapter(folder):
        raise UserError(f"the repository {repo_id!r} holds no adapter in safetensors: check the id")
    return folder


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of a format that is read here."""
    from deltaworks.store import foreign
    from deltaworks.store.checkpoint import MANIFEST

    return (folder / MANIFEST).is_file() or foreign.recognised(folder) is not None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload the adapter in ``folder`` to a repository of the Hub, which is made where it is missing.

    Uploads the adapter, its card, record and recipe, and no other file of the folder. Returns the address. Raises
    UserError where the folder holds no adapter or the Hub refuses.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not holds_adapter(folder):
        raise UserError(
            f"{str(folder)!r} holds no adapter to push: give a folder written by save or by deltaworks tune"
        )
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is not an id on the Hub: write it as 'user/name'")
    if not hub_is_reachable():
        raise UserError(
            f"{repo_id!r} cannot be pushed: the Hugging Face Hub cannot be reached, or HF_HUB_OFFLINE is set"
        )
    api = HfApi(token=token)
    with _explained("pushed", repo_id):
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=list(PUSHED),
            revision=revision,
            commit_message=commit_message or "Push an adapter with deltaworks",
        )
    return str(made)


def push_delta(
    delta: Delta, repo_id: str, *, format: str = "deltaworks", rank: int | None = None, **options: Any
) -> str:
    """Save an adapter, in a format and with a rank as ``Delta.save`` does, write its card, and push both."""
    from deltaworks.store.card import card_of_delta

    with tempfile.TemporaryDirectory(prefix="deltaworks-") as folder:
        delta.save(folder, format=format, rank=rank)
        write_atomically(Path(folder) / CARD, card_of_delta(delta, repo_id, format))
        return push(folder, repo_id, **options)


@contextmanager
def _explained(done: str, repo_id: str, *, reachable: bool = True) -> Iterator[None]:
    """Whatever the Hub's client raises becomes one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client raises many kinds, of its own and of its transport
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # why the Hub was not asked, rather than that the cache is empty
        status = getattr(getattr(error, "response", None), "status_code", None)
        lines = [line for line in str(error).strip().splitlines() if line]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        if isinstance(error, errors.LocalEntryNotFoundError) and not reachable:
            reason = "it is no local folder, and the Hugging Face Hub cannot be reached and has no cached copy of it"
        elif isinstance(error, errors.GatedRepoError):
            reason = "its owner must grant you access: ask on its page, then log in with 'hf auth login'"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = "it has no such revision: give a branch, a tag or a commit that is there"
        elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            reason = "it does not exist, or is not yours to see or write: check the id, or log in with 'hf auth login'"
        raise UserError(f"the adapter {repo_id!r} cannot be {done}: {reason}") from error
