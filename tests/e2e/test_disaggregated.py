"""The whole system: router, a prefill engine and a decode engine with two token-parallel ranks, on real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.e2e import expected
from tests.e2e.conftest import Expected
from tests.e2e.processes import Service, start_decode, start_prefill, start_router, wait_for
from tests.e2e.stack import Stack, running
from tests.e2e.suite import (
    BLOCK,
    answer,
    answer_streamed,
    answers,
    around_boundaries,
    completion,
    conversations,
    crowd,
    sampled,
    tokens,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
BYTES_PER_BLOCK = 4 * 2 * 4 * BLOCK * 32 * 4
"""Of the tiny Llama: layers x key and value x KV heads x tokens x head size x bytes of a float32."""


@pytest.fixture(scope="module")
def stack(models: Callable[[str], Path], log_dir: Path, plain_llama: Expected) -> Iterator[Stack]:
    model = models("llama")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic")  # for examples/ask.py
    prefill, decode = start_prefill(model, log_dir, *tools), start_decode(model, log_dir, 2, *tools)
    with running(prefill, decode, log_dir) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.router.url + "/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


def test_prompts_around_block_and_chunk_boundaries(stack: Stack, plain_llama: Expected) -> None:
    asks = around_boundaries(seed=1)
    assert [answer(stack.router, ask) for ask in asks] == plain_llama(asks)


def test_many_requests_at_once(stack: Stack, plain_llama: Expected) -> None:
    asks = crowd(seed=2)
    assert answers(stack.router, asks, at_once=32) == plain_llama(asks)
    received = [rank["kv_bytes_received"] for rank in stack.ranks()]
    assert all(received), f"both ranks should have taken requests, but received {received} bytes"


def test_chat_and_streaming(stack: Stack, plain_llama: Expected) -> None:
    asks = [*conversations(), *around_boundaries(seed=1)[:6]]
    assert [answer_streamed(stack.router, ask) for ask in asks] == plain_llama(asks)
    assert [answer(stack.router, ask) for ask in asks[:3]] == plain_llama(asks[:3])


def test_seeded_sampling_several_sequences_and_stop(stack: Stack, plain_llama: Expected) -> None:
    asks = sampled()
    assert [answer(stack.router, ask) for ask in asks] == plain_llama(asks)


def test_the_decode_engine_is_a_server_of_its_own(stack: Stack, plain_llama: Expected) -> None:
    # Fresh prompts' KV cache is computed on their rank, in chunks, with no prefill pool in sight.
    assert stack.decode.post("/reset_prefix_cache", {}).status_code == 200
    pulled = [rank["kv_bytes_received"] for rank in stack.ranks()]
    asks = [*around_boundaries(seed=1), *conversations()]
    assert answers(stack.decode, asks, at_once=8) == plain_llama(asks)
    assert [rank["kv_bytes_received"] for rank in stack.ranks()] == pulled


def test_the_examples_run_as_they_stand(stack: Stack) -> None:
    said = ""
    for command in ([sys.executable, str(EXAMPLES / "ask.py")], [str(EXAMPLES / "ask.sh")]):
        done = subprocess.run([*command, stack.router.url], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    assert " tokens in, " in said
    assert "tool: weather " in said
    assert "data: [DONE]" in said
    assert '"kv_transfer"' in said


def test_prefix_hits_are_not_pulled_again(stack: Stack, plain_llama: Expected) -> None:
    asks = expected.shared_prefix()
    pulled = []
    for i, (ask, tokens_expected) in enumerate(zip(asks, plain_llama(asks), strict=True)):
        reply = stack.router.post(ask.path, ask.body, headers={"X-Request-Id": f"prefix-{i}"})
        assert [choice["token_ids"] for choice in reply.json()["choices"]] == tokens_expected
        pulled.append(stack.transfer(f"prefix-{i}")["kv_bytes"])
    assert pulled[0] == 7 * BYTES_PER_BLOCK  # 220 tokens
    assert pulled[1:] == [BYTES_PER_BLOCK] * 4, "six whole blocks are on the rank already"


def test_kv_goes_straight_to_its_owner(stack: Stack) -> None:
    before = [rank["kv_bytes_received"] for rank in stack.ranks()]
    due = [0, 0]
    for i, length in enumerate((40, 200, 310)):
        ask = completion(tokens(length, 50 + i), 4)
        name = f"owner-{i}-{time.time_ns()}"
        assert stack.router.post(ask.path, ask.body, headers={"X-Request-Id": name}).status_code == 200
        record = stack.transfer(name)
        assert record["kv_bytes"] == -(-length // BLOCK) * BYTES_PER_BLOCK
        due[record["rank"]] += record["kv_bytes"]
    received = [rank["kv_bytes_received"] - old for rank, old in zip(stack.ranks(), before, strict=True)]
    assert received == due, "a rank received bytes that are not its own requests'"


def test_kv_workers_hold_no_weights_and_only_their_own_blocks(stack: Stack) -> None:
    root, kv_worker = stack.ranks()
    assert root["parameter_bytes"] > 1_000_000
    assert kv_worker["parameter_bytes"] == 4 * 4 * 4, "four float32 attention scales in each of four layers"
    reply = stack.decode.post("/collective_rpc", {"method": "token_parallel_blocks"}).json()
    for report in reply["results"]:
        assert report["written"], "this rank's cache should have been used by now"
        assert set(report["written"]) <= set(report["owned"]), "blocks were written that no request of the rank had"


def test_each_moment_of_a_request_is_recorded(stack: Stack) -> None:
    ask = completion(tokens(100, 60), 8)
    reply = stack.router.post(ask.path, {**ask.body, "stream": True}, headers={"X-Request-Id": "moments"})
    assert reply.headers["X-Request-Id"] == "moments"
    moments = stack.record("moments")["moments"]
    order = ["received", "prefill_sent", "prefill_done", "decode_sent", "transfer_begin", "transfer_end", "first_token"]
    times = [moments[name] for name in [*order, "last_token"]]
    assert times == sorted(times), moments


def test_the_router_knows_the_room_of_every_rank(stack: Stack) -> None:
    room = stack.decode.get("/token_parallel/room")["ranks"]
    assert [(rank["rank"], rank["block_size"]) for rank in room] == [(0, BLOCK), (1, BLOCK)]
    assert [rank["num_blocks"] for rank in room] == [rank["num_blocks"] for rank in stack.ranks()]
    (engine,) = [engine for engine in stack.router.get("/ready")["engines"] if engine["role"] == "decode"]
    assert [rank["num_blocks"] for rank in engine["kv_ranks"]] == [rank["num_blocks"] for rank in room]


def test_metrics(stack: Stack) -> None:
    assert stack.router.metric("prefill_requests_total") > 0
    assert stack.router.metric("decode_requests_total") > 0
    pulls = stack.decode.metric("kv_transfer_duration_seconds_count", rank="1", path="nixl")
    assert 0 < stack.decode.metric("tknp_kv_handover_seconds_count", rank="1", path="nixl") <= pulls
    assert stack.decode.metric("tknp_kv_transfer_bytes_total") == sum(r["kv_bytes_received"] for r in stack.ranks())
    answer(stack.router, completion(tokens(10, 61), 100))
    efficiency = wait_for(lambda: stack.decode.metric("token_parallel_efficiency"), 30, "an efficiency")
    assert 0 < efficiency <= 1


def test_openai_client(stack: Stack, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages: Any = [{"role": "user", "content": "Hello, how are you?"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, logprobs=True)
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


def test_structured_output_and_tools_pass_through(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Answer in JSON."}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
        tools=[
            {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
        ],
        tool_choice="none",
    )
    content = reply.choices[0].message.content
    assert content is not None and json.loads(content) in ({"a": "x"}, {"a": "y"})


def test_responses(stack: Stack, client: openai.OpenAI) -> None:
    """The same conversation as a chat gets the same text, over both legs."""
    messages: Any = [{"role": "user", "content": "What is the capital of France? Answer at some length."}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0)
    fields: dict[str, Any] = {"model": "tiny", "input": messages, "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**fields, extra_headers={"X-Request-Id": "response"})
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == "incomplete" and whole.usage is not None and whole.usage.output_tokens == 16
    record = stack.record("response")
    assert [attempt["role"] for attempt in record["attempts"]] == ["prefill", "decode"]
    assert record["local_prefill"] is None
    events = list(client.responses.create(**fields, stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type == "response.completed"
    with client.responses.create(**{**fields, "max_output_tokens": 400}, stream=True) as stream:
        next(iter(stream))
    stack.wait_idle()


def test_a_response_with_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    named: dict[str, Any] = {"name": "answer", "schema": {**schema, "additionalProperties": False}, "strict": True}
    messages: Any = [{"role": "user", "content": "Answer in JSON."}]
    wanted: Any = {"type": "json_schema", "json_schema": named}
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=60, temperature=0, response_format=wanted
    )
    text: Any = {"format": {"type": "json_schema", **named}}
    reply = client.responses.create(model="tiny", input=messages, max_output_tokens=60, temperature=0, text=text)
    assert reply.output_text == chat.choices[0].message.content
    assert reply.output_text.startswith("{")


def test_usage_tells_what_the_prefill_engine_had_cached(stack: Stack, client: openai.OpenAI) -> None:
    """And not what the decode engine pulled, which is nearly everything."""
    prompt = tokens(200, 80)
    cached = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (200, 2)
        cached.append(usage.prompt_tokens_details.cached_tokens)
    stream = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    last = list(stream)[-1].usage
    assert last is not None and last.prompt_tokens_details is not None
    cached.append(last.prompt_tokens_details.cached_tokens)
    assert cached == [0, 200 // BLOCK * BLOCK, 200 // BLOCK * BLOCK]
    response = client.responses.create(
        model="tiny", input="A prompt that nobody sent before. " * 9, max_output_tokens=16
    )
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens < BLOCK


def test_tokens_and_models(stack: Stack, client: openai.OpenAI) -> None:
    found = stack.router.post("/tokenize", {"prompt": "Hello world", "add_special_tokens": False}).json()["tokens"]
    assert stack.router.post("/detokenize", {"model": "tiny", "tokens": found}).json() == {"prompt": "Hello world"}
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.BadRequestError, match="can't make embeddings"):
        client.embeddings.create(model="tiny", input="Hello")


def test_prompt_longer_than_the_model_takes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?s)1024.*1100|1100.*1024"):
        client.completions.create(model="tiny", prompt=tokens(1100, 70), max_tokens=5)


def test_requests_aborted_half_way_give_everything_back(stack: Stack, plain_llama: Expected) -> None:
    asks = around_boundaries(seed=1)[5:9]
    for ask in crowd(seed=9, count=6):
        body = {**ask.body, "stream": True, "max_tokens": 400}
        with stack.router.post(ask.path, body, stream=True) as reply:
            next(reply.iter_lines())
    # The others are not touched by it.
    assert [answer(stack.router, ask) for ask in asks] == plain_llama(asks)
    stack.wait_idle()


def test_kv_cache_streams_while_its_prompt_is_computed(stack: Stack, plain_llama: Expected, log_dir: Path) -> None:
    router = start_router(log_dir, [stack.prefill], [stack.decode], "--stream-kv", name="streaming-router")
    try:
        router.wait_whole()
        for engine in (stack.prefill, stack.decode):
            assert engine.post("/reset_prefix_cache", {}).status_code == 200
        wait_for(lambda: _hidden_bytes_of(router, stack), 60, "a request whose KV cache was streamed")
        asks = [*around_boundaries(seed=1), *crowd(seed=2), *sampled()]
        assert answers(router, asks, at_once=8) == plain_llama(asks)
        for cached in (0, 200 // BLOCK * BLOCK):
            usage = router.post("/v1/completions", completion(tokens(200, 81), 2).body).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached
        for ask in crowd(seed=8, count=12):
            assert router.post(ask.path, {**ask.body, "stream": True}).status_code == 200
        assert not router.metric("tknp_requests_total", outcome="cancelled"), "they closed with their whole answers"
        for ask in crowd(seed=9, count=6):
            with pytest.raises(requests.Timeout):
                requests.post(router.url + ask.path, json={**ask.body, "max_tokens": 400}, timeout=0.1)
        stack.wait_idle()
        assert not stack.decode.metric("tknp_kv_transfer_stale_total", reason="other_prompt")
    finally:
        router.stop()


def _hidden_bytes_of(router: Service, stack: Stack) -> float:
    """Bytes of one more request that arrived before its prefill's end."""
    before = stack.decode.metric("tknp_kv_transfer_hidden_bytes_total")
    assert router.post("/v1/completions", completion(tokens(700, time.time_ns()), 4).body).status_code == 200
    return stack.decode.metric("tknp_kv_transfer_hidden_bytes_total") - before


def test_a_dead_kv_worker_ends_the_engine_with_a_clear_message(stack: Stack) -> None:
    """The last test of this file: it kills the decode engine."""
    pid = stack.ranks()[1]["pid"]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(
        lambda: requests.get(stack.router.url + "/ready", timeout=5).status_code == 503, 10, "/ready turning false"
    )
    code = stack.decode.process.wait(timeout=20)
    assert time.monotonic() - killed < 20
    assert code != 0
    assert (
        f"the KV worker of token-parallel rank 1, tensor-parallel rank 0, pid {pid} has died"
        in stack.decode.log.read_text()
    )
    reply = stack.router.post("/v1/completions", completion([5, 6, 7], 4).body)
    assert reply.status_code == 503 and "Retry-After" in reply.headers
