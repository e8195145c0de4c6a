"""Router, one prefill and one decode engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.legs import OFFER_FIELDS, REMOTE_DECODE
from tests.e2e.processes import Service, start_router, wait_for
from tests.e2e.suite import Ask, answer, answers


@dataclass
class Stack:
    prefill: Service
    decode: Service
    router: Service

    def expected(self, asks: Sequence[Ask], at_once: int) -> list[list[list[int]]]:
        """What the prefill engine answers by itself, which is vLLM without token parallelism. Ask it last: it then has
        the prompts in its prefix cache."""
        return answers(self.prefill, asks, at_once)

    def ranks(self) -> list[dict[str, Any]]:
        status: list[dict[str, Any]] = self.decode.get("/token_parallel")["ranks"]
        return status

    def held(self) -> list[str]:
        """What keeps KV, a line each: decode ranks with requests or blocks, the prefill engine's share in use."""
        held = [
            f"decode rank {r['rank']}: {r['num_requests']} requests, "
            f"{r['num_free_blocks']} of {r['num_blocks']} blocks free"
            for r in self.ranks()
            if r["num_free_blocks"] != r["num_blocks"] or r["num_requests"]
        ]
        if usage := self.prefill.metric("vllm:kv_cache_usage_perc"):
            held.append(f"prefill: {usage:.2%} of its blocks in use")
        return held

    def wait_idle(self, seconds: float = 60, pause: float = 0.2) -> None:
        """Returns once every block of both pools is free; says which are not if that takes longer."""
        deadline = time.monotonic() + seconds
        while held := self.held():
            if time.monotonic() > deadline:
                raise TimeoutError(f"KV still held after {seconds:.0f} s: {'; '.join(held)}")
            time.sleep(pause)

    def answer_after_pulling_back(self, ask: Ask, num_tokens: int) -> list[list[int]]:
        """The answer to a completion, of whose prompt the prefill engine pulls the beginning from the decode engine, as
        the router has it done (router.pull_back); both need --kv-both."""
        prompt = ask.body["prompt"]
        kept = self._kept_by(self.decode, prompt[:num_tokens], {})
        offered = {name: kept[name] for name in OFFER_FIELDS}
        params = self._kept_by(self.prefill, prompt, offered)
        return answer(self.decode, Ask(ask.path, {**ask.body, "kv_transfer_params": params}))

    def _kept_by(self, engine: Service, prompt: list[int], offered: dict[str, Any]) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        reply = engine.post("/v1/completions", {**body, "kv_transfer_params": {**REMOTE_DECODE, **offered}})
        params: dict[str, Any] = reply.json()["kv_transfer_params"]
        return params

    def transfer(self, request_id: str) -> dict[str, Any]:
        """Rank and bytes of one request's KV transfer."""
        transfer: dict[str, Any] = self.record(request_id)["kv_transfer"]
        return transfer

    def record(self, request_id: str) -> dict[str, Any]:
        """The finished record of one request, its transfer included."""

        def finished() -> dict[str, Any] | None:
            record: dict[str, Any] = self.router.get(f"/requests/{request_id}")
            return record if "transfer_end" in record["moments"] else None

        found: dict[str, Any] = wait_for(finished, 30, f"the record of {request_id}")
        return found


@contextmanager
def running(prefill: Service, decode: Service, log_dir: Path, *router_options: str) -> Iterator[Stack]:
    """The engines, which are starting, with a router in front; all are stopped in the end."""
    router = start_router(log_dir, [prefill], [decode], *router_options)
    try:
        for engine in (prefill, decode):
            engine.wait_ready()
        router.wait_whole()
        yield Stack(prefill, decode, router)
    finally:
        for service in (router, decode, prefill):
            service.stop()
