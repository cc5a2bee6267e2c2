"""Reads pickles of published features without executing them.

Only numpy arrays, numbers, texts and plain containers are read.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import DataError

CONTENT = "a pickle of numpy arrays, numbers, texts, lists and dicts"
MOST_MEMO = 50_000_000
"""Largest index of the memo: a short file could name a larger one, and unpickling would allocate memory up to it."""
SPEC = frozenset("biufcSUO")
"""Kinds of numpy types that are read."""


class PickledDtype:
    """Stands for a numpy dtype while a pickle is read."""

    def __init__(self, spec: Any = "", align: Any = False, copy: Any = False) -> None:
        self.spec, self.order = spec, "="

    def __setstate__(self, state: Any) -> None:
        _, order, base, names, *_ = state if isinstance(state, tuple) and len(state) > 3 else [None] * 4
        if order not in ("<", ">", "|", "=") or base is not None or names is not None:
            raise pickle.UnpicklingError("a structured numpy type")
        self.order = order

    def dtype(self) -> np.dtype:
        spec = self.spec.decode("ascii", "replace") if isinstance(self.spec, bytes) else self.spec
        if not isinstance(spec, str) or spec[:1] not in SPEC or not spec[1:].isdecimal() or len(spec) > 12:
            raise pickle.UnpicklingError(f"a numpy type {ascii(spec)[:40]}")
        return np.dtype(spec if self.order == "|" or spec[0] == "O" else f"{self.order}{spec}")


class PickledArray:
    """Stands for a numpy array while a pickle is read; numpy itself never receives the state in the file."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Returns the array; elements of object arrays are left as they were read."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise pickle.UnpicklingError("an array without values")
        _, shape, dtype, fortran, data = self.state
        return build_array(shape, dtype, data, "F" if fortran else "C")


def build_array(shape: Any, dtype: Any, data: Any, order: str) -> np.ndarray:
    """Builds an array from the values in a pickle, after checking that their number matches the shape.

    Raises:
        pickle.UnpicklingError: shape, type and values do not match.
    """
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n < 2**40 for n in shape) or len(shape) > 16:
        raise pickle.UnpicklingError(f"an array of shape {ascii(shape)[:40]}")
    if not isinstance(dtype, PickledDtype):
        raise pickle.UnpicklingError("an array without a type")
    kind, count = dtype.dtype(), math.prod(shape)
    if kind == np.dtype("O"):
        if not isinstance(data, list) or len(data) != count:
            raise pickle.UnpicklingError(f"an array of {count} objects without its objects")
        flat = np.empty(count, dtype=object)
        flat[:] = [None] * count
        for index, value in enumerate(data):
            flat[index] = value
        return flat.reshape(shape, order="F" if order == "F" else "C")
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray) or len(data) != count * kind.itemsize:
        raise pickle.UnpicklingError(f"an array of {count} values with values of another size")
    return np.frombuffer(data, dtype=kind).reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(cls: Any, shape: Any, kind: Any) -> PickledArray:
    if cls is not PickledArray:
        raise pickle.UnpicklingError("a subclass of numpy arrays")
    return PickledArray()


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return build_array(shape, dtype, bytes(buffer) if isinstance(buffer, bytearray | bytes) else None, order)


def _scalar(dtype: Any, data: Any = None) -> Any:
    value = build_array((1,), dtype, [data] if isinstance(data, PickledArray) else data, "C")[0]
    return value.item() if isinstance(value, np.generic) else value


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"a text in {ascii(codec)[:40]}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    # Early protocols write b"" as a call of bytes without arguments.
    return b""


