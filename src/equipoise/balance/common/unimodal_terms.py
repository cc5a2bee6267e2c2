"""What several methods ask of the single modalities: how much each one loses alone, and its part of the features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ConfigError
from ...nn.eval_mode import eval_mode_no_grad
from ...tokens.token_batch import Output, Tokens
from ..balancer import Multimodal
from .unimodal_scores import has_modality, heads_train_encoders, modality_logits, true_score


class UnimodalLoss(NamedTuple):
    """Mean loss over the samples that count, and how many they are; both are scalars."""

    mean: Tensor
    count: Tensor


def check_modalities(model: Multimodal, who: str) -> None:
    """Raises ConfigError where there is nothing to balance."""
    if len(model.names) < 2:
        raise ConfigError(who, expected="two or more modalities", got=f"{', '.join(model.names) or 'none'}")


def check_encoders_apart(model: Multimodal, who: str) -> None:
    """Raises ConfigError where two modalities' encoders share a parameter, whose gradient is the sum of both."""
    owners: dict[int, tuple[str, str]] = {}
    for name in model.names:
        for key, parameter in model.encoders[name].named_parameters():
            other, its_key = owners.setdefault(id(parameter), (name, key))
            if other != name:
                raise ConfigError(
                    who, expected="encoders that share no parameter, since each is treated as its modality needs",
                    got=f"'{its_key}' of '{other}', which is '{key}' of '{name}' too",
                    fix=f"Give '{name}' an encoder of its own (copy.deepcopy), or leave {who} out.",
                )  # fmt: skip


def differentiable_unimodal_logits(model: Multimodal, output: Output, who: str) -> dict[str, Tensor]:
    """name -> (batch, output): what each modality alone says, with a gradient that reaches its encoder.

    The unimodal heads speak where they teach, else the modality's part of the logits.

    Raises:
        ConfigError: heads that only watch, and logits that do not decompose.
    """
    teaching = heads_train_encoders(model) and output.unimodal_logits
    return output.unimodal_logits if teaching else modality_logits(model, output, who, trains=True)


def unimodal_losses(model: Multimodal, output: Output, target: Tensor, who: str) -> dict[str, UnimodalLoss]:
    """name -> the loss of what that modality alone says, with a gradient that reaches its encoder and no other.

    The unimodal heads speak where they teach, else the modality's part of the logits. A modality that nobody has costs
    0, and stays in the graph.

    Raises:
        ConfigError: heads that only watch, and logits that do not decompose.
    """
    found = {}
    for name, scores in differentiable_unimodal_logits(model, output, who).items():
        counts = has_modality(output, name)
        losses = model.sample_losses(at_least_single(scores), target).masked_fill(~counts, 0.0)
        count = counts.sum()
        found[name] = UnimodalLoss(losses.sum() / count.clamp(min=1), count)
    return found


def score_sums(model: Multimodal, output: Output, target: Tensor, who: str) -> Float[Tensor, "2 modality"]:
    """For each modality the sum of its true scores over the samples that have it, and how many these are.

    Both add up over batches and processes; their quotient is the mean score, by which modalities are compared.

    Raises:
        ConfigError: neither unimodal heads, nor logits that decompose.
    """
    logits, found = modality_logits(model, output, who), []
    for name in model.names:
        counts = has_modality(output, name)
        scores = true_score(at_least_single(logits[name].detach()), target, model.task)
        found.append(torch.stack([scores.masked_fill(~counts, 0.0).sum(), counts.sum().to(scores)]))
    return torch.stack(found, dim=1)


def mean_of_others(values: Float[Tensor, " modality"], known: Bool[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """For each modality the mean over the other ones that are known; its own value where it has nothing beside it.

    Example:
        >>> mean_of_others(torch.tensor([1.0, 4.0, 6.0]), torch.tensor([True, True, True]))
        tensor([5.0000, 3.5000, 2.5000])
    """
    beside = known[None] & ~torch.eye(len(known), dtype=torch.bool, device=known.device)
    count = beside.sum(dim=1)
    mean = torch.where(beside, values, 0.0).sum(dim=1) / count.clamp(min=1)
    return torch.where(known & (count > 0), mean, values)


def discrepancy_ratio(scores: Float[Tensor, " modality"]) -> Float[Tensor, " modality"]:
    """s_m / mean_{n != m} s_n: above 1 for a modality that predicts better than the others.

    Args:
        scores: (modality,) sums or means over the same samples; 0 for a modality that nobody has, which is compared
            with nobody: its ratio is 1.

    Example:
        >>> discrepancy_ratio(torch.tensor([40.0, 10.0, 0.0]))
        tensor([4.0000, 0.2500, 1.0000])
    """
    known = scores > 0
    ratio = scores / mean_of_others(scores, known).clamp(min=torch.finfo(scores.dtype).tiny)
    # Rounding must not make the least one lead, as it could among equals.
    least = scores.masked_fill(~known, torch.inf).min()
    return torch.where(known, torch.where(scores > least, ratio, ratio.clamp(max=1.0)), 1.0)


def check_concatenated(model: Multimodal, who: str) -> None:
    """Raises ConfigError where the head does not read the pooled vectors, one beside the other.

    Width alone does not tell: other fusions hand out as wide a vector of parts that have seen each other. So the fusion
    is shown one token of each modality, which must come back as it is.
    """
    # Gates in front change what is pooled, not how it is joined.
    fusion = getattr(model.fusion, "inner", model.fusion)
    like, width = next(model.head.parameters()), len(model.names) * fusion.dim
    shown = torch.linspace(1, 2, width, device=like.device, dtype=like.dtype)[None]
    pieces = zip(model.names, shown.chunk(len(model.names), dim=-1), strict=True)
    with eval_mode_no_grad(fusion):
        features = fusion({name: Tokens(piece[:, None]) for name, piece in pieces}).features
    if not torch.equal(features, shown):
        raise ConfigError(
            who,
            expected="a fusion whose features are the pooled vectors side by side",
            got=type(fusion).__name__,
            fix="Use Concat or Sum: the method joins what modalities say, not what they contain.",
        )


def detach_unimodal_heads(model: Multimodal) -> None:
    """From now on unimodal heads read detached vectors: what they learn does not reach encoders out of turn."""
    if heads_train_encoders(model):
        model.unimodal = "probe"  # type: ignore[attr-defined]


def split_concatenated(
    features: Float[Tensor, "batch feature"], count: int
) -> tuple[Float[Tensor, "batch modality dim"], Bool[Tensor, "batch modality"]]:
    """The pooled vectors that stand side by side in the features, and which samples have them.

    ``Tokens.pooled`` is exactly zero for a sample without the modality, and nothing else is.

    Example:
        >>> side_by_side(torch.tensor([[1.0, 2.0, 0.0, 0.0]]), 2)[1]
        tensor([[ True, False]])
    """
    vectors = features.unflatten(-1, (count, -1))
    return vectors, (vectors != 0).any(dim=-1)


def at_least_single(values: Tensor) -> Tensor:
    """Half precision widened to float32; wider types as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_mean(values: Float[Tensor, " batch"], kept: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the samples that count; 0 where there are none."""
    return values.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)
