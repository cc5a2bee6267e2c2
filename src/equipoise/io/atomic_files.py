"""Atomic file writes, checks of output folders, and conversion to JSON types."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, SchemaError

STALE = 600.0
"""Age in seconds after which a temporary file is considered abandoned."""

LONGEST = 200
"""Maximum number of characters of a folder name."""

OWN = frozenset({
    ".lock", "best", "checkpoints", "diagnosis", "diagnosis.json", "gallery.html", "journal.jsonl", "logs", "look.json",
    "model.safetensors", "questions.csv", "questions.html", "questions.json", "recipe.yaml", "report.html",
    "results.csv", "results.json", "run.json", "runs", "search", "search.safetensors", "summary.png", "teachers",
})  # fmt: skip
"""Files and folders that this package writes at the top level of an output folder."""

LITTER = (".DS_Store", "Thumbs.db", ".nfs")
"""Prefixes of files that operating systems create in folders."""


def atomic_write(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file atomically: either the old or the new file exists completely at any time.

    Raises:
        ConfigError: the path exists and is not a file. OSError: the file cannot be written, for example on a full disk.
    """
    with open_atomic(path) as file:
        # File names may contain bytes that are not UTF-8.
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces the file at this path on success and is removed on errors.

    Raises:
        ConfigError: the path exists and is not a file. OSError: the file cannot be written, for example on a full disk.
    """
    path = Path(path)
    check_file(path, "write")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        temporary.unlink(missing_ok=True)
        # Mode "x" does not follow existing links.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Removes stale temporary files left by interrupted writers."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        # Decide by age: the process may be running on another computer that shares the folder.
        with contextlib.suppress(FileNotFoundError):
            if number.isdecimal() and time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def check_file(path: Path, who: str) -> None:
    """Checks that a file can be written at this path, without creating anything.

    Raises:
        ConfigError: the path is a link, folder or device, or its parent folder cannot be created.
    """
    kind = _kind(path)
    if kind not in ("nothing", "a file"):
        raise ConfigError(
            who, expected="the path of a file", got=f"'{path}', which is {kind}", fix="Choose another path for it."
        )
    _check_above(path, who, "a file")


def check_folder(folder: Path, who: str) -> None:
    """Checks that a folder can be used as output folder, without creating anything.

    Valid folders are new, empty, or were written by this package. They must not contain links to the outside.

    Raises:
        ConfigError: the path is a file, link or device, or a folder that is read-only or contains other files.
    """
    kind = _kind(folder)
    if kind == "a file" or kind not in ("nothing", "a folder"):
        raise _no_folder(folder, who, f"it is {kind}")
    if kind == "nothing":
        _check_above(folder, who, "a folder")
        return
    _check_writable(folder, folder, who, "a folder")
    inside = sorted(entry.name for entry in os.scandir(folder))
    foreign = [name for name in inside if not _is_own(folder, name)]
    if foreign and not _is_marked(folder):
        raise ConfigError(
            who, expected="a folder that is new, empty, or written by equipoise",
            got=f"'{folder}', which holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}",
            fix="Choose another --out.",
        )  # fmt: skip
    for directory, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(directory, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                raise ConfigError(
                    who, expected=f"no links to the outside in '{folder}', so that nothing is written elsewhere",
                    got=f"the link '{path}'", fix="Replace it with what it leads to, or choose another --out.",
                )  # fmt: skip
        # wandb writes each run to a new folder, with links to its own log files, which nothing follows.
        folders[:] = [name for name in folders if Path(directory, name) != Path(folder, "logs", "wandb")]


def make_folder(folder: Path, who: str) -> None:
    """Creates a folder after ``check_folder``.

    Raises:
        ConfigError: the folder cannot be created or written to.
    """
    check_folder(folder, who)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(folder, who, error.strerror or str(error)) from error


def check_path_component(name: str, who: str, *, without: str = "") -> str:
    """Returns the name after checking that it is a single path component.

    Raises:
        ConfigError: the name is empty, too long, begins with a dot or contains a separator.
    """
    wrong = [letter for letter in f"/\\{without}" if letter in name]
    if not name or wrong or name[0] in ". " or name[-1] == " " or len(name) > LONGEST or not name.isprintable():
        got = ascii(name) if len(name) <= LONGEST else f"one of {len(name)} characters"
        raise ConfigError(
            who, expected=f"a name without {' '.join(('/', chr(92), *without))} that begins with no dot",
            got=got, fix="It becomes the name of a folder; choose another.",
        )  # fmt: skip
    return name


def read_json(path: Path) -> Any:
    """Loads a JSON file.

    Raises:
        ValueError: the content is not valid JSON. OSError: the file cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        # Reading from a pipe or a device might not end.
        raise OSError(errno.EINVAL, "it is no file", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("lists and mappings are nested too deep") from None


def file_error(error: OSError) -> DataError:
    """Converts an OSError of a file, such as a full disk, to a DataError."""
    reason = error.strerror or str(error)
    return DataError(str(error.filename or "a file"), expected="a file that can be read or written", got=reason)


def _kind(path: Path) -> str:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return "nothing"
    except ValueError:
        raise ConfigError("path", expected="a path", got=ascii(str(path))) from None
    kinds = {
        stat.S_ISLNK: "a link", stat.S_ISDIR: "a folder", stat.S_ISREG: "a file", stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }  # fmt: skip
    return next((name for holds, name in kinds.items() if holds(mode)), "a device")


def _check_above(path: Path, who: str, what: str) -> None:
    """Raises ConfigError if the path cannot be created because of its parent folders."""
    folder = path.absolute().parent
    while _kind(folder) == "nothing" and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise _no_folder(path, who, os.strerror(errno.ENOTDIR), what)
    _check_writable(folder, path, who, what)


def _check_writable(directory: Path, path: Path, who: str, what: str) -> None:
    # Respect read-only folders also for users who may write to them (root).
    if not os.access(directory, os.W_OK) or not os.stat(directory).st_mode & 0o222:
        raise _no_folder(path, who, "it is read-only" if directory == path else f"'{directory}' is read-only", what)


def _no_folder(path: Path, who: str, reason: str, what: str = "a folder") -> ConfigError:
    return ConfigError(who, expected=f"{what} that can be written", got=f"'{path}' ({reason})",
                       fix="Choose another --out.")  # fmt: skip


def _is_own(folder: Path, name: str) -> bool:
    unfinished = name.startswith(".") and name.endswith(".tmp")
    return name in OWN or unfinished or name.startswith(LITTER) or (folder / name / "diagnosis.json").is_file()


def _is_marked(folder: Path) -> bool:
    """Returns whether the folder contains a file that only this package writes."""
    for name, keys in (
        ("results.json", {"schema", "protocol", "runs"}), ("run.json", {"run"}), ("diagnosis.json", {"kind", "schema"}),
        ("look.json", {"kind", "schema"}), ("prepare.json", {"layout", "schema"}),
    ):  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            content = read_json(folder / name)
            if isinstance(content, dict) and keys <= set(content):
                return True
    return False


def to_jsonable(value: Any, where: str = "results") -> Any:
    """Converts a value to JSON types: NaN to null, tensors to lists; ``where`` describes the value in errors."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(part, f"{where}: {key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(part, where) for part in value]
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return to_jsonable(value.tolist(), where)
    fix = "Convert it first, for example a path with str(path.name)."
    raise SchemaError(where, expected="numbers, texts, lists, mappings or None", got=type(value).__name__, fix=fix)


def unshare_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors of a state dict that share memory with earlier ones, as safetensors requires.

    Example:
        >>> weight = torch.ones(2)
        >>> state = unshare_tensors({"a": weight, "b": weight})
        >>> state["a"] is weight, state["b"] is weight
        (True, False)
    """
    pointers: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in pointers and tensor.numel() else tensor
        pointers.add(memory)
    return tensors
