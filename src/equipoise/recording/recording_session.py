"""``RecordingSession``: intercepts the attention of a model and restores the model afterwards."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from ..errors import unknown_name
from .attention_call import AttentionCall
from .changed_calls import collect_changes, current_change, report_change, show_change
from .compiled_models import check_open, uncompiled
from .confirmed_labels import shared_in_block
from .encoder_submodules import unimodal_encoders
from .generation_loops import UNKNOWN, Chosen, Loop, Step
from .sequence_assignment import assign_queries
from .thread_sessions import Threads
from .token_labels import LabeledKeys, TokenLabeler

INTERFACE = "transformers, "
"""Start of the names of backends that are called through transformers' attention interface."""
UNTRACED = (INTERFACE, "multihead")
"""Start of the names of backends that are intercepted without following all operations."""
Run = Callable[[], tuple[Any, Tensor | None]]
"""Computes the attention of the model: its output, and the attention matrix if the model builds one."""


class AttentionHandler(Protocol):
    """Handler that is called for each intercepted attention.

    Attributes:
        replaces_output: whether ``replace_output`` may return a tensor.
    """

    replaces_output: bool

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        """Called after an attention ran."""
        ...

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Tensor | None:
        """Returns a replacement (batch, head, query, dim) of the output, or None to keep it.

        A handler whose changes other sessions record has an attribute ``changed_call``, the call that gives the output.
        """
        ...

    def on_missing(self, layer: str, reason: str) -> None:
        """Called for an attention that cannot be attributed, with the reason."""
        ...


