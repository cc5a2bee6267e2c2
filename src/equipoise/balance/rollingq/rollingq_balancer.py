"""RollingQ: turn the query of an attention layer toward the modality it neglects, once in a while, between epochs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...nn.eval_mode import eval_mode_no_grad
from ..common.pending_state import recomputing
from .compile_disabled import CompileDisabled
from .query_key_statistics import Indicator, RunningSums, key_mask, query_key_sums
from .query_rotation import Rotation
from .rolling_step import RollingStep, rolling_query
from .rollingq_options import check_options
from .rotation_target import AttentionRotationTarget, ProjectionRotationTarget, find_rotation_target
from .share_weights import weights_for_share


class RollingQ(Rotation):
    """Watches how a layer's queries lie to the keys of each modality, and rotates the queries at the end of an epoch.

    While the model trains, a hook adds up mean queries, mean keys and cosines of the last ``tail`` batches: inside a
    ``BalancerList`` of those on which the optimizer stepped, without one of all forward passes in training mode.
    ``end_epoch`` compares the modalities; where they are further apart than ``beta``, and the budget allows, it
    multiplies the rotation of ``rolling_query`` onto the one there is. Everything is kept in the layer's own state
    dict, so a reloaded model is rotated as before. ``fold`` merges the rotation into the weights.

    Args:
        layer: an ``Attention`` of ours (``model.fusion.attention``), or any module with ``query``, ``key`` and
            ``num_heads`` named.
        rho: strength; see ``rolling_query``. Tune over 0, 0.5, 1, 2, 5 on validation data.
        beta: rotate when the modalities' indicators are at least this far apart; cosines lie in [-1, 1], so [0, 2].
            Tune over 0, 0.1, 0.2, 0.4.
        max_rotations: how often a layer may rotate at all; None is without limit (the paper: that hurts).
        warmup_epochs: epochs before the first decision.
        min_epochs_between: epochs from one rotation to the next.
        tail: statistics are of the last so many batches of an epoch; None takes all.
        statistics: ``"tail"`` accumulates them in training; ``"full_pass"`` takes those of the last call of ``measure``
            before ``end_epoch``.
        indicator: what is balanced; see ``query_key_sums``.
        query_rows: ``"first"`` rotates the first query row (the class token), ``"all"`` every row.
        heads: ``"per_head"`` rotates each head in its own space, ``"joint"`` all heads together in the model's width.
        rotation: ``"minimal"``, or ``"svd"`` as released, for comparison.
        target_share: name -> wanted share of two modalities; chooses the anchor's weights in place of ``rho``.
        names: the modalities, where the layer does not know them.
        query, key, num_heads: for foreign modules: names of the projections (torch.nn.Linear) and the number of heads.

    Raises:
        ConfigError: a layer without names, an option out of range, a second RollingQ on one layer.

    Reference: RollingQ (ICML 2025), Algorithm 1; spec 2.
    Differs from the paper in: the minimal rotation, running statistics, any number of modalities and heads; the
    rotation and its counter are saved, which the released code forgets.

    Example:
        >>> from equipoise.fusion import JointAttention
        >>> fusion = JointAttention(8).build(("audio", "image"))
        >>> balancer = RollingQ(fusion.attention, rho=1.0, beta=0.05, max_rotations=1)
        >>> sorted(fusion.state_dict())[:3]
        ['active', 'attention.core.rolling._extra_state', 'attention.core.rolling.air']
    """

    notes_in_forward = True
    changes_gradients = False
    works_alone = True

    def __init__(
        self,
        layer: nn.Module,
        *,
        rho: float = 1.0,
        beta: float = 0.1,
        max_rotations: int | None = 1,
        warmup_epochs: int = 0,
        min_epochs_between: int = 1,
        tail: int | None = 16,
        statistics: Literal["tail", "full_pass"] = "tail",
        indicator: Indicator = "cosine",
        query_rows: Literal["first", "all"] = "first",
        heads: Literal["per_head", "joint"] = "per_head",
        rotation: Literal["minimal", "svd"] = "minimal",
        target_share: Mapping[str, float] | None = None,
        names: Sequence[str] | None = None,
        query: str | None = None,
        key: str | None = None,
        num_heads: int | None = None,
    ) -> None:
        site = find_rotation_target(layer, query, key, num_heads, names)
        groups, width = (site.heads, site.head_dim) if heads == "per_head" else (1, site.heads * site.head_dim)
        super().__init__(groups, width, site.names, first_row_only=query_rows == "first", like=site.projection.weight)
        self.rho, self.beta, self.max_rotations = rho, beta, max_rotations
        self.warmup_epochs, self.min_epochs_between = warmup_epochs, min_epochs_between
        self.statistics, self.query_rows, self.heads = statistics, query_rows, heads
        self.indicator: Indicator = indicator
        self.method: Literal["minimal", "svd"] = rotation
        self.target_share = dict(target_share) if target_share else None
        check_options(self, tail)
        if width < 2:
            raise ConfigError("RollingQ", expected="heads of width d >= 2", got="d = 1", fix="A line has no rotation.")
        self._site = site
        self._sums = RunningSums(groups, site.names, width, None if statistics == "full_pass" else tail)
        self._measuring, self._frozen = False, False
        # The sums are bookkeeping, and their cursor would make a model compile anew at each step.
        self._handles: list[Any] = site.install(self.rotate, CompileDisabled(self._add_up))
        self._handles.append(self._site.projection.register_load_state_dict_pre_hook(self._on_load))
        site.home.add_module("rolling", self)

    def due(self) -> bool:
        """Whether ``end_epoch`` would rotate now. Where several processes train together, all of them must call it."""
        total = self._sums.total(self.rotation.device)
        if not float(total[0, -1, -1]) > 0 or not self._allowed(int(self.epochs) + 1):
            return False
        return any(self._due([self._step(total, group) for group in range(len(self.rotation))]))

    def end_epoch(self) -> dict[str, float]:
        """Decides, rotates if it must, forgets the epoch's statistics; returns what happened, for the log.

        Keys: ``air`` (of the first modality, mean over heads), ``air/<name>``, ``spread``, ``rotated`` (0 or 1),
        ``rotations`` (so far). Where several processes train together, all of them must call it.
        """
        self.epochs += 1
        total, before = self._sums.total(self.rotation.device), self._count()
        air = self.air.cpu().double()
        if float(total[0, -1, -1]) > 0:
            steps = [self._step(total, group) for group in range(len(self.rotation))]
            air = self._imbalance(steps)
            self.air.copy_(air.to(self.air.dtype))
            due = self._due(steps) if self._allowed(int(self.epochs)) else []
            if any(due):
                self._multiply([step if yes else None for step, yes in zip(steps, due, strict=True)])
        self._synchronize()
        self._sums.reset()
        return self._log(air, rotated=self._count() > before)

    def measure(self, model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> None:
        """Replaces the statistics by those of a pass in evaluation mode, over all its batches.

        Training modes and the random state are left as they were, after an exception the statistics too.

        Args:
            model: the whole model, called as ``model(batch)``.
            batches: batches on the model's device.
            max_batches: stop after so many.
        """
        before = self._sums.state()
        self._sums.reset()
        self._measuring, complete = True, False
        try:
            with eval_mode_no_grad(model):
                for number, batch in enumerate(batches):
                    if max_batches is not None and number >= max_batches:
                        break
                    model(batch)
            complete = True
        finally:
            self._measuring = False
            if not complete:
                self._sums.load(before)

    def layout(self, modality: Tensor, mask: Tensor | None = None) -> None:
        """For a foreign module: the labels (key,) or (batch, key) of the next forward passes, and their key mask."""
        if not isinstance(self._site, ProjectionRotationTarget):
            raise ConfigError("RollingQ.layout", expected="a RollingQ on a foreign module", got="one on our own layer")
        self._site.labels, self._site.valid = modality, mask

    def freeze(self, frozen: bool = True) -> None:
        """Keeps the rotation and stops observing; for stages of progressive training that are over."""
        self._frozen = frozen

    def detach(self) -> None:
        """Takes the hooks and the saved state out of the layer again; the rotation is lost."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if "rolling" in self._site.home._modules:
            del self._site.home._modules["rolling"]

    def fold(self) -> None:
        """Merges the rotation into the query projection and leaves the layer as plain as it was; see ``eq.merge_rotations``."""
        self.check_foldable()
        if self.rotates():
            self._site.fold(self.effective())
        self.detach()

    def check_foldable(self) -> None:
        """Raises ConfigError where ``fold`` would change what the layer computes."""
        if self.query_rows == "first" and self.rotates() and not self._site.only_first_row():
            raise ConfigError(
                "fold",
                expected="a rotation of all query rows, or a layer of which only the class row is read",
                got='query_rows="first" in a layer whose other rows are read too',
                fix='Train with RollingQ(query_rows="all"), or keep the RollingQ in place for inference.',
            )

    def _add_up(self, query: Tensor, key: Tensor, modality: Tensor | None, mask: Tensor | None) -> None:
        # The recomputation of activation checkpointing repeats a batch that was counted in its first pass.
        wanted = self._measuring or (self.training and self.statistics == "tail" and not recomputing())
        if self._frozen or not wanted:
            return
        if modality is None or modality.shape[-1] != key.shape[2]:
            got = "no labels" if modality is None else f"{modality.shape[-1]} labels for {key.shape[2]} keys"
            fix = "Call balancer.layout(modality) before the forward pass."
            if isinstance(self._site, AttentionRotationTarget):
                fix = "Call the attention layer with modality=..."
            raise ConfigError("RollingQ", expected="a modality label for every key", got=got, fix=fix)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            if self.query_rows == "first":
                query = query[:, :, :1]
            if self.heads == "joint":
                repeat = query.shape[1] // key.shape[1]
                key = key.repeat_interleave(repeat, dim=1).transpose(1, 2).flatten(2)[:, None]
                query = query.transpose(1, 2).flatten(2)[:, None]
            valid = key_mask(mask, len(key), key.shape[2])
            rows = (
                valid if valid is not None and self.query_rows == "all" and valid.shape[1] == query.shape[2] else None
            )
            sums = query_key_sums(
                query, key, modality, len(self.names),
                valid=valid, rows=rows, indicator=self.indicator,
            )  # fmt: skip
        if self._measuring or self._pending.model is None:
            self._sums.add(sums, keep_all=self._measuring)
        else:
            self.note("sums", sums)

    def before_step(self) -> None:
        for sums in self.noted("sums"):
            self._sums.add(sums)

    def _step(self, total: Tensor, group: int) -> RollingStep | None:
        means = self._sums.means(total, group)
        if len(means.keys) < 2:
            return None
        weights = None
        if self.target_share is not None:
            weights = weights_for_share(means.query, means.keys, means.tokens, self.target_share)
        return rolling_query(
            means.query, means.keys,
            rho=self.rho, imbalance=means.imbalance, weights=weights, rotation=self.method,
        )  # fmt: skip

    def _imbalance(self, steps: list[RollingStep | None]) -> Tensor:
        """(head, modality) AIR in float64; NaN where a modality was not seen."""
        rows = [{} if step is None else step.air for step in steps]
        return torch.tensor([[row.get(name, torch.nan) for name in self.names] for row in rows], dtype=torch.float64)

    def _due(self, steps: list[RollingStep | None]) -> list[bool]:
        """Which heads are out of balance and can be turned."""
        for step in steps:
            if step is None or (step.reason and "already" not in step.reason):
                why = "fewer than two modalities were seen" if step is None else step.reason
                warnings.warn(f"RollingQ skipped a rotation: {why}.", stacklevel=3)
        return [step is not None and step.rotates and step.spread >= self.beta for step in steps]

    def _allowed(self, epoch: int) -> bool:
        count = self._count()
        within = self.max_rotations is None or count < self.max_rotations
        spaced = count == 0 or epoch - int(self.last_epoch) >= self.min_epochs_between
        return not self._frozen and within and spaced and epoch > self.warmup_epochs

    def _log(self, air: Tensor, rotated: bool) -> dict[str, float]:
        mean = air.nanmean(dim=0)
        log = {f"air/{name}": value for name, value in zip(self.names, mean.tolist(), strict=True)}
        return {
            "air": float(mean[0]),
            **log,
            "spread": _spread(mean),
            "rotated": float(rotated),
            "rotations": float(self._count()),
        }

    def get_extra_state(self) -> Tensor:
        return self._sums.state()

    def set_extra_state(self, state: Tensor) -> None:
        self._sums.load(state)

    def _forget(self) -> None:
        self._sums.reset()


def _spread(air: Tensor) -> float:
    """Largest minus smallest indicator, out of the imbalances: these lie M / (M - 1) times as far apart."""
    seen = air[~air.isnan()]
    if len(seen) < 2:
        return math.nan
    return float(seen.max() - seen.min()) * (len(seen) - 1) / len(seen)
