"""Cross-modal matcher: soft matching maps between the items of modalities, including pairs without supervision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ...consistency import ConsistencyLoss, supermatrix
from ...consistency.consistency_loss import Kind as Term
from ...diagnostics.task_scores import correct
from ...errors import ConfigError, NonFiniteError, ShapeError
from ...io.class_registry import instantiate
from ...nn.attention.modular import Merge
from ...nn.eval_mode import eval_mode_no_grad
from ...tokens.token_batch import as_tokens
from ..self_contained import SelfContainedModel
from .item_maps import PairScores, matched_items, matching_maps
from .matcher_evaluation import SampledItemSets, evaluate_matching
from .modality_pairs import Pair, checked_pairs, transfer_pair, unordered_pairs
from .token_mixing import Kind, TokenMixing


class MatchingOutput(NamedTuple):
    """Output of ``CrossModalMatcher`` for a batch of scenes.

    Attributes:
        items: name -> (batch, item, dim).
        present: name -> (batch, item), False for items without a valid token.
        scores: ordered pair -> (batch, item, item) logits.
        maps: ordered pair -> (batch, item, item) with rows that sum to 1.
    """

    items: dict[str, Tensor]
    present: dict[str, Tensor]
    scores: dict[Pair, Tensor]
    maps: dict[Pair, Tensor]


class CrossModalMatcher(SelfContainedModel):
    """Predicts which items of a scene match across modalities, with supervision for some pairs of modalities only::

        x_m  = pooled tokens of modality m's encoder, one vector per item, optionally mixed by attention
        P_ij = softmax over the items of j of (x_i Q_ij) (x_j K_ij)^T / sqrt(width)
        loss = mean over the trained pairs, both directions, of -log P_ij[item, its match]
             + consistency * (log(r*(P) / M), |P|_* / (N M) - 1, or the cycle error)          of all blocks P_ij

    The map of an untrained pair is trained by the consistency term only; without that term its projections keep their
    initial values. A linear probe classifies each item from its own vector and the vectors that the maps select in the
    other modalities; its inputs are detached.

    Args:
        encoders: modality -> encoder of one item, all of the same width ``dim``.
        num_classes: number of item classes.
        pairs: pairs trained with known matches, such as ``[[audio, image], [image, text]]``.
        transfer: untrained pair to evaluate; the first pair not in ``pairs`` by default.
        dim: width of the encoders' tokens; their attribute ``dim`` by default.
        width: width of the projections.
        shared: one projection per modality instead of two per ordered pair. A control: all pairs then share one
            embedding space, which gives an untrained pair a map as well.
        mixing: module between encoders and maps: ``"none"``, blocks of ``"attention"`` over all items, or ``"moda"``,
            the same blocks with MODA's aligned keys and modular attention.
        depth, heads, merge: options of the blocks; ``merge`` for "moda" only.
        sinkhorn: Sinkhorn iterations that make the maps doubly stochastic; 0 keeps the softmax over rows.
        consistency: weight of the consistency term; 0 disables it.
        kind: ``"rank"``, ``"nuclear"`` or ``"cycle"``, see `equipoise.ConsistencyLoss`.
        temperature: divides the scores in the consistency term; values below 1 sharpen the maps.

    Raises:
        ConfigError: fewer than three encoders, or of different width; unknown pairs or none; numbers out of range. In
            ``losses`` and ``evaluate``, ShapeError: inputs or targets that do not fit. NonFiniteError: NaN in an input,
            with the modality's name.

    The model is our own; the consistency term follows the references in `equipoise.consistency`.

    Example:
        >>> encoders = {name: nn.Linear(5, 8) for name in ("audio", "image", "text")}
        >>> pairs = [["audio", "image"], ["image", "text"]]
        >>> model = CrossModalMatcher(encoders, 10, pairs=pairs, consistency=1.0, dim=8)
        >>> scene = {name: torch.randn(2, 3, 5) for name in encoders}
        >>> sorted(model.losses({**scene, "target": torch.arange(3).expand(2, 3, 3)}))
        ['consistency', 'matching', 'probe']
    """

    name = "cross_modal_matcher"
    score = "transfer"

    def __init__(
        self, encoders: Mapping[str, nn.Module], num_classes: int, *, pairs: Sequence[Sequence[str]],
        transfer: Sequence[str] | None = None, dim: int | None = None, width: int = 32, shared: bool = False,
        mixing: Kind = "none", depth: int = 1, heads: int = 1, merge: Merge = "gate", sinkhorn: int = 0,
        consistency: float = 0.0, kind: Term = "rank", temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.names = tuple(encoders)
        if len(self.names) < 3:
            raise ConfigError("CrossModalMatcher", expected="three or more modalities", got=f"{len(self.names)}")
        if not (0 <= consistency < math.inf and temperature > 0 and width >= 1 and sinkhorn >= 0):
            raise ConfigError(
                "CrossModalMatcher",
                expected="a finite consistency >= 0, temperature > 0, width >= 1 and sinkhorn >= 0",
                got=f"consistency = {consistency}, temperature = {temperature}, width = {width}, sinkhorn = {sinkhorn}",
            )
        self.pairs = checked_pairs(pairs, self.names)
        self.transfer = transfer_pair(self.pairs, transfer, self.names)
        self.dim = _width(encoders) if dim is None else dim
        self.sinkhorn, self.consistency, self.temperature = sinkhorn, consistency, temperature
        self.encoders = nn.ModuleDict(encoders)
        self.mixing = TokenMixing(self.names, self.dim, kind=mixing, depth=depth, heads=heads, merge=merge)
        self.scores = PairScores(self.names, self.dim, width=width, shared=shared)
        if not consistency:
            for pair in unordered_pairs(self.names):
                if pair not in self.pairs:
                    # DistributedDataParallel would wait forever for the gradients of unused parameters.
                    self.scores.freeze(pair)
        self.probes = nn.ModuleDict({n: nn.Linear(self.dim * len(self.names), num_classes) for n in self.names})
        self.term = ConsistencyLoss(slots=None, kind=kind, weight=consistency) if consistency else None

    @classmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> CrossModalMatcher:
        if getattr(source, "task", None) != "correspondence":
            raise ConfigError(
                "model 'cross_modal_matcher'", expected="data of scenes with several items per sample",
                got=f"{type(source).__name__} for {getattr(source, 'task', 'nothing')}",
                fix="Use data: {name: triples, items: 4}.",
            )  # fmt: skip
        return instantiate(
            cls, "model 'cross_modal_matcher'", options, encoders=encoders, num_classes=source.num_outputs
        )

    def forward(self, batch: Mapping[str, Tensor | None]) -> MatchingOutput:
        """Computes the maps of a batch of scenes.

        Args:
            batch: name -> (batch, item, ...); a modality that is None or absent is missing and has no maps. An item
                without a valid token, such as an empty word, is missing too.
        """
        items, present = {}, {}
        for name in self.names:
            if (values := batch.get(name)) is not None:
                items[name], present[name] = self._encode(name, values)
        if len({tuple(mask.shape[:1]) for mask in present.values()}) != 1:
            raise ShapeError(
                "CrossModalMatcher", expected="at least one modality, all with the same number of scenes",
                got=f"{ {name: len(mask) for name, mask in present.items()} }",
            )  # fmt: skip
        items = self.mixing(items, present)
        scores = self.scores(items)
        return MatchingOutput(items, present, scores, matching_maps(scores, present, sinkhorn=self.sinkhorn))

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = self(batch)
        target = self._target(batch, output)
        losses = {"matching": self._matching_loss(output, target), "probe": self._probe_loss(output, target)}
        if self.term is not None:
            matrix = self.supermatrix(output, temperature=self.temperature)
            losses["consistency"] = self.term.of(matrix, len(self.names))
        return losses

    def evaluate(self, source: Any) -> dict[str, Any]:
        return {"metrics": self.evaluate_split(source, "test")}

    def evaluate_split(self, source: Any, split: str) -> dict[str, float]:
        """The metrics of ``evaluate_matching`` on a split."""
        with eval_mode_no_grad(self):
            batches = source.batches(split, 256, seed=0, epoch=0, train=False)
            return evaluate_matching(map(self._scenes, batches), self.names, self.pairs, self.transfer)

    def complete(self, output: MatchingOutput) -> Bool[Tensor, " batch"]:
        """True for scenes without missing items."""
        if len(output.items) < len(self.names):
            return next(iter(output.present.values())).new_zeros(len(next(iter(output.items.values()))))
        return torch.cat([output.present[name] for name in self.names], dim=1).all(dim=1)

    def supermatrix(self, output: MatchingOutput, *, temperature: float = 1.0) -> Float[Tensor, "scene size size"]:
        """The supermatrix P of every complete scene; scores are divided by ``temperature`` first."""
        complete = self.complete(output)
        masks = {name: output.present[name][complete] for name in output.present}
        scores = {pair: values[complete] for pair, values in output.scores.items()}
        if len(output.items) < len(self.names):
            size = len(self.names) * next(iter(masks.values())).shape[1]
            return next(iter(output.items.values())).new_zeros(0, size, size)
        return supermatrix(
            matching_maps(scores, masks, sinkhorn=self.sinkhorn, temperature=temperature), names=self.names
        )

    def probe_logits(self, output: MatchingOutput) -> dict[str, Float[Tensor, "batch item num_classes"]]:
        """Class logits of each item from its own vector and those that the maps select; inputs are detached."""
        logits = {}
        for name, items in output.items.items():
            inputs = [
                items if other == name
                else output.maps[name, other] @ output.items[other] if other in output.items
                else torch.zeros_like(items)
                for other in self.names
            ]  # fmt: skip
            logits[name] = self.probes[name](torch.cat(inputs, dim=-1).detach())
        return logits

    def _matching_loss(self, output: MatchingOutput, target: Int[Tensor, "batch modality item"]) -> Float[Tensor, ""]:
        total = next(iter(output.items.values())).new_zeros(())
        for one, other in [(a, b) for pair in self.pairs for a, b in (pair, pair[::-1])]:
            if (one, other) not in output.maps:
                continue
            index, has_match = self.matches(output, target, one, other)
            probability = output.maps[one, other].gather(-1, index[..., None])[..., 0]
            losses = -probability.clamp(min=torch.finfo(probability.dtype).tiny).log()
            total = total + losses.masked_fill(~has_match, 0.0).sum() / has_match.sum().clamp(min=1)
        return total / (2 * len(self.pairs))

    def matches(
        self, output: MatchingOutput, target: Int[Tensor, "batch modality item"], one: str, other: str
    ) -> tuple[Int[Tensor, "batch item"], Bool[Tensor, "batch item"]]:
        """Index of each item's match, and whether both are present."""
        index, has_match = matched_items(target, self.names.index(one), self.names.index(other))
        return index, has_match & output.present[one] & output.present[other].gather(1, index)

    def _scenes(self, batch: Mapping[str, Tensor]) -> SampledItemSets:
        device = next(self.parameters()).device
        batch = {name: values.to(device) for name, values in batch.items()}
        output = self(batch)
        target = self._target(batch, output)
        matches = {pair: self.matches(output, target, *pair) for pair in output.maps}
        class_correct = {
            name: correct(logits, target[:, self.names.index(name)])[output.present[name]]
            for name, logits in self.probe_logits(output).items()
        }
        index, has_match = ({pair: both[part] for pair, both in matches.items()} for part in (0, 1))
        return SampledItemSets(output.maps, index, has_match, self.complete(output), class_correct)

    def _probe_loss(self, output: MatchingOutput, target: Int[Tensor, "batch modality item"]) -> Float[Tensor, ""]:
        losses = []
        for name, logits in self.probe_logits(output).items():
            item_losses = F.cross_entropy(logits.transpose(1, 2), target[:, self.names.index(name)], reduction="none")
            present = output.present[name]
            losses.append(item_losses.masked_fill(~present, 0.0).sum() / present.sum().clamp(min=1))
        return torch.stack(losses).mean()

    def _encode(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes items to (batch, item, dim); also returns which of them are present."""
        if values.ndim < 3:
            raise ShapeError(
                f"CrossModalMatcher '{name}'", expected="(batch, item, ...)", got=f"shape {tuple(values.shape)}",
                fix="Add an item dimension to single items: values[:, None].",
            )  # fmt: skip
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"CrossModalMatcher '{name}'", expected="finite inputs", got="NaN or infinity")
        tokens = as_tokens(self.encoders[name](values.flatten(0, 1)), f"encoder '{name}'")
        if tokens.dim != self.dim:
            raise ShapeError(f"encoder '{name}'", expected=f"tokens of width dim = {self.dim}", got=f"{tokens.dim}")
        shape = tuple(values.shape[:2])
        return tokens.pooled().unflatten(0, shape), tokens.present().unflatten(0, shape)

    def _target(self, batch: Mapping[str, Tensor], output: MatchingOutput) -> Int[Tensor, "batch modality item"]:
        counts = {name: mask.shape[1] for name, mask in output.present.items()}
        if len(set(counts.values())) > 1:
            raise ShapeError("CrossModalMatcher", expected="equally many items in all modalities", got=f"{counts}")
        target, (scenes, items) = batch["target"], next(iter(output.present.values())).shape
        if tuple(target.shape) != (scenes, len(self.names), items) or target.is_floating_point():
            raise ShapeError(
                "CrossModalMatcher target", got=f"shape {tuple(target.shape)}, {target.dtype}",
                expected=f"class indices (batch, modality, item) = {(scenes, len(self.names), items)}",
            )  # fmt: skip
        return target


def _width(encoders: Mapping[str, nn.Module]) -> int:
    widths = {name: getattr(encoder, "dim", None) for name, encoder in encoders.items()}
    width = next(iter(widths.values()))
    if width is None or len(set(widths.values())) != 1:
        raise ConfigError(
            "CrossModalMatcher", expected="encoders of one width", got=f"{widths}", fix="Give all the same dim.",
        )  # fmt: skip
    return width
