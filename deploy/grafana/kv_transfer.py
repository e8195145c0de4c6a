"""KV transfer: does the KV cache arrive, and how fast?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import BYTES, BYTES_PER_SECOND, COUNT, PER_SECOND, SECONDS, SHARE, Query, Row, board, graph
from deploy.grafana.promql import DECODE, PREFILL, mean, quantile, rate, series, total

RANK = "{{instance}} rank {{rank}}"
PULLS = "kv_transfer_duration_seconds"
BY_PATH = "tknp_kv_transfer_path"


def kv_transfer() -> Dashboard:
    rows = [_pulls(), _handovers(), _parts(), _failures()]
    return board("kv-transfer", "KV transfer", "From prefill engines to the ranks of decode engines.", rows)


def _pulls() -> Row:
    speed = (
        f"{total(rate('tknp_kv_transfer_bytes_total'), 'instance', 'rank')}"
        f" / {total(rate(f'{PULLS}_sum'), 'instance', 'rank')}"
    )
    pulled = total(rate("tknp_router_kv_transfer_bytes_total"))
    requests = total(rate("tknp_request_phase_seconds_count", 'phase="transfer"'))
    hidden, moved = (
        total(rate(f"tknp_kv_transfer_{name}_total"), "instance", "rank") for name in ("hidden_bytes", "bytes")
    )
    return Row(
        "Pulls",
        [
            graph(
                "Time of a pull",
                "From the order to pull a request's KV cache until it is complete on its rank.",
                SECONDS,
                Query(quantile(0.5, PULLS), "p50"),
                Query(quantile(0.95, PULLS), "p95"),
                Query(quantile(0.99, PULLS), "p99"),
            ),
            graph(
                "Time of a pull, by rank",
                "95th percentile.",
                SECONDS,
                Query(quantile(0.95, PULLS, by=("instance", "rank")), RANK),
            ),
            graph(
                "Bytes per second of a pull",
                "How fast one goes, on average; waiting for its turn is a part of it.",
                BYTES_PER_SECOND,
                Query(speed, RANK),
            ),
            graph(
                "Bytes pulled",
                "By rank.",
                BYTES_PER_SECOND,
                Query(total(rate("tknp_kv_transfer_bytes_total"), "instance", "rank"), RANK),
                is_stacked=True,
            ),
            graph("Pulls", "By rank.", PER_SECOND, Query(total(rate(f"{PULLS}_count"), "instance", "rank"), RANK)),
            graph(
                "Bytes pulled, by path",
                "direct: between GPUs of one host; nixl: everything else.",
                BYTES_PER_SECOND,
                Query(total(rate(f"{BY_PATH}_bytes_total"), "path"), "{{path}}"),
                is_stacked=True,
            ),
            graph(
                "Bytes per second of a transfer, by path",
                "Without the time in which a pull waits for its turn.",
                BYTES_PER_SECOND,
                Query(series("tknp:kv_transfer_path_bytes_per_second:mean5m"), "{{path}}"),
            ),
            graph(
                "Hidden behind the prefill",
                "Share of the bytes that had arrived when the prompt was computed; 0 without --stream-kv.",
                SHARE,
                Query(f"{hidden} / {moved}", RANK),
            ),
            graph(
                "Bytes of a request",
                "Mean over the router's requests that pulled.",
                BYTES,
                Query(f"{pulled} / {requests}", "mean"),
            ),
        ],
    )


def _handovers() -> Row:
    beside = "tknp_kv_handover_seconds"
    parts, count = total(rate("tknp_kv_handover_stage_seconds_total"), "stage"), total(rate(f"{beside}_count"))
    return Row(
        "Hand-over",
        [
            graph(
                "Time of a hand-over, less the copy",
                "In the decode engine, from a request's arrival to its first step.",
                SECONDS,
                Query(quantile(0.5, beside), "p50"),
                Query(quantile(0.95, beside), "p95"),
            ),
            graph(
                "Time of a hand-over, less the copy, by rank",
                "95th percentile.",
                SECONDS,
                Query(quantile(0.95, beside, by=("instance", "rank")), RANK),
            ),
            graph(
                "Stages of a hand-over",
                "Means. room: until its rank has room; pull: beside the copy; resume: until it is in a step.",
                SECONDS,
                Query(f"{parts} / ignoring (stage) group_left () {count}", "{{stage}}"),
                is_stacked=True,
            ),
        ],
    )


def _parts() -> Row:
    return Row(
        "In NIXL",
        [
            graph(
                "Time on the wire",
                "95th percentile of one rank's transfer, by NIXL.",
                SECONDS,
                Query(quantile(0.95, "vllm:nixl_xfer_time_seconds", DECODE, by=("instance",)), "{{instance}}"),
            ),
            graph(
                "Time to post",
                "95th percentile: preparing the descriptors, on the host.",
                SECONDS,
                Query(quantile(0.95, "vllm:nixl_post_time_seconds", DECODE, by=("instance",)), "{{instance}}"),
            ),
            graph(
                "Descriptors of a transfer",
                "Mean. Many small ones are slow: larger blocks help.",
                COUNT,
                Query(mean("vllm:nixl_num_descriptors", DECODE, by=("instance",)), "{{instance}}"),
            ),
        ],
    )


def _failures() -> Row:
    failed = "vllm:nixl_num_failed_{}_total"
    return Row(
        "What goes wrong",
        [
            graph(
                "Pulls that fail",
                "Should be 0. Each of these prompts is computed again by the decode engine.",
                PER_SECOND,
                Query(total(rate("tknp_kv_transfer_failed_total"), "instance", "rank"), RANK),
                Query(total(rate(failed.format("transfers"), DECODE), "instance"), "{{instance}} transfers of NIXL"),
                Query(total(rate(failed.format("notifications"), DECODE), "instance"), "{{instance}} notifications"),
            ),
            graph(
                "Leases that end in vain",
                "KV cache of requests that ended after their prefill: released, or left to vLLM's lease of 30 s.",
                PER_SECOND,
                Query(total(rate("tknp_kv_leases_total"), "end"), "{{end}}"),
                Query(total(rate("vllm:nixl_num_kv_expired_reqs_total", PREFILL), "instance"), "{{instance}} expired"),
            ),
            graph(
                "Offers that were not used",
                "KV cache that was not sure to be the prompt's any more, by reason; the prompt was computed instead.",
                PER_SECOND,
                Query(total(rate("tknp_kv_transfer_stale_total"), "reason"), "{{reason}}"),
            ),
            graph(
                "Prefill engines asked again",
                "At the first contact, before they answered. Should be 0 but for the time when engines start.",
                PER_SECOND,
                Query(total(rate("tknp_kv_transfer_retries_total"), "instance", "rank"), RANK),
            ),
            graph(
                "Requests that wait for KV cache",
                "In decode engines, by how far their pull is.",
                COUNT,
                Query(total(series("vllm:num_requests_kv_fetch_by_stage", DECODE), "stage"), "{{stage}}"),
            ),
        ],
    )
