"""Finds the ``Output`` of a forward pass from the value that the model returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...tokens.token_batch import Output

LOGITS = ("logits", "output", "outputs", "prediction", "predictions", "out", "pred", "y_hat", "scores")


class OutputMemory:
    """Stores outputs of forward passes as long as the logits that the model returned exist.

    The last one is kept longer, since data-parallel wrappers return new tensors with the same memory. A copy is empty.
    """

    def __init__(self) -> None:
        self._outputs: Any = WeakTensorKeyDictionary()
        self._last: tuple[int, Output] | None = None

    def __reduce__(self):
        return type(self), ()

    def store(self, logits: Tensor, output: Output) -> None:
        # Without the logits, which would keep the entry itself alive.
        output = output.with_(logits=None)
        self._outputs[logits] = output
        self._last = (logits.data_ptr(), output)

    def find(self, logits: Tensor) -> Output | None:
        output = self._outputs.get(logits)
        if output is None and self._last is not None and self._last[0] == logits.data_ptr():
            output = self._last[1]
        if output is not None and self._last is not None and self._last[1] is output:
            self._last = None
        return output


def find_logits(returned: Any) -> Tensor | None:
    """Returns the logits in what a model returned.

    They are a tensor, a field or key such as ``logits``, or the first tensor (batch, output) of a tuple or dict.
    """
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping):
        logits: Any = next((returned[key] for key in LOGITS if isinstance(returned.get(key), Tensor)), None)
        parts: Any = returned.values()
    else:
        logits = next((v for key in LOGITS if isinstance(v := getattr(returned, key, None), Tensor)), None)
        parts = returned if isinstance(returned, list | tuple) else ()
    if logits is not None:
        return logits
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    return next((part for part in tensors if part.ndim == 2), next((p for p in tensors if p.ndim > 0), None))
