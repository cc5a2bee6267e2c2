"""One space for several modalities: a tower for each, trained so that what belongs together lies together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...alignment import InfoNCE, SigLIP
from ...errors import ConfigError, NonFiniteError, ShapeError, unknown_name
from ...nn.eval_mode import eval_mode_no_grad
from ...registry import instantiate
from ...tokens.masks import zero_loss
from ...tokens.token_batch import as_tokens
from ..self_contained import SelfContainedModel
from .dual_encoder_metrics import evaluate_dual_encoder

LOSSES = {"info_nce": InfoNCE, "siglip": SigLIP}


class DualEncoder(SelfContainedModel):
    """Brings pictures, words, sounds, or what there is to unit vectors of one space, by a contrastive loss::

        u_m  = unit(pool(encoder_m(x_m)) A_m)
        loss = mean over pairs of modalities of info_nce(u_m, u_n) or siglip(u_m, u_n)

    Samples of one target show the same: they are partners and never each other's wrong answer. A modality that a batch
    does not have, or of which a sample has no valid token, such as an empty caption, is missing: what is there is
    compared.

    Args:
        encoders: modality -> encoder; each has a ``dim``.
        dim: of the space.
        loss: ``"info_nce"``, a softmax over the batch, or ``"siglip"``, a yes or no for each pair.
        scale: of the cosines at the start; the loss's own by default. It is learned.
        bias: at the start, of "siglip".
        smoothing: of "info_nce", in [0, 1).
        anchor: compare this modality with each other one, and these not among themselves; None compares all pairs.
        dropout: of pooled tokens, in training only.

    Raises:
        ConfigError: fewer than two encoders, one without ``dim``, an unknown loss, an option of the other one; in
            ``losses``, a batch of fewer than two modalities. ShapeError: modalities with different numbers of samples,
            or inputs that an encoder does not read. NonFiniteError: NaN in an input, with the modality's name.

    Reference: Radford et al., CLIP (ICML 2021); Zhai et al., SigLIP (ICCV 2023); spec 7.1, 7.2.
    Differs from CLIP in: any number of modalities; samples that show the same are partners.

    Example:
        >>> from equipoise.encoders import PatchEncoder, TextEncoder
        >>> encoders = {
        ...     "image": PatchEncoder(3, (8, 8), patch=4, dim=16, depth=1),
        ...     "text": TextEncoder(10, max_length=4, dim=16, depth=1),
        ... }
        >>> space = DualEncoder(encoders, dim=12)
        >>> batch = {"image": torch.randn(3, 3, 8, 8), "text": torch.tensor([[1, 2], [3, 0], [4, 5]])}
        >>> sorted(space.losses({**batch, "target": torch.arange(3)}))
        ['image-text']
        >>> {name: vectors.shape for name, vectors in space.embed(batch).items()}
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
        given = {"scale": scale, "bias": bias, "smoothing": smoothing, "anchor": anchor}
        options = {name: value for name, value in given.items() if value is not None}
        self.loss = instantiate(LOSSES[loss], f"DualEncoder loss '{loss}'", options)

    @classmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> DualEncoder:
        target = source.train.target
        if source.task not in ("classification", "retrieval") or target.ndim != 1 or target.is_floating_point():
            raise ConfigError(
                "model 'dual_encoder'", expected="data of one thing in a sample, with a whole number that says which",
                got=f"{type(source).__name__} for {source.task}",
                fix="Take emoji, triples with items: 1, or data for classification.",
            )  # fmt: skip
        return instantiate(cls, "model 'dual_encoder'", options, encoders=encoders)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch dim"]]:
        """The same as ``embed``."""
        return self.embed(batch)

    def embed(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "batch dim"]]:
        """name -> unit vectors of every modality that the batch has; zeros where a sample has nothing of it."""
        found: dict[str, Tensor] = {}
        for name in self.names:
            if (values := batch.get(name)) is None:
                continue
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise NonFiniteError(f"DualEncoder '{name}'", expected="finite inputs", got="NaN or infinity")
            first = next(iter(found), None)
            if first is not None and len(values) != len(found[first]):
                raise ShapeError(
                    f"DualEncoder '{name}'", expected=f"as many samples as '{first}' has = {len(found[first])}",
                    got=f"{len(values)}", fix="Each needs a partner; leave out whole what no sample has.",
                )  # fmt: skip
            tokens = as_tokens(self.encoders[name](values), f"encoder '{name}'")
            vectors = F.normalize(self.heads[name](self.dropout(tokens.pooled())), dim=-1)
            found[name] = vectors.masked_fill(~tokens.present()[:, None], 0.0)
        if not found:
            raise ConfigError(
                "DualEncoder", expected=f"one or more of {', '.join(self.names)}", got=", ".join(batch) or "nothing"
            )
        return found

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.embed(batch)
        if len(found) < 2:
            (alone,) = found
            missing = " or ".join(f"'{name}'" for name in self.names if name != alone)
            raise ConfigError(
                "DualEncoder losses", expected="two or more modalities to compare", got=f"'{alone}' without {missing}",
                fix="A batch may lack some of them, not all but one.",
            )  # fmt: skip
        # Zeros are what is missing: a unit vector has something that is not 0.
        present = {name: vectors.detach().any(dim=1) for name, vectors in found.items()}
        terms = self.loss.terms(found, ids=batch.get("target"), present=present)
        if not terms:
            return {"nothing": zero_loss([*found.values(), *self.loss.parameters()])}
        return {"-".join(pair): term / len(terms) for pair, term in terms.items()}

    def evaluate(self, source: Any) -> dict[str, Any]:
        with eval_mode_no_grad(self):
            return {"metrics": evaluate_dual_encoder(self, source, "test")}


def _width(name: str, encoder: nn.Module) -> int:
    width = getattr(encoder, "dim", getattr(encoder, "out_features", None))
    if not isinstance(width, int):
        raise ConfigError(
            f"DualEncoder encoder '{name}'", expected="an attribute dim, the width of its tokens",
            got=f"{type(encoder).__name__} without", fix="Set encoder.dim.",
        )  # fmt: skip
    return width
