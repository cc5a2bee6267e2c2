"""Calls of an adapted model: which argument holds the input of each modality."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ...errors import ConfigError, ShapeError

Form = Literal["dict", "keywords", "positions", "function"]
TARGETS = ("labels", "label", "targets", "y")
"""Keys under which other libraries have the target of a batch."""
Convert = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class ModelCall:
    """The arguments of one call, and the named inputs among them.

    Attributes:
        args, kwargs: arguments of the model.
        places: modality -> (kind of argument, its key or position).
        inputs: modality -> input, together with ``mask`` and ``target`` if the batch has them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: dict[str, tuple[str, Any]]
    inputs: dict[str, Any]

    @property
    def target(self) -> Any:
        return self.inputs.get("target")

    @property
    def batch_size(self) -> int | None:
        sizes = [len(value) for name, value in self.inputs.items() if name in self.places and isinstance(value, Tensor)]
        return sizes[0] if sizes else None

    def with_inputs(self, batch: Mapping[str, Any]) -> ModelCall:
        """Returns the call with the inputs of a changed batch."""
        args, kwargs, inputs = list(self.args), dict(self.kwargs), {**self.inputs, **batch}
        for name, (kind, key) in self.places.items():
            if inputs[name] is self.inputs[name]:
                continue
            if kind == "keyword":
                kwargs[key] = inputs[name]
            elif kind == "position":
                args[key] = inputs[name]
            else:
                args[0] = {**args[0], key: inputs[name]}
        return replace(self, args=tuple(args), kwargs=kwargs, inputs=inputs)


