"""vLLM's multi-process executor for T tensor-parallel x P token-parallel workers, of one host or of several.

With `--nnodes N` each host starts P / N ranks, the first one the root's. vLLM takes several nodes with its own executor
alone, so its configuration learns of them here, where it has been checked.
"""

from __future__ import annotations

import multiprocessing.connection
import threading

from vllm.logger import init_logger

from services.decode.token_parallel.nodes import NodeWatch
from services.decode.token_parallel.ranks_as_one import RanksAsOne, end_engine_core

logger = init_logger(f"vllm.{__name__}")


class TokenParallelExecutor(RanksAsOne):
    """Select with `--distributed-executor-backend`; `tknp decode` does."""

    _node_watch: NodeWatch | None = None

    def _start_workers(self) -> None:
        nodes = self._options.nodes
        if nodes is not None:
            parallel = self.parallel_config
            parallel.nnodes, parallel.node_rank = nodes.count, nodes.rank
            parallel.master_addr, parallel.master_port = nodes.master_addr, nodes.master_port
            self._node_watch = NodeWatch(nodes, self._lose_node, self.shutdown)
        super()._start_workers()

    def _lose_node(self, reason: str) -> None:
        logger.error(
            "token parallelism: %s. The KV cache there is lost, so this engine stops; its requests can be retried on "
            "another decode engine.",
            reason,
        )
        # They may wait for rows that never come. vLLM's monitor sees their end.
        for process in multiprocessing.active_children():
            process.kill()
        if self.parallel_config.node_rank == 0:
            end_engine_core()

    def start_worker_monitor(self, inline: bool = False) -> None:
        names = {w.proc.sentinel: f"{self._describe(w.rank)}, pid {w.proc.pid}" for w in self.workers}
        threading.Thread(target=self._report_death, args=(names,), daemon=True, name="token-parallel-monitor").start()
        super().start_worker_monitor(inline)

    def _report_death(self, names: dict[int, str]) -> None:
        died = multiprocessing.connection.wait(list(names))
        # vLLM's own monitor may already be shutting the others down; an orderly shutdown is no failure.
        if self.is_failed or not getattr(self, "shutting_down", False):
            logger.error(
                "token parallelism: the %s has died. Its KV cache is lost, so this engine stops; its requests can be "
                "retried on another decode engine.",
                " and the ".join(names[sentinel] for sentinel in died if isinstance(sentinel, int)),
            )

    def shutdown(self) -> None:
        if self._node_watch is not None:
            self._node_watch.close(orderly=not self.is_failed)
        super().shutdown()
