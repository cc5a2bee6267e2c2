"""InfoReg: holds back the encoder of the leading modality while it acquires information quickly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output
from .balancer import Balancer, Multimodal
from .common.unimodal_scores import heads_train_encoders
from .common.unimodal_terms import check_encoders_apart, check_modalities, mean_of_others, score_sums, unimodal_losses

WINDOW = 10
"""Number of epochs over which Fisher traces are averaged."""


def information_growth(traces: Float[Tensor, "epoch modality"]) -> Float[Tensor, " modality"]:
    """Returns (T_t - T_{t-1}) / T_t, with T_t the sum of the last 10 Fisher traces; 1 before the first epoch.

    Args:
        traces: (11, modality) traces of the last epochs, the latest last; 0 for epochs before the first one.

    Example:
        >>> traces = torch.zeros(11, 2)
        >>> traces[-2:] = torch.tensor([[3.0, 3.0], [1.0, 0.0]])
        >>> information_growth(traces)
        tensor([0.2500, 0.0000])
    """
    last, previous = traces[1:].sum(dim=0), traces[:-1].sum(dim=0)
    # A modality whose encoder got no gradient yet has acquired no information.
    return torch.where(last > 0, (last - previous) / torch.where(last > 0, last, 1.0), 1.0)


def restraint(
    scores: Float[Tensor, " modality"], growth: Float[Tensor, " modality"], *, strength: float, threshold: float
) -> Float[Tensor, " modality"]:
    """Returns beta_m = strength exp(tanh(gap_m)) if gap_m > 0 and the growth exceeds the threshold, else 0.

    Args:
        scores: (modality,) mean scores s_m; 0 for a modality that no sample has. gap_m = s_m - mean_{n != m} s_n.
        growth: (modality,) see ``information_growth``.

    Example:
        >>> restraint(torch.tensor([0.5, 0.5]), torch.ones(2), strength=0.9, threshold=0.05)
        tensor([0., 0.])
    """
    known = scores > 0
    gap = torch.where(known, scores - mean_of_others(scores, known), 0.0)
    return torch.where((gap > 0) & (growth > threshold), strength * gap.tanh().exp(), 0.0)


class InfoReg(Balancer):
    """Pulls the encoder of a leading modality back to its weights at the start of the epoch, early in training.

    With s_m the mean probability of the true class from modality m alone in a step, theta_m the weights of encoder m
    and theta_m^0 those at the start of the epoch::

        gap_m = s_m - mean_{n != m} s_n
        beta_m = strength exp(tanh(gap_m)) where gap_m > 0 and k_m > threshold, else 0
        g_m <- g_m + beta_m (theta_m - theta_m^0);   loss = task + sum_m l_m

    k_m = (T_t - T_{t-1}) / T_t is the growth of the encoder's Fisher trace: T_t is the sum over the last 10 epochs of
    the sum of squared gradients of an epoch, mean over the entries of each matrix or kernel, summed over these. It is
    at least about 1 / t in the first 10 epochs, the prime learning window, and afterward exceeds the threshold only
    while traces still grow.

    Args:
        model: with unimodal heads that train the encoders, or logits that are a sum over modalities.
        strength: > 0. The code has 0.95 for audio and 0.1 for video.
        threshold: of k, >= 0.

    Raises:
        ConfigError: one modality, an option out of range; in training, no trainable unimodal losses.

    It helps if one modality learns quickly at first and the others stay behind. The pull is that of a quadratic penalty
    around weights that move once per epoch: it acts like a smaller learning rate within an epoch, and more in long
    epochs. It is in units of the learning rate: with SGD, a learning rate times strength above 2 / e diverges. Weights
    of all encoders are stored once more.

    Reference: Huang, Wei, Yang and Hu, "Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition"
    (CVPR 2025), InfoReg.
    Differs from the released code in: mean scores in the gap, where tanh of the code's sum over a batch is almost
    always 1; any leading modality with its own trace, where by a repeated condition the code only restrains audio;
    traces of the loss alone, where the code includes the pull; the gradient of the accumulated step, over all
    processes. The text of the paper was not available beyond its introduction: the formulas are those of the code.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.InfoReg(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
        >>> sorted(balancing.end_epoch())
        ['growth/audio', 'growth/image', 'restraint/audio', 'restraint/image']
    """

    needs_heads = True
    excludes: ClassVar[Mapping[str, str]] = {"GradientBlending": "both set the weights of the unimodal losses"}

    def __init__(self, model: Multimodal, *, strength: float = 0.95, threshold: float = 0.05) -> None:
        super().__init__()
        check_modalities(model, "InfoReg")
        check_encoders_apart(model, "InfoReg")
        if not 0 < strength < float("inf") or not threshold >= 0:
            raise ConfigError(
                "InfoReg", expected="a finite strength > 0 and threshold >= 0",
                got=f"strength = {strength}, threshold = {threshold}",
            )  # fmt: skip
        self._model, self.strength, self.threshold = [model], strength, threshold
        count = len(model.names)
        self.register_buffer("traces", torch.zeros(WINDOW + 1, count, dtype=torch.float64))
        # In this epoch: trace of each encoder, sum of its beta, and number of steps.
        self.register_buffer("running", torch.zeros(3, count, dtype=torch.float64))
        # Keep this flag on the CPU: reading it must not sync the GPU.
        self.register_buffer("begun", torch.tensor(0))
        for index, parameter in enumerate(self._parameters_of_encoders()):
            start = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            self.register_buffer(f"start_{index}", start)

    traces: Tensor
    running: Tensor
    begun: Tensor

    def observe(self, output: Output, target: Tensor) -> None:
        """Notes the scores of each modality."""
        self.note("scores", score_sums(self._model[0], output, target, "InfoReg"))

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        """Returns the unimodal losses if they are not part of the loss yet."""
        model = self._model[0]
        if heads_train_encoders(model) and output.unimodal_logits:
            return None
        losses = unimodal_losses(model, output, target, "InfoReg").values()
        return torch.stack([loss.mean for loss in losses]).sum()

    def before_step(self) -> None:
        """Adds the pull to the gradients of the leading encoders, and to the Fisher traces the gradients before it."""
        sums = self.noted_sum("scores")
        if sums is None:
            return
        total, count = all_reduce_sum(sums)
        self.traces, self.running = self.traces.to(total.device), self.running.to(total.device)
        scores = (total / count.clamp(min=1)).double()
        growth = information_growth(self.traces)
        beta = restraint(scores, growth, strength=self.strength, threshold=self.threshold)
        size = torch.as_tensor(self.gradient_size(), device=total.device)
        begun, self.begun = bool(self.begun), torch.tensor(1)
        places = enumerate(self._parameters_of_encoders())
        for m, name in enumerate(self._model[0].names):
            trace = self.running.new_zeros(())
            for _, (index, parameter) in zip(self._model[0].encoders[name].parameters(), places, strict=False):
                if not begun:
                    self._start(index).copy_(parameter)
                if parameter.grad is None:
                    continue
                if parameter.ndim >= 2:
                    trace = trace + (parameter.grad.double() / size).square().mean()
                pull = beta[m] * size * (parameter - self._start(index).to(parameter.device))
                parameter.grad.add_(pull.to(parameter.grad))
            self.running[:, m] += torch.stack([trace, beta[m], torch.ones_like(trace)])

    def end_epoch(self) -> dict[str, float]:
        """Returns ``restraint/<name>``, the mean beta in this epoch, and ``growth/<name>``, k for the next one."""
        trace, beta, steps = self.running
        if bool(steps.any()):
            self.traces = torch.cat([self.traces[1:], trace[None]])
        self.running, self.begun = torch.zeros_like(self.running), torch.tensor(0)
        names, growth = self._model[0].names, information_growth(self.traces).tolist()
        mean = (beta / steps.clamp(min=1)).tolist()
        log = {f"restraint/{name}": value for name, value in zip(names, mean, strict=True)}
        return log | {f"growth/{name}": value for name, value in zip(names, growth, strict=True)}

    def _parameters_of_encoders(self) -> list[nn.Parameter]:
        model = self._model[0]
        return [p for name in model.names for p in model.encoders[name].parameters()]

    def _start(self, index: int) -> Tensor:
        return self.get_buffer(f"start_{index}")
