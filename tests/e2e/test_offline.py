"""`TokenParallelLLM`, without servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.processes import ENVIRONMENT, START_SECONDS

Models = Callable[[str], Path]


def run_offline(model: Path, directory: Path, **settings: Any) -> tuple[dict[str, Any] | None, str]:
    """What the script found out, None if it failed, and all that it printed."""
    common = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_num_batched_tokens": 64}
    wanted, found = directory / "settings.json", directory / "result.json"
    settings = {"model": str(model), "disable_log_stats": False, "max_model_len": 320, **common, **settings}
    wanted.write_text(json.dumps(settings))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.e2e.offline", str(wanted), str(found)],
        # A function of ours looks at the classes in the workers.
        env={**os.environ, **ENVIRONMENT, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * START_SECONDS,
        check=False,
    )
    return (json.loads(found.read_text()) if ended.returncode == 0 else None), ended.stdout


def test_experts_on_the_root_and_an_fp8_cache_on_ranks_that_run_full(models: Models, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": models("mixtral"), "directory": tmp_path, "kv_cache_dtype": "fp8"}
    plain, log = run_offline(**settings, token_parallel_size=1)
    assert plain is not None, log
    assert not [name for name in plain["classes"] if "token_parallel" in name or "TokenParallel" in name]
    # The root holds one request of the longest kind, the other rank three; together the requests want 63 blocks.
    ours, log = run_offline(**settings, token_parallel_size=2, blocks_per_rank=[12, 30])
    assert ours is not None, log
    assert ours["tokens"] == plain["tokens"]
    assert ours["preemptions"] > 0, "the pools are too large for this test to mean anything"
    for status in ours["status"]:
        assert status["num_free_blocks"] == status["num_blocks"] and status["num_requests"] == 0
    assert any("TokenParallel" in name for name in ours["classes"]), "a wrapper would not be found above"
    root, kv_worker = ours["status"]
    assert root["parameter_bytes"] > 10_000_000 and kv_worker["parameter_bytes"] < 1000, "a KV worker has no expert"
    assert 0 < kv_worker["ready_seconds"] < 120


def test_a_rank_too_small_for_the_longest_request_is_refused(models: Models, tmp_path: Path) -> None:
    result, log = run_offline(models("llama"), tmp_path, token_parallel_size=2, blocks_per_rank=[10, 10])
    assert result is None
    assert "--max-model-len is 320 tokens, but a request lives on one of the 2 token-parallel ranks" in log
