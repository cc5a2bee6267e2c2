"""Per-modality logits, and the score by which balancing methods compare them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError
from ...tokens.token_batch import Output
from ..balancer import Multimodal


def true_score(logits: Float[Tensor, "batch output"], target: Tensor, task: str) -> Float[Tensor, " batch"]:
    """Scores each sample's prediction in (0, 1]; 1 is perfect.

    Classification: the probability of the true class, softmax(y)[target]. Multilabel: the mean over labels of the
    probability of each label's true value. Regression: exp(-mean squared error), the likelihood under unit variance up
    to a constant. The papers define classification only; the other two are our extension.

    Example:
        >>> true_score(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), "classification")
        tensor([0.5000])
    """
    if task == "classification":
        return logits.softmax(dim=-1).gather(1, target.long()[:, None])[:, 0]
    target = target.to(logits.dtype).reshape(logits.shape)
    if task == "multilabel":
        return torch.where(target > 0.5, logits.sigmoid(), (-logits).sigmoid()).mean(dim=1)
    return torch.exp(-F.mse_loss(logits, target, reduction="none").mean(dim=1))


def correctness(logits: Float[Tensor, "batch output"], target: Tensor, task: str) -> Float[Tensor, " batch"]:
    """Returns 1 for correct predictions, else 0; multilabel: fraction of correct labels; regression: ``true_score``."""
    if task == "classification":
        return (logits.argmax(dim=-1) == target).to(logits.dtype)
    if task == "multilabel":
        return ((logits > 0) == (target.reshape(logits.shape) > 0.5)).to(logits.dtype).mean(dim=-1)
    return true_score(logits, target, task)


def prediction_entropy(logits: Float[Tensor, "*batch output"], task: str) -> Float[Tensor, " *batch"]:
    """Returns the entropy of each prediction in nats; multilabel: mean over labels; 0 for regressions, which have none.

    Example:
        >>> prediction_entropy(torch.tensor([[0.0, 0.0]]), "classification")
        tensor([0.6931])
    """
    if task == "classification":
        return -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").mean(dim=-1)
    return torch.zeros_like(logits[..., 0])


def modality_logits(model: Multimodal, output: Output, who: str, *, trains: bool = False) -> dict[str, Tensor]:
    """Returns name -> (batch, output) unimodal logits.

    If the fusion's logits are a sum of one contribution per modality (``Concat``, ``Sum``), returns the contributions;
    else the logits of the unimodal heads.

    Args:
        model: the model.
        output: output of the model.
        who: name of the balancer, for error messages.
        trains: whether gradients must reach the encoders, which excludes detached heads.

    Raises:
        ConfigError: the logits do not decompose, and there are no unimodal heads (or only detached ones).
    """
    parts = model.contributions(output)
    if parts is not None:
        return parts
    heads = getattr(model, "unimodal", "none")
    if not output.unimodal_logits or (trains and not heads_train_encoders(model)):
        requirement = "that train the encoders" if trains else "for every modality"
        mode, adapted = "train" if trains else "probe", getattr(model, "adapted_class", None)
        raise ConfigError(
            who,
            expected=f"logits that are a sum over modalities, or unimodal heads {requirement}",
            got=f"fusion {(adapted or type(model.fusion)).__name__} with unimodal='{heads}'",
            fix=f"Use Concat or Sum, or FusionModel(..., unimodal='{mode}')."
            if adapted is None
            else f"Pass eq.adapt(..., unimodal='{mode}').",
        )
    return dict(output.unimodal_logits)


def heads_train_encoders(model: Multimodal) -> bool:
    """Returns whether the unimodal heads' losses reach the encoders."""
    return getattr(model, "unimodal", "none") in ("train", "ensemble")


def has_modality(output: Output, name: str) -> Tensor:
    """Returns (batch,) True for samples that have the modality."""
    tokens = output.tokens[name]
    return tokens.present() if len(tokens) else tokens.values.new_zeros(len(tokens.values), dtype=torch.bool)
