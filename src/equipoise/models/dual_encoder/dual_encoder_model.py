"""Dual encoder: embeds several modalities in one space with a contrastive loss, as in CLIP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...alignment import InfoNCE, SigLIP
from ...errors import ConfigError, NonFiniteError, ShapeError, unknown_name
from ...io.class_registry import instantiate
from ...nn.eval_mode import eval_mode_no_grad
from ...tokens.masks import bool_mask, without_masked, zero_loss
from ...tokens.token_batch import Tokens, as_tokens
from ..self_contained import SelfContainedModel
from .dual_encoder_metrics import evaluate_dual_encoder

LOSSES = {"info_nce": InfoNCE, "siglip": SigLIP}


class DualEncoder(SelfContainedModel):
    """Embeds two or more modalities as unit vectors of one space, trained with a contrastive loss::

        u_m  = unit(pool(encoder_m(x_m)) A_m)
        loss = mean over pairs of modalities of info_nce(u_m, u_n) or siglip(u_m, u_n)

    Samples with the same target are positives of each other and never negatives. A modality is missing if the batch
    does not contain it, or if a sample has no valid token of it, such as an empty caption or by ``batch["mask"]``; the
    loss uses the modalities that are present.

    Args:
        encoders: modality -> encoder; each has an attribute ``dim``.
        dim: width of the embedding space.
        loss: ``"info_nce"``, a softmax over the batch, or ``"siglip"``, a binary loss for each pair.
        scale: initial value of the learned scale of the cosines; the default of the loss if None.
        bias: initial value of the learned bias of "siglip".
        smoothing: label smoothing of "info_nce", in [0, 1).
        anchor: compare only this modality with every other one; None compares all pairs.
        dropout: dropout of the pooled tokens.

    Raises:
        ConfigError: fewer than two encoders, one without ``dim``, an unknown loss, an option of the other one; in
            ``losses``, a batch with fewer than two modalities. ShapeError: modalities with different numbers of
            samples, or inputs of a wrong shape. NonFiniteError: NaN in an input, with the modality's name.

    Reference: Radford et al., CLIP (ICML 2021); Zhai et al., SigLIP (ICCV 2023).
    Differs from CLIP in: any number of modalities; samples with the same target are positives.

    Example:
        >>> from equipoise.encoders import PatchEncoder, TextEncoder
        >>> encoders = {
        ...     "image": PatchEncoder(3, (8, 8), patch=4, dim=16, depth=1),
        ...     "text": TextEncoder(10, max_length=4, dim=16, depth=1),
        ... }
        >>> model = DualEncoder(encoders, dim=12)
        >>> batch = {"image": torch.randn(3, 3, 8, 8), "text": torch.tensor([[1, 2], [3, 0], [4, 5]])}
        >>> sorted(model.losses({**batch, "target": torch.arange(3)}))
        ['image-text']
        >>> {name: vectors.shape for name, vectors in model.embed(batch).items()}
        {'image': torch.Size([3, 12]), 'text': torch.Size([3, 12])}
    """

    name = "dual_encoder"
    score = "recall@1"

    def __init__(
        self, encoders: Mapping[str, nn.Module], *, dim: int = 128, loss: Literal["info_nce", "siglip"] = "info_nce",
        scale: float | None = None, bias: float | None = None, smoothing: float | None = None,
        anchor: str | None = None, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(encoders) < 2:
            raise ConfigError("DualEncoder", expected="two or more modalities", got=f"{', '.join(encoders) or 'none'}")
        if dim < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "DualEncoder", expected="dim >= 1 and 0 <= dropout < 1", got=f"dim = {dim}, dropout = {dropout}"
            )
        if loss not in LOSSES:
            raise unknown_name("DualEncoder", "loss", str(loss), LOSSES)
        self.names = tuple(encoders)
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(_width(name, encoder), dim, bias=False) for name, encoder in encoders.items()}
        )
        self.dropout = nn.Dropout(dropout)
        if anchor is not None and anchor not in encoders:
            raise unknown_name("DualEncoder", "anchor", str(anchor), encoders)
        options = {"scale": scale, "bias": bias, "smoothing": smoothing, "anchor": anchor}
        options = {name: value for name, value in options.items() if value is not None}
        self.loss = instantiate(LOSSES[loss], f"DualEncoder loss '{loss}'", options)

    @classmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> DualEncoder:
        target = source.train.target
        if source.task not in ("classification", "retrieval") or target.ndim != 1 or target.is_floating_point():
            raise ConfigError(
                "model 'dual_encoder'", expected="data with one item per sample and integer targets",
                got=f"{type(source).__name__} for {source.task}",
                fix="Use emoji, triples with items: 1, a classification data set, or your own table with --pair.",
            )  # fmt: skip
        return instantiate(cls, "model 'dual_encoder'", options, encoders=encoders)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "batch dim"]]:
        """Alias of ``embed``."""
        return self.embed(batch)

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "batch dim"]]:
        """Embeds a batch: name -> unit vectors (batch, dim); zeros for samples that lack the modality.

        Args:
            batch: name -> input of that modality's encoder. ``"mask"`` and ``"times"`` are those of ``FusionModel``.
        """
        masks, times = batch.get("mask") or {}, batch.get("times") or {}
        embeddings: dict[str, Tensor] = {}
        for name in self.names:
            if (values := batch.get(name)) is None:
                continue
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise NonFiniteError(f"DualEncoder '{name}'", expected="finite inputs", got="NaN or infinity")
            first = next(iter(embeddings), None)
            if first is not None and len(values) != len(embeddings[first]):
                raise ShapeError(
                    f"DualEncoder '{name}'", expected=f"as many samples as '{first}' has = {len(embeddings[first])}",
                    got=f"{len(values)}", fix="Omit a modality from the batch only if all samples lack it.",
                )  # fmt: skip
            tokens = self._encode(name, values, masks.get(name), times.get(name))
            vectors = F.normalize(self.heads[name](self.dropout(tokens.pooled())), dim=-1)
            embeddings[name] = vectors.masked_fill(~tokens.present()[:, None], 0.0)
        if not embeddings:
            raise ConfigError(
                "DualEncoder", expected=f"one or more of {', '.join(self.names)}", got=", ".join(batch) or "nothing"
            )
        return embeddings

    def _encode(self, name: str, values: Tensor, mask: Tensor | None, times: Tensor | None) -> Tokens:
        takes = inspect.signature(self.encoders[name].forward).parameters
        options: dict[str, Tensor] = {} if times is None or "times" not in takes else {"times": times}
        if mask is None:
            return as_tokens(self.encoders[name](values, **options), f"encoder '{name}'")
        expected = "a boolean mask (batch,) or (batch, token)"
        mask = bool_mask(mask, f"DualEncoder mask of '{name}'", expected, numbers=True)
        per_token = mask.ndim == 2 and "mask" in takes
        values = without_masked(values, mask, tokens_too="mask" in takes)  # type: ignore[assignment]
        options |= {"mask": mask} if per_token else {}
        tokens = as_tokens(self.encoders[name](values, **options), f"encoder '{name}'")
        # Encoders that do not read the mask, and samples without any valid token.
        valid = (
            mask
            if mask.shape == tokens.values.shape[:2] and not per_token
            else mask.reshape(len(mask), -1).any(1)[:, None]
        )
        return Tokens(tokens.values, mask=tokens.valid() & valid, cls=tokens.cls).zero_masked()

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        embeddings = self.embed(batch)
        if len(embeddings) < 2:
            (only,) = embeddings
            missing = " or ".join(f"'{name}'" for name in self.names if name != only)
            raise ConfigError(
                "DualEncoder losses", expected="two or more modalities to compare", got=f"'{only}' without {missing}",
                fix="A batch needs at least two modalities.",
            )  # fmt: skip
        # Missing samples are zero vectors; unit vectors have a nonzero entry.
        present = {name: vectors.detach().any(dim=1) for name, vectors in embeddings.items()}
        terms = self.loss.terms(embeddings, ids=batch.get("target"), present=present)
        if not terms:
            return {"nothing": zero_loss([*embeddings.values(), *self.loss.parameters()])}
        return {"-".join(pair): term / len(terms) for pair, term in terms.items()}

    def evaluate(self, source: Any) -> dict[str, Any]:
        with eval_mode_no_grad(self):
            return {"metrics": evaluate_dual_encoder(self, source, "test")}


def _width(name: str, encoder: nn.Module) -> int:
    width = getattr(encoder, "dim", getattr(encoder, "out_features", None))
    if not isinstance(width, int):
        raise ConfigError(
            f"DualEncoder encoder '{name}'", expected="an attribute dim, the width of its tokens",
            got=f"{type(encoder).__name__} without dim", fix="Set encoder.dim.",
        )  # fmt: skip
    return width
