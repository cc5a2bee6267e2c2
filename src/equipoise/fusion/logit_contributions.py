"""Exact decomposition of logits into one part per modality, for models whose logits are such a sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.eval_mode import eval_mode_no_grad
from ..nn.transformer import Attention
from ..tokens.token_batch import SPECIAL, Output, Tokens
from .fusion_base import Fusion
from .joint_attention import JointAttention


class RecordedFusion(Protocol):
    """Required interface of the model, implemented by ``FusionModel``."""

    fusion: Fusion
    head: nn.Module

    def encode(self, batch: Any) -> dict[str, Tokens]: ...
    def fuse(self, tokens: Mapping[str, Tokens]) -> Output: ...
    def contributions(self, output: Output) -> dict[str, Tensor] | None: ...
    def ensemble_logits(self, output: Output) -> dict[str, Tensor]: ...


def modality_contributions(model: RecordedFusion, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Computes the part of each modality in the logits; the parts add up to the logits.

    Fusions whose logits are a sum by construction (Concat, Sum, Unimodal, MBT) implement ``contributions``. Joint
    attention of depth 1 with a linear head is linear in the values of its keys; with A the attention of the class
    token::

        part_m = W_y W_O (A V_m) + (W_y (W_O (A V_special) + b_O) + b_y) / N,    V_m: V, zero but for modality m

    Args:
        model: a FusionModel.
        batch: a batch of the model, or name -> Tokens, the outputs of its encoders.

    Returns:
        name -> (batch, output), detached, computed in evaluation mode. The contribution of the
        class token and the biases is divided equally. No attention matrix is materialized.

    Raises:
        ConfigError: the logits of the fusion or head are not a sum of parts; the message gives the reason.

    Unlike an attention share, a part has a sign, and it is small for a large share with small or canceling values. Two
    parts of opposite sign may both be large while the logits are small.

    Reference: value-weighted attention, as in Kobayashi et al., "Attention is Not Only a Weight" (EMNLP 2020).
    Differs from the released code in: it computes signed, exact parts of the logits rather than norms of vectors.

    Example:
        >>> import torch
        >>> from equipoise.models.fusion_model import FusionModel
        >>> model = FusionModel({"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}, JointAttention(8), 2)
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5)}
        >>> parts = modality_contributions(model, batch)
        >>> torch.allclose(sum(parts.values()), model.eval()(batch).logits, atol=1e-6)
        True
    """
    with eval_mode_no_grad(model):  # type: ignore[arg-type]
        is_tokens = all(isinstance(part, Tokens) for part in batch.values())
        tokens = dict(batch) if is_tokens else model.encode(batch)
        parts = model.contributions(model.fuse(tokens))
        return parts if parts is not None else _by_values(model, tokens)


def _by_values(model: RecordedFusion, tokens: Mapping[str, Tokens]) -> dict[str, Tensor]:
    fusion, head = model.fusion, model.head
    if not isinstance(fusion, JointAttention) or fusion.depth > 1:
        what = f"{type(fusion).__name__} of depth {fusion.depth}" if isinstance(fusion, JointAttention) else None
        raise _not_linear(
            what or type(fusion).__name__, "Norms and hidden layers mix the modalities before the head reads them."
        )
    if not isinstance(head, nn.Linear):
        raise _not_linear(f"JointAttention with a head {type(head).__name__}", "The head must be linear.")
    layer = fusion.attention
    contributions = {}
    for number, name in enumerate(fusion.names):
        with _values_of(layer, number):
            attended = fusion(tokens).features - layer.out.bias
        contributions[name] = nn.functional.linear(attended, head.weight)
    with _values_of(layer, SPECIAL):
        rest = head(fusion(tokens).features) / len(contributions)
    ensemble_logits = model.ensemble_logits(model.fuse(tokens))
    return {name: part + rest + ensemble_logits.get(name, 0.0) for name, part in contributions.items()}


@contextmanager
def _values_of(layer: Attention, label: int) -> Iterator[None]:
    """Sets the values of all keys to zero except those of one label; attention weights are unchanged."""

    def only(core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        query, key, value = args
        selected = (kwargs["modality"] == label).to(value.device)
        return (query, key, value * selected[:, None].to(value.dtype)), kwargs

    handle = layer.core.register_forward_pre_hook(only, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _not_linear(got: str, why: str) -> ConfigError:
    return ConfigError(
        "modality_contributions",
        expected="logits that are a sum of one part for each modality: Concat, Sum, Unimodal, MBT, or JointAttention "
        "of depth 1 with a linear head",
        got=got,
        fix=why,
    )
