"""MODA in Hugging Face models: aligned keys and modular attention, put into a model and taken out again."""

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
from ...recording.huggingface_interceptor import _call
from ...recording.submodels import outermost_pretrained_models
from ...recording.token_map import TokenMap
from .key_hooks import HookFrame
from .moda_layers import MODALayer, find_moda_targets

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What transformers calls the argument that holds the keys so far, the newest name first."""


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
    """MODA inside a model, as `apply_moda` returns it.

    Attributes:
        model: what it was given.
        names: of the modalities.
        layers: path of each changed attention -> its parts, which are ``<path>.moda`` of the model.
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
                got=f"{type(model).__name__} with {len(roots)}", fix="For layers of your own take eq.nn.DuplexAligner.",
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
        self._sites = find_moda_targets(self._root, self._map.parts)
        self._states: WeakKeyDictionary[Any, dict[str, Moments]] = WeakKeyDictionary()
        self._frames: list[HookFrame] = []
        self._frozen: list[nn.Parameter] = []
        # Who uses PEFT has said already what trains.
        if freeze and not any(hasattr(part, "peft_config") for part in model.modules()):
            self._frozen = [parameter for parameter in self._root.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for module, dim, heads in self._sites.values():
            like = next(module.parameters())
            part = MODALayer(dim, heads, len(self.names), merge, self.options)
            module.moda = part.to(like.device, torch.promote_types(like.dtype, torch.float32))
            module.moda.train(module.training)
        self._hooks = ExitStack()
        for path, (module, _, _) in self._sites.items():
            self._hooks.callback(module.register_forward_pre_hook(self._enter(path), with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
        self._following = ExitStack()
        self._following.enter_context(self._map.following(_Session()))  # type: ignore[arg-type]

    @property
    def layers(self) -> dict[str, nn.Module]:
        return {path: module.moda for path, (module, _, _) in self._sites.items() if hasattr(module, "moda")}  # type: ignore[misc]

    @property
    def modality(self) -> Tensor | None:
        """(key,) or (batch, key) labels of the prompt, where the user gives them; may be set for each batch."""
        return self._map.given

    @modality.setter
    def modality(self, labels: Tensor | None) -> None:
        found = TokenMap(self._root, labels, self.names)
        self._following.close()
        self._map = found
        self._following.enter_context(found.following(_Session()))  # type: ignore[arg-type]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of MODA alone."""
        return (parameter for layer in self.layers.values() for parameter in layer.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """``<path>.<name>`` -> tensor, of MODA alone."""
        return {f"{path}.{name}": value for path, layer in self.layers.items()
                for name, value in layer.state_dict().items()}  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes what MODA has learned, and nothing of the model, as safetensors."""
        from safetensors.torch import save_file

        said = {"names": self.names, "merge": self.merge, **self.options}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, str(path), metadata={"moda": json.dumps(said)})

    def load(self, path: str | Path) -> None:
        """Reads what ``save`` wrote, in a model to which MODA was applied in the same way.

        Raises:
            SchemaError: a file of other modalities or options, or of a model with other layers.
        """
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("moda", "null"))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wanted = json.loads(json.dumps({"names": self.names, "merge": self.merge, **self.options}))
        if said != wanted:
            raise SchemaError(f"Moda.load {path}", expected=f"MODA with {wanted}", got=str(said))
        own = self.state_dict()
        wrong = sorted(own.keys() ^ found.keys()) or sorted(n for n in own if own[n].shape != found[n].shape)
        if wrong:
            raise SchemaError(
                f"Moda.load {path}", expected=f"the {len(own)} tensors of this model", got=f"others, such as {wrong[0]}"
            )
        with torch.no_grad():
            for name, value in found.items():
                own[name].copy_(value)

    def remove(self) -> None:
        """Makes the model what it was."""
        self._hooks.close()
        self._following.close()
        self._states.clear()
        for module, _, _ in self._sites.values():
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
        # An exception may have skipped some; they are over too.
        while self._frames:
            frame = self._frames.pop()
            frame.close()
            if frame.module is module:
                if output is not None and not frame.attended:
                    raise ConfigError(
                        f"apply_moda {frame.path}", expected="an attention behind transformers' attention interface",
                        got=f"{type(module).__name__}, which computes by itself",
                        fix="Load the model with attn_implementation='sdpa' or 'eager'.",
                    )  # fmt: skip
                return

    def align(self, frame: HookFrame, key: Tensor, value: Tensor) -> Tensor:
        """New keys, aligned; what later ones go on from is kept with the cache."""
        known = self._map.labeled(AttentionCall(key, key, value), frame.module)
        if known is None or isinstance(known, str):
            raise ConfigError(
                f"apply_moda {frame.path}", expected="keys whose modality is known", got=known or "keys of no modality",
                fix="Give one label for every token: apply_moda(model, modality=..., names=...).",
            )  # fmt: skip
        past = self._states.get(frame.cache, {}) if frame.cache is not None else {}
        state = past.get(frame.path) if known.continues else None
        state = None if state is None else _repeated(state, key.shape[0])
        prefix = None
        if self.prefix == "prompt":
            prefix = torch.full((key.shape[0],), key.shape[2], device=key.device)
            if known.answer is not None:
                first = known.answer.to(key.device).int().argmax(1) + 1
                prefix = torch.where(known.answer.to(key.device).any(1), first, prefix)
        aligned = frame.module.moda(
            key, value, modality=known.keys, prefix=prefix, state=state,
            is_causal=bool(getattr(frame.module, "is_causal", False)),
        )  # type: ignore[operator]  # fmt: skip
        if frame.cache is not None:
            state = Moments(*(part.detach() for part in aligned.state))
            if frame.cache not in self._states:
                self._states[frame.cache] = {}
                self._reorders(frame.cache)
            self._states[frame.cache][frame.path] = state
        return aligned.key

    def _reorders(self, cache: Any) -> None:
        """Beam search gives samples other pasts, and their bases with them."""
        original, states = getattr(cache, "reorder_cache", None), self._states[cache]
        if original is None:
            return

        def reorder_cache(beams: Tensor, *args: Any, **kwargs: Any) -> Any:
            for path, state in states.items():
                states[path] = Moments(*(x.index_select(0, beams.to(x.device)) for x in _repeated(state, len(beams))))
            return original(beams, *args, **kwargs)

        cache.reorder_cache = reorder_cache

    def attend(
        self, frame: HookFrame, function: Callable[..., Any], backend: str | None, given: tuple, kwargs: dict
    ) -> Any:
        """The model's own attention, or the modular one, on aligned keys."""
        frame.attended = True
        module, query, key, value, mask, *rest = given
        if frame.cache is None:
            key = self.align(frame, key, value)
        if self.merge == "mass" and self.pseudo is None:
            return function(module, query, key, value, mask, *rest, **kwargs)
        call = _call(module, query, key, value, mask, backend or "eager", kwargs)
        if call.softcap is not None or call.sinks is not None:
            raise ConfigError(
                f"apply_moda {frame.path}", got=type(module).__name__,
                expected="attention without softcap and sinks, where a merge or pseudo-attention changes it",
                fix="Take merge='mass' and pseudo=None, which leave attention to the model.",
            )  # fmt: skip
        known = self._map.labeled(call, module)
        if known is None or isinstance(known, str) or known.queries is None:
            raise ConfigError(f"apply_moda {frame.path}", expected="keys whose modality is known", got=f"{known}")
        rows, keys = query.shape[2], key.shape[2]
        found = modular_attention(
            query, key, value, modality=known.keys.to(key.device), query_modality=known.queries.to(key.device),
            mask=call.mask, is_causal=call.is_causal, offset=0 if call.is_causal else keys - rows, scale=call.scale,
            merge=self.merge, gate=module.moda.gate, pseudo=self.pseudo,
            dropout=kwargs.get("dropout", 0.0) if module.training else 0.0,
        )  # fmt: skip
        join = module.moda.join
        output = found.output if join is None else found.output @ join.to(found.output.dtype)
        return output.transpose(1, 2).contiguous(), None


def _repeated(state: Moments, batch: int) -> Moments:
    """A prompt's state for each of its beams."""
    beams = batch // len(state.count)
    return state if beams <= 1 else Moments(*(part.repeat_interleave(beams, dim=0) for part in state))
