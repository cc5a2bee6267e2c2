"""Does a model's attention agree with itself: who goes round the modalities, does he come home? (spec 6)"""

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
    """A way round that comes back to another token.

    Attributes:
        way: its stations in words, such as ("audio 'bark'", "video 'dog'", "text 'man'", "audio 'silence'").
        strength: the product of the maps' entries on it, in [0, 1].
        even: what attention that tells no token from another would give it.
    """

    way: tuple[str, ...]
    strength: float
    even: float

    def __str__(self) -> str:
        return " -> ".join(self.way)


@dataclass(frozen=True, eq=False)
class LayerConsistency:
    """How far the maps of one layer agree; figures are means over samples.

    Attributes:
        site: name of the layer.
        samples: how many had all modalities.
        score: 1 for hard maps that agree, 0 for none; ``spread`` is its deviation over samples, and ``even`` what
            attention that tells no token from another would score.
        effective_rank, contradiction_excess, top_energy: see ``consistency.rank``.
        cycle_error, pair_error: see ``consistency.cycle``; with two modalities both are the error of pairs.
        matrix: mean maps, rows to columns, of ``sizes`` stretches of tokens for each modality.
        tokens: name of each row.
        spectrum: singular values of its symmetric part; ``ideal`` those of hard maps that agree.
        cycles: the worst contradictions of ``matrix``, the strongest first.
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
    """What ``attention_consistency`` found.

    Attributes:
        names: of the modalities.
        layers: those in which tokens of all modalities read one another, in calling order.
        skipped: site -> why it has no maps.
    """

    names: tuple[str, ...]
    layers: tuple[LayerConsistency, ...]
    skipped: dict[str, str]

    @property
    def worst(self) -> LayerConsistency:
        """The layer that contradicts itself most."""
        return max(self.layers, key=lambda layer: layer.cycle_error)

    def __str__(self) -> str:
        """A line for each layer, and the worst contradictions of the worst."""
        lines = [
            f"{layer.site}: score {layer.score:.2f} (even attention {layer.even:.2f}), "
            f"cycle error {layer.cycle_error:.2f}, pair error {layer.pair_error:.2f}"
            for layer in self.layers
        ]
        return "\n".join([*lines, *(f"{cycle} ({cycle.strength:.2f})" for cycle in self.worst.cycles)])

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and numbers."""
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
    """Do the maps between modalities agree: where a sound goes to a picture and that to a word, does it go to the word?

    Of each layer in which tokens of the modalities read one another, block (i, j) of P is the attention of i to j,
    mean over heads, divided by what i gives to j in all; I stands on the diagonal::

        score = (T - r*) / (T - K),  r* = |P|_*^2 / |P|_F^2      of (P + P^T) / 2, T tokens, K those of the fewest
        cycle = mean |P_ij P_jk - P_ik|_F^2 / 2 M_i,  pair = mean |P_ij P_ji - I|_F^2 / 2 M_i      of P itself

    in each sample, its padding left out, and then as a mean. Fused kernels build no attention matrix, so it is written
    out here, for the first ``samples`` alone.

    Args:
        model: a FusionModel, or a module with the modalities' names and layers of equipoise that returns Output.
        loader: batches, dicts with every modality.
        source: ``"tokens"`` compares the encoders' tokens by cosine instead, for fusions without such a layer.
        tokens: modality -> a name for each of its tokens; "audio token 3" without.
        samples: how many are looked at.
        parts: most stretches of tokens of a modality in the mean matrix.
        worst: how many contradictions are named.
        temperature: of the softmax of cosines.

    Returns:
        AttentionConsistency. Modes, ``.grad``, hooks and random state are as they were.

    Raises:
        ConfigError: no layer in which tokens of all modalities read one another, with the reason; a single modality, no
            sample that has them all, an option that does not exist. ShapeError: an empty loader, names that do not fit.

    Two modalities have no cycles: the score then says how hard their maps are, and the error of pairs alone whether
    they contradict each other. Soft maps hide contradictions, and maps of unequal numbers of tokens cannot reach 1. The
    mean matrix is one of places: where a place means something else in each sample, it is even.

    Reference: spec 6.
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
    found = [_layer(site, mapped, names, tokens or {}, parts, worst) for site, mapped in layers.items()]
    return AttentionConsistency(names, tuple(found), skipped)


def _maps(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], source: Source, samples: int, temperature: float
) -> tuple[tuple[str, ...], dict[str, list[TokenMaps]], dict[str, str]]:
    """Names, layer -> the maps of its samples, and why others have none."""
    reader, given = MapReader(samples), []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Output):
            if source == "tokens":
                given.extend(token_maps(output.tokens, reader.left(len(output.features)), temperature))
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
        if not given:
            raise ConfigError(WHO, expected="samples with tokens of all modalities", got="none")
        return names, {"tokens": given}, {}
    layers = reader.layers()
    if not layers:
        raise ConfigError(
            WHO, expected="a layer in which tokens of all modalities read one another", got=reader.nothing(),
            fix="source='tokens' compares the encoders' tokens instead.",
        )  # fmt: skip
    return reader.names, layers, {site: why for site, why in reader.reasons.items() if site not in layers}


def _layer(
    site: str, mapped: Sequence[TokenMaps], names: tuple[str, ...], tokens: Mapping[str, Sequence[str]], parts: int,
    worst: int,
) -> LayerConsistency:  # fmt: skip
    """Figures of each sample, those of equal sizes together, and their means."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for sample in mapped:
        groups.setdefault(sample.sizes, []).append(sample.matrix)
    sizes = tuple(min(parts, *column) for column in zip(*groups, strict=True))
    rows, mean = [], torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for own, matrices in groups.items():
        stack = torch.stack(matrices)
        rows.append(_figures(stack, own))
        mean += pool_to_slots(stack, sizes=own, parts=sizes).sum(dim=0) / len(mapped)
    figures = torch.cat(rows, dim=1)
    said = dict(zip(FIGURES, figures.mean(dim=1).tolist(), strict=True))
    called = _called(names, sizes, list(groups), tokens)
    places = {place: number for number, place in enumerate((i, k) for i, few in enumerate(sizes) for k in range(few))}
    cycles = [
        CycleError(
            tuple(called[places[station]] for station in cycle.path),
            cycle.strength,
            math.prod(1 / sizes[modality] for modality, _ in cycle.path[1:]),
        )
        for cycle in worst_cycles(mean, sizes=sizes, most=worst)
    ]
    spectrum = torch.linalg.svdvals((mean + mean.mT) / 2)
    return LayerConsistency(
        site=site, samples=len(mapped), spread=float(figures[0].std(correction=0)), matrix=mean, sizes=sizes,
        tokens=tuple(called), spectrum=tuple(spectrum.tolist()), ideal=tuple(ideal_spectrum(sizes)),
        cycles=tuple(cycles), **said,
    )  # fmt: skip


