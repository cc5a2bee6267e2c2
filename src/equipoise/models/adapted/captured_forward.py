"""Forward passes of a foreign model whose intermediate values are captured by hooks, or whose encoders are replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torch import nn

from .model_call import ModelCall


class Captured:
    """Values of one forward pass.

    Attributes:
        returned: the value that the model returned; None if the pass was stopped.
        encoders: modality -> output of its encoder.
        features, head_output: input and output of the head; None without a head, or if it did not run.
        heads: modality -> output of the model's own unimodal head.
    """

    def __init__(self) -> None:
        self.returned: Any = None
        self.encoders: dict[str, Any] = {}
        self.features: Any = None
        self.head_output: Any = None
        self.heads: dict[str, Any] = {}


class _Stop(Exception):
    """Raised when all encoders have run."""


def run_captured(
    model: nn.Module, call: ModelCall, encoders: Mapping[str, nn.Module], head: nn.Module | None,
    heads: Mapping[str, nn.Module], *, replaced: Mapping[str, Any] | None = None, encoders_only: bool = False,
) -> Captured:  # fmt: skip
    """Calls the model and captures what balancers and diagnostics need; hooks are removed afterward.

    Args:
        model: the model.
        call: its arguments.
        encoders: modality -> module whose output is captured.
        head: module whose input is captured.
        heads: modality -> unimodal head inside the model.
        replaced: modality -> output that its encoder returns without running.
        encoders_only: stops when every encoder has run.
    """
    result = Captured()

    def on_encoder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            result.encoders[name] = output
            if encoders_only and len(result.encoders) == len(encoders):
                raise _Stop

        return hook

    def on_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        result.features = args[0] if args else next(iter(kwargs.values()), None)

    def on_logits(module: nn.Module, args: Any, output: Any) -> None:
        result.head_output = output

    def on_unimodal(name: str) -> Callable[..., None]:
        return lambda module, args, output: result.heads.update({name: output})

    with ExitStack() as stack:
        for name, module in encoders.items():
            if replaced is not None and name in replaced:
                stack.enter_context(_Returning(module, replaced[name]))
            stack.callback(module.register_forward_hook(on_encoder(name)).remove)
        if head is not None:
            stack.callback(head.register_forward_pre_hook(on_head, with_kwargs=True).remove)
            stack.callback(head.register_forward_hook(on_logits).remove)
        for name, module in heads.items():
            stack.callback(module.register_forward_hook(on_unimodal(name)).remove)
        with suppress(_Stop):
            result.returned = model(*call.args, **call.kwargs)
    return result


class _Returning:
    """Lets a module return a value without running, inside the block."""

    def __init__(self, module: nn.Module, value: Any) -> None:
        self.module, self.value = module, value

    def __enter__(self) -> None:
        self.before = vars(self.module).get("forward")
        vars(self.module)["forward"] = lambda *args, **kwargs: self.value

    def __exit__(self, *error: object) -> None:
        if self.before is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.before