class CallForm:
    """Converts a batch to the arguments of a model, according to the signature of its ``forward``.

    Args:
        model: the model.
        names: the modalities.
        inputs: modality -> name of its argument or its key in the batch; or a function from a batch to a dict of
            keyword arguments or a tuple of arguments.

    Raises:
        ConfigError: the arguments of the modalities cannot be inferred from the signature.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], inputs: Mapping[str, str] | Convert | None) -> None:
        self.names = tuple(names)
        self.convert: Convert | None = None if inputs is None or isinstance(inputs, Mapping) else inputs
        mapping = inputs if isinstance(inputs, Mapping) else {}
        unknown = [name for name in mapping if name not in self.names]
        if unknown:
            raise ConfigError(
                "adapt inputs", expected=f"names of {', '.join(self.names)}", got=repr(unknown[0]),
                fix="Map each modality to the name of its argument: inputs={'image': 'pixel_values'}.",
            )  # fmt: skip
        self.keys = {name: mapping.get(name, name) for name in self.names}
        parameters = inspect.signature(_forward_of(model)).parameters.values()
        self.parameters = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        self.any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.form = self._find(type(model).__name__, list(parameters))

    def _find(self, who: str, parameters: list[inspect.Parameter]) -> Form:
        if self.convert is not None:
            return "function"
        plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = [p for p in plain if p.default is p.empty]
        if all(key in self.parameters for key in self.keys.values()):
            return "keywords"
        if len(required) == 1 or (not required and len(plain) == 1):
            return "dict"
        if len(required) == len(self.names):
            return "positions"
        if self.any_keyword:
            return "keywords"
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return "positions"
        raise ConfigError(
            "adapt", expected=f"a forward with arguments for {', '.join(self.names)}, or with one dict",
            got=f"{who}.forward({', '.join(self.parameters)})",
            fix="Name the arguments: inputs={'audio': 'waveform', ...}; or pass a function that returns the "
                "arguments for "
            "a batch: inputs=lambda batch: (batch['audio'], batch['image']). watch and RollingQ work without adapt.",
        )  # fmt: skip

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        """Finds the inputs in the arguments of a call: a batch alone, or the model's own arguments."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            return self._of_batch(args[0])
        bound = dict(zip(self.parameters, range(len(args)), strict=False))
        places: dict[str, tuple[str, Any]] = {}
        inputs: dict[str, Any] = {}
        for index, name in enumerate(self.names):
            key = self.keys[name]
            if key in kwargs:
                places[name], inputs[name] = ("keyword", key), kwargs[key]
            elif key in bound:
                places[name], inputs[name] = ("position", bound[key]), args[bound[key]]
            elif self.form == "positions" and index < len(args):
                places[name], inputs[name] = ("position", index), args[index]
        return ModelCall(args, kwargs, places, inputs)

    def _of_batch(self, batch: Mapping[str, Any]) -> ModelCall:
        values = {name: batch[key] for name in self.names if (key := self._key(name, batch)) is not None}
        inputs = {**values, **{key: batch[key] for key in ("mask", "target") if key in batch}}
        if self.form == "dict":
            places = {name: ("dict", self.keys[name]) for name in values}
            passed = {
                **{k: v for k, v in batch.items() if k not in self.names},
                **{self.keys[n]: values[n] for n in values},
            }
            return ModelCall((passed,), {}, places, inputs)
        self._need(values, batch)
        if self.form == "positions":
            places = {name: ("position", index) for index, name in enumerate(self.names)}
            return ModelCall(tuple(values[name] for name in self.names), {}, places, inputs)
        if self.form == "keywords":
            skipped = {*self.names, *self.keys.values(), "target", "mask"}
            others = {
                key: value for key, value in batch.items()
                if key not in skipped and (key in self.parameters or (self.any_keyword and key not in TARGETS))
            }  # fmt: skip
            others |= {key: batch[key] for key in ("target", "mask") if key in batch and key in self.parameters}
            places = {name: ("keyword", self.keys[name]) for name in self.names}
            return ModelCall((), {**{self.keys[n]: values[n] for n in self.names}, **others}, places, inputs)
        assert self.convert is not None
        return self._converted(self.convert(batch), inputs)

    def _converted(self, arguments: Any, inputs: dict[str, Any]) -> ModelCall:
        args, kwargs = ((), dict(arguments)) if isinstance(arguments, Mapping) else (tuple(arguments), {})
        places: dict[str, tuple[str, Any]] = {}
        for name in self.names:
            for kind, entries in (("keyword", kwargs.items()), ("position", enumerate(args))):
                for key, value in entries:
                    if value is inputs.get(name):
                        places[name] = (kind, key)
        return ModelCall(args, kwargs, places, inputs)

    def _key(self, name: str, batch: Mapping[str, Any]) -> str | None:
        return next((key for key in (name, self.keys[name]) if key in batch), None)

    def _need(self, values: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        absent = [name for name in self.names if name not in values]
        if absent:
            raise ShapeError(
                f"AdaptedModel '{absent[0]}'", expected=f"a batch with {', '.join(self.keys.values())}",
                got=f"a batch with {', '.join(map(str, batch)) or 'nothing'}",
                fix="Name the entries of the batch in adapt(inputs={...}).",
            )  # fmt: skip

    def named_batch(self, batch: Any) -> Mapping[str, Any]:
        """Returns a batch of any loader as a dict with the modalities' names and ``target``.

        Tuples contain the modalities in order, and optionally the target.
        """
        if isinstance(batch, Mapping):
            names = {key: name for name, key in self.keys.items() if key in batch}
            result: dict[str, Any] = {str(names.get(key, key)): value for key, value in batch.items()}
            target = next((key for key in TARGETS if key in batch), "")
            return result if "target" in result or not target else {**result, "target": batch[target]}
        parts = _flat(batch) if isinstance(batch, list | tuple) else []
        if len(parts) not in (len(self.names), len(self.names) + 1):
            got = f"{len(parts)} parts" if parts else type(batch).__name__
            raise ShapeError(
                "AdaptedModel", expected=f"a dict, or a tuple ({', '.join(self.names)}, target)", got=got,
                fix="Convert the batches of the loader to dicts: modality -> input.",
            )  # fmt: skip
        return dict(zip((*self.names, "target"), parts, strict=False))


def _flat(batch: Any) -> list[Any]:
    return [part for each in batch for part in (_flat(each) if isinstance(each, list | tuple) else [each])]


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    """The ``forward`` of the model inside wrappers that take any arguments: compiled, data parallel, PEFT."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(model, name, None), nn.Module) and len(list(model.children())) == 1:
            return _forward_of(inner)
    base: Any = getattr(model, "get_base_model", None)
    if base is not None:
        return base().forward
    return model.forward
