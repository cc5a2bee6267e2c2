"""``eq.adapt``: makes any module usable by balancers, diagnostics and ``eq.diagnose``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError, unknown_name
from ...nn.eval_mode import eval_mode_no_grad
from ..task_losses import Task
from .adapted_model import AdaptedModel
from .model_call import CallForm

Part = nn.Module | str
HEADS = (
    "head", "classifier", "fc", "classification_head", "output_layer", "output", "out", "score", "final", "predictor",
    "prediction_head", "cls_head", "lm_head",
)  # fmt: skip
"""Usual names of the final head."""
WITHOUT = "watch and RollingQ work on any model without adapt"


def adapt(
    model: nn.Module,
    *,
    encoders: Mapping[str, Part],
    fusion: Part | None = None,
    heads: Mapping[str, Part] | Literal[False] | None = None,
    names: Sequence[str] | None = None,
    head: Part | Literal[False] | None = None,
    task: Task = "classification",
    num_outputs: int | None = None,
    unimodal: Literal["probe", "train"] | None = None,
    inputs: Mapping[str, str] | Callable[[Mapping[str, Any]], Any] | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    example: Any = None,
) -> AdaptedModel:
    """Adapts any module, so that every balancer, every diagnostic and ``eq.diagnose`` accept it.

    The adapted model is called as before and returns what it returned before. Hooks capture the rest during its forward
    pass: tokens at the encoders' outputs, features at the input of the head; unimodal heads are added as probes. The
    attention of its fusion is measured as by ``watch``, whose labels are found by changing the tokens of one modality
    at a time. Train ``adapted.parameters()``, which include the probes.

    Args:
        model: any module. Modalities are arguments of its ``forward`` by name or in order, or entries of one dict.
        encoders: modality -> module of the model whose output has the tokens of that modality, or its dotted name. The
            output is (batch, token, dim), (batch, dim), a feature map, ``last_hidden_state``, or a tuple that begins
            with one of them.
        fusion: module that contains the attention whose share is reported; by default the last attention outside of
            the encoders.
        heads: modality -> unimodal head: a module of the model, whose logits are taken, or a new one for the pooled
            tokens. By default linear probes; False for none.
        names: order of the modalities; by default that of ``encoders``.
        head: the final head; by default found by name, or the last linear layer. False for a model without one.
        task: ``"classification"``, ``"multilabel"`` or ``"regression"``.
        num_outputs: number of outputs; by default that of the head.
        unimodal: ``"probe"`` detaches the inputs of new heads; ``"train"`` lets their losses reach the encoders, as
            ``MMPareto`` requires. By default ``"train"`` for heads of the model, else ``"probe"``.
        inputs: modality -> its argument in ``forward``, which is also its key in batches that have no key with the
            modality's name; or a function from a batch to the arguments (a dict or a tuple).
        logits: function from the model's result to its logits (batch, output); by default a tensor, ``logits``, or the
            first tensor of a tuple or dict.
        loss: function (logits, target) of the task; the mean or one value for each sample. By default that of ``task``.
        example: a batch, with which the model runs once in evaluation mode; shapes are then checked at once. Without
            it, probes are created in the first forward pass.

    Returns:
        AdaptedModel; the model is its attribute ``model``.

    Raises:
        ConfigError: a part is not in the model or cannot be found; the message says which methods work without it.
        ShapeError: with ``example``, an encoder that returns no tokens.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.audio, self.image, self.head = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(16, 2)
        ...     def forward(self, audio, image):
        ...         return self.head(torch.cat([self.audio(audio).mean(1), self.image(image).mean(1)], dim=1))
        >>> model = Net()
        >>> adapted = adapt(model, encoders={"audio": model.audio, "image": model.image})
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5)}
        >>> torch.equal(adapted(**batch), model(**batch)), sorted(adapted.output_of(adapted(batch)).unimodal_logits)
        (True, ['audio', 'image'])
    """
    paths = _encoder_paths(model, encoders, names)
    form = CallForm(model, tuple(paths), inputs)
    fusion_path = None if fusion is None else _path(model, fusion, "fusion")
    head_path = None if head is False else _head_path(model, head, paths)
    outputs = num_outputs or _outputs(model, head_path)
    head_paths, mode = _given_heads(model, heads, tuple(paths), unimodal)
    adapted = AdaptedModel(
        model,
        encoders=paths,
        head=head_path,
        checked_head=head is not None,
        fusion=fusion_path,
        heads=head_paths,
        task=task,
        num_outputs=outputs or 0,
        unimodal=mode,
        form=form,
        logits=logits,
        loss=loss,
    )
    adapted.train(model.training)
    if example is not None:
        with eval_mode_no_grad(adapted):
            adapted.num_outputs = adapted.check_example(example)
    if head_paths or heads is False:
        return adapted
    if not adapted.num_outputs:
        raise ConfigError(
            "adapt", expected="a known number of outputs, for the unimodal heads", got="a head that is no linear layer",
            fix="Pass num_outputs=..., or example=batch. With heads=False, methods that compare unimodal predictions "
            "(OGM, PMR, MMPareto, ...) are refused, and the others work.",
        )  # fmt: skip
    _add_probes(adapted)
    return adapted


def _encoder_paths(model: nn.Module, encoders: Mapping[str, Part], names: Sequence[str] | None) -> dict[str, str]:
    if not isinstance(model, nn.Module) or not isinstance(encoders, Mapping) or not encoders:
        raise ConfigError(
            "adapt", expected="a torch.nn.Module and encoders={modality: module}",
            got=f"{type(model).__name__} and encoders = {encoders!r}",
            fix=f"Name the modules that return the tokens of each modality. Without encoders: {WITHOUT}.",
        )  # fmt: skip
    if names is not None and (len(names) != len(encoders) or set(names) != set(encoders)):
        raise ConfigError(
            "adapt names", expected=f"an order of {', '.join(encoders)}", got=str(tuple(names)), fix="Leave names out."
        )
    bad = [
        n
        for n in encoders
        if not isinstance(n, str) or n in ("mask", "target") or "." in n or hasattr(nn.ModuleDict, n)
    ]
    if bad:
        raise ConfigError(
            "adapt", expected="modality names without dots that are not reserved", got=repr(bad[0]),
            fix="Rename the modality, and map it to its argument: inputs={'image': 'pixel_values'}.",
        )  # fmt: skip
    paths = {name: _path(model, encoders[name], f"encoder '{name}'") for name in names or encoders}
    for one, path in paths.items():
        for other, inner in paths.items():
            if one != other and (path == inner or inner.startswith(f"{path}.")):
                raise ConfigError(
                    "adapt", expected="a separate encoder for each modality", got=f"'{inner}' in '{path}'",
                    fix=f"Name the module that returns the tokens of '{one}' alone. Without: {WITHOUT}, and "
                    "ModalityCorruption needs names alone.",
                )  # fmt: skip
    return paths


def _path(model: nn.Module, part: Any, who: str) -> str:
    """The dotted name of a part of the model."""
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    if isinstance(part, str):
        if part not in modules:
            raise unknown_name(f"adapt {who}", "module", part, modules)
        return part
    path = next((path for path, module in modules.items() if module is part), None)
    if path is None:
        raise ConfigError(
            f"adapt {who}", expected=f"a module inside {type(model).__name__}, or its dotted name",
            got=type(part).__name__, fix=f"Choose one of: {', '.join(list(modules)[:12]) or 'it has no modules'}.",
        )  # fmt: skip
    return path


def _head_path(model: nn.Module, head: Part | None, encoders: Mapping[str, str]) -> str:
    if head is not None and head is not False:
        return _path(model, head, "head")
    outside = [
        (path, module)
        for path, module in model.named_modules()
        if path
        and not any(path == e or path.startswith(f"{e}.") or e.startswith(f"{path}.") for e in encoders.values())
    ]
    candidates = [path for path, module in outside if path.rpartition(".")[2] in HEADS and _has_parameters(module)]
    linear = [path for path, module in outside if isinstance(module, nn.Linear)]
    if candidates or linear:
        return min(candidates, key=lambda path: path.count(".")) if candidates else linear[-1]
    raise ConfigError(
        "adapt",
        expected="a final head, whose input are the features",
        got=f"{type(model).__name__} without a linear layer outside of its encoders",
        fix="Pass head=model.classifier, or head=False: then features are the pooled tokens, and only methods that "
        "replace the head (MLA, ReconBoost, MMCosine, AMCo, QMF, TMC) are refused.",
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _outputs(model: nn.Module, head: str | None) -> int | None:
    """Number of outputs of the last linear layer of the head."""
    if head is None:
        return None
    linear = [module for module in model.get_submodule(head).modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else None


def _given_heads(
    model: nn.Module, heads: Any, names: tuple[str, ...], unimodal: str | None
) -> tuple[dict[str, str | nn.Module], str]:
    if unimodal not in (None, "probe", "train"):
        raise ConfigError("adapt", expected="unimodal = 'probe' or 'train'", got=repr(unimodal))
    if heads is False:
        return {}, "none"
    if heads is None:
        return {}, unimodal or "probe"
    if set(heads) != set(names):
        raise ConfigError(
            "adapt heads", expected=f"a head for each of {', '.join(names)}", got=", ".join(map(str, heads)) or "none",
            fix="Leave heads out for linear probes, or pass heads=False.",
        )  # fmt: skip
    modules = set(model.modules())
    result: dict[str, str | nn.Module] = {}
    for name in names:
        inside = isinstance(heads[name], str) or heads[name] in modules
        result[name] = _path(model, heads[name], f"head '{name}'") if inside else heads[name]
    are_paths = all(isinstance(part, str) for part in result.values())
    return result, unimodal or ("train" if are_paths else "probe")


def _add_probes(adapted: AdaptedModel) -> None:
    like = next((p for p in adapted.model.parameters() if p.is_floating_point()), torch.zeros(()))
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    devices = [like.device.index] if like.is_cuda else []
    # Probes do not change the random numbers that the rest of the program draws.
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        for name in adapted.names:
            width = adapted.widths.get(name)
            adapted.unimodal_heads[name] = (
                nn.LazyLinear(adapted.num_outputs, **options)
                if width is None
                else nn.Linear(width, adapted.num_outputs, **options)
            )
