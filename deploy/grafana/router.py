"""Router: whom does it turn away, what does it repeat, and what does it cost?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import BYTES, COUNT, PER_SECOND, SECONDS, SHARE, Query, Row, board, graph
from deploy.grafana.promql import ROUTER, quantile, rate, series, total

FAILED = 'outcome=~"failed|timeout|unavailable|rejected"'


def router() -> Dashboard:
    return board(
        "router",
        "Router",
        "Admission, choice of engines, retries, cost.",
        [_admission(), _legs(), _pools(), _process()],
    )


def _admission() -> Row:
    return Row(
        "Admission",
        [
            graph(
                "Requests by outcome",
                "invalid, rejected: the client's mistake. overloaded: no room.",
                PER_SECOND,
                Query(total(rate("tknp_requests_total"), "outcome"), "{{outcome}}"),
            ),
            graph(
                "Admitted requests",
                "Those that may use the engines, and how many may at most.",
                COUNT,
                Query(total(series("tknp_admitted_requests")), "admitted"),
                Query(total(series("tknp_admitted_requests_limit")), "limit"),
            ),
            graph(
                "Waiting for their turn",
                "By priority.",
                COUNT,
                Query(total(series("tknp_queue_length"), "priority"), "{{priority}}"),
                is_stacked=True,
            ),
            graph(
                "Time in the queue, 95th percentile",
                "Of requests that had to wait; without any there is no line.",
                SECONDS,
                Query(quantile(0.95, "tknp_queue_wait_seconds", by=("priority",)), "{{priority}}"),
            ),
            graph(
                "Turned away, by reason",
                "key_limit is a client's own limit.",
                PER_SECOND,
                Query(total(rate("tknp_rejected_requests_total"), "reason"), "{{reason}}"),
                Query(total(rate("tknp_unauthorized_requests_total"), "reason"), "key {{reason}}"),
                Query(total(rate("tknp_refused_connections_total")), "connections"),
            ),
            graph(
                "Open requests, by key",
                "By the name of the API key; anonymous where none are asked for.",
                COUNT,
                Query(total(series("tknp_key_open_requests"), "key"), "{{key}}"),
                is_stacked=True,
            ),
        ],
    )


def _legs() -> Row:
    legs = '{__name__=~"prefill_requests_total|decode_requests_total", namespace=~"$namespace", ' + FAILED + "}"
    return Row(
        "Engines",
        [
            graph(
                "Up",
                "1 if an engine's health checks pass.",
                COUNT,
                Query(series("tknp_engine_up"), "{{role}} {{engine}}"),
            ),
            graph(
                "Outstanding requests",
                "That an engine has from this router.",
                COUNT,
                Query(series("tknp_engine_outstanding_requests"), "{{role}} {{engine}}"),
            ),
            graph(
                "Outstanding tokens",
                "Prompts, and on decode engines output budgets: what engines are chosen by.",
                COUNT,
                Query(series("tknp_engine_outstanding_tokens"), "{{role}} {{engine}}"),
            ),
            graph(
                "Legs that failed",
                "By engine; without any there is no line.",
                PER_SECOND,
                Query(total(f"rate({legs}[$__rate_interval])", "engine", "outcome"), "{{engine}} {{outcome}}"),
            ),
            graph(
                "Repeated",
                "Attempts on another engine, by the role of the one that failed.",
                PER_SECOND,
                Query(total(rate("tknp_retries_total"), "role"), "{{role}}"),
                Query(total(rate("tknp_retries_refused_total")), "refused by the budget"),
                Query(total(rate("tknp_stream_continuations_total")), "streams that another engine went on with"),
                Query(total(rate("tknp_stream_continuations_refused_total"), "reason"), "broken: {{reason}}"),
            ),
            graph(
                "Prefilled by the decode engine, by reason",
                "Requests that were not handed over.",
                PER_SECOND,
                Query(total(rate("tknp_local_prefill_requests_total"), "reason"), "{{reason}}"),
            ),
            graph(
                "Pulled back, by what became of it",
                "Prompts whose beginning a decode engine was asked to keep; 0 without --pull-back-tokens.",
                PER_SECOND,
                Query(total(rate("tknp_pull_backs_total"), "end"), "{{end}}"),
            ),
        ],
    )


def _pools() -> Row:
    return Row(
        "Pools",
        [
            graph(
                "Pressure, by pool",
                "What it has to do as a share of what it should have at most; 0 without --flip-roles.",
                SHARE,
                Query(f"max by (namespace, role) ({series('tknp_pool_pressure')})", "{{role}}"),
            ),
            graph(
                "Engines that changed their role",
                "Within an hour, by the new one; needs --flip-roles.",
                COUNT,
                Query(total(f"increase({series('tknp_role_flips_total')}[1h])", "role"), "to {{role}}"),
            ),
            graph(
                "Pods that discovery finds",
                "Ready ones, and faults that made it list them again; with --discovery kubernetes.",
                COUNT,
                Query(f"max by (namespace, role) ({series('tknp_discovery_ready_pods')})", "{{role}}"),
                Query(total(f"increase({series('tknp_discovery_faults_total')}[1h])", "fault"), "fault: {{fault}}"),
            ),
        ],
    )


def _process() -> Row:
    of = (ROUTER,)
    phases, handoff = "tknp_request_phase_seconds", 'phase="handoff"'
    return Row(
        "The process",
        [
            graph(
                "CPU",
                "Seconds of CPU a second; a router uses one core at most.",
                COUNT,
                Query(total(rate("process_cpu_seconds_total", *of), "instance"), "{{instance}}"),
            ),
            graph(
                "Memory",
                "Resident.",
                BYTES,
                Query(total(series("process_resident_memory_bytes", *of), "instance"), "{{instance}}"),
            ),
            graph(
                "Between the legs",
                "The router's own time of a hand-off, from the prefill engine's answer until the decode leg is sent.",
                SECONDS,
                Query(quantile(0.5, phases, handoff), "p50"),
                Query(quantile(0.95, phases, handoff), "p95"),
            ),
        ],
    )
