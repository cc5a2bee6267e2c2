"""Token sequences with masks and modality labels, and the output type of fusions and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ..errors import ConfigError, ShapeError
from .masks import at_least_float32, bool_mask, zero_masked

SPECIAL = -1
"""Label of tokens that belong to no modality: class tokens and padding."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences with mask, modality labels and modality names.

    Args:
        values: (batch, token, dim).
        mask: (batch, token), True = valid token; ``None`` = all tokens are valid. A row of False represents a modality
            that is missing for a sample. Masked values have no influence on any result, even if they are NaN.
        modality: (batch, token) integer labels, index into ``names``, -1 = special or padding. ``None`` for the
            tokens of a single modality.
        names: the modality names that the labels index.
        times: (batch, token) time stamps in seconds.
        cls: whether token 0 is the encoder's class token, which ``pooled`` then returns.
        lengths: for packed tokens, the numbers of tokens of (special, names[0], names[1], ...).

    Raises:
        ShapeError: the shape of a field does not match ``values``.

    Example:
        >>> Tokens(torch.ones(2, 3, 5)).pooled().shape
        torch.Size([2, 5])
    """

    values: Float[Tensor, "batch token dim"]
    mask: Bool[Tensor, "batch token"] | None = None
    modality: Int[Tensor, "batch token"] | None = None
    names: tuple[str, ...] = ()
    times: Float[Tensor, "batch token"] | None = None
    cls: bool = False
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise ShapeError(
                "Tokens",
                expected="values of shape (batch, token, dim)",
                got=f"shape {tuple(self.values.shape)}",
                fix="A single vector per sample is a sequence of one token: use values[:, None].",
            )
        for name, part in (("mask", self.mask), ("modality", self.modality), ("times", self.times)):
            if part is not None and part.shape != self.values.shape[:2]:
                raise ShapeError(
                    f"Tokens {name}",
                    got=f"shape {tuple(part.shape)}",
                    expected=f"shape (batch, token) = {tuple(self.values.shape[:2])}",
                )
        if self.mask is not None:
            fix = "Use mask.bool() for 0/1 masks; an additive mask is mask == 0."
            bool_mask(self.mask, "Tokens mask", "dtype torch.bool with True = takes part", fix=fix)

    @property
    def dim(self) -> int:
        return self.values.shape[-1]

    def __len__(self) -> int:
        return self.values.shape[1]

    def valid(self) -> Bool[Tensor, "batch token"]:
        """Returns the mask, or a mask of ones if there is none."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.values.shape[:2], dtype=torch.bool, device=self.values.device)

    def zero_masked(self) -> Tokens:
        """Returns the tokens with masked values set to zero, so that they affect neither outputs nor gradients.

        Fusions, connectors and losses call this first, since 0 * NaN is NaN.
        """
        return self if self.mask is None else replace(self, values=zero_masked(self.values, self.mask))

    def present(self) -> Bool[Tensor, " batch"]:
        """Returns True for samples with at least one valid token."""
        return self.valid().any(dim=1)

    def pooled(self) -> Float[Tensor, "batch dim"]:
        """Returns the class token if there is one, else the mean over valid tokens; zeros for empty samples."""
        if len(self) == 0:
            return self.values.new_zeros(self.values.shape[0], self.dim)
        if self.mask is None:
            return self.values[:, 0] if self.cls else self.values.mean(dim=1)
        if self.cls:
            return self.values[:, 0].masked_fill(~self.mask[:, :1], 0.0)
        # Long sums of half-precision numbers overflow.
        total = at_least_float32(zero_masked(self.values, self.mask)).sum(dim=1)
        return (total / self.mask.sum(dim=1, keepdim=True).clamp(min=1)).to(self.values.dtype)

    @classmethod
    def ragged(cls, sequences: Sequence[Float[Tensor, "token dim"]]) -> Tokens:
        """Creates padded and masked tokens from sequences of different lengths.

        Example:
            >>> Tokens.ragged([torch.ones(2, 5), torch.ones(4, 5)]).mask.sum(dim=1)
            tensor([2, 4])
        """
        if not sequences or any(s.ndim != 2 or s.shape[1] != sequences[0].shape[1] for s in sequences):
            raise ShapeError(
                "Tokens.ragged",
                expected="a non-empty list of (token, dim) tensors of equal dim",
                got=f"shapes {[tuple(s.shape) for s in sequences]}",
            )
        lengths = torch.tensor([len(s) for s in sequences], device=sequences[0].device)
        values = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        mask = torch.arange(values.shape[1], device=values.device)[None] < lengths[:, None]
        return cls(values, mask=mask)


