"""``AdaptedModel``: any module with the interface that balancers and diagnostics use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...nn.eval_mode import eval_mode_no_grad
from ...recording.watch_context import InterceptorFactory
from ...tokens.masks import at_least_float32
from ...tokens.token_batch import Output, Tokens
from ..task_losses import TaskLosses
from .attention_readout import AttentionReadout
from .captured_forward import Captured, run_captured
from .encoder_output import replace_tokens, tokens_of
from .key_labels import MeasuredLabels, interceptors, measure_key_labels
from .model_call import CallForm, ModelCall
from .output_memory import OutputMemory, find_logits

OwnLoss = Callable[[Tensor, Tensor], Tensor]


class AdaptedModel(TaskLosses, nn.Module):
    """A foreign model with the interface of ``FusionModel``; created by ``eq.adapt``, which documents the arguments.

    Calling it is calling the model: same arguments, same result. ``output_of(result)`` returns the ``Output`` of that
    forward pass: the encoders' outputs as ``tokens``, the input of the head as ``features``, and logits of unimodal
    heads. ``BalancerList.loss`` and the diagnostics call it.

    Attributes:
        model: the adapted model.
        names: the modalities.
        task, num_outputs, unimodal: as in ``FusionModel``.
        unimodal_heads: heads on the pooled tokens of each modality.
    """

    masks_tokens = False
    """Foreign fusions take no masks of tokens: removed tokens are zeros."""

    def __init__(
        self,
        model: nn.Module,
        *,
        encoders: Mapping[str, str],
        head: str | None,
        checked_head: bool,
        fusion: str | None,
        heads: Mapping[str, str | nn.Module],
        task: Any,
        num_outputs: int,
        unimodal: str,
        form: CallForm,
        logits: Callable[[Any], Tensor] | None,
        loss: OwnLoss | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(encoders)
        self.task, self.num_outputs, self.unimodal = task, num_outputs, unimodal
        self.unimodal_heads = nn.ModuleDict({n: part for n, part in heads.items() if isinstance(part, nn.Module)})
        self.preparations: list[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = []
        self.transforms: list[Callable[[Mapping[str, Tokens], Tensor | None], Mapping[str, Tokens]]] = []
        self.results: list[Callable[[Output], Output]] = []
        self._paths, self._head, self._fusion_path = dict(encoders), head, fusion
        self._checked_head = checked_head
        self._own_heads = {name: path for name, path in heads.items() if isinstance(path, str)}
        self._form, self._find_logits, self._own_loss = form, logits or find_logits, loss
        self._outputs = OutputMemory()
        self._labelers: list[MeasuredLabels] = []
        self._label_cache: dict[Any, Any] = {}
        self.widths: dict[str, int] = {}

    # Parts of the model. They stay registered in the model alone.

    @property
    def encoders(self) -> nn.ModuleDict:
        """The encoders: modality -> module of the model."""
        return nn.ModuleDict({name: self.model.get_submodule(path) for name, path in self._paths.items()})

    @property
    def head(self) -> nn.Module:
        """The final head; an identity without parameters if the model was adapted without one."""
        return nn.Identity() if self._head is None else self.model.get_submodule(self._head)

    @property
    def fusion(self) -> AdaptedFusion:
        """The description of the fusion for balancers that ask for its width or for additive contributions."""
        return AdaptedFusion(self)

    @property
    def adapted_class(self) -> type[nn.Module]:
        return type(self.model)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "head" and isinstance(value, nn.Module):
            if self._head is None:
                raise self._without(
                    "a head to replace", "a model adapted with head=False", "Pass head=model.classifier."
                )
            parent, _, last = self._head.rpartition(".")
            setattr(self.model.get_submodule(parent), last, value)
        elif name == "fusion":
            raise self._without(
                "a fusion of equipoise, which a method can wrap",
                f"{type(self.model).__name__}, whose fusion is its own code",
                "Choose a method that does not replace the fusion, or build the model as eq.FusionModel.",
            )
        else:
            super().__setattr__(name, value)

    def _without(self, expected: str, got: str, fix: str) -> ConfigError:
        return ConfigError("AdaptedModel", expected=expected, got=got, fix=fix)

    # Forward passes.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model and returns its result. A single dict is a batch: modality -> input, ``mask``, ``target``."""
        call = self._form.bind(args, kwargs)
        if self.training:
            for prepare in self.preparations:
                call = call.with_inputs(prepare(call.inputs))
        if self._labelers:
            self._label_keys(call)
        if self.training and self.transforms:
            tokens = self._tokens(self._run(call, encoders_only=True), call)
            changed: Mapping[str, Tokens] = tokens
            for transform in self.transforms:
                changed = transform(changed, call.target)
            returned, output = self._fuse(changed, tokens.context)
        else:
            captured = self._run(call)
            returned, output = captured.returned, self._output(captured, self._tokens(captured, call))
        if self.training:
            for result in self.results:
                output = result(output)
        if output.logits is not None:
            self._outputs.store(self._raw_logits(returned), output)
        return returned

    def check_example(self, batch: Any) -> int:
        """Runs the model on a batch to find the widths of tokens; returns the number of outputs."""
        call = self._form.bind((self._form.named_batch(batch),), {})
        captured = self._run(call)
        self._tokens(captured, call)
        absent = [name for name in self.names if name not in captured.encoders]
        if absent:
            raise self._without(
                f"a forward pass through the encoder '{self._paths[absent[0]]}' of '{absent[0]}'",
                "one that skipped it",
                "Name the module that the forward pass calls.",
            )
        return self.num_outputs or _two_dim(self._raw_logits(captured.returned)).shape[-1]

    def encode(self, batch: Any) -> EncodedTokens:
        """Runs the model until every encoder has run: modality -> Tokens."""
        call = self._form.bind((self._form.named_batch(batch),), {})
        tokens = self._tokens(self._run(call, encoders_only=True), call)
        self._context = tokens.context
        return tokens

    def fuse(self, tokens: Mapping[str, Tokens]) -> Output:
        """Runs the model with these tokens in place of the encoders' outputs, on the batch of the last ``encode``."""
        context = getattr(tokens, "context", None) or self._context
        if context is None:
            raise self._without(
                "tokens of encode(batch)",
                "fuse before encode, or tokens joined from several accumulated batches",
                "Call model.encode(batch) first; let AGM step after every batch.",
            )
        return self._fuse(tokens, context)[1]

    def output_of(self, returned: Any) -> Output:
        """Returns the Output of the forward pass that returned this value, or these logits.

        Raises:
            ConfigError: the value was not returned by this model.
        """
        if isinstance(returned, Output) and returned.tokens and returned.names == self.names:
            return returned
        logits = None if returned is None else self._raw_logits(returned)
        output = None if logits is None else self._outputs.find(logits)
        if output is None or logits is None:
            raise self._without(
                "the value that the adapted model returned, or its logits", type(returned).__name__,
                "Call the adapted model, not the original one, and pass its result unchanged.",
            )  # fmt: skip
        return output.with_(logits=_two_dim(logits))

    _context: tuple[ModelCall, dict[str, Any]] | None = None

    def _run(
        self, call: ModelCall, *, replaced: Mapping[str, Any] | None = None, encoders_only: bool = False
    ) -> Captured:
        heads = {name: self.model.get_submodule(path) for name, path in self._own_heads.items()}
        head = None if self._head is None else self.head
        encoders = dict(self.encoders.items())
        return run_captured(self.model, call, encoders, head, heads, replaced=replaced, encoders_only=encoders_only)

    def _tokens(self, captured: Captured, call: ModelCall) -> EncodedTokens:
        masks = call.inputs.get("mask")
        size = call.batch_size
        tokens: dict[str, Tokens] = {}
        for name, output in captured.encoders.items():
            part = tokens_of(output, name, size)
            mask = masks.get(name) if isinstance(masks, Mapping) else None
            tokens[name] = _masked(part, mask) if isinstance(mask, Tensor) and part.mask is None else part
            self.widths.setdefault(name, part.dim)
        if not tokens:
            raise ShapeError(
                "AdaptedModel", expected=f"a forward pass through an encoder: {', '.join(self._paths.values())}",
                got="none that ran", fix="Pass the modules that the forward pass calls.",
            )  # fmt: skip
        like = next(iter(tokens.values())).values
        absent = {n: Tokens(like.new_zeros(len(like), 0, self.widths.get(n, like.shape[-1]))) for n in self.names}
        all_tokens = {name: tokens.get(name, absent[name]) for name in self.names}
        return EncodedTokens(all_tokens, (call, dict(captured.encoders)))

    def _fuse(self, tokens: Mapping[str, Tokens], context: tuple[ModelCall, dict[str, Any]]) -> tuple[Any, Output]:
        call, outputs = context
        if self._labelers:
            self._label_keys(call)
        replaced = {name: replace_tokens(output, tokens[name]) for name, output in outputs.items()}
        captured = self._run(call, replaced=replaced)
        return captured.returned, self._output(captured, EncodedTokens(tokens, context))

    def _raw_logits(self, returned: Any) -> Tensor:
        logits = self._find_logits(returned)
        if not isinstance(logits, Tensor):
            raise self._without(
                "logits in the model's result", type(returned).__name__,
                "Pass adapt(logits=lambda result: ...), which returns them.",
            )  # fmt: skip
        return logits

    def _output(self, captured: Captured, tokens: EncodedTokens) -> Output:
        logits = _two_dim(self._raw_logits(captured.returned))
        features = captured.features if isinstance(captured.features, Tensor) else None
        # A head that was found by its name or place must have returned the logits.
        certain = self._checked_head or (
            isinstance(captured.head_output, Tensor) and _same(captured.head_output, logits)
        )
        if features is not None and (features.ndim < 2 or len(features) != len(logits) or not certain):
            features = None
        if features is None:
            features = torch.cat([part.pooled() for part in tokens.values()], dim=-1)
        elif features.ndim > 2:
            features = features.flatten(1, -2).mean(dim=1)
        output = captured.returned if isinstance(captured.returned, Output) else None
        unimodal = {name: _two_dim(self._raw_logits(part)) for name, part in captured.heads.items()}
        for name, head in self.unimodal_heads.items():
            pooled = tokens[name].pooled()
            if isinstance(head, nn.LazyLinear):
                _initialize(head, pooled)
            unimodal[name] = head(pooled.detach() if self.unimodal == "probe" else pooled)
        return Output(
            features=features, logits=logits, unimodal_logits=unimodal, tokens=tokens,
            share=None if output is None else output.share, names=self.names,
        )  # fmt: skip

    # Losses.

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of the task, or the function given to ``adapt``; mean over the batch."""
        return super().loss(logits, target) if self._own_loss is None else self._own_loss(logits, target).mean()

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of every sample; a function that returns the mean over a batch is called for each sample."""
        if self._own_loss is None:
            return super().sample_losses(logits, target)
        losses = self._own_loss(logits, target)
        if losses.ndim == 0:
            rows = zip(at_least_float32(logits).split(1), target.split(1), strict=True)
            losses = torch.stack([self._own_loss(row, one) for row, one in rows])
        return losses.flatten(1).mean(dim=1) if losses.ndim > 1 else losses

    def ensemble_logits(self, output: Output) -> dict[str, Tensor]:
        """Returns {}: the model's own code computes its logits."""
        return {}

    def contributions(self, output: Output, head: nn.Module | None = None) -> dict[str, Tensor] | None:
        """Additive parts of the logits, if a linear head reads the concatenated pooled tokens; else None."""
        head, parts = head or self.head, [output.tokens[name].pooled() for name in self.names]
        if not isinstance(head, nn.Linear) or sum(part.shape[-1] for part in parts) != head.in_features:
            return None
        if not torch.equal(torch.cat(parts, dim=-1).detach(), output.features.detach()):
            return None
        weights = head.weight.split([part.shape[-1] for part in parts], dim=1)
        bias = 0.0 if head.bias is None else head.bias / len(parts)
        return {n: part @ w.mT + bias for n, part, w in zip(self.names, parts, weights, strict=True)}

    # Attention.

    def to_batch(self, batch: Any) -> Mapping[str, Any]:
        """Returns a batch of any loader as a dict with the modalities' names and ``target``."""
        return self._form.named_batch(batch)

    def key_labels(self, batch: Any) -> dict[int, Tensor | str]:
        """Measures the labels of the keys of the fusion's attention for a batch.

        Returns:
            number of keys -> labels (key,) or (batch, key), an index into ``names`` and -1 for class tokens, as
            ``RollingQ.layout`` takes; or the reason why they are unknown.
        """
        return self._measure(self._form.bind((self._form.named_batch(batch),), {}))

    def key_labeler(self) -> tuple[MeasuredLabels, tuple[InterceptorFactory, ...]]:
        """Returns a labeler of keys and the interceptors of ``watch`` for this model."""
        labeler = MeasuredLabels(self.names, self._inside_encoders(), self._labelers)
        return labeler, (labeler.activated, *interceptors())

    @contextmanager
    def attention_readout(self) -> Iterator[AttentionReadout]:
        """Records share, cosine and key norm of the fusion's last attention layer inside the block."""
        labeler, ways = self.key_labeler()
        under = None if self._fusion_path is None else f"model.{self._fusion_path}"
        readout = AttentionReadout(labeler, under)
        with readout.recording(self, ways):
            yield readout

    def _inside_encoders(self) -> dict[int, str]:
        return {id(part): name for name, encoder in self.encoders.items() for part in encoder.modules()}

    def _label_keys(self, call: ModelCall) -> None:
        if any(labeler.measuring for labeler in self._labelers):
            return
        labels = self._measure(call)
        for labeler in self._labelers:
            labeler.labels = labels

    def _measure(self, call: ModelCall) -> dict[int, Tensor | str]:
        # The order of tokens cannot depend on the values of floating-point inputs.
        key = tuple(
            (n, tuple(v.shape)) for n, v in call.inputs.items() if isinstance(v, Tensor) and v.is_floating_point()
        )
        cacheable = len(key) == sum(name in call.inputs for name in self.names) and "mask" not in call.inputs
        if cacheable and key in self._label_cache:
            return self._label_cache[key]
        for labeler in self._labelers:
            labeler.measuring = True
        try:
            with eval_mode_no_grad(self.model):
                tokens = self._tokens(self._run(call, encoders_only=True), call)
                labels = measure_key_labels(
                    self.model, lambda changed: self._fuse(changed, tokens.context), tokens, self._inside_encoders()
                )
        finally:
            for labeler in self._labelers:
                labeler.measuring = False
        if cacheable and all(isinstance(part, str) or part.ndim == 1 for part in labels.values()):
            self._label_cache[key] = labels
        return labels

    def __getstate__(self) -> dict[str, Any]:
        # Outputs of forward passes belong to this object, and their graphs cannot be copied.
        return {**self.__dict__, "_context": None, "_labelers": [], "_label_cache": {}, "_outputs": OutputMemory()}


