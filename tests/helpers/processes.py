"""Processes for a test: they rendezvous through a file, synchronize, and exit together."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from helpers.waiting import DEADLOCK


@contextmanager
def process_group(rank, folder, world=2):
    """Context manager of a gloo process group; the process exits at its end.

    It ends without destructors: that of DistributedDataParallel's reducer waits for gloo's thread while it holds the
    interpreter's lock, which that thread may want for its last tensor, and then neither goes on.
    """
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=DEADLOCK)
    )
    yield
    distributed.barrier()
    os._exit(0)
