"""Thousands of hand-overs between two engines without a model (tests/kv_transfer/pair.py), most of which come to
nothing in some phase: `python -m tests.soak.handovers 10000`. Every token that is computed checks the KV cache that it
reads."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from tests.kv_transfer.pair import Engine, prompt, run
from tests.kv_transfer.world import world
from tests.services.building import silence_vllm, tiny_config
from tknp.tiny_model import make_tiny_model

AT_ONCE = 10


class Fate(StrEnum):
    """In which phase a hand-over ends."""

    FINISHED = "finished"
    PREFILL_QUEUED = "aborted before its prefill"
    NOT_TAKEN = "offered and never taken"
    RELEASED = "offered and released"
    DECODE_QUEUED = "aborted before it got blocks"
    PULLING = "aborted during the pull"
    PULLED = "aborted after the pull"
    DECODING = "aborted while it is decoded"
    LOST_BEFORE = "lease ended before the pull"
    LOST_DURING = "lease ended during the pull"
    WRONG_PROMPT = "offer for another prompt"


@dataclass
class HandOver:
    """One request's way, a step further with each call of `go_on`."""

    name: str
    tokens: list[int]
    fate: Fate
    num_readers: int
    params: Any = None
    readers: list[str] = field(default_factory=list)
    num_decode_steps: int = 0
    is_over: bool = False


class HandOvers:
    def __init__(self, model: Path, seed: int, **extra: Any) -> None:
        self.prefill = Engine(model, "kv_producer", [200], **extra)
        self.decode = Engine(model, "kv_consumer", [120, 120], **extra)
        self._rng = random.Random(seed)
        self.fates: Counter[str] = Counter()
        self.computed: dict[Fate, list[int]] = {}

    def run(self, count: int) -> None:
        under_way: list[HandOver] = []
        started = 0
        while started < count or under_way:
            while started < count and len(under_way) < AT_ONCE:
                under_way.append(self._start(started))
                started += 1
            for engine in (self.prefill, self.decode):
                for _ in range(self._rng.choice((0, 1, 1, 2))):
                    engine.step()
            for one in under_way:
                self._go_on(one)
            under_way = [one for one in under_way if not one.is_over]
        run(self.prefill, self.decode, until=lambda: self.prefill.is_idle() and self.decode.is_idle())

    def _start(self, number: int) -> HandOver:
        fate = self._rng.choice(list(Fate))
        self.fates[fate] += 1
        seed = self._rng.choice((number, number % 7))  # some prompts come again, and are here in part
        length = self._rng.choice((1, 31, 32, 33, 100, 200))
        one = HandOver(f"h{number}", prompt(length, seed), fate, self._rng.choice((1, 1, 1, 2)))
        self.prefill.prefill(f"p{one.name}", one.tokens, tknp_lease_id=one.name)
        if fate is Fate.PREFILL_QUEUED:
            self.prefill.abort(f"p{one.name}")
            one.is_over = True
        return one

    def _go_on(self, one: HandOver) -> None:
        if not one.readers:
            self._take(one)
        elif all(reader in self.decode.answered for reader in one.readers):
            one.is_over = True
        else:
            self._end_early(one)

    def _take(self, one: HandOver) -> None:
        """From the prefill engine's answer to the decode engine."""
        lease = f"p{one.name}"
        if lease not in self.prefill.answered:
            return
        params = self.prefill.answered.pop(lease)
        if one.fate in (Fate.NOT_TAKEN, Fate.LOST_BEFORE):
            self.prefill.lose_lease(lease)
        elif one.fate is Fate.RELEASED:
            self.prefill.workers[0].release_lease(one.name)
        if one.fate in (Fate.NOT_TAKEN, Fate.RELEASED):
            one.is_over = True
            return
        tokens = [4, *one.tokens[1:]] if one.fate is Fate.WRONG_PROMPT else one.tokens
        names = [f"d{one.name}"] if one.num_readers == 1 else [f"{i}_d{one.name}" for i in range(one.num_readers)]
        for name in names:
            self.decode.add(name, tokens, 6, {**params, "tknp_num_readers": one.num_readers})
        one.readers = names
        if one.fate is Fate.DECODE_QUEUED:
            self._abort(one)

    def _end_early(self, one: HandOver) -> None:
        """At the moment that its fate names, if that has come."""
        status = self.decode.scheduler.requests[one.readers[0]].status.name if self._lives(one) else ""
        is_pulling = status == "WAITING_FOR_REMOTE_KVS"
        pulled = status == "RUNNING" or (is_pulling and self._has_arrived(one))
        if (one.fate is Fate.PULLING and is_pulling) or (one.fate is Fate.PULLED and pulled):
            self._abort(one)
        elif one.fate is Fate.LOST_DURING and is_pulling:
            lease = f"p{one.name}"
            if lease in self.prefill.scheduler.requests:
                self.prefill.lose_lease(lease)
            one.fate = Fate.FINISHED
        elif one.fate is Fate.DECODING and status == "RUNNING":
            one.num_decode_steps += 1
            if one.num_decode_steps > 2:
                self._abort(one)

    def _lives(self, one: HandOver) -> bool:
        return one.readers[0] in self.decode.scheduler.requests

    def _has_arrived(self, one: HandOver) -> bool:
        return one.readers[0] in self.decode.scheduler.finished_recving_kv_req_ids

    def _abort(self, one: HandOver) -> None:
        for name in one.readers:
            if name in self.decode.scheduler.requests:
                self.decode.abort(name)
        one.is_over = True

    def left(self) -> list[str]:
        """What is not as before the first hand-over, a line each."""
        found = [
            f"{engine.num_usable_blocks - engine.num_free_blocks} blocks held on the {side} side"
            for side, engine in (("prefill", self.prefill), ("decode", self.decode))
            if engine.num_free_blocks != engine.num_usable_blocks
        ]
        for engine in (self.prefill, self.decode):
            halves = [engine.scheduler.connector.connector_scheduler, *(w.connector_worker for w in engine.workers)]
            for half in halves:
                found += [
                    f"{type(half).__name__}.{name}: {len(kept)}"
                    for name in _KEPT
                    if (kept := getattr(half, name, ())) and len(kept)
                ]
        return found


