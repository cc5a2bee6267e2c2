"""``steer``: raises or lowers the attention of any model to a modality."""

from __future__ import annotations

import fnmatch
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..recording import AttentionCall, LabeledKeys, labels_for
from ..recording.attention_call import KeyOffsets
from ..recording.share_measurement import attention_output
from ..recording.token_labels import check_queries, recorded_rows
from .interventions import Intervention, Labels, checked_intervention, first_reason
from .logit_offsets import ROUNDING, add_offsets, offsets_for_shares

LARGEST = 1000.0
"""Largest absolute value of an offset."""

Heads = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LogitOffsets:
    """Offsets that ``steer`` adds to the attention logits.

    Attributes:
        beta: modality -> number added to the logits of its keys.
        share: modality -> share of attention; either this or ``beta``.
        heads: indices of the steered heads, or {pattern of layer names: indices}; None for all.
        queries: queries whose attention is steered, as in ``watch``.
    """

    beta: Mapping[str, float]
    share: Mapping[str, float]
    heads: Heads | None = None
    queries: str | Tensor = "all"

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.beta, *self.share)

    @property
    def what(self) -> str:
        return f"to several modalities, with keys of {' or '.join(repr(name) for name in self.names)}"

    @property
    def changes(self) -> bool:
        """Whether any number differs from 0."""
        return bool(self.share) or any(value != 0 for value in self.beta.values())

    def check(self, names: Sequence[str], who: str) -> None:
        for name in self.names:
            if name not in names:
                raise unknown_name(who, "modality", name, names)

    def changed(self, layer: str, call: AttentionCall, known: LabeledKeys) -> AttentionCall | str | None:
        """Returns the steered attention, the reason why it cannot be steered, or None if there is nothing to change."""
        members = self._members(call, known)
        if not bool(members.any()):
            return None
        if known.constant is not None and call.sinks is None:
            return (
                f"all of its keys are {known.names[known.constant]}, and softmax does not change if the same number is "
                "added to all logits"
            )
        selected = self._selected(layer, call, known)
        if selected is None or isinstance(selected, str):
            return selected
        exact = torch.promote_types(call.query.dtype, torch.float32)
        if self.share:
            offsets = offsets_for_shares(call, members, torch.tensor([*self.share.values()], dtype=exact))
        else:
            values = torch.tensor([*self.beta.values()], dtype=exact, device=call.query.device)
            offsets = KeyOffsets(members, values[None, None, None])
        return add_offsets(call, offsets._replace(values=offsets.values * selected[..., None].to(exact)))

    def _members(self, call: AttentionCall, known: LabeledKeys) -> Bool[Tensor, "batch group key"]:
        batch, _, _, keys = call.sizes
        indices = torch.tensor([known.names.index(name) for name in self.names])
        hot = known.keys.cpu().expand(batch, keys)[:, None] == indices[:, None]
        return hot.to(call.query.device)

    def _selected(
        self, layer: str, call: AttentionCall, known: LabeledKeys
    ) -> Bool[Tensor, "#batch #head #query"] | str | None:
        _, heads, rows, _ = call.sizes
        device = call.query.device
        selected = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        if (indices := heads_of(self.heads, layer)) is not None:
            if any(not 0 <= index < heads for index in indices):
                raise ConfigError(
                    "steer heads", expected=f"indices from 0 to {heads - 1}, as '{layer}' has {heads} heads",
                    got=str(list(indices)),
                )  # fmt: skip
            if not indices:
                return None
            selected = torch.zeros(1, heads, 1, dtype=torch.bool, device=device)
            selected[:, list(indices)] = True
        if isinstance(self.queries, str) and self.queries == "all":
            return selected
        chosen = recorded_rows(self.queries, call, known)
        if chosen is None or isinstance(chosen, str):
            return chosen
        return selected & (chosen.by_query(rows) > 0)[:, None]


class Steering(Intervention):
    """Attention that is steered inside a block of ``steer``; ``changed`` and ``missing`` list the layers."""

    def __init__(self, offsets: LogitOffsets) -> None:
        super().__init__("steer", offsets)  # type: ignore[arg-type]
        self.offsets, self.is_effective = offsets, offsets.changes
        self.changed_call: AttentionCall | None = None
        """The last steered attention, which ``watch`` records."""

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Tensor | None:
        self.changed_call = None
        return super().replace_output(layer, call, known) if self.is_effective else None

    def _output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Tensor | str | None:
        changed = self.offsets.changed(layer, call, known)
        if changed is None or isinstance(changed, str):
            return changed
        self.changed_call = changed
        return attention_output(changed) if changed.attention is None else changed.attention

    def nothing(self, *, ran: bool) -> ConfigError:
        if not ran or not self._unable:
            return super().nothing(ran=ran)
        return ConfigError(
            "steer", expected=f"attention {self.offsets.what}", got=first_reason(self._unable),
            fix="A modality gains attention only from other keys of the same attention; without_modality hides it.",
        )  # fmt: skip


