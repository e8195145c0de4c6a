from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from router.callers import Priority
from router.errors import InvalidKey
from router.keys import KeyFileError, KeyRing, read_keys

SECRET = "sk-very-secret-0001"
OTHER = "sk-very-secret-0002"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_plain_file_has_one_key_a_line(tmp_path: Path) -> None:
    ring = KeyRing(read_keys(write(tmp_path / "keys", f"# team\n{SECRET}\n\n  {OTHER}  \n")))
    first, second = (ring.find(f"Bearer {key}".encode()) for key in (SECRET, OTHER))
    assert first.id != second.id
    assert first.name is None
    assert not first.is_admin


def test_a_toml_file_says_what_a_key_is_good_for(tmp_path: Path) -> None:
    digest = hashlib.sha256(OTHER.encode()).hexdigest().upper()
    text = f"""
        [[keys]]
        name = "team-a"
        key = "{SECRET}"
        priority = "high"
        weight = 3
        max_requests = 5
        admin = true
        [[keys]]
        sha256 = "{digest}"
    """
    ring = KeyRing(read_keys(write(tmp_path / "keys.toml", text)))
    found = ring.find(f"bearer {SECRET}".encode())
    assert (found.name, found.priority, found.highest) == ("team-a", Priority.HIGH, Priority.HIGH)
    assert (found.weight, found.max_requests, found.is_admin) == (3.0, 5, True)
    assert ring.find(f"Bearer {OTHER}".encode()).priority is Priority.NORMAL


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}", "Bearer \xff"],
)
def test_nothing_but_the_key_opens(tmp_path: Path, value: str) -> None:
    ring = KeyRing(read_keys(write(tmp_path / "keys", SECRET)))
    with pytest.raises(InvalidKey) as caught:
        ring.find(value.encode("latin-1"))
    assert not caught.value.is_missing
    assert SECRET[:8] not in caught.value.message


def test_callers_are_the_same_over_two_files(tmp_path: Path) -> None:
    before, after = (read_keys(write(tmp_path / "keys", text))[0] for text in (SECRET, f"{SECRET}\n{OTHER}"))
    assert before.id == after.id


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("keys", "", "holds no key"),
        ("keys", "# nothing\n", "holds no key"),
        ("keys", "short", "line 1: a key has at least 8"),
        ("keys", f"{SECRET}\nwith a space", "line 2"),
        ("keys", f"{SECRET}\n{SECRET}", "the same key twice"),
        ("keys.toml", "[[keys", "is not TOML"),
        ("keys.toml", "", "keys: Field required"),
        ("keys.toml", "keys = []", "holds no key"),
        ("keys.toml", f'[[keys]]\nkey = "{SECRET}"\nwieght = 2', "keys.0.wieght"),
        ("keys.toml", f'[[keys]]\nkey = "{SECRET}"\nweight = 0', "keys.0.weight"),
        ("keys.toml", f'[[keys]]\nkey = "{SECRET}"\npriority = "top"', "keys.0.priority"),
        ("keys.toml", '[[keys]]\nname = "a"', "entry 1: give either key or sha256"),
        ("keys.toml", f'[[keys]]\nkey = "{SECRET}"\nsha256 = "{"0" * 64}"', "either key or sha256"),
        ("keys.toml", f'[[keys]]\nsha256 = "{SECRET}"', "keys.0.sha256"),
        ("keys.toml", f'[[keys]]\nname = "anonymous"\nkey = "{SECRET}"', "taken by the router"),
        (
            "keys.toml",
            f'[[keys]]\nname = "a"\nkey = "{SECRET}"\n[[keys]]\nname = "a"\nkey = "{OTHER}"',
            "the name 'a' twice",
        ),
        ("keys.toml", f"[[keys]]\nkey = {SECRET}", "is not TOML"),
    ],
)
def test_a_bad_file_is_named_and_not_quoted(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(KeyFileError, match=message) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None  # a traceback would quote it


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        read_keys(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeyFileError, match="UTF-8"):
        read_keys(tmp_path / "binary")
