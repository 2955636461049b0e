"""Files that are never half-written: every write is whole or did not happen."""

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaworks.core.errors import UserError

# A temporary nobody wrote to for this long (seconds) was left behind by a killed process.
_ABANDONED_AFTER = 3600.0

# Characters of the name that a temporary keeps: at 4 bytes each they stay below the usual limit of 255 bytes.
_PREFIX = 40

_MENDS = {
    errno.ENOSPC: "the disk is full: free some space or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "permission is denied: choose a folder you own or change its permissions",
    errno.EPERM: "permission is denied: choose a folder you own or change its permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a file of that name is in the way of the folder: choose another path",
    errno.EISDIR: "the path is a folder: give the path of a file",
    errno.ENOTEMPTY: "the path is a folder: give the path of a file",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EFBIG: "the file is larger than the file system or the process limit allows",
    errno.ELOOP: "the path is a circle of symbolic links: choose another path",
}


def _mistake(action: str, path: Path, error: OSError) -> UserError:
    """The UserError for a failed file operation: what, which path, and the mend."""
    mend = _MENDS.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot {action} {str(path)!r}: {mend}")


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system can sync folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows and some network file systems cannot open a folder
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Remove the temporaries of ``target`` that killed processes left behind."""
    now = time.time()
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if not (entry.name.startswith(f".{target.name[:_PREFIX]}.") and entry.name.endswith(".tmp")):
                continue
            with contextlib.suppress(OSError):
                if now - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_AFTER:
                    os.unlink(entry.path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    For writers that want a path rather than bytes (safetensors, archives). The temporary exists and is
    empty on entry. On any exception it is removed and an old file at ``path`` stays as it was. A symbolic
    link at ``path`` stays a link: the file it points to is replaced. Missing folders are created.

    Raises:
        UserError: the file cannot be written (disk full, read-only, a folder in the way, ...).
    """
    asked = Path(path)
    temporary: Path | None = None
    try:
        target = Path(os.path.realpath(asked))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        candidate = target.parent / f".{target.name[:_PREFIX]}.{secrets.token_hex(6)}.tmp"
        os.close(os.open(candidate, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = candidate
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(target.stat().st_mode & 0o777)
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
        _sweep(target)
    except OSError as error:
        raise _mistake("write", asked, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` (text as UTF-8) to ``path`` so that a reader sees the old file or the new one, whole.

    The data goes to a temporary file in the same folder, is flushed to the disk and renamed over ``path``;
    a crash or ``kill -9`` at any moment leaves the old file or the new one. Missing folders are created.

    Raises:
        UserError: the file cannot be written; names the path and the mend. The old file is untouched.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        stream.write(content)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Create ``folder`` if needed and prove that a file can be written in it, before any work is done.

    Returns:
        The folder as a path.

    Raises:
        UserError: the folder cannot be created, or no file can be written in it.
    """
    place = Path(folder)
    probe = place / f".writable.{secrets.token_hex(6)}.tmp"
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "xb") as stream:
                stream.write(b"\0" * 4096)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _mistake("write in the folder", place, error) from error
    return place


@contextlib.contextmanager
def claimed(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """``check_writable`` for a block: folders that were missing are gone again where it raises and they are empty."""
    place = Path(folder)
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        yield check_writable(place)
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in the JSON file at ``path``. ``NaN`` and ``Infinity``, which are not JSON, are refused.

    Raises:
        UserError: the file is missing, unreadable, cut off or not JSON; names the path.
    """
    place = Path(path)
    try:
        raw = place.read_bytes()
    except FileNotFoundError:
        raise UserError(f"cannot read {str(place)!r}: there is no such file") from None
    except OSError as error:
        raise _mistake("read", place, error) from error
    if not raw.strip():
        raise UserError(f"cannot read {str(place)!r}: the file is empty")
    try:
        return json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        if isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()):
            raise UserError(f"cannot read {str(place)!r}: the file is cut off before its end") from error
        raise UserError(f"cannot read {str(place)!r}: it is not JSON ({error})") from error
