"""Catalog of input corruptions: name -> function, kinds of input, and a level for each of five severities."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...errors import ConfigError, ShapeError, unknown_name
from ...tokens.masks import bool_mask
from . import distorted_values, frame_order, replaced_values
from .input_frames import (
    KINDS,
    InputFrames,
    InputKind,
    check_kind,
    check_statistics,
    from_frames,
    infer_kind,
    to_frames,
)

SEVERITIES = (1, 2, 3, 4, 5)
EXTENT = (0.2, 0.4, 0.6, 0.8, 1.0)
NUMBERS = ("sequence", "spectrogram", "image", "vector")
TIMED = ("sequence", "spectrogram")


@dataclass(frozen=True)
class Corruption:
    """One kind of damage.

    Attributes:
        function: (InputFrames, level) -> values; None for corruptions of whole samples: ``swapped`` and ``missing``.
        kinds: kinds of input that it fits.
        levels: argument of the function for the severities 1 to 5; for whole samples the fraction of the samples.
        destroys: whether nothing of the input is left at severity 5.
    """

    function: Callable[[InputFrames, float], Tensor] | None
    kinds: tuple[str, ...]
    levels: tuple[float, ...]
    destroys: bool = False


CORRUPTIONS: dict[str, Corruption] = {
    "white_noise": Corruption(replaced_values.white_noise, NUMBERS, EXTENT, destroys=True),
    "own_noise": Corruption(replaced_values.own_noise, NUMBERS, EXTENT, destroys=True),
    "zeros": Corruption(replaced_values.zeros, NUMBERS, EXTENT, destroys=True),
    "constant": Corruption(replaced_values.constant, NUMBERS, EXTENT, destroys=True),
    "frozen": Corruption(frame_order.frozen, (*TIMED, "tokens"), EXTENT),
    "swapped": Corruption(None, tuple(KINDS), EXTENT, destroys=True),
    "partial": Corruption(replaced_values.partial, NUMBERS, (0.1, 0.3, 0.5, 0.7, 0.9)),
    "additive": Corruption(distorted_values.additive, NUMBERS, (20.0, 10.0, 5.0, 0.0, -5.0)),
    "gain": Corruption(distorted_values.gain, NUMBERS, (1.5, 2.0, 3.0, 5.0, 10.0)),
    "attenuation": Corruption(distorted_values.gain, NUMBERS, (0.7, 0.5, 0.3, 0.2, 0.1)),
    "clipping": Corruption(distorted_values.clipping, NUMBERS, (2.0, 1.5, 1.0, 0.5, 0.25)),
    "blur": Corruption(distorted_values.blur, (*TIMED, "image"), (0.05, 0.1, 0.2, 0.4, 0.8)),
    "shift": Corruption(frame_order.shift, (*TIMED, "image"), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "shuffled": Corruption(frame_order.shuffled, (*TIMED, "tokens"), EXTENT),
    "dropped": Corruption(frame_order.dropped, tuple(KINDS), (0.1, 0.25, 0.4, 0.6, 0.8)),
    "drift": Corruption(distorted_values.drift, NUMBERS, (0.5, 1.0, 2.0, 3.0, 5.0)),
    "replaced": Corruption(replaced_values.replaced, ("tokens",), EXTENT, destroys=True),
    "missing": Corruption(None, tuple(KINDS), EXTENT, destroys=True),
}
"""Name -> corruption."""


class CorruptedInput(NamedTuple):
    """A corrupted input.

    Attributes:
        values: the input.
        mask: its mask; None where the input has none and no sample is missing.
        source: (batch,) sample that each value comes from, where samples are swapped; else None.
    """

    values: Tensor
    mask: Tensor | None
    source: Int[Tensor, " batch"] | None = None


def corruption_names(kind: str | None = None) -> list[str]:
    """Lists the corruptions, or those that fit a kind of input.

    Raises:
        ConfigError: an unknown kind.

    Example:
        >>> corruption_names("tokens")
        ['frozen', 'swapped', 'shuffled', 'dropped', 'replaced', 'missing']
    """
    if kind is not None and kind not in KINDS:
        raise unknown_name("corruption_names", "kind of input", str(kind), KINDS)
    return [name for name, one in CORRUPTIONS.items() if kind is None or kind in one.kinds]


def corrupt_input(
    values: Tensor, name: str, *, severity: int = 5, kind: InputKind | None = None, mask: Tensor | None = None,
    statistics: tuple[float, float] = (0.0, 1.0), seed: int | torch.Generator = 0,
) -> CorruptedInput:  # fmt: skip
    """Corrupts the input of one modality.

    Masked values have no influence and keep their values: padding stays 0. The same seed gives the same damage for the
    same batch, and all severities use the same random numbers.

    Args:
        values: (batch, ...) input, see ``KINDS``.
        name: of the corruption, see ``CORRUPTIONS``.
        severity: 1 to 5.
        kind: of the input; by default as ``infer_kind`` returns.
        mask: (batch,), True if a sample has the modality, or (batch, frame), True for valid frames.
        statistics: (mean, std) of the training inputs, as in ``Dataset.noise``; the default fits standardized inputs.
        seed: of the random numbers, or a CPU generator.

    Returns:
        The corrupted values, and the mask, which ``swapped``, ``missing`` and dropped tokens change. ``swapped`` leaves
        a sample unchanged if no other sample of the batch has the modality.

    Raises:
        ConfigError: an unknown corruption, kind or severity, or a corruption that does not fit the kind.
        ShapeError: values or a mask that do not fit the kind.

    Example:
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> corrupt_input(torch.tensor([[[1.0], [2.0], [3.0], [0.0]]]), "frozen", mask=mask).values.flatten()
        tensor([1., 1., 1., 0.])
    """
    who = "corrupt_input"
    kind = infer_kind(values, who) if kind is None else kind
    check_kind(values, kind, who)
    check_corruptions([name], who, kind=kind)
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ConfigError(who, expected="a severity of 1, 2, 3, 4 or 5", got=repr(severity))
    if mask is not None:
        mask = bool_mask(mask, f"{who} mask", "a mask (batch,) or (batch, frame), True = valid", numbers=True)
        if mask.ndim == 0 or len(mask) != len(values):
            raise ShapeError(
                f"{who} mask", expected=f"a mask of {len(values)} samples", got=f"shape {tuple(mask.shape)}"
            )
    statistics = check_statistics(statistics, who)
    random = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(_seed(seed, name))
    chosen = CORRUPTIONS[name]
    level = chosen.levels[int(severity) - 1]
    if chosen.function is None:
        return _corrupt_samples(values, mask, level, random, swap=name == "swapped")
    if values.numel() == 0:
        return CorruptedInput(values, mask)
    frames, order = to_frames(values, kind, mask, statistics, random)
    result = from_frames(chosen.function(frames, level), values, frames, order)
    if kind == "tokens" and mask is not None and mask.shape == values.shape:
        mask = mask & ((result != 0) | (values == 0))
    return CorruptedInput(result, mask)


def corrupt_batch(
    batch: Mapping[str, Any], modality: str, name: str, *, severity: int = 5, kind: InputKind | None = None,
    statistics: tuple[float, float] = (0.0, 1.0), seed: int | torch.Generator = 0,
) -> dict[str, Any]:  # fmt: skip
    """Returns a batch with one modality corrupted, as in ``corrupt_input``; ``batch["mask"]`` is used and updated.

    ``batch["times"]`` stays as it is, except that a swapped sample has the times of its partner.

    Raises:
        ShapeError: the batch lacks the modality, or its input is not a tensor of a known kind.

    Example:
        >>> batch = {"audio": torch.ones(2, 3, 5), "image": torch.ones(2, 7)}
        >>> corrupt_batch(batch, "audio", "missing")["mask"]["audio"]
        tensor([False, False])
    """
    if not isinstance(batch.get(modality), Tensor):
        raise ShapeError(
            f"corrupt_batch '{modality}'", expected="a tensor in the batch", got=type(batch.get(modality)).__name__,
            fix="Leave out batches that lack the modality, or choose another one.",
        )  # fmt: skip
    masks = batch.get("mask") or {}
    corrupted = corrupt_input(
        batch[modality], name, severity=severity, kind=kind, mask=masks.get(modality), statistics=statistics, seed=seed
    )
    result = {**batch, modality: corrupted.values}
    if corrupted.mask is not None:
        result["mask"] = {**masks, modality: corrupted.mask}
    times = batch.get("times") or {}
    if corrupted.source is not None and modality in times:
        # The times of a swapped recording are its own.
        result["times"] = {**times, modality: times[modality][corrupted.source.to(times[modality].device)]}
    return result


def replace_samples(
    result: dict[str, Any], damaged: Mapping[str, Any], modality: str, hit: Bool[Tensor, " batch"]
) -> None:  # fmt: skip
    """Takes input, mask and times of one modality from a damaged batch for some samples.

    Args:
        result: the batch that is changed.
        damaged: as returned by ``corrupt_batch``.
        modality: the damaged modality.
        hit: the samples to replace.

    Example:
        >>> batch = {"audio": torch.ones(2, 3)}
        >>> replace_samples(batch, {"audio": torch.zeros(2, 3)}, "audio", torch.tensor([True, False]))
        >>> batch["audio"].sum(dim=1)
        tensor([0., 3.])
    """
    values = result[modality]
    here = hit.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
    result[modality] = torch.where(here, damaged[modality], values)
    mask = (damaged.get("mask") or {}).get(modality)
    if mask is not None:
        masks = result.get("mask") or {}
        before = masks.get(modality)
        before = torch.ones_like(mask) if before is None else before.to(mask.device).bool()
        chosen = hit.to(mask.device).reshape(-1, *[1] * (mask.ndim - 1))
        result["mask"] = {**masks, modality: torch.where(chosen, mask, before)}
    times = (damaged.get("times") or {}).get(modality)
    if times is not None:
        before = result["times"][modality]
        result["times"] = {**result["times"], modality: torch.where(hit.to(times.device)[:, None], times, before)}


def check_corruptions(names: Any, who: str, *, kind: str | None = None) -> None:
    """Checks names of corruptions, and that they fit a kind of input.

    Raises:
        ConfigError: an unknown name, or one that does not fit.
    """
    for name in names:
        if name not in CORRUPTIONS:
            raise unknown_name(who, "corruption", str(name), CORRUPTIONS)
        if kind is not None and kind not in CORRUPTIONS[name].kinds:
            raise ConfigError(
                who, expected=f"a corruption of the kind '{kind}': {', '.join(corruption_names(kind))}",
                got=f"'{name}', which fits {', '.join(CORRUPTIONS[name].kinds)}",
            )  # fmt: skip


def _seed(seed: int, name: str) -> int:
    """Seed of one corruption, so that two corruptions have different random numbers."""
    return (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63


def _corrupt_samples(
    values: Tensor, mask: Tensor | None, fraction: float, random: torch.Generator, *, swap: bool
) -> CorruptedInput:
    """Replaces whole samples by others, or marks them as missing."""
    batch = len(values)
    valid = torch.ones(batch, dtype=torch.bool, device=values.device) if mask is None else mask.to(values.device)
    present = valid.flatten(1).any(dim=1) if valid.ndim > 1 else valid
    hit = (torch.rand(batch, generator=random) < fraction).to(values.device) & present
    if swap:
        partner = replaced_values.swap_partners(present, random)
        source = torch.where(hit, partner, torch.arange(batch, device=values.device))
        return CorruptedInput(values[source], None if mask is None else valid[source], source)
    gone = hit.reshape(batch, *[1] * (values.ndim - 1))
    return CorruptedInput(values.masked_fill(gone, 0), valid & ~hit.reshape(batch, *[1] * (valid.ndim - 1)))
