"""Which item of one modality is which of another: maps of pairs, some never trained, and their agreement."""

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
from ...nn.attention.modular import Merge
from ...nn.eval_mode import eval_mode_no_grad
from ...registry import instantiate
from ...tokens.token_batch import as_tokens
from ..self_contained import SelfContainedModel
from .item_maps import PairScores, matched_items, matching_maps
from .matcher_evaluation import SampledItemSets, evaluate_matching
from .modality_pairs import Pair, checked_pairs, unordered_pairs, untrained_pairs
from .token_mixing import Kind, TokenMixing


class MatchingOutput(NamedTuple):
    """What the model sees in a batch of scenes.

    Attributes:
        items: name -> (batch, item, dim).
        present: name -> (batch, item), False for items without a token.
        scores: ordered pair -> (batch, item, item) logits.
        maps: the same as maps: rows sum to 1.
    """

    items: dict[str, Tensor]
    present: dict[str, Tensor]
    scores: dict[Pair, Tensor]
    maps: dict[Pair, Tensor]


class CrossModalMatcher(SelfContainedModel):
    """Maps the items of a scene from each modality to each other one, and is told the truth for some pairs alone::

        x_m  = pooled tokens of modality m's encoder, one vector for each item, mixed or not
        P_ij = softmax over the items of j of (x_i Q_ij) (x_j K_ij)^T / sqrt(width)
        loss = mean over the trained pairs, both ways, of -log P_ij[item, its partner]
             + consistency * (log(r*(P) / M), |P|_* / (N M) - 1, or the cycle error)          of all blocks P_ij

    A map of a pair that is not trained learns by the consistency term or not at all: without it its projections stay as
    they were made. A probe tells which digit an item is, from the item and what it reads of the others by the maps;
    it teaches nothing to them.

    Args:
        encoders: modality -> encoder of one item, all of one width ``dim``.
        num_classes: of the items.
        pairs: those whose partners are told, such as ``[[audio, image], [image, text]]``.
        transfer: the pair that is judged as never trained; by default the first that ``pairs`` leaves out.
        dim: width of the encoders' tokens; by default what they say of themselves.
        width: of the projections.
        shared: one projection for each modality in place of two for each ordered pair: a control, in which a pair that
            was never trained has a map all the same.
        mixing: what stands between encoders and maps: ``"none"``, a block of ``"attention"`` over all items, or
            ``"moda"``, the same block with MODA's aligned keys and divided attention.
        depth, heads, merge: of the blocks; ``merge`` of "moda" alone.
        sinkhorn: alternations that make maps doubly stochastic; 0 leaves softmax over rows.
        consistency: weight of the term; 0 leaves it out.
        kind: ``"rank"``, ``"nuclear"`` or ``"cycle"``, see `equipoise.ConsistencyLoss`.
        temperature: scores are divided by it before the term looks at them; below 1 sharpens.

    Raises:
        ConfigError: fewer than three encoders, or of different width; pairs that do not exist, or none; numbers out
            of range. In ``losses`` and ``evaluate``, ShapeError: inputs or targets that do not fit. NonFiniteError: NaN
            in an input, with the modality's name.

    Reference: spec 6.3 and 6.4; ours.

    Example:
        >>> encoders = {name: nn.Linear(5, 8) for name in ("audio", "image", "text")}
        >>> model = Correspondence(encoders, 10, pairs=[["audio", "image"], ["image", "text"]], consistency=1.0, dim=8)
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
            raise ConfigError("Correspondence", expected="three or more modalities", got=f"{len(self.names)}")
        if not (0 <= consistency < math.inf and temperature > 0 and width >= 1 and sinkhorn >= 0):
            raise ConfigError(
                "Correspondence", expected="a finite consistency >= 0, temperature > 0, width >= 1 and sinkhorn >= 0",
                got=f"consistency = {consistency}, temperature = {temperature}, width = {width}, sinkhorn = {sinkhorn}",
            )  # fmt: skip
        self.pairs = checked_pairs(pairs, self.names)
        self.transfer = untrained_pairs(self.pairs, transfer, self.names)
        self.dim = _width(encoders) if dim is None else dim
        self.sinkhorn, self.consistency, self.temperature = sinkhorn, consistency, temperature
        self.encoders = nn.ModuleDict(encoders)
        self.mixing = TokenMixing(self.names, self.dim, kind=mixing, depth=depth, heads=heads, merge=merge)
        self.scores = PairScores(self.names, self.dim, width=width, shared=shared)
        if not consistency:
            for pair in unordered_pairs(self.names):
                if pair not in self.pairs:
                    # What no loss reaches would be waited for in vain where processes share gradients.
                    self.scores.freeze(pair)
        self.probes = nn.ModuleDict({n: nn.Linear(self.dim * len(self.names), num_classes) for n in self.names})
        self.term = ConsistencyLoss(slots=None, kind=kind, weight=consistency) if consistency else None

    @classmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> CrossModalMatcher:
        if getattr(source, "task", None) != "correspondence":
            raise ConfigError(
                "model 'cross_modal_matcher'", expected="data of scenes, several items in a sample",
                got=f"{type(source).__name__} for {getattr(source, 'task', 'nothing')}",
                fix="Take data: {name: triples, items: 4}.",
            )  # fmt: skip
        return instantiate(
            cls, "model 'cross_modal_matcher'", options, encoders=encoders, num_classes=source.num_outputs
        )

    def forward(self, batch: Mapping[str, Tensor | None]) -> MatchingOutput:
        """The maps of a batch of scenes.

        Args:
            batch: name -> (batch, item, ...); a modality that is None or not there is missing, and has no maps. An
                item none of whose tokens is valid, such as an empty word, is missing too.
        """
        items, present = {}, {}
        for name in self.names:
            if (values := batch.get(name)) is not None:
                items[name], present[name] = self._encoded(name, values)
        if len({tuple(mask.shape[:1]) for mask in present.values()}) != 1:
            raise ShapeError(
                "Correspondence", expected="modalities with the same scenes, one at least",
                got=f"{ {name: len(mask) for name, mask in present.items()} }",
            )  # fmt: skip
        items = self.mixing(items, present)
        scores = self.scores(items)
        return MatchingOutput(items, present, scores, matching_maps(scores, present, sinkhorn=self.sinkhorn))

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self(batch)
        target = self._target(batch, found)
        losses = {"matching": self._matching(found, target), "probe": self._probe_loss(found, target)}
        if self.term is not None:
            matrix = self.supermatrix(found, temperature=self.temperature)
            losses["consistency"] = self.term.of(matrix, len(self.names))
        return losses

    def evaluate(self, source: Any) -> dict[str, Any]:
        return {"metrics": self.judged(source, "test")}

    def judged(self, source: Any, split: str) -> dict[str, float]:
        """The figures of ``evaluate`` on a split; see ``judgment.judged`` for what they are."""
        with eval_mode_no_grad(self):
            batches = source.batches(split, 256, seed=0, epoch=0, train=False)
            return evaluate_matching(map(self._scenes, batches), self.names, self.pairs, self.transfer)

    def whole(self, found: MatchingOutput) -> Bool[Tensor, " batch"]:
        """The scenes that lack nothing."""
        if len(found.items) < len(self.names):
            return next(iter(found.present.values())).new_zeros(len(next(iter(found.items.values()))))
        return torch.cat([found.present[name] for name in self.names], dim=1).all(dim=1)

    def supermatrix(self, found: MatchingOutput, *, temperature: float = 1.0) -> Float[Tensor, "scene size size"]:
        """P of every scene that lacks nothing; scores are divided by ``temperature`` first."""
        whole = self.whole(found)
        masks = {name: found.present[name][whole] for name in found.present}
        scores = {pair: values[whole] for pair, values in found.scores.items()}
        if len(found.items) < len(self.names):
            size = len(self.names) * next(iter(masks.values())).shape[1]
            return next(iter(found.items.values())).new_zeros(0, size, size)
        return supermatrix(
            matching_maps(scores, masks, sinkhorn=self.sinkhorn, temperature=temperature), names=self.names
        )

    def probed(self, found: MatchingOutput) -> dict[str, Float[Tensor, "batch item num_classes"]]:
        """name -> which class each item is, told from the item and what it reads of the others; nothing flows back."""
        logits = {}
        for name, own in found.items.items():
            read = [
                own if other == name
                else found.maps[name, other] @ found.items[other] if other in found.items
                else torch.zeros_like(own)
                for other in self.names
            ]  # fmt: skip
            logits[name] = self.probes[name](torch.cat(read, dim=-1).detach())
        return logits

    def _matching(self, found: MatchingOutput, target: Int[Tensor, "batch modality item"]) -> Float[Tensor, ""]:
        total = next(iter(found.items.values())).new_zeros(())
        for one, other in [(a, b) for pair in self.pairs for a, b in (pair, pair[::-1])]:
            if (one, other) not in found.maps:
                continue
            place, has = self.partners(found, target, one, other)
            chance = found.maps[one, other].gather(-1, place[..., None])[..., 0]
            losses = -chance.clamp(min=torch.finfo(chance.dtype).tiny).log()
            total = total + losses.masked_fill(~has, 0.0).sum() / has.sum().clamp(min=1)
        return total / (2 * len(self.pairs))

    def partners(
        self, found: MatchingOutput, target: Int[Tensor, "batch modality item"], one: str, other: str
    ) -> tuple[Int[Tensor, "batch item"], Bool[Tensor, "batch item"]]:
        """Where each item's partner stands, and whether both are there."""
        place, has = matched_items(target, self.names.index(one), self.names.index(other))
        return place, has & found.present[one] & found.present[other].gather(1, place)

    def _scenes(self, batch: Mapping[str, Tensor]) -> SampledItemSets:
        device = next(self.parameters()).device
        batch = {name: values.to(device) for name, values in batch.items()}
        found = self(batch)
        target = self._target(batch, found)
        sought = {pair: self.partners(found, target, *pair) for pair in found.maps}
        told = {
            name: correct(logits, target[:, self.names.index(name)])[found.present[name]]
            for name, logits in self.probed(found).items()
        }
        place, has = ({pair: both[part] for pair, both in sought.items()} for part in (0, 1))
        return SampledItemSets(found.maps, place, has, self.whole(found), told)

    def _probe_loss(self, found: MatchingOutput, target: Int[Tensor, "batch modality item"]) -> Float[Tensor, ""]:
        losses = []
        for name, logits in self.probed(found).items():
            each = F.cross_entropy(logits.transpose(1, 2), target[:, self.names.index(name)], reduction="none")
            here = found.present[name]
            losses.append(each.masked_fill(~here, 0.0).sum() / here.sum().clamp(min=1))
        return torch.stack(losses).mean()

    def _encoded(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, item, dim), and which of them are there."""
        if values.ndim < 3:
            raise ShapeError(
                f"Correspondence '{name}'", expected="(batch, item, ...)", got=f"shape {tuple(values.shape)}",
                fix="A single item is a scene of one: values[:, None].",
            )  # fmt: skip
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"Correspondence '{name}'", expected="finite inputs", got="NaN or infinity")
        tokens = as_tokens(self.encoders[name](values.flatten(0, 1)), f"encoder '{name}'")
        if tokens.dim != self.dim:
            raise ShapeError(f"encoder '{name}'", expected=f"tokens of width dim = {self.dim}", got=f"{tokens.dim}")
        shape = tuple(values.shape[:2])
        return tokens.pooled().unflatten(0, shape), tokens.present().unflatten(0, shape)

    def _target(self, batch: Mapping[str, Tensor], found: MatchingOutput) -> Int[Tensor, "batch modality item"]:
        counts = {name: mask.shape[1] for name, mask in found.present.items()}
        if len(set(counts.values())) > 1:
            raise ShapeError("Correspondence", expected="equally many items in all modalities", got=f"{counts}")
        target, (scenes, items) = batch["target"], next(iter(found.present.values())).shape
        if tuple(target.shape) != (scenes, len(self.names), items) or target.is_floating_point():
            raise ShapeError(
                "Correspondence target", got=f"shape {tuple(target.shape)}, {target.dtype}",
                expected=f"class numbers (batch, modality, item) = {(scenes, len(self.names), items)}",
            )  # fmt: skip
        return target


def _width(encoders: Mapping[str, nn.Module]) -> int:
    widths = {name: getattr(encoder, "dim", None) for name, encoder in encoders.items()}
    width = next(iter(widths.values()))
    if width is None or len(set(widths.values())) != 1:
        raise ConfigError(
            "Correspondence", expected="encoders of one width", got=f"{widths}", fix="Give all the same dim.",
        )  # fmt: skip
    return width
