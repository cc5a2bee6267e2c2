"""Labels the keys of an attention call and selects its queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..tokens.token_batch import SPECIAL
from .attention_call import AttentionCall, QueryRows, query_rows
from .generation_loops import Step

WORDS = ("all", "last", "answer")


@dataclass(frozen=True, eq=False)
class LabeledKeys:
    """Labels of the tokens of an attention call.

    Attributes:
        keys: (key,) or (batch, key) labels, -1 = special or padding.
        names: modality names.
        queries: (query,) or (batch, query) labels of the queries, if known.
        valid: (batch, query) False for padding; None if all queries are valid.
        answer: (batch, query) True for the queries that predict the answer; None if it is the last query.
        constant: index of the modality of all keys, whose share is then 1; None for several modalities.
        continues: the call continues the samples of the previous one, as in decoding with a cache.
        unimodal: the call belongs to a unimodal encoder.
        start: position of the first key in the sequence, > 0 for a sliding window.
        length: number of tokens of the sequence up to the last query, if known.
        own: the keys are those of the sequence itself, as in self-attention.
        writes: (batch, query) True for the queries that generate a token under ``generate``; None elsewhere.
        text: number of tokens at the end of the sequence that ``generate`` added to the prompt.
        partial: the pass processes a chunk of the prompt.
        alive: (batch,) False for samples that ``generate`` has finished; None if there are none.
        step: step of ``generate`` whose samples are assigned to returned sequences later.
        beside: the call runs before the decoding loop of ``generate``, as in an encoder.
        samples: number of samples of the pass; a batch of a multiple of it contains the windows or images of each
            sample in turn.
    """

    keys: Int[Tensor, "... key"]
    names: tuple[str, ...]
    queries: Int[Tensor, "... query"] | None = None
    valid: Bool[Tensor, "batch query"] | None = None
    answer: Bool[Tensor, "batch query"] | None = None
    constant: int | None = None
    continues: bool = False
    unimodal: bool = False
    start: int = 0
    length: int | None = None
    own: bool = False
    writes: Bool[Tensor, "batch query"] | None = None
    text: int = 0
    partial: bool = False
    alive: Bool[Tensor, " batch"] | None = None
    step: Step | None = None
    beside: bool = False
    samples: int | None = None


class TokenLabeler(Protocol):
    """Labels the keys of a call; returns the reason if they are unknown, and None for calls to ignore."""

    names: tuple[str, ...]

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None: ...


class UserLabels:
    """Labels given by the user or by equipoise's own layers.

    Args:
        modality: (key,) or (batch, key); None uses the labels of the layers.
        names: modality names; by default "0", "1", ...
        encoders: id of a module inside a unimodal encoder -> its modality, or None if several share the encoder.
    """

    def __init__(
        self, modality: Tensor | None, names: Sequence[str] | None, encoders: Mapping[int, str | None] | None = None
    ) -> None:
        self.modality = None if modality is None else check_labels(modality)
        self.names = check_names(self.modality, names)
        self._requested_names = self.names
        self._encoders = encoders or {}
        self._encoder_names = tuple(dict.fromkeys(name for name in self._encoders.values() if name is not None))

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        batch, _, _, keys = call.sizes
        if id(module) in self._encoders:
            return self._in_encoder(keys, self._encoders[id(module)])
        if self.modality is None:
            if call.modality is None and len(call.names) == 1:
                # A unimodal stream inside a fusion.
                return self._in_encoder(keys, call.names[0])
            if call.modality is None:
                return f"the modality of its {keys} keys is unknown"
            return self._own(
                call, call.modality, call.names or check_names(call.modality, self._requested_names or None)
            )
        labels = self.modality
        if labels.ndim == 2 and labels.shape[0] not in (1, batch):
            return f"it has batch = {batch}, and modality is given for {labels.shape[0]} samples"
        if labels.shape[-1] != keys - call.added:
            return f"it has {keys - call.added} keys, and modality is given for {labels.shape[-1]}"
        labels = labels[0] if labels.ndim == 2 and labels.shape[0] == 1 else labels
        return label_keys(call, F.pad(labels, (0, call.added), value=SPECIAL), self.names)

    def _in_encoder(self, keys: int, name: str | None) -> LabeledKeys | None:
        names = self._requested_names or self._encoder_names or ((name,) if name else ())
        if name not in names:
            return None
        index = names.index(name)
        return LabeledKeys(torch.full((keys,), index), names, constant=index, unimodal=True)

    def _own(self, call: AttentionCall, modality: Tensor, names: tuple[str, ...]) -> LabeledKeys:
        """Returns the labels of the layer itself, reordered to the names requested by the user."""
        self.names = self.names or names
        if not self._requested_names or self._requested_names == names:
            return label_keys(call, modality, names)
        for name in self._requested_names:
            if name not in names:
                raise unknown_name("watch names", "modality", name, names)
        indices = [self._requested_names.index(name) if name in self._requested_names else SPECIAL for name in names]
        order = torch.tensor([*indices, SPECIAL], device=modality.device)
        return label_keys(call, order[modality], self._requested_names)


def label_keys(call: AttentionCall, keys: Tensor, names: tuple[str, ...], **known: Any) -> LabeledKeys:
    """Creates the labels of a call; in self-attention the queries are its first tokens."""
    _, _, rows, total = call.sizes
    keys = keys.to(call.query.device)
    if call.reads_itself and rows <= total:
        known.setdefault("queries", keys[..., :rows])
        if "valid" not in known and (visible := call.visible_keys()) is not None:
            known["valid"] = visible[:, :rows]
    return LabeledKeys(keys, names, **known)


def check_labels(modality: Any) -> Int[Tensor, "... key"]:
    """Converts labels to a tensor and checks them.

    Raises:
        ShapeError: labels that are not integers >= -1 of shape (key,) or (batch, key).
    """
    if not isinstance(modality, Tensor):
        modality = torch.as_tensor(modality)
    if modality.ndim not in (1, 2) or modality.is_floating_point() or modality.dtype == torch.bool:
        raise ShapeError(
            "watch modality", expected="integer labels of shape (key,) or (batch, key)",
            got=f"shape {tuple(modality.shape)}, {modality.dtype}",
            fix="Give one label for each token: torch.tensor([0, 0, 1, ...]), with -1 for special tokens.",
        )  # fmt: skip
    if modality.numel() and int(modality.min()) < -1:
        raise ShapeError("watch modality", expected="labels >= -1", got=f"{int(modality.min())}")
    return modality


def check_names(modality: Tensor | None, names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names, by default "0", "1", ..., and checks that there is one for each label.

    Raises:
        ConfigError: too few names, or duplicate names.
    """
    if isinstance(names, str):
        raise ConfigError("watch names", expected="a sequence of names", got=repr(names), fix=f"Use ({names!r},).")
    count = int(modality.max()) + 1 if modality is not None and modality.numel() else 0
    if names is None:
        return tuple(str(index) for index in range(count))
    result = tuple(names)
    if len(result) < count or len(set(result)) < len(result):
        raise ConfigError(
            "watch names", expected=f"{count} or more different names, one for each label", got=str(result),
            fix="Labels are indices into the names, from 0; special tokens have label -1 and no name.",
        )  # fmt: skip
    return result


