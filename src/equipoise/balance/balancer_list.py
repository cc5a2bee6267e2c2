"""Container of the balancers of one model, called from any training loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..fusion.subset_tokens import derived
from ..tokens.token_batch import Output, Tokens, as_output
from .balancer import Balancer, Batch, Multimodal, overrides
from .common.forward_pass import ForwardPass
from .common.pending_state import Pending
from .common.unimodal_terms import check_encoders_apart, check_interface

ADAPTIVE = ("adam", "adagrad", "adadelta", "adafactor", "rmsprop", "lion")
"""Parts of the class names of optimizers that normalize the gradient."""


class BalancerList:
    """Calls balancers around a model's training step, in any loop::

        balancing = eq.BalancerList(model, [eq.balance.OGM(model), eq.balance.RollingQ(model.fusion.attention)])
        for batch in loader:
            loss = balancing.loss(model(batch), batch["target"])
            optimizer.zero_grad()
            loss.backward()
            balancing.before_step()
            optimizer.step()
        balancing.end_epoch()

    Several batches may be accumulated before ``before_step``; under AMP call ``scaler.unscale_(optimizer)`` first; with
    several processes call it after gradients are reduced, as ``DistributedDataParallel`` does. Clip gradients
    afterward.

    The state of the balancers changes only in ``before_step``, based on the batches that contributed to the current
    gradients, and only if all gradients are finite; it therefore stays consistent with the weights when ``GradScaler``
    skips a step. Otherwise ``before_step`` changes neither gradients nor state. Batches whose loss is not
    back-propagated, gradients that the loop clears, and losses computed in evaluation mode or without gradient have no
    effect. Recomputation by activation checkpointing repeats the random numbers of the first pass.

    Before training, ``balancing.attach_optimizer(optimizer)`` warns about an optimizer that cancels a method, and
    passes it to the methods that reset optimizer state.

    Args:
        model: a FusionModel, or any other model after ``eq.adapt``.
        balancers: created for this model. They replace the balancers of an earlier BalancerList on the same model.

    Raises:
        ConfigError: balancers that cannot be combined, with the reason; a balancer that changes inputs or tokens, for a
            model that would never call it; a balancer that scales gradients, for encoders that share parameters.
    """

    def __init__(self, model: Multimodal, balancers: Sequence[Balancer] = ()) -> None:
        self.model, self.balancers = model, list(balancers)
        if self.balancers or not hasattr(model, "losses"):
            # A self-contained model computes its own losses; its list has no balancers and is never called.
            check_interface(model, "BalancerList")
        _check(self.balancers)
        self._scaling = [b for b in self.balancers if overrides(b, "gradient_scale")]
        for balancer in self._scaling:
            check_encoders_apart(model, type(balancer).__name__)
        self._pending = Pending(model)
        for balancer in self.balancers:
            balancer.join(self._pending)
        ForwardPass(self._pending, self.balancers).attach(model)

    @property
    def steps_per_batch(self) -> int:
        """Number of optimizer steps to take on each batch; 1 for most methods."""
        return max((b.steps_per_batch for b in self.balancers), default=1)

    @property
    def partial_graph(self) -> bool:
        """Whether data-parallel training needs ``find_unused_parameters=True``."""
        return any(b.partial_graph for b in self.balancers)

    def loss(self, output: Any, target: Tensor, *, task_loss: Tensor | None = None) -> Tensor:
        """Returns the total loss of a batch: task loss, losses of the unimodal heads and penalties; a scalar.

        Args:
            output: what the model returned for the batch.
            target: targets, in the form that ``FusionModel.loss`` takes.
            task_loss: the task loss, if your code has computed it; by default that of the model.
        """
        output = as_output(self.model, output, "BalancerList.loss")
        record = self._pending.enter_loss(output)
        try:
            total = self._total(output, target, task_loss)
            if self._scaling and self._pending.noting():
                record.outputs = _detached(output), target.detach()
        except BaseException:
            self._pending.leave_loss(record, None)
            raise
        self._pending.leave_loss(record, total)
        return total

    def _total(self, output: Output, target: Tensor, task_loss: Tensor | None) -> Tensor:
        if not self.balancers:
            check_interface(self.model, "BalancerList.loss")
        replaced = {term for b in self.balancers for term in b.replaces}
        terms = []
        if "task" not in replaced:
            if output.logits is None:
                raise ConfigError("BalancerList.loss", expected="an output with logits", got="logits = None")
            terms.append(self.model.loss(output.logits, target) if task_loss is None else task_loss)
        if "unimodal" not in replaced:
            terms.append(self.model.unimodal_loss(output, target))
        for balancer in self.balancers:
            balancer.observe(output, target)
            penalty = balancer.penalty(output, target)
            if penalty is not None:
                terms.append(penalty)
        return torch.stack([term.reshape(()) for term in terms]).sum()

    @torch.no_grad()
    def before_step(self) -> None:
        """Updates balancers and gradients; call it between ``backward`` and ``optimizer.step``.

        Does nothing if no loss was back-propagated since the last step, or if a gradient is not finite.
        """
        parameters: Iterable[nn.Parameter] = self.model.parameters()  # type: ignore[attr-defined]
        records = self._pending.commit([p.grad for p in parameters if p.grad is not None])
        if not records:
            return
        if self._scaling:
            output, target = _joined([record.outputs for record in records if record.outputs is not None])
            for balancer in self._scaling:
                self._scale(balancer.gradient_scale(output, target))
        for balancer in self.balancers:
            balancer.before_step()

    def _scale(self, factors: Mapping[str, Tensor | float] | None) -> None:
        for name, factor in (factors or {}).items():
            for parameter in encoder_weight_matrices(self.model.encoders[name]):
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def review(self, train: Iterable[Batch], val: Iterable[Batch]) -> None:
        """Passes data to the balancers that need it; call it before ``end_epoch``."""
        convert: Any = getattr(self.model, "to_batch", None)
        if convert is not None:
            train, val = (_Converted(loader, convert) for loader in (train, val))
        for balancer in self.balancers:
            if balancer.reviews:
                balancer.review(train, val)

    @property
    def reviews(self) -> bool:
        """Whether a balancer needs ``review``."""
        return any(b.reviews for b in self.balancers)

    def end_epoch(self) -> dict[str, float]:
        """Ends an epoch; returns the merged logs of all balancers."""
        log: dict[str, float] = {}
        for balancer in self.balancers:
            log.update(balancer.end_epoch())
        return log

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Passes the optimizer to the balancers and checks it; call it once, before training."""
        for balancer in self.balancers:
            balancer.attach_optimizer(optimizer)
        self.check_optimizer(optimizer)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warns if the optimizer cancels a method: Adam and similar optimizers cancel a factor on gradients."""
        adaptive = any(word in type(optimizer).__name__.lower() for word in ADAPTIVE)
        names = [type(b).__name__ for b in self.balancers if b.gradient_scaling_only]
        if adaptive and names:
            warnings.warn(
                f"{', '.join(names)} only changes the scale of gradients, which {type(optimizer).__name__} normalizes "
                "away: expect almost no effect. Use SGD, as the paper does (train.optimizer=sgd).",
                stacklevel=2,
            )


class _Converted:
    """Batches of a loader as dicts; can be iterated as often as the loader."""

    def __init__(self, loader: Iterable[Any], convert: Callable[[Any], Batch]) -> None:
        self._loader, self._convert = loader, convert

    def __iter__(self) -> Iterator[Batch]:
        return map(self._convert, self._loader)


def encoder_weight_matrices(encoder: nn.Module) -> list[nn.Parameter]:
    """Returns the encoder's parameters that gradient scaling applies to: matrices and kernels, not biases or norms."""
    return [p for p in encoder.parameters() if p.ndim >= 2]


