"""Decode and ranks: is there room for more requests, and do the ranks have equal work?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import BYTES, COUNT, PER_SECOND, SECONDS, SHARE, Query, Row, bars, board, engines, graph
from deploy.grafana.promql import DECODE, ENGINE, quantile, rate, series, total

OF = (DECODE, ENGINE)
RANK = "{{instance}} rank {{rank}}"


def decode() -> Dashboard:
    rows = [_ranks(), _steps(), _requests()]
    return board("decode", "Decode and ranks", "The engines that generate, and their ranks.", rows, engines(DECODE))


def _ranks() -> Row:
    used = f"1 - {series('tknp_rank_kv_blocks_free', *OF)} / {series('tknp_rank_kv_blocks', *OF)}"
    return Row(
        "Ranks",
        [
            bars(
                "KV cache in use, by rank",
                "A request lives on one rank, and needs all its blocks there.",
                SHARE,
                Query(used, RANK),
                (None, "green"),
                (0.8, "orange"),
                (0.95, "red"),
            ),
            graph("KV cache in use over time", "Of each rank.", SHARE, Query(used, RANK)),
            graph(
                "Room, by rank",
                "Tokens to spare if every request grows to its end, as the router reckons.",
                COUNT,
                Query(series("tknp_engine_kv_room_tokens"), "{{engine}} rank {{rank}}"),
            ),
            graph("Requests, by rank", "That live on it.", COUNT, Query(series("tknp_rank_requests", *OF), RANK)),
            graph(
                "KV cache memory, by rank",
                "Allocated at start. The root has less: it holds the weights.",
                BYTES,
                Query(series("tknp_rank_kv_cache_bytes", *OF), RANK),
            ),
            graph(
                "Model parameters, by rank",
                "Next to nothing on a KV worker.",
                BYTES,
                Query(series("tknp_rank_parameter_bytes", *OF), RANK),
            ),
        ],
    )


def _steps() -> Row:
    waited, stepped = (
        f"rate({series(f'tknp_rank_{name}_seconds', *OF)}[$__rate_interval])" for name in ("wait", "step")
    )
    return Row(
        "Steps",
        [
            graph(
                "Token-parallel efficiency",
                "Share of the ranks' time in which they computed attention or the model. Host seconds: on a GPU they "
                "say nothing yet.",
                SHARE,
                Query(series("token_parallel_efficiency", *OF), "{{instance}}"),
            ),
            graph(
                "In steps, by rank", "Share of time in which a rank takes part in a step.", SHARE, Query(stepped, RANK)
            ),
            graph(
                "Waiting for other ranks",
                "Share of time in which a rank waits within a step. The rank that waits least is the slowest.",
                SHARE,
                Query(waited, RANK),
            ),
        ],
    )


def _requests() -> Row:
    gap = "vllm:inter_token_latency_seconds"
    computed = rate("vllm:prompt_tokens_by_source_total", *OF, 'source="local_compute"')
    return Row(
        "Requests",
        [
            graph(
                "Requests running and waiting",
                "deferred ones wait for their KV cache to arrive, the others for room.",
                COUNT,
                Query(total(series("vllm:num_requests_running", *OF), "instance"), "{{instance}} running"),
                Query(
                    total(series("vllm:num_requests_waiting_by_reason", *OF), "instance", "reason"),
                    "{{instance}} waiting: {{reason}}",
                ),
            ),
            graph(
                "Time between tokens",
                "In the engine; what users get is on the overview.",
                SECONDS,
                Query(quantile(0.5, gap, *OF), "p50"),
                Query(quantile(0.95, gap, *OF), "p95"),
                Query(quantile(0.99, gap, *OF), "p99"),
            ),
            graph(
                "Tokens generated",
                "By engine.",
                PER_SECOND,
                Query(total(rate("vllm:generation_tokens_total", *OF), "instance"), "{{instance}}"),
            ),
            graph(
                "Preemptions",
                "Requests that lost their KV cache for want of blocks, and are computed again. Should be 0.",
                PER_SECOND,
                Query(total(rate("vllm:num_preemptions_total", *OF), "instance"), "{{instance}}"),
            ),
            graph(
                "Prompts computed by decode engines",
                "Tokens; each request's last one always is. More than that makes tokens stutter.",
                PER_SECOND,
                Query(total(computed, "instance"), "{{instance}}"),
            ),
            graph(
                "Legs",
                "Decode legs of requests, by how they ended.",
                PER_SECOND,
                Query(total(rate("decode_requests_total"), "outcome"), "{{outcome}}"),
            ),
        ],
    )
