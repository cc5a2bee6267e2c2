"""VCD: contrasts the next-token distribution with that of a distorted image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError

STEPS = 1000
"""Number of steps of the diffusion that distorts images."""


class ContrastiveDecoding:
    """Logits processor of ``generate``: subtracts what the model would write with a distorted image.

    ::

        score(y) = (1 + alpha) log p(y | image) - alpha log p(y | distorted)  if p(y | image) >= beta max_z p(z | image)
        score(y) = -inf                                                       otherwise

    Args:
        model: the model that generates.
        distorted: its inputs with a distorted image (``diffuse_pixels``), or without one; as many samples and, unless
            they have no image, tokens as the inputs of ``generate``.
        length: number of tokens of the prompt in ``generate``.
        alpha: weight of the contrast; 0 changes only which tokens are possible.
        beta: smallest probability, relative to the most likely token; 0 permits all tokens.

    Raises:
        ConfigError: alpha < 0 or beta outside [0, 1); inputs without token ids.

    Every step runs the model on the whole distorted sequence. One sample per image; no beams.

    Reference: Leng et al., "Mitigating Object Hallucinations through Visual Contrastive Decoding" (CVPR 2024), Eq. 3
    and 5.
    Differs from the paper in: no cache of the distorted sequence.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, use_cache):
        ...         return type("Output", (), {"logits": torch.tensor([[[3.0, 0.0, 0.0]]])})
        >>> processor = ContrastiveDecoding(Model(), {"input_ids": torch.ones(1, 2).long()}, length=2, alpha=1.0)
        >>> processor(torch.ones(1, 2).long(), torch.tensor([[2.0, 1.0, -9.0]])).argmax()
        tensor(1)
    """

    def __init__(
        self, model: nn.Module, distorted: Mapping[str, Any], *, length: int, alpha: float = 1.0, beta: float = 0.1
    ) -> None:
        if alpha < 0 or not 0 <= beta < 1 or "input_ids" not in distorted:
            raise ConfigError(
                "ContrastiveDecoding", expected="alpha >= 0, 0 <= beta < 1 and inputs with input_ids",
                got=f"alpha = {alpha}, beta = {beta}, inputs {', '.join(distorted)}",
            )  # fmt: skip
        self.model, self.distorted, self.length, self.alpha, self.beta = model, dict(distorted), length, alpha, beta

    def __call__(
        self, input_ids: Int[Tensor, "batch token"], scores: Float[Tensor, "batch word"]
    ) -> Float[Tensor, "batch word"]:
        with torch.no_grad():
            logits = self.model(**self._continued(input_ids[:, self.length :]), use_cache=False).logits[:, -1]
        return contrast(scores, logits.to(scores), self.alpha, self.beta)

    def _continued(self, written: Int[Tensor, "batch token"]) -> dict[str, Any]:
        shape = self.distorted["input_ids"].shape
        inputs = dict(self.distorted)
        for name, value in self.distorted.items():
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == shape:
                # Written tokens are text: their type is 0, and they are visible.
                new = torch.full_like(written, int(name.endswith("mask"))).to(value)
                inputs[name] = torch.cat([value, written.to(value) if name == "input_ids" else new], dim=1)
        return inputs


def contrast(
    scores: Float[Tensor, "batch word"], distorted: Float[Tensor, "batch word"], alpha: float, beta: float
) -> Float[Tensor, "batch word"]:
    """Returns the contrastive scores of two rows of logits.

    Example:
        >>> contrast(torch.tensor([[2.0, 1.0, -9.0]]), torch.tensor([[3.0, 0.0, 0.0]]), 1.0, 0.1).argmax()
        tensor(1)
    """
    likely = scores.log_softmax(dim=-1)
    result = (1 + alpha) * likely - alpha * distorted.log_softmax(dim=-1)
    if beta == 0:
        return result
    return result.masked_fill(likely < likely.amax(dim=-1, keepdim=True) + math.log(beta), -math.inf)


def diffuse_pixels(pixels: Tensor, step: int = 500, *, seed: int = 0) -> Tensor:
    """Adds the noise of a diffusion to pixel values: sqrt(a) x + sqrt(1 - a) noise.

    a = prod_t (1 - b_t) up to ``step``, with b_t = sigmoid(-6 + 12 t / 999) 0.00499 + 0.00001, as in the paper's code.

    Args:
        pixels: pixel values, of any shape.
        step: number of steps, from 0 (unchanged) to 1000.
        seed: of the noise.

    Raises:
        ConfigError: step out of range.

    Reference: Leng et al. (CVPR 2024), Eq. 1 and 2.

    Example:
        >>> bool((diffuse_pixels(torch.ones(2, 3), 0) == 1).all())
        True
    """
    if not 0 <= step <= STEPS:
        raise ConfigError("diffuse_pixels step", expected=f"0 to {STEPS}", got=str(step))
    if step == 0:
        return pixels
    rates = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * 0.00499 + 0.00001
    kept = float((1 - rates[:step]).prod())
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise.to(pixels)
