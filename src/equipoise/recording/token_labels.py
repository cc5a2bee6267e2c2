"""Labels of the keys of an attention call, and the selection of its queries."""

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
    """What is known of a call's tokens.

    Attributes:
        keys: (key,) or (batch, key) labels, -1 = special or padding.
        names: of the modalities.
        queries: (query,) or (batch, query) labels of the queries, where they are known.
        valid: (batch, query) False for queries that are padding; None where all count.
        answer: (batch, query) True for the queries that write the answer; None where it is the last one.
        constant: all keys are of this one modality, so that nothing needs to be measured.
        continues: the call goes on with the samples of the one before, as decoding with a cache does.
        unimodal: the call belongs to an encoder of one modality.
        start: place of the first key in the sequence, where a window leaves out those before.
        length: tokens of the sequence that the queries end, where it is known.
        own: the keys are those of the sequence itself.
        writes: (batch, query) True for the queries that write a token under ``generate``; None elsewhere.
        text: tokens at the end of the sequence that ``generate`` added to the prompt.
        partial: the pass reads a part of the prompt alone.
        alive: (batch,) False for samples that ``generate`` has finished; None where there are none.
        step: of ``generate``, where it is known later which samples go on to be returned.
        beside: the call runs before the decoding loop of ``generate``, as an encoder does.
        samples: of the pass; a batch of a multiple of them holds windows or images of each sample in turn.
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
        names: of the modalities; numbers where there are none.
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
                # The stream of one modality in a fusion.
                return self._in_encoder(keys, call.names[0])
            if call.modality is None:
                return f"nothing tells the modality of its {keys} keys"
            return self._own(
                call, call.modality, call.names or check_names(call.modality, self._requested_names or None)
            )
        given = self.modality
        if given.ndim == 2 and given.shape[0] not in (1, batch):
            return f"it has batch = {batch}, and modality is given for {given.shape[0]} samples"
        if given.shape[-1] != keys - call.added:
            return f"it has {keys - call.added} keys, and modality is given for {given.shape[-1]}"
        given = given[0] if given.ndim == 2 and given.shape[0] == 1 else given
        return label_keys(call, F.pad(given, (0, call.added), value=SPECIAL), self.names)

    def _in_encoder(self, keys: int, name: str | None) -> LabeledKeys | None:
        names = self._requested_names or self._encoder_names or ((name,) if name else ())
        if name not in names:
            return None
        index = names.index(name)
        return LabeledKeys(torch.full((keys,), index), names, constant=index, unimodal=True)

    def _own(self, call: AttentionCall, modality: Tensor, names: tuple[str, ...]) -> LabeledKeys:
        """A layer's own labels, in the order of the names that the user gave."""
        self.names = self.names or names
        if not self._requested_names or self._requested_names == names:
            return label_keys(call, modality, names)
        for name in self._requested_names:
            if name not in names:
                raise unknown_name("watch names", "modality", name, names)
        places = [self._requested_names.index(name) if name in self._requested_names else SPECIAL for name in names]
        order = torch.tensor([*places, SPECIAL], device=modality.device)
        return label_keys(call, order[modality], self._requested_names)


def label_keys(call: AttentionCall, keys: Tensor, names: tuple[str, ...], **known: Any) -> LabeledKeys:
    """Labels of a call whose queries are its first tokens, where they are its own."""
    _, _, rows, total = call.sizes
    keys = keys.to(call.query.device)
    if call.reads_itself and rows <= total:
        known.setdefault("queries", keys[..., :rows])
        if "valid" not in known and (read := call.visible_keys()) is not None:
            known["valid"] = read[:, :rows]
    return LabeledKeys(keys, names, **known)


