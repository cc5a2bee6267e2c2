"""ModalityCorruption: modalities are damaged in training, and attention is told which of them still hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed
from torch.nn import functional as F

from ..errors import ConfigError
from ..tokens.token_batch import Output, Tokens
from .balancer import Balancer, Multimodal
from .common.step_rng import step_generator, uniform_per_sample
from .common.unimodal_terms import check_modalities
from .modality_dropout import presence_mask

SCALES = 7
"""Coarse noise varies over 1, 2, 4, ... 64 neighboring values."""


def attention_target_loss(
    share: Float[Tensor, "batch head modality"], intact: Bool[Tensor, "batch modality"]
) -> Float[Tensor, ""]:
    """Cross entropy between the shares of attention and an even spread over the modalities that are intact.

    ``-mean_ih sum_m t_im log(s_ihm / sum_n s_ihn)`` with ``t_im = intact_im / sum_n intact_in``. A sample without any
    intact modality does not count.

    Example:
        >>> attention_target_loss(torch.tensor([[[0.25, 0.75]]]), torch.tensor([[False, True]]))
        tensor(0.2877)
    """
    share = share.to(torch.promote_types(share.dtype, torch.float32))
    among = share / share.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    wanted = intact.to(share.dtype) / intact.sum(dim=1, keepdim=True).clamp(min=1)
    losses = -(wanted[:, None] * among.clamp(min=1e-6).log()).sum(dim=-1).mean(dim=1)
    return losses.sum() / intact.any(dim=1).sum().clamp(min=1)


def smooth_noise(shape: tuple[int, ...], scale: int, random: torch.Generator) -> Tensor:
    """Standard normal noise, constant over squares of 2^scale neighbors in the last two axes and smooth between them.

    Scale 0 is white; the largest moves a replace_prob input up or down. Made on the generator's device.

    Example:
        >>> smooth_noise((3, 4, 4), 9, torch.Generator().manual_seed(0)).std(dim=(1, 2)).max() < 1e-6
        tensor(True)
    """
    if scale == 0 or len(shape) < 3:
        return torch.randn(shape, generator=random, device=random.device)
    *lead, height, width = shape
    small = (max(1, height >> scale), max(1, width >> scale))
    noise = torch.randn(*lead, *small, generator=random, device=random.device)
    smooth = F.interpolate(noise.flatten(0, -3)[:, None], size=(height, width), mode="bilinear", align_corners=False)
    smooth = smooth.view(shape)
    # Interpolation averages; what it took from the size of the noise is given back.
    return smooth / smooth.std().clamp(min=1e-3)


class ModalityCorruption(Balancer):
    """Damages modalities in training and teaches attention, which knows it, to spread over those that are intact.

    With probability ``probability`` each modality of a sample is hit, but never all of one sample. Of the hits a part
    ``replace_prob`` is replaced by noise (destroyed); the others are mixed with it by a random degree and count as intact::

        x <- sqrt(1 - d^2) x + d noise,     d = 1 where destroyed, else d ~ U(0, 1)
        L = L_task + weight * attention_target_loss(share, not destroyed)

    Noise has the mean and deviation of the modality in the batch. Where it destroys it is white; where it is mixed in
    it is, with ``scales``, as coarse as a die says for the step: from single values to the replace_prob input, which is then a
    little louder, brighter or darker. Inputs that are no floating-point tensors (words) are never hit.

    Args:
        model: any fusion; attention is taught where it has shares, elsewhere only the damage is done.
        probability: in [0, 1], of a hit for each sample and modality.
        replace_prob: in [0, 1], part of the hits that destroy.
        weight: of the witness loss; 0 leaves attention to find out by itself.
        scales: mix in noise of every coarseness; False keeps it white.
        seed: of everything that is drawn, with the number of the step.

    Raises:
        ConfigError: one modality; numbers out of range.

    Exposed and taught, attention leaves a destroyed modality and the fused model falls back on the others; noise of
    every scale also keeps encoders from what is particular to their training data. It costs accuracy where inputs are
    always clean and plenty, and what it calls destroyed is noise: attention need not notice damage of another kind.

    Reference: ours; the noise is that of RollingQ's test (ICML 2025), section 4.
    Differs from the paper in: it is no part of it; the paper's noise comes in testing alone.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2, unimodal="ensemble")
        >>> balancing = eq.BalancerList(model, [eq.balance.ModalityCorruption(model, probability=1.0)])
        >>> output = model({"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5)})
        >>> bool(balancing.loss(output, torch.tensor([0, 1, 0, 1])) > 0)
        True
    """

    name = "corruption"

    changes_gradients = False

    def __init__(
        self, model: Multimodal, *, probability: float = 0.4, replace_prob: float = 0.5, weight: float = 1.0,
        multiscale_noise: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_modalities(model, "ModalityCorruption")
        if not (0 <= probability <= 1 and 0 <= replace_prob <= 1 and weight >= 0):
            raise ConfigError(
                "ModalityCorruption",
                expected="0 <= probability <= 1, 0 <= replace_prob <= 1 and weight >= 0",
                got=f"probability = {probability}, replace_prob = {replace_prob}, weight = {weight}",
            )
        self.probability, self.replace_prob, self.weight, self.multiscale_noise, self.seed = (
            probability,
            replace_prob,
            weight,
            multiscale_noise,
            seed,
        )
        self.names = model.names
        self.register_buffer("steps", torch.tensor(0))

    steps: Tensor

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(batch, Mapping) or any(name not in batch for name in self.names):
            return batch  # of which the model tells what is wrong with it
        has = _who_has(batch, self.names)
        before = self.record.place(len(has))
        draws = uniform_per_sample(
            step_generator(self.seed, int(self.steps)), before, len(has), 2 * len(self.names) + 2
        )
        random = self._noise_generator(before)
        open_to = torch.tensor([_can_be_hit(batch[name]) for name in self.names])
        degree, destroyed = self._degrees(draws, has, open_to)
        self.keep("destroyed", destroyed)
        exposed = dict(batch)
        for place, name in enumerate(self.names):
            if open_to[place]:
                exposed[name] = self._mixed(batch[name], degree[:, place], has[:, place], random)
        return exposed

    def _noise_generator(self, before: int) -> torch.Generator:
        """Of this batch, step, process and seed alone; ``before`` are the samples of the step's earlier batches."""
        several = distributed.is_available() and distributed.is_initialized()
        stream = (distributed.get_rank() if several else 0) + 4096 * self.seed
        number = 1_000_003 + int(self.steps) * 65_537 + before + stream * 2**44
        return torch.Generator().manual_seed(number % 2**63)

    def _degrees(
        self,
        draws: Float[Tensor, "batch draw"],
        has: Bool[Tensor, "batch modality"],
        open_to: Bool[Tensor, " modality"],
    ) -> tuple[Float[Tensor, "batch modality"], Bool[Tensor, "batch modality"]]:
        """How much each modality of each sample is damaged, and which are destroyed."""
        count = len(self.names)
        hit = (draws[:, :count] < self.probability) & open_to & has
        # Where all that a sample has is hit, one of them, as a die says, is spared.
        chosen = (draws[:, 2 * count] * has.sum(dim=1)).long()[:, None]
        spared = has & (has.cumsum(dim=1) - 1 == chosen)
        hit &= ~((hit == has).all(dim=1, keepdim=True) & spared)
        # One number says both: below `replace_prob` it destroys, above it, stretched to (0, 1), it is the degree.
        drawn = draws[:, count : 2 * count]
        destroyed = hit & (drawn < self.replace_prob)
        degree = torch.where(destroyed, 1.0, (drawn - self.replace_prob) / max(1.0 - self.replace_prob, 1e-12))
        return torch.where(hit, degree.clamp(0.0, 1.0), 0.0), destroyed

    def _mixed(
        self, values: Tensor, degree: Float[Tensor, " batch"], has: Bool[Tensor, " batch"], random: torch.Generator
    ) -> Tensor:
        white = torch.randn(values.shape, generator=random)
        noise = white
        if self.multiscale_noise:
            scale = int(torch.randint(SCALES, (1,), generator=random))
            coarse = smooth_noise(tuple(values.shape), scale, random)
            noise = torch.where(_beside(degree >= 1, values), white, coarse)
        # What stands in for a missing modality is no measure of noise.
        seen = values if bool(has.all()) else values[has.to(values.device)]
        if seen.numel() < 2:
            return values
        deviation, mean = torch.std_mean(seen)
        degree = _beside(degree, values).to(values)
        noise = mean + deviation * noise.to(values)
        return torch.where(degree > 0, (1 - degree**2).clamp(min=0).sqrt() * values + degree * noise, values)

    def penalty(self, output: Output, target: Tensor) -> Tensor | None:
        destroyed = self.kept("destroyed", output)
        if output.share is None or destroyed is None or self.weight == 0:
            return None
        intact = presence_mask(_in_order(output.tokens, self.names)) & ~destroyed.to(output.share.device)
        return self.weight * attention_target_loss(output.share, intact)

    def before_step(self) -> None:
        self.steps += 1


def _beside(per_sample: Tensor, values: Tensor) -> Tensor:
    """(batch,) shaped so that it broadcasts with (batch, ...)."""
    return per_sample.view(-1, *[1] * (values.ndim - 1))


def _in_order(tokens: Mapping[str, Tokens], names: tuple[str, ...]) -> dict[str, Tokens]:
    return {name: tokens[name] for name in names}


def _can_be_hit(values: Any) -> bool:
    return isinstance(values, Tensor) and values.is_floating_point()


def _who_has(batch: Mapping[str, Any], names: tuple[str, ...]) -> Bool[Tensor, "batch modality"]:
    """Which modalities each sample has, as the inputs and ``batch["mask"]`` say; on the CPU, where dice are thrown."""
    sizes = []
    for name in names:
        parts = list(batch[name].values()) if isinstance(batch[name], Mapping) else [batch[name]]
        sizes += [len(part) for part in parts[:1] if isinstance(part, Tensor)]
    has = torch.ones(sizes[0] if sizes else 0, len(names), dtype=torch.bool)
    masks = batch.get("mask")
    for place, name in enumerate(names):
        if batch[name] is None:
            has[:, place] = False
        elif isinstance(masks, Mapping) and isinstance(masks.get(name), Tensor):
            has[:, place] = (
                masks[name].bool().flatten(1).any(dim=1).cpu() if masks[name].ndim > 1 else masks[name].cpu()
            )
    return has
