"""One soak, from starting the engines to the summary."""

from __future__ import annotations

import asyncio
import math
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests

from router.pull_back import PullBackEnd
from tests.e2e.processes import Service, kv_event_ports, pulling_back, start_router, wait_for
from tests.soak.engines import SoakEngine
from tests.soak.footprint import Footprint, Handles
from tests.soak.plan import SoakPlan
from tests.soak.traffic import Behaviour, End, Job, Mix, Seen, ask

EXCUSED_SECONDS = 10.0
"""After a fault's end requests may still fail of it; the router checks engines every second."""
NUM_KEPT = 20
"""Of each kind of trouble, so many are told in full."""


@dataclass
class Tally:
    """What came of the requests so far."""

    ends: Counter[str] = field(default_factory=Counter)
    behaviours: Counter[str] = field(default_factory=Counter)
    hang_ups_by_phase: Counter[str] = field(default_factory=Counter)  # the last moment before the client was gone
    faults: list[str] = field(default_factory=list)
    troubles: dict[str, list[str]] = field(default_factory=dict)
    error_messages: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Seen] = field(default_factory=dict)  # the longest so far, by prompt
    num_compared: int = 0

    def add(self, job: Job, seen: Seen) -> None:
        self.ends[seen.end] += 1
        self.behaviours[job.behaviour] += 1
        if seen.end in (End.LOST, End.WRONG):
            self.trouble(seen.end, f"{job.id} ({job.behaviour}, {job.ask.path}): {seen.detail}")
        elif seen.end is End.ERROR:
            self.error_messages[seen.detail[:400]] += 1
        elif seen.end is End.ANSWERED and job.prompt is not None:
            self._compare(job, seen)

    def _compare(self, job: Job, seen: Seen) -> None:
        """Greedy answers to one prompt differ in length alone."""
        assert job.prompt is not None
        known = self.answers.setdefault(job.prompt, seen)
        if known is seen:
            return
        self.num_compared += 1
        for mine, theirs in ((seen.token_ids, known.token_ids), (seen.text, known.text)):
            shared = min(len(mine), len(theirs))
            if mine[:shared] != theirs[:shared]:
                self.trouble(
                    "different tokens", f"{job.id}: {mine[:shared]} where another request got {theirs[:shared]}"
                )
                return
        if len(seen.token_ids) > len(known.token_ids):
            self.answers[job.prompt] = seen

    def trouble(self, kind: str, what: str) -> None:
        self.troubles.setdefault(kind, []).append(what)


