"""Which tokens of a Hugging Face model are pictures, sounds and text: what its inputs and its configuration say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..tokens import SPECIAL
from .call import Call
from .labels import Labelled, named

ORDER = ("text", "image", "video", "audio")
"""Names of modalities, in the order of transformers' ``mm_token_type_ids``."""

CROSS = re.compile(r"(cross_?att|crossattention|encoder_attn|encdecattention|cross_layer)", re.IGNORECASE)


def pretrained(model: nn.Module) -> list[nn.Module]:
    """The outermost Hugging Face models in a module."""
    import sys

    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for part in model.children() for found in pretrained(part)]


class TokenMap:
    """Labels of a Hugging Face model's keys.

    In this order: what the user gives, ``mm_token_type_ids`` among the inputs, ``image_token_id`` and its relatives in
    the configuration. Encoders of one modality, and what is read from them, need no map.

    Args:
        root: a PreTrainedModel.
        modality: (key,) or (batch, key) labels of the prompt, from the user; tokens that are generated are text.
        names: of the labels, from the user.
    """

    def __init__(self, root: nn.Module, modality: Tensor | None = None, names: Sequence[str] | None = None) -> None:
        self.root, self.given = root, modality
        known = modalities_of(root)
        self.names = named(modality, names) if names is not None or modality is not None else known
        self.placeholders = placeholders(root.config)
        self._paths = {id(part): name for name, part in root.named_modules()}
        self._owners = _owners(root)
        self._labels: Tensor | None = None
        self._encoder: Tensor | None = None
        self._valid: Tensor | None = None
        self._answer: Tensor | None = None
        self._rows, self._running, self._continues, self._static = 0, False, False, False
        self._why = ""

    @contextmanager
    def following(self) -> Iterator[None]:
        """Reads the inputs of every forward pass, those of ``generate`` included."""
        with ExitStack() as stack:
            stack.callback(self.root.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.callback(self.root.register_forward_hook(self._end, always_call=True).remove)
            yield

    def labelled(self, call: Call, module: nn.Module) -> Labelled | str | None:
        path = self._paths.get(id(module))
        if path is None or torch._C._current_graph_task_id() != -1:
            # Not of this model, or computed once more in the backward pass for gradient checkpointing.
            return None
        owner = self._owners[id(module)]
        batch, _, rows, keys = call.sizes
        alone = _alone(owner, self.root)
        if alone is not None:
            return self._constant(call, alone, tower=owner is not self.root)
        if _is_cross(module, path):
            return self._of_source(call)
        if not self._running:
            return self._constant(call, "text") if _kinds(owner) == ("text",) and len(self.names) == 1 else None
        if self._labels is None:
            return self._why
        labels, total = self._labels, self._labels.shape[1]
        if self._encoder is not None and _in_encoder(path):
            labels, total = self._encoder, self._encoder.shape[1]
        if labels.shape[0] not in (1, batch):
            return f"it has batch = {batch}, and the inputs tell the modality of {labels.shape[0]} samples"
        if keys > total and self._static:
            # A cache of fixed size; what is not filled yet is masked.
            labels = F.pad(labels, (0, keys - total), value=SPECIAL)
        elif keys < total and self._continues:
            labels = labels[:, total - keys :]
        elif keys != total:
            return (
                f"it has {keys} keys, and the inputs tell the modality of {total} tokens; "
                "give watch(model, modality=..., names=...)"
            )
        return self._known(call, labels.expand(batch, -1), rows)

    def _known(self, call: Call, labels: Tensor, rows: int) -> Labelled:
        fits = rows == self._rows
        own = self._labels if self._labels is not None else labels
        return Labelled(
            labels, self.names,
            queries=own[:, -rows:].expand(labels.shape[0], -1) if fits else None,
            valid=self._valid if fits else None,
            answer=self._answer if fits else None,
            constant=_constant(labels) if labels.device.type == "cpu" else None,
            continues=self._continues,
        )  # fmt: skip

    def _of_source(self, call: Call) -> Labelled | str | None:
        """Keys that come from another stream than the queries."""
        if self._encoder is not None and self._encoder.shape[1] == call.sizes[3]:
            return self._known(call, self._encoder.expand(call.sizes[0], -1), call.sizes[2])
        source = _encoder_of(self.root) or next((name for name in self.names if name != "text"), "text")
        return self._constant(call, source)

    def _constant(self, call: Call, name: str, *, tower: bool = False) -> Labelled | None:
        if name not in self.names:
            return None
        number, (batch, _, rows, keys) = self.names.index(name), call.sizes
        fits = self._running and rows == self._rows and not tower
        valid = self._valid if fits and self._valid is not None and len(self._valid) == batch else None
        return Labelled(
            torch.full((keys,), number, device=call.query.device), self.names, valid=valid,
            constant=number, continues=self._continues and not tower, tower=tower,
        )  # fmt: skip

    def _begin(self, root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _bound(root, args, kwargs)
        self._running = True
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        seen = ids if ids is not None else embeds
        encodes = getattr(root.config, "is_encoder_decoder", False)
        if encodes:
            self._encode(given, ids)
            ids, embeds = _decoder_inputs(given)
            seen = ids if ids is not None else embeds
        cache = given.get("past_key_values")
        self._static = "Static" in type(cache).__name__ or bool(getattr(cache, "is_compileable", False))
        if seen is None:
            self._labels, self._why = None, "its inputs hold neither input_ids nor inputs_embeds"
            self._rows, self._continues = 0, False
            return
        batch, self._rows = seen.shape[:2]
        new = torch.full((batch, self._rows), self._text(), device=seen.device) if encodes else None
        past = _past(cache)
        self._continues = past > 0 and self._labels is not None and self._labels.shape[0] == batch
        if past and not self._continues:
            self._labels = torch.full((batch, past), self._text(), device=seen.device)
        new = new if new is not None else self._new(given, ids, seen, first=past == 0)
        if new is None:
            self._labels = None
            return
        before = _fitted(self._labels, past, self._text()) if past and self._labels is not None else new[:, :0]
        self._labels = torch.cat([before.to(new.device), new], dim=1)
        self._valid = _valid(given.get("decoder_attention_mask" if encodes else "attention_mask"), batch, self._rows)
        self._answer = _answer(given.get("labels"), batch, self._rows)
        if self._valid is not None and not past:
            self._labels = self._labels.masked_fill(~self._valid, SPECIAL)

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        self._running = False

    def _text(self) -> int:
        return self.names.index("text") if "text" in self.names else SPECIAL

    def _encode(self, given: dict[str, Any], ids: Tensor | None) -> None:
        """Labels of the encoder's tokens, where there are input_ids to tell them; kept while decoding."""
        if ids is not None and ids.ndim == 2:
            self._encoder = self._new(given, ids, ids, first=True)
            mask = given.get("attention_mask")
            if self._encoder is not None and isinstance(mask, Tensor) and mask.shape == ids.shape:
                self._encoder = self._encoder.masked_fill(~mask.bool(), SPECIAL)
        elif given.get("encoder_outputs") is None:
            self._encoder = None

    def _new(self, given: dict[str, Any], ids: Tensor | None, seen: Tensor, *, first: bool) -> Tensor | None:
        """(batch, token) labels of the tokens of this pass."""
        batch, tokens = seen.shape[:2]
        text = torch.full((batch, tokens), self._text(), device=seen.device)
        if not first:
            return text
        if self.given is not None:
            labels = self.given.to(seen.device)
            labels = labels[None] if labels.ndim == 1 else labels
            if labels.shape[-1] != tokens or labels.shape[0] not in (1, batch):
                self._why = (
                    f"modality has shape {tuple(self.given.shape)}, and the inputs are (batch, token) = "
                    f"{(batch, tokens)}"
                )
                return None
            return labels.expand(batch, -1)
        types = given.get("mm_token_type_ids")
        if isinstance(types, Tensor) and types.shape == (batch, tokens):
            return self._renamed(types)
        if ids is None:
            self._why = "its inputs are inputs_embeds without input_ids, which alone tell pictures from text"
            return None if len(self.names) > 1 else text
        for token, name in self.placeholders.items():
            if name in self.names:
                text = text.masked_fill(ids == token, self.names.index(name))
        return text

    def _renamed(self, types: Tensor) -> Tensor:
        places = [self.names.index(name) if name in self.names else SPECIAL for name in ORDER]
        return torch.tensor(places, device=types.device)[types.long().clamp(0, len(ORDER) - 1)]


def modalities_of(root: nn.Module) -> tuple[str, ...]:
    """The names of what a model reads, text first."""
    from transformers import PreTrainedModel

    found = set(placeholders(root.config).values())
    for part in root.modules():
        if isinstance(part, PreTrainedModel):
            found |= set(_kinds(part))
    ordered = [name for name in ORDER if name in found]
    return (*ordered, *sorted(found - set(ORDER)))


def placeholders(config: Any) -> dict[int, str]:
    """token id -> modality that it stands for in ``input_ids``, as the configuration tells."""
    found: dict[int, str] = {}
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "thinker_config"))):
        for name in ORDER[1:]:
            for suffix in ("token_id", "token_index", "context_token_id"):
                token = getattr(part, f"{name}_{suffix}", None)
                if isinstance(token, int) and token >= 0:
                    found.setdefault(token, name)
    # Models whose pictures are words of their vocabulary.
    words = getattr(config, "vocabulary_map", None)
    if isinstance(words, dict) and isinstance(words.get("<image>"), int):
        found.setdefault(words["<image>"], "image")
    return found


