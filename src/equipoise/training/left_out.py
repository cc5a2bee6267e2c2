"""Corruptions that a comparison tests, and those of them that it leaves out of training and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import data
from ..balance import ModalityCorruption
from ..data.corruptions import check_corruptions, corruption_names, infer_kind
from ..diagnostics.robustness_test import robustness
from ..diagnostics.task_scores import SCORES
from ..errors import ConfigError
from ..models.fusion_model import FusionModel
from .recipes import Recipe

WHO = "recipe: left_out"

TEST_SEVERITIES = (1, 3, 5)


def tested_corruptions(recipe: Recipe) -> list[str]:
    """Returns the corruptions that the recipe tests, without duplicates."""
    return list(dict.fromkeys([*recipe.test_corruptions, *recipe.left_out]))


def without_left_out(options: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Returns options of ``ModalityCorruption`` or ``Reliability.fit``, without the corruptions that are left out.

    Without ``corruptions`` these are all others of the catalog, except ``missing``.

    Raises:
        ConfigError: none remains.
    """
    if not recipe.left_out:
        return dict(options)
    given = options.get("corruptions") or [name for name in corruption_names() if name != "missing"]
    remaining = [name for name in given if name not in recipe.left_out]
    if not remaining:
        raise ConfigError(WHO, expected="a corruption that remains for training", got=f"all of {', '.join(given)}")
    return {**options, "corruptions": remaining}


def check_tested(recipe: Recipe, source: data.Dataset) -> None:
    """Checks that each corruption fits a modality of the data set.

    Raises:
        ConfigError: an unknown corruption, or one that fits none.
    """
    if not tested_corruptions(recipe):
        return
    batch = source.batch("test", torch.tensor([0]), seed=0, epoch=0, train=False)
    kinds = [infer_kind(batch[name]) for name in source.names if isinstance(batch[name], torch.Tensor)]
    fitting = {name for kind in kinds for name in corruption_names(kind)}
    check_corruptions(tested_corruptions(recipe), "recipe")
    for name in tested_corruptions(recipe):
        if name not in fitting:
            raise ConfigError(
                "recipe", expected=f"corruptions that fit the data: {', '.join(sorted(fitting))}", got=name
            )


def corrupted_scores(model: FusionModel, source: data.Dataset, recipe: Recipe) -> dict[str, float]:
    """Returns ``<score>_corrupted/<modality>``: the mean test score with a modality damaged in the ways tested.

    The mean is over severities 1, 3 and 5. Modalities that no corruption fits are omitted.
    """
    if not tested_corruptions(recipe):
        return {}
    statistics = {name: source.noise[name] for name in model.names}
    found = robustness(
        model, lambda: data.loader(source, "test", 256, seed=0, train=False, rank=0, world=1),
        corruptions=tested_corruptions(recipe), severities=TEST_SEVERITIES, statistics=statistics,
    )  # fmt: skip
    score = SCORES[model.task]
    return {
        f"{score}_corrupted/{name}": found.mean(name)
        for name in found.names
        if any(name == damaged for damaged, _, _ in found.scores)
    }


def is_corruption(cls: type) -> bool:
    """Returns whether a balancer corrupts inputs, so that corruptions are left out of it."""
    return issubclass(cls, ModalityCorruption)
