"""Errors: what a message says, and that it survives the way from a worker process."""

import pickle

import pytest

from equipoise import errors
from equipoise.errors import EquipoiseError, unknown_name

FAMILY = [getattr(errors, name) for name in dir(errors) if name.endswith("Error")]


def test_error_classes_are_complete():
    assert {kind.__name__ for kind in FAMILY} >= {
        "EquipoiseError", "ShapeError", "DataError", "ConfigError", "NonFiniteError", "SchemaError",
    }  # fmt: skip


@pytest.mark.parametrize("kind", FAMILY)
def test_message_contains_who_expected_got_and_fix(kind):
    error = kind("pack 'audio'", expected="dim = 64", got="dim = 32", fix="Use dim=64.")
    assert str(error) == "pack 'audio': expected dim = 64, got dim = 32. Use dim=64."
    assert issubclass(kind, EquipoiseError)
    assert issubclass(kind, ValueError)


def test_message_without_fix_ends_after_got():
    assert str(EquipoiseError("pack", expected="a", got="b")) == "pack: expected a, got b."


@pytest.mark.parametrize("kind", FAMILY)
def test_errors_can_be_pickled(kind):
    before = kind("data 'x.wav'", expected="8000 Hz", got="44100 Hz", fix="Resample it.")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert str(after) == str(before)
    assert (after.who, after.expected, after.got, after.fix) == (before.who, before.expected, before.got, before.fix)


def test_unknown_name_suggests_the_closest():
    error = unknown_name("load", "data set", "digts", ["digits", "av_digits", "cremad"])
    assert isinstance(error, errors.ConfigError)
    assert "load: expected a known data set, got 'digts'. Did you mean 'digits'" in str(error)
    assert "cremad" not in str(error)


def test_unknown_name_lists_all_without_close_match():
    assert str(unknown_name("load", "data set", "zzz", ["digits", "cremad"])).endswith("Choose one of: cremad, digits.")
