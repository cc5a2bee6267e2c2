"""Models whose attention does not run in Python: compiled ones run uncompiled, others are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .shared_patches import held, wrapped


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager in which modules compiled by ``torch.compile`` run uncompiled.

    The setting applies to the whole process, so other threads run uncompiled code during the block as well. Compiled
    code is not discarded.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            _enter(stack)
        else:
            # Importing dynamo takes seconds, and nothing can be compiled yet.
            def compiles(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                result = inner(*args, **kwargs)
                _enter(stack)
                return result

            stack.enter_context(wrapped(torch, "compile", compiles))
        yield


def _enter(stack: ExitStack) -> None:
    from torch._dynamo.eval_frame import OptimizedModule

    stack.enter_context(held("stance", _force_eager))
    stack.enter_context(wrapped(OptimizedModule, "__call__", _call))


def _force_eager() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def _call(inner: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Its own `__call__` warns that hooks on all modules fire once more for it, which does no harm here.
    return nn.Module.__call__(module, *args, **kwargs)


def check_open(model: nn.Module) -> None:
    """Raises:
    ConfigError: a model, or a part of one, whose attention no hook can reach.
    """
    for name, part in model.named_modules():
        if (reason := _closed(part)) is not None:
            where = f"'{name}', " if name else ""
            raise ConfigError(
                "watch", expected="a model whose attention runs in Python", got=f"{where}{reason[0]}", fix=reason[1]
            )


def _closed(part: nn.Module) -> tuple[str, str] | None:
    """Why nothing inside a module can be seen, and what to watch in its place."""
    forward = part.__dict__.get("forward")
    if isinstance(part, torch.jit.ScriptModule) or isinstance(
        forward, (torch.jit.ScriptFunction, torch._C.ScriptMethod)
    ):
        return "a scripted one", "Watch the model that was scripted or traced."
    if isinstance(part, torch.fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in part.graph.nodes
    ):
        return "an exported graph of operators", "Watch the model that was exported."
    if getattr(forward, "__module__", None) == "torch.cuda.graphs":
        return "one whose forward replays a CUDA graph", "Watch the model before torch.cuda.make_graphed_callables."
    if isinstance(part, nn.DataParallel) and len(part.device_ids) > 1:
        return "nn.DataParallel over several devices, which runs copies of the model", "Watch the model inside: .module"
    return None
