"""How an attention's keys are reached: before they are cached, and before the model's attention function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class KeyAlignmentHook(Protocol):
    """Who aligns keys and attends to them."""

    def align(self, frame: HookFrame, key: Tensor, value: Tensor) -> Tensor: ...

    def attend(
        self, frame: HookFrame, function: Callable[..., Any], backend: str | None, given: tuple, kwargs: dict
    ) -> Any: ...


class HookFrame:
    """One attention that is running: the ways by which its keys pass, open only for as long."""

    def __init__(self, moda: KeyAlignmentHook, module: nn.Module, path: str, cache: Any) -> None:
        self.moda, self.module, self.path, self.cache, self.attended = moda, module, path, cache, False
        self._ways = ExitStack()

    def open(self) -> None:
        self._ways.enter_context(_functions(self))
        if self.cache is not None:
            self._ways.enter_context(_updates(self))

    def close(self) -> None:
        self._ways.close()


@contextmanager
def _updates(frame: HookFrame) -> Iterator[None]:
    """Keys are aligned before they are cached, so that no step of decoding has to do it again."""
    cache = frame.cache
    original, own = cache.update, vars(cache).get("update")

    def update(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(frame.moda.align(frame, key, value), value, *args, **kwargs)

    cache.update = update
    try:
        yield
    finally:
        if own is None:
            del cache.update
        else:
            cache.update = own


@contextmanager
def _functions(frame: HookFrame) -> Iterator[None]:
    """Outside of whoever watches the attention interface, who then sees aligned keys."""
    from transformers import AttentionInterface

    before = {name: AttentionInterface.__dict__.get(name) for name in ("__getitem__", "get_interface")}
    item, asked = AttentionInterface.__getitem__, getattr(AttentionInterface, "get_interface", None)

    def around(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
        if getattr(function, "aligned_by", None) is frame:
            return function

        def attend(*given: Any, **kwargs: Any) -> Any:
            if not given or given[0] is not frame.module:
                return function(*given, **kwargs)
            return frame.moda.attend(frame, function, backend, given, kwargs)

        attend.aligned_by = frame  # type: ignore[attr-defined]
        return attend

    try:
        AttentionInterface.__getitem__ = lambda self, key: around(item(self, key), key)  # type: ignore[method-assign]
        if asked is not None:
            AttentionInterface.get_interface = lambda self, name, default: around(asked(self, name, default), name)  # type: ignore[method-assign]
        yield
    finally:
        for name, method in before.items():
            if method is not None:
                setattr(AttentionInterface, name, method)
            elif name in AttentionInterface.__dict__:
                delattr(AttentionInterface, name)