def recorded_rows(queries: str | Tensor, call: AttentionCall, known: LabeledKeys) -> QueryRows | str | None:
    """Returns the queries of a call to record, or the reason if they are unknown; None if none is selected.

    Raises:
        ConfigError: an unknown word or modality name.
        ShapeError: a mask that fits neither this call nor a part of it.
    """
    batch, _, rows, _ = call.sizes
    device = call.query.device
    all_queries = torch.ones(batch, rows, dtype=torch.bool, device=device)
    valid = all_queries if known.valid is None else known.valid.to(device)
    encoder = known.unimodal and known.constant is not None
    if encoder and isinstance(queries, Tensor) and queries.shape != (batch, rows):
        # A mask of the joint sequence selects none of the queries of an encoder.
        return None
    if encoder and isinstance(queries, str) and queries in known.names:
        # All queries of an encoder have its modality.
        return QueryRows(valid.float()) if known.names[known.constant] == queries else None  # type: ignore[index]
    if isinstance(queries, Tensor):
        if known.writes is not None and known.length is not None:
            return _prompt_queries(queries.to(device), known, valid)
        if queries.shape != (batch, rows) and known.continues:
            return None
        if queries.shape != (batch, rows):
            return f"it has (batch, query) = {(batch, rows)}, and queries is a mask of shape {tuple(queries.shape)}"
        return query_rows(queries.to(device) & valid)
    if queries == "all":
        return QueryRows(valid.float())
    if queries in ("last", "answer") and known.writes is not None:
        return query_rows(known.writes.to(device) & valid)
    if queries == "answer" and known.answer is not None:
        return query_rows(known.answer.to(device) & valid)
    if queries in ("last", "answer"):
        position = (valid * torch.arange(1, rows + 1, device=device)).argmax(dim=1, keepdim=True)
        return QueryRows(valid.gather(1, position).float(), position)
    if queries not in known.names:
        raise unknown_name("watch queries", "word or modality", queries, (*WORDS, *known.names))
    if known.queries is None:
        return f"the modality of its queries is unknown, and queries is {queries!r}"
    selected = (known.queries.to(device) == known.names.index(queries)).expand(batch, rows)
    return query_rows(selected & valid)


def _prompt_queries(queries: Tensor, known: LabeledKeys, valid: Tensor) -> QueryRows | str | None:
    """Selects the queries of this pass of ``generate`` from a mask of the prompt's queries."""
    (batch, rows), (mask_batch, total) = valid.shape, queries.shape
    prompt: int = known.length - known.text  # type: ignore[operator]
    if batch % mask_batch or (prompt > total if known.partial else prompt != total):
        return f"it has (batch, query) = {(batch, prompt)}, and queries is a mask of shape {(mask_batch, total)}"
    first: int = known.length - rows  # type: ignore[operator]
    selected = queries[:, first : first + rows].repeat_interleave(batch // mask_batch, dim=0)
    return (
        query_rows(F.pad(selected, (0, rows - selected.shape[1]), value=False) & valid) if selected.shape[1] else None
    )


def check_queries(queries: Any, names: Sequence[str], who: str = "watch") -> str | Tensor:
    """Checks the ``queries`` argument of ``watch`` and returns it.

    Raises:
        ConfigError: neither a string nor a boolean mask (batch, query), or a string that is not a known modality name.
    """
    if isinstance(queries, str):
        if names and queries not in (*WORDS, *names):
            raise unknown_name(f"{who} queries", "word or modality", queries, (*WORDS, *names))
        return queries
    if isinstance(queries, Tensor) and queries.dtype == torch.bool and queries.ndim == 2:
        return queries
    got = f"{queries.dtype} of shape {tuple(queries.shape)}" if isinstance(queries, Tensor) else repr(queries)
    raise ConfigError(
        f"{who} queries",
        expected="'all', 'last', 'answer', a modality's name or a boolean mask (batch, query)",
        got=got,
    )