class Soak:
    def __init__(self, plan: SoakPlan, engines: list[SoakEngine], router: Service, tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._engines = engines
        self._router = router
        self._tell = tell
        self._tally = Tally()
        self._footprint = Footprint()
        self._mix = Mix(plan)
        self._chaos = random.Random(plan.seed + 1)
        self._begin = time.monotonic()
        self._excused_until = 0.0
        self._num_under_way = 0
        self._looking: set[asyncio.Task[None]] = set()
        self._transferred: Counter[str] = Counter()  # by engines that were killed since

    async def run(self) -> dict[str, Any]:
        """The summary; `ok` says whether all of it is as it must be."""
        before = Handles.of(self._router)
        watch = asyncio.create_task(self._watch())
        faults = asyncio.create_task(self._faults())
        try:
            await asyncio.gather(*(self._client() for _ in range(self._plan.concurrency)))
            faults.cancel()
            await asyncio.gather(faults, return_exceptions=True)
            seconds = time.monotonic() - self._begin
            await asyncio.gather(*self._looking)
            settled = await self._settle(before)
        finally:
            watch.cancel()
        return self._summary(seconds, settled)

    # traffic

    def _is_over(self) -> bool:
        if self._plan.num_requests:
            return sum(self._tally.behaviours.values()) + self._num_under_way >= self._plan.num_requests
        return time.monotonic() - self._begin >= self._plan.seconds

    async def _client(self) -> None:
        while not self._is_over():
            job = self._mix.draw()
            self._num_under_way += 1
            seen = await ask(self._router.port, job, self._plan.request_timeout)
            self._num_under_way -= 1
            self._tally.add(job, seen)
            if job.conversation is not None and seen.end is End.ANSWERED:
                job.conversation.hear(job.ask.body["prompt"], seen.token_ids)
            if seen.end is End.ERROR and time.monotonic() > self._excused_until:
                self._tally.trouble("error without a fault", f"{job.id}: {seen.detail}")
            if job.behaviour.hangs_up and seen.end is End.HUNG_UP:
                task = asyncio.create_task(self._see_hang_up(job))
                self._looking.add(task)
                task.add_done_callback(self._looking.discard)
            if seen.end is End.ERROR:
                await asyncio.sleep(0.5)  # Retry-After, in short

    async def _see_hang_up(self, job: Job) -> None:
        """In which phase the client went, by the router's own record; and that the router noticed within a second."""
        await asyncio.sleep(1.0)
        reply = await asyncio.to_thread(requests.get, f"{self._router.url}/requests/{job.id}", timeout=60)
        if reply.status_code == 404 and job.behaviour is Behaviour.IN_BODY:
            self._tally.hang_ups_by_phase["before the router had its headers"] += 1
            return
        record = reply.json()
        moments = [name for name in record.get("moments", {}) if name not in ("cancelled", "failed")]
        outcome = record.get("outcome")
        if outcome == "cancelled":
            self._tally.hang_ups_by_phase[moments[-1]] += 1
        elif outcome is None:
            self._tally.trouble("hang-up not noticed within a second", f"{job.id} ({job.behaviour}): {record}")
        else:
            self._tally.hang_ups_by_phase[f"too late: it had ended as {outcome}"] += 1

    # faults

    async def _faults(self) -> None:
        while self._plan.faults_every:
            await asyncio.sleep(self._plan.faults_every)
            engine = self._chaos.choice(self._engines)
            self._excused_until = math.inf
            try:
                await self._break(engine)
            except (subprocess.TimeoutExpired, RuntimeError, TimeoutError) as error:
                self._tally.trouble("engine did not end, or did not come back", f"{engine.name}: {error}")
                return
            self._excused_until = time.monotonic() + EXCUSED_SECONDS

    async def _break(self, engine: SoakEngine) -> None:
        """One fault, until the engine serves again: one at a time."""
        drawn = self._chaos.random()
        if drawn < 0.4:
            seconds = self._chaos.choice((2.0, 8.0, 20.0))
            self._told(f"SIGSTOP {engine.name} for {seconds:.0f} s")
            await asyncio.to_thread(engine.pause, seconds)
            return
        self._transferred += await asyncio.to_thread(_transferred, engine)
        if drawn < 0.7:
            self._told(f"SIGKILL {engine.name}")
            await asyncio.to_thread(engine.kill)
        else:
            self._told(f"SIGKILL one process of {engine.name}")
            self._told(f"it was {await asyncio.to_thread(engine.kill_one, self._chaos)}, and the engine is back")

    def _told(self, fault: str) -> None:
        fault = f"{time.monotonic() - self._begin:.0f} s: {fault}"
        self._tally.faults.append(fault)
        self._tell(fault)

    # what is watched, and what must be so in the end

    async def _watch(self) -> None:
        told = 0.0
        while True:
            now = time.monotonic() - self._begin
            mib = self._footprint.measure_router(self._router)
            if now - told >= 15:
                told = now
                await asyncio.to_thread(self._footprint.measure_rest, self._router, self._engines)
                self._tell(f"{now:.0f} s: {dict(self._tally.ends)}, router {mib:.0f} MiB")
            await asyncio.sleep(1.0)

    async def _settle(self, before: Handles) -> dict[str, Any]:
        """Waits until nothing is left of the traffic, and says what is if that takes too long."""
        begin = time.monotonic()
        while left := await asyncio.to_thread(self._left, before):
            if time.monotonic() - begin > self._plan.settle_timeout:
                break
            await asyncio.sleep(0.5)
        return {"seconds": round(time.monotonic() - begin, 1), "left": left}

    def _left(self, before: Handles) -> list[str]:
        if self._router.process.poll() is not None:
            return ["the router has ended"]
        found = []
        for name in ("tknp_requests_in_flight", "tknp_engine_outstanding_requests"):
            if count := self._router.metric(name):
                found.append(f"router: {name} is {count:g}")
        for engine in self._engines:
            if engine.is_healthy():
                found += engine.held()
            else:
                found.append(f"{engine.name} is not up")
        return found + Handles.of(self._router).more_than(before)

    def _summary(self, seconds: float, settled: dict[str, Any]) -> dict[str, Any]:
        tally = self._tally
        footprint = self._footprint.as_dict()
        if self._router.process.poll() is not None:
            tally.trouble("router ended", self._router.tail())
        left = settled["left"]
        transferred = sum(map(_transferred, self._engines), self._transferred)
        checks = {
            "every request ended in an answer or a clear error": not tally.ends[End.LOST] and not tally.ends[End.WRONG],
            "errors only while a fault lasted": "error without a fault" not in tally.troubles,
            "equal prompts had equal tokens": "different tokens" not in tally.troubles,
            "nothing else went wrong": not tally.troubles.keys() - {*End, "error without a fault", "different tokens"},
            "no KV block, request, task or connection is left": not left,
            "the router's memory is flat": footprint["router_mib"]["is_flat"],
            "KV cache was streamed where it was to be": transferred["bytes_streamed"] > 0 or not self._plan.stream_kv,
        }
        return {
            "ok": all(checks.values()),
            "checks": checks,
            "seconds": round(seconds, 1),
            "num_requests": sum(tally.ends.values()),
            "ends": dict(tally.ends),
            "behaviours": dict(tally.behaviours),
            "hang_ups_by_phase": dict(tally.hang_ups_by_phase),
            "num_answers_compared": tally.num_compared,
            "faults": tally.faults,
            "errors": dict(tally.error_messages.most_common(NUM_KEPT)),
            "troubles": {kind: {"count": len(all_), "first": all_[:NUM_KEPT]} for kind, all_ in tally.troubles.items()},
            "settled": settled,
            **footprint,
            "retries": self._metric("tknp_retries_total"),
            "continuations": self._metric("tknp_stream_continuations_total"),
            "bytes_pulled_back": transferred["bytes_pulled_back"],
            "bytes_streamed": transferred["bytes_streamed"],
            "pull_backs": {end: self._metric("tknp_pull_backs_total", end=end) for end in PullBackEnd},
            "plan": asdict(self._plan),
        }

    def _metric(self, name: str, **labels: str) -> float | None:
        return self._router.metric(name, **labels) if self._router.process.poll() is None else None


def _transferred(engine: SoakEngine) -> Counter[str]:
    """Bytes that it pulled since it was last started; none if it does not answer."""
    if not engine.is_healthy():
        return Counter()
    if engine.name.startswith("prefill"):
        return Counter(bytes_pulled_back=int(engine.service.metric("tknp_kv_transfer_bytes_total")))
    return Counter(bytes_streamed=int(engine.service.metric("tknp_kv_transfer_hidden_bytes_total")))


@contextmanager
def soak_stack(plan: SoakPlan, model: Path, log_dir: Path) -> Iterator[tuple[list[SoakEngine], Service]]:
    """Engines and router, all ready; stopped in the end."""

    def options() -> tuple[str, ...]:
        return pulling_back(kv_event_ports()) if plan.conversations else ()

    prefill = [SoakEngine.prefill(f"prefill-{i}", model, log_dir, *options()) for i in range(plan.num_prefill)]
    decode = [
        SoakEngine.decode(f"decode-{i}", model, log_dir, size, *options())
        for i, size in enumerate(plan.token_parallel_sizes)
    ]
    settings = [*(("--pull-back-tokens", "64") if plan.conversations else ()), *(("--stream-kv",) * plan.stream_kv)]
    router = start_router(log_dir, [e.service for e in prefill], [e.service for e in decode], *settings)
    try:
        for engine in (*prefill, *decode):
            engine.service.wait_ready()
        router.wait_ready("/ready")
        if plan.conversations:  # the router's sockets to all engines count as open before
            known = "by its KV events"
            wait_for(lambda: router.log.read_text().count(known) >= len(prefill + decode), 60, "the router's listening")
        yield [*prefill, *decode], router
    finally:
        router.stop()
        for engine in (*decode, *prefill):
            engine.stop()


def run_soak(plan: SoakPlan, model: Path, log_dir: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Starts everything, runs the plan, stops everything; the summary."""
    with soak_stack(plan, model, log_dir) as (engines, router):
        return asyncio.run(Soak(plan, engines, router, tell).run())
