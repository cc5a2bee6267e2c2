"""Greedy: gates between modalities, held fixed for modalities that learn mostly through the other modalities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..errors import ConfigError
from .balancer import Balancer, Multimodal
from .common.cross_gate import CrossGate, GatedTokens
from .common.unimodal_terms import check_encoders_apart, check_modalities


def learning_speed(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """Returns one step's contribution to the learning speed: |gradient|^2 / |parameters|^2 over all parameters.

    It is 0 if gradients overflowed, as under fp16 before the loss scale has settled; the optimizer skips such a step.

    Example:
        >>> parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> parameter.grad = torch.tensor([0.0, 5.0])
        >>> learning_speed([parameter])
        tensor(1.)
    """
    group = list(parameters)
    weight = get_total_norm([p.detach() for p in group]).square()
    change = get_total_norm([p.grad for p in group if p.grad is not None]).square()
    speed = change.to(weight) / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(speed.isfinite(), speed, 0.0)


def bypass_lead(
    main: Float[Tensor, " modality"], bypass: Float[Tensor, " modality"]
) -> tuple[Float[Tensor, " modality"], Float[Tensor, " modality"]]:
    """Returns how much faster each modality's gate learns than its encoder, and its lead over the others.

    Args:
        main: (modality,) learning speeds of the encoders.
        bypass: (modality,) learning speeds of the gates between modalities.

    Returns:
        BDR = log10(bypass / main), and each modality's BDR minus the mean of the others'.

    Example:
        >>> bypass_lead(torch.tensor([1.0, 1.0]), torch.tensor([100.0, 10.0]))
        (tensor([2., 1.]), tensor([ 1., -1.]))
    """
    tiny = torch.finfo(main.dtype).tiny
    rate = bypass.clamp(min=tiny).log10() - main.clamp(min=tiny).log10()
    return rate, rate - (rate.sum() - rate) / (len(rate) - 1)


class Greedy(Balancer):
    """Gates each modality by all modalities, and freezes the gate of the modality that relies on it most.

    z = relu(S [f_1; ...; f_N] + s) squeezes the pooled vectors, g_m = 2 sigmoid(E_m z + e_m) scales the tokens of
    modality m before the fusion. Over the steps so far, with "main" the encoder and "bypass" the E_m of a modality::

        speed = sum over steps of |gradient|^2 / |parameters|^2
        BDR_m = log10(speed_bypass,m / speed_main,m),   lead_m = BDR_m - mean_{n != m} BDR_n

    If the largest lead exceeds the threshold, that modality's gate is fixed to its running mean for ``window`` steps.

    Args:
        model: its ``fusion`` is replaced by a gated one, with new parameters ``fusion.gate`` that are saved in
            checkpoints and used in evaluation. Create the optimizer afterward.
        window: number of steps for which a gate is held; the next decision follows after one more step.
        threshold: threshold of the lead, >= 0.
        ratio: width of all pooled vectors together, times 2, divided by the width of the squeezed vector.

    Raises:
        ConfigError: one modality, an option out of range, a second Greedy on one model.

    It helps if a modality is used mostly through its gate and its encoder stays undertrained. It changes the
    architecture: compare with the gates alone (infinite ``threshold``), not with the plain fusion.

    Reference: Wu, Jastrzebski, Cho and Geras, "Characterizing and overcoming the greedy nature of learning in
    multi-modal deep neural networks" (ICML 2022).
    Differs from the released code in: one gate on tokens before any fusion instead of four between convolutions,
    any number of modalities; the running mean is over all steps, where the released code restarts it at each call.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancer = eq.balance.Greedy(model, window=5)
        >>> model.fusion.attention.dim, sorted({name.split(".")[0] for name in model.fusion.state_dict()})
        (8, ['gate', 'inner'])
    """

    notes_in_forward = True
    changes_gradients = False
    excludes: ClassVar[Mapping[str, str]] = {
        "MLA": "it trains on vectors before the gates",
        "ReconBoost": "it trains on vectors before the gates",
    }

    def __init__(self, model: Multimodal, *, window: int = 5, threshold: float = 1e-3, ratio: float = 4.0) -> None:
        super().__init__()
        check_modalities(model, "Greedy")
        check_encoders_apart(model, "Greedy")
        if window < 1 or not threshold >= 0 or not ratio > 0:
            raise ConfigError(
                "Greedy", expected="window >= 1, threshold >= 0 and ratio > 0",
                got=f"window = {window}, threshold = {threshold}, ratio = {ratio}",
            )  # fmt: skip
        if isinstance(model.fusion, GatedTokens):
            raise ConfigError("Greedy", expected="one Greedy for each model", got="a second one")
        self.window, self.threshold = window, threshold
        like = next(model.head.parameters())
        gate = CrossGate(model.names, model.fusion.dim, ratio).to(like.device, like.dtype)
        gate.note = self.note
        model.fusion = GatedTokens(model.fusion, gate)
        self._model, count = [model], len(model.names)
        self.register_buffer("main", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("bypass", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("left", torch.tensor(0))
        self.register_buffer("held_steps", torch.zeros(count, dtype=torch.long))

    main: Tensor
    bypass: Tensor
    left: Tensor
    held_steps: Tensor

    @torch.no_grad()
    def before_step(self) -> None:
        """Accumulates learning speeds and decides which gate to hold, without a GPU sync."""
        model, gate = self._model[0], self._model[0].fusion.gate
        self.to(gate.held.device)
        sums = self.noted_sum("gates")
        if sums is not None:
            gate.update_running_mean(sums)
        scale = self.gradient_size()
        for index, name in enumerate(model.names):
            self.main[index] += learning_speed(model.encoders[name].parameters()) / scale**2
            self.bypass[index] += learning_speed(gate.excite[name].parameters()) / scale**2
        self.held_steps += gate.held
        _, lead = bypass_lead(self.main, self.bypass)
        starts = (self.left == 0) & (lead.max() > self.threshold)
        self.left.copy_(torch.where(starts, self.window, (self.left - 1).clamp(min=0)))
        leader = torch.arange(len(lead), device=lead.device) == lead.argmax()
        gate.held.copy_(torch.where(starts, leader, gate.held & (self.left > 0)))

    def end_epoch(self) -> dict[str, float]:
        """Returns ``bdr/<name>`` so far, and ``held/<name>``, the number of steps in this epoch with a held gate."""
        rates, _ = bypass_lead(self.main, self.bypass)
        names = self._model[0].names
        log = {f"bdr/{name}": rate for name, rate in zip(names, rates.tolist(), strict=True)}
        log |= {f"held/{name}": float(steps) for name, steps in zip(names, self.held_steps.tolist(), strict=True)}
        self.held_steps.zero_()
        return log
