"""Consistency of the maps between modalities as an additional loss term for any fusion."""

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
    """Adds the consistency of maps between the modalities' concepts to the loss, for any fusion::

        c_m = softmax(concepts tokens_m^T / sqrt(d)) tokens_m, less their mean over the concepts
        P_mn = softmax(cos(c_m, c_n) / temperature)
        L   = L_task + weight * mean over samples of log(r*(P) / M)

    Samples that lack a modality contribute 0. The concepts are trained with the model and used only here.

    Args:
        model: any fusion. It gets new parameters ``concepts``, saved in checkpoints: create the optimizer afterward.
        weight: weight of the term, >= 0.
        slots: number M of concepts, >= 2.
        kind: ``"rank"`` as above, ``"nuclear"`` for contradiction only, ``"cycle"`` for the error of i -> j -> k.
        temperature: temperature of the maps, > 0.

    Raises:
        ConfigError: one modality, options out of range, a second Consistency on one model.

    It helps if correspondence is given for some pairs of modalities and needed for another; see the page on
    consistency. In a classification where all modalities are present, measurements show no gain, and at weight 1 a
    lower accuracy with a destroyed modality. Two modalities have no cycle: the term then only favors hard maps.

    Reference: ours (no publication); the terms are defined in eq.consistency, see docs/methods/consistency.md.
    Differs from the paper in: not applicable; it uses r* instead of the nuclear norm, which uniform maps minimize.

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
            # Return NaN, as the task loss does, so that the loop or GradScaler can skip the batch.
            return output.features.sum() * torch.nan
        # The mean excludes samples that lack a modality; rescale so that they count as 0 and batches can be added.
        return loss.of(maps, len(tokens)) * (len(maps) / max(len(target), 1))
