"""Peak memory of this process and of its device."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory from its construction on, or from the start of the process where the system cannot reset it.

    Example:
        >>> PeakMemory().process() > 0
        True
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            RESET.write_text("5", encoding="ascii")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def process(self) -> int:
        """Returns the peak of the resident memory of the process in bytes, libraries included."""
        with contextlib.suppress(OSError):
            for line in STATUS.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        # Not available on Windows.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def device(self) -> int | None:
        """Returns the peak of the memory allocated by torch on the CUDA device in bytes; None without one."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
