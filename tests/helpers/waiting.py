"""Waiting for events, such as a condition or the end of processes, without fixed delays."""

import os
import select
import time

DEADLOCK = 1200
"""Timeout in seconds for tests that would hang; far longer than needed on a busy machine."""


def wait_until(condition, process, meanwhile=lambda: None):
    """Waits until a condition is True; returns False if the process ended first. ``meanwhile`` must hold all the
    time.
    """
    give_up = time.monotonic() + DEADLOCK
    while not condition():
        if process.poll() is not None:
            return False
        meanwhile()
        if time.monotonic() > give_up:
            process.kill()
            raise AssertionError("neither the condition nor the end of the process came")
        time.sleep(0.01)
    return True


def wait_for_end(pids):
    """Waits until the processes have ended; returns those still running at the timeout."""
    left = set()
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        if not ended.poll(1000 * DEADLOCK):
            left.add(pid)
        os.close(handle)
    return left
