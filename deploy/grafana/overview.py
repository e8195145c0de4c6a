"""Overview: do users get what they were promised, and if not, which part is it?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import COUNT, PER_SECOND, SECONDS, SHARE, Query, Row, board, graph, number
from deploy.grafana.promql import rate, series, total

QUANTILES = ("p50", "p95", "p99")


def overview() -> Dashboard:
    return board(
        "overview",
        "Overview",
        "What users get, and which part it depends on.",
        [_now(), _promises(), _where()],
    )


def _now() -> Row:
    prefill, decode = (
        total(f"max by (namespace, engine) ({series('tknp_engine_up', matcher)})")  # two routers may see one engine
        for matcher in ('role="prefill"', 'role="decode"')
    )
    errors = series("tknp:request_errors:ratio_rate5m")
    steps = ((None, "red"), (1, "green"))
    return Row(
        "Now",
        [
            number(
                "Prefill engines up",
                "By the router's health checks.",
                COUNT,
                Query(prefill),
                *steps,
            ),
            number("Decode engines up", "By the router's health checks.", COUNT, Query(decode), *steps),
            number("Requests", "That ended, a second.", PER_SECOND, Query(series("tknp:requests:rate5m"))),
            number(
                "Requests that fail",
                "Failed, timed out, or no engine for them. What a client did wrong is not counted, nor what was turned "
                "away for want of room.",
                SHARE,
                Query(errors),
                (None, "green"),
                (0.001, "orange"),
                (0.0144, "red"),
            ),
            number(
                "First token, 95th percentile",
                "Seconds from a streamed request's arrival to its first token.",
                SECONDS,
                Query(series("tknp:time_to_first_token_seconds:p95_5m")),
                (None, "green"),
                (2, "orange"),
                (5, "red"),
            ),
            number(
                "Between tokens, 95th percentile",
                "Seconds between two chunks of a stream.",
                SECONDS,
                Query(series("tknp:inter_token_latency_seconds:p95_5m")),
                (None, "green"),
                (0.1, "orange"),
                (0.2, "red"),
            ),
        ],
    )


def _promises() -> Row:
    def quantiles(name: str) -> list[Query]:
        return [Query(series(f"tknp:{name}:{q}_5m"), q) for q in QUANTILES]

    budget = [
        Query(series(f"tknp:request_errors:ratio_rate{window}"), f"last {window}")
        for window in ("5m", "1h", "6h", "3d")
    ]
    return Row(
        "What users get",
        [
            graph("Time to first token", "Of streamed requests.", SECONDS, *quantiles("time_to_first_token_seconds")),
            graph("Time between tokens", "Of streamed requests.", SECONDS, *quantiles("inter_token_latency_seconds")),
            graph(
                "Share of requests that fail",
                "Alerts compare two windows each; the month's budget is 0.1 %.",
                SHARE,
                *budget,
            ),
        ],
    )


def _where() -> Row:
    tokens = total(series("tknp_engine_outstanding_tokens", 'role="prefill"'), "namespace", "engine")
    return Row(
        "Where time and tokens go",
        [
            graph(
                "Time in each phase, 95th percentile",
                "queue is a part of route; transfer goes on within first_token.",
                SECONDS,
                Query(series("tknp:request_phase_seconds:p95_5m"), "{{phase}}"),
            ),
            graph(
                "Requests in flight, by phase",
                "Where requests are now.",
                COUNT,
                Query(total(series("tknp_requests_in_flight"), "phase"), "{{phase}}"),
                is_stacked=True,
            ),
            graph(
                "Requests that end",
                "By how they end.",
                PER_SECOND,
                Query(total(rate("tknp_requests_total"), "outcome"), "{{outcome}}"),
            ),
            graph(
                "Tokens",
                "Prompts of prefill engines, answers of decode engines.",
                PER_SECOND,
                Query(series("tknp:prompt_tokens:rate5m"), "prompt"),
                Query(series("tknp:generation_tokens:rate5m"), "answer"),
            ),
            graph(
                "What the prefill pool is scaled on",
                "Prompt tokens outstanding on each engine, as the chart's autoscaler reckons; besides it goes by the "
                "time to first token.",
                COUNT,
                Query(f"avg({tokens})", "tokens of an engine"),
                Query(series("tknp:prefill_requests_waiting:mean"), "prompts that wait in one"),
            ),
            graph(
                "What the decode pool is scaled on",
                "KV cache in use on the fullest rank, on average over the engines; besides it goes by the time between "
                "tokens.",
                SHARE,
                Query(f"avg(max by (namespace, engine) ({series('tknp:rank_kv_used:ratio')}))", "fullest rank"),
            ),
            graph(
                "Answers that the guard compared",
                "Within an hour; `different` should be 0. Needs --guard-share.",
                COUNT,
                Query(total(f"increase({series('tknp_guard_requests_total')}[1h])", "result"), "{{result}}"),
            ),
        ],
    )