@contextmanager
def steer(
    model: nn.Module,
    *,
    share: Mapping[str, float] | None = None,
    layers: Sequence[str] | str | None = None,
    heads: Heads | None = None,
    queries: str | Bool[Tensor, "batch query"] = "all",
    modality: Labels | None = None,
    names: Sequence[str] | None = None,
    **beta: float,
) -> Iterator[Steering]:
    """Adds a number to the attention logits of all keys of a modality inside the block.

    share'_m = share_m exp(beta_m) / sum_n share_n exp(beta_n) and output = sum_m share'_m output_m for each query and
    head, where output_m is the attention over the keys of m alone. ``image=1.5`` multiplies the odds of the image by
    e^1.5; ``share={"image": 0.5}`` chooses beta for each query and head so that the image receives half of the
    attention. The attention matrix is not materialized unless the model itself does so.

    Args:
        model: a FusionModel, a Hugging Face model, or any module with ``modality``; in evaluation mode, since attention
            dropout is not applied. ``generate`` is supported, with its cache.
        share: modality -> share of the attention of each query, between 0 and 1; instead of ``beta``. Other keys keep
            their proportions. Queries that see no key of the modality, or only such keys, are not changed.
        layers: names or patterns (``"*.layers.1?.*"``) of the modules to steer; all by default.
        heads: indices of the heads to steer, or {pattern of layer names: indices}; all by default.
        queries: queries whose attention is steered: ``"all"``, ``"last"``, ``"answer"``, the name of a modality, or a
            boolean mask (batch, query), as in ``watch``.
        modality, names: labels of the keys, as in ``watch``.
        **beta: modality -> number to add to the logits of its keys; negative numbers lower its share. 0 changes
            nothing, bit for bit.

    Yields:
        Steering; its ``changed`` and ``missing`` list the layers that were and were not steered. A ``watch`` around or
        inside the block records the steered attention.

    Raises:
        ConfigError: an unknown modality, layer or head, a number or share out of range, a model inside another such
            block; or no attention could be steered, for example if a cross-attention has keys of a single modality
            only.

    Warns:
        UserWarning: at the end of the block, if only some of the calls of a layer could be steered.

    Layers in unimodal encoders, and layers without attention over known modalities, are not changed. A strongly steered
    model is out of distribution: read the effect as a curve over beta (``dose_response``), not at one value.

    Reference: the logit offset of PAI (ECCV 2024), there alpha |logit|.
    Differs from the paper in: a constant offset, so that shares follow in closed form; any modality, query and layer.

    Example:
        >>> from equipoise import watch
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> tokens, labels = torch.zeros(1, 2, 8), torch.tensor([0, 1])
        >>> with watch(layer, modality=labels, names=("audio", "image")) as record:
        ...     with steer(layer, modality=labels, names=("audio", "image"), share={"image": 0.75}):
        ...         _ = layer(tokens, tokens, tokens)
        >>> record.share("MultiheadAttention")[0, 0]
        tensor([0.2500, 0.7500])
    """
    offsets = LogitOffsets(_checked_beta(beta), _checked_share(share or {}), heads, queries)
    if bool(offsets.beta) == bool(offsets.share):
        raise ConfigError(
            "steer", expected="either numbers to add to the logits or shares",
            got="both" if beta else "neither", fix='Write steer(model, image=1.0) or steer(model, share={"image": '
                                                   '0.5}).',
        )  # fmt: skip
    check_queries(queries, labels_for(model, modality, names)[0].names, "steer")
    if isinstance(heads, Mapping):
        _check_patterns(model, heads)
    with checked_intervention(model, Steering(offsets), modality, names, layers) as steering:
        yield steering


def heads_of(heads: Heads | None, layer: str) -> Sequence[int] | None:
    """Returns the heads to steer in a layer; None for all."""
    if not isinstance(heads, Mapping):
        return heads
    return sorted({index for pattern, some in heads.items() if fnmatch.fnmatchcase(layer, pattern) for index in some})


def _checked_beta(beta: Mapping[str, float]) -> dict[str, float]:
    for name, value in beta.items():
        if not _is_number(value) or not abs(value) <= LARGEST:
            raise ConfigError(
                f"steer {name}", expected=f"a number from {-LARGEST:g} to {LARGEST:g}, added to the logits",
                got=repr(value), fix="Hide a modality by without_modality.",
            )  # fmt: skip
    return {name: float(value) for name, value in beta.items()}


def _checked_share(share: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(share, Mapping):
        raise ConfigError("steer share", expected='{name: share}, such as {"image": 0.5}', got=repr(share))
    for name, value in share.items():
        if not _is_number(value) or not 0 < value < 1:
            raise ConfigError(
                "steer share", expected=f"a share of '{name}' between 0 and 1", got=repr(value),
                fix="Hide a modality by without_modality.",
            )  # fmt: skip
    if sum(share.values()) > 1 + ROUNDING:
        raise ConfigError("steer share", expected="shares with a sum of at most 1", got=f"{sum(share.values()):g}")
    return {name: float(value) for name, value in share.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_patterns(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> None:
    layers = [name or type(model).__name__ for name, _ in model.named_modules()]
    for pattern in heads:
        if not any(fnmatch.fnmatchcase(name, pattern.split("#")[0]) for name in layers):
            raise unknown_name("steer", "module for heads", pattern, {name.split(".")[-1] for name in layers})
