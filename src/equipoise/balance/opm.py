"""OPM: drops the modality that predicts best for part of the samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError
from ..nn.distributed import all_reduce_sum
from ..tokens.token_batch import Output, Tokens
from .balancer import Balancer, Multimodal
from .common.step_rng import step_generator, uniform_per_sample
from .common.unimodal_terms import check_modalities, discrepancy_ratio, score_sums
from .modality_dropout import keep_masks, mask_tokens, presence_mask


def drop_rates(scores: Float[Tensor, " modality"], *, q_base: float, alpha: float) -> Float[Tensor, " modality"]:
    """Returns q_m = clip(q_base (1 + alpha tanh(rho_m - 1)), 0, 1) if rho_m = s_m / mean_{n != m} s_n > 1, else 0.

    Args:
        scores: (modality,) s_m >= 0; 0 if no sample has the modality.
        q_base: rate at rho = 1.
        alpha: relative increase of the rate with rho.

    Example:
        >>> drop_rates(torch.tensor([0.6, 0.3]), q_base=0.4, alpha=0.5)
        tensor([0.5523, 0.0000])
    """
    ratio = discrepancy_ratio(scores)
    rates = (q_base * (1 + alpha * torch.tanh(ratio - 1))).clamp(0.0, 1.0)
    return torch.where(ratio > 1, rates, 0.0)


class OPM(Balancer):
    """Drops modalities that predict better than the others, at a rate that grows with their lead.

    With s_m the mean probability of the true class from modality m alone, in the previous step::

        rho_m = s_m / mean_{n != m} s_n
        q_m = clip(q_base (1 + alpha tanh(rho_m - 1)), 0, 1) if rho_m > 1, else 0
        with probability p_exe in a step:  b_im ~ Bernoulli(1 - q_m),  f_im <- b_im f_im / (1 - theta),  theta = mean q

    for all tokens of a modality; those with b = 0 are masked. The first step drops nothing.

    Args:
        model: with logits that are a sum over modalities (``Concat``, ``Sum``), or with unimodal heads.
        q_base: rate at rho = 1, >= 0.
        alpha: relative increase of the rate with rho, >= 0.
        p_exe: probability in [0, 1] that a step drops anything.
        seed: seed of the draws, which depend only on it, the step number and the sample's position in the step.

    Raises:
        ConfigError: one modality, an option out of range; in training, no source of unimodal logits.

    It helps like modality dropout, but drops only leading modalities. The factor 1 / (1 - theta) keeps the scale of the
    input of a linear head; attention is normalized anyway, and is sharpened by the factor.

    Reference: Wei, Hu, Du and Wen, "On-the-fly Modulation for Balanced Multimodal Learning" (TPAMI 2024), OPM.
    Differs from the released code in: scores of the previous step, over all processes, which need no second pass; more
    than two modalities are compared with the mean of the others, not their sum; and a sample that would lose all
    modalities keeps all of them, where the code removes it from the loss.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": torch.nn.Linear(3, 8), "image": torch.nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancing = eq.BalancerList(model, [eq.balance.OPM(model)])
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> balancing.loss(model(batch), batch["target"]).backward()
        >>> balancing.before_step()
    """

    changes_gradients = False

    def __init__(
        self, model: Multimodal, *, q_base: float = 0.4, alpha: float = 0.5, p_exe: float = 0.7, seed: int = 0
    ) -> None:
        super().__init__()
        check_modalities(model, "OPM")
        if not q_base >= 0 or not alpha >= 0 or not 0 <= p_exe <= 1:
            raise ConfigError(
                "OPM", expected="q_base >= 0, alpha >= 0 and 0 <= p_exe <= 1",
                got=f"q_base = {q_base}, alpha = {alpha}, p_exe = {p_exe}",
            )  # fmt: skip
        self._model, self.q_base, self.alpha, self.p_exe, self.seed = [model], q_base, alpha, p_exe, seed
        count = len(model.names)
        self.register_buffer("rates", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))
        # In this epoch: sum of each modality's rates, and their number.
        self.register_buffer("used", torch.zeros(count + 1, dtype=torch.float64))

    rates: Tensor
    steps: Tensor
    used: Tensor

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        """Drops modalities; all processes in the same steps."""
        present = presence_mask(tokens)
        before = self.record.sample_offset(len(present))
        random = step_generator(self.seed, int(self.steps))
        if float(torch.rand((), generator=random)) >= self.p_exe:
            return tokens
        uniform = uniform_per_sample(random, before, *present.shape)
        rates = self.rates.to(present.device)
        return mask_tokens(tokens, keep_masks(present, rates, uniform.to(present.device)), scale=1 / (1 - rates.mean()))

    @torch.no_grad()
    def observe(self, output: Output, target: Tensor) -> None:
        self.note("scores", score_sums(self._model[0], output, target, "OPM"))

    def before_step(self) -> None:
        """Updates the rates for the next step."""
        self.steps += 1
        sums = self.noted_sum("scores")
        if sums is None:
            return
        total, count = all_reduce_sum(sums)
        self.used = self.used.to(total.device) + torch.cat([self.rates.to(total), total.new_ones(1)])
        self.rates = drop_rates(total / count.clamp(min=1), q_base=self.q_base, alpha=self.alpha).double()

    def end_epoch(self) -> dict[str, float]:
        """Returns ``rate/<name>``, the mean drop rate of each modality in this epoch."""
        *sums, count = self.used.tolist()
        self.used.zero_()
        names = self._model[0].names
        return {f"rate/{name}": s / max(count, 1.0) for name, s in zip(names, sums, strict=True)}
