"""Cycle consistency of the attention maps between modalities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..consistency import cycle_error, ideal_spectrum, pair_error, pool_to_slots, spectral, supermatrix, worst_cycles
from ..errors import ConfigError, ShapeError, unknown_name
from ..recording import labels_for, open_session
from ..tokens.token_batch import Output
from .prediction_collection import collect_predictions
from .token_maps_reader import MapReader, TokenMaps, token_maps

Source = Literal["attention", "tokens"]
WHO = "attention_consistency"


@dataclass(frozen=True)
class CycleError:
    """An inconsistent cycle, which ends at another token than it started from.

    Attributes:
        way: names of its tokens, such as ("audio 'bark'", "video 'dog'", "text 'man'", "audio 'silence'").
        strength: product of the map entries along the cycle, in [0, 1].
        even: its strength under uniform attention.
    """

    way: tuple[str, ...]
    strength: float
    even: float

    def __str__(self) -> str:
        return " -> ".join(self.way)


@dataclass(frozen=True, eq=False)
class LayerConsistency:
    """Consistency of the maps of one layer; values are means over samples.

    Attributes:
        site: name of the layer.
        samples: number of samples with all modalities.
        score: 1 for consistent one-to-one maps, 0 for inconsistent ones; ``spread`` is its standard deviation over
            samples, and ``even`` the score of uniform attention.
        effective_rank, contradiction_excess, top_energy: see ``consistency.rank``.
        cycle_error, pair_error: see ``consistency.cycle``; with two modalities both are the pair error.
        matrix: mean maps from rows to columns, with ``sizes`` groups of tokens for each modality.
        tokens: name of each row.
        spectrum: singular values of its symmetric part; ``ideal`` those of consistent one-to-one maps.
        cycles: inconsistent cycles of ``matrix``, strongest first.
    """

    site: str
    samples: int
    score: float
    spread: float
    even: float
    effective_rank: float
    contradiction_excess: float
    top_energy: float
    cycle_error: float
    pair_error: float
    matrix: Float[Tensor, "size size"]
    sizes: tuple[int, ...]
    tokens: tuple[str, ...]
    spectrum: tuple[float, ...]
    ideal: tuple[float, ...]
    cycles: tuple[CycleError, ...]


@dataclass(frozen=True, eq=False)
class AttentionConsistency:
    """Result of ``attention_consistency``.

    Attributes:
        names: of the modalities.
        layers: layers with attention between the tokens of all modalities, in calling order.
        skipped: layer -> reason why it has no maps.
    """

    names: tuple[str, ...]
    layers: tuple[LayerConsistency, ...]
    skipped: dict[str, str]

    @property
    def worst(self) -> LayerConsistency:
        """The layer with the largest cycle error."""
        return max(self.layers, key=lambda layer: layer.cycle_error)

    def __str__(self) -> str:
        """One line for each layer, and the inconsistent cycles of the worst layer."""
        lines = [
            f"{layer.site}: score {layer.score:.2f} (uniform attention {layer.even:.2f}), "
            f"cycle error {layer.cycle_error:.2f}, pair error {layer.pair_error:.2f}"
            for layer in self.layers
        ]
        return "\n".join([*lines, *(f"{cycle} ({cycle.strength:.2f})" for cycle in self.worst.cycles)])

    def to_dict(self) -> dict[str, Any]:
        """Returns the values in JSON-able form."""
        rows = []
        for layer in self.layers:
            row = {**vars(layer), "matrix": [[round(value, 5) for value in line] for line in layer.matrix.tolist()]}
            rows.append({**row, "cycles": [asdict(cycle) for cycle in layer.cycles]})
        return {"names": list(self.names), "layers": rows, "skipped": dict(self.skipped)}


def attention_consistency(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    source: Source = "attention",
    tokens: Mapping[str, Sequence[str]] | None = None,
    samples: int = 64,
    parts: int = 12,
    worst: int = 5,
    temperature: float = 0.1,
) -> AttentionConsistency:
    """Measures the cycle consistency of the attention maps between modalities.

    For each layer with attention between the modalities, block (i, j) of P is the attention of modality i to modality
    j, averaged over heads and normalized to rows that sum to 1; the diagonal blocks are I::

        score = (T - r*) / (T - K),  r* = |P|_*^2 / |P|_F^2      of (P + P^T) / 2, T tokens, K = min_i M_i
        cycle = mean |P_ij P_jk - P_ik|_F^2 / 2 M_i,  pair = mean |P_ij P_ji - I|_F^2 / 2 M_i      of P itself

    computed for each sample without padding and averaged. The attention matrix is recomputed explicitly for the first
    ``samples`` samples, since fused kernels do not return it.

    Args:
        model: a FusionModel, or a module with ``names`` and attention layers of equipoise that returns Output.
        loader: batches, dicts with every modality.
        source: ``"tokens"`` compares the tokens of the encoders by cosine instead, for fusions without such layers.
        tokens: modality -> names of its tokens; by default "audio token 3".
        samples: number of samples.
        parts: maximum number of token groups of a modality in the mean matrix.
        worst: number of inconsistent cycles to return.
        temperature: of the softmax of cosines.

    Returns:
        AttentionConsistency. Training modes, ``.grad``, hooks and the RNG state are restored.

    Raises:
        ConfigError: no layer with attention between the tokens of all modalities, a single modality, no sample with all
            modalities, or an invalid option. ShapeError: an empty loader, or names that do not fit.

    Two modalities have no cycles: the score then measures how close the maps are to one-to-one maps, and only the pair
    error measures inconsistency. Soft maps hide inconsistencies, and maps with unequal numbers of tokens cannot reach
    1.
    The mean matrix is taken by position: if positions have a different meaning in each sample, it is uniform.

    """
    if source not in ("attention", "tokens") or min(samples, parts, worst + 1) < 1 or temperature <= 0:
        raise ConfigError(
            WHO, expected="source 'attention' or 'tokens', samples >= 1, parts >= 1, worst >= 0 and temperature > 0",
            got=f"source = {source!r}, samples = {samples}, parts = {parts}, worst = {worst}, "
            f"temperature = {temperature}",
        )  # fmt: skip
    for name in tokens or ():
        if name not in getattr(model, "names", ()):
            raise unknown_name(f"{WHO} tokens", "modality", name, getattr(model, "names", ()))
    names, layers, skipped = _maps(model, loader, source, samples, temperature)
    results = [_layer(site, mapped, names, tokens or {}, parts, worst) for site, mapped in layers.items()]
    return AttentionConsistency(names, tuple(results), skipped)


def _maps(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], source: Source, samples: int, temperature: float
) -> tuple[tuple[str, ...], dict[str, list[TokenMaps]], dict[str, str]]:
    """Returns names, layer -> maps of its samples, and layer -> reason for layers without maps."""
    reader, maps = MapReader(samples), []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Output):
            if source == "tokens":
                maps.extend(token_maps(output.tokens, reader.left(len(output.features)), temperature))
            reader.passed(len(output.features))

    labeler, ways, follow = labels_for(model, None, None)
    handle = model.register_forward_hook(keep)
    try:
        with open_session(model, labeler, ways, follow, reader):
            names = collect_predictions(model, reader.enough(loader)).names
    finally:
        handle.remove()
    if len(names) < 2:
        raise ConfigError(WHO, expected="two or more modalities", got=f"one, '{next(iter(names))}'")
    if source == "tokens":
        if not maps:
            raise ConfigError(WHO, expected="samples with tokens of all modalities", got="none")
        return names, {"tokens": maps}, {}
    layers = reader.layers()
    if not layers:
        raise ConfigError(
            WHO, expected="a layer with attention between the tokens of all modalities", got=reader.nothing(),
            fix="Use source='tokens' to compare the tokens of the encoders instead.",
        )  # fmt: skip
    return reader.names, layers, {site: why for site, why in reader.reasons.items() if site not in layers}


def _layer(
    site: str, mapped: Sequence[TokenMaps], names: tuple[str, ...], tokens: Mapping[str, Sequence[str]], parts: int,
    worst: int,
) -> LayerConsistency:  # fmt: skip
    """Computes the values of each sample, batched by size, and their means."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for sample in mapped:
        groups.setdefault(sample.sizes, []).append(sample.matrix)
    sizes = tuple(min(parts, *column) for column in zip(*groups, strict=True))
    rows, mean = [], torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for group_sizes, matrices in groups.items():
        stack = torch.stack(matrices)
        rows.append(_figures(stack, group_sizes))
        mean += pool_to_slots(stack, sizes=group_sizes, parts=sizes).sum(dim=0) / len(mapped)
    figures = torch.cat(rows, dim=1)
    values = dict(zip(FIGURES, figures.mean(dim=1).tolist(), strict=True))
    row_names = _row_names(names, sizes, list(groups), tokens)
    rows_of = {slot: number for number, slot in enumerate((i, k) for i, few in enumerate(sizes) for k in range(few))}
    cycles = [
        CycleError(
            tuple(row_names[rows_of[station]] for station in cycle.path),
            cycle.strength,
            math.prod(1 / sizes[modality] for modality, _ in cycle.path[1:]),
        )
        for cycle in worst_cycles(mean, sizes=sizes, most=worst)
    ]
    spectrum = torch.linalg.svdvals((mean + mean.mT) / 2)
    return LayerConsistency(
        site=site, samples=len(mapped), spread=float(figures[0].std(correction=0)), matrix=mean, sizes=sizes,
        tokens=tuple(row_names), spectrum=tuple(spectrum.tolist()), ideal=tuple(ideal_spectrum(sizes)),
        cycles=tuple(cycles), **values,
    )  # fmt: skip


