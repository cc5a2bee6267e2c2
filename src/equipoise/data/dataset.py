"""Base class of data sets: splits in memory, and reproducible batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, ShapeError, unknown_name
from ..tokens.masks import bool_mask
from .counter_rng import CounterRNG
from .resumable_sampler import ResumableBatchSampler

MASK = "(sample,) or (sample, token), boolean or all 0 and 1, True = present"
EVALUATION_SEED = 20_250_000
"""Seed of the noise in evaluation batches, independent of the run: all runs are evaluated on the same samples."""


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set, in memory.

    Args:
        inputs: name -> (sample, ...), standardized with the statistics of the training split, before augmentation.
        target: (sample,) long for classes; (sample,) or (sample, output) float for regression and multi-label.
        mask: name -> (sample,) bool, False for samples that lack the modality, or (sample, token) bool, False for
            padding; {} if every sample is complete. Numbers that are all 0 and 1 become bool.
        times: name -> (sample, token) time stamps in seconds, for encoders and fusions that use them.
        groups: name of the group of each sample, such as its speaker; samples of a group are not independent. None if
            there are none, or if they are not known. Numbers, also in a tensor or an array, become text.

    Raises:
        ShapeError: inputs, masks, times, groups and targets differ in length; an invalid mask.
        ConfigError: a mask or times of an unknown modality.

    Example:
        >>> len(Split({"audio": torch.zeros(3, 7, 5)}, torch.tensor([0, 1, 1])))
        3
    """

    inputs: dict[str, Tensor]
    target: Tensor
    mask: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, Tensor] = field(default_factory=dict)
    groups: list[str] | None = None

    def __post_init__(self) -> None:
        for kind, part in (("", self.inputs), (" mask", self.mask), (" times", self.times)):
            for name, values in part.items():
                if len(values) != len(self.target):
                    raise ShapeError(
                        f"Split '{name}'{kind}", expected=f"as many samples as targets = {len(self.target)}",
                        got=f"{len(values)}",
                    )  # fmt: skip
                # Data sets that read samples on demand hold no inputs.
                if self.inputs and name not in self.inputs:
                    raise unknown_name(f"Split{kind}", "modality", name, self.inputs)
        if self.groups is not None and len(self.groups) != len(self.target):
            raise ShapeError(
                "Split groups", expected=f"one for each target = {len(self.target)}", got=f"{len(self.groups)}"
            )
        if self.groups is not None:
            # Elements of a tensor are not equal as keys, even if their numbers are.
            groups: Any = self.groups
            names = groups.tolist() if hasattr(groups, "tolist") else groups
            object.__setattr__(self, "groups", [str(name) for name in names])
        masks = {name: bool_mask(mask, f"Split '{name}' mask", MASK, numbers=True) for name, mask in self.mask.items()}
        for name, mask in masks.items():
            if mask.ndim not in (1, 2):
                raise ShapeError(f"Split '{name}' mask", expected=MASK, got=f"shape {tuple(mask.shape)}")
        object.__setattr__(self, "mask", masks)

    def __len__(self) -> int:
        return len(self.target)


class Dataset(ABC):
    """Base class of the data sets that ``load_dataset`` finds by name: splits, modality names and augmentation.

    A subclass sets the attributes in its constructor and implements ``augment``.

    Attributes:
        names: modality names.
        num_outputs: classes, or outputs of a regression.
        task: "classification", "multilabel" or "regression" for fusion models; other values for data of other models.
        train, val, test: Split.
        noise: name -> (mean, standard deviation) of the standardized training inputs, the statistics of the noise that
            replaces a whole modality.
        vocabulary: name -> number of token ids, for inputs of word or character ids; 0 is padding.
        sampling_weights: (sample,) weights of the training samples, see ``ResumableBatchSampler``; None for all alike.
        ordered: whether the data set shuffles by itself: training batches are given by positions in the order of the
            epoch.
        near_ood: test samples of the held-out classes, with their original targets; None without held-out classes.
    """

    names: tuple[str, ...]
    num_outputs: int
    task: str = "classification"
    train: Split
    val: Split
    test: Split
    noise: dict[str, tuple[float, float]]
    vocabulary: dict[str, int] = {}  # noqa: RUF012
    sampling_weights: Tensor | None = None
    near_ood: Split | None = None
    ordered: bool = False

    @abstractmethod
    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        """Augments the inputs of a batch; noise that is part of the task is added in evaluation as well."""

    def far_ood_inputs(
        self, pictures: Float[Tensor, "sample height width"], sounds: Float[Tensor, "sample 5120"]
    ) -> dict[str, Tensor]:
        """Processes images (gray, 0 to 1) and sounds (8 kHz) of another task as the inputs of this data set.

        Raises:
            ConfigError: this data set does not consist of images and sounds.
        """
        raise ConfigError(
            "ood_split", expected="a data set of images and sounds", got=type(self).__name__,
            fix="Choose av_digits or digits.",
        )  # fmt: skip

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns {name: shape of the input of one sample}."""
        return {name: tuple(values.shape[1:]) for name, values in self.train.inputs.items()}

    def split(self, name: str) -> Split:
        """Returns a split by its name.

        Raises:
            ConfigError: the name is not train, val or test.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if name not in splits:
            raise unknown_name(type(self).__name__, "split", name, splits)
        return splits[name]

    def batch(self, split: str, index: Int[Tensor, " batch"], *, seed: int, epoch: int, train: bool) -> dict[str, Any]:
        """Returns a batch of samples as the input of a model.

        Args:
            split: "train", "val" or "test".
            index: (batch,) positions in the split.
            seed, epoch: seed and epoch of the augmentation; unused unless ``train``.
            train: augment; otherwise a sample is the same in every epoch and run.

        Returns:
            dict {name: (batch, ...)} of all modalities, "target" (batch,), "index" (batch,), and "mask" and "times" as
            ``FusionModel`` reads them, if the split has them.
        """
        samples = self.split(split)
        draw = CounterRNG(seed, epoch, index, split) if train else CounterRNG(EVALUATION_SEED, 0, index, split)
        inputs = self.augment({name: values[index] for name, values in samples.inputs.items()}, draw, train=train)
        batch: dict[str, Any] = {**inputs, "target": samples.target[index], "index": index}
        for key, part in (("mask", samples.mask), ("times", samples.times)):
            if part:
                batch[key] = {name: values[index] for name, values in part.items()}
        return batch

    def batches(self, split: str, batch_size: int, *, seed: int, epoch: int, train: bool) -> Iterator[dict[str, Any]]:
        """Yields all batches of one epoch; shuffled if ``train``."""
        order = ResumableBatchSampler(
            len(self.split(split)), batch_size, seed=seed, shuffle=train, ordered=self.ordered
        )
        order.set_epoch(epoch)
        for _, index in order:
            yield self.batch(split, index, seed=seed, epoch=epoch, train=train)


def standardize(values: Tensor, reference: Tensor) -> Tensor:
    """Subtracts the mean of ``reference`` and divides by its standard deviation, both over all elements.

    Example:
        >>> standardize(torch.tensor([7.0]), torch.tensor([1.0, 3.0]))
        tensor([5.])
    """
    return (values - reference.mean()) / reference.std(correction=0).clamp(min=torch.finfo(torch.float32).eps)


def split_statistics(inputs: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Returns {name: (mean, standard deviation)} over all samples and positions.

    Example:
        >>> split_statistics({"audio": torch.tensor([[1.0, 3.0]])})
        {'audio': (2.0, 1.0)}
    """
    return {name: (values.mean().item(), values.std(correction=0).item()) for name, values in inputs.items()}
