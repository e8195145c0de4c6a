"""API keys: the file that holds them, and the check of a request's.

A file is one of two kinds. Plain: one key a line, `#` begins a comment. TOML (its name ends in .toml), where either the
key itself or its SHA-256 stands, and everything else is optional:

    [[keys]]
    name = "team-a"        # for logs and metrics
    sha256 = "9f86d0..."   # or key = "sk-..."
    priority = "high"      # high, normal or low: of its requests, unless they ask for a lower one
    weight = 2.0           # share of the engines relative to other keys' while requests wait
    max_requests = 50      # in the router at once
    admin = true           # sees every key's requests, and may use the paths below /admin/
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tomllib
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.callers import PRIORITIES, Caller
from router.errors import InvalidKey

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MIN_KEY_LENGTH = 8
RESERVED_NAMES = ("anonymous", "unnamed")  # what metrics call callers without a name
HOW_TO_SEND = "Send one as 'Authorization: Bearer <key>'."


class KeyFileError(ValueError):
    """Says what is wrong with the file, and never what stands in it."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    key: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    priority: Literal["high", "normal", "low"] = "normal"
    weight: Annotated[float, Field(strict=False, ge=0.01, le=1000)] = 1.0
    max_requests: Annotated[int, Field(ge=1)] | None = None
    admin: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    keys: list[_Entry]


def read_keys(path: Path) -> list[Caller]:
    """Raises KeyFileError unless the file holds at least one key and nothing that is unclear."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"the key file {path} can't be read: {_reason(error)}") from None
    entries = _toml_entries(text, path) if path.suffix == ".toml" else _line_entries(text)
    callers = [_caller(entry, place, path) for place, entry in entries]
    if not callers:
        raise KeyFileError(f"the key file {path} holds no key")
    _refuse_twins(callers, path)
    return callers


class KeyRing:
    """Finds the caller of a key in a time that depends neither on the key nor on how many there are.

    What is looked up is the key's digest under a secret of this object's own, so nobody can choose or learn any part of
    what it is compared with.
    """

    def __init__(self, callers: Iterable[Caller]) -> None:
        self._secret = os.urandom(32)
        self._callers = {self._mask(caller.id): caller for caller in callers}

    def find(self, authorization: bytes | None, *, takes_basic: bool = False) -> Caller:
        """The caller that the value of an Authorization header belongs to. Raises InvalidKey.

        Args:
            takes_basic: whether a key may also be the password of HTTP's Basic scheme, which browsers ask people for.
        """
        if authorization is None:
            raise InvalidKey(f"This server needs an API key. {HOW_TO_SEND}", is_missing=True, takes_basic=takes_basic)
        scheme, _, credentials = authorization.partition(b" ")
        scheme = scheme.lower()
        key = credentials.strip() if scheme == b"bearer" else b""
        if takes_basic and scheme == b"basic":
            key = _password(credentials)
        caller = self._callers.get(self._mask(hashlib.sha256(key).digest()))
        if caller is None:
            message = f"The API key is not one of this server's. {HOW_TO_SEND}"
            raise InvalidKey(message, is_missing=False, takes_basic=takes_basic)
        return caller

    def _mask(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _line_entries(text: str) -> list[tuple[str, _Entry]]:
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(place, _Entry(key=line)) for place, line in lines if line and not line.startswith("#")]


def _toml_entries(text: str, path: Path) -> list[tuple[str, _Entry]]:
    try:
        entries = _File.model_validate(tomllib.loads(text)).keys
    except tomllib.TOMLDecodeError as error:
        # The parser's own message may quote a piece of the line.
        raise KeyFileError(f"the key file {path} is not TOML ({_where(error)})") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise KeyFileError(f"the key file {path} is wrong at {place}: {first['msg']}") from None
    return [(f"entry {number}", entry) for number, entry in enumerate(entries, 1)]


def _caller(entry: _Entry, place: str, path: Path) -> Caller:
    if (entry.key is None) == (entry.sha256 is None):
        raise KeyFileError(f"the key file {path}, {place}: give either key or sha256")
    if entry.key is not None:
        if len(entry.key) < MIN_KEY_LENGTH or not all("!" <= char <= "~" for char in entry.key):
            raise KeyFileError(
                f"the key file {path}, {place}: a key has at least {MIN_KEY_LENGTH} characters, all printable ASCII"
            )
        digest = hashlib.sha256(entry.key.encode()).digest()
    else:
        digest = bytes.fromhex(entry.sha256 or "")
    if entry.name in RESERVED_NAMES:
        raise KeyFileError(f"the key file {path}, {place}: the name {entry.name!r} is taken by the router itself")
    priority = PRIORITIES[entry.priority]
    return Caller(digest, entry.name, priority, priority, entry.weight, entry.max_requests, entry.admin)


def _refuse_twins(callers: list[Caller], path: Path) -> None:
    names = [caller.name for caller in callers if caller.name is not None]
    if len({caller.id for caller in callers}) != len(callers):
        raise KeyFileError(f"the key file {path} holds the same key twice")
    if len(set(names)) != len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise KeyFileError(f"the key file {path} uses the name {twin!r} twice")


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8"


def _where(error: tomllib.TOMLDecodeError) -> str:
    at = str(error).rfind("(at ")
    return str(error)[at:].strip("()") if at >= 0 else "at an unknown place"
