"""Context managers that change the attention of any model: hide a modality, or average attention with QUAG."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..recording import AttentionCall, LabeledKeys, RecordingSession, labels_for, open_session
from .attention_changes import AttentionChange, MaskModality, QuagAveraging
from .quag_operators import ClsRows, operators

Labels = Int[Tensor, " key"] | Int[Tensor, "batch key"]
AnyIntervention = TypeVar("AnyIntervention", bound="Intervention")


class Intervention:
    """A change of attention inside a block, and the layers where it was applied.

    Args:
        who: name of the public function, for error messages.
        change: the change of each attention call.
    """

    replaces_output = True
    is_effective = True
    """Whether the change differs from none."""

    def __init__(self, who: str, change: AttentionChange) -> None:
        self.who, self._change = who, change
        self._changed: dict[str, None] = {}
        self._unknown: dict[str, str] = {}
        self._unable: dict[str, str] = {}
        self.met, self._towers = False, False
        """``met``: whether there was any attention over known modalities."""

    @property
    def changed(self) -> tuple[str, ...]:
        """Layers whose output was changed, in calling order."""
        return tuple(self._changed)

    @property
    def missing(self) -> dict[str, str]:
        """layer -> reason why at least some of its calls could not be changed."""
        return self._unable | self._unknown

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Tensor | None:
        # Unimodal encoders are not changed: they have no attention to another modality.
        if known.unimodal:
            self._towers = True
            return None
        self.check(known.names)
        self.met = True
        # Do not intercept the attention that is computed here.
        with torch._C.DisableTorchFunction():
            output = self._output(layer, call, known)
        if isinstance(output, str):
            self._unable.setdefault(layer, output)
            return None
        if output is not None:
            self._changed[layer] = None
        return output

    def _output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Tensor | str | None:
        return self._change.output(call, known)

    def on_missing(self, layer: str, reason: str) -> None:
        self._unknown.setdefault(layer, reason)

    def check(self, names: Sequence[str]) -> None:
        self._change.check(names, self.who)

    def nothing(self, *, ran: bool) -> ConfigError:
        """The error for a block in which no attention was changed."""
        if not ran:
            got, fix = "a model that was not called", "Call the model inside the block."
        elif self._unable:
            got, fix = (
                first_reason(self._unable),
                "Use an operator that does not depend on the modality of the queries: 'avg-<name>' or 'all'.",
            )
        elif self.met:
            got, fix = "none", "Check that the batch contains the modality and that tokens of a modality are queries."
        elif self._unknown:
            got, fix = first_reason(self._unknown), "Give one label for each key: modality=labels, names=names."
        elif self._towers:
            got, fix = (
                "unimodal encoders only",
                "They do not attend to several modalities; remove the input of the modality instead.",
            )
        else:
            got = "no attention whose keys have known modalities"
            fix = "Static fusions have no attention; models of other libraries need modality=, a label for each key."
        return ConfigError(self.who, expected=f"attention {self._change.what}", got=got, fix=fix)

    def partly(self) -> str:
        """A warning about layers that were changed in only some of their calls; "" without any."""
        partial = {site: reason for site, reason in self.missing.items() if site in self._changed}
        return f"{self.who} changed only some of the calls of {first_reason(partial)}." if partial else ""


def first_reason(reasons: dict[str, str]) -> str:
    site, reason = next(iter(reasons.items()))
    more = f" ({len(reasons) - 1} more layers)" if len(reasons) > 1 else ""
    return f"'{site}', but {reason}{more}"


@contextmanager
def without_modality(
    model: nn.Module, name: str | Collection[str], *, modality: Labels | None = None, names: Sequence[str] | None = None
) -> Iterator[Intervention]:  # fmt: skip
    """Masks the keys of a modality in every attention layer inside the block.

    The softmax is taken over the remaining keys wherever the labels of the keys are known; positions do not change. The
    output of a query without any visible key is 0. Unimodal encoders are not changed.

    Args:
        model: a FusionModel, a Hugging Face model, or any module with ``modality``; in evaluation mode, since attention
            dropout is not applied. ``generate`` is supported, with its cache.
        name: one or more names of modalities.
        modality, names: labels of the keys, as in ``watch``.

    Yields:
        Intervention; its ``changed`` and ``missing`` list the layers where it was and was not applied.

    Raises:
        ConfigError: an unknown modality; a model inside another such block; no attention was changed in the block.

    For a model trained without missing modalities the masked input is out of distribution. ``watch`` and
    ``Output.share`` still report the attention that the model itself computes.

    Reference: RollingQ (ICML 2025), Table 8.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> tokens = torch.zeros(5, 3, 8)
        >>> with without_modality(layer, "image", modality=torch.tensor([0, 0, 1]), names=("audio", "image")) as change:
        ...     _ = layer(tokens, tokens, tokens)
        >>> change.changed
        ('MultiheadAttention',)
    """
    change = MaskModality((name,) if isinstance(name, str) else tuple(name))
    with checked_intervention(model, Intervention("without_modality", change), modality, names) as intervention:
        yield intervention


@contextmanager
def with_quag(
    model: nn.Module, operator: str, *, modality: Labels | None = None, names: Sequence[str] | None = None,
    cls_rows: ClsRows = "keys",
) -> Iterator[Intervention]:  # fmt: skip
    """Averages attention inside quadrants (modality of the query, modality of the key) inside the block.

    Within a quadrant all visible keys of a query receive the same attention, with an unchanged sum: the share of the
    modality stays the same, but its tokens are no longer distinguished. This is applied to every head of every
    attention layer with known labels.

    Args:
        model, modality, names: as in ``without_modality``.
        operator: "unimodal", "crossmodal", "avg-<name>" or "all"; ``quag.operators`` lists their quadrants.
        cls_rows: treatment of queries that are class or other special tokens: ``"keys"`` averages them for operators
            that do not depend on the query ("avg-..." and "all"), ``"skip"`` never, ``"all"`` for every operator.

    Yields:
        Intervention; its ``changed`` and ``missing`` list the layers where it was and was not applied.
        If the modality of the queries is unknown, only operators that do not depend on it are applied.

    Raises:
        ConfigError: an unknown operator or cls_rows; a model inside another such block; no attention was changed in
            the block, for example "unimodal" if only a class token attends.

    Reference: RollingQ (ICML 2025), Table 9.
    Differs from the paper in: any number of modalities and any model; the attention matrix is not materialized.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> tokens = torch.zeros(5, 3, 8)
        >>> with with_quag(layer, "avg-audio", modality=torch.tensor([0, 0, 1]), names=("audio", "image")) as change:
        ...     _ = layer(tokens, tokens, tokens)
        >>> change.changed
        ('MultiheadAttention',)
    """
    operators((), cls_rows=cls_rows)
    with checked_intervention(
        model, Intervention("with_quag", QuagAveraging(operator, cls_rows)), modality, names
    ) as intervention:
        yield intervention


@contextmanager
def checked_intervention(
    model: nn.Module, intervention: AnyIntervention, modality: Labels | None, names: Sequence[str] | None,
    layers: Sequence[str] | str | None = None,
) -> Iterator[AnyIntervention]:  # fmt: skip
    """Applies an intervention inside the block; raises ConfigError if nothing was changed."""
    with apply_intervention(model, intervention, modality=modality, names=names, layers=layers) as session:
        yield intervention
    if not intervention.changed and intervention.is_effective:
        raise intervention.nothing(ran=session.called > 0)
    if reason := intervention.partly():
        warnings.warn(reason, stacklevel=5)


@contextmanager
def apply_intervention(
    model: nn.Module, intervention: Intervention, *, modality: Labels | None = None, names: Sequence[str] | None = None,
    layers: Sequence[str] | str | None = None,
) -> Iterator[RecordingSession]:  # fmt: skip
    """Applies an intervention inside the block, without an error if nothing was changed.

    Raises:
        ConfigError: the intervention does not apply to these modalities, or the model is already inside such a block.
    """
    labeler, ways, follow = labels_for(model, modality, names)
    if labeler.names:
        intervention.check(labeler.names)
    parts = set(model.modules())
    for root, other in _CHANGED:
        if root in parts or model in set(root.modules()):
            raise ConfigError(
                intervention.who,
                expected="a model without another active intervention",
                got=f"one inside a block of {other}",
                fix="The inner block would override the outer one. Hide several modalities in one block: "
                "name=('audio', 'image').",
            )
    entry = (model, intervention.who)
    _CHANGED.append(entry)
    try:
        with open_session(model, labeler, ways, follow, intervention, layers) as session:
            yield session
    finally:
        # Blocks in several threads may end in any order.
        _CHANGED.remove(entry)


_CHANGED: list[tuple[nn.Module, str]] = []
"""Models with an active intervention, and the function that started it."""