def takes_part_in_steps(balancer: Balancer) -> bool:
    """Returns whether a BalancerList has to call it: it overrides a hook of the training step."""
    hooks = ("prepare", "transform", "finish", "observe", "penalty", "gradient_scale", "before_step")
    return not balancer.works_alone and any(overrides(balancer, hook) for hook in hooks)


def _check(balancers: Sequence[Balancer]) -> None:
    for index, one in enumerate(balancers):
        for other in balancers[index + 1 :]:
            for a, b in ((one, other), (other, one)):
                if why := a.excludes.get(type(b).__name__):
                    raise ConfigError(
                        "BalancerList", expected="balancers that can be combined",
                        got=f"{type(a).__name__} with {type(b).__name__}: {why}", fix="Leave one of them out.",
                    )  # fmt: skip
            both = sorted(set(one.replaces) & set(other.replaces))
            if both or (one.steps_per_batch > 1 and other.steps_per_batch > 1):
                what = f"both replace the {both[0]} loss" if both else "both take several steps on each batch"
                raise ConfigError(
                    "BalancerList", expected="balancers that can be combined",
                    got=f"{type(one).__name__} and {type(other).__name__}, which {what}", fix="Leave one of them out.",
                )  # fmt: skip


def _detached(output: Output) -> Output:
    return replace(
        output,
        record=None,
        features=output.features.detach(),
        logits=None if output.logits is None else output.logits.detach(),
        unimodal_logits={name: logits.detach() for name, logits in output.unimodal_logits.items()},
        tokens=derived(output.tokens, {n: replace(t, values=t.values.detach()) for n, t in output.tokens.items()}),
        share=None if output.share is None else output.share.detach(),
    )


def _joined(batches: Sequence[tuple[Output, Tensor]]) -> tuple[Output, Tensor]:
    """Concatenates the batches of one optimizer step."""
    if len(batches) == 1:
        return batches[0]
    outputs, targets = zip(*batches, strict=True)
    return _cat(outputs), torch.cat(targets)


def _cat(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {name: _cat([value[name] for value in values if name in value]) for name in first}
    if isinstance(first, Tokens):
        return _joined_tokens(values)
    if is_dataclass(first):
        return replace(first, **{f.name: _cat([getattr(v, f.name) for v in values]) for f in fields(first)})  # type: ignore[type-var]
    return first


def _joined_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Concatenates tokens of one modality, padded to the longest sequence."""
    longest = max(len(part) for part in parts)
    unpadded = all(part.mask is None and len(part) == longest for part in parts)
    empty = parts[0].values.new_zeros
    times = [empty(len(p.values), 0) if len(p) == 0 else p.times for p in parts if len(p) == 0 or p.times is not None]

    def padded(tensor: Tensor) -> Tensor:
        shape = (len(tensor), longest - tensor.shape[1], *tensor.shape[2:])
        return torch.cat([tensor, tensor.new_zeros(shape)], dim=1)

    return Tokens(
        torch.cat([padded(part.values) for part in parts]),
        mask=None if unpadded else torch.cat([padded(part.valid()) for part in parts]),
        times=torch.cat([padded(t) for t in times]) if len(times) == len(parts) else None,  # type: ignore[arg-type]
        # A batch without the modality has no tokens, so its flag is always False.
        cls=any(part.cls for part in parts),
    )
