"""Labels of the keys of a foreign fusion, measured by changing the tokens of one modality at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...recording.attention_call import AttentionCall
from ...recording.equipoise_interceptor import intercept_own_layers
from ...recording.huggingface_interceptor import intercept_huggingface
from ...recording.multihead_interceptor import intercept_multihead
from ...recording.recording_session import RecordingSession
from ...recording.token_labels import LabeledKeys, TokenLabeler, label_keys
from ...recording.torch_function_interceptor import intercept_torch_functions
from ...recording.watch_context import InterceptorFactory, open_session
from ...tokens.token_batch import SPECIAL, Tokens

MIXED = "its {} keys depend on several modalities, and no earlier layer has as many"
KeyLabels = dict[int, Tensor | str]
"""Number of keys -> their labels (key,) or (batch, key), or the reason why they are unknown; "" for attention that runs
before the encoders return, and belongs to none of the modalities."""


def interceptors() -> tuple[InterceptorFactory, ...]:
    """Interceptors for every kind of attention."""
    huggingface = (intercept_huggingface,) if "transformers" in sys.modules else ()
    return (intercept_own_layers, intercept_torch_functions, *huggingface, intercept_multihead)


class MeasuredLabels:
    """Labeler of an adapted model: labels that were measured for the running batch.

    Args:
        names: the modalities.
        encoders: id of a module inside an encoder -> its modality.
        active: list in which the labeler is while a session uses it.
    """

    def __init__(self, names: Sequence[str], encoders: Mapping[int, str], active: list[MeasuredLabels]) -> None:
        self.names, self._encoders, self._active = tuple(names), encoders, active
        self.labels: KeyLabels = {}
        self.measuring = False

    @contextmanager
    def activated(self, session: RecordingSession) -> Iterator[None]:
        """An interceptor that keeps the labeler active while a session is open."""
        self._active.append(self)
        try:
            yield
        finally:
            self._active.remove(self)

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        if self.measuring:
            return None
        keys = call.sizes[3] - call.added
        if (name := self._encoders.get(id(module))) is not None:
            index = self.names.index(name)
            return LabeledKeys(torch.full((call.sizes[3],), index), self.names, constant=index, unimodal=True)
        if call.modality is not None and call.names == self.names:
            return label_keys(call, call.modality, self.names)
        labels = self.labels.get(keys, f"the modality of its {keys} keys is unknown")
        if isinstance(labels, str):
            return labels or None
        return label_keys(call, torch.nn.functional.pad(labels, (0, call.added), value=SPECIAL), self.names)


class _KeyReader:
    """Labeler that stores the keys of every call outside of the encoders, and handler that ignores them."""

    replaces_output = False

    def __init__(self, names: Sequence[str], encoders: Mapping[int, str]) -> None:
        self.names, self._encoders = tuple(names), encoders
        self.keys: list[Tensor] = []

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        if id(module) not in self._encoders:
            self.keys.append(call.key[:, :, : call.key.shape[2] - call.added].detach())
        return None

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None: ...
    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Tensor | None: ...
    def on_missing(self, layer: str, reason: str) -> None: ...


def measure_key_labels(
    model: nn.Module, fuse: Callable[[Mapping[str, Tokens]], Any], tokens: Mapping[str, Tokens],
    encoders: Mapping[int, str],
) -> KeyLabels:  # fmt: skip
    """Finds which keys change with the tokens of which modality.

    The fusion runs once with the tokens, and once with the tokens of each modality changed. In the first layer a key
    depends on the tokens of one modality, or of none if it is a class token or a position. Later layers mix tokens;
    their keys have the labels of the first layer with as many keys.

    Args:
        model: the adapted module.
        fuse: runs the fusion on tokens.
        tokens: tokens of the batch.
        encoders: id of a module inside an encoder -> its modality.
    """
    names = tuple(tokens)
    clean = _keys(model, fuse, tokens, encoders)
    changed = [
        _keys(model, fuse, {**tokens, name: _changed(tokens[name], index)}, encoders)
        for index, name in enumerate(names)
        if len(tokens[name])
    ]
    nonempty = [index for index, name in enumerate(names) if len(tokens[name])]
    result: KeyLabels = {}
    for call, keys in enumerate(clean):
        if any(len(other) != len(clean) or other[call].shape != keys.shape for other in changed):
            result.setdefault(keys.shape[2], "its keys depend on the values of the tokens")
            continue
        depends = torch.stack([(other[call] != keys).flatten(3).any(dim=3).any(dim=1) for other in changed], dim=-1)
        count = keys.shape[2]
        if bool((depends.sum(dim=-1) > 1).any()):
            result[count] = _first(result.get(count), MIXED.format(count))
            continue
        order = torch.tensor([*nonempty, SPECIAL], device=keys.device)
        labels = order[torch.where(depends.any(dim=-1), depends.int().argmax(dim=-1), len(nonempty))]
        before = result.get(count)
        if not bool(depends.any()):
            result.setdefault(count, "")
            continue
        if before == "":
            before = None
        if isinstance(before, Tensor) and not torch.equal(before, labels):
            result[count] = f"several layers have {count} keys of different modalities"
        elif not isinstance(before, str) or "no earlier layer" not in before:
            result[count] = labels if before is None or isinstance(before, Tensor) else before
    return {count: _shared(labels) if isinstance(labels, Tensor) else labels for count, labels in result.items()}


def _keys(
    model: nn.Module,
    fuse: Callable[[Mapping[str, Tokens]], Any],
    tokens: Mapping[str, Tokens],
    encoders: Mapping[int, str],
) -> list[Tensor]:
    reader: Any = _KeyReader(tuple(tokens), encoders)
    labeler: TokenLabeler = reader
    session: AbstractContextManager[RecordingSession] = open_session(model, labeler, interceptors(), [], reader)
    with session:
        fuse(tokens)
    return reader.keys


def _changed(tokens: Tokens, index: int) -> Tokens:
    """The tokens with other values of the same scale."""
    generator = torch.Generator().manual_seed(index)
    values = tokens.values
    noise = torch.randn(values.shape, generator=generator).to(values)
    scale = values.detach().float().std().to(values.dtype) if values.numel() > 1 else torch.ones_like(values[0, 0, 0])
    return Tokens(values + noise * scale.clamp(min=1e-3), mask=tokens.mask, times=tokens.times, cls=tokens.cls)


def _first(before: Tensor | str | None, reason: str) -> Tensor | str:
    """Returns the labels of an earlier layer, or the reason why there are none."""
    return reason if before is None or (isinstance(before, str) and before == "") else before


def _shared(labels: Tensor) -> Tensor:
    """(key,) labels if all samples have the same."""
    return labels[0] if bool((labels == labels[:1]).all()) else labels
