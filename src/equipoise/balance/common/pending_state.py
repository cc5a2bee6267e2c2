"""What a step's batches have noted: kept when the optimizer steps, dropped when it does not."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import EquipoiseError
from ...tokens.token_batch import Output, Tokens

OPEN = 16
"""Forward passes that are remembered until the next step, so that a recomputation finds the one that it repeats."""

Moment = Callable[[Tensor], Mapping[str, Tensor]]


def recomputing() -> bool:
    """Whether this runs inside a backward pass, as the recomputation of activation checkpointing does."""
    return _task() != -1


class Record:
    """One forward pass in training mode, and the loss of its output.

    Attributes:
        before: number of samples in the batches of this step that came before, on this process.
        size: number of samples.
        drew: whether a balancer drew random numbers for the samples.
        scale: gradient of the final loss with respect to this batch's loss, summed over backward passes; None until
            a backward pass has reached it.
        kept: (balancer, key) -> what a balancer hands from the forward pass to the loss; a recomputation writes it
            anew.
    """

    def __init__(self, before: int = 0, signature: Any = None) -> None:
        self.before, self.signature = before, signature
        self.size, self.drew = 0, False
        self.scale: Tensor | None = None
        self.kept: dict[tuple[int, str], Any] = {}
        self.with_gradient, self.has_loss = torch.is_grad_enabled(), False
        self.outputs: tuple[Output, Tensor] | None = None
        self._notes: dict[tuple[int, str], Tensor] = {}
        self._features: Callable[[], Tensor | None] = lambda: None
        self.reached: set[int] = set()
        self.repeated: set[int] = set()

    def add(self, balancer: object, key: str, value: Tensor) -> None:
        """Adds to the batch's sum under this key. A value that is not finite counts as zeros; no GPU sync."""
        value = value.detach()
        if value.is_floating_point():
            value = torch.where(value.isfinite().all(), value, torch.zeros_like(value))
        place = (id(balancer), key)
        self._notes[place] = self._notes[place] + value if place in self._notes else value

    def take(self, balancer: object, key: str) -> Tensor | None:
        """Returns the sum under this key and removes it."""
        return self._notes.pop((id(balancer), key), None)

    def place(self, size: int) -> int:
        """How many samples of the step come before this batch, for balancers that draw for each of its samples."""
        self.size, self.drew = size, True
        return self.before

    def finish(self, output: Output) -> None:
        """Takes the output of the forward pass."""
        self.size = self.size or len(output.features)
        self._features = weakref.ref(output.features)
        pair = (output.features, output.logits)
        self._memory = tuple(_address(tensor) for tensor in pair if tensor is not None)

    _memory: tuple[int, ...] = ()

    def made(self, output: Output) -> bool:
        """Whether this pass computed the output, which may since have been taken apart and put together again."""
        pair = (output.features, output.logits)
        return any(tensor is not None and _address(tensor) in self._memory for tensor in pair)

    def waits_for_loss(self) -> bool:
        """Whether its loss may still come: with gradient, the output in use, and finite."""
        features = self._features()
        if not self.with_gradient or self.has_loss or features is None:
            return False
        # Detached: checkpointing counts what is saved for backward.
        return bool(features.detach().isfinite().all())


