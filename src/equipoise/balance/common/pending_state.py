"""Values noted by the batches of a step: committed when the optimizer steps, discarded otherwise."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import EquipoiseError
from ...nn.distributed import all_reduce_sum
from ...tokens.token_batch import Output
from .pass_record import Record, backward_task, input_signature, recomputing

OPEN = 16
"""Maximum number of forward passes kept until the next step; a recomputation looks up the pass that it repeats."""

Callback = Callable[[Tensor], Mapping[str, Tensor]]


class Pending:
    """The forward passes since the last optimizer step, and which of them contributed to the gradients.

    Each forward pass creates a record. ``commit`` uses its notes if the batch's loss was back-propagated and the
    gradients were not cleared since; batches that the loop skips and validation losses are discarded. A forward pass
    inside a backward pass is a recomputation, which uses the record of the first pass.

    Args:
        model: model to monitor the gradients of; None for a balancer without ``BalancerList``.
    """

    def __init__(self, model: Any = None) -> None:
        self.model = model
        self.step: list[Record] = []
        self._committed: list[Record] = []
        self.callbacks: list[tuple[object, Callback]] = []
        self._open: deque[Record] = deque(maxlen=OPEN)
        self._current: tuple[int, Record] | None = None
        self._last: Record | None = None
        self._active: Record | None = None
        # Whether to take notes for the current loss; None outside of a loss.
        self._counts: bool | None = None
        self._watched: list[tuple[nn.Parameter, Any]] = []
        self._parameter: nn.Parameter | None = None
        self._raw: Tensor | None = None
        self._now: Tensor | None = None
        self._version = -1

    def __getstate__(self) -> dict[str, Any]:
        # A copied model starts without records: it shares no batches, and graphs cannot be copied.
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])

    def record(self) -> Record:
        """Returns the record of the current forward pass or loss, a new one if the model did not call ``begin``."""
        # A recomputation may stop early and leave its record behind.
        if self._current is None or self._current[0] != backward_task():
            self.begin(None)
        assert self._current is not None
        return self._current[1]

    def announced(self) -> bool:
        """Returns whether the current forward pass or loss has a record."""
        return self._current is not None and self._current[0] == backward_task()

    def noting(self) -> bool:
        """Returns whether to take notes: not in recomputations or in losses that are not trained on."""
        return not recomputing() if self._counts is None else self._counts

    def begin(self, inputs: Any) -> None:
        """Begins a forward pass in training mode."""
        signature = tuple(input_signature(inputs))
        if recomputing():
            self._current = (backward_task(), self._first_pass(signature))
            return
        self._drop_cleared()
        for record in self._open:
            # The loss was computed; a recomputation writes the values again.
            if record.has_loss:
                record.kept.clear()
        before = sum(record.size for record in self.step)
        before += sum(r.size for r in self._open if r not in self.step and r.waits_for_loss())
        record = Record(before, signature)
        self._current = (backward_task(), record)
        self._open.append(record)

    def finish(self, output: Output) -> Output:
        """Ends the forward pass and stores its record in the output."""
        self._last, self._current = self.record(), None
        if not recomputing():
            self._last.finish(output)
        return output.with_(record=self._last)

    def enter_loss(self, output: Output) -> Record:
        """Begins the loss of this output. Outside of training its record is discarded."""
        training = self.model is None or self.model.training
        record = self._record_of(output) if training else Record()
        self._current, self.callbacks = (backward_task(), record), []
        self._counts = training and torch.is_grad_enabled() and not record.has_loss
        return record

    def leave_loss(self, record: Record, loss: Tensor | None) -> None:
        """Ends the loss and registers a hook for backward passes; ``loss`` is None after an error."""
        callbacks, self.callbacks = self.callbacks, []
        if self._counts and loss is not None and loss.requires_grad:
            record.has_loss = True
            self._watch_gradients()
            loss.register_hook(lambda gradient: self._reach(record, callbacks, gradient))
        self._current = self._counts = None

    @property
    def committed(self) -> list[Record]:
        """The records of the step, for ``before_step``; all records for a balancer without ``BalancerList``."""
        return list(self._open) if self.model is None else self._committed

    def commit(self, gradients: Sequence[Tensor]) -> list[Record]:
        """Returns the records that contributed to the gradients, and discards the others.

        There are none if a gradient is not finite.

        Assumes that the optimizer steps exactly if all gradients are finite, as with GradScaler. One GPU sync.
        """
        self._committed = self._select(gradients)
        return self._committed

    def _select(self, gradients: Sequence[Tensor]) -> list[Record]:
        records, self.step = self.step, []
        self._open.clear()
        self._current = None
        if not records or not gradients:
            return []
        largest = nn.utils.get_total_norm(gradients, torch.inf)
        raw, now = self._raw, None if self._parameter is None else self._parameter.grad
        if raw is None:
            return records if bool(largest.isfinite()) else []
        if now is None:
            return []
        self._now = now.detach().clone()
        values = torch.stack([largest, *(tensor.abs().max().to(largest) for tensor in (raw, now))])
        maximum, initial, current = values.tolist()
        # Zeros where backward produced a gradient: the loop has cleared the gradients.
        changed = self._parameter is not None and now._version != self._version
        cleared = current == 0 if initial > 0 else changed and maximum == 0
        return records if math.isfinite(maximum) and not cleared else []

    def ratio(self) -> Tensor | float:
        """Returns the ratio of the current gradients to the sum that backward passes produced on all processes.

        It is 1 in a plain loop, and less if gradients were unscaled, averaged over processes or clipped since.
        """
        if self._raw is None or self._now is None:
            return 1.0
        raw, now = all_reduce_sum(self._raw).flatten(), self._now.flatten()
        index = raw.abs().argmax()[None]
        largest = raw.gather(0, index)[0]
        return torch.where(largest == 0, 1.0, now.gather(0, index)[0] / torch.where(largest == 0, 1.0, largest))

    def size(self) -> Tensor | float:
        """Returns the sum of the factors by which the loop scaled the step's losses, as in the current gradients."""
        scales = [record.scale for record in self.committed if record.scale is not None]
        return all_reduce_sum(torch.stack(scales).sum()) * self.ratio() if scales else 1.0

    def _reach(self, record: Record, callbacks: Iterable[tuple[object, Callback]], gradient: Tensor) -> None:
        self._drop_cleared()
        if not self.step:
            self._raw = None
        if record not in self.step:
            if record.drew and any(other.drew and other.before == record.before for other in self.step):
                raise EquipoiseError(
                    "BalancerList", expected="a backward pass for each batch before the next one's forward pass",
                    got="one backward pass for the added losses of several batches",
                    fix="Call backward for each loss, or compute all outputs before the first loss: random numbers are "
                    "drawn by the position of a sample in the step, and both batches used the same positions.",
                )  # fmt: skip
            self.step.append(record)
        record.scale = gradient if record.scale is None else record.scale + gradient
        record.reached.add(backward_task())
        self._active = record
        try:
            for balancer, callback in callbacks:
                for key, value in callback(gradient).items():
                    record.add(balancer, key, value, backward=True)
        finally:
            self._active = None

    def _first_pass(self, signature: tuple) -> Record:
        """Returns the record of the forward pass that a recomputation repeats."""
        task = backward_task()
        if self._active is not None:
            return self._active
        candidates = [*self.step, *(record for record in self._open if record not in self.step)]
        shapes = [part[1:] for part in signature]
        candidates = [record for record in candidates if [part[1:] for part in record.signature or ()] == shapes]
        # Autograd runs the graph of the last forward pass first.
        for matches in (
            lambda r: task in r.reached and task not in r.repeated and r.signature == signature,
            lambda r: task in r.reached and task not in r.repeated,
            lambda r: task not in r.repeated and r.signature == signature,
            lambda r: r.signature == signature,
            lambda r: len(candidates) == 1,
        ):
            for record in reversed(candidates):
                if matches(record):
                    record.repeated.add(task)
                    return record
        raise EquipoiseError(
            "BalancerList", expected="a recomputation of a forward pass of this step",
            got="a forward pass inside a backward pass that repeats no forward pass since the last step",
            fix="Call backward before optimizer.step, and keep the inputs of checkpointed modules in memory.",
        )  # fmt: skip

    def _record_of(self, output: Output) -> Record:
        if isinstance(output.record, Record):
            return output.record
        if recomputing() and self._last is not None:
            return self._last
        waiting = [record for record in reversed(self._open) if not record.has_loss]
        for record in waiting:
            if record.computed(output):
                return record
        if waiting:
            return waiting[0]
        self.begin(None)
        return self.record()

    def _watch_gradients(self) -> None:
        """Monitors the gradient of one parameter, to detect changes after backward; see ``ratio``."""
        if self.model is None or (self._watched and all(p.requires_grad for p, _ in self._watched)):
            return
        for _, handle in self._watched:
            handle.remove()
        trainable = [p for p in self.model.head.parameters() if p.requires_grad and p.is_leaf]
        watched = [min(trainable, key=lambda p: p.numel())] if trainable else []
        if not watched:
            # A frozen head: the first of the other parameters that a backward pass reaches. Probes are not among them,
            # since an optimizer may leave them out.
            parameters = self.model.named_parameters()
            watched = [p for name, p in parameters if p.requires_grad and p.is_leaf and "unimodal_heads" not in name]
        self._watched = [(p, p.register_post_accumulate_grad_hook(self._note_gradient)) for p in watched]

    def _note_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None or (self._raw is not None and parameter is not self._parameter):
            return
        self._parameter = parameter
        self._raw, self._version = parameter.grad.detach().clone(), parameter.grad._version

    def _drop_cleared(self) -> None:
        """Discards batches whose gradients the loop has cleared: an abandoned step, the first pass of SAM."""
        if not self.step or self.model is None:
            return
        if any(backward_task() in record.reached for record in self.step):
            # Several losses in one backward pass, which has not reached the parameters yet.
            return
        raw, gradient = self._raw, None if self._parameter is None else self._parameter.grad
        if raw is None or self._parameter is None:
            cleared = all(p.grad is None for p in self.model.parameters())
        elif gradient is None:
            cleared = True
        else:
            # If backward produced zeros here, check all other gradients.
            now = [gradient] if bool(raw.any()) else [p.grad for p in self.model.parameters() if p.grad is not None]
            cleared = gradient._version != self._version and not any(bool(value.any()) for value in now)
        if cleared:
            for record in self.step:
                record.discard_backward()
            self.step, self._raw = [], None
