"""Hooks that align the keys of an attention layer before caching or before the attention function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class KeyAlignmentHook(Protocol):
    """Object that aligns keys and computes attention with them."""

    def align(self, frame: HookFrame, key: Tensor, value: Tensor) -> Tensor: ...

    def attend(
        self, frame: HookFrame, function: Callable[..., Any], backend: str | None, args: tuple, kwargs: dict
    ) -> Any: ...


class HookFrame:
    """Patches of the cache and of the attention interface while one attention layer runs."""

    def __init__(self, moda: KeyAlignmentHook, module: nn.Module, path: str, cache: Any) -> None:
        self.moda, self.module, self.path, self.cache, self.attended = moda, module, path, cache, False
        self._patches = ExitStack()

    def open(self) -> None:
        self._patches.enter_context(_patch_functions(self))
        if self.cache is not None:
            self._patches.enter_context(_patch_cache(self))

    def close(self) -> None:
        self._patches.close()


@contextmanager
def _patch_cache(frame: HookFrame) -> Iterator[None]:
    """Patches ``cache.update`` to align keys before they are cached, so that each key is aligned once."""
    cache = frame.cache
    original, override = cache.update, vars(cache).get("update")

    def update(key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(frame.moda.align(frame, key, value), value, *args, **kwargs)

    cache.update = update
    try:
        yield
    finally:
        if override is None:
            del cache.update
        else:
            cache.update = override


@contextmanager
def _patch_functions(frame: HookFrame) -> Iterator[None]:
    """Patches the attention interface outside of the patches of ``eq.watch``, which then records aligned keys."""
    from transformers import AttentionInterface

    before = {name: AttentionInterface.__dict__.get(name) for name in ("__getitem__", "get_interface")}
    getitem, get_interface = AttentionInterface.__getitem__, getattr(AttentionInterface, "get_interface", None)

    def aligned(function: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
        if getattr(function, "aligned_by", None) is frame:
            return function

        def attend(*args: Any, **kwargs: Any) -> Any:
            if not args or args[0] is not frame.module:
                return function(*args, **kwargs)
            return frame.moda.attend(frame, function, backend, args, kwargs)

        attend.aligned_by = frame  # type: ignore[attr-defined]
        return attend

    try:
        AttentionInterface.__getitem__ = lambda self, key: aligned(getitem(self, key), key)  # type: ignore[method-assign]
        if get_interface is not None:
            AttentionInterface.get_interface = lambda self, name, default: aligned(
                get_interface(self, name, default), name
            )  # type: ignore[method-assign]
        yield
    finally:
        for name, method in before.items():
            if method is not None:
                setattr(AttentionInterface, name, method)
            elif name in AttentionInterface.__dict__:
                delattr(AttentionInterface, name)
