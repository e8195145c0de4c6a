"""Prefill: do prompts wait, and how much of them is cached?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import BYTES, COUNT, PER_SECOND, SECONDS, SHARE, Query, Row, bars, board, engines, graph
from deploy.grafana.promql import ENGINE, PREFILL, mean, quantile, rate, series, total

OF = (PREFILL, ENGINE)


def prefill() -> Dashboard:
    rows = [_queue(), _work(), _state()]
    return board("prefill", "Prefill", "The engines that compute prompts.", rows, engines(PREFILL))


def _queue() -> Row:
    waits = "vllm:request_queue_time_seconds"
    return Row(
        "Queue",
        [
            graph(
                "Requests waiting",
                "In vLLM's own queue. A pool that is large enough has none most of the time.",
                COUNT,
                Query(total(series("vllm:num_requests_waiting", *OF), "instance"), "{{instance}}"),
            ),
            graph(
                "Requests running",
                "In the engine's batch.",
                COUNT,
                Query(total(series("vllm:num_requests_running", *OF), "instance"), "{{instance}}"),
            ),
            graph(
                "Time in the queue",
                "Of requests whose prompt is done.",
                SECONDS,
                Query(quantile(0.5, waits, *OF), "p50"),
                Query(quantile(0.95, waits, *OF), "p95"),
            ),
        ],
    )


def _work() -> Row:
    seconds = "vllm:request_prefill_time_seconds"
    hits, queries = (total(rate(f"vllm:prefix_cache_{name}_total", *OF), "instance") for name in ("hits", "queries"))
    return Row(
        "Work",
        [
            graph(
                "Prompt tokens",
                "Computed, or found in the engine's cache.",
                PER_SECOND,
                Query(total(rate("vllm:prompt_tokens_by_source_total", *OF), "source"), "{{source}}"),
                is_stacked=True,
            ),
            graph(
                "Time to compute a prompt",
                "From the first chunk to the last.",
                SECONDS,
                Query(quantile(0.5, seconds, *OF), "p50"),
                Query(quantile(0.95, seconds, *OF), "p95"),
            ),
            graph(
                "Found in the prefix cache",
                "Share of prompt tokens. --prefill-policy prefix_aware sends prompts to where they are cached.",
                SHARE,
                Query(f"{hits} / {queries}", "{{instance}}"),
            ),
            graph(
                "Prompt length",
                "Mean tokens of a prompt.",
                COUNT,
                Query(mean("vllm:request_prompt_tokens", *OF, by=("instance",)), "{{instance}}"),
            ),
            graph(
                "Outstanding tokens",
                "Prompt tokens that the router has sent and not got back: what engines are chosen by.",
                COUNT,
                Query(series("tknp_engine_outstanding_tokens", 'role="prefill"'), "{{engine}}"),
            ),
            graph(
                "Legs",
                "Prefill legs of requests, by how they ended.",
                PER_SECOND,
                Query(total(rate("prefill_requests_total"), "outcome"), "{{outcome}}"),
            ),
        ],
    )


def _state() -> Row:
    return Row(
        "State",
        [
            bars(
                "KV cache in use",
                "Prompts being computed, and KV cache that waits to be pulled.",
                SHARE,
                Query(total(series("vllm:kv_cache_usage_perc", *OF), "instance"), "{{instance}}"),
                (None, "green"),
                (0.8, "orange"),
                (0.95, "red"),
            ),
            graph(
                "KV cache in use over time",
                "It falls when decode engines have pulled.",
                SHARE,
                Query(total(series("vllm:kv_cache_usage_perc", *OF), "instance"), "{{instance}}"),
            ),
            graph(
                "Memory of the server process",
                "Resident, in the host's memory. The workers are processes of their own.",
                BYTES,
                Query(total(series("process_resident_memory_bytes", *OF), "instance"), "{{instance}}"),
            ),
        ],
    )
