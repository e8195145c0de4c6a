"""How the contract tests look at vLLM: its sources and signatures. A failure names what moved and who relies on it."""

from __future__ import annotations

import ast
import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import vllm

VLLM = Path(vllm.__file__).parent


def source(of: Callable[..., Any]) -> str:
    """The source of a function or class, all on one line, so that its formatting does not matter."""
    return " ".join(inspect.getsource(of).split())


def parameters(of: Callable[..., Any]) -> list[str]:
    """Names of the parameters, without `self`."""
    return [name for name in inspect.signature(of).parameters if name != "self"]


def syntax_tree(text: str) -> ast.Module:
    """Parsed without garbage collection: what a finaliser prints, with a traceback, parses too, and that ends Python
    3.11's parser with a SystemError (https://github.com/python/cpython/issues/106905)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if was_on:
            gc.enable()


def calls(path: str, method: str) -> Iterator[ast.Call]:
    """Every call of `….method(…)` in one file of vLLM's, or in all files of a folder."""
    place = VLLM / path
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        for node in ast.walk(syntax_tree(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                yield node


def attributes_of(path: str, owner: str) -> set[str]:
    """The names in every `….owner.<name>` and `owner.<name>` of one file of vLLM's."""
    return {
        node.attr
        for node in ast.walk(syntax_tree((VLLM / path).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == owner
    }


def require(condition: object, moved: str, relied_on_by: str) -> None:
    """Fails with both names unless `condition` holds."""
    assert condition, f"vLLM has changed: {moved}. {relied_on_by} relies on it"


def require_all(missing: Iterable[str], what: str, relied_on_by: str) -> None:
    """Fails unless nothing is `missing`."""
    names = sorted(missing)
    assert not names, f"vLLM has changed: {what}: {names}. {relied_on_by} relies on it"
