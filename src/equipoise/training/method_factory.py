"""Builds the model and balancers that a method name such as ``joint+rollingq`` denotes in a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import balance, encoders, fusion
from ..balance import Balancer, ProgressiveRollingQ, RollingQ
from ..encoders import Encoder
from ..errors import ConfigError, ShapeError, unknown_name
from ..fusion import Fusion, Unimodal
from ..fusion.readout_attention import ReadoutFusion
from ..io.class_registry import available_classes, get_class, instantiate
from ..io.typed_values import matches_type, shorten_repr
from ..models.fusion_model import FusionModel
from ..models.self_contained import SelfContainedModel
from ..reliability import Reliability
from ..reliability.damaged_validation import check_calibration_corruptions
from ..reliability.training_distance import PROTOTYPES
from ..reliability.wrapper_options import check_prototypes
from ..results.task_metrics import select_metrics
from .left_out import check_tested, is_corruption, without_left_out
from .recipes import Recipe
from .variant_factory import build_self_contained, variant_options

if TYPE_CHECKING:
    from ..data import Dataset


RELIABILITY = "reliability"
"""Part of a method name that wraps the trained model in ``eq.Reliability``."""


@dataclass(frozen=True)
class Method:
    """A fusion or a single modality, with balancers: ``name = base + "+" + "+".join(balancers)``.

    With ``reliable``, "+reliability" follows: the model is trained as without it, and wrapped after training.
    """

    base: str
    balancers: tuple[str, ...] = ()
    reliable: bool = field(default=False, repr=False)

    @property
    def name(self) -> str:
        return "+".join((self.base, *self.balancers, *([RELIABILITY] if self.reliable else [])))


def parse_method(name: str, recipe: Recipe) -> Method:
    """Parses a method name and checks every part of it.

    Raises:
        ConfigError: a part is unknown; the message lists the closest names.

    Example:
        >>> recipe = Recipe(data={"name": "digits"}, encoders={"audio": {}, "image": {}})
        >>> parse_method("joint+rollingq", recipe)
        Method(base='joint', balancers=('rollingq',))
        >>> parse_method("qmf", recipe).name
        'concat+qmf'
    """
    base, *added = (part.strip() for part in name.split("+"))
    if recipe.model:
        return Method(variant_options(name, recipe))
    # A method with a head of its own, such as qmf, stands for a fusion and itself.
    if base not in recipe.fusions and (implied := _implied_fusion(base, recipe)):
        base, added = implied, [base, *added]
    bases = {*recipe.encoders, *recipe.fusions, *(set(available_classes(fusion, Fusion)) - {"unimodal"})}  # type: ignore[type-abstract]
    if base not in bases:
        complete = {key for key, cls in available_classes(balance, Balancer).items() if cls.fusion_in_recipes}
        raise unknown_name(f"method '{name}'", "fusion or modality", base, bases | complete)
    balancers = {*recipe.balancers, *available_classes(balance, Balancer), RELIABILITY}
    for part in added:
        if part not in balancers:
            raise unknown_name(f"method '{name}'", "balancer", part, balancers)
    if len(set(added)) != len(added):
        raise ConfigError(f"method '{name}'", expected="each balancer once", got=name)
    return Method(base, tuple(part for part in added if part != RELIABILITY), RELIABILITY in added)


def method_recipe(method: Method, recipe: Recipe) -> Recipe:
    """Returns the recipe with the encoder and training options of the variant applied."""
    if not recipe.model and (added := recipe.fusions.get(method.base, {}).get("encoders")):
        if not isinstance(added, dict) or not all(isinstance(options, dict) for options in added.values()):
            raise ConfigError(
                f"fusion '{method.base}'", expected="a mapping of modalities to options under encoders", got=str(added)
            )
        for name in added:
            if name not in recipe.encoders:
                raise unknown_name(f"fusion '{method.base}'", "encoder", str(name), recipe.encoders)
        recipe = replace(
            recipe, encoders={name: {**options, **added.get(name, {})} for name, options in recipe.encoders.items()}
        )
    changes = (recipe.variants if recipe.model else recipe.fusions).get(method.base, {}).get("train") or {}
    if not isinstance(changes, dict):
        kind = "variant" if recipe.model else "fusion"
        raise ConfigError(f"{kind} '{method.base}'", expected="a mapping under train", got=str(changes))
    return recipe.with_train(**changes) if changes else recipe


def build_model(
    method: Method, recipe: Recipe, dataset: Dataset, *, teachers: Mapping[str, nn.Module] | None = None
) -> tuple[FusionModel | SelfContainedModel, list[Balancer]]:
    """Builds the model of a method, with its balancers attached.

    Weights are initialized from the global RNG: seed it first.

    The model of a method with ``+reliability`` is the one to train; see ``wrap_reliability``.

    Args:
        method, recipe, dataset: method to build, and the recipe and data that define it.
        teachers: modality -> trained encoder, for balancers with ``needs_teachers``.

    Raises:
        ConfigError: unknown option, modality that the data set lacks, metric of another task, or encoder that does not
            fit the data.
        ShapeError: encoders of different widths.
    """
    recipe = method_recipe(method, recipe)
    for name in (*recipe.encoders, *([recipe.noise_modality] if recipe.noise_modality else [])):
        if name not in dataset.names:
            raise unknown_name("recipe", f"modality of the data set '{recipe.data['name']}'", name, dataset.names)
    if recipe.model:
        parts = {name: build_encoder(name, options, dataset) for name, options in recipe.encoders.items()}
        return build_self_contained(method.base, recipe, dataset, parts), []
    check_tested(recipe, dataset)
    # Checked before training rather than by the evaluation after the last epoch.
    select_metrics(recipe.metrics, dataset.task, "recipe: metrics")
    alone = method.base in recipe.encoders
    names = (method.base,) if alone else dataset.names
    parts = {name: build_encoder(name, recipe.encoders.get(name, {}), dataset) for name in names}
    width = parts[names[0]].dim
    for name, part in parts.items():
        if part.dim != width:
            raise ShapeError(
                f"encoder '{name}'", got=f"dim = {part.dim}",
                expected=f"the width of encoder '{names[0]}', dim = {width}",
                fix=f"Give both the same dim under encoders, such as {width}.",
            )  # fmt: skip
    options = dict(recipe.fusions.get(method.base, {}))
    options.pop("train", None)
    options.pop("encoders", None)
    cls: type[Fusion] = Unimodal
    if not alone:
        cls = get_class(fusion, Fusion, options.pop("fusion", method.base), kind="fusion")  # type: ignore[type-abstract]
    joined = instantiate(cls, f"fusion '{method.base}'", options, dim=width)
    classes = {name: _class(name, recipe) for name in method.balancers}
    heads = recipe.train.unimodal
    if heads != "ensemble" and any(cls.needs_heads for cls in classes.values()):
        heads = "train"
    model = FusionModel(
        parts,
        joined,
        dataset.num_outputs,
        task=dataset.task,  # type: ignore[arg-type]
        unimodal=heads,  # type: ignore[arg-type]
    )
    if method.reliable:
        # A wrong option is an error before training.
        wrap_reliability(model, method, recipe)
    arguments = {
        "model": model, "epochs": recipe.train.epochs, "teachers": teachers or {},
        "samples": len(dataset.split("train")),
    }  # fmt: skip
    return model, [_balancer(name, cls, recipe, arguments, method) for name, cls in classes.items()]


def wrap_reliability(model: FusionModel, method: Method, recipe: Recipe) -> Reliability:
    """Returns the wrapper of a method with ``+reliability``, before it is fitted.

    Its options are those of the recipe under ``balancers: {reliability: ...}``: ``distance``, ``form`` and
    ``alpha``, and those of ``Reliability.fit``, ``corruptions``, ``kinds`` and ``prototypes``.

    Raises:
        ConfigError: unknown option or value.
    """
    who = f"method '{method.name}'"
    options = without_left_out(recipe.balancers.get(RELIABILITY, {}), recipe)
    corruptions = options.pop("corruptions", None)
    if not isinstance(corruptions, list | None):
        raise ConfigError(who, expected="a list of corruptions for reliability", got=repr(corruptions))
    check_calibration_corruptions(corruptions)
    check_prototypes(options.pop("prototypes", PROTOTYPES), who)
    if not matches_type(options.pop("kinds", {}), dict[str, str]):
        raise ConfigError(who, expected="kinds of reliability as modality -> kind", got=shorten_repr(recipe.balancers))
    return instantiate(Reliability, who, options, model=model)


def fit_reliability(model: FusionModel, method: Method, recipe: Recipe, train: Any, val: Any, seed: int) -> Reliability:
    """Fits the wrapper of a method with ``+reliability`` on batches of training and validation data."""
    options = without_left_out(recipe.balancers.get(RELIABILITY, {}), recipe)
    return instantiate(
        Reliability.fit, f"method '{method.name}'", options, model=model, train=train, val=val, seed=seed
    )


def needs_teachers(method: Method, recipe: Recipe) -> bool:
    """Returns whether a balancer of the method needs encoders that were trained alone before."""
    return any(_class(name, recipe).needs_teachers for name in method.balancers)


def build_encoder(name: str, options: dict[str, Any], dataset: Dataset) -> Encoder:
    """Builds the encoder of a modality; sizes are taken from the data set."""
    shape, words = dataset.shapes[name], dataset.vocabulary.get(name)
    options, encoder_classes = dict(options), available_classes(encoders, Encoder)
    vector = "VectorEncoder" if words is None else "TextEncoder"
    usual = {3: "PatchEncoder", 1: vector}.get(len(shape), "SequenceEncoder")
    class_name = options.pop("name", None) or usual
    if not isinstance(class_name, str) or class_name not in encoder_classes:
        raise unknown_name(f"encoder '{name}'", "encoder", shorten_repr(class_name), encoder_classes)
    follows = _sizes(encoder_classes[class_name], shape, words)
    if follows is None:
        able = [
            f"{other} for {cls.reads}"
            for other, cls in encoder_classes.items()
            if _sizes(cls, shape, words) is not None
        ]
        kind = "" if words is None else f", ids below {words}"
        raise ConfigError(
            f"encoder '{name}'",
            got=f"{class_name} for samples of shape {shape}{kind}",
            expected=f"samples of shape {encoder_classes[class_name].reads}"
            + (f", or {' or '.join(able)}" if able else ""),
        )
    if encoder_classes[class_name] is not encoders.Backbone or words is None:
        return instantiate(encoder_classes[class_name], f"encoder '{name}'", {**follows, **options})
    # Data sets reserve 0 for padding.
    encoder = instantiate(encoders.Backbone, f"encoder '{name}'", {**follows, "shift": 1, **options})
    known_ids = getattr(encoder.model.config, "vocab_size", None)
    if isinstance(known_ids, int) and words - encoder.shift > known_ids:
        raise ConfigError(
            f"encoder '{name}'",
            expected=f"ids of the model's {known_ids:,} tokens",
            got=f"{words - encoder.shift:,} tokens",
            fix=f"Give the folder of the model's own tokenizer: --data.modalities.{name}.tokenizer FOLDER.",
        )
    return encoder


def _sizes(cls: type[Encoder], shape: tuple[int, ...], words: int | None) -> dict[str, Any] | None:
    """Returns the constructor arguments of an encoder for samples of a shape, ids if ``words``; None if it has none."""
    sizes = cls.for_data(shape)
    if sizes is None or cls.takes_ids not in (None, words is not None):
        return None
    return {**sizes, "vocabulary": words} if cls.takes_ids else sizes


def _implied_fusion(name: str, recipe: Recipe) -> str | None:
    """Returns the fusion that a balancer's name alone stands for; None for other names."""
    if name in recipe.encoders or name not in {*recipe.balancers, *available_classes(balance, Balancer)}:
        return None
    return _class(name, recipe).fusion_in_recipes


