"""``ConfirmedLabels``: labels keys without tracing for inputs of a kind that was traced once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn


class ConfirmedLabels:
    """Skips the tracing of a Hugging Face model's tensors for kinds of inputs whose labels were confirmed.

    ``watch`` and the interventions label keys by the inputs, such as the placeholder tokens of an image, and trace all
    operations of the model to check these labels. Tracing takes a fixed time for each operation, most of the cost of
    recording a small model. In a block of ``repeated``, the first pass over inputs of a kind is traced. If all labels
    agree with the traced origins, and all attention runs through transformers' attention interface or
    ``nn.MultiheadAttention``, later passes over inputs of the same kind use the labels of their inputs without tracing.

    Args:
        model: the model that is recorded.

    When it misleads: a model that treats inputs of the same kind differently, for example one that drops image tokens
    of some samples, is checked only on the first of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._confirmed: dict[Hashable, bool] = {}
        self._cache: dict[str, Any] = {}

    @contextmanager
    def repeated(self, kind: Hashable) -> Iterator[None]:
        """Runs the sessions of the block without tracing if the labels of this kind of inputs were confirmed.

        Args:
            kind: what the inputs have in common: their names, types and sizes except the length of the text.
        """
        block = LabelBlock(self._model, self.is_confirmed(kind), self._cache)
        token = _BLOCK.set(block)
        try:
            yield
        finally:
            _BLOCK.reset(token)
        if kind not in self._confirmed and block.sessions:
            self._confirmed[kind] = all(
                getattr(labeler, "confirmed", False) and session.untraced for labeler, session in block.sessions
            )

    def is_confirmed(self, kind: Hashable) -> bool:
        """Whether later passes over inputs of this kind run without tracing."""
        return self._confirmed.get(kind, False)


class LabelBlock:
    """A block of ``ConfirmedLabels.repeated``.

    Args:
        model: the model that is recorded.
        confirmed: whether sessions skip tracing.
        cache: what the blocks of a model share, since it is not changed between them.

    Attributes:
        sessions: labelers and sessions that were opened in the block.
    """

    def __init__(self, model: nn.Module, confirmed: bool, cache: dict[str, Any]) -> None:
        self.model, self.confirmed, self._cache = model, confirmed, cache
        self.sessions: list[tuple[Any, Any]] = []

    def shared(self, name: str, create: Callable[[], Any]) -> Any:
        """Returns a value that is created once for all blocks of the model."""
        if name not in self._cache:
            self._cache[name] = create()
        return self._cache[name]


def label_block(model: nn.Module) -> LabelBlock | None:
    """Returns the block of ``ConfirmedLabels.repeated`` that is active for a model."""
    block = _BLOCK.get()
    return block if block is not None and block.model is model else None


def shared_in_block(model: nn.Module, name: str, create: Callable[[], Any]) -> Any:
    """Returns a value that depends only on the modules of a model; inside blocks it is created once."""
    block = label_block(model)
    return create() if block is None else block.shared(name, create)


_BLOCK: ContextVar[LabelBlock | None] = ContextVar("equipoise_label_block", default=None)
