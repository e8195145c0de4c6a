"""The comparisons without pytest: `python -m tests.gpu [CASE…]`. Without names, all for which there are GPUs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.gpu.cases import CASES
from tests.gpu.running import Runs, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("names", nargs="*", metavar="CASE", help=", ".join(case.ours.name for case in CASES))
    parser.add_argument("--log-dir", type=Path, default=Path("logs/gpu"))
    given = parser.parse_args()
    unknown = set(given.names) - {case.ours.name for case in CASES}
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    num_gpus = torch.cuda.device_count()
    wanted = [case for case in CASES if not given.names or case.ours.name in given.names]
    cases = [case for case in wanted if case.num_gpus <= num_gpus]
    for case in wanted:
        if case not in cases:
            print(f"{case.ours.name}: skipped, it needs {case.num_gpus} GPUs and there are {num_gpus}")
    if not cases:
        return 1
    given.log_dir.mkdir(parents=True, exist_ok=True)
    runs = Runs(cases, num_gpus, given.log_dir.absolute())
    rows = []
    for case in cases:
        rows.append((case, *runs.judge(case)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    return int(any(wrong for _, wrong, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
