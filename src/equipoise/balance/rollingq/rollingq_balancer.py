"""RollingQ: rotates the queries of an attention layer toward the modality that gets least attention, between epochs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...nn.eval_mode import eval_mode_no_grad
from ..common.pass_record import recomputing
from .attention_modules import find_rotation_target
from .compile_disabled import CompileDisabled
from .query_key_statistics import Indicator, RunningSums, key_mask, query_key_sums
from .query_rotation import Rotation
from .rolling_step import RollingStep, RotationName, rolling_query
from .rollingq_options import check_options
from .rotation_target import AttentionRotationTarget, ForeignTarget
from .share_weights import weights_for_share


class RollingQ(Rotation):
    """Measures the similarity of queries to the keys of each modality, and rotates the queries at the end of an epoch.

    In training, a hook accumulates mean queries, mean keys and cosines over the last ``tail`` batches: inside a
    ``BalancerList`` over batches on which the optimizer stepped, without one over all forward passes in training mode.
    ``end_epoch`` compares the modalities; if their indicators differ by ``beta`` or more and the budget allows, it
    multiplies the current rotation by the one of ``rolling_query``. All state is stored in the layer's own state dict,
    so a reloaded model has the same rotation. ``merge_rotations`` merges the rotation into the weights.

    Create the RollingQ before loading such a state dict. Without it, ``load_state_dict`` raises an error, except with
    ``strict=False`` for a module of another library, where torch drops the rotation: look at the returned
    ``unexpected_keys``.

    Args:
        layer: an ``Attention`` layer of this library (``model.fusion.attention``), or any module that contains one
            attention: ``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``, attention of timm, or of Hugging Face.
            Set the labels of its keys with ``layout``. Other projections are named by ``query``, ``key``,
            ``num_heads``.
        rho: strength; see ``rolling_query``. Tune over 0, 0.5, 1, 2, 5 on validation data.
        beta: minimum difference of the modalities' indicators for a rotation; for cosines in [0, 2]. Tune over 0, 0.1,
            0.2, 0.4.
        max_rotations: maximum number of rotations of the layer; None is without limit (the paper: that hurts).
        warmup_epochs: epochs before the first decision.
        min_epochs_between: minimum number of epochs from one rotation to the next.
        tail: number of batches at the end of an epoch that the statistics cover; None takes all.
        statistics: ``"tail"`` accumulates them in training; ``"full_pass"`` takes those of the last call of ``measure``
            before ``end_epoch``.
        indicator: similarity that is balanced; see ``query_key_sums``.
        query_rows: ``"first"`` rotates the first query row (the class token), ``"all"`` every row. By default
            ``"first"``, and ``"all"`` for attention that was found in a module of another library.
        heads: ``"per_head"`` rotates each head in its own space, ``"joint"`` all heads together in the model's width.
        rotation: ``"minimal"``; ``"svd"`` as in the released code, for comparison; ``"random"`` rotates by the same
            angle in a random direction, as control: what it also changes is not due to the direction.
        seed: of the random directions, together with the epoch and the head.
        target_share: name -> target share of attention for two modalities; determines the anchor's weights instead of
            ``rho``.
        names: the modalities, if the layer has no names.
        query, key, num_heads: for modules of other libraries: names of the projections (torch.nn.Linear) and the
            number of heads.
        module: dotted name of the attention module in ``layer``, if it contains several.

    Where rotary positions or norms change the queries behind their projection, the rotation is applied behind them, at
    the attention, and cannot be merged.

    Raises:
        ConfigError: a layer without names, an option out of range, a second RollingQ on one layer; none or several
            attention modules; a projection whose order of queries and keys is unknown.

    Reference: RollingQ (ICML 2025), Algorithm 1.
    Differs from the paper in: the minimal rotation, running statistics, any number of modalities and heads; the
    rotation and its counter are saved, which the released code omits.

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
        query_rows: Literal["first", "all"] | None = None,
        heads: Literal["per_head", "joint"] = "per_head",
        rotation: RotationName = "minimal",
        seed: int = 0,
        target_share: Mapping[str, float] | None = None,
        names: Sequence[str] | None = None,
        query: str | None = None,
        key: str | None = None,
        num_heads: int | None = None,
        module: str | None = None,
    ) -> None:
        target = find_rotation_target(layer, query, key, num_heads, names, module)
        query_rows = target.default_rows if query_rows is None else query_rows
        groups, width = (target.heads, target.head_dim) if heads == "per_head" else (1, target.heads * target.head_dim)
        super().__init__(groups, width, target.names, first_row_only=query_rows == "first", like=target.weight)
        self.rho, self.beta, self.max_rotations = rho, beta, max_rotations
        self.warmup_epochs, self.min_epochs_between = warmup_epochs, min_epochs_between
        self.statistics, self.query_rows, self.heads = statistics, query_rows, heads
        self.indicator: Indicator = indicator
        self.method: RotationName = rotation
        self.seed = seed
        self.target_share = dict(target_share) if target_share else None
        check_options(self, tail)
        target.check_rows(self.query_rows)
        if width < 2:
            raise ConfigError(
                "RollingQ",
                expected="heads of width d >= 2",
                got="d = 1",
                fix="There is no rotation in one dimension; use wider heads.",
            )
        self._target = target
        self._sums = RunningSums(groups, target.names, width, None if statistics == "full_pass" else tail)
        self._measuring, self._frozen = False, False
        target.observing = self._observing
        # Not compiled: the changing cursor would trigger a recompilation at each step.
        self._handles: list[Any] = target.register_hooks(self.rotate, CompileDisabled(self._accumulate))
        self._handles.append(self._target.projection.register_load_state_dict_pre_hook(self._on_load))
        if isinstance(target, ForeignTarget):
            # Pretrained models are created in evaluation mode, where no statistics are collected.
            self.train(target.host_module.training)
        target.host_module.add_module("rolling", self)

    def due(self) -> bool:
        """Returns whether ``end_epoch`` would rotate now. In distributed training all processes must call it."""
        total = self._sums.total(self.rotation.device)
        if not float(total[0, -1, -1]) > 0 or not self._allowed(int(self.epochs) + 1):
            return False
        return any(self._due([self._step(total, group) for group in range(len(self.rotation))]))

    def end_epoch(self) -> dict[str, float]:
        """Rotates if necessary, and resets the epoch's statistics; returns values to log.

        Keys: ``air`` (of the first modality, mean over heads), ``air/<name>``, ``spread``, ``rotated`` (0 or 1),
        ``rotations`` (so far). In distributed training all processes must call it.
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
                self._multiply([step if rotate else None for step, rotate in zip(steps, due, strict=True)])
        self._synchronize()
        self._sums.reset()
        return self._log(air, rotated=self._count() > before)

    def running_air(self) -> dict[str, float]:
        """Returns AIR by modality, mean over heads, of the batches of this epoch so far in this process.

        Before the first batch, and with ``statistics="full_pass"``, it is that of the last decision: NaN without one.
        """
        total, air = self._sums.window.sum(dim=0), self.air
        if float(total[0, -1, -1]) > 0:
            air = self._imbalance([self._step(total, group) for group in range(len(self.rotation))])
        return dict(zip(self.names, air.nanmean(dim=0).tolist(), strict=True))

    def measure(self, model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> None:
        """Replaces the statistics with those of a pass over batches in evaluation mode.

        Training modes and RNG state are restored; after an exception the statistics as well.

        Args:
            model: the whole model, called as ``model(batch)``.
            batches: batches on the model's device.
            max_batches: maximum number of batches.
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
        """Sets the labels (key,) or (batch, key) and the key mask of the next forward passes of an external module."""
        if not isinstance(self._target, ForeignTarget):
            raise ConfigError(
                "RollingQ.layout", expected="a RollingQ on an external module", got="one on an Attention layer"
            )
        self._target.labels, self._target.valid = modality, mask

    def freeze(self, frozen: bool = True) -> None:
        """Stops (or resumes) statistics and further rotations; for finished stages of progressive training."""
        self._frozen = frozen

    def detach(self) -> None:
        """Removes the hooks and the saved state from the layer; the rotation is lost."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if "rolling" in self._target.host_module._modules:
            del self._target.host_module._modules["rolling"]

    def fold(self) -> None:
        """Merges the rotation into the query projection and removes the RollingQ; see ``eq.merge_rotations``."""
        self.check_foldable()
        if self.rotates():
            self._target.merge(self.effective())
        self.detach()

    def check_foldable(self) -> None:
        """Raises ConfigError if merging the rotation would change the output of the layer."""
        if self.rotates():
            self._target.check_mergeable()
        if self.query_rows == "first" and self.rotates() and not self._target.only_first_row():
            raise ConfigError(
                "fold",
                expected="a rotation of all query rows, or a layer of which only the first row is used",
                got='query_rows="first" in a layer whose other rows are used too',
                fix='Train with RollingQ(query_rows="all"), or keep the RollingQ in place for inference.',
            )

    def _observing(self) -> bool:
        """Returns whether the statistics of this forward pass are collected."""
        # Skip recomputations of activation checkpointing, whose batch was counted in the first pass.
        active = self._measuring or (self.training and self.statistics == "tail" and not recomputing())
        return active and not self._frozen

    def _accumulate(self, query: Tensor, key: Tensor, modality: Tensor | None, mask: Tensor | None) -> None:
        if not self._observing():
            return
        if modality is None or modality.shape[-1] != key.shape[2]:
            got = "no labels" if modality is None else f"{modality.shape[-1]} labels for {key.shape[2]} keys"
            fix = "Call balancer.layout(modality) before the forward pass."
            if isinstance(self._target, AttentionRotationTarget):
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
            seed=(self.seed * 65_537 + int(self.epochs)) * 4096 + group,
        )  # fmt: skip

    def _imbalance(self, steps: list[RollingStep | None]) -> Tensor:
        """Returns (head, modality) AIR in float64; NaN for modalities without statistics."""
        rows = [{} if step is None else step.air for step in steps]
        return torch.tensor([[row.get(name, torch.nan) for name in self.names] for row in rows], dtype=torch.float64)

    def _due(self, steps: list[RollingStep | None]) -> list[bool]:
        """Returns for each head whether it exceeds ``beta`` and can be rotated."""
        for step in steps:
            if step is None or (step.reason and "already" not in step.reason):
                why = "fewer than two modalities have statistics" if step is None else step.reason
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

    def _reset_statistics(self) -> None:
        self._sums.reset()


def _spread(air: Tensor) -> float:
    """Returns the largest minus the smallest indicator; AIR values differ by M / (M - 1) times as much."""
    finite = air[~air.isnan()]
    if len(finite) < 2:
        return math.nan
    return float(finite.max() - finite.min()) * (len(finite) - 1) / len(finite)
