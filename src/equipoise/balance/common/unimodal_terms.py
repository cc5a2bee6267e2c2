"""Losses and scores of single modalities, and checks shared by several balancing methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError
from ...nn.eval_mode import eval_mode_no_grad
from ...tokens.masks import at_least_float32
from ...tokens.token_batch import Output, Tokens
from ..balancer import Multimodal
from .unimodal_scores import has_modality, heads_train_encoders, modality_logits, true_score


class UnimodalLoss(NamedTuple):
    """Mean loss over the samples that have the modality, and their number; both are scalars."""

    mean: Tensor
    count: Tensor


MEMBERS = ("names", "encoders", "loss")


def check_interface(model: Any, who: str) -> None:
    """Raises ConfigError for a module of another library that was not adapted."""
    lacking = [name for name in MEMBERS if not hasattr(model, name)]
    if lacking:
        raise ConfigError(
            who, expected="a FusionModel, or another model after eq.adapt",
            got=f"{type(model).__name__} without {', '.join(lacking)}",
            fix="Adapt it: model = eq.adapt(model, encoders={'audio': model.audio, ...}).",
        )  # fmt: skip


def check_modalities(model: Multimodal, who: str) -> None:
    """Raises ConfigError for a model with fewer than two modalities, or a foreign one that was not adapted."""
    check_interface(model, who)
    if len(model.names) < 2:
        raise ConfigError(who, expected="two or more modalities", got=f"{', '.join(model.names) or 'none'}")


def check_encoders_apart(model: Multimodal, who: str) -> None:
    """Raises ConfigError if encoders of two modalities share a parameter, whose gradient is then the sum of both."""
    owners: dict[int, tuple[str, str]] = {}
    for name in model.names:
        for key, parameter in model.encoders[name].named_parameters():
            other, other_key = owners.setdefault(id(parameter), (name, key))
            if other != name:
                raise ConfigError(
                    who, expected="encoders without shared parameters, since their gradients are changed separately",
                    got=f"'{other_key}' of '{other}', which is also '{key}' of '{name}'",
                    fix=f"Use a separate encoder for '{name}' (copy.deepcopy), or remove {who}.",
                )  # fmt: skip


def differentiable_unimodal_logits(model: Multimodal, output: Output, who: str) -> dict[str, Tensor]:
    """Returns name -> (batch, output) unimodal logits through which gradients reach the modality's encoder.

    Uses the unimodal heads if their losses train the encoders, else the modality's contribution to the logits.

    Raises:
        ConfigError: detached unimodal heads, and logits that do not decompose.
    """
    use_heads = heads_train_encoders(model) and output.unimodal_logits
    return output.unimodal_logits if use_heads else modality_logits(model, output, who, trains=True)


def unimodal_losses(model: Multimodal, output: Output, target: Tensor, who: str) -> dict[str, UnimodalLoss]:
    """Returns name -> loss of the unimodal logits; its gradient reaches that modality's encoder and no other.

    Uses the unimodal heads if their losses train the encoders, else the modality's contribution to the logits. The loss
    of a modality that no sample has is 0, and stays in the graph.

    Raises:
        ConfigError: detached unimodal heads, and logits that do not decompose.
    """
    result = {}
    for name, scores in differentiable_unimodal_logits(model, output, who).items():
        present = has_modality(output, name)
        losses = model.sample_losses(at_least_single(scores), target).masked_fill(~present, 0.0)
        count = present.sum()
        result[name] = UnimodalLoss(losses.sum() / count.clamp(min=1), count)
    return result


def score_sums(model: Multimodal, output: Output, target: Tensor, who: str) -> Float[Tensor, "2 modality"]:
    """Returns, for each modality, the sum of its true scores over the samples that have it, and their number.

    Both can be added over batches and processes; their quotient is the mean score, by which modalities are compared.

    Raises:
        ConfigError: neither unimodal heads nor logits that decompose.
    """
    logits, columns = modality_logits(model, output, who), []
    for name in model.names:
        present = has_modality(output, name)
        scores = true_score(at_least_single(logits[name].detach()), target, model.task)
        columns.append(torch.stack([scores.masked_fill(~present, 0.0).sum(), present.sum().to(scores)]))
    return torch.stack(columns, dim=1)


def mean_of_others(values: Float[Tensor, " modality"], valid: Bool[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """Returns, for each modality, the mean over the other valid modalities; its own value if there is none.

    Example:
        >>> mean_of_others(torch.tensor([1.0, 4.0, 6.0]), torch.tensor([True, True, True]))
        tensor([5.0000, 3.5000, 2.5000])
    """
    others = valid[None] & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    count = others.sum(dim=1)
    mean = torch.where(others, values, 0.0).sum(dim=1) / count.clamp(min=1)
    return torch.where(valid & (count > 0), mean, values)


def discrepancy_ratio(scores: Float[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """Returns s_m / mean_{n != m} s_n, which is above 1 for a modality that predicts better than the others.

    Args:
        scores: (modality,) sums or means over the same samples; 0 for a modality that no sample has, which is left out
            of the comparison and gets ratio 1.

    Example:
        >>> discrepancy_ratio(torch.tensor([40.0, 10.0, 0.0]))
        tensor([4.0000, 0.2500, 1.0000])
    """
    valid = scores > 0
    ratio = scores / mean_of_others(scores, valid).clamp(min=torch.finfo(scores.dtype).tiny)
    # Of equal scores none may exceed 1 by rounding, so the ratio of the lowest score is clamped.
    lowest = scores.masked_fill(~valid, torch.inf).min()
    return torch.where(valid, torch.where(scores > lowest, ratio, ratio.clamp(max=1.0)), 1.0)


def check_concatenated(model: Multimodal, who: str) -> None:
    """Raises ConfigError if the head's input is not the concatenation of the pooled vectors.

    The width alone does not show this, since other fusions also return concatenated vectors, of mixed modalities. The
    fusion is therefore called with one token per modality, which it must return unchanged.
    """
    if callable(concatenates := getattr(model.fusion, "concatenates", None)):
        if not concatenates():
            raise ConfigError(
                who, expected="a linear head on the concatenated pooled tokens of all modalities",
                got="an adapted model with another head", fix="Choose a method that does not replace the head.",
            )  # fmt: skip
        return
    # Skip gates before the fusion: they change the pooled vectors, not how they are combined.
    fusion = getattr(model.fusion, "inner", model.fusion)
    like, width = next(model.head.parameters()), len(model.names) * fusion.dim
    probe = torch.linspace(1, 2, width, device=like.device, dtype=like.dtype)[None]
    pieces = zip(model.names, probe.chunk(len(model.names), dim=-1), strict=True)
    with eval_mode_no_grad(fusion):
        features = fusion({name: Tokens(piece[:, None]) for name, piece in pieces}).features
    if not torch.equal(features, probe):
        raise ConfigError(
            who,
            expected="a fusion whose features are the concatenated pooled vectors",
            got=type(fusion).__name__,
            fix="Use Concat or Sum: the method combines unimodal predictions, not features.",
        )


def detach_unimodal_heads(model: Multimodal) -> None:
    """Detaches the inputs of the unimodal heads so that their losses no longer reach the encoders."""
    if heads_train_encoders(model):
        model.unimodal = "probe"  # type: ignore[attr-defined]


def split_concatenated(
    features: Float[Tensor, "batch feature"], count: int
) -> tuple[Float[Tensor, "batch modality dim"], Bool[Tensor, "batch modality"]]:
    """Splits features into the concatenated pooled vectors, and returns which samples have each modality.

    ``Tokens.pooled`` is exactly zero for samples without the modality, and only for those.

    Example:
        >>> split_concatenated(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), 2)[1]
        tensor([[ True, False]])
    """
    vectors = features.unflatten(-1, (count, -1))
    return vectors, (vectors != 0).any(dim=-1)


def at_least_single(values: Tensor) -> Tensor:
    """Converts half precision to float32; wider types are unchanged."""
    return at_least_float32(values)


def masked_mean(values: Float[Tensor, " batch"], mask: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Returns the mean over the samples with mask True; 0 if there are none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
