"""`python -m tests.soak PRESET`: tells what happens and ends with a line of JSON; exit code 1 if not all is well."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tests.soak.plan import PRESETS
from tests.soak.run import run_soak
from tknp.tiny_model import make_tiny_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("preset", choices=PRESETS, help="short: two minutes; thousand: 1,000 requests; hour")
    parser.add_argument("--seed", type=int, default=1, help="Of the traffic and the faults.")
    parser.add_argument("--seconds", type=float, help="Other than the preset's.")
    parser.add_argument("--stream-kv", action="store_true", help="Decode engines pull while prompts are computed.")
    parser.add_argument("--log-dir", type=Path, default=Path("logs/soak"), help="Folder for each process's output.")
    parser.add_argument("--output", type=Path, help="File for the summary.")
    given = parser.parse_args()
    plan = replace(PRESETS[given.preset], seed=given.seed, stream_kv=given.stream_kv)
    if given.seconds is not None:
        plan = replace(plan, seconds=given.seconds, num_requests=0)
    given.log_dir.mkdir(parents=True, exist_ok=True)
    summary = run_soak(
        plan, make_tiny_model(given.log_dir / "model"), given.log_dir, lambda line: print(line, flush=True)
    )
    if given.output is not None:
        given.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    sys.exit(not summary["ok"])


if __name__ == "__main__":
    main()
