from __future__ import annotations

from pathlib import Path

import pytest

from router.engine_file import read_engines
from router.types import Endpoint, Role
from tests.router.conftest import StartStack
from tests.router.running import running_router, wait_for
from tests.router.scripted_engine import chunk, raw_stream


def test_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    path.write_text("# pools\nprefill http://a:1/\n\ndecode   http://b:2 # the big one\n")
    assert read_engines(path) == [Endpoint(Role.PREFILL, "http://a:1"), Endpoint(Role.DECODE, "http://b:2")]


@pytest.mark.parametrize(
    "line", ["decode", "decode b:2", "both http://b:2", "decode http://b:2/v1", "prefill http://a:1"]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "engines"
    path.write_text(f"prefill http://a:1\n{line}\n")
    with pytest.raises(ValueError, match="line 2: "):
        read_engines(path)


def test_engines_join_and_leave_by_the_file(start_stack: StartStack, tmp_path: Path) -> None:
    """One that leaves ends its stream first; a file that can't be read changes nothing."""
    engines = start_stack(num_decode=2)
    prefill, first, second = (*engines.prefill, *engines.decode)
    path = tmp_path / "engines"
    path.write_text(f"prefill {prefill.url}\ndecode {first.url}\n")
    with running_router([], discovery="file", engines_file=path) as router:

        def urls() -> list[str]:
            return [engine.endpoint.url for engine in router.state.pool.engines if engine.is_up]

        wait_for(lambda: urls() == [prefill.url, first.url])
        first.behaviour = raw_stream(chunk(0), chunk(1), b"data: [DONE]\n\n", then="end", pause=1.5)
        raw = router.open_stream()
        wait_for(lambda: first.seen)
        path.write_text(f"prefill {prefill.url}\ndecode {second.url}\n")
        wait_for(lambda: second.url in urls())
        assert first.url in urls(), "it left before its stream had ended"
        assert router.complete().status == 200
        assert len(second.seen) == 1
        got = b""
        while b"[DONE]" not in got:
            got += raw.recv(4096)
        raw.close()
        wait_for(lambda: urls() == [prefill.url, second.url])
        path.write_text("nonsense\n")
        path.write_text("more nonsense\n")
        assert router.complete().status == 200
        assert urls() == [prefill.url, second.url]
