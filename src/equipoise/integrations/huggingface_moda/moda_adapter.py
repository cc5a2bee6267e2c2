"""``MODAAdapter``: adds aligned keys and modular attention to a Hugging Face model, and removes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import ConfigError, SchemaError, unknown_name
from ...nn.attention.modular import Merge, PseudoAttention, modular_attention
from ...nn.duplex import DuplexAligner, Moments
from ...recording.attention_call import AttentionCall
from ...recording.huggingface_interceptor import interface_call
from ...recording.submodels import outermost_pretrained_models
from ...recording.token_map import TokenMap
from .key_hooks import HookFrame
from .moda_layers import MODALayer, find_moda_targets

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names of the cache argument in transformers, the newest first."""


class _Session:
    """The part of a ``RecordingSession`` that ``TokenMap`` uses, for a map without recording."""

    aside = False

    def begin_pass(self) -> None:
        pass

    def in_recorded_thread(self) -> bool:
        return True

    def current(self) -> None:
        return None


class MODAAdapter:
    """Handle of the MODA layers in a model, returned by `apply_moda`.

    Attributes:
        model: the model that was passed.
        names: modality names.
        layers: path of each changed attention layer -> its submodule ``<path>.moda``.
    """

    def __init__(
        self, model: nn.Module, *, modality: Tensor | None, names: Sequence[str] | None,
        directions: Sequence[str] | None, prefix: str, merge: Merge, pseudo: PseudoAttention | None, freeze: bool,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.pseudo, self.prefix = model, pseudo, prefix
        self.merge: Merge = merge
        roots = outermost_pretrained_models(model)
        if len(roots) != 1:
            raise ConfigError(
                "apply_moda", expected="a Hugging Face model, or a module that holds one",
                got=f"{type(model).__name__} with {len(roots)}", fix="Use eq.nn.DuplexAligner in layers of your own.",
            )  # fmt: skip
        self._root = roots[0]
        self._map = TokenMap(self._root, modality, names)
        self.names = self._map.names
        for name in directions or ():
            if name not in self.names:
                raise unknown_name("apply_moda directions", "modality", name, self.names)
        chosen = None if directions is None else tuple(self.names.index(name) for name in directions)
        self.options = {**options, "directions": chosen}
        DuplexAligner(1, len(self.names), **self.options)
        self._targets = find_moda_targets(self._root, self._map.parts)
        self._states: WeakKeyDictionary[Any, dict[str, Moments]] = WeakKeyDictionary()
        self._frames: list[HookFrame] = []
        self._frozen: list[nn.Parameter] = []
        # PEFT models already define which parameters are trained.
        if freeze and not any(hasattr(part, "peft_config") for part in model.modules()):
            self._frozen = [parameter for parameter in self._root.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for module, dim, heads in self._targets.values():
            like = next(module.parameters())
            part = MODALayer(dim, heads, len(self.names), merge, self.options)
            module.moda = part.to(like.device, torch.promote_types(like.dtype, torch.float32))
            module.moda.train(module.training)
        self._hooks = ExitStack()
        for path, (module, _, _) in self._targets.items():
            self._hooks.callback(module.register_forward_pre_hook(self._enter(path), with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self._following = ExitStack()
        self._following.enter_context(self._map.following(_Session()))  # type: ignore[arg-type]

    @property
    def layers(self) -> dict[str, nn.Module]:
        return {path: module.moda for path, (module, _, _) in self._targets.items() if hasattr(module, "moda")}  # type: ignore[misc]

    @property
    def modality(self) -> Tensor | None:
        """(key,) or (batch, key) labels of the prompt, if the user passes them; may be set for each batch."""
        return self._map.given

    @modality.setter
    def modality(self, labels: Tensor | None) -> None:
        token_map = TokenMap(self._root, labels, self.names)
        self._following.close()
        self._map = token_map
        self._following.enter_context(token_map.following(_Session()))  # type: ignore[arg-type]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Returns the parameters of MODA."""
        return (parameter for layer in self.layers.values() for parameter in layer.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the parameters of MODA as ``<path>.<name>`` -> tensor."""
        return {f"{path}.{name}": value for path, layer in self.layers.items()
                for name, value in layer.state_dict().items()}  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Saves the parameters of MODA, without those of the model, as safetensors."""
        from safetensors.torch import save_file

        options = {"names": self.names, "merge": self.merge, **self.options}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, str(path), metadata={"moda": json.dumps(options)})

    def load(self, path: str | Path) -> None:
        """Loads parameters saved by ``save`` into a model to which MODA was applied with the same options.

        Raises:
            SchemaError: a file of other modalities or options, or of a model with other layers.
        """
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("moda", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        options = json.loads(json.dumps({"names": self.names, "merge": self.merge, **self.options}))
        if saved != options:
            raise SchemaError(f"MODAAdapter.load {path}", expected=f"MODA with {options}", got=str(saved))
        state = self.state_dict()
        wrong = sorted(state.keys() ^ tensors.keys()) or sorted(n for n in state if state[n].shape != tensors[n].shape)
        if wrong:
            raise SchemaError(
                f"MODAAdapter.load {path}", expected=f"the {len(state)} tensors of this model",
                got=f"others, such as {wrong[0]}",
            )  # fmt: skip
        with torch.no_grad():
            for name, value in tensors.items():
                state[name].copy_(value)

    def remove(self) -> None:
        """Restores the original model."""
        self._hooks.close()
        self._following.close()
        self._states.clear()
        for module, _, _ in self._targets.values():
            if hasattr(module, "moda"):
                del module.moda
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
            frame = HookFrame(self, module, path, cache)
            self._frames.append(frame)
            frame.open()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Frames left open by an exception are closed, too.
        while self._frames:
            frame = self._frames.pop()
            frame.close()
            if frame.module is module:
                if output is not None and not frame.attended:
                    raise ConfigError(
                        f"apply_moda {frame.path}", expected="attention through transformers' attention interface",
                        got=f"{type(module).__name__}, which computes attention itself",
                        fix="Load the model with attn_implementation='sdpa' or 'eager'.",
                    )  # fmt: skip
                return

    def align(self, frame: HookFrame, key: Tensor, value: Tensor) -> Tensor:
        """Aligns new keys; the state that later keys continue from is stored per cache."""
        labels = self._map.labeled(AttentionCall(key, key, value), frame.module)
        if labels is None or isinstance(labels, str):
            raise ConfigError(
                f"apply_moda {frame.path}",
                expected="keys whose modality is known",
                got=labels or "keys without a modality",
                fix="Give one label for each token: apply_moda(model, modality=..., names=...).",
            )
        past = self._states.get(frame.cache, {}) if frame.cache is not None else {}
        state = past.get(frame.path) if labels.continues else None
        state = None if state is None else _repeated(state, key.shape[0])
        prefix = None
        if self.prefix == "prompt":
            prefix = torch.full((key.shape[0],), key.shape[2], device=key.device)
            if labels.answer is not None:
                first = labels.answer.to(key.device).int().argmax(1) + 1
                prefix = torch.where(labels.answer.to(key.device).any(1), first, prefix)
        aligned = frame.module.moda(
            key, value, modality=labels.keys, prefix=prefix, state=state,
            is_causal=bool(getattr(frame.module, "is_causal", False)),
        )  # type: ignore[operator]  # fmt: skip
        if frame.cache is not None:
            state = Moments(*(part.detach() for part in aligned.state))
            if frame.cache not in self._states:
                self._states[frame.cache] = {}
                self._patch_reorder(frame.cache)
            self._states[frame.cache][frame.path] = state
        return aligned.key

    def _patch_reorder(self, cache: Any) -> None:
        """Reorders the states with the cache in beam search."""
        original, states = getattr(cache, "reorder_cache", None), self._states[cache]
        if original is None:
            return

        def reorder_cache(beams: Tensor, *args: Any, **kwargs: Any) -> Any:
            for path, state in states.items():
                states[path] = Moments(*(x.index_select(0, beams.to(x.device)) for x in _repeated(state, len(beams))))
            return original(beams, *args, **kwargs)

        cache.reorder_cache = reorder_cache

    def attend(
        self, frame: HookFrame, function: Callable[..., Any], backend: str | None, args: tuple, kwargs: dict
    ) -> Any:
        """Computes the model's attention, or modular attention, with aligned keys."""
        frame.attended = True
        module, query, key, value, mask, *rest = args
        if frame.cache is None:
            key = self.align(frame, key, value)
        if self.merge == "mass" and self.pseudo is None:
            return function(module, query, key, value, mask, *rest, **kwargs)
        call = interface_call(module, query, key, value, mask, backend or "eager", kwargs)
        if call.softcap is not None or call.sinks is not None:
            raise ConfigError(
                f"apply_moda {frame.path}", got=type(module).__name__,
                expected="attention without softcap and sinks for another merge or pseudo-attention",
                fix="Use merge='mass' and pseudo=None, which keep the attention of the model.",
            )  # fmt: skip
        labels = self._map.labeled(call, module)
        if labels is None or isinstance(labels, str) or labels.queries is None:
            raise ConfigError(f"apply_moda {frame.path}", expected="keys whose modality is known", got=f"{labels}")
        rows, keys = query.shape[2], key.shape[2]
        result = modular_attention(
            query, key, value, modality=labels.keys.to(key.device), query_modality=labels.queries.to(key.device),
            mask=call.mask, is_causal=call.is_causal, offset=0 if call.is_causal else keys - rows, scale=call.scale,
            merge=self.merge, gate=module.moda.gate, pseudo=self.pseudo,
            dropout=kwargs.get("dropout", 0.0) if module.training else 0.0,
        )  # fmt: skip
        join = module.moda.join
        output = result.output if join is None else result.output @ join.to(result.output.dtype)
        return output.transpose(1, 2).contiguous(), None


def _repeated(state: Moments, batch: int) -> Moments:
    """Repeats the state of each prompt for its beams."""
    beams = batch // len(state.count)
    return state if beams <= 1 else Moments(*(part.repeat_interleave(beams, dim=0) for part in state))
