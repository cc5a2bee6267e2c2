"""ModalityCorruption: corrupts modalities in training, and trains attention to ignore corrupted ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ..data.corruptions import check_corruptions, corruption_names
from ..errors import ConfigError, unknown_name
from ..nn.distributed import rank_and_world
from ..tokens.masks import at_least_float32
from ..tokens.token_batch import Output, Tokens
from .balancer import Balancer, Multimodal
from .common.catalog_damage import damage_samples, fitting_corruptions
from .common.step_rng import step_generator, uniform_per_sample
from .common.unimodal_terms import check_modalities
from .modality_dropout import presence_mask

SCALES = 7
"""Number of noise scales: noise is constant over 1, 2, 4, ... 64 neighboring values."""


def attention_target_loss(
    share: Float[Tensor, "batch head modality"], intact: Bool[Tensor, "batch modality"]
) -> Float[Tensor, ""]:
    """Computes the cross entropy between the shares of attention and a uniform distribution over intact modalities.

    ``-mean_ih sum_m t_im log(s_ihm / sum_n s_ihn)`` with ``t_im = intact_im / sum_n intact_in``. Samples without any
    intact modality are excluded.

    Example:
        >>> attention_target_loss(torch.tensor([[[0.25, 0.75]]]), torch.tensor([[False, True]]))
        tensor(0.2877)
    """
    share = at_least_float32(share)
    normalized = share / share.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    targets = intact.to(share.dtype) / intact.sum(dim=1, keepdim=True).clamp(min=1)
    losses = -(targets[:, None] * normalized.clamp(min=1e-6).log()).sum(dim=-1).mean(dim=1)
    return losses.sum() / intact.any(dim=1).sum().clamp(min=1)


def smooth_noise(shape: tuple[int, ...], scale: int, random: torch.Generator) -> Tensor:
    """Returns standard normal noise, interpolated from a grid that is 2^scale times coarser in the last two axes.

    Scale 0 is white noise; the largest scales shift a whole input. Created on the generator's device.

    Example:
        >>> smooth_noise((3, 4, 4), 9, torch.Generator().manual_seed(0)).std(dim=(1, 2)).max() < 1e-6
        tensor(True)
    """
    if scale == 0 or len(shape) < 3:
        return torch.randn(shape, generator=random, device=random.device)
    *lead, height, width = shape
    grid = (max(1, height >> scale), max(1, width >> scale))
    noise = torch.randn(*lead, *grid, generator=random, device=random.device)
    smooth = F.interpolate(noise.flatten(0, -3)[:, None], size=(height, width), mode="bilinear", align_corners=False)
    smooth = smooth.view(shape)
    # Interpolation shrinks the variance; rescale to unit variance.
    return smooth / smooth.std().clamp(min=1e-3)


class ModalityCorruption(Balancer):
    """Corrupts modalities in training and trains attention to spread over the intact ones.

    With ``probability`` each modality of a sample is corrupted, but never all modalities of a sample. A fraction
    ``replace_prob`` of the corrupted inputs is replaced by noise (destroyed); the others are mixed with noise to a
    random degree and count as intact::

        x <- sqrt(1 - d^2) x + d noise,     d = 1 if destroyed, else d ~ U(0, 1)
        L = L_task + weight * attention_target_loss(share, not destroyed)

    Noise has the mean and standard deviation of the modality's valid values in the batch. Noise that replaces an input
    is white; noise that is mixed in has, with ``multiscale_noise``, a random scale per step: from single values to the
    whole input, which then becomes slightly louder, brighter or darker. Inputs that are not floating-point tensors
    (token ids) are never corrupted.

    With ``corruptions``, names of the catalog ``equipoise.diagnostics.corruptions`` replace this noise: in each step
    one of them, drawn at random for each modality, destroys inputs at severity 5, and another one damages the others at
    a random severity. Only corruptions after which nothing of the input is left destroy; token ids are corrupted as
    well.

    Args:
        model: any fusion; attention is trained if the fusion has shares, otherwise inputs are only corrupted.
        probability: probability in [0, 1] of corruption for each sample and modality.
        replace_prob: fraction in [0, 1] of the corrupted inputs that are replaced by noise.
        weight: weight of the attention loss; 0 only corrupts inputs.
        multiscale_noise: mix in noise of random scale; False uses white noise.
        corruptions: names of the catalog to use in place of noise; those that do not fit a modality are skipped for it.
        kinds: modality -> kind of input for the catalog, where the shape does not determine it (spectrograms).
        seed: seed of all random numbers, together with the step number.

    Raises:
        ConfigError: one modality; numbers out of range; an unknown corruption or kind of input.

    Attention learns to ignore destroyed modalities, so that the fused model falls back on the others; multi-scale noise
    also regularizes the encoders. It reduces accuracy if inputs are always clean and plentiful. Destroyed inputs are
    noise: attention need not detect other kinds of corruption.

    Reference: ours; the noise is that of the noise test of RollingQ (ICML 2025), section 4.
    Differs from the paper in: the paper uses this noise only at test time; training with it is our addition.

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
        multiscale_noise: bool = True, seed: int = 0, corruptions: list[str] | None = None,
        kinds: dict[str, str] | None = None,
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
        self.corruptions, self.kinds = corruptions, kinds or {}
        check_corruptions(corruptions or (), "ModalityCorruption")
        for name, kind in self.kinds.items():
            if name not in self.names:
                raise unknown_name("ModalityCorruption", "modality", name, self.names)
            corruption_names(kind)
        if corruptions is not None and not corruptions:
            raise ConfigError("ModalityCorruption", expected="one or more corruptions, or None", got="none")
        self.register_buffer("steps", torch.tensor(0))

    steps: Tensor

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(batch, Mapping) or any(name not in batch for name in self.names):
            return batch  # invalid batch: let the model raise the error
        present = _present_modalities(batch, self.names)
        before = self.record.sample_offset(len(present))
        draws = uniform_per_sample(
            step_generator(self.seed, int(self.steps)), before, len(present), 2 * len(self.names) + 2
        )
        random = self._noise_generator(before)
        if self.corruptions is not None:
            return self._prepare_from_catalog(batch, draws, present, random)
        corruptible = torch.tensor([_is_corruptible(batch[name]) for name in self.names])
        degree, destroyed = self._degrees(draws, present, corruptible)
        self.keep("destroyed", destroyed)
        result = dict(batch)
        for index, name in enumerate(self.names):
            if corruptible[index]:
                valid = _valid_values(batch, name, present[:, index])
                result[name] = self._mix_noise(batch[name], degree[:, index], valid, random)
        return result

    def _prepare_from_catalog(
        self,
        batch: Mapping[str, Any],
        draws: Float[Tensor, "batch draw"],
        present: Bool[Tensor, "batch modality"],
        random: torch.Generator,
    ) -> Mapping[str, Any]:
        """Corrupts a batch with the corruptions of the catalog that fit its inputs."""
        fitting = [
            fitting_corruptions(batch[name], self.corruptions or (), self.kinds.get(name), name) for name in self.names
        ]
        degree, destroyed = self._degrees(draws, present, torch.tensor([bool(names) for _, names in fitting]))
        result = dict(batch)
        for index, (name, (kind, names)) in enumerate(zip(self.names, fitting, strict=True)):
            if names:
                valid = _valid_values(batch, name, present[:, index])
                destroyed[:, index] = damage_samples(
                    result, name, kind, names, degree[:, index], destroyed[:, index], valid, random
                )
        self.keep("destroyed", destroyed)
        return result

    def _noise_generator(self, before: int) -> torch.Generator:
        """Returns a generator seeded by batch, step, process and seed; ``before`` counts the step's earlier samples."""
        stream = rank_and_world()[0] + 4096 * self.seed
        number = 1_000_003 + int(self.steps) * 65_537 + before + stream * 2**44
        return torch.Generator().manual_seed(number % 2**63)

    def _degrees(
        self,
        draws: Float[Tensor, "batch draw"],
        present: Bool[Tensor, "batch modality"],
        corruptible: Bool[Tensor, " modality"],
    ) -> tuple[Float[Tensor, "batch modality"], Bool[Tensor, "batch modality"]]:
        """Returns the degree of corruption of each modality of each sample, and which are destroyed."""
        count = len(self.names)
        corrupted = (draws[:, :count] < self.probability) & corruptible & present
        # If all modalities of a sample were selected, keep one of them at random.
        chosen = (draws[:, 2 * count] * present.sum(dim=1)).long()[:, None]
        spared = present & (present.cumsum(dim=1) - 1 == chosen)
        corrupted &= ~((corrupted == present).all(dim=1, keepdim=True) & spared)
        # One uniform number decides both: below replace_prob the input is destroyed, the rest is rescaled to the
        # degree.
        u = draws[:, count : 2 * count]
        destroyed = corrupted & (u < self.replace_prob)
        degree = torch.where(destroyed, 1.0, (u - self.replace_prob) / max(1.0 - self.replace_prob, 1e-12))
        return torch.where(corrupted, degree.clamp(0.0, 1.0), 0.0), destroyed

    def _mix_noise(
        self,
        values: Tensor,
        degree: Float[Tensor, " batch"],
        usable: Bool[Tensor, "batch ..."],
        random: torch.Generator,
    ) -> Tensor:
        white = torch.randn(values.shape, generator=random)
        noise = white
        if self.multiscale_noise:
            scale = int(torch.randint(SCALES, (1,), generator=random))
            coarse = smooth_noise(tuple(values.shape), scale, random)
            noise = torch.where(_expand_to(degree >= 1, values), white, coarse)
        # Placeholders of missing modalities and padding are excluded from the noise statistics.
        valid = values if bool(usable.all()) else values[usable.to(values.device)]
        if valid.numel() < 2:
            return values
        deviation, mean = torch.std_mean(valid)
        degree = _expand_to(degree, values).to(values)
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