def _kinds(part: nn.Module) -> tuple[str, ...]:
    kinds = getattr(part, "input_modalities", "text") or "text"
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _owners(root: nn.Module) -> dict[int, nn.Module]:
    """id of every module -> the innermost Hugging Face model that holds it."""
    from transformers import PreTrainedModel

    found: dict[int, nn.Module] = {}

    def walk(part: nn.Module, owner: nn.Module) -> None:
        owner = part if isinstance(part, PreTrainedModel) else owner
        found[id(part)] = owner
        for child in part.children():
            walk(child, owner)

    walk(root, root)
    return found


def _alone(owner: nn.Module, root: nn.Module) -> str | None:
    """The modality of an encoder of one; None where tokens of several may meet."""
    kinds = _kinds(owner)
    if "text" not in kinds:
        return kinds[0]
    config = getattr(owner, "config", None)
    for name, kind in (("vision_config", "image"), ("qformer_config", "image"), ("audio_config", "audio")):
        if config is not None and getattr(root.config, name, None) is config and owner is not root:
            return kind
    return "text" if kinds == ("text",) and owner is root and len(modalities_of(root)) == 1 else None


def _encoder_of(root: nn.Module) -> str | None:
    """What the encoder of an encoder-decoder reads."""
    if not getattr(root.config, "is_encoder_decoder", False):
        return None
    get_encoder: Any = getattr(root, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    kinds = _kinds(encoder) if encoder is not None else ("text",)
    return next((kind for kind in kinds if kind != "text"), "text")


def _is_cross(module: nn.Module, path: str) -> bool:
    if getattr(module, "is_cross_attention", False):
        return True
    near = ".".join(path.split(".")[-2:])
    return bool(CROSS.search(near) or CROSS.search(type(module).__name__))


def _in_encoder(path: str) -> bool:
    return re.search(r"(^|\.)encoder(\.|$)", path) is not None


def _bound(root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(type(root).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _decoder_inputs(given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    ids, embeds = given.get("decoder_input_ids"), given.get("decoder_inputs_embeds")
    if ids is None and embeds is None:
        # Shifted labels, or for some models the encoder's own words, are what the decoder reads.
        ids = given.get("labels") if given.get("labels") is not None else given.get("input_ids")
    return ids, embeds


def _past(cache: Any) -> int:
    """Tokens that a cache holds already."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        return int(cache[0][0].shape[-2]) if len(cache) and cache[0] is not None else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, IndexError):
        return 0


def _fitted(labels: Int[Tensor, "batch token"], past: int, text: int) -> Int[Tensor, "batch token"]:
    if labels.shape[1] < past:
        return F.pad(labels, (0, past - labels.shape[1]), value=text)
    return labels[:, :past]


def _valid(mask: Any, batch: int, rows: int) -> Bool[Tensor, "batch query"] | None:
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= rows:
        return mask[:, -rows:].bool()
    return None


def _answer(labels: Any, batch: int, rows: int) -> Bool[Tensor, "batch query"] | None:
    """The queries whose next token is to be learned."""
    if isinstance(labels, Tensor) and labels.shape == (batch, rows) and rows > 1:
        return F.pad(labels[:, 1:] != -100, (0, 1), value=False)
    return None


def _constant(labels: Tensor) -> int | None:
    first = int(labels.flatten()[0]) if labels.numel() else SPECIAL
    return first if first != SPECIAL and bool((labels == first).all()) else None
