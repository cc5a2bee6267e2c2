"""Consistency: maps between the concepts of all modalities that agree with each other, as a term beside any fusion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..consistency import ConsistencyLoss
from ..consistency.consistency_loss import Kind
from ..errors import ConfigError, NonFiniteError
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_terms import check_modalities


class ConsistencyBalancer(Balancer):
    """Adds the consistency of the maps between modalities to the loss, whatever the fusion does::

        c_m = softmax(concepts tokens_m^T / sqrt(d)) tokens_m, less their mean over the concepts
        P_mn = softmax(cos(c_m, c_n) / temperature)
        L   = L_task + weight * mean over samples of log(r*(P) / M)

    A sample that lacks a modality counts as 0. The concepts are learned with the model and nothing else uses them.

    Args:
        model: any fusion. It gets new parameters ``concepts``, which a checkpoint holds: make the optimizer afterward.
        weight: of the term, >= 0.
        slots: M concepts, >= 2.
        kind: ``"rank"`` as above, ``"nuclear"`` for contradiction alone, ``"cycle"`` for the error of i -> j -> k.
        temperature: of the maps, > 0.

    Raises:
        ConfigError: one modality, options out of range, a second Consistency on one model.

    It helps where correspondence is known for some pairs of modalities and wanted for another, see the page on
    consistency. A classification that has all modalities knows their correspondence already: measured there it gives
    nothing, and at weight 1 costs accuracy where one of them is destroyed.
    Two modalities have no cycle: the term then asks for hard maps alone.

    Reference: ours; the terms are those of spec 6.3 and 6.4.
    Differs from the paper in: there is none; r* in place of the bare nuclear norm, which uniform maps minimize.

    Example:
        >>> import torch
        >>> import equipoise as eq
        >>> encoders = {name: torch.nn.Linear(3, 8) for name in ("audio", "image", "text")}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.ConsistencyBalancer(model, weight=0.1, slots=4)])
        >>> output = model({name: torch.randn(5, 7, 3) for name in encoders})
        >>> bool(balancing.loss(output, torch.tensor([0, 1, 0, 1, 0])) > 0)
        True
    """

    name = "consistency"

    def __init__(
        self, model: Multimodal, *, weight: float = 0.1, slots: int = 8, kind: Kind = "rank", temperature: float = 0.1
    ) -> None:
        super().__init__()
        check_modalities(model, "Consistency")
        if not 0 <= weight < math.inf:
            raise ConfigError("Consistency", expected="weight >= 0 and finite", got=f"weight = {weight}")
        if hasattr(model, "concepts"):
            raise ConfigError(
                "Consistency", expected="a model without concepts", got="a second Consistency on one model"
            )
        like = next(model.head.parameters())
        concepts = ConsistencyLoss(
            model.fusion.dim,
            slots=slots,
            kind=kind,
            temperature=temperature,
            weight=weight,
        )
        model.concepts = concepts.to(like.device, like.dtype)  # type: ignore[attr-defined]
        self._model = [model]

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        loss: ConsistencyLoss = self._model[0].concepts  # type: ignore[attr-defined]
        if loss.weight == 0:
            return None
        tokens = {name: output.tokens[name] for name in self._model[0].names}
        try:
            maps = loss.supermatrix(tokens)
        except NonFiniteError:
            # A loss that is NaN, as the task's is, so that loops and GradScaler can skip the batch.
            return output.features.sum() * torch.nan
        # Samples that lack a modality are left out there; counted as 0, parts of a batch add up to the whole.
        return loss.of(maps, len(tokens)) * (len(maps) / max(len(target), 1))
