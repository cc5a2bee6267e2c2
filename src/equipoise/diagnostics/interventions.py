"""Another attention while a block runs: a modality hidden from every query, or averaged by QUAG, in any model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..recording import AttentionCall, LabeledKeys, RecordingSession, labels_for, open_session
from .attention_changes import AttentionChange, MaskModality, QuagAveraging
from .quag_operators import ClsRows, operators

Labels = Int[Tensor, " key"] | Int[Tensor, "batch key"]


class Intervention:
    """What is changed in a model while a block runs, and where.

    Args:
        who: the function that complains.
        change: what is done.
    """

    replaces_output = True

    def __init__(self, who: str, change: AttentionChange) -> None:
        self.who, self._change = who, change
        self._changed: dict[str, None] = {}
        self._unknown: dict[str, str] = {}
        self._unable: dict[str, str] = {}
        self.met, self._towers = False, False
        """Whether there was any attention over known modalities."""

    @property
    def changed(self) -> tuple[str, ...]:
        """Sites whose output is another one, in calling order."""
        return tuple(self._changed)

    @property
    def missing(self) -> dict[str, str]:
        """site -> why it could not be changed, in some of its calls at least."""
        return self._unable | self._unknown

    # What the session tells.

    def on_attention(self, site: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def replace_output(self, site: str, call: AttentionCall, known: LabeledKeys) -> Tensor | None:
        # An encoder of one modality is left to itself: nobody reads another one there.
        if known.unimodal:
            self._towers = True
            return None
        self.check(known.names)
        self.met = True
        # What is computed here is no attention of the model's.
        with torch._C.DisableTorchFunction():
            output = self._change.output(call, known)
        if isinstance(output, str):
            self._unable.setdefault(site, output)
            return None
        if output is not None:
            self._changed[site] = None
        return output

    def on_missing(self, site: str, reason: str) -> None:
        self._unknown.setdefault(site, reason)

    # What the block asks.

    def check(self, names: Sequence[str]) -> None:
        self._change.check(names, self.who)

    def nothing(self, *, ran: bool) -> ConfigError:
        """The error for a block in which nothing was changed."""
        if not ran:
            got, fix = "a model that did not run", "Call the model inside the block."
        elif self._unable:
            got, fix = _first(self._unable), "Choose what does not ask who reads: 'avg-<name>' or 'all'."
        elif self.met:
            got, fix = "none", "Does the batch hold the modality, and are there tokens of any modality that read?"
        elif self._unknown:
            got, fix = _first(self._unknown), "Give one label for every key: modality=labels, names=names."
        elif self._towers:
            got, fix = "encoders of one modality alone", "Nobody reads several modalities there; take away their input."
        else:
            got = "no attention whose keys have known modalities"
            fix = "Static fusions have no attention; models of other libraries need modality=, one label for every key."
        return ConfigError(self.who, expected=f"attention {self._change.what}", got=got, fix=fix)

    def partly(self) -> str:
        """A warning about sites that were changed in some of their calls alone; nothing where there are none."""
        found = {site: reason for site, reason in self.missing.items() if site in self._changed}
        return f"{self.who} changed only a part of the calls of {_first(found)}." if found else ""


def _first(reasons: dict[str, str]) -> str:
    site, reason = next(iter(reasons.items()))
    more = f" ({len(reasons) - 1} others alike)" if len(reasons) > 1 else ""
    return f"'{site}', but {reason}{more}"


@contextmanager
def without_modality(
    model: nn.Module, name: str | Collection[str], *, modality: Labels | None = None, names: Sequence[str] | None = None
) -> Iterator[Intervention]:  # fmt: skip
    """Hides a modality from every query of every attention while the block runs.

    softmax over the other keys alone, wherever the labels of the keys are known: queries read what they would read if
    the tokens were not there, at the positions that they have. A query that then sees nothing gets 0. Encoders of one
    modality are left to themselves.

    Args:
        model: a FusionModel, a Hugging Face model, or any module with ``modality``; in evaluation mode, since attention
            dropout is left out. ``generate`` works, its cache included.
        name: of the modality, or of several.
        modality, names: labels of the keys, as ``watch`` takes them.

    Yields:
        Intervention, whose ``changed`` and ``missing`` say where it acted.

    Raises:
        ConfigError: an unknown modality; a model inside another such block; at the end of the block, nothing changed.

    A model that never saw the modality missing is put before something new. ``watch`` and ``Output.share`` go on to
    tell of the attention that the model itself computes.

    Reference: RollingQ (ICML 2025), Table 8; spec 8.5.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> tokens = torch.zeros(5, 3, 8)
        >>> with without_modality(layer, "image", modality=torch.tensor([0, 0, 1]), names=("audio", "image")) as change:
        ...     _ = layer(tokens, tokens, tokens)
        >>> change.changed
        ('MultiheadAttention',)
    """
    change = MaskModality((name,) if isinstance(name, str) else tuple(name))
    with _complaining(model, Intervention("without_modality", change), modality, names) as made:
        yield made


@contextmanager
def with_quag(
    model: nn.Module, operator: str, *, modality: Labels | None = None, names: Sequence[str] | None = None,
    cls_rows: ClsRows = "keys",
) -> Iterator[Intervention]:  # fmt: skip
    """Averages attention inside quadrants of (modality that reads, modality that is read) while the block runs.

    Within a quadrant every key that a query sees gets the same attention, and their sum stays what it is: the modality
    is read as much as before, but no token of it is told from another. In every attention whose labels are known, in
    every head.

    Args:
        model, modality, names: as in ``without_modality``.
        operator: "unimodal", "crossmodal", "avg-<name>" or "all"; ``quag.operators`` lists their quadrants.
        cls_rows: what class tokens and other special ones do that read: ``"keys"`` take part where everybody does
            ("avg-..." and "all"), ``"skip"`` nowhere, ``"all"`` in all that an operator averages.

    Yields:
        Intervention, whose ``changed`` and ``missing`` say where it acted. Where the modality of the queries is not
        known, only operators act that do not ask for it.

    Raises:
        ConfigError: an unknown operator or cls_rows; a model inside another such block; at the end of the block,
            nothing changed, as by "unimodal" where a class token alone reads.

    Reference: RollingQ (ICML 2025), Table 9; spec 8.6.
    Differs from the paper in: any number of modalities and any model; no attention matrix is built.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> tokens = torch.zeros(5, 3, 8)
        >>> with with_quag(layer, "avg-audio", modality=torch.tensor([0, 0, 1]), names=("audio", "image")) as change:
        ...     _ = layer(tokens, tokens, tokens)
        >>> change.changed
        ('MultiheadAttention',)
    """
    operators((), cls_rows=cls_rows)
    with _complaining(model, Intervention("with_quag", QuagAveraging(operator, cls_rows)), modality, names) as made:
        yield made


@contextmanager
def _complaining(
    model: nn.Module, made: Intervention, modality: Labels | None, names: Sequence[str] | None
) -> Iterator[Intervention]:
    with apply_intervention(model, made, modality=modality, names=names) as session:
        yield made
    if not made.changed:
        raise made.nothing(ran=session.called > 0)
    if found := made.partly():
        warnings.warn(found, stacklevel=5)


@contextmanager
def apply_intervention(
    model: nn.Module, made: Intervention, *, modality: Labels | None = None, names: Sequence[str] | None = None
) -> Iterator[RecordingSession]:
    """The block of an intervention, which may well change nothing.

    Raises:
        ConfigError: what cannot be changed or means nothing; a model that is being changed already.
    """
    labeler, ways, follow = labels_for(model, modality, names)
    if labeler.names:
        made.check(labeler.names)
    parts = set(model.modules())
    for root, other in _CHANGED:
        if root in parts or model in set(root.modules()):
            raise ConfigError(
                made.who, expected="a model that nothing else changes", got=f"one inside a block of {other}",
                fix="The inner block would undo the outer one. Hide several by one: name=('audio', 'image').",
            )  # fmt: skip
    entry = (model, made.who)
    _CHANGED.append(entry)
    try:
        with open_session(model, labeler, ways, follow, made) as session:
            yield session
    finally:
        # Blocks of several threads end in any order.
        _CHANGED.remove(entry)


_CHANGED: list[tuple[nn.Module, str]] = []
"""Models that are changed at this moment, and by whom."""
