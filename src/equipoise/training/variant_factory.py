"""Builds the variants of a self-contained model from ``model`` and ``variants`` of a recipe."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigError, unknown_name
from ..io.class_registry import available_classes, instantiate
from ..models.self_contained import SelfContainedModel
from .recipes import Recipe

if TYPE_CHECKING:
    from ..data import Dataset

MODEL_PACKAGES = ("dual_encoder", "vision_language", "cross_modal_matcher")
"""Packages of ``equipoise.models`` that define self-contained models."""


def available_variants() -> dict[str, type[SelfContainedModel]]:
    """Returns {name: class} of all self-contained models."""
    variants: dict[str, type[SelfContainedModel]] = {}
    for package in MODEL_PACKAGES:
        module = importlib.import_module(f"..models.{package}", __package__)
        variants |= available_classes(module, SelfContainedModel)  # type: ignore[type-abstract]
    return variants


def evaluation_metric(recipe: Recipe) -> dict[str, Any]:
    """Returns the model, its variants and its main metric, for the protocol in ``results.json``."""
    if not recipe.model:
        return {}
    name, models = str(recipe.model["name"]), available_variants()
    if name not in models:
        raise unknown_name("recipe", "model", name, models)
    return {"model": recipe.model, "variants": recipe.variants, "score": models[name].score}


def named_metrics(recipe: Recipe) -> dict[str, Any]:
    """Returns the metrics that the recipe names, and the main one, for the protocol in ``results.json``."""
    return {"score": recipe.metrics[0], "metrics": recipe.metrics} if recipe.metrics else {}


def variant_options(name: str, recipe: Recipe) -> str:
    """Checks and returns the name of a variant; without variants, the only name is that of the model.

    Raises:
        ConfigError: unknown variant, or a balancer, which requires a fusion.
    """
    if "+" in name:
        raise ConfigError(
            f"method '{name}'", expected="a variant of the recipe's model", got="balancers, which are for fusions",
            fix=f"One of: {', '.join(recipe.variants) or recipe.model['name']}.",
        )  # fmt: skip
    variants = recipe.variants or {str(recipe.model["name"]): {}}
    if name.strip() not in variants:
        raise unknown_name(f"method '{name}'", "variant", name.strip(), variants)
    return name.strip()


def build_self_contained(
    name: str, recipe: Recipe, dataset: Dataset, encoders: Mapping[str, nn.Module]
) -> SelfContainedModel:
    """Builds the model of the recipe in this variant, for this data set.

    Raises:
        ConfigError: unknown model or option, or an unsuitable data set.
    """
    options: dict[str, Any] = {**recipe.model, **recipe.variants.get(name, {})}
    options.pop("train", None)
    wanted, models = str(options.pop("name")), available_variants()
    if wanted not in models:
        raise unknown_name("recipe", "model", wanted, models)
    cls = models[wanted]
    build = cls.for_data
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(build).parameters.values()):
        return instantiate(build, f"variant '{name}'", options, takes=cls, source=dataset, encoders=dict(encoders))
    return instantiate(build, f"variant '{name}'", options, source=dataset, encoders=dict(encoders))