def _class(name: str, recipe: Recipe) -> type[Balancer]:
    class_name = recipe.balancers.get(name, {}).get("balancer", name)
    return get_class(balance, Balancer, class_name, kind="balancer")


def _balancer(name: str, cls: type[Balancer], recipe: Recipe, arguments: Mapping[str, Any], method: Method) -> Balancer:
    """Builds a balancer with those of model, layer, fusion, epochs, teachers and samples that its class accepts."""
    options = dict(recipe.balancers.get(name, {}))
    options.pop("balancer", None)
    if is_corruption(cls):
        options = without_left_out(options, recipe)
    model = arguments["model"]
    who = f"method '{method.name}'"
    if len(model.names) < 2:
        raise ConfigError(
            who, expected="a fusion of two or more modalities", got=f"{method.base}, which has one",
            fix="BalancerList needs something to balance; choose a fusion, such as concat or joint.",
        )  # fmt: skip
    if issubclass(cls, RollingQ):
        layer = getattr(model.fusion, "attention", None)
        if layer is None:
            raise ConfigError(
                who,
                expected="a fusion whose attention sees two or more modalities",
                got=method.base,
                fix=f"Set readout: attention for {method.base} in the recipe's fusions, or choose one such as joint."
                if isinstance(model.fusion, ReadoutFusion)
                else "RollingQ rotates attention; choose a fusion that has it, such as joint.",
            )
        return instantiate(cls, who, options, layer=layer)
    if issubclass(cls, ProgressiveRollingQ):
        if not hasattr(model.fusion, "use_depth"):
            raise ConfigError(
                who, expected="a fusion that can be trained in stages", got=method.base,
                fix="Choose joint, with depth: 2 or more in the recipe's fusions.",
            )  # fmt: skip
        return instantiate(cls, who, options, takes=RollingQ, fusion=model.fusion, epochs=arguments["epochs"])
    taken = inspect.signature(cls).parameters
    return instantiate(
        cls, who, options, **{key: value for key, value in arguments.items() if key in taken and key not in options}
    )
