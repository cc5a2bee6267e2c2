"""Pickles of features are read without executing them; everything else is refused."""

import contextlib
import os
import pickle
import struct
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest

from equipoise.data.layouts import load_restricted_pickle
from equipoise.errors import DataError


class Runs:
    """Unpickled in the usual way, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Builds:
    """Its state would be given to a class of this module."""

    def __init__(self):
        self.value = 3


def equal(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape
        return same and (
            all(map(equal, left.ravel(), right.ravel())) if left.dtype == object else np.array_equal(left, right)
        )
    return left == right


CONTENTS = {
    "floats": np.arange(6.0).reshape(2, 3),
    "single": np.arange(6, dtype="float32").reshape(3, 1, 2),
    "fortran": np.asfortranarray(np.arange(6, dtype="int16").reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">f4"),
    "bools": np.array([True, False]),
    "bytes": np.array([b"one", b"three"]),
    "texts": np.array(["one", "drei\u00e9"]),
    "objects": np.array([np.zeros(2), "a", None, [1, 2]], dtype=object),
    "empty": np.zeros((0, 5, 3), "float32"),
    "scalar": np.float32(1.5),
    "containers": {"a": [1, 2.5, "x", None, True, (b"y", {3})], 4: OrderedDict(b=np.ones(2))},
    "shared": [np.ones(2)] * 2,
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", CONTENTS)
def test_arrays_and_containers_round_trip(tmp_path, name, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(CONTENTS[name], protocol=protocol))
    assert equal(load_restricted_pickle(tmp_path / "a.pkl"), CONTENTS[name])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_functions_are_not_called(tmp_path, protocol):
    content = {"train": {"text": Runs(tmp_path / "ran")}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(
        DataError, match=r"a\.pkl': expected a pickle of numpy .*, got one that refers to '(posix|os)\.system'"
    ):
        load_restricted_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", [Builds(), Fraction(1, 2), print, np.random.default_rng, np.dtype([("a", "f4")]), slice(1, 2), 2j]
)
def test_other_objects_raise(tmp_path, value):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([value]))
    with pytest.raises(DataError, match="expected a pickle of numpy arrays"):
        load_restricted_pickle(tmp_path / "a.pkl")


HAND_MADE = {
    "protocol 0 global": b"cposix\nsystem\n(S'true'\ntR.",
    "nested name": b"\x80\x04\x8c\x05numpy\x8c\x13random.default_rng\x93.",
    "instance": b"(S'true'\niposix\nsystem\n.",
    "persistent id": b"P12\n.",
    "extension": b"\x82\x01.",
    "numpy function": b"cnumpy\nload\n(S'x'\ntR.",
    "subclass of arrays": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
    "array of fewer bytes": pickle.dumps(np.zeros(4), protocol=2).replace(b"K\x04\x85", b"K\x7f\x85"),
    "codec": b"c_codecs\nencode\n(VYQ==\nVbase64\ntR.",
    "memo": b"\x80\x02N" + b"r" + struct.pack("<I", 2**31) + b".",
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_crafted_pickles_raise(tmp_path, name):
    (tmp_path / "a.pkl").write_bytes(HAND_MADE[name])
    with pytest.raises(DataError, match="expected"):
        load_restricted_pickle(tmp_path / "a.pkl")


def test_truncated_files_raise(tmp_path):
    content = pickle.dumps({"train": {"text": np.ones((3, 2)), "id": ["a", "b"]}}, protocol=4)
    for length in range(1, len(content)):
        (tmp_path / "a.pkl").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a\.pkl'"):
            load_restricted_pickle(tmp_path / "a.pkl")


def test_damaged_bytes_raise_data_errors_only(tmp_path):
    content = pickle.dumps({"train": {"text": np.ones((3, 2), "float32"), "id": np.array(["a", "b"])}}, protocol=4)
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(content)
        for index in rng.integers(0, len(content), 2):
            damaged[index] = rng.integers(0, 256)
        (tmp_path / "a.pkl").write_bytes(damaged)
        with contextlib.suppress(DataError):
            load_restricted_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "got a pointer of Git LFS"),
        (b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00}", "got a truncated file"),
        (b"<html>not found</html>", "got (a damaged file|invalid load key|.*)"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_restricted_pickle(tmp_path / "a.pkl")


def test_missing_file_raises(tmp_path):
    with pytest.raises(DataError, match="expected a pickle, got no such file"):
        load_restricted_pickle(tmp_path / "a.pkl")
    with pytest.raises(DataError, match="expected a pickle, got no such file"):
        load_restricted_pickle(tmp_path)
