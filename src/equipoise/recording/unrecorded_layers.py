"""Finds layers that mix tokens without attention that ``watch`` can intercept."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as registry

from .attention_call import AttentionCall
from .encoder_submodules import unimodal_encoders
from .recording_session import AttentionHandler, RecordingSession
from .token_labels import LabeledKeys, TokenLabeler

ATTENTION = re.compile(r"(Attention|Attn|MHA)(\dd|Layer|Block|Module|Fusion|Pool(\dd|ing|er)?)?$")
RECURRENT = re.compile(
    r"(Mamba\d?(Mixer|Layer)|FalconH1Mixer|BambaMixer|GatedDeltaNet\w*|DeltaNet|DeltaAttention|Rwkv\w*Attention|"
    r"Retention|Linear(Self)?Attention|LightningAttention|Short(Conv|Convolution)|RecurrentBlock|Rglru|Hyena\w*|"
    r"FourierTransform|[ms]LSTM(Layer|Block|Cell))$"
)
"""Linear attention, state-space layers, gated recurrences and convolutions over tokens."""
WITHOUT = "a layer without attention: it mixes tokens by a recurrence or a convolution, which has no attention weights"
HIDDEN = (
    "it ran, but no attention was intercepted: no softmax over scores of queries and keys, no attention function of "
    "torch, and no call of Hugging Face's attention interface"
)


class TrackingLabeler:
    """Labeler that also collects the modules whose attention was intercepted.

    Args:
        labeler: labeler that returns the labels.
    """

    def __init__(self, labeler: TokenLabeler) -> None:
        self._labeler = labeler
        self.names = labeler.names
        self.modules: set[int] = set()

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        self.modules.add(id(module))
        return self._labeler.labeled(call, module)


@contextmanager
def find_unrecorded_layers(
    session: RecordingSession, labeler: TrackingLabeler, handler: AttentionHandler, layers: Sequence[str] | None
) -> Iterator[None]:
    """Reports layers that mixed tokens in the block without intercepted attention to the handler."""
    encoders = unimodal_encoders(session.model)
    modules = {name: part for name, part in session.model.named_modules() if _mixes(part) and id(part) not in encoders}
    candidates = {
        id(part): name
        for name, part in modules.items()
        if not any(other != name and _holds(name, other) for other in modules)
    }
    ran: dict[int, None] = {}

    def on_forward(module: nn.Module, args: object, output: object) -> None:
        if id(module) in candidates and session.in_recorded_thread():
            ran[id(module)] = None

    handle = registry.register_module_forward_hook(on_forward)
    try:
        yield
    finally:
        handle.remove()
    paths = [session.names[module] for module in labeler.modules if module in session.names]
    for module in ran:
        # Recorded layers are named without the wrappers of torch.compile.
        path = session.names.get(module, candidates[module])
        selected = layers is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in layers)
        if selected and not any(_holds(path, other) or _holds(other, path) for other in paths):
            part = session.model.get_submodule(candidates[module])
            handler.on_missing(path or type(part).__name__, WITHOUT if is_recurrent(part) else HIDDEN)


def _mixes(part: nn.Module) -> bool:
    return bool(ATTENTION.search(type(part).__name__)) or is_recurrent(part)


def is_recurrent(part: nn.Module) -> bool:
    return bool(RECURRENT.search(type(part).__name__))


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")
