"""Time of `import equipoise` relative to `import torch`: medians over separate processes that alternate."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

LIMIT = 1.15


def seconds(statement: str) -> float:
    """Returns the wall-clock time of a new interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11, help="processes of each kind (default: 11)")
    runs = parser.parse_args().runs
    statements = ("import torch", "import equipoise")
    # The first run of each statement fills the disk cache and is not counted.
    for statement in statements:
        seconds(statement)
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(runs):
        for statement in statements:
            times[statement].append(seconds(statement))
    torch, ours = (statistics.median(times[statement]) for statement in statements)
    print(f"import torch      {torch:.3f} s (median of {runs})")
    print(f"import equipoise  {ours:.3f} s (median of {runs})")
    print(f"ratio             {ours / torch:.3f} (limit {LIMIT})")
    return int(ours / torch > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
