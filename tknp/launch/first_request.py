"""The first request: shows that everything works, and which path a request takes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=300.0)
_MAX_TOKENS = 32
_RECORD_TIMEOUT = 10.0  # seconds; the decode engine tells the router about the transfer only after the answer
_CHAT = "/v1/chat/completions"
_COMPLETION = "/v1/completions"
_MIB = 2**20


class FirstRequestError(Exception):
    """The router answered with an error; the message is the router's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class FirstRequest:
    """What was asked, so that the user can ask it again."""

    path: str
    body: dict[str, Any]

    def curl(self, url: str) -> str:
        body = json.dumps(self.body, ensure_ascii=False).replace("'", "'\\''")
        return f"curl -N {url}{self.path} -H 'Content-Type: application/json' -d '{body}'"


async def send_first_request(
    session: aiohttp.ClientSession, url: str, prompt: str, show: Callable[[str], None]
) -> tuple[FirstRequest, list[str]]:
    """Streams one answer to `show`, piece by piece; returns the request and lines that describe its path.

    Raises:
        FirstRequestError: the router refused it.
        aiohttp.ClientError, TimeoutError: the router can't be reached or stopped answering.
    """
    async with session.get(f"{url}/v1/models", timeout=_TIMEOUT) as reply:
        await _raise_for_error(reply)
        model = (await reply.json())["data"][0]["id"]
    common = {"model": model, "max_tokens": _MAX_TOKENS, "stream": True}
    request = FirstRequest(_CHAT, {**common, "messages": [{"role": "user", "content": prompt}]})
    try:
        request_id = await _stream(session, url, request, show)
    except FirstRequestError as error:
        if error.status != 400:
            raise
        # A base model has no chat template; it completes text.
        request = FirstRequest(_COMPLETION, {**common, "prompt": prompt})
        request_id = await _stream(session, url, request, show)
    return request, describe(await _record(session, url, request_id))


async def _stream(session: aiohttp.ClientSession, url: str, request: FirstRequest, show: Callable[[str], None]) -> str:
    async with session.post(url + request.path, json=request.body, timeout=_TIMEOUT) as reply:
        await _raise_for_error(reply)
        async for line in reply.content:
            data = line.decode().strip().removeprefix("data: ")
            if not data.startswith("{"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise FirstRequestError(500, str(event["error"].get("message", event["error"])))
            for choice in event.get("choices", ()):
                show(choice.get("text") or choice.get("delta", {}).get("content") or "")
        return reply.headers.get("X-Request-Id", "")


async def _record(session: aiohttp.ClientSession, url: str, request_id: str) -> dict[str, Any]:
    """What the router knows of the request; complete if it becomes so in time."""
    record: dict[str, Any] = {}
    deadline = asyncio.get_running_loop().time() + _RECORD_TIMEOUT
    while asyncio.get_running_loop().time() < deadline:
        async with session.get(f"{url}/requests/{request_id}", timeout=_TIMEOUT) as reply:
            if reply.status == 200:
                record = await reply.json()
        if record.get("kv_transfer") or record.get("local_prefill"):
            break
        await asyncio.sleep(0.2)
    return record


def describe(record: dict[str, Any]) -> list[str]:
    """The path of a request, from the router's record of it, one line a step."""
    engines = {attempt["role"]: attempt["engine"] for attempt in record.get("attempts", ())}
    phases = {name: f"{1000 * seconds:.1f} ms" for name, seconds in record.get("phases", {}).items()}
    transfer = record.get("kv_transfer")
    lines = []
    if "prefill" in engines:
        lines.append(f"prefill on {engines['prefill']}: {phases.get('prefill', 'time unknown')}")
    if transfer:
        size = transfer["kv_bytes"]
        took = phases.get("transfer", "time unknown")
        lines.append(f"KV cache to rank {transfer['rank']}: {size:,} bytes ({size / _MIB:.2f} MiB) in {took}")
    if "decode" in engines:
        rank = f", rank {transfer['rank']}" if transfer else ""
        first, rest = (phases.get(name, "time unknown") for name in ("first_token", "decode"))
        lines.append(f"decode on {engines['decode']}{rank}: first token after {first}, the others in {rest}")
    other = [f"{name} {phases[name]}" for name in ("route", "handoff", "total") if name in phases]
    if other:
        lines.append("router: " + ", ".join(other))
    return lines


async def _raise_for_error(reply: aiohttp.ClientResponse) -> None:
    if reply.status == 200:
        return
    text = await reply.text()
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip() or reply.reason or "no reason given"
    raise FirstRequestError(reply.status, f"HTTP {reply.status}: {message}")
