"""No damaged file and no command line ends in a traceback: seeded samples of both, see fuzzing.py."""

import pytest

from helpers.fuzzing import RESULTS, World, damaged, random_command

FEW, MANY = range(30), (*range(30, 60), *range(1000, 1500))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def unexpected_outcomes(work, world, seeds):
    """seed -> the kind of file or command, and what came of it, where that is neither a result nor an error told."""
    result = {seed: work(world, seed) for seed in seeds}
    return {seed: (what, how, message) for seed, (what, how, message) in result.items() if message not in RESULTS}


@pytest.mark.parametrize("work", [damaged, random_command])
def test_few_random_damages(work, world):
    assert unexpected_outcomes(work, world, FEW) == {}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("work", [damaged, random_command])
def test_many_random_damages(work, world):
    assert unexpected_outcomes(work, world, MANY) == {}


def test_traceback_is_detected():
    from helpers.fuzzing import outcome

    assert outcome(lambda: [][1]) == "IndexError in outside"
    assert outcome(lambda: 1) == "status 1 without a sentence"