FIGURES = (
    "score", "even", "effective_rank", "contradiction_excess", "top_energy", "cycle_error", "pair_error",
)  # fmt: skip


def _figures(matrix: Float[Tensor, "sample size size"], sizes: tuple[int, ...]) -> Float[Tensor, "figure sample"]:
    """A row for each of ``FIGURES``."""
    blocks = [[torch.full((a, b), 1 / b, dtype=matrix.dtype) for b in sizes] for a in sizes]
    found, even = (spectral((part + part.mT) / 2, sizes=sizes) for part in (matrix, supermatrix(blocks)))
    return torch.stack(
        [
            found.consistency_score, even.consistency_score.expand(len(matrix)), found.effective_rank,
            found.contradiction_excess, found.top_energy, cycle_error(matrix, sizes=sizes),
            pair_error(matrix, sizes=sizes),
        ]
    )  # fmt: skip


def _called(
    names: tuple[str, ...], sizes: tuple[int, ...], each: Sequence[tuple[int, ...]],
    tokens: Mapping[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """A name for each row: the user's, else the number of its token or of its stretch."""
    found = []
    for place, (name, few) in enumerate(zip(names, sizes, strict=True)):
        most = max(own[place] for own in each)
        alike = all(own[place] == most for own in each)
        said = [f"'{word}'" for word in tokens[name]] if name in tokens else None
        if said is not None and len(said) < most:
            raise ShapeError(
                f"{WHO} tokens '{name}'", expected=f"a name for each of its {most} tokens", got=f"{len(said)}"
            )
        for part in range(few):
            first, last = part * most // few, -(-(part + 1) * most // few) - 1
            if few == most or (alike and first == last):
                found.append(f"{name} token {first + 1}" if said is None else f"{name} {said[first]}")
            elif alike:
                found.append(f"{name} tokens {first + 1} to {last + 1}" if said is None else
                             f"{name} {said[first]} to {said[last]}")  # fmt: skip
            else:
                found.append(f"{name} part {part + 1} of {few}")
    return found
