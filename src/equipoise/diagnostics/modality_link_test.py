"""Attention between modalities along the layers of a self-attention model: gaps, decay and alignment errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..geometry import membership
from ..nn.eval_mode import eval_mode_no_grad
from .attention_gap_test import gap_from_attention, share_table
from .link_decay_test import alignment_error, e_dda, link_decay
from .model_inputs import Layers, attention_of, hidden_of, key_mask, labels_of
from .rank_collapse_test import rank_collapse

WHO = "modality_links"


@dataclass(frozen=True, eq=False)
class ModalityLinks:
    """Attention between modalities in the layers of a model, on the CPU; NaN if undefined.

    Attributes:
        gap: (modality,) attention gap in percent, mean over layers.
        share: (layer, modality of query, modality of key) mean attention of queries that see both kinds of keys.
        last: (layer, modality) attention of the last token, which generates the answer, to each modality.
        gamma: (modality of query, modality of key) decay factor per layer; NaN on the diagonal.
        r2: (modality of query, modality of key) coefficient of determination of the fit.
        errors: (layer,) alignment error of the modalities' mean tokens.
        e_dda: (modality of query, modality of key) logarithm of the product of decay and error over all layers.
        residual: (layer,) relative residual of the tokens.
    """

    gap: Float[Tensor, " modality"]
    share: Float[Tensor, "layer query key"]
    last: Float[Tensor, "layer modality"]
    gamma: Float[Tensor, "query key"]
    r2: Float[Tensor, "query key"]
    errors: Float[Tensor, " layer"]
    e_dda: Float[Tensor, "query key"]
    residual: Float[Tensor, " layer"]

    def rows(self, names: Sequence[str]) -> dict[str, float]:
        """Returns label -> value, summarized over layers.

        Raises:
            ConfigError: the number of names differs from the number of modalities.
        """
        if len(names) != len(self.gap):
            raise ConfigError(WHO, expected=f"names of {len(self.gap)} modalities", got=f"{', '.join(names)}")
        pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
        rows = {f"gap of {name}, %": self.gap[i] for i, name in enumerate(names)}
        for i, j in pairs:
            rows |= {
                f"{names[i]} to {names[j]}, share": self.share[:, i, j].nanmean(),
                f"{names[i]} to {names[j]}, gamma": self.gamma[i, j],
                f"{names[i]} to {names[j]}, log E": self.e_dda[i, j],
            }
        rows |= {f"last token to {name}, share": self.last[:, i].nanmean() for i, name in enumerate(names)}
        rows |= {"alignment error": self.errors.nanmean(), "residual, last layer": self.residual[-1]}
        return {label: float(value) for label, value in rows.items()}


def modality_links(
    attentions: Layers,
    hidden: Layers,
    modality: Int[Tensor, "... token"],
    num_modalities: int | None = None,
    mask: Bool[Tensor, "batch *query key"] | None = None,
) -> ModalityLinks:
    """Computes attention gap, layer shares, link decay, alignment errors, E_DDA and rank collapse of a model.

    For each link m -> n: gamma by least squares of log share^l = a + l log gamma, and
    log E = sum_l (l log gamma + log error_l), error_l = 1 - cos of the modalities' mean tokens.

    Args:
        attentions: (batch, head, token, token) of each layer, such as the ``attentions`` of a Hugging Face model.
        hidden: (batch, token, dim) output of each layer: ``hidden_states[1:]``.
        modality: labels (token,) or (batch, token), -1 = special or padding.
        num_modalities: by default the highest label + 1.
        mask: (batch, key) or (batch, query, key), True = visible; a causal mask must be given.

    Returns:
        ModalityLinks.

    Raises:
        ShapeError: different numbers of layers, fewer than two layers, or tensors that do not fit.

    Compare values of one model before and after a change, on the same inputs. log E accumulates over layers, so compare
    only models of the same depth; a line through few layers always fits well.

    Reference: MODA (ICML 2025).
    Differs from the paper in: see ``attention_gap``, ``alignment_error`` and ``e_dda`` for definitions that the paper
    leaves open.

    Example:
        >>> attention = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
        >>> tokens = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
        >>> links = modality_links([attention] * 2, [tokens] * 2, torch.tensor([0, 1]))
        >>> links.gap, links.gamma[1, 0]
        (tensor([ 0., 50.]), tensor(1., dtype=torch.float64))
    """
    layers, states = attention_of(attentions, WHO), hidden_of(hidden, WHO)
    if len(layers) != len(states) or len(layers) < 2:
        raise ShapeError(
            WHO, expected="attention and hidden states of the same layers, at least two",
            got=f"{len(layers)} and {len(states)}",
            fix="The hidden_states of Hugging Face models start with the embeddings; pass hidden_states[1:].",
        )  # fmt: skip
    visible = key_mask(mask, layers[0], WHO)
    labels, count = labels_of(modality, num_modalities, *layers[0].shape[::2], who=WHO)
    # Each token except padding sees itself.
    real = visible.diagonal(dim1=1, dim2=2) if mask is not None else torch.ones_like(visible[:, 0])
    labels = labels.to(visible.device).masked_fill(~real, -1)
    table = share_table(layers, labels, count, visible)
    weight = table.rows[:, :, None].expand_as(table.share[0, :, 0])
    share = torch.stack([_mean(layer.mean(dim=1), weight) for layer in table.share]).cpu()
    errors = alignment_error(states, labels, count)
    gamma, r2, product = (torch.full((count, count), torch.nan, dtype=torch.float64) for _ in range(3))
    for i in range(count):
        for j in range(count):
            if i != j:
                decay = link_decay(share[:, i, j])
                gamma[i, j], r2[i, j] = decay.gamma, decay.r2
                product[i, j] = e_dda(decay.gamma, errors).log_product
    return ModalityLinks(
        gap=gap_from_attention(layers, labels, count, visible).cpu(),
        share=share,
        last=_last(layers, labels, count, real),
        gamma=gamma,
        r2=r2,
        errors=errors,
        e_dda=product,
        residual=rank_collapse(states, mask=real).whole.nanmean(dim=1),
    )


def read_modality_links(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], modality: Int[Tensor, "batch token"]
) -> ModalityLinks:
    """Computes ``modality_links`` of a Hugging Face model; keys without attention in all layers count as masked.

    Args:
        model: with eager attention, ``model.set_attn_implementation("eager")``.
        batches: keyword arguments of the model, all with the same number of tokens.
        modality: labels of the tokens of all batches.

    Raises:
        ConfigError: the model does not return its attention. ShapeError: as ``modality_links``.
    """
    attentions, states = [], []
    with eval_mode_no_grad(model):
        for inputs in batches:
            output = model(**inputs, output_attentions=True, output_hidden_states=True)
            if not output.attentions or any(layer is None for layer in output.attentions):
                raise ConfigError(
                    "read_modality_links",
                    expected="a model that returns its attention",
                    got=f"none of {type(model).__name__}",
                    fix="Use model.set_attn_implementation('eager'), and MODA with merge='mass'.",
                )
            attentions.append([layer.float().cpu() for layer in output.attentions])
            states.append([layer.float().cpu() for layer in output.hidden_states[1:]])
    if not attentions:
        raise ShapeError("read_modality_links", expected="at least one batch", got="none")
    layers = [torch.cat(parts) for parts in zip(*attentions, strict=True)]
    hidden = [torch.cat(parts) for parts in zip(*states, strict=True)]
    return modality_links(layers, hidden, modality.cpu(), mask=torch.stack([x.amax(dim=1) for x in layers]).amax(0) > 0)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over samples, weighted by their number of queries; NaN without any."""
    return torch.where(weight > 0, values * weight, 0.0).sum(dim=0) / weight.sum(dim=0)


def _last(layers: Sequence[Tensor], labels: Tensor, count: int, real: Tensor) -> Tensor:
    index = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(dim=1)
    member = membership(labels, count, len(labels))
    shares = []
    for layer in layers:
        row = layer.mean(dim=1)[torch.arange(len(index)), index.to(layer.device)]
        shares.append((member.to(row) @ row[..., None])[..., 0].mean(dim=0).cpu())
    return torch.stack(shares)
