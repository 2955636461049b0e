"""Whole or not at all: files survive kill -9, full disks and read-only folders."""

import errno
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaworks.core.errors import UserError
from deltaworks.store import files
from deltaworks.store.files import check_writable, read_json, replacing, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(("data", "expected"), [("naïve ✓\n", "naïve ✓\n".encode()), (b"\0\xff", b"\0\xff")])
def test_text_is_utf8_and_bytes_stay_as_they_are(tmp_path: Path, data: str | bytes, expected: bytes) -> None:
    write_atomically(tmp_path / "deep" / "file", data)
    assert (tmp_path / "deep" / "file").read_bytes() == expected
    assert names(tmp_path / "deep") == ["file"]


def test_an_exception_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, "old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("code", "mend"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_failing_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, mend: str
) -> None:
    target = tmp_path / "file"
    write_atomically(target, "old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(UserError, match=mend) as caught:
        write_atomically(target, "new")
    monkeypatch.undo()
    assert str(target) in str(caught.value)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always-full device")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    def full(_: object, mode: str) -> object:
        return builtins.open("/dev/full", mode)

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(UserError, match="the disk is full"):
        write_atomically(tmp_path / "file", "new")
    assert names(tmp_path) == []


def test_a_folder_in_the_way_and_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_atomically(tmp_path / "folder", "x")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="a file"):
        write_atomically(tmp_path / "file" / "below", "x")
    with pytest.raises(UserError, match="a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="a file"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="too long"):
        write_atomically(tmp_path / ("n" * 300), "x")
    assert (tmp_path / "file").read_text() == "kept"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="permission"):
            check_writable(tmp_path)
        with pytest.raises(UserError, match="permission"):
            write_atomically(tmp_path / "file", "x")
    finally:
        tmp_path.chmod(0o700)


def test_check_writable_creates_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []


def test_long_names_and_modes_and_links_are_kept(tmp_path: Path) -> None:
    long = tmp_path / ("ü" * 120)  # 240 bytes of the usual 255
    write_atomically(long, "x")
    assert long.read_text() == "x"
    target = tmp_path / "file"
    write_atomically(target, "old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_only_abandoned_temporaries_are_swept(tmp_path: Path) -> None:
    abandoned, fresh, foreign = (
        tmp_path / ".file.aaaaaaaaaaaa.tmp",
        tmp_path / ".file.bbbbbbbbbbbb.tmp",
        tmp_path / "other.tmp",
    )
    for path in (abandoned, fresh, foreign):
        path.write_text("")
    day_ago = time.time() - 86400
    os.utime(abandoned, (day_ago, day_ago))
    os.utime(foreign, (day_ago, day_ago))
    write_atomically(tmp_path / "file", "x")
    assert names(tmp_path) == [".file.bbbbbbbbbbbb.tmp", "file", "other.tmp"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "empty"),
        (b'{"a": [1, 2', "cut off"),
        (b'{"a"', "cut off"),
        (b"not json", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": 1} trailing', "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 200_000, "not JSON|cut off"),
    ],
)
def test_broken_json_is_one_sentence(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_read_json_missing_folder_and_good(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)
    write_atomically(tmp_path / "good.json", '{"a": [1, 2.5, null]}')
    assert read_json(tmp_path / "good.json") == {"a": [1, 2.5, None]}


KILLER = """
import json, os, random, signal, sys, time
from deltaworks.store.files import write_atomically

target, chance, found = sys.argv[1], random.Random(0), []

def write(version):
    write_atomically(target, json.dumps({"version": version, "body": [version] * 20000}))

write(0)
for kill in range(100):
    version = kill * 10**6
    child = os.fork()
    while child == 0:
        version += 1
        write(version)
    time.sleep(chance.uniform(0.002, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content = json.loads(open(target, "rb").read())
    assert content["body"] == [content["version"]] * 20000
    found.append(content["version"])
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_random_moments_never_leaves_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    source = str(Path(files.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(target)],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    versions = json.loads(done.stdout)
    assert len(versions) == 100
    assert versions == sorted(versions)
    # the kills struck writers at work: most children had replaced the file, some more than once
    assert len(set(versions)) > 50
    assert any(version % 10**6 > 1 for version in versions)
