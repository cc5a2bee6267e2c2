"""VAR: moves attention from sink tokens to the other tokens of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError
from ..recording import AttentionCall, LabeledKeys
from ..recording.attention_call import KeyOffsets
from ..recording.share_measurement import measure_share
from .attention_changes import ModalityCallChange
from .interventions import Intervention, Labels, checked_intervention
from .logit_offsets import add_offsets

SINK, IMAGE, OTHER = range(3)


@dataclass(frozen=True)
class SinkBudget(ModalityCallChange):
    """The change of ``redistribute_sinks``."""

    sinks: tuple[int, ...]
    fraction: float
    least: float
    name: str

    def changed(self, call: AttentionCall, known: LabeledKeys) -> AttentionCall | str | None:
        batch, _, _, keys = call.sizes
        image = known.keys.cpu().expand(batch, keys) == known.names.index(self.name)
        sink = torch.zeros(keys, dtype=torch.bool)
        sink[[index for index in self.sinks if index < keys]] = True
        labels = torch.where(sink, SINK, torch.where(image, IMAGE, OTHER))
        if not bool((labels == IMAGE).any()) or not bool(sink.any()):
            return None
        share = measure_share(call, labels, 3).share
        # Of the attention to the image, the part that is not on sinks selects the heads.
        visual_sinks = measure_share(call, torch.where(sink & image, 0, -1), 1).share[..., 0]
        visual = share[..., IMAGE]
        chosen = (visual > 0) & (visual >= self.least * (visual + visual_sinks))
        moved = self.fraction * share[..., SINK]
        tiny = torch.finfo(share.dtype).tiny
        gain = torch.log1p(moved / visual.clamp(min=tiny))
        loss = torch.full_like(gain, self.fraction).neg().log1p()
        values = torch.stack([loss, gain], dim=-1) * chosen[..., None]
        members = torch.stack([labels == SINK, labels == IMAGE], dim=1).to(call.query.device)
        return add_offsets(call, KeyOffsets(members, values))


@contextmanager
def redistribute_sinks(
    model: nn.Module, sinks: Sequence[int], *, fraction: float = 0.6, least: float = 0.8, name: str = "image",
    layers: Sequence[str] | str | None = None, modality: Labels | None = None, names: Sequence[str] | None = None,
) -> Iterator[Intervention]:  # fmt: skip
    """Moves a fraction of the attention on sink tokens to the other tokens of the image inside the block.

    With S = sum of A_ij over the sinks and V = sum over the image's other keys, A'_ij = (1 - fraction) A_ij for sinks
    and A'_ij = A_ij (1 + fraction S / V) for the image's other keys; all other weights stay. Heads and queries are
    changed where V is at least ``least`` times the attention on the whole image.

    Args:
        model: as in ``steer``.
        sinks: positions of the sink tokens, as ``look`` lists them.
        fraction: part of their attention that is moved, between 0 and 1.
        least: smallest part of the attention to the image that is not on sinks.
        name: the modality that gains attention.
        layers, modality, names: as in ``steer``.

    Yields:
        Intervention; its ``changed`` and ``missing`` list the layers.

    Raises:
        ConfigError: no sinks, a fraction or part out of range, or no attention could be changed.

    Reference: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (ICLR 2025).
    Differs from the paper in: sinks are given, instead of found by the size of some hidden dimensions; heads are
    selected for each query.

    Example:
        >>> import torch
        >>> layer = nn.MultiheadAttention(8, 1, batch_first=True).eval()
        >>> with torch.no_grad():
        ...     _ = layer.in_proj_weight.copy_(torch.eye(8).repeat(3, 1)), layer.out_proj.weight.copy_(torch.eye(8))
        >>> tokens, labels = torch.ones(1, 4, 8), torch.tensor([0, 1, 1, 1])
        >>> values = labels[None, :, None].expand(1, 4, 8).float()      # the output is the share of the image
        >>> with torch.no_grad(), redistribute_sinks(layer, sinks=[0], modality=labels, names=("text", "image")):
        ...     output, _ = layer(tokens, tokens, values, need_weights=False)
        >>> round(float(output[0, -1, 0]), 4)                           # 0.75 before
        0.9
    """
    if not sinks or min(sinks) < 0 or not 0 < fraction < 1 or not 0 <= least <= 1:
        raise ConfigError(
            "redistribute_sinks", expected="positions from 0, 0 < fraction < 1 and 0 <= least <= 1",
            got=f"sinks = {list(sinks)}, fraction = {fraction}, least = {least}",
        )  # fmt: skip
    change = Intervention("redistribute_sinks", SinkBudget(tuple(sinks), fraction, least, name))  # type: ignore[arg-type]
    with checked_intervention(model, change, modality, names, layers) as intervention:
        yield intervention
