"""Describes a model as JSON, and builds it from the description, without importing or running what it names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...balance import RollingQ
from ...encoders import Backbone
from ...errors import ConfigError, SchemaError
from ...io.recorded_options import RecordedOptions
from ...io.typed_values import shorten_repr

WHO = "from_pretrained"
DEPTH = 20


def describe(value: Any) -> Any:
    """Returns a JSON description of an option or module; ``{"given": type}`` for what only code can build."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [describe(part) for part in value]}
    if isinstance(value, Mapping | nn.ModuleDict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: describe(part) for name, part in value.items()}}
    if type(value) is nn.Linear:
        options = {"in_features": value.in_features, "out_features": value.out_features, "bias": value.bias is not None}
        return {"class": "Linear", "options": options}
    if isinstance(value, RecordedOptions) and known_classes().get(type(value).__name__) is type(value):
        return {"class": type(value).__name__, "options": {n: describe(v) for n, v in live_options(value).items()}}
    return {"given": type(value).__name__}


def live_options(module: RecordedOptions) -> dict[str, Any]:
    """Returns the arguments with which a module was created, with the present submodules."""
    options = module.recorded_options()
    # The weights are saved, so that those it started from are not needed.
    options.pop("pretrained", None)
    for name, value in options.items():
        if isinstance(value, nn.Module | Mapping):
            present = getattr(module, name, None)
            options[name] = present if isinstance(present, nn.Module) else value
    return options


def describe_rotations(model: nn.Module) -> dict[str, Any]:
    """Returns name of the layer -> options of each RollingQ in a model, whose rotation is part of the weights."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for rolling in [module for module in model.modules() if isinstance(module, RollingQ)]:
        options = rolling.recorded_options()
        layer = names[id(options.pop("layer"))]
        found[layer] = {name: describe(value) for name, value in options.items()}
    return found


def add_rotations(model: nn.Module, rotations: Any) -> None:
    """Attaches the RollingQ of ``describe_rotations``."""
    for path, options in _mapping(rotations, "rotations").items():
        decoded = {name: build(value, {}, "") for name, value in _mapping(options, "rotations").items()}
        _call(RollingQ, {"layer": _submodule(model, path), **decoded})


def known_classes() -> dict[str, type[Any]]:
    """Returns name -> class of the modules of this package that a description can name."""
    classes: dict[str, type[Any]] = {"Linear": nn.Linear}
    waiting: list[type[Any]] = [RecordedOptions]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        # A Backbone reads a folder or the Hub.
        if cls.__module__.startswith("equipoise.") and not inspect.isabstract(cls) and not issubclass(cls, Backbone):
            classes.setdefault(cls.__name__, cls)
    return classes


def build(value: Any, given: Mapping[str, nn.Module], path: str, depth: int = 0) -> Any:
    """Builds what ``describe`` described.

    Args:
        value: the description.
        given: path -> module, such as ``"encoders.audio"``; replaces the description.
        path: path of the value.
        depth: nesting depth.

    Raises:
        ConfigError: a module that is not described and not given. SchemaError: an invalid description.
    """
    if path in given:
        return given[path]
    if depth > DEPTH:
        raise SchemaError(WHO, expected=f"a description nested at most {DEPTH} deep", got="a deeper one")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    content = _mapping(value, path)
    kind = next(iter(content), None)
    if kind in ("tuple", "list") and isinstance(content[kind], list):
        parts = [build(part, given, f"{path}.{place}", depth + 1) for place, part in enumerate(content[kind])]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "dict":
        return {
            n: build(v, given, f"{path}.{n}".strip("."), depth + 1) for n, v in _mapping(content[kind], path).items()
        }
    if kind == "class":
        known = known_classes()
        if content["class"] not in known:
            raise SchemaError(
                WHO, expected="modules of this version of equipoise", got=shorten_repr(content["class"]),
                fix="Load it with the version that saved it.",
            )  # fmt: skip
        options = {
            name: build(part, given, f"{path}.{name}".strip("."), depth + 1)
            for name, part in _mapping(content.get("options"), path).items()
        }
        return _call(known[content["class"]], options)
    if kind == "given":
        *before, last = path.split(".")
        example = f"{before[0]}={{'{last}': module}}" if before else f"{last}=module"
        raise ConfigError(
            WHO, expected=f"the module '{path}' of the type {shorten_repr(content['given'])}, which only your code "
                          f"can build",
            got="none", fix=f"Pass it: from_pretrained(..., {example}).",
        )  # fmt: skip
    raise SchemaError(WHO, expected="a description of a model", got=shorten_repr(value))


def _call(cls: type[Any], options: dict[str, Any]) -> Any:
    try:
        return cls(**options)
    except Exception as error:
        got = f"{cls.__name__} with {shorten_repr(str(error))}"
        raise SchemaError(WHO, expected="options with which the model can be built", got=got) from error


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(WHO, expected=f"a mapping under '{path}'", got=shorten_repr(value))
    return value


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SchemaError(WHO, expected="a rotation of a layer of the model", got=shorten_repr(path)) from error