def _expand_to(per_sample: Tensor, values: Tensor) -> Tensor:
    """Reshapes (batch,) so that it broadcasts with (batch, ...)."""
    return per_sample.view(-1, *[1] * (values.ndim - 1))


def _in_order(tokens: Mapping[str, Tokens], names: tuple[str, ...]) -> dict[str, Tokens]:
    return {name: tokens[name] for name in names}


def _is_corruptible(values: Any) -> bool:
    return isinstance(values, Tensor) and values.is_floating_point()


def _present_modalities(batch: Mapping[str, Any], names: tuple[str, ...]) -> Bool[Tensor, "batch modality"]:
    """Returns which modalities each sample has, from the inputs and ``batch["mask"]``; on the CPU, as the draws."""
    sizes = []
    for name in names:
        parts = list(batch[name].values()) if isinstance(batch[name], Mapping) else [batch[name]]
        sizes += [len(part) for part in parts[:1] if isinstance(part, Tensor)]
    present = torch.ones(sizes[0] if sizes else 0, len(names), dtype=torch.bool)
    masks = batch.get("mask")
    for index, name in enumerate(names):
        if batch[name] is None:
            present[:, index] = False
        elif isinstance(masks, Mapping) and isinstance(masks.get(name), Tensor):
            present[:, index] = (
                masks[name].bool().flatten(1).any(dim=1).cpu() if masks[name].ndim > 1 else masks[name].cpu()
            )
    return present


def _valid_values(batch: Mapping[str, Any], name: str, present: Bool[Tensor, " batch"]) -> Bool[Tensor, "batch ..."]:
    """Returns the valid tokens of an input if ``batch["mask"]`` is a mask of tokens, otherwise the valid samples."""
    masks, values = batch.get("mask"), batch[name]
    mask = masks.get(name) if isinstance(masks, Mapping) else None
    if isinstance(mask, Tensor) and values.ndim == 3 and mask.shape == values.shape[:2]:
        return mask.bool()
    return present
