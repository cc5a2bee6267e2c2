"""``FeatureCache``: reuses the output of an image or audio encoder when the same media are asked about again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...recording.shared_patches import wrapped

METHODS = ("get_image_features", "get_audio_features")
"""Methods by which models of transformers encode media in their forward pass."""
SIZE = 4
"""Number of encoder outputs that are kept: of the question itself, of a blank and of another question's media."""


class EncodedMedia(NamedTuple):
    """An output of an encoder, its arguments, and the version counters of its tensors, which in-place changes raise."""

    arguments: Any
    output: Any
    versions: list[Any]


class FeatureCache:
    """Keeps the last outputs of a model's encoders while questions are asked.

    An output is reused only if all arguments are equal, element by element, and neither was changed in place since.
    When a condition could reuse an output for the first time, the encoder runs all the same, and outputs are reused
    under this condition only if the new one is equal, since a condition may also change the encoder's attention.
    Nothing is reused in ``torch.inference_mode``, where tensors have no version counters.

    Args:
        model: the model in evaluation mode; its inner modules call their own method in the forward pass.

    Attributes:
        encoders: further modules whose output is reused.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.encoders: tuple[nn.Module, ...] = ()
        self._kept: list[EncodedMedia] = []
        self._trusted: dict[str, bool] = {}
        self._condition = ""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keeps outputs while the block runs."""
        with ExitStack() as stack:
            for encoder in self.encoders:
                stack.enter_context(wrapped(encoder, "forward", self._encode))
            for part in self._model.modules():
                for name in METHODS:
                    # The outermost method only calls that of the inner model.
                    if hasattr(type(part), name) and not any(hasattr(type(child), name) for child in part.children()):
                        stack.enter_context(wrapped(part, name, self._encode))
            try:
                yield
            finally:
                self._kept.clear()

    @contextmanager
    def reused(self, condition: str) -> Iterator[None]:
        """Reuses outputs under a condition while the block runs; under "" and elsewhere they are only kept."""
        outer, self._condition = self._condition, condition
        try:
            yield
        finally:
            self._condition = outer

    def _encode(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        condition, arguments = self._condition, (inner, args, kwargs)
        place = next((n for n, one in enumerate(self._kept) if _equal(one.arguments, arguments)), None)
        kept = None if place is None else self._kept.pop(place)
        if kept is not None and kept.versions != _versions((kept.arguments, kept.output)):
            kept = None
        if kept is None or not condition or not self._trusted.get(condition, False):
            output = inner(*args, **kwargs)
            if kept is not None and condition:
                self._trusted.setdefault(condition, _equal(kept.output, output))
            if kept is None and self._trusted.get(condition, True):
                kept = EncodedMedia(arguments, output, _versions((arguments, output)))
            if kept is not None:
                self._kept = [*self._kept[1 - SIZE :], kept]
            return output
        self._kept.append(kept)
        return kept.output


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return (
            isinstance(first, Tensor) and isinstance(second, Tensor) and first.dtype == second.dtype
            and first.device == second.device and torch.equal(first, second)
        )  # fmt: skip
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_equal(value, second[name]) for name, value in first.items())
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return type(first) is type(second) and bool(first == second)


def _versions(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        # An object equals nothing but itself.
        return [object() if value.is_inference() else value._version]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [version for part in parts for version in _versions(part)]
