"""Modality dropout: samples of which the fusion sees some modalities only."""

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
    """keep_im where u_im >= p_m; a sample that would be left with nothing keeps all that it has.

    Args:
        present: which modalities each sample has.
        rates: p_m in [0, 1].
        uniform: u_im, drawn from [0, 1).

    Example:
        >>> has, drawn = torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0.1, 0.9], [0.3, 0.2]])
        >>> keep_masks(has, torch.tensor([0.5, 0.5]), drawn)
        tensor([[False,  True],
                [ True,  True]])
    """
    kept = present & (uniform >= rates)
    return torch.where(kept.any(dim=1, keepdim=True), kept, present)


def mask_tokens(
    tokens: Mapping[str, Tokens], kept: Bool[Tensor, "batch modality"], *, scale: Tensor | float = 1.0
) -> dict[str, Tokens]:
    """The tokens, of which those of other samples than the kept ones take no part any more; values times ``scale``."""
    return {
        name: replace(part, values=part.values * scale, mask=part.valid() & kept[:, place, None])
        for place, (name, part) in enumerate(tokens.items())
    }


def presence_mask(tokens: Mapping[str, Tokens]) -> Bool[Tensor, "batch modality"]:
    """Which modalities each sample has."""
    return torch.stack([part.valid().any(dim=1) for part in tokens.values()], dim=1)


class ModalityDropout(Balancer):
    """Takes whole modalities away from single samples in training, so that none can be leaned on alone.

    For every sample and modality, drawn alone::

        keep_im ~ Bernoulli(1 - p_m);   tokens of modality m of sample i are masked where keep_im = 0

    A sample that would be left with nothing keeps all that it has. Nothing is rescaled. In evaluation, or where every
    p is 0, nothing happens.

    Args:
        model: any fusion.
        p: rate in [0, 1] at which modalities are dropped, or name -> rate; those not named are never dropped.
        seed: of what is dropped, which depends on it, the number of the step and the sample's place in the step alone.

    Raises:
        ConfigError: one modality, a rate out of range. A name that the model lacks is told with the closest.

    It helps where samples will lack modalities later, and against one modality that drowns the others from the start.
    It hides what shows only in several modalities together, and a high rate is simply less data. Loss and accuracy of
    training are those of poorer samples: compare by validation.

    Reference: modality dropout, ModDrop of Neverova, Wolf, Taylor and Nebout, "ModDrop: Adaptive Multi-modal Gesture
    Recognition" (TPAMI 2016); spec 7.9.
    Differs from the released code in: tokens are masked, where others put zeros, which attention would still read; and
    an emptied sample is left whole, where others draw one modality to keep.

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
        has = presence_mask(tokens)
        uniform = uniform_per_sample(
            step_generator(self.seed, int(self.steps)), self.record.place(len(has)), *has.shape
        )
        rates = torch.tensor([self.rates[name] for name in tokens])
        return mask_tokens(tokens, keep_masks(has, rates.to(has.device), uniform.to(has.device)))

    def before_step(self) -> None:
        self.steps += 1
