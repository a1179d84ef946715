"""The folder of the lock files lies where everybody may write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ktverify.isolation import locks
from tests.support.command_line import run_pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folder of this user's locks has to be; not there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(locks.HELD_BY_PARENT, raising=False)
    return tmp_path / f"ktverify-locks-{os.geteuid()}"


def test_the_folder_is_the_user_s_alone(folder: Path) -> None:
    for mode in (None, 0o777):
        if mode is not None:
            folder.chmod(mode)
        with locks.computing(), locks.big():
            assert folder.stat().st_mode & 0o777 == 0o700
            assert sorted(path.name for path in folder.iterdir()) == ["big", "computing", "turnstile"]


def _of_another_user(place: Path) -> None:
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of another user")
    os.chown(place, 12345, 12345)


def _link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")


def _link_to_nothing(place: Path) -> None:
    place.symlink_to(place.parent / "nothing")


TAKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "of another user": (_of_another_user, "belongs to user 12345"),
    "a link": (_link, "is no folder of user"),
    "a link to nothing": (_link_to_nothing, "is no folder of user"),
    "a file": (Path.touch, "is no folder of user"),
    "a pipe": (os.mkfifo, "is no folder of user"),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_a_name_that_is_taken_is_refused_in_one_line(taken: str, folder: Path) -> None:
    make, says = TAKEN[taken]
    make(folder)
    with pytest.raises(PermissionError, match=says) as refused, locks.computing():
        pass
    text = str(refused.value)
    assert str(folder) in text
    assert "TMPDIR" in text
    assert len(text.splitlines()) == 1
    assert not (folder.parent / "elsewhere").exists() or not list((folder.parent / "elsewhere").iterdir())


def test_a_link_in_place_of_a_lock_is_not_followed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "computing").symlink_to(folder.parent / "victim")
    with pytest.raises(OSError, match="symbolic link"), locks.computing():
        pass
    assert not (folder.parent / "victim").exists()


def test_a_run_of_the_suites_ends_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = run_pytest(tmp_path / "run", "suites/forward", "--engine=torch_bf16", "--cases=tiny")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "is no folder of user" in lines[0]
