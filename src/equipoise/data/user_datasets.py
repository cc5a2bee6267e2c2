"""Data sets made in Python: tensors in memory, and map-style data sets of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError, unknown_name
from ..tokens.masks import bool_mask
from .counter_rng import CounterRNG
from .dataset import Dataset, Split
from .tables.modality_readers import EXAMINED, Item, collate

Task = Literal["classification", "multilabel", "regression"]
MASK = "True or False, or (token,) booleans of an input (token, feature) or of ids (token,)"
KEYS = ("target", "mask", "times", "index")
"""Entries of an item or batch that are no modality."""


class MapStyle(Protocol):
    """A map-style data set of torch: ``len`` and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class TensorDataset(Dataset):
    """A data set of tensors in memory.

    Args:
        train, val, test: Split, or a dict {name: (sample, ...), "target": (sample, ...)}, with optional "mask",
            "times" and "groups" as in ``Split``. Inputs are used as they are: standardize them with the training split.
        task: "classification", "multilabel" or "regression"; by default classification for whole-number targets
            (sample,), else regression.
        num_outputs: number of classes or outputs; by default that of the targets.
        vocabulary: name -> number of token ids, for inputs of ids.

    Raises:
        ShapeError: splits with different modalities or shapes, or without a target.
        ConfigError: an unknown task, or classes outside 0 to num_outputs - 1.

    Example:
        >>> part = {"audio": torch.randn(6, 5, 3), "image": torch.randn(6, 8), "target": torch.arange(6) % 2}
        >>> data = TensorDataset(part, part, part)
        >>> data.names, data.shapes["audio"], data.num_outputs
        (('audio', 'image'), (5, 3), 2)
    """

    def __init__(
        self, train: Split | Mapping[str, Any], val: Split | Mapping[str, Any], test: Split | Mapping[str, Any], *,
        task: Task | None = None, num_outputs: int | None = None, vocabulary: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.train, self.val, self.test = (_as_split(part) for part in (train, val, test))
        self.names = tuple(self.train.inputs)
        for part in (self.val, self.test):
            shapes = [{name: tuple(x.shape[1:]) for name, x in one.inputs.items()} for one in (self.train, part)]
            if shapes[0] != shapes[1]:
                raise ShapeError("TensorDataset", expected=f"inputs as in train: {shapes[0]}", got=f"{shapes[1]}")
        targets = [part.target for part in (self.train, self.val, self.test)]
        self.task, self.num_outputs = _task_of(targets, task, num_outputs, "TensorDataset")
        self.vocabulary = dict(vocabulary or {})
        self.noise = {
            name: _statistics(_valid(x, self.train.mask.get(name)), f"TensorDataset '{name}'")
            for name, x in self.train.inputs.items()
        }

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs


class MapDataset(Dataset):
    """Map-style data sets of torch, one per split, whose items are dicts.

    An item is ``{name: tensor or None, ..., "target": ...}``; None is a missing modality. Tensors of a modality have
    one shape, except that the first size of (token, feature) and of ids (token,) may vary: batches are padded and
    masked. ``"times"`` may hold {name: (token,)} seconds, and ``"mask"`` {name: True or False, or (token,) booleans
    where the first size may vary}; False is missing.

    Args:
        train, val, test: map-style data sets, such as ``torch.utils.data.Dataset``.
        task, num_outputs, vocabulary: as for ``TensorDataset``.
        targets: targets of the three data sets, in this order; by default every item is read once for its target.

    Raises:
        DataError: a data set is empty, or an item has no target or another modality. ShapeError: shapes that differ.

    Example:
        >>> items = [
        ...     {"audio": torch.zeros(3, 2), "image": torch.zeros(4), "target": 0},
        ...     {"audio": torch.zeros(4, 2), "image": None, "target": 1},
        ... ]
        >>> data = MapDataset(items, items, items)
        >>> batch = data.batch("train", torch.tensor([0, 1]), seed=0, epoch=0, train=True)
        >>> batch["mask"]["audio"].sum(dim=1), batch["mask"]["image"]
        (tensor([3, 4]), tensor([ True, False]))
    """

    def __init__(
        self, train: MapStyle, val: MapStyle, test: MapStyle, *, task: Task | None = None,
        num_outputs: int | None = None, vocabulary: Mapping[str, int] | None = None,
        targets: Sequence[Tensor | Sequence[Any]] | None = None,
    ) -> None:  # fmt: skip
        self._parts = {"train": train, "val": val, "test": test}
        for name, part in self._parts.items():
            if not len(part):
                raise DataError(f"MapDataset {name}", expected="at least one item", got="none")
        read = targets or [[self._target(name, i) for i in range(len(part))] for name, part in self._parts.items()]
        masks = [torch.as_tensor(one) if not isinstance(one, list) else _stacked(one) for one in read]
        self.train, self.val, self.test = (Split({}, one) for one in masks)
        self.task, self.num_outputs = _task_of(masks, task, num_outputs, "MapDataset")
        first = train[0]
        self.names = tuple(name for name in first if name not in KEYS)
        self.vocabulary = dict(vocabulary or {})
        rows = torch.linspace(0, len(train) - 1, min(len(train), EXAMINED)).long().unique().tolist()
        items = [train[row] for row in rows]
        self._shapes, self._varying, self.noise = {}, {}, {}
        for name in self.names:
            values = [_tensor(item[name], name) for item in items if item.get(name) is not None]
            if not values:
                raise DataError(f"MapDataset '{name}'", expected="training items with this modality", got="None in all")
            varying = values[0].ndim == 2 or (values[0].ndim == 1 and not values[0].is_floating_point())
            self._varying[name] = varying
            longest = max(len(one) for one in values) if varying else 0
            self._shapes[name] = (longest, *values[0].shape[1:]) if varying else tuple(values[0].shape)
            valid = []
            for row, item in zip(rows, items, strict=True):
                if item.get(name) is not None:
                    one = _tensor(item[name], name)
                    mask = self._mask(item, name, one, f"MapDataset train, item {row}")
                    valid.append(one.flatten() if mask is None else one[mask].flatten())
            self.noise[name] = _statistics(torch.cat(valid) if valid else torch.zeros(0), f"MapDataset '{name}'")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        return inputs

    def batch(self, split: str, index: Tensor, *, seed: int, epoch: int, train: bool) -> dict[str, Any]:
        samples = self.split(split)
        items = [self._parts[split][row] for row in index.tolist()]
        batch: dict[str, Any] = {"target": samples.target[index], "index": index}
        mask, times = {}, {}
        for name in self.names:
            parts = [self._item(item, name, split, row) for item, row in zip(items, index.tolist(), strict=True)]
            read = collate(parts, self._shapes[name], varying=self._varying[name])
            is_integer = all(part is None or not part.values.is_floating_point() for part in parts)
            batch[name] = read.values.long() if is_integer and name in self.vocabulary else read.values
            if read.mask is not None:
                mask[name] = read.mask
            if read.times is not None:
                times[name] = read.times
        return {**batch, **({"mask": mask} if mask else {}), **({"times": times} if times else {})}

    def _target(self, name: str, row: int) -> Any:
        item = self._parts[name][row]
        if not isinstance(item, Mapping) or item.get("target") is None:
            got = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
            raise DataError(f"MapDataset {name}, item {row}", expected="a dict with a target", got=got)
        return item["target"]

    def _item(self, item: Mapping[str, Any], name: str, split: str, row: int) -> Item | None:
        if item.get(name) is None:
            return None
        values = _tensor(item[name], name)
        expected = self._shapes[name]
        fits = values.shape[1:] == expected[1:] and values.ndim == len(expected)
        if not fits or (not self._varying[name] and tuple(values.shape) != tuple(expected)):
            raise ShapeError(
                f"MapDataset {split}, item {row}, '{name}'", expected=f"shape {expected} as in training",
                got=f"{tuple(values.shape)}",
            )  # fmt: skip
        who = f"MapDataset {split}, item {row}"
        mask, times = self._mask(item, name, values, who), item.get("times") or {}
        if mask is not None and mask.ndim == 0:
            return Item(values, _seconds(times, name)) if mask else None
        return Item(values, _seconds(times, name), mask)

    def _mask(self, item: Mapping[str, Any], name: str, values: Tensor, who: str) -> Tensor | None:
        """Returns the mask of a modality of an item, () or (token,); None without one."""
        item_mask = item.get("mask") or {}
        for kind, part in (("times", item.get("times") or {}), ("mask", item_mask)):
            if unknown := [key for key in part if key not in self.names]:
                raise unknown_name(f"{who}, {kind}", "modality", str(unknown[0]), self.names)
        if name not in item_mask:
            return None
        who = f"{who}, mask of '{name}'"
        mask = bool_mask(torch.as_tensor(item_mask[name]), who, MASK, numbers=True)
        if mask.ndim and (not self._varying[name] or mask.shape != values.shape[:1]):
            raise ShapeError(who, expected=MASK, got=f"shape {tuple(mask.shape)}")
        return mask


def _seconds(times: Mapping[str, Any], name: str) -> Tensor | None:
    return torch.as_tensor(times[name]).float() if name in times else None


def _tensor(value: Any, name: str) -> Tensor:
    try:
        values = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"MapDataset '{name}'", expected="a tensor or None", got=type(value).__name__) from error
    return values.float() if values.is_floating_point() or values.dtype == torch.bool else values


