"""Mixed traffic: what is asked, how its client behaves, and what came of it."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.e2e.processes import MODEL_LENGTH
from tests.e2e.suite import Ask, chat, completion, tokens
from tests.soak.conversations import Conversation, Conversations
from tests.soak.plan import SoakPlan

NUM_PROMPTS = 60


# What changes nothing about an answer's tokens, and makes it harder to go on with its stream on another engine.
STOP: dict[str, Any] = {"stop": ["never, ever"]}
TOLD: tuple[dict[str, Any], ...] = ({}, {}, STOP, {"logprobs": 2}, {**STOP, "logprobs": 0})
TOLD_IN_CHAT: tuple[dict[str, Any], ...] = ({}, {}, STOP, {"logprobs": True, "top_logprobs": 2})


class Behaviour(StrEnum):
    """What the client does."""

    PATIENT = "patient"
    SLOW = "slow"  # reads its stream with pauses
    IN_BODY = "hangs up while it sends its body"
    EARLY = "hangs up before the first byte of the answer"
    IN_STREAM = "hangs up after some bytes of the stream"

    @property
    def hangs_up(self) -> bool:
        return self in (Behaviour.IN_BODY, Behaviour.EARLY, Behaviour.IN_STREAM)


class End(StrEnum):
    """How a request ended, as its client saw it."""

    ANSWERED = "answered"
    REFUSED = "refused"  # 4xx with OpenAI's error body
    ERROR = "error"  # 5xx with OpenAI's error body, or an error event in the stream
    HUNG_UP = "hung_up"
    LOST = "lost"  # no answer in time, or the end of the connection in the middle of one
    WRONG = "wrong"  # an answer that this request must not get


@dataclass(frozen=True)
class Job:
    """One request; `raw` where its body is not JSON. `prompt` names what is compared: equal prompts, equal tokens."""

    number: int
    ask: Ask
    behaviour: Behaviour
    delay: float  # s or, in a stream, reads until the client hangs up
    is_valid: bool = True
    prompt: str | None = None
    raw: bytes | None = None
    conversation: Conversation | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        return f"soak-{self.number}"


@dataclass(frozen=True)
class Seen:
    """What a client got."""

    end: End
    detail: str = ""
    token_ids: tuple[int, ...] = ()
    text: str = ""  # of the first choice, as the ids are


class Mix:
    """Draws requests, always the same ones for a seed."""

    def __init__(self, plan: SoakPlan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._conversations = Conversations(self._random)
        self._num_drawn = 0

    def draw(self) -> Job:
        rng, self._num_drawn = self._random, self._num_drawn + 1
        if rng.random() < self._plan.invalid:
            ask, raw = self._invalid()
            return Job(self._num_drawn, ask, Behaviour.PATIENT, 0.0, is_valid=False, raw=raw)
        conversation = self._conversations.pick() if rng.random() < self._plan.conversations else None
        ask, prompt = self._valid() if conversation is None else self._turn(conversation)
        behaviour = self._behaviour(bool(ask.body.get("stream")))
        # Prefill, hand-over and first token lie within some hundred milliseconds of one another.
        delay = rng.randint(1, 12) if behaviour is Behaviour.IN_STREAM else rng.expovariate(1 / 0.6)
        return Job(self._num_drawn, ask, behaviour, delay, prompt=prompt, conversation=conversation)

    def _valid(self) -> tuple[Ask, str | None]:
        rng = self._random
        stream: dict[str, Any] = {"stream": True} if rng.random() < 0.6 else {}
        max_tokens = rng.choice((1, 4, 16, 16, 40, 90))
        if rng.random() < 0.25:
            number = rng.randrange(NUM_PROMPTS)
            fields = {**stream, **rng.choice(TOLD_IN_CHAT)}
            ask = chat(f"Tell me the story number {number}. " * rng.choice((1, 8)), max_tokens, **fields)
            return ask, f"{ask.body['messages']}"
        # Few prompts, so that some are cached; a third of them long.
        number = rng.randrange(NUM_PROMPTS)
        length = 200 + 7 * number if number % 3 == 0 else 1 + number
        if rng.random() < 0.1:
            sampled = {"n": rng.choice((2, 3)), "temperature": 0.8}
            return completion(tokens(length, number), max_tokens, **sampled, **stream), None
        return completion(tokens(length, number), max_tokens, **stream, **rng.choice(TOLD)), f"tokens {number}"

    def _turn(self, conversation: Conversation) -> tuple[Ask, str]:
        ask = conversation.turn()
        stream = {"stream": True} if self._random.random() < 0.6 else {}
        prompt = f"conversation {conversation.number} after {len(conversation.said)} tokens"
        return Ask(ask.path, {**ask.body, **stream}), prompt

    def _invalid(self) -> tuple[Ask, bytes | None]:
        good = completion([5, 6, 7], 4)
        bad: list[dict[str, Any]] = [
            {"model": "nobody"},
            {"max_tokens": -1},
            {"temperature": "hot"},
            {"prompt": tokens(MODEL_LENGTH + 50, 3)},
            {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 9}},
            {"n": 0},
            {"stream_options": {"include_usage": True}},
        ]
        number = self._random.randrange(len(bad) + 1)
        if number == len(bad):
            return good, b'{"model": "tiny", "prompt": [1, 2'
        return Ask(good.path, {**good.body, **bad[number]}), None

    def _behaviour(self, is_stream: bool) -> Behaviour:
        drawn = self._random.random()
        if drawn < self._plan.hang_ups:
            ways = [Behaviour.EARLY, Behaviour.EARLY, Behaviour.IN_BODY]
            return self._random.choice([*ways, *([Behaviour.IN_STREAM] * 3 if is_stream else [])])
        return Behaviour.SLOW if is_stream and drawn > 1 - self._plan.slow_clients else Behaviour.PATIENT


async def ask(port: int, job: Job, seconds: float) -> Seen:
    """Sends one request on a connection of its own and behaves as the job says."""
    try:
        async with asyncio.timeout(seconds):
            return await _ask(port, job)
    except TimeoutError:
        return Seen(End.LOST, f"no end after {seconds:.0f} s")
    except OSError as error:
        return Seen(End.LOST, f"{type(error).__name__}: {error}")


async def _ask(port: int, job: Job) -> Seen:
    body = job.raw if job.raw is not None else json.dumps(job.ask.body).encode()
    head = (
        f"POST {job.ask.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX-Request-Id: {job.id}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if job.behaviour is Behaviour.IN_BODY:
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            await asyncio.sleep(min(job.delay, 1.0))
            return Seen(End.HUNG_UP)
        writer.write(head + body)
        await writer.drain()
        if job.behaviour is Behaviour.EARLY:
            try:
                async with asyncio.timeout(job.delay):
                    await reader.read(1)
            except TimeoutError:
                pass
            return Seen(End.HUNG_UP)
        return await _read(reader, job)
    finally:
        writer.transport.abort()  # a client that is gone says no goodbye


async def _read(reader: asyncio.StreamReader, job: Job) -> Seen:
    got = b""
    num_reads = 0
    while data := await reader.read(256 if job.behaviour is Behaviour.SLOW else 2**16):
        got += data
        num_reads += 1
        if job.behaviour is Behaviour.IN_STREAM and num_reads > job.delay:
            return Seen(End.HUNG_UP)
        if job.behaviour is Behaviour.SLOW:
            await asyncio.sleep(0.05)
    if not got:
        return Seen(End.LOST, "the connection ended without an answer")
    head, _, body = got.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in head.lower():
        body = _dechunked(body)
    if status != 200:
        return _error(status, body, job)
    if not job.is_valid:
        return Seen(End.WRONG, f"status 200 for {_shortened(job)}")
    return _stream(body, job) if job.ask.body.get("stream") else _whole(body, job)


def _error(status: int, body: bytes, job: Job) -> Seen:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return Seen(End.LOST, f"status {status} without an error that can be read: {body[:100]!r}")
    if status == 500:
        return Seen(End.WRONG, f"status 500: {message[:200]}")
    if 400 <= status < 500 and status != 429:
        if job.is_valid:
            return Seen(End.WRONG, f"status {status} for {_shortened(job)}: {message[:200]}")
        return Seen(End.REFUSED, message)
    return Seen(End.ERROR, f"{status}: {message[:200]}")


def _whole(body: bytes, job: Job) -> Seen:
    try:
        answer = json.loads(body)
        choices, usage = answer["choices"], answer["usage"]
        wanted = job.ask.body["max_tokens"] * job.ask.body.get("n", 1)
        if usage["completion_tokens"] != wanted:
            return Seen(End.WRONG, f"{usage['completion_tokens']} tokens where {wanted} were asked for")
        return Seen(End.ANSWERED, token_ids=tuple(choices[0]["token_ids"]), text=_text(choices[0]))
    except (ValueError, KeyError, TypeError) as error:
        return Seen(End.LOST, f"an answer that can't be read ({error!r}): {body[-100:]!r}")


def _stream(body: bytes, job: Job) -> Seen:
    events = [e.removeprefix(b"data: ") for e in body.replace(b"\r\n", b"\n").split(b"\n\n") if e.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        for event in events[-2:]:
            if event.startswith(b'{"error"'):
                message = json.loads(event)["error"]["message"][:100]
                return Seen(End.ERROR, f"in the stream of {_shortened(job)}: {message}")
        return Seen(End.LOST, f"a stream without an end after {len(events)} events: {body[-100:]!r}")
    by_choice: dict[int, list[int]] = {}
    text = ""
    for event in events[:-1]:
        parsed = json.loads(event)
        if "error" in parsed:
            return Seen(End.ERROR, f"in the stream: {str(parsed['error'].get('message'))[:200]}")
        for choice in parsed["choices"]:
            by_choice.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
            text += _text(choice) if choice["index"] == 0 else ""
    wanted = job.ask.body["max_tokens"] * job.ask.body.get("n", 1)
    if (found := sum(map(len, by_choice.values()))) != wanted:
        return Seen(End.WRONG, f"{found} streamed tokens where {wanted} were asked for")
    return Seen(End.ANSWERED, token_ids=tuple(by_choice[0]), text=text)


def _text(choice: dict[str, Any]) -> str:
    """Of a completion's choice or a chat's, streamed or whole."""
    said = choice.get("message") or choice.get("delta") or {}
    return str(choice.get("text") or said.get("content") or "")


def _dechunked(body: bytes) -> bytes:
    """As much as is there."""
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        try:
            length = int(size, 16)
        except ValueError:
            break
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


def _shortened(job: Job) -> str:
    fields = {n: v for n, v in job.ask.body.items() if n not in ("prompt", "messages")}
    return f"{job.ask.path} {fields}"
