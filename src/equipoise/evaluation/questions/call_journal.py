"""Calls of a black box with retries and a limit of time, and a journal of its replies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import DataError
from ...io.atomic_files import check_file


class Reply(NamedTuple):
    """The reply to a call.

    Attributes:
        text: None if the call failed.
        error: why it failed.
        extra: further values, such as the share of attention.
    """

    text: str | None
    error: str = ""
    extra: Mapping[str, Any] = MappingProxyType({})


class CallJournal:
    """Stores replies by the key of their question, in a file with one JSON object per line.

    Each reply is on disk before the next call begins. An incomplete last line, as after a power failure, is ignored.
    Failed calls are recorded too, and repeated by the next run.

    Raises:
        DataError: the file is no journal.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._replies: dict[str, Reply] = {}
        self._lock = threading.Lock()
        if self._path is not None:
            check_file(self._path, "journal")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._read(self._path)

    def get(self, key: str) -> Reply | None:
        """Returns the reply of a successful call."""
        reply = self._replies.get(key)
        return None if reply is None or reply.text is None else reply

    def add(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, "text": reply.text, "error": reply.error, "extra": dict(reply.extra)})
        with self._lock:
            self._replies[key] = reply
            if self._path is not None:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
                    file.flush()

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        *lines, last = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self._replies[str(entry["key"])] = Reply(entry["text"], entry["error"], entry.get("extra") or {})
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"journal '{path}'", expected='lines of {"key", "text", "error"}', got=f"another line {number}",
                    fix="Choose another file, or remove the line.",
                ) from error  # fmt: skip
        if last:
            with open(path, "r+b") as file:
                file.truncate(len(content) - len(last))


def call_with_retries(call: Callable[[], Any], *, retries: int, wait: float, timeout: float | None) -> Reply:
    """Calls until there is a text, at most ``1 + retries`` times; between calls it waits 1, 2, 4, ... times ``wait``.

    A call that takes longer than ``timeout`` seconds counts as failed; it is left running in a daemon thread.
    """
    error = ""
    for attempt in range(retries + 1):
        if attempt and wait:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            text = call() if timeout is None else _within(call, timeout)
        except TimeoutError as raised:
            error = f"TimeoutError: {raised}".rstrip(": ")
            continue
        # Whatever a target raises: the reply is missing, and the run goes on.
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}".rstrip(": ")[:500]
            continue
        if isinstance(text, str):
            return Reply(text)
        error = f"expected a text, got {type(text).__name__}"
    return Reply(None, error)


def _within(call: Callable[[], Any], timeout: float) -> Any:
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if errors:
        raise errors[0]
    if not result:
        raise TimeoutError(f"no reply within {timeout:g} s")
    return result[0]
