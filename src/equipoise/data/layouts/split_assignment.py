"""Splits of published data sets: validation samples from the training list, and splits with disjoint groups."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ...errors import ConfigError
from .published_layout import RawSample

PARTS = {"test": 0.2, "val": 0.1}
"""Parts of the samples in the test and validation splits with disjoint groups; the rest is for training."""


def hold_out_validation(samples: Sequence[RawSample], part: float = 0.1, *, by_group: bool = False) -> list[RawSample]:
    """Moves a part of the training samples of each class to the validation split, the same ones on every machine.

    Args:
        samples: samples of all splits.
        part: part of the training samples of each class, rounded; at least one of a class with two or more.
        by_group: move whole groups, so that training and validation have no group in common.

    Example:
        >>> made = hold_out_validation([RawSample(str(i), "train", 0, str(i)) for i in range(20)])
        >>> [sample.split for sample in made].count("val")
        2
    """
    units: dict[object, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        if sample.split == "train":
            units[sample.target][sample.group if by_group else sample.id].append(index)
    moved: set[int] = set()
    groups: set[str] = set()
    for members in units.values():
        target_size = max(1, round(part * sum(map(len, members.values()))))
        count = sum(len(places) for name, places in members.items() if by_group and name in groups)
        # A group that holds several classes moves as a whole, so it may be chosen already.
        for name in sorted(members, key=_order):
            if count >= target_size or len(members) < 2:
                break
            if name in groups:
                continue
            count += len(members[name])
            groups.add(name)
            moved.update(members[name])
    if by_group:
        moved = {i for i, sample in enumerate(samples) if sample.split == "train" and sample.group in groups}
    return [replace(sample, split="val") if i in moved else sample for i, sample in enumerate(samples)]


def split_by_group(samples: Sequence[RawSample], who: str) -> list[RawSample]:
    """Assigns whole groups to test (20 % of the samples), validation (10 %) and training, the same on every machine.

    Raises:
        ConfigError: fewer than three groups.

    Example:
        >>> made = split_by_group([RawSample(str(i), "", 0, f"speaker{i % 10}") for i in range(100)], "data")
        >>> [[s.split for s in made].count(name) for name in ("train", "val", "test")]
        [70, 10, 20]
    """
    sizes: dict[str, int] = defaultdict(int)
    for sample in samples:
        sizes[sample.group] += 1
    if len(sizes) < 3 or "" in sizes:
        raise ConfigError(
            f"{who} --split disjoint", expected="three groups or more, and one for each sample",
            got=f"{len(sizes) - ('' in sizes)}{' and samples without one' if '' in sizes else ''}",
            fix="Use --split published.",
        )  # fmt: skip
    order = sorted(sizes, key=_order)
    belongs = {}
    for name, part in PARTS.items():
        count, target_size = 0, part * len(samples)
        # Leave at least one group for each split that follows.
        while (
            order
            and (count == 0 or count + sizes[order[0]] / 2 <= target_size)
            and len(order) > (2 if name == "test" else 1)
        ):
            count += sizes[order[0]]
            belongs[order.pop(0)] = name
    return [replace(sample, split=belongs.get(sample.group, "train")) for sample in samples]


def _order(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()