FIGURES = (
    "score", "even", "effective_rank", "contradiction_excess", "top_energy", "cycle_error", "pair_error",
)  # fmt: skip


def _figures(matrix: Float[Tensor, "sample size size"], sizes: tuple[int, ...]) -> Float[Tensor, "figure sample"]:
    """Returns one row for each of ``FIGURES``."""
    blocks = [[torch.full((a, b), 1 / b, dtype=matrix.dtype) for b in sizes] for a in sizes]
    spectrum, even = (spectral((part + part.mT) / 2, sizes=sizes) for part in (matrix, supermatrix(blocks)))
    return torch.stack(
        [
            spectrum.consistency_score, even.consistency_score.expand(len(matrix)), spectrum.effective_rank,
            spectrum.contradiction_excess, spectrum.top_energy, cycle_error(matrix, sizes=sizes),
            pair_error(matrix, sizes=sizes),
        ]
    )  # fmt: skip


def _row_names(
    names: tuple[str, ...], sizes: tuple[int, ...], each: Sequence[tuple[int, ...]],
    tokens: Mapping[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """Name of each row: that of the user, or the index of its token or group."""
    rows = []
    for index, (name, few) in enumerate(zip(names, sizes, strict=True)):
        most = max(counts[index] for counts in each)
        alike = all(counts[index] == most for counts in each)
        labels = [f"'{word}'" for word in tokens[name]] if name in tokens else None
        if labels is not None and len(labels) < most:
            raise ShapeError(
                f"{WHO} tokens '{name}'", expected=f"a name for each of its {most} tokens", got=f"{len(labels)}"
            )
        for part in range(few):
            first, last = part * most // few, -(-(part + 1) * most // few) - 1
            if few == most or (alike and first == last):
                rows.append(f"{name} token {first + 1}" if labels is None else f"{name} {labels[first]}")
            elif alike:
                rows.append(f"{name} tokens {first + 1} to {last + 1}" if labels is None else
                             f"{name} {labels[first]} to {labels[last]}")  # fmt: skip
            else:
                rows.append(f"{name} part {part + 1} of {few}")
    return rows