class EncodedTokens(dict[str, Tokens]):
    """Tokens of a batch, with the model call that computes the output from them."""

    def __init__(self, tokens: Mapping[str, Tokens], context: tuple[ModelCall, dict[str, Any]]) -> None:
        super().__init__(tokens)
        self.context = context

    def derive(self, tokens: Mapping[str, Tokens]) -> EncodedTokens:
        """Returns changed tokens of the same batch."""
        return EncodedTokens(tokens, self.context)

    def __reduce__(self):
        # Copies of an output have its tokens, without the call.
        return dict, (dict(self),)


class AdaptedFusion:
    """The properties of a fusion that balancers use: the width of its tokens, and whether it concatenates them."""

    def __init__(self, model: AdaptedModel) -> None:
        self._model, self.names, self.reads = model, model.names, model.names

    @property
    def dim(self) -> int:
        """The width of the tokens of all modalities.

        Raises:
            ConfigError: it is not known yet, or modalities have different widths.
        """
        widths = {name: self._model.widths.get(name) for name in self.names}
        if None in widths.values() or len(set(widths.values())) > 1:
            unknown = None in widths.values()
            raise ConfigError(
                "AdaptedModel", expected="tokens of the same width for all modalities",
                got="no forward pass yet" if unknown else str(widths),
                fix="Pass eq.adapt(..., example=batch)." if unknown else "Put a torch.nn.Linear behind the encoders.",
            )  # fmt: skip
        return next(iter(widths.values()))  # type: ignore[return-value]

    def contributions(self, output: Output, head: nn.Module) -> dict[str, Tensor] | None:
        """As ``AdaptedModel.contributions``."""
        return self._model.contributions(output, head)

    def concatenates(self) -> bool:
        """Returns whether the head is linear and as wide as the tokens of all modalities together."""
        head = self._model.head
        return isinstance(head, nn.Linear) and head.in_features == self.dim * len(self.names)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same values in memory, possibly in another shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _initialize(head: nn.LazyLinear, pooled: Tensor) -> None:
    """Creates the parameters of a probe without changing the random numbers of the program."""
    devices = [pooled.device.index] if pooled.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        head(pooled.detach())


def _two_dim(logits: Tensor) -> Tensor:
    return logits[:, None] if logits.ndim == 1 else logits


def _masked(tokens: Tokens, mask: Tensor) -> Tokens:
    mask = mask.bool()
    if mask.ndim == 2 and mask.shape != tokens.values.shape[:2]:
        mask = mask.any(dim=1)
    if mask.ndim == 1:
        mask = mask[:, None].expand(-1, len(tokens))
    return Tokens(tokens.values, mask=mask, times=tokens.times, cls=tokens.cls)
