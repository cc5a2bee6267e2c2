"""Measures single training steps for ``WatchCallback``: shares of attention, AIR and gradient norms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..balance import RollingQ
from ..errors import ConfigError
from ..recording import AttentionRecord, watch
from ..recording.submodels import outermost_pretrained_models
from ..tokens.masks import at_least_float32

Modules = Mapping[str, str | nn.Module | Sequence[str | nn.Module]]


class StepWatcher:
    """Measures the steps whose number is a multiple of ``every_n_steps``; other steps cost one comparison.

    Values are called ``watch/share/<modality>``, the mean over samples, heads and layers, or
    ``watch/share/<layer>/<modality>``; ``watch/air/<modality>``; ``watch/gradient/<modality>``. What cannot be measured
    is left out, and a warning gives the reason once.

    Args:
        every_n_steps: number of optimizer steps from one measurement to the next, the first step included.
        per_layer: shares of each layer in place of their mean.
        layers, queries, modality, names: see ``eq.watch``.
        encoders: modality -> module or modules, or their dotted names, for gradient norms. By default the encoders of a
            FusionModel or an adapted model, and the encoders and the decoder of a Hugging Face model.
        share, gradients: whether to measure shares, and gradient norms.

    Raises:
        ConfigError: ``every_n_steps`` below 1.
    """

    def __init__(
        self, every_n_steps: int = 100, *, per_layer: bool = False, layers: Sequence[str] | str | None = None,
        queries: Any = "all", modality: Tensor | None = None, names: Sequence[str] | None = None,
        encoders: Modules | None = None, share: bool = True, gradients: bool = True,
    ) -> None:  # fmt: skip
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigError("WatchCallback", expected="every_n_steps >= 1", got=f"{every_n_steps!r}")
        self.every_n_steps, self._per_layer, self._encoders = every_n_steps, per_layer, encoders
        self._options = {"layers": layers, "queries": queries, "modality": modality, "names": names}
        self._share, self._gradients = share, gradients
        self._open: tuple[int, nn.Module, AttentionRecord | None] | None = None
        self._stack = ExitStack()
        self._told: set[str] = set()

    @property
    def open(self) -> bool:
        """Whether a step is being measured."""
        return self._open is not None

    def begin(self, step: int, model: nn.Module) -> None:
        """Starts to measure, before the forward pass of a step; does nothing in other steps."""
        if step % self.every_n_steps or self._open is not None:
            return
        record = self._stack.enter_context(watch(model, **self._options)) if self._share else None
        self._open = step, model, record

    def end(self, no_gradients: str | None = None) -> tuple[int, dict[str, float]] | None:
        """Ends the measurement after backward, before the optimizer steps; returns the step and its values.

        Args:
            no_gradients: why the gradients of this training cannot be measured; None if they can.
        """
        if self._open is None:
            return None
        step, model, record = self._open
        self.discard()
        values: dict[str, float] = {}
        if record is not None:
            values |= self._shares(record)
        values |= _running_air(model)
        if self._gradients and no_gradients is not None:
            self._tell("gradient", f"no gradient norms: {no_gradients}")
        elif self._gradients:
            values |= {f"watch/gradient/{name}": norm for name, norm in self._norms(model).items()}
        return step, {name: value for name, value in values.items() if math.isfinite(value)}

    def discard(self) -> None:
        """Ends the measurement of an incomplete step, and restores the model."""
        self._open = None
        with warnings.catch_warnings():
            # `_tell` reports the reasons of the record once, not at each step.
            warnings.filterwarnings("ignore", message="watch: ")
            self._stack.close()

    def _shares(self, record: AttentionRecord) -> dict[str, float]:
        if record.missing:
            self._tell("missing", record.missing_summary())
        if not record.complete:
            self._tell("share", f"no shares: {record.nothing()}")
            return {}
        table = record.table()
        if self._per_layer:
            return {
                f"watch/share/{row['layer']}/{name}": row[name] for row in table for name in table.names if name in row
            }
        known = {name: [row[name] for row in table if not math.isnan(row.get(name, math.nan))] for name in table.names}
        return {f"watch/share/{name}": sum(values) / len(values) for name, values in known.items() if values}

    def _norms(self, model: nn.Module) -> dict[str, float]:
        """Norm of the gradients of each encoder; modalities whose encoder is frozen are left out."""
        encoders = _find_encoders(model) if self._encoders is None else _named_modules(model, self._encoders)
        if not encoders:
            self._tell("gradient", "no gradient norms: the encoders are unknown. Pass encoders={modality: module}")
        norms = {}
        for name, modules in encoders.items():
            parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values()
            if parameters:
                gradients = (at_least_float32(p.grad.detach()) for p in parameters if p.grad is not None)
                norms[name] = math.hypot(*(float(gradient.norm()) for gradient in gradients))
        return norms

    def _tell(self, key: str, reason: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(f"WatchCallback: {reason}", stacklevel=4)


def _running_air(model: nn.Module) -> dict[str, float]:
    rolling = {path: module for path, module in model.named_modules() if isinstance(module, RollingQ)}
    values = {}
    for path, module in rolling.items():
        layer = f"{path.removesuffix('.rolling')}/" if len(rolling) > 1 else ""
        values |= {f"watch/air/{layer}{name}": value for name, value in module.running_air().items()}
    return values


def _find_encoders(model: nn.Module) -> dict[str, list[nn.Module]]:
    for part in model.modules():
        encoders = getattr(part, "encoders", None)
        if isinstance(encoders, nn.ModuleDict) and tuple(encoders) == getattr(part, "names", None):
            return {name: [module] for name, module in encoders.items()}
    roots = outermost_pretrained_models(model)
    if len(roots) != 1:
        return {}
    root: Any = roots[0]
    finders: dict[str, Callable[[], nn.Module]] = {"text": lambda: root.get_decoder()}
    finders |= {name: lambda name=name: root.get_encoder(modality=name) for name in ("image", "audio")}
    found = {name: find() for name, find in finders.items()}
    return {name: [module] for name, module in found.items() if module is not root and module is not root.base_model}


def _named_modules(model: nn.Module, encoders: Modules) -> dict[str, list[nn.Module]]:
    known = dict(model.named_modules())
    result: dict[str, list[nn.Module]] = {}
    for name, given in encoders.items():
        parts = [given] if isinstance(given, str | nn.Module) else list(given)
        for part in parts:
            # Frameworks wrap the model, which puts names in front of those of its modules.
            inside = part if isinstance(part, nn.Module) else known.get(part) or next(
                (module for path, module in known.items() if path.endswith(f".{part}")), None
            )  # fmt: skip
            if inside is None:
                raise ConfigError(
                    "WatchCallback", expected=f"a module of the model for encoders['{name}']", got=f"'{part}'"
                )
            result.setdefault(name, []).append(inside)
    return result
