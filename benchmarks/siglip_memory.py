"""Memory of the pairs of SigLIP for batch sizes 512 to 8192, in tiles and as one (batch, batch) matrix.

    python benchmarks/siglip_memory.py            # half a minute on two cores; uses a GPU if available

Value and gradients, float32, width 16. The values are peaks above the inputs, minus six buffers of (batch, width): two
accumulated, two saved and two returned gradients. Each case runs in a separate process. On a CPU
the peak is the resident memory of the process, with an uncertainty of about one megabyte.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from equipoise.alignment.losses.sigmoid_loss import TILE, siglip

SIZES, WIDTH = (512, 1024, 2048, 4096, 8192), 16


def full(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Computes the loss from the full matrix of pairs."""
    sign = 2 * torch.eye(len(a), device=a.device) - 1
    return F.softplus(-sign * (10 * a @ b.T - 10)).sum() / len(a)


def tiles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return siglip(a, b, scale=10.0, bias=-10.0)


def resident(what: str) -> int:
    """Returns VmRSS (current memory) or VmHWM (peak memory) in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def peak(form: str, size: int, device: str) -> float:
    """Returns the megabytes that the loss and its gradients need in addition to the inputs."""
    torch.manual_seed(0)
    loss = {"tiles": tiles, "full": full}[form]
    # Warm up, so that code loaded by the first call is not counted.
    loss(*(torch.randn(2 * TILE, WIDTH, device=device, requires_grad=True) for _ in range(2))).backward()
    a, b = (F.normalize(torch.randn(size, WIDTH, device=device), dim=1).requires_grad_() for _ in range(2))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = resident("VmRSS")
    loss(a, b).backward()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return (after - before - 6 * a.nbytes) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs=2, metavar=("FORM", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(peak(options.case[0], int(options.case[1]), options.device))
        return
    print(f"torch {torch.__version__}, {options.device}, tiles of {TILE} x {TILE}, megabytes")
    print(f"{'batch':>6}{'tiles':>10}{'full':>10}")
    for size in SIZES:
        row = []
        for form in ("tiles", "full"):
            case = [sys.executable, __file__, "--device", options.device, "--case", form, str(size)]
            # Return freed memory to the system immediately, so that heap fragmentation is not counted.
            settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(case, check=True, capture_output=True, text=True, env=settings)
            row.append(float(done.stdout))
        print(f"{size:6}{row[0]:10.1f}{row[1]:10.1f}")


if __name__ == "__main__":
    main()
