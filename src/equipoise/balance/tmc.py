"""TMC: combines the evidence of each modality by Dempster's rule (evidential fusion)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.modality_heads import ModalityHeads, replace_head
from .common.unimodal_terms import check_concatenated, check_modalities, masked_mean


def combined_evidence(evidence: Float[Tensor, "batch modality *rest outcome"]) -> Float[Tensor, "batch *rest outcome"]:
    """Combines the evidence of all modalities by Dempster's rule.

    A modality with evidence e_k for K outcomes has belief masses b_k = e_k / S and uncertainty u = K / S with
    S = sum_k e_k + K. The rule of two modalities, b_k = (b_k^1 b_k^2 + b_k^1 u^2 + b_k^2 u^1) / (1 - C) with the
    conflict C = sum_{i != j} b_i^1 b_j^2 and u = u^1 u^2 / (1 - C), applied to all, gives::

        e_k = K (prod_m (1 + e_k^m / K) - 1)

    A modality without evidence changes nothing.

    Example:
        >>> combined_evidence(torch.tensor([[[2.0, 0.0], [2.0, 4.0]]]))
        tensor([[6., 4.]])
    """
    outcomes = evidence.shape[-1]
    return outcomes * torch.expm1(torch.log1p(evidence / outcomes).sum(dim=1))


def evidential_losses(
    evidence: Float[Tensor, "*batch outcome"], truth: Float[Tensor, "*batch outcome"], *, strength: float
) -> Float[Tensor, " *batch"]:
    """Returns the expected cross entropy under a Dirichlet distribution, and a penalty of evidence for false outcomes.

    With alpha = e + 1, S = sum alpha, truth y (one-hot) and alpha' = y + (1 - y) alpha::

        sum_k y_k (digamma(S) - digamma(alpha_k)) + strength KL(Dir(alpha') || Dir(1))

    Example:
        >>> evidential_losses(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), strength=1.0)
        tensor([1.0000])
    """
    alpha = evidence + 1
    expected = (truth * (alpha.sum(dim=-1, keepdim=True).digamma() - alpha.digamma())).sum(dim=-1)
    false = truth + (1 - truth) * alpha
    total = false.sum(dim=-1)
    outcomes = torch.full_like(total, alpha.shape[-1])
    divergence = total.lgamma() - false.lgamma().sum(dim=-1) - outcomes.lgamma()
    divergence = divergence + ((false - 1) * (false.digamma() - total.digamma()[..., None])).sum(dim=-1)
    return expected + strength * divergence


class TMC(Balancer):
    """Replaces the head by one evidential head per modality, whose evidence is combined (trusted multi-view fusion).

    With y^m the logits of modality m, e^m = softplus(y^m), and e the evidence that ``combined_evidence`` gives::

        p_k = (e_k + 1) / sum_j (e_j + 1)
        loss = mean evidential loss of e + sum_m mean evidential loss of e^m

    with the weight min(1, epoch / annealing) of the penalty, from epoch 1 on; see ``evidential_losses``. A modality
    that a sample lacks has no evidence. In recipes ``tmc`` is ``concat+tmc``.

    Args:
        model: classification or multilabel, with a fusion that concatenates pooled vectors (``Concat``, ``Sum``). Its
            ``head`` is replaced and saved in checkpoints: create the optimizer afterward. Unimodal heads are detached.
        annealing: number of epochs until the penalty has its full weight, >= 1.

    Raises:
        ConfigError: one modality, a regression, a fusion of another kind, an annealing below 1.

    A baseline of dynamic fusion: an uncertain modality has little evidence and hardly changes the prediction. Agreement
    of modalities multiplies their evidence, so that redundant modalities make it overconfident. Evidence is learned
    from clean data, and nothing forces it to be small for damaged inputs. Nothing is learned across modalities.

    Reference: Han, Zhang, Fu and Zhou, "Trusted Multi-View Classification" (ICLR 2021), TMC.
    Differs from the released code in: any pooled encoders instead of an MLP per view; the closed form for all
    modalities instead of a loop over pairs; missing modalities; multilabel targets, with evidence softplus(y) and
    softplus(-y) for and against each label. The text of the paper was not available: the formulas are those of the
    code.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.TMC(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> sorted(balancing.end_epoch())
        ['uncertainty/audio', 'uncertainty/image']
    """

    replaces = ("task",)
    changes_gradients = False
    fusion_in_recipes = "concat"
    excludes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("AMCo", "MLA", "MMCosine", "QMF", "ReconBoost"), "both replace the model's head"),
        **dict.fromkeys(
            ("MBSD", "MMPareto"), "it needs unimodal heads that train the encoders, and here they are detached"
        ),
    }

    def __init__(self, model: Multimodal, *, annealing: int = 10) -> None:
        super().__init__()
        check_modalities(model, "TMC")
        check_concatenated(model, "TMC")
        if model.task == "regression":
            raise ConfigError(
                "TMC", expected="a task with classes or labels, of which evidence is collected", got="a regression",
                fix="Choose a method that is defined for regressions.",
            )  # fmt: skip
        if annealing < 1:
            raise ConfigError("TMC", expected="annealing >= 1", got=f"annealing = {annealing}")
        self._model, self.annealing = [model], annealing
        replace_head(model, EvidentialHead, model.task)
        self.register_buffer("epochs", torch.tensor(0))
        # In this epoch: sums of each modality's uncertainty, and numbers of samples.
        self.register_buffer("running", torch.zeros(2, len(model.names), dtype=torch.float64))

    epochs: Tensor
    running: Tensor

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the evidential loss of the combination and of each modality."""
        model, head = self._model[0], cast(EvidentialHead, self._model[0].head)
        evidence, present = head.evidence(output.features)
        uncertainty = evidence.shape[-1] / (evidence + 1).sum(dim=-1).mean(dim=2)
        sums = torch.stack([uncertainty.masked_fill(~present, 0.0).sum(dim=0), present.sum(dim=0)])
        self.note("uncertainty", sums)
        # The loss of the model checks the target.
        model.sample_losses(head.logits(evidence), target)
        truth = self._truth(target, evidence)
        strength = min(1.0, (int(self.epochs) + 1) / self.annealing)
        total = evidential_losses(combined_evidence(evidence), truth, strength=strength).mean()
        for own, here in zip(evidence.unbind(dim=1), present.unbind(dim=1), strict=True):
            losses = evidential_losses(own, truth, strength=strength).mean(dim=1)
            total = total + masked_mean(losses, here)
        return total

    def before_step(self) -> None:
        """Adds the uncertainty of the step to the sums of the epoch."""
        sums = self.noted_sum("uncertainty")
        if sums is not None:
            self.running = self.running.to(sums.device) + sums

    def end_epoch(self) -> dict[str, float]:
        """Returns ``uncertainty/<name>``, the mean u of a modality over the samples that have it; 1 without samples."""
        total, count = all_reduce_sum(self.running)
        means = torch.where(count > 0, total / count.clamp(min=1), 1.0).tolist()
        self.epochs += 1
        self.running = torch.zeros_like(self.running)
        return {f"uncertainty/{name}": mean for name, mean in zip(self._model[0].names, means, strict=True)}

    def _truth(self, target: Tensor, evidence: Tensor) -> Tensor:
        """Returns (batch, label, outcome) one-hot targets."""
        groups, outcomes = evidence.shape[2:]
        if self._model[0].task == "classification":
            return F.one_hot(target.long(), outcomes)[:, None].to(evidence)
        # Soft labels are probabilities of the label.
        labels = target.to(evidence).reshape(len(target), groups)
        return torch.stack([labels, 1 - labels], dim=-1)


class EvidentialHead(ModalityHeads):
    """A linear head per modality whose outputs are evidence; the logits are those of the combined evidence.

    Args:
        count: number of modalities.
        dim: width of one vector.
        num_outputs: number of classes or labels.
        task: ``"classification"`` or ``"multilabel"``.
    """

    def __init__(self, count: int, dim: int, num_outputs: int, task: str) -> None:
        super().__init__(count, dim, num_outputs)
        self.task = task

    def evidence(self, features: Float[Tensor, "batch feature"]) -> tuple[Tensor, Tensor]:
        """Returns (batch, modality, label, outcome) evidence, 0 for missing modalities, and (batch, modality) presence.

        Classification has one label with an outcome per class; multilabel has the outcomes yes and no of each label.
        """
        logits, present = self.all_logits(features)
        scores = logits[:, :, None] if self.task == "classification" else torch.stack([logits, -logits], dim=-1)
        return F.softplus(scores).masked_fill(~present[..., None, None], 0.0), present

    def logits(self, evidence: Float[Tensor, "batch modality label outcome"]) -> Float[Tensor, "batch output"]:
        """Returns logits of the expected probabilities of the combined evidence."""
        scores = torch.log1p(combined_evidence(evidence))
        return scores[:, 0] if self.task == "classification" else scores[..., 0] - scores[..., 1]

    def forward(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch output"]:
        return self.logits(self.evidence(features)[0])
