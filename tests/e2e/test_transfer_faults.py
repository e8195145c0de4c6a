"""What can happen to a prefill engine between its answer and the end of the pull, on real engines: the decode engine
lives on, the tokens are plain vLLM's, and no block is held in the end. The test plays the router. Blocks cross packed,
as between hosts (the other tests of this folder have them cross one by one), and every block that is pulled is compared
with its checksum (kv_transfer.checksums)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from kv_transfer import checksums
from tests.e2e.conftest import Expected
from tests.e2e.processes import ENGINE_OPTIONS, Service, start_decode, tknp, wait_for
from tests.e2e.suite import BLOCK, Ask, around_boundaries, completion, tokens
from tests.soak.engines import SoakEngine
from tknp.common.ports import free_port
from tknp.launch.guard import descendants

LEASE_SECONDS = 6
PATIENCE = 40.0
"""Seconds within which a request must be answered whatever happens to the prefill engine; it takes few on an idle
machine."""
ASKS = around_boundaries(seed=1)[-5:]  # prompts of 64 to 700 tokens


class Engines:
    def __init__(self, prefill: SoakEngine, decode: Service) -> None:
        self.prefill = prefill
        self.decode = decode

    def offer(self, ask: Ask) -> Any:
        """The prefill leg: the `kv_transfer_params` that it is answered with."""
        wanted = {"do_remote_decode": True, "do_remote_prefill": False}
        body = {**ask.body, "max_tokens": 1, "kv_transfer_params": wanted}
        reply = self.prefill.service.post(ask.path, body)
        assert reply.status_code == 200, reply.text
        params = reply.json()["kv_transfer_params"]
        assert params["remote_block_ids"], "it keeps nothing"
        return params

    def take(self, ask: Ask, params: Any) -> list[list[int]]:
        """The decode leg: the answer's token ids."""
        body = {**ask.body, "kv_transfer_params": params}
        reply = requests.post(self.decode.url + ask.path, json=body, timeout=PATIENCE)
        assert reply.status_code == 200, reply.text
        return [choice["token_ids"] for choice in reply.json()["choices"]]

    def stale(self, reason: str) -> float:
        return self.decode.metric("tknp_kv_transfer_stale_total", reason=reason)

    def forget(self) -> None:
        """What the decode engine has cached, so that everything has to be pulled."""
        assert self.decode.post("/reset_prefix_cache", {}).status_code == 200

    def wait_idle(self, seconds: float) -> None:
        """Until nothing is held on either side."""
        for service in (self.decode, self.prefill.service):
            wait_for(
                lambda service=service: service.metric("vllm:kv_cache_usage_perc") == 0,  # type: ignore[misc]
                seconds,
                f"{service.name} having given everything back",
            )


