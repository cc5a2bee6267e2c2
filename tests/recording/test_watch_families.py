"""``eq.watch`` on many multimodal families, compared with matrices and labels from independent code."""

import pytest

pytest.importorskip("transformers")

import transformers

from helpers.watch_families import FORMS, FOUND
from helpers.watch_sweep import check_family

DIVERSE = (
    "paligemma", "qwen3_5", "glmasr", "canary", "musicgen", "layoutlmv3", "granite_speech", "bridgetower",
)  # fmt: skip
"""A decoder with images, one with recurrent layers, one with audio, encoder-decoders, joint and paired encoders."""


def check(name: str, form: int) -> None:
    transformers.logging.set_verbosity_error()
    outcome = check_family(FOUND[name], form)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.right or outcome.refused
    if outcome.refused:
        assert all(outcome.refused.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DIVERSE)
def test_diverse_families(name):
    check(name, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", range(len(FORMS)), ids=FORMS)
@pytest.mark.parametrize("name", sorted(FOUND))
def test_all_families(name, form):
    check(name, form)