ADMITTED: dict[tuple[str, str], Any] = {
    **{
        (f"numpy.{core}.{module}", name): value
        for core in ("core", "_core")
        for module, name, value in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _empty_bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
"""(module, name) in a pickle -> what takes its place; nothing else is looked up or called."""


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that admits the names in ``ADMITTED`` only; modules named in the file are never imported."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = ADMITTED.get(("builtins" if module == "__builtin__" else module, name))
        if admitted is None:
            raise ForbiddenName(f"{module}.{name}")
        return admitted


class ForbiddenName(pickle.UnpicklingError):
    """A pickle names something other than arrays and containers."""


def load_restricted_pickle(path: str | Path, *, who: str = "pickle") -> Any:
    """Reads a pickle that contains only numpy arrays, numbers, texts, None, lists, tuples, sets and dicts.

    No code that the file names is imported or called: arrays are rebuilt here from their shape, type and bytes.

    Raises:
        DataError: the file is missing, empty, truncated or no pickle, or it names anything else, such as a function.

    Example:
        >>> import pickle, tempfile
        >>> path = Path(tempfile.mkdtemp(), "features.pkl")
        >>> _ = path.write_bytes(pickle.dumps({"text": np.zeros((2, 3))}))
        >>> load_restricted_pickle(path)["text"].shape
        (2, 3)
    """
    who = f"{who} '{path}'"
    try:
        if not Path(path).is_file():
            raise DataError(who, expected="a pickle", got="no such file")
        with open(path, "rb") as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
            if not start:
                raise DataError(who, expected=CONTENT, got="an empty file", fix="Fetch the file again.")
            if start.startswith(b"version https://git-lfs"):
                raise DataError(
                    who, expected=CONTENT, got="a pointer of Git LFS", fix="Fetch the file itself: git lfs pull."
                )
            file.seek(0)
            _check_memo(file, size)
            file.seek(0)
            # Texts of Python 2 are bytes in any encoding; latin1 keeps them.
            return _resolve(RestrictedUnpickler(file, encoding="latin1").load(), {})
    except DataError:
        raise
    except OSError as error:
        raise DataError(who, expected="a pickle that can be read", got=error.strerror or str(error)) from error
    except ForbiddenName as error:
        raise DataError(
            who, expected=CONTENT, got=f"one that refers to '{ascii(str(error))[1:-1][:80]}'",
            fix="It was not executed. Take the file from its publisher, or convert it to arrays in the program that "
                "made it.",
        ) from error  # fmt: skip
    except (EOFError, pickle.UnpicklingError) as error:
        text = " ".join(str(error).split())[:100] or "it ends early"
        cut = "truncated" in text or "ran out" in text or "exhausted" in text or isinstance(error, EOFError)
        raise DataError(
            who, expected=f"complete: {CONTENT}" if cut else CONTENT, got=f"a truncated file ({text})" if cut else text,
            fix="Fetch the file again and compare its size with the publisher's.",
        ) from error  # fmt: skip
    # The decoder raises many kinds of errors on invalid content.
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        MemoryError,
        OverflowError,
        RecursionError,
    ) as error:
        text = " ".join(str(error).split())[:100]
        cut = "truncated" in text or "exhausted" in text or "not enough" in text or "expected" in text
        raise DataError(
            who, expected=CONTENT, got=f"a truncated file ({text})" if cut else f"a damaged file ({text})",
            fix="Fetch the file again and compare its size with the publisher's.",
        ) from error  # fmt: skip


def _check_memo(file: BinaryIO, size: int) -> None:
    """Raises UnpicklingError for an index of the memo that would allocate memory out of proportion to the file."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > min(MOST_MEMO, size):
            raise pickle.UnpicklingError(f"a memo of {argument} entries")


def _resolve(value: Any, resolved: dict[int, Any], depth: int = 0) -> Any:
    """Replaces the stand-ins by arrays, in nested containers."""
    if depth > 100:
        raise pickle.UnpicklingError("containers that are nested too deep")
    if id(value) in resolved:
        return resolved[id(value)][1]
    if isinstance(value, PickledArray):
        result: Any = value.array()
        result = _resolve(result, resolved, depth + 1)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        result = value
        for index in range(result.size):
            result.flat[index] = _resolve(result.flat[index], resolved, depth + 1)
    elif isinstance(value, dict):
        result = {_resolve(k, resolved, depth + 1): _resolve(v, resolved, depth + 1) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        result = type(value)(_resolve(part, resolved, depth + 1) for part in value)
    elif isinstance(value, PickledDtype):
        result = value.dtype()
    else:
        return value
    # The original is kept, so that its id is not given to another object.
    resolved[id(value)] = (value, result)
    return result