def as_tokens(result: object, who: str) -> Tokens:
    """Converts the output of an encoder to Tokens.

    Accepted types: Tokens; (batch, token, dim); (batch, dim) as a sequence of one token; an object with
    ``last_hidden_state``, as Hugging Face models return.
    """
    if isinstance(result, Tokens):
        return result
    hidden = getattr(result, "last_hidden_state", result)
    if isinstance(hidden, Tensor) and hidden.is_floating_point():
        if hidden.ndim == 2:
            return Tokens(hidden[:, None], cls=True)
        if hidden.ndim == 3:
            return Tokens(hidden)
    got = f"shape {tuple(hidden.shape)}, {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
    raise ShapeError(
        who,
        expected="Tokens or a float tensor of shape (batch, token, dim) or (batch, dim)",
        got=got,
        fix="Flatten feature maps to tokens: map.flatten(2).transpose(1, 2).",
    )


def pack(
    tokens: Mapping[str, Tokens | Tensor], *, cls: Float[Tensor, " dim"] | Float[Tensor, "batch dim"] | None = None
) -> Tokens:
    """Concatenates the sequences of several modalities, in the order of the mapping.

    Args:
        tokens: name -> Tokens, or (batch, token, dim).
        cls: an optional class token, prepended with label -1.

    Returns:
        Tokens with ``modality`` (-1 for the class token and for padding), ``names`` and ``lengths``; ``unpack`` is its
        inverse. ``mask`` is None when no part has one.

    Raises:
        ShapeError: the mapping is empty, or batch sizes or widths differ.

    Example:
        >>> pack({"audio": torch.zeros(2, 3, 5), "image": torch.zeros(2, 2, 5)}).modality[0]
        tensor([0, 0, 0, 1, 1])
    """
    parts = {
        name: part if isinstance(part, Tokens) else as_tokens(part, f"pack '{name}'") for name, part in tokens.items()
    }
    if not parts:
        raise ShapeError("pack", expected="at least one modality", got="an empty mapping")
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if part.values.shape[0] != first.values.shape[0] or part.dim != first.dim:
            raise ShapeError(
                f"pack '{name}'",
                got=f"(batch, dim) = {(part.values.shape[0], part.dim)}",
                expected=f"(batch, dim) = {(first.values.shape[0], first.dim)} as '{first_name}' has",
                fix="Give every encoder the fusion's width, or append a torch.nn.Linear.",
            )
    batch = first.values.shape[0]
    sequence = [part.values for part in parts.values()]
    if cls is not None:
        sequence.insert(0, cls.to(first.values.dtype).expand(batch, first.dim)[:, None])
    values = torch.cat(sequence, dim=1)
    lengths = (0 if cls is None else 1, *(len(part) for part in parts.values()))
    modality = segment_labels(lengths, values.device).expand(batch, -1)
    mask = None
    if any(part.mask is not None for part in parts.values()):
        masks = [part.valid() for part in parts.values()]
        if cls is not None:
            masks.insert(0, masks[0].new_ones(batch, 1))
        mask = torch.cat(masks, dim=1)
        modality = modality.masked_fill(~mask, SPECIAL)
    times = None
    # A modality that is missing from the batch has no tokens, hence no times.
    if all(part.times is not None or len(part) == 0 for part in parts.values()):
        stamps = [values.new_zeros(batch, 0) if part.times is None else part.times for part in parts.values()]
        if cls is not None:
            stamps.insert(0, stamps[0].new_zeros(batch, 1))
        times = torch.cat(stamps, dim=1)
    return Tokens(values, mask=mask, modality=modality, names=tuple(parts), times=times, lengths=lengths)


def segment_labels(lengths: Sequence[int], device: torch.device | None = None) -> Int[Tensor, " token"]:
    """Returns the labels of packed tokens without padding: -1 for special tokens, then blocks of 0, 1, ..."""
    labels = torch.arange(SPECIAL, len(lengths) - 1, device=device)
    # Passing output_size avoids a GPU sync.
    return torch.repeat_interleave(labels, torch.tensor(lengths, device=device), output_size=sum(lengths))