def _stacked(targets: list[Any]) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(target) for target in targets])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("MapDataset", expected="targets of one shape", got=str(error).split("\n")[0]) from error


def _as_split(part: Split | Mapping[str, Any]) -> Split:
    if isinstance(part, Split):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("target"), Tensor):
        got = f"keys {', '.join(map(str, part))}" if isinstance(part, Mapping) else type(part).__name__
        raise ShapeError("TensorDataset", expected="a Split, or a dict with a tensor 'target'", got=got)
    inputs = {name: values for name, values in part.items() if name not in (*KEYS, "groups")}
    mask, times = (dict(part.get(name) or {}) for name in ("mask", "times"))
    return Split(inputs, part["target"], mask, times, part.get("groups"))


def _task_of(targets: Sequence[Tensor], task: Task | None, num_outputs: int | None, who: str) -> tuple[Task, int]:
    first = targets[0]
    is_integer = not first.is_floating_point()
    task = task or ("classification" if first.ndim == 1 and is_integer else "regression")
    if task not in ("classification", "multilabel", "regression"):
        raise ConfigError(who, expected="task classification, multilabel or regression", got=repr(task))
    if task != "classification":
        return task, num_outputs or (first.shape[1] if first.ndim > 1 else 1)
    low, high = (int(one) for one in torch.cat([target.reshape(-1) for target in targets]).aminmax())
    classes = num_outputs or high + 1
    if low < 0 or high >= classes or not is_integer:
        raise ConfigError(
            who, expected=f"whole-number classes from 0 to num_outputs - 1 = {classes - 1}", got=f"{low} to {high}"
        )
    return task, classes


def _valid(values: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the valid samples or tokens. A mask of the tokens of an encoder selects whole samples."""
    if mask is None:
        return values
    return values[mask if mask.shape == values.shape[: mask.ndim] else mask.any(dim=1)]


def _statistics(values: Tensor, who: str) -> tuple[float, float]:
    """Returns mean and standard deviation of training inputs."""
    if not values.numel():
        raise DataError(who, expected="training samples with this modality", got="none besides masked ones")
    values = values.double()
    mean, std = values.mean().item(), values.std(correction=0).item()
    if not math.isfinite(mean) or not math.isfinite(std):
        raise DataError(
            who,
            expected="finite training inputs",
            got="NaN or infinity",
            fix="Mask the samples or tokens that are missing.",
        )
    return mean, std