_KEPT = (
    *("_owners", "_handovers", "_names", "_lease_ids", "_refused", "_trusted_until", "_slots", "_heartbeat_by_engine"),
    *(
        "_reqs_need_recv",
        "_recving_metadata",
        "_recving_transfers",
        "_pending_recv_notifs",
        "_lease_slots",
        "_begun",
        "_checks",
    ),
    *("_pulled", "_ended", "_reqs_to_send", "_reqs_to_process", "_recv_failures"),
    *("consumer_notification_counts_by_req", "expected_consumer_notifications_by_req"),
)


def hand_over(count: int, model: Path, seed: int = 1, **extra: Any) -> dict[str, Any]:
    """Runs so many; the summary, in which `left` must be empty.

    Args:
        extra: `kv_connector_extra_config` of both engines.
    """
    begin = time.monotonic()
    engines = HandOvers(model, seed, **extra)
    try:
        engines.run(count)
        return {
            "hand_overs": count,
            "seconds": round(time.monotonic() - begin, 1),
            "fates": dict(engines.fates),
            "pulls": len(engines.decode.stats["pull_bytes"]),
            "paths": dict(Counter(engines.decode.stats.get("transfer_path", []))),
            "stale": dict(Counter(engines.decode.stats.get("stale_reason", []))),
            "left": engines.left(),
        }
    finally:
        engines.decode.shutdown()
        engines.prefill.shutdown()


def main(count: int) -> int:
    silence_vllm()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_model(Path(directory) / "model", shape="llama", seed=0)
        with world(tiny_config(model, pulls_kv=True), Path(directory)):
            summary = hand_over(count, model)
    print(json.dumps(summary, indent=1))
    return 1 if summary["left"] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
