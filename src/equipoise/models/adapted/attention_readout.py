"""Attention of the last fusion layer of a foreign model, as diagnostics use that of equipoise's readout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...geometry import mean_keys, membership
from ...recording.attention_call import AttentionCall
from ...recording.attention_record import AttentionRecord
from ...recording.token_labels import LabeledKeys
from ...recording.watch_context import InterceptorFactory, open_session
from .key_labels import MeasuredLabels


class AttentionReadout(AttentionRecord):
    """Shares, and the cosine of queries and mean keys, of every recorded layer.

    Args:
        labeler: labels the keys.
        under: name of the module of the fusion; only its layers count. None: all layers outside of the encoders.
    """

    def __init__(self, labeler: MeasuredLabels, under: str | None) -> None:
        super().__init__(labeler, "all")
        self._under = under
        self._cosine: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def recording(self, model: nn.Module, ways: tuple[InterceptorFactory, ...]) -> Iterator[None]:
        with open_session(model, self._labeler, ways, [], self) as session:
            self.session = session
            yield

    @torch.no_grad()
    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        super().on_attention(layer, backend, call, known)
        if known.unimodal or call.query.shape[1] % call.key.shape[1]:
            return
        query, key = call.query.float(), call.key.float()
        member = membership(known.keys.to(key.device), len(known.names), len(query), call.visible_keys())
        means, counts = mean_keys(key, member)
        means = means.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        cosine = torch.cosine_similarity(query[:, :, :, None], means[:, :, None], dim=-1, eps=1e-12).mean(dim=2)
        absent = (counts == 0)[:, None].expand(cosine.shape)
        norm = means.norm(dim=-1).masked_fill(absent, torch.nan)
        self._cosine.setdefault(layer, []).append((cosine.masked_fill(absent, torch.nan).cpu(), norm.cpu()))

    @property
    def readout(self) -> str | None:
        """The last recorded layer with several modalities; None without any."""
        if not self.complete:
            return None
        inside = [n for n in self.layers if n in self._cosine and (self._under is None or n.startswith(self._under))]
        return inside[-1] if inside else None

    def reason(self) -> str:
        """Why there is no readout."""
        return self.nothing().got if self.readout is None else ""

    def cosine(self, layer: str) -> tuple[Float[Tensor, "sample head modality"], Float[Tensor, "sample head modality"]]:
        """The mean cosine of queries and mean keys, and the length of the mean keys; NaN for absent modalities."""
        cosine, norm = zip(*self._cosine[layer], strict=True)
        return torch.cat(cosine), torch.cat(norm)
