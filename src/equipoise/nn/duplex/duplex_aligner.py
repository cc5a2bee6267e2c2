"""Duplex attention alignment (MODA): maps the keys of each modality using the bases of the other modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError, unknown_name
from ...tokens.masks import bool_mask
from ..attention.modality_blocks import blocks_of, into_blocks, out_of_blocks
from .incremental_bases import running_bases
from .modality_bases import Basis, BasisKind, Moments, Norm, moments_of, normed_bases

Fuse = Literal["concat", "add"]
Scope = Literal["all", "prefix", "causal"]
Mix = Literal["uniform", "learned"]


class Aligned(NamedTuple):
    """Result of a `DuplexAligner`.

    Attributes:
        key: (batch, key head, key, width), aligned.
        state: sums over the keys so far, from which decoding continues.
    """

    key: Float[Tensor, "batch key_head key width"]
    state: Moments


class DuplexAligner(nn.Module):
    """Aligns the keys of each modality with the bases of the other modalities, for each head::

        G^n  = K^n^T K^n,  K^n with rows of length 1         the basis of modality n, (width, width), then normed
        M_m  = sum over n != m of w_mn ||G^n||               w_mn = 1 / (N - 1), or learned
        "concat": K^m <- [K^m, K^m M_m] W_m                  W_m = [I; 0] at the start
        "add":    K^m <- (K^m + r_m * K^m M_m) W_m           r_m = 0, W_m = I at the start

    With two modalities these are MODA's V-aligner and T-aligner. At initialization, the keys are returned
    unchanged. The cost is one product of each key with a (width, width) matrix.

    Args:
        dim: width of a head's keys. Parameters are shared by heads.
        num_modalities: N.
        basis: ``"gram"`` as above; ``"key_value"``, K^T V, as in the released code; ``"covariance"``, the Gram
            matrix of centered keys.
        norm: ``"row"`` (rows of length 1), ``"fro"``, ``"spectral"`` (never lengthens a key), ``"trace"``, ``"none"``.
        normalize_keys: use keys of length 1 for the basis; the mapped keys are not normalized.
        fuse: ``"concat"`` or ``"add"``.
        directions: labels of the modalities with aligned keys; None = all (duplex). The released code aligns one.
        mix: ``"uniform"`` or ``"learned"`` weights w of the others.
        basis_scope: the keys over which G is summed. ``"all"``: all keys, including future ones. ``"prefix"``: keys
            before the position ``prefix``. ``"causal"``: keys up to the mapped key, which requires one basis per key.
            None: "prefix" with causal attention, else "all".

    Raises:
        ConfigError: an option is unknown or incompatible with the others.

    Reference: MODA (ICML 2025), equations 5 and 6.
    Differs from the released code in: the Gram matrix of the paper, every direction, W initialized to the
    identity, no loop over samples, and keys that are aligned before caching, so that decoding equals one pass.

    Example:
        >>> aligner, key = DuplexAligner(4), torch.randn(2, 3, 5, 4)
        >>> torch.equal(aligner(key, key, modality=torch.tensor([0, 0, 1, 1, -1])).key, key)
        True
    """

    def __init__(
        self, dim: int, num_modalities: int = 2, *, basis: Basis = "gram", norm: Norm = "row",
        normalize_keys: bool = True, fuse: Fuse = "concat", directions: Sequence[int] | None = None,
        mix: Mix = "uniform", basis_scope: Scope | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = {"basis": (basis, Basis), "norm": (norm, Norm), "fuse": (fuse, Fuse), "mix": (mix, Mix)}
        if basis_scope is not None:
            options["basis_scope"] = (basis_scope, Scope)
        for name, (value, choices) in options.items():
            if value not in get_args(choices):
                raise unknown_name("DuplexAligner", name, str(value), get_args(choices))
        if dim < 1 or num_modalities < 1:
            got = f"dim = {dim}, num_modalities = {num_modalities}"
            raise ConfigError("DuplexAligner", expected="dim >= 1 and num_modalities >= 1", got=got)
        if basis == "key_value" and norm == "trace":
            raise ConfigError(
                "DuplexAligner",
                expected="a norm that is defined for every matrix",
                got="norm='trace' with basis='key_value'",
                fix="The trace of K^T V may be zero or negative; use 'row', 'fro' or 'spectral'.",
            )
        changed = tuple(range(num_modalities)) if directions is None else tuple(directions)
        if not changed or len(set(changed)) < len(changed) or not set(changed) <= set(range(num_modalities)):
            raise ConfigError(
                "DuplexAligner", expected=f"different directions from 0 to {num_modalities - 1}, or None for all",
                got=str(directions),
            )  # fmt: skip
        self.dim, self.num_modalities, self.directions = dim, num_modalities, changed
        self.kind, self.fuse = BasisKind(num_modalities, changed, basis, norm, normalize_keys), fuse
        self.basis_scope: Scope | None = basis_scope
        eye = torch.eye(dim).expand(len(changed), -1, -1)
        self.weight = nn.Parameter(torch.cat([eye, torch.zeros_like(eye)], 1) if fuse == "concat" else eye.clone())
        self.scale = nn.Parameter(torch.zeros(len(changed), dim)) if fuse == "add" else None
        learned = mix == "learned" and num_modalities > 2
        self.mix = nn.Parameter(torch.zeros(num_modalities, num_modalities)) if learned else None

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.num_modalities}, basis={self.kind.basis!r}, norm={self.kind.norm!r}, fuse={self.fuse!r}"
        )

    def forward(
        self,
        key: Float[Tensor, "batch key_head key width"],
        value: Float[Tensor, "batch key_head key dim"],
        *,
        modality: Int[Tensor, " key"] | Int[Tensor, "batch key"],
        mask: Bool[Tensor, "batch key"] | None = None,
        prefix: Int[Tensor, " batch"] | int | None = None,
        is_causal: bool = False,
        state: Moments | None = None,
    ) -> Aligned:
        """Aligns keys.

        Args:
            key: (batch, key head, key, width), after rotary position embedding if there is one.
            value: (batch, key head, key, dim), for the basis "key_value".
            modality: label of every key; -1 = special, neither aligned nor part of a basis.
            mask: False for padding, which is not part of a basis.
            prefix: length of the prefix, or one per sample; by default it ends with the last key whose label differs
                from that of the last key of the sample, such as the last image before an answer.
            is_causal: determines the scope if ``basis_scope`` is None.
            state: sums over preceding keys, for decoding. With "causal" the bases are updated from it, else they are
                fixed.

        Returns:
            Aligned(key, state). The basis of a missing modality is the identity. Masked keys are returned unchanged and
            have no influence on other keys.

        Raises:
            ShapeError: the sizes do not match.
        """
        self._check(key, value, modality, mask)
        if mask is None:
            return self._aligned(key, value, modality, None, prefix, is_causal, state)
        valid = mask.to(key.device)[:, None, :, None]
        clean = key.masked_fill(~valid, 0.0), value.masked_fill(~valid, 0.0)
        aligned = self._aligned(*clean, modality, mask, prefix, is_causal, state)
        return aligned._replace(key=torch.where(valid, aligned.key, key))

    def _aligned(
        self, key: Tensor, value: Tensor, modality: Tensor, mask: Tensor | None, prefix: Tensor | int | None,
        is_causal: bool, state: Moments | None,
    ) -> Aligned:  # fmt: skip
        labels = (modality if modality.ndim == 2 else modality[None]).to(key.device)
        scope = self.basis_scope or ("prefix" if is_causal else "all")
        with torch.autocast(key.device.type, enabled=False):
            if scope == "causal" or key.shape[2] == 0:
                return Aligned(*running_bases(self.maps, self.kind, key, value, labels, mask, state))
            blocks = blocks_of(modality, mask, key.device)
            keys = into_blocks(key, blocks)
            if state is None:
                within = mask if scope == "all" else self._prefix(labels, mask, prefix)
                values = into_blocks(value, blocks) if self.kind.basis == "key_value" else keys
                state = moments_of(self.kind, keys, values, blocks, within)
            maps = self.maps(normed_bases(state, self.kind))
            parts = [
                part if label not in self.directions else part @ maps[:, self.directions.index(label)].to(part.dtype)
                for label, part in zip(blocks.labels, keys, strict=True)
            ]
            return Aligned(out_of_blocks(parts, blocks), state)

    def maps(self, bases: Float[Tensor, "*batch modality head width width"]) -> Tensor:
        """Combines mapping and projection into one matrix: (*batch, direction, head, width, width)."""
        chosen = list(self.directions)
        mapped = torch.einsum("mn,...nhij->...mhij", self.weights().to(bases.dtype)[chosen], bases)
        weight = self.weight.to(bases.dtype)[:, None]
        if self.scale is None:
            keep, aligned = weight.split(self.dim, dim=-2)
            return keep + mapped @ aligned
        return weight + (mapped * self.scale.to(bases.dtype)[:, None, None]) @ weight

    def weights(self) -> Float[Tensor, "modality modality"]:
        """Returns the mixing weights w_mn, zero on the diagonal."""
        count, device = self.num_modalities, self.weight.device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if count == 1:
            return torch.zeros(1, 1, dtype=dtype, device=device)
        same = torch.eye(count, dtype=torch.bool, device=device)
        logits = torch.zeros(count, count, dtype=dtype, device=device) if self.mix is None else self.mix.to(dtype)
        return logits.masked_fill(same, -torch.inf).softmax(-1)

    def _prefix(self, labels: Tensor, mask: Tensor | None, prefix: Tensor | int | None) -> Bool[Tensor, "batch key"]:
        places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        valid = labels >= 0 if mask is None else (labels >= 0) & mask.to(labels.device)
        labels = labels.expand_as(valid)
        if prefix is None:
            last = (valid * places).argmax(1, keepdim=True) if labels.shape[1] else labels[:, :0]
            other = valid & (labels != labels.gather(1, last))
            end = (other * places).amax(1, keepdim=True) if labels.shape[1] else places[None]
        else:
            end = torch.as_tensor(prefix, device=labels.device).reshape(-1, 1)
        return valid & (places <= end)

    def _check(self, key: Tensor, value: Tensor, modality: Tensor, mask: Tensor | None) -> None:
        batch, _, length, width = key.shape
        if width != self.dim:
            raise ShapeError("DuplexAligner key", expected=f"width = dim = {self.dim}", got=f"{width}")
        if self.kind.basis == "key_value" and value.shape != key.shape:
            raise ShapeError(
                "DuplexAligner value",
                expected=f"the shape of the keys, {tuple(key.shape)}",
                got=f"{tuple(value.shape)}",
                fix="With basis='key_value', values must have the width of the keys; use basis='gram'.",
            )
        if tuple(modality.shape) not in ((length,), (batch, length)):
            raise ShapeError(
                "DuplexAligner modality", expected=f"shape (key,) = {(length,)} or (batch, key) = {(batch, length)}",
                got=f"shape {tuple(modality.shape)}",
            )  # fmt: skip
        if modality.device.type == "cpu" and modality.numel() and int(modality.max()) >= self.num_modalities:
            raise ShapeError(
                "DuplexAligner modality", expected=f"labels from -1 to num_modalities - 1 = {self.num_modalities - 1}",
                got=f"{int(modality.max())}",
            )  # fmt: skip
        if mask is not None:
            expected = f"a boolean tensor of shape (batch, key) = {(batch, length)}"
            bool_mask(mask, "DuplexAligner mask", expected, shape=(batch, length))
