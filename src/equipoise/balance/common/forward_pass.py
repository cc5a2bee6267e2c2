"""Calls the balancers inside the model's forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ...tokens.token_batch import Output, Tokens
from ..balancer import Balancer, Batch, overrides
from ..rollingq.compile_disabled import CompileDisabled
from .pending_state import Pending


class ForwardPass:
    """The forward hooks of a ``BalancerList`` as callables for ``FusionModel``'s lists.

    A separate object, because a deep copy of the model copies it: the copied model uses copies of these balancers.

    Args:
        pending: records of the ``BalancerList``.
        balancers: all balancers of the list.
    """

    def __init__(self, pending: Pending, balancers: Sequence[Balancer]) -> None:
        self.pending = pending
        self.preparing = [b for b in balancers if overrides(b, "prepare")]
        self.transforming = [b for b in balancers if overrides(b, "transform")]
        self.finishing = [b for b in balancers if overrides(b, "finish")]
        self._noting = any(b.notes_in_forward for b in balancers)
        self._prepares = False

    def attach(self, model: Any) -> None:
        """Adds the callables to the model's lists, and removes those of an earlier ``BalancerList``.

        Raises:
            ConfigError: a balancer that changes inputs or tokens, for a model without the list that would call it.
        """
        _check(model, "preparations", self.preparing, "before it encodes")
        _check(model, "transforms", self.transforming, "between encoders and fusion")
        _check(model, "results", self.finishing, "at the end of its forward pass")
        needed = bool(self.preparing or self.transforming or self.finishing or self._noting)
        self._prepares = hasattr(model, "preparations")
        begins = needed if self._prepares else bool(self.transforming)
        for attribute, call, is_needed in (
            ("preparations", self.prepare, needed),
            ("transforms", self.transform, bool(self.transforming) or (begins and not self._prepares)),
            ("results", self.finish, needed),
        ):
            if hasattr(model, attribute):
                others = [each for each in getattr(model, attribute) if not _is_ours(each)]
                setattr(model, attribute, [*others, *([CompileDisabled(call)] if is_needed else [])])

    def prepare(self, batch: Batch) -> Batch:
        self.pending.begin(batch)
        for balancer in self.preparing:
            batch = balancer.prepare(batch)
        return batch

    def transform(self, tokens: Mapping[str, Tokens], target: Tensor | None = None) -> Mapping[str, Tokens]:
        if not self._prepares:
            self.pending.begin(tokens)
        for balancer in self.transforming:
            tokens = balancer.transform(tokens, target)
        return tokens

    def finish(self, output: Output) -> Output:
        for balancer in reversed(self.finishing):
            output = balancer.finish(output)
        return self.pending.finish(output)


def _check(model: Any, attribute: str, balancers: Sequence[Balancer], when: str) -> None:
    if balancers and getattr(model, attribute, None) is None:
        raise ConfigError(
            "BalancerList", expected=f"a model that calls its {attribute} {when}, for {type(balancers[0]).__name__}",
            got=f"{type(model).__name__}, which has no such list",
            fix=f"Use FusionModel, or add a list {attribute} = [] to the model.",
        )  # fmt: skip


def _is_ours(call: Any) -> bool:
    return isinstance(getattr(getattr(call, "method", call), "__self__", None), ForwardPass)
