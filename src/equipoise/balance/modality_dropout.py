"""Modality dropout: drops random modalities of samples before the fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..tokens.token_batch import Tokens
from .balancer import Balancer, Multimodal
from .common.step_rng import step_generator, uniform_per_sample
from .common.unimodal_terms import check_modalities


def keep_masks(
    present: Bool[Tensor, "batch modality"],
    rates: Float[Tensor, " modality"],
    uniform: Float[Tensor, "batch modality"],
) -> Bool[Tensor, "batch modality"]:
    """Returns keep_im = u_im >= p_m; samples that would lose all modalities keep all of them.

    Args:
        present: which modalities each sample has.
        rates: p_m in [0, 1].
        uniform: u_im, drawn from [0, 1).

    Example:
        >>> present, u = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0.1, 0.9], [0.3, 0.2]])
        >>> keep_masks(present, torch.tensor([0.5, 0.5]), u)
        tensor([[False,  True],
                [ True,  True]])
    """
    mask = present & (uniform >= rates)
    return torch.where(mask.any(dim=1, keepdim=True), mask, present)


def mask_tokens(
    tokens: Mapping[str, Tokens], mask: Bool[Tensor, "batch modality"], *, scale: Tensor | float = 1.0
) -> dict[str, Tokens]:
    """Masks the tokens of samples and modalities where ``mask`` is False; multiplies values by ``scale``."""
    return {
        name: replace(part, values=part.values * scale, mask=part.valid() & mask[:, index, None])
        for index, (name, part) in enumerate(tokens.items())
    }


def presence_mask(tokens: Mapping[str, Tokens]) -> Bool[Tensor, "batch modality"]:
    """Returns which modalities each sample has."""
    return torch.stack([part.valid().any(dim=1) for part in tokens.values()], dim=1)


class ModalityDropout(Balancer):
    """Drops whole modalities of samples in training, so that the model cannot rely on a single one.

    Independently for each sample and modality::

        keep_im ~ Bernoulli(1 - p_m);   tokens of modality m of sample i are masked if keep_im = 0

    A sample that would lose all modalities keeps all of them. Values are not rescaled. In evaluation, or if every p is
    0, it does nothing.

    Args:
        model: any fusion.
        p: drop rate in [0, 1], or name -> rate; modalities without a rate are never dropped.
        seed: seed of the draws, which depend only on it, the step number and the sample's position in the step.

    Raises:
        ConfigError: one modality, a rate out of range, an unknown name (with the closest known one).

    It helps if samples lack modalities at test time, and if one modality dominates from the start. It hides
    interactions between modalities, and a high rate reduces the amount of data. Training loss and accuracy are those of
    incomplete samples: compare on validation data.

    Reference: modality dropout, ModDrop of Neverova, Wolf, Taylor and Nebout, "ModDrop: Adaptive Multi-modal Gesture
    Recognition" (TPAMI 2016).
    Differs from the released code in: tokens are masked, where others use zeros, to which attention would still attend;
    and a sample that would lose all modalities keeps all, where others keep one at random.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.JointAttention(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.ModalityDropout(model, p={"audio": 1.0})])
        >>> tokens = model({"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5)}).tokens
        >>> {name: int(part.present().sum()) for name, part in tokens.items()}
        {'audio': 0, 'image': 4}
    """

    name = "modality_dropout"
    changes_gradients = False

    def __init__(self, model: Multimodal, *, p: float | Mapping[str, float] = 0.2, seed: int = 0) -> None:
        super().__init__()
        check_modalities(model, "ModalityDropout")
        rates = dict(p) if isinstance(p, Mapping) else dict.fromkeys(model.names, p)
        for name, rate in rates.items():
            if name not in model.names:
                raise unknown_name("ModalityDropout", "modality", str(name), model.names)
            if not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ConfigError("ModalityDropout", expected="0 <= p <= 1", got=f"p = {rate!r} for '{name}'")
        self.rates, self.seed = {name: float(rates.get(name, 0.0)) for name in model.names}, seed
        self.register_buffer("steps", torch.tensor(0))

    steps: Tensor

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        if not any(self.rates.values()):
            return tokens
        present = presence_mask(tokens)
        uniform = uniform_per_sample(
            step_generator(self.seed, int(self.steps)), self.record.sample_offset(len(present)), *present.shape
        )
        rates = torch.tensor([self.rates[name] for name in tokens])
        return mask_tokens(tokens, keep_masks(present, rates.to(present.device), uniform.to(present.device)))

    def before_step(self) -> None:
        self.steps += 1