class Pending:
    """The forward passes since the last optimizer step, and which of them the gradients hold.

    A forward pass opens a record. Its notes count in ``commit`` where a backward pass has reached the batch's loss and
    the gradients were not cleared since. So batches that the loop skips leave nothing, and neither do validation
    losses. Inside a backward pass a forward pass is a recomputation, which repeats the record of its first pass.

    Args:
        model: whose gradients are watched; None for a balancer without ``BalancerList``.
    """

    def __init__(self, model: Any = None) -> None:
        self.model = model
        self.step: list[Record] = []
        self._committed: list[Record] = []
        self.moments: list[tuple[object, Moment]] = []
        self._open: deque[Record] = deque(maxlen=OPEN)
        self._current: tuple[int, Record] | None = None
        self._last: Record | None = None
        self._active: Record | None = None
        # Whether the loss that is computed counts; None outside of a loss.
        self._counts: bool | None = None
        self._parameter: nn.Parameter | None = None
        self._raw: Tensor | None = None
        self._now: Tensor | None = None
        self._version = -1

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model trains by itself: it shares no batch, and a graph cannot be copied.
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])

    def record(self) -> Record:
        """The record of the forward pass or loss that runs; a new one where the model did not announce it."""
        # A recomputation may stop early, and then its record is not the one of what runs now.
        if self._current is None or self._current[0] != _task():
            self.begin(None)
        assert self._current is not None
        return self._current[1]

    def announced(self) -> bool:
        """Whether a forward pass or a loss runs that has a record."""
        return self._current is not None and self._current[0] == _task()

    def noting(self) -> bool:
        """Whether notes are taken: not in a recomputation, nor in a loss that is only looked at."""
        return not recomputing() if self._counts is None else self._counts

    def begin(self, inputs: Any) -> None:
        """A forward pass in training mode begins."""
        signature = tuple(_signature(inputs))
        if recomputing():
            self._current = (_task(), self._first_pass(signature))
            return
        self._drop_cleared()
        for record in self._open:
            # Its loss is computed; what a recomputation needs again, it writes again.
            if record.has_loss:
                record.kept.clear()
        before = sum(record.size for record in self.step)
        before += sum(r.size for r in self._open if r not in self.step and r.waits_for_loss())
        record = Record(before, signature)
        self._current = (_task(), record)
        self._open.append(record)

    def finish(self, output: Output) -> Output:
        """The forward pass ends; its output remembers which one it was."""
        self._last, self._current = self.record(), None
        if not recomputing():
            self._last.finish(output)
        return output.with_(record=self._last)

    def enter_loss(self, output: Output) -> Record:
        """The loss of this output is computed next. Outside of training nothing of it is remembered."""
        training = self.model is None or self.model.training
        record = self._of(output) if training else Record()
        self._current, self.moments = (_task(), record), []
        self._counts = training and torch.is_grad_enabled() and not record.has_loss
        return record

    def leave_loss(self, record: Record, loss: Tensor | None) -> None:
        """Arranges that a backward pass which reaches the loss is noticed; None after an error."""
        moments, self.moments = self.moments, []
        if self._counts and loss is not None and loss.requires_grad:
            record.has_loss = True
            self._watch_gradients()
            loss.register_hook(lambda gradient: self._reach(record, moments, gradient))
        self._current = self._counts = None

    @property
    def committed(self) -> list[Record]:
        """In ``before_step``: the records of the step; all of them for a balancer without ``BalancerList``."""
        return list(self._open) if self.model is None else self._committed

    def commit(self, gradients: Sequence[Tensor]) -> list[Record]:
        """Returns the records that the gradients hold, none where a gradient is not finite; forgets all others.

        The optimizer's step is taken to happen exactly if all gradients are finite, as GradScaler does. One GPU sync.
        """
        self._committed = self._decided(gradients)
        return self._committed

    def _decided(self, gradients: Sequence[Tensor]) -> list[Record]:
        found, self.step = self.step, []
        self._open.clear()
        self._current = None
        if not found or not gradients:
            return []
        largest = nn.utils.get_total_norm(gradients, torch.inf)
        raw, now = self._raw, None if self._parameter is None else self._parameter.grad
        if raw is None:
            return found if bool(largest.isfinite()) else []
        if now is None:
            return []
        self._now = now.detach().clone()
        figures = torch.stack([largest, *(tensor.abs().max().to(largest) for tensor in (raw, now))])
        bound, brought, kept = figures.tolist()
        # Zeros in place of what backward brought: the loop has cleared the gradients.
        return found if math.isfinite(bound) and (kept > 0 or brought == 0) else []

    def ratio(self) -> Tensor | float:
        """Gradients as they are now over those that the backward passes brought on all processes together.

        1 in a plain loop; less where the loop unscaled, averaged over processes or clipped them since.
        """
        if self._raw is None or self._now is None:
            return 1.0
        raw, now = summed(self._raw).flatten(), self._now.flatten()
        place = raw.abs().argmax()[None]
        largest = raw.gather(0, place)[0]
        return torch.where(largest == 0, 1.0, now.gather(0, place)[0] / torch.where(largest == 0, 1.0, largest))

    def size(self) -> Tensor | float:
        """Sum over the step's batches of how the loop scaled each loss, as it shows in the gradients now."""
        scales = [record.scale for record in self.committed if record.scale is not None]
        return summed(torch.stack(scales).sum()) * self.ratio() if scales else 1.0

    def _reach(self, record: Record, moments: Iterable[tuple[object, Moment]], gradient: Tensor) -> None:
        self._drop_cleared()
        if not self.step:
            self._raw = None
        if record not in self.step:
            if record.drew and any(other.drew and other.before == record.before for other in self.step):
                raise EquipoiseError(
                    "BalancerList", expected="a backward pass for each batch before the next one's forward pass",
                    got="losses of several batches that were added up before one backward pass",
                    fix="Call backward for each loss, or compute all outputs before the first loss: what is dropped is "
                    "drawn for each sample by its place in the step, and both batches drew the same.",
                )  # fmt: skip
            self.step.append(record)
        record.scale = gradient if record.scale is None else record.scale + gradient
        record.reached.add(_task())
        self._active = record
        try:
            for balancer, moment in moments:
                for key, value in moment(gradient).items():
                    record.add(balancer, key, value)
        finally:
            self._active = None

    def _first_pass(self, signature: tuple) -> Record:
        """The record of the forward pass that a recomputation repeats."""
        task = _task()
        if self._active is not None:
            return self._active
        known = [*self.step, *(record for record in self._open if record not in self.step)]
        shapes = [part[1:] for part in signature]
        known = [record for record in known if [part[1:] for part in record.signature or ()] == shapes]
        # The engine runs the graph of the last forward pass first.
        for wanted in (
            lambda r: task in r.reached and task not in r.repeated and r.signature == signature,
            lambda r: task in r.reached and task not in r.repeated,
            lambda r: task not in r.repeated and r.signature == signature,
            lambda r: r.signature == signature,
            lambda r: len(known) == 1,
        ):
            for record in reversed(known):
                if wanted(record):
                    record.repeated.add(task)
                    return record
        raise EquipoiseError(
            "BalancerList", expected="a recomputation of a forward pass of this step",
            got="a forward pass inside a backward pass, with inputs of no pass since the last step",
            fix="Call backward before the optimizer steps, and checkpoint the model with inputs that stay in memory.",
        )  # fmt: skip

    def _of(self, output: Output) -> Record:
        if isinstance(output.record, Record):
            return output.record
        if recomputing() and self._last is not None:
            return self._last
        waiting = [record for record in reversed(self._open) if not record.has_loss]
        for record in waiting:
            if record.made(output):
                return record
        if waiting:
            return waiting[0]
        self.begin(None)
        return self.record()

    def _watch_gradients(self) -> None:
        """One small parameter tells what has become of the gradients since backward; see ``ratio``."""
        if self.model is None or self._parameter is not None:
            return
        learning = [p for p in self.model.head.parameters() if p.requires_grad and p.is_leaf]
        if learning:
            smallest = self._parameter = min(learning, key=lambda p: p.numel())
            smallest.register_post_accumulate_grad_hook(self._note_gradient)

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._raw, self._version = parameter.grad.detach().clone(), parameter.grad._version

    def _drop_cleared(self) -> None:
        """Forgets batches whose gradients the loop has cleared: a step that it gave up, the first pass of SAM."""
        if not self.step or self.model is None:
            return
        if any(_task() in record.reached for record in self.step):
            # Several losses in one backward pass, which has not come to the parameters yet.
            return
        raw, gradient = self._raw, None if self._parameter is None else self._parameter.grad
        if raw is None or self._parameter is None:
            cleared = all(p.grad is None for p in self.model.parameters())
        elif gradient is None:
            cleared = True
        else:
            changed = gradient._version != self._version
            cleared = changed and bool(raw.any()) and not bool(gradient.any())
        if cleared:
            self.step, self._raw = [], None


def _task() -> int:
    """Number of the backward pass that runs here; -1 outside."""
    return torch._C._current_graph_task_id()


def summed(total: Tensor) -> Tensor:
    """The sum over all processes; the tensor itself where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = total.detach().clone()
        torch.distributed.all_reduce(total)
    return total


def _signature(inputs: Any) -> Iterable[tuple]:
    """Where each tensor lies, and its shape and type: alike in a pass and in its recomputation."""
    if isinstance(inputs, Tensor):
        yield _address(inputs), tuple(inputs.shape), inputs.dtype
    elif isinstance(inputs, Tokens):
        yield from _signature(inputs.values)
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _signature(value)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        # Of transformed functions, whose tensors have no memory of their own.
        return 0
