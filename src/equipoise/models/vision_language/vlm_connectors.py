"""Ways from a picture's tokens into a language model, by the names that recipes have for them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ...alignment import Projector, QFormer, Resampler
from ...errors import ConfigError, unknown_name

CONNECTORS = ("linear", "mlp", "qformer", "resampler", "gated")
KINDS = {"linear": "linear", "mlp": "mlp2x_gelu"}


def build_connector(kind: str, width: int, dim: int, *, latents: int, heads: int) -> nn.Module:
    """From patches (batch, patch, width) to what stands among the words, (batch, token, dim).

    ``"linear"`` and ``"mlp"`` keep every patch; ``"qformer"`` and ``"resampler"`` make ``latents`` tokens of them; for
    ``"gated"``, where words read patches inside the language model, it does nothing.

    Args:
        kind: one of ``CONNECTORS``.
        width: of the patches.
        dim: of the language model.
        latents: tokens of a Q-Former or a resampler.
        heads: of their attention.

    Raises:
        ConfigError: an unknown kind.

    Example:
        >>> import torch
        >>> connector("resampler", 6, 8, latents=3, heads=2)(torch.zeros(2, 5, 6)).shape
        torch.Size([2, 3, 8])
    """
    if kind not in CONNECTORS:
        raise unknown_name("VisionLanguageModel", "connector", str(kind), CONNECTORS)
    if latents < 1:
        raise ConfigError("VisionLanguageModel", expected="latents >= 1", got=f"latents = {latents}")
    if kind in KINDS:
        return Projector(width, dim, kind=KINDS[kind])
    if kind == "qformer":
        return Queries(QFormer(width, dim=dim, depth=2, heads=heads, queries=latents, vocabulary=None))
    if kind == "resampler":
        return Latents(width, Resampler(dim, latents=latents, depth=2, heads=heads))
    return nn.Identity()


class Queries(nn.Module):
    """What the queries of a Q-Former found, and a layer that brings it among the words.

    Args:
        qformer: without text.
    """

    def __init__(self, qformer: QFormer) -> None:
        super().__init__()
        self.qformer, self.out = qformer, nn.Linear(qformer.dim, qformer.dim)

    def forward(self, patches: Float[Tensor, "batch patch width"]) -> Float[Tensor, "batch query dim"]:
        return self.out(self.qformer(patches).queries)


class Latents(nn.Module):
    """What the latents of a resampler found in a picture, which is a video of one frame.

    Args:
        width: of the patches.
        resampler: of the language model's width.
    """

    def __init__(self, width: int, resampler: Resampler) -> None:
        super().__init__()
        self.project, self.resampler = Projector(width, resampler.dim, kind="linear"), resampler

    def forward(self, patches: Float[Tensor, "batch patch width"]) -> Float[Tensor, "batch latent dim"]:
        return self.resampler(self.project(patches)[:, None])
