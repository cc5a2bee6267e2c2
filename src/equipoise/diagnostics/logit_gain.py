"""PAI: adds to the attention logits of a modality a multiple of their absolute values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..recording import AttentionCall, LabeledKeys
from ..recording.token_labels import recorded_rows
from .attention_changes import ModalityCallChange
from .interventions import Intervention, Labels, checked_intervention
from .logit_offsets import add_to_scores


@dataclass(frozen=True)
class LogitGain(ModalityCallChange):
    """The change of ``pai``: s_ij + alpha |s_ij| for the keys j of a modality and the last query i."""

    alpha: float
    name: str
    queries: str | Tensor = "last"

    def changed(self, call: AttentionCall, known: LabeledKeys) -> AttentionCall | str | None:
        batch, _, rows, keys = call.sizes
        members = known.keys.cpu().expand(batch, keys) == known.names.index(self.name)
        if not bool(members.any()) or self.alpha == 0:
            return None
        if known.constant is not None or call.attention is not None or call.softcap is not None:
            return "its keys have one modality, or its scores are capped or not known"
        chosen = recorded_rows(self.queries, call, known)
        if chosen is None or isinstance(chosen, str):
            return chosen
        weight = chosen.by_query(rows)
        exact = torch.promote_types(call.query.dtype, torch.float32)
        group = call.query.shape[1] // call.key.shape[1]
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        key = call.key.to(exact).repeat_interleave(group, dim=1)
        scores = scale * call.query.to(exact) @ key.transpose(-1, -2)
        active = (weight > 0)[:, None, :, None] & members.to(weight.device)[:, None, None]
        return add_to_scores(call, self.alpha * scores.abs() * active.to(scores))


@contextmanager
def pai(
    model: nn.Module, alpha: float = 0.5, name: str = "image", *, layers: Sequence[str] | str | None = None,
    queries: str = "last", modality: Labels | None = None, names: Sequence[str] | None = None,
) -> Iterator[Intervention]:  # fmt: skip
    """Adds alpha |s| to the attention logits s of all keys of a modality inside the block.

    A' = softmax(s + alpha |s|) for the last query, which predicts the next token, also in every step of ``generate``.

    Args:
        model: as in ``steer``.
        alpha: factor; 0 changes nothing.
        name: the modality.
        layers, modality, names: as in ``steer``; the paper changes all layers after the first ones.
        queries: queries whose attention is changed, as in ``watch``.

    Yields:
        Intervention; its ``changed`` and ``missing`` list the layers.

    Raises:
        ConfigError: an unknown modality, an alpha that is no finite number, or no attention could be changed.

    The scores of the changed layers are materialized. Unlike the constant offset of ``steer``, the resulting share
    depends on the size of the logits.

    Reference: Liu et al., "Paying More Attention to Image" (ECCV 2024), Eq. 4.
    Differs from the paper in: attention alone; its logits of the text without the image are those of
    ``ContrastiveDecoding`` with inputs without an image.

    Example:
        >>> layer = nn.MultiheadAttention(8, 1, batch_first=True).eval()
        >>> with torch.no_grad():
        ...     _ = layer.in_proj_weight.copy_(torch.eye(8).repeat(3, 1)), layer.out_proj.weight.copy_(torch.eye(8))
        >>> tokens, labels = torch.full((1, 3, 8), 0.5), torch.tensor([0, 1, 1])
        >>> values = labels[None, :, None].expand(1, 3, 8).float()      # the output is the share of the image
        >>> with torch.no_grad(), pai(layer, alpha=0.5, modality=labels, names=("text", "image")) as change:
        ...     output, _ = layer(tokens, tokens, values, need_weights=False)
        >>> round(float(output[0, -1, 0]), 4), change.changed
        (0.7401, ('MultiheadAttention',))
    """
    if not math.isfinite(alpha):
        raise ConfigError("pai", expected="a finite alpha", got=str(alpha))
    change = Intervention("pai", LogitGain(float(alpha), name, queries))  # type: ignore[arg-type]
    change.is_effective = alpha != 0
    with checked_intervention(model, change, modality, names, layers) as intervention:
        yield intervention