class RecordingSession:
    """Tracks the running modules of a model and passes its attention calls to a handler.

    Args:
        model: any module.
        labeler: labels the keys of each call.
        handler: receives each call.
        layers: shell-style patterns of module names to record; None records all.
    """

    def __init__(
        self, model: nn.Module, labeler: TokenLabeler, handler: AttentionHandler, *, layers: Sequence[str] | None = None
    ) -> None:
        shared_in_block(model, "open", lambda: check_open(model))
        # Compiled models have the names of the wrapped model.
        self.names: dict[int, str] = shared_in_block(
            model, "names", lambda: {id(part): _plain(name) for name, part in model.named_modules()}
        )
        self._check_layers(model, layers)
        self.model, self.labeler, self.handler, self._patterns = model, labeler, handler, layers
        self.suspended = 0
        """Re-entrancy counter: > 0 while an intercepted attention runs, so that nested calls are not recorded twice."""
        self.called = 0
        self.untraced = True
        """Whether all attention was intercepted in a way that does not need to follow all operations."""
        self._encoders = shared_in_block(model, "encoders", lambda: unimodal_encoders(model))
        self._stack: list[nn.Module] = []
        self._times: dict[str, int] = {}
        self._loops: list[Loop] = []
        self._generating = 0
        self.threads = Threads(self)

    def in_recorded_thread(self) -> bool:
        """Whether the current thread is recorded; hooks and patches are called in all threads."""
        return self.threads.is_recorded()

    def follows(self, model: nn.Module) -> bool:
        """Whether ``model`` is part of the recorded model or contains it, and the current thread is recorded."""
        return self.in_recorded_thread() and (
            id(model) in self.names or any(part is self.model for part in model.modules())
        )

    def _check_layers(self, model: nn.Module, layers: Sequence[str] | None) -> None:
        names = [name or type(model).__name__ for name in self.names.values()]
        for pattern in layers or ():
            # The second attention of a module in one pass is "name#2".
            if not any(fnmatch.fnmatchcase(name, pattern.split("#")[0]) for name in names):
                ends = {part for name in names for part in name.split(".") if not part.isdigit()}
                raise unknown_name(
                    "watch", "module for layers", pattern, ends, like=pattern.strip("*?.").split(".")[-1]
                )

    @contextmanager
    def open(self, *interceptors: Callable[[RecordingSession], Any]) -> Iterator[RecordingSession]:
        """Enters the interceptors, and exits them in reverse order."""
        with ExitStack() as stack:
            stack.enter_context(self.threads.open())
            stack.enter_context(uncompiled())
            stack.callback(registry.register_module_forward_pre_hook(self._enter).remove)
            stack.callback(registry.register_module_forward_hook(self._leave, always_call=True).remove)
            for interceptor in interceptors:
                stack.enter_context(interceptor(self))
            yield self

    def current_module(self) -> nn.Module | None:
        """Returns the innermost running module of the model."""
        return self._stack[-1] if self._stack and self.in_recorded_thread() else None

    def attention_module(self) -> nn.Module | None:
        """Returns the innermost running module, ignoring ``nn.Softmax``."""
        inside = [module for module in self._stack[-2:] if not isinstance(module, nn.Softmax)]
        return inside[-1] if inside else self.current_module()

    def report_unobservable(self, module: nn.Module | None, reason: str) -> None:
        """Reports an attention that cannot be intercepted to the handler."""
        module = module if module is not None else self.attention_module()
        if module is None or id(module) not in self.names or self.suspended or not self.in_recorded_thread():
            return
        layer = self._layer_name(module)
        self.untraced = False
        if id(module) not in self._encoders and self._is_wanted(layer):
            self.handler.on_missing(layer, reason)

    def begin_pass(self) -> None:
        """Starts a forward pass: resets the call counts of the modules."""
        self._times = {}

    @property
    def aside(self) -> bool:
        """Whether the running pass generates no token of the returned sequences, such as a draft."""
        if self.handler.replaces_output:
            return False
        top = self._loops[-1] if self._loops else None
        return top is not None and (top.aside or any(loop.draft for loop in self._loops))

    def loop(self, model: nn.Module) -> Loop | None:
        """Returns the innermost decoding loop of a model."""
        return next((loop for loop in reversed(self._loops) if loop.model is model), None)

    def current(self) -> Loop | None:
        """Returns the decoding loop whose forward pass is running."""
        return self._loops[-1] if self._loops and self._loops[-1].running else None

    @contextmanager
    def generating(self, loop: Loop | None) -> Iterator[None]:
        """Marks the block as part of ``generate``, inside a decoding loop or around it."""
        self.threads.enter(self.model)
        self._generating += 1
        if loop is not None:
            self._loops.append(loop)
        try:
            yield
        finally:
            self._generating -= 1
            if loop is not None:
                self._loops.remove(loop)
                if discard := getattr(self.handler, "discard", None):
                    discard(loop)
            self._pause()

    def settle(self, loop: Loop, chosen: Callable[[Step], Chosen | None], rows: int) -> None:
        """Assigns the steps of a finished decoding loop to the ``rows`` sequences that it returned."""
        if not loop.draft and (settle := getattr(self.handler, "settle", None)):
            settle(loop, chosen, rows)

    def intercept(self, call: AttentionCall, module: nn.Module | None, backend: str, run: Run) -> Any:
        """Runs an attention, passes it to the handler, and returns its output or the handler's replacement."""
        module = module if module is not None else self.attention_module()
        if self.suspended or module is None or id(module) not in self.names or not self.in_recorded_thread():
            return run()[0]
        if self.aside:
            with self._silence():
                return run()[0]
        labels = self.labeler.labeled(call, module)
        self.untraced &= labels is None or backend.startswith(UNTRACED)
        layer = self._layer_name(module)
        if isinstance(labels, str) or (labels is not None and not labels.unimodal):
            layer = self._numbered(layer)
        selected = self._is_wanted(layer)
        if isinstance(labels, str) and selected:
            self.handler.on_missing(layer, labels)
        if isinstance(labels, LabeledKeys) and selected:
            if (
                self.handler.replaces_output
                and (changed := self.handler.replace_output(layer, call, labels)) is not None
            ):
                self._show(run)
                return changed
            return self._record(layer, backend, call, labels, run)
        with self._silence():
            return run()[0]

    def _show(self, run: Run) -> None:
        """Passes a changed call to the other sessions that record this model."""
        call = getattr(self.handler, "changed_call", None)
        if call is None:
            return
        report_change(call)
        if self.recorded_inside():
            # Sessions opened earlier intercept the attention of the model itself, and record the changed call instead.
            with self._silence(), show_change(call):
                run()

    def recorded_inside(self) -> bool:
        """Whether a session that was opened earlier records the model in this thread, inside of this session."""
        others = self.threads.opened_before()
        return any(not other.handler.replaces_output and other.follows(self.model) for other in others)

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Suspends interception while an intercepted attention runs."""
        self.suspended += 1
        try:
            yield
        finally:
            self.suspended -= 1

    def _record(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys, run: Run) -> Any:
        # Gradient checkpointing repeats the forward pass during backward; it was recorded the first time.
        again = torch._C._current_graph_task_id() != -1
        shown = current_change()
        with self._silence():
            with collect_changes() as changes:
                output, attention = run()
            if changed := [*changes, *([] if shown is None else [shown])]:
                call = changed[-1]
            elif attention is not None and attention.shape[-1] == call.sizes[3]:
                call = replace(call, attention=attention)
            if not again:
                # Do not intercept the measurement itself.
                with torch._C.DisableTorchFunction(), torch.autocast(call.query.device.type, enabled=False):
                    for part in self._assigned(layer, call, known):
                        self.handler.on_attention(layer, backend, call, part)
        return output

    def _assigned(self, layer: str, call: AttentionCall, known: LabeledKeys) -> Iterator[LabeledKeys]:
        """Yields the queries of a call in groups by the position of the tokens that they generate."""
        loop = self.current()
        if known.unimodal or not self._generating:
            yield known
        elif loop is None:
            yield replace(known, beside=True)
        elif loop.kind == "unknown":
            self.handler.on_missing(layer, UNKNOWN)
        else:
            yield from assign_queries(call, known, loop)

    def _is_wanted(self, layer: str) -> bool:
        return self._patterns is None or any(fnmatch.fnmatchcase(layer, pattern) for pattern in self._patterns)

    def _layer_name(self, module: nn.Module) -> str:
        return self.names[id(module)] or type(module).__name__

    def _numbered(self, layer: str) -> str:
        """Returns the layer name with "#2", "#3", ... for repeated calls of a module in one pass."""
        self._times[layer] = self._times.get(layer, 0) + 1
        return layer if self._times[layer] == 1 else f"{layer}#{self._times[layer]}"

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._loops and self._loops[-1].model is module and self.in_recorded_thread():
            self._loops[-1].begin()
        if id(module) not in self.names:
            return
        self.threads.enter(module)
        if not self.in_recorded_thread():
            return
        if not self._stack:
            self.called += 1
            self.begin_pass()
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._loops and self._loops[-1].model is module and self.in_recorded_thread():
            self._loops[-1].running = False
        if id(module) not in self.names or not self.in_recorded_thread():
            return
        # After an exception inner modules may not have been popped; unwind to this one.
        while self._stack and self._stack.pop() is not module:
            pass
        self._pause()

    def _pause(self) -> None:
        if not self._stack and not self._generating:
            self.threads.leave()

    @property
    def running(self) -> bool:
        """Whether the model is running or still generating."""
        return bool(self._stack) or any(not loop.over for loop in self._loops)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
