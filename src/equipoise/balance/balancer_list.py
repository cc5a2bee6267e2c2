"""BalancerList: several balancers around one model, and the order in which a training loop calls them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..tokens.token_batch import Output, Tokens
from .balancer import Balancer, Batch, Multimodal, overrides
from .common.forward_pass import ForwardPass
from .common.pending_state import Pending
from .common.unimodal_terms import check_encoders_apart

ADAPTIVE = ("adam", "adagrad", "adadelta", "adafactor", "rmsprop", "lion")
"""In the names of optimizers whose step does not grow with the gradient."""


class BalancerList:
    """Puts balancers around a model's training step, in any loop::

        balancing = eq.BalancerList(model, [eq.balance.OGM(model), eq.balance.RollingQ(model.fusion.attention)])
        for batch in loader:
            loss = balancing.loss(model(batch), batch["target"])
            optimizer.zero_grad()
            loss.backward()
            balancing.before_step()
            optimizer.step()
        balancing.end_epoch()

    Several batches may be accumulated before ``before_step``; under AMP call ``scaler.unscale_(optimizer)`` first; with
    several processes call it after gradients are reduced, as ``DistributedDataParallel`` leaves them. Clip afterward.

    The state of balancers changes in ``before_step`` alone, by the batches whose gradients the parameters hold, and
    only if all gradients are finite; so it follows the weights where ``GradScaler`` skips a step. Otherwise
    ``before_step`` leaves gradients and state as they are. A batch whose loss the loop does not back-propagate,
    gradients that it clears, and losses computed in evaluation mode or without gradient leave no trace. Activation
    checkpointing of the model or of parts of it repeats what the first pass drew.

    Before training, ``balancing.attach_optimizer(optimizer)`` warns of an optimizer that undoes a method, and gives it
    to those that reset its state.

    Args:
        model: a FusionModel, or any module with the members of ``Multimodal``.
        balancers: made for this model. They take the place of those that an earlier BalancerList gave it.

    Raises:
        ConfigError: balancers that cannot be combined, with the reason; one that changes inputs or tokens, for a model
            that would never call it; one that scales the gradients of encoders which share parameters.
    """

    def __init__(self, model: Multimodal, balancers: Sequence[Balancer] = ()) -> None:
        self.model, self.balancers = model, list(balancers)
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
        """How often each batch must be served, one optimizer step each; 1 for most methods."""
        return max((b.steps_per_batch for b in self.balancers), default=1)

    @property
    def partial_graph(self) -> bool:
        """Whether data-parallel training must look for parameters without gradient."""
        return any(b.partial_graph for b in self.balancers)

    def loss(self, output: Output, target: Tensor) -> Tensor:
        """Everything that is minimized for this batch: task, unimodal heads, penalties; a scalar.

        Args:
            output: of the model.
            target: as ``FusionModel.loss`` takes it.
        """
        record = self._pending.enter_loss(output)
        try:
            total = self._total(output, target)
            if self._scaling and self._pending.noting():
                record.outputs = _detached(output), target.detach()
        except BaseException:
            self._pending.leave_loss(record, None)
            raise
        self._pending.leave_loss(record, total)
        return total

    def _total(self, output: Output, target: Tensor) -> Tensor:
        replaced = {term for b in self.balancers for term in b.replaces}
        terms = []
        if "task" not in replaced:
            if output.logits is None:
                raise ConfigError("BalancerList.loss", expected="an output with logits", got="logits = None")
            terms.append(self.model.loss(output.logits, target))
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
        """Between ``backward`` and ``optimizer.step``.

        Does nothing where no backward pass reached a loss since the last step, or a gradient is not finite.
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
        """Shows data to the balancers that ask for it; before ``end_epoch``."""
        for balancer in self.balancers:
            if balancer.reviews:
                balancer.review(train, val)

    @property
    def reviews(self) -> bool:
        """Whether ``review`` wants to be called."""
        return any(b.reviews for b in self.balancers)

    def end_epoch(self) -> dict[str, float]:
        """Once an epoch; what all balancers say of it."""
        said: dict[str, float] = {}
        for balancer in self.balancers:
            said.update(balancer.end_epoch())
        return said

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer to the balancers, and checks it; once, before training."""
        for balancer in self.balancers:
            balancer.attach_optimizer(optimizer)
        self.check_optimizer(optimizer)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Warns where the optimizer undoes a method: Adam and its kin divide a constant factor on gradients out."""
        adaptive = any(word in type(optimizer).__name__.lower() for word in ADAPTIVE)
        names = [type(b).__name__ for b in self.balancers if b.gradient_scaling_only]
        if adaptive and names:
            warnings.warn(
                f"{', '.join(names)} changes the size of gradients only, and {type(optimizer).__name__} divides that "
                "out again: expect next to no effect. Use SGD, as its paper does (train.optimizer=sgd).",
                stacklevel=2,
            )


def encoder_weight_matrices(encoder: nn.Module) -> list[nn.Parameter]:
    """The encoder's parameters that gradient scaling is for: matrices and kernels, not biases and norms (spec 3.1)."""
    return [p for p in encoder.parameters() if p.ndim >= 2]


def takes_part_in_steps(balancer: Balancer) -> bool:
    """Whether a BalancerList has to call it: it does more than attach to the model and act once an epoch."""
    moments = ("prepare", "transform", "observe", "penalty", "gradient_scale", "before_step")
    return not balancer.works_alone and any(overrides(balancer, moment) for moment in moments)


def _check(balancers: Sequence[Balancer]) -> None:
    for place, one in enumerate(balancers):
        for other in balancers[place + 1 :]:
            for a, b in ((one, other), (other, one)):
                if why := a.excludes.get(type(b).__name__):
                    raise ConfigError(
                        "BalancerList", expected="balancers that can be combined",
                        got=f"{type(a).__name__} with {type(b).__name__}: {why}", fix="Leave one of them out.",
                    )  # fmt: skip
            both = sorted(set(one.replaces) & set(other.replaces))
            if both or (one.steps_per_batch > 1 and other.steps_per_batch > 1):
                what = f"both put a loss of their own in place of the {both[0]} loss" if both else "both take turns"
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
        tokens={name: replace(t, values=t.values.detach()) for name, t in output.tokens.items()},
        share=None if output.share is None else output.share.detach(),
    )


def _joined(seen: Sequence[tuple[Output, Tensor]]) -> tuple[Output, Tensor]:
    """The batches of one optimizer step as one."""
    if len(seen) == 1:
        return seen[0]
    outputs, targets = zip(*seen, strict=True)
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
    """Batches of one modality, padded to the longest."""
    longest = max(len(part) for part in parts)
    whole = all(part.mask is None and len(part) == longest for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        shape = (len(tensor), longest - tensor.shape[1], *tensor.shape[2:])
        return torch.cat([tensor, tensor.new_zeros(shape)], dim=1)

    return Tokens(
        torch.cat([padded(part.values) for part in parts]),
        mask=None if whole else torch.cat([padded(part.valid()) for part in parts]),
        # A batch that lacks the modality has no token that could be a class token.
        cls=any(part.cls for part in parts),
    )