def check_labels(modality: Any) -> Int[Tensor, "... key"]:
    """Labels as they must be.

    Raises:
        ShapeError: anything but whole numbers of shape (key,) or (batch, key), from -1 on.
    """
    if not isinstance(modality, Tensor):
        modality = torch.as_tensor(modality)
    if modality.ndim not in (1, 2) or modality.is_floating_point() or modality.dtype == torch.bool:
        raise ShapeError(
            "watch modality", expected="integer labels of shape (key,) or (batch, key)",
            got=f"shape {tuple(modality.shape)}, {modality.dtype}",
            fix="Give one label for every token: torch.tensor([0, 0, 1, ...]), -1 for special ones.",
        )  # fmt: skip
    if modality.numel() and int(modality.min()) < -1:
        raise ShapeError("watch modality", expected="labels from -1 on", got=f"{int(modality.min())}")
    return modality


def check_names(modality: Tensor | None, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names, one for every label.

    Raises:
        ConfigError: too few names, or a name twice.
    """
    if isinstance(names, str):
        raise ConfigError("watch names", expected="a sequence of names", got=repr(names), fix=f"Use ({names!r},).")
    count = int(modality.max()) + 1 if modality is not None and modality.numel() else 0
    if names is None:
        return tuple(str(number) for number in range(count))
    found = tuple(names)
    if len(found) < count or len(set(found)) < len(found):
        raise ConfigError(
            "watch names", expected=f"{count} or more different names, one for each label", got=str(found),
            fix="Labels count the names from 0; special tokens have label -1 and no name.",
        )  # fmt: skip
    return found


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
        # A mask of the joint sequence chooses none of the queries of an encoder.
        return None
    if encoder and isinstance(queries, str) and queries in known.names:
        # All queries of an encoder are of its modality.
        return QueryRows(valid.float()) if known.names[known.constant] == queries else None  # type: ignore[index]
    if isinstance(queries, Tensor):
        if known.writes is not None and known.length is not None:
            return _of_prompt(queries.to(device), known, valid)
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
        place = (valid * torch.arange(1, rows + 1, device=device)).argmax(dim=1, keepdim=True)
        return QueryRows(valid.gather(1, place).float(), place)
    if queries not in known.names:
        raise unknown_name("watch queries", "word or modality", queries, (*WORDS, *known.names))
    if known.queries is None:
        return f"the modality of its queries is not known, and queries is {queries!r}"
    here = (known.queries.to(device) == known.names.index(queries)).expand(batch, rows)
    return query_rows(here & valid)


def _of_prompt(queries: Tensor, known: LabeledKeys, valid: Tensor) -> QueryRows | str | None:
    """The part of a mask of the prompt's queries that a pass of ``generate`` holds."""
    (batch, rows), (given, total) = valid.shape, queries.shape
    prompt: int = known.length - known.text  # type: ignore[operator]
    if batch % given or (prompt > total if known.partial else prompt != total):
        return f"it has (batch, query) = {(batch, prompt)}, and queries is a mask of shape {(given, total)}"
    first: int = known.length - rows  # type: ignore[operator]
    here = queries[:, first : first + rows].repeat_interleave(batch // given, dim=0)
    return query_rows(F.pad(here, (0, rows - here.shape[1]), value=False) & valid) if here.shape[1] else None


def check_queries(queries: Any, names: Sequence[str]) -> str | Tensor:
    """What ``watch`` takes as queries.

    Raises:
        ConfigError: neither a word nor a boolean mask; a word that is none of the names, where these are known.
    """
    if isinstance(queries, str):
        if names and queries not in (*WORDS, *names):
            raise unknown_name("watch queries", "word or modality", queries, (*WORDS, *names))
        return queries
    if isinstance(queries, Tensor) and queries.dtype == torch.bool and queries.ndim == 2:
        return queries
    got = f"{queries.dtype} of shape {tuple(queries.shape)}" if isinstance(queries, Tensor) else repr(queries)
    raise ConfigError(
        "watch queries", expected="'all', 'last', 'answer', a modality's name or a boolean mask (batch, query)", got=got
    )