def unpack(packed: Tokens) -> dict[str, Tokens]:
    """Splits packed tokens by modality: name -> Tokens. Special tokens are dropped.

    Interleaved sequences (labels in any order, different per sample) are gathered in order and padded.

    Raises:
        ShapeError: the tokens have no modality labels.
    """
    if packed.modality is None:
        raise ShapeError(
            "unpack",
            expected="tokens with modality labels",
            got="modality=None",
            fix="Only what pack returned, or Tokens(values, modality=..., names=...), can be unpacked.",
        )
    if packed.lengths is not None:
        return dict(zip(packed.names, _blocks(packed, packed.lengths), strict=True))
    return {name: _gather(packed, index) for index, name in enumerate(packed.names)}


def _blocks(packed: Tokens, lengths: tuple[int, ...]):
    start = lengths[0]
    for length in lengths[1:]:
        span = slice(start, start + length)
        yield Tokens(
            packed.values[:, span],
            mask=None if packed.mask is None else packed.mask[:, span],
            times=None if packed.times is None else packed.times[:, span],
        )
        start += length


def _gather(packed: Tokens, index: int) -> Tokens:
    member = (packed.modality == index) & packed.valid()
    counts = member.sum(dim=1)
    longest = int(counts.max()) if len(counts) else 0
    # A stable sort brings the members to the front and keeps their order.
    order = torch.argsort(~member, dim=1, stable=True)[:, :longest]
    values = packed.values.gather(1, order[..., None].expand(-1, -1, packed.dim))
    mask = torch.arange(longest, device=values.device)[None] < counts[:, None]
    times = None if packed.times is None else packed.times.gather(1, order)
    return Tokens(values.masked_fill(~mask[..., None], 0.0), mask=None if bool(mask.all()) else mask, times=times)


@dataclass(frozen=True, eq=False)
class Output:
    """Output of fusions and of FusionModel.

    Attributes:
        features: (batch, feature) fused vector, the input of the head.
        logits: (batch, output) scores before softmax; None if there is no head.
        unimodal_logits: name -> (batch, output) from the unimodal heads; empty without them.
        tokens: name -> Tokens, the outputs of the encoders.
        share: (batch, head, modality) attention shares of the readout query, in the order of ``names``; the remainder
            to 1 is the share of special tokens. None for static fusions, which have no attention.
        names: modality names, in the order of ``share``.
        record: data that balancers stored in the forward pass; used by ``BalancerList``.
        reliability: name -> (batch,) probability rho that the modality can be used, from ``eq.Reliability``; empty for
            other models.
    """

    features: Float[Tensor, "batch feature"]
    logits: Float[Tensor, "batch output"] | None = None
    unimodal_logits: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)
    share: Float[Tensor, "batch head modality"] | None = None
    names: tuple[str, ...] = ()
    record: Any = field(default=None, repr=False)
    reliability: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rho(self) -> Float[Tensor, "batch modality"] | None:
        """The reliability of all modalities, in the order of ``names``; None without it."""
        return torch.stack([self.reliability[name] for name in self.names], dim=1) if self.reliability else None

    def with_(self, **changes) -> Output:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def as_output(model: Any, returned: Any, who: str) -> Output:
    """Returns what a model returned as Output; an adapted model (``eq.adapt``) finds its Output from its own result.

    Raises:
        ConfigError: the model returns something else, and is not adapted.
    """
    if callable(getattr(model, "output_of", None)):
        return model.output_of(returned)
    if isinstance(returned, Output):
        return returned
    raise ConfigError(
        who, expected="a model that returns equipoise.Output", got=f"{type(model).__name__} that returns "
        f"{type(returned).__name__}", fix="Adapt it: model = eq.adapt(model, encoders={'audio': model.audio, ...}).",
    )  # fmt: skip


def has_values(tensor: Tensor) -> bool:
    """Returns whether tensor values are accessible: not under ``torch.compile``, export or ``vmap``, or on meta.

    Example:
        >>> has_values(torch.zeros(2)), has_values(torch.zeros(2, device="meta"))
        (True, False)
    """
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return type(tensor) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(tensor)