@pytest.fixture(scope="module")
def engines(models: Callable[[str], Path], log_dir: Path, plain_llama: Expected) -> Iterator[Engines]:
    """A prefill engine that always comes back at the same address and under the same name, which is the worst case."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(checksums.VARIABLE, "1")
        yield from _engines(models("llama"), log_dir)


def _engines(model: Path, log_dir: Path) -> Iterator[Engines]:
    side_channel_port = free_port()
    transfer = {
        "kv_connector": "TokenParallelKVConnector",
        "kv_connector_module_path": "kv_transfer.connector",
        "kv_role": "kv_producer",
        "kv_buffer_device": "cpu",
        "engine_id": "prefill",
        "kv_connector_extra_config": {"kv_lease_duration": LEASE_SECONDS, "kv_transfer_path": "packed"},
    }
    pulling = {
        **transfer,
        "kv_role": "kv_consumer",
        "engine_id": "decode",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_transfer_path": "packed", "kv_transfer_staging_bytes": 1 << 20},
    }
    options = (
        *ENGINE_OPTIONS,
        *("--num-gpu-blocks-override", "60"),
        *("--side-channel-port", str(side_channel_port)),
        *("--kv-transfer-config", json.dumps(transfer)),
    )
    prefill = SoakEngine("prefill", lambda port: tknp("prefill", str(model), "--port", str(port), *options), log_dir)
    decode = start_decode(model, log_dir, 2, "--kv-transfer-config", json.dumps(pulling))
    try:
        prefill.service.wait_ready()
        decode.wait_ready()
        yield Engines(prefill, decode)
    finally:
        decode.stop()
        prefill.stop()


def test_every_block_is_compared(engines: Engines, plain_llama: Expected) -> None:
    asks = ASKS[:3]
    assert [engines.take(ask, engines.offer(ask)) for ask in asks] == plain_llama(asks)
    num_blocks = sum(-(-len(ask.body["prompt"]) // BLOCK) for ask in asks)
    assert engines.decode.metric("tknp_kv_transfer_compared_blocks_total") == num_blocks
    assert engines.stale("checksum") == 0
    engines.wait_idle(LEASE_SECONDS + 10)
    engines.forget()


def test_packed_blocks_are_read_by_the_slotful(engines: Engines, plain_llama: Expected) -> None:
    answers = [engines.take(ask, engines.offer(ask)) for ask in ASKS]
    assert answers == plain_llama(ASKS)
    by_path = {
        name: engines.decode.metric(f"tknp_kv_transfer_path_{name}_total", path="packed")
        for name in ("bytes", "wire_bytes", "seconds")
    }
    assert by_path["bytes"] == by_path["wire_bytes"] == engines.decode.metric("tknp_kv_transfer_bytes_total") > 0
    assert by_path["seconds"] > 0
    reads = engines.decode.metric("vllm:nixl_num_descriptors_sum")
    assert len(ASKS) <= reads < by_path["bytes"] / (64 << 10), "a slot holds 128 KiB"
    engines.wait_idle(10)


def test_a_lease_that_ran_out_between_offer_and_pull(engines: Engines, plain_llama: Expected) -> None:
    offers = [engines.offer(ask) for ask in ASKS[:3]]
    engines.wait_idle(LEASE_SECONDS + 20)
    for i in range(4):  # others write to these blocks
        engines.prefill.service.post("/v1/completions", completion(tokens(900, i), 1).body)
    answers = [engines.take(ask, params) for ask, params in zip(ASKS, offers, strict=False)]
    assert answers == plain_llama(ASKS[:3])
    assert engines.stale("lease_ended") == 3
    engines.wait_idle(10)


def test_a_prefill_engine_that_is_paused(engines: Engines, plain_llama: Expected) -> None:
    engines.forget()
    offers = [engines.offer(ask) for ask in ASKS[:2]]
    with ThreadPoolExecutor() as pool:
        paused = pool.submit(engines.prefill.pause, 8.0)
        time.sleep(0.5)
        answers = [engines.take(ask, params) for ask, params in zip(ASKS, offers, strict=False)]
        paused.result()
    assert answers == plain_llama(ASKS[:2])
    engines.wait_idle(LEASE_SECONDS + 10)


def _take_when_dead(engines: Engines, ask: Ask, params: Any) -> tuple[list[list[int]], float]:
    wait_for(lambda: not engines.prefill.is_healthy(), 20, "the end of the prefill engine")
    begin = time.monotonic()
    return engines.take(ask, params), time.monotonic() - begin


def test_a_prefill_engine_that_was_killed_and_came_back(engines: Engines, plain_llama: Expected) -> None:
    engines.forget()
    ask = ASKS[-1]
    first, second = engines.offer(ask), engines.offer(ask)
    # The request goes in another thread: an engine ends with the thread that started it (tknp/launch/guard.py).
    with ThreadPoolExecutor() as pool:
        taken = pool.submit(_take_when_dead, engines, ask, first)
        engines.prefill.kill()  # returns when it is up again
        answer, seconds = taken.result()
    assert [answer] == plain_llama([ask])
    assert seconds < PATIENCE
    engines.forget()
    assert [engines.take(ask, second)] == plain_llama([ask]), "an offer of the engine that is gone"
    engines.forget()
    for _ in range(2):  # the first may find the old connection broken
        answer = engines.take(ask, engines.offer(ask))
        assert [answer] == plain_llama([ask])
        engines.forget()
    pulled = engines.decode.metric("tknp_kv_transfer_bytes_total")
    assert [engines.take(ask, engines.offer(ask))] == plain_llama([ask])
    assert engines.decode.metric("tknp_kv_transfer_bytes_total") > pulled, "the new engine's KV should be pulled"
    engines.wait_idle(LEASE_SECONDS + 10)


def test_a_decode_engine_that_dies_while_it_pulls(engines: Engines) -> None:
    """The last test of this file: it kills the decode engine."""
    offers = [engines.offer(ask) for ask in ASKS]
    with ThreadPoolExecutor() as pool:
        for ask, params in zip(ASKS, offers, strict=True):
            pool.submit(engines.take, ask, params)
        for pid in descendants(engines.decode.process.pid):  # not the guard, which sees to it that nothing is left
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    usage = engines.prefill.service
    wait_for(lambda: usage.metric("vllm:kv_cache_usage_perc") == 0, 2 * LEASE_SECONDS + 10, "the leases' end")
