"""Connectors between an image encoder and a language model, by their names in recipes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ...alignment import Projector, QFormer, Resampler
from ...errors import ConfigError, unknown_name

CONNECTORS = ("linear", "mlp", "qformer", "resampler", "gated")
KINDS = {"linear": "linear", "mlp": "mlp2x_gelu"}


def build_connector(kind: str, width: int, dim: int, *, latents: int, heads: int) -> nn.Module:
    """Builds a module that maps patches (batch, patch, width) to tokens of the language model (batch, token, dim).

    ``"linear"`` and ``"mlp"`` keep every patch; ``"qformer"`` and ``"resampler"`` reduce them to ``latents`` tokens;
    ``"gated"`` is the identity, since the gated layers inside the language model attend to the patches.

    Args:
        kind: one of ``CONNECTORS``.
        width: width of the patches.
        dim: width of the language model.
        latents: number of tokens of a Q-Former or a resampler.
        heads: number of their attention heads.

    Raises:
        ConfigError: an unknown kind.

    Example:
        >>> import torch
        >>> build_connector("resampler", 6, 8, latents=3, heads=2)(torch.zeros(2, 5, 6)).shape
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
    """The output queries of a Q-Former, projected to the language model's embeddings.

    Args:
        qformer: Q-Former without text.
    """

    def __init__(self, qformer: QFormer) -> None:
        super().__init__()
        self.qformer, self.out = qformer, nn.Linear(qformer.dim, qformer.dim)

    def forward(self, patches: Float[Tensor, "batch patch width"]) -> Float[Tensor, "batch query dim"]:
        return self.out(self.qformer(patches).queries)


class Latents(nn.Module):
    """The latents of a resampler applied to an image as a video of one frame.

    Args:
        width: width of the patches.
        resampler: resampler of the language model's width.
    """

    def __init__(self, width: int, resampler: Resampler) -> None:
        super().__init__()
        self.project, self.resampler = Projector(width, resampler.dim, kind="linear"), resampler

    def forward(self, patches: Float[Tensor, "batch patch width"]) -> Float[Tensor, "batch latent dim"]:
        return self.resampler(self.project(patches)[:, None])
