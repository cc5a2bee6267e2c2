"""`triples`: digits as images, speech and text, one per sample or several in a scene."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ...errors import ConfigError, unknown_name
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split, split_statistics
from ..label_pairing import PAIRING_SEED
from .digit_spelling import FORMS, LETTERS, misspell, one_hot, spelled_digits
from .digits import Digits

MOST_ITEMS = 10


class Triples(Dataset):
    """The bundled digits in three modalities: "audio" (64, 40) and "image" (1, 8, 8) as in `Digits`, "text" (6,) ids.

    A written digit is a word of one of four languages, a Roman numeral or a figure, with random misspellings. With one
    item, a sample is one digit in all three modalities, and the target is the digit. With more it is a *scene*: the
    same ``items`` different digits in item_draw modality, in a different order in item_draw. The inputs of a scene are
    (items, ...), and its target is (modality, items): the digit at item_draw position. See docs/data/triples.md.

    Args:
        items: digits of a sample, 1 to 10. The task is classification with 1, correspondence with more.
        audio_noise, image_noise, energy: as in `Digits`.
        slips: probability that a letter is replaced, dropped or swapped, in every split.
        letters: ``"ids"`` as above; ``"vectors"`` one-hot encodes a text as (6, 36), so that Gaussian noise can
            replace it like any other input.

    Attributes:
        items: as given.

    Raises:
        ConfigError: items outside 1 to 10, or slips outside [0, 1]; as `Digits`.

    Example:
        >>> data = Triples(items=4)
        >>> data.shapes
        {'audio': (64, 40), 'image': (1, 8, 8), 'text': (6,)}
        >>> batch = data.batch("val", torch.arange(3), seed=0, epoch=0, train=False)
        >>> batch["audio"].shape, batch["text"].shape, batch["target"].shape
        (torch.Size([3, 4, 64, 40]), torch.Size([3, 4, 6]), torch.Size([3, 3, 4]))
    """

    names = ("audio", "image", "text")
    num_outputs = 10

    def __init__(
        self, *, items: int = 1, audio_noise: float = 2.0, image_noise: float = 0.5, energy: float = 0.4,
        slips: float = 0.3, letters: Literal["ids", "vectors"] = "ids",
    ) -> None:  # fmt: skip
        if not 1 <= items <= MOST_ITEMS:
            raise ConfigError("Triples", expected=f"1 <= items <= {MOST_ITEMS}, all different", got=f"items = {items}")
        if not 0 <= slips <= 1:
            raise ConfigError("Triples", expected="0 <= slips <= 1", got=f"slips = {slips}")
        if letters not in ("ids", "vectors"):
            raise unknown_name("Triples", "letters", str(letters), ("ids", "vectors"))
        self.items, self._slips, self._vectors = items, slips, letters == "vectors"
        self._digits = Digits(audio_noise=audio_noise, image_noise=image_noise, energy=energy)
        self.task = "classification" if items == 1 else "correspondence"
        make = self._single if items == 1 else self._scenes
        self.train, self.val, self.test = (make(name) for name in ("train", "val", "test"))
        self.vocabulary = {} if self._vectors else {"text": len(LETTERS) + 1}
        # Letter ids have no meaningful mean: noise replaces a text by an empty one.
        text = split_statistics({"text": one_hot(self.train.inputs["text"])}) if self._vectors else {"text": (0.0, 0.0)}
        self.noise = {**split_statistics(self._digits.train.inputs), **text}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns {name: shape of the input of one item}, the input of an encoder."""
        clean = {name: tuple(values.shape[1 if self.items == 1 else 2 :]) for name, values in self.train.inputs.items()}
        return {**clean, "text": (*clean["text"], len(LETTERS))} if self._vectors else clean

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        batch, items = len(draw.index), self.items
        position = (draw.index[:, None] * items + torch.arange(items)).flatten()
        item_draw = CounterRNG(draw.seed, draw.epoch, position, draw.salt)
        flat = inputs if items == 1 else {name: values.flatten(0, 1) for name, values in inputs.items()}
        spoken = self._digits.augment({name: flat[name] for name in self._digits.names}, item_draw, train=train)
        text = misspell(flat["text"], self._slips, item_draw)
        augmented = {**spoken, "text": one_hot(text) if self._vectors else text}
        return (
            augmented
            if items == 1
            else {name: values.unflatten(0, (batch, items)) for name, values in augmented.items()}
        )

    def _single(self, name: str) -> Split:
        digits = self._digits.split(name)
        return Split({**digits.inputs, "text": _random_forms(digits.target, f"triples/{name}")}, digits.target)

    def _scenes(self, name: str) -> Split:
        """Returns as many scenes as the split has images, from the images, recordings and forms of this split."""
        digits, items = self._digits.split(name), self.items
        draw = CounterRNG(PAIRING_SEED, 0, torch.arange(len(digits)), f"triples/scenes/{name}")
        digit_sets = draw.uniform("digits", 10).argsort(dim=1)[:, :items]
        target = torch.stack(
            [digit_sets.gather(1, draw.uniform(f"order/{part}", items).argsort(dim=1)) for part in self.names], dim=1
        )
        inputs = {
            part: digits.inputs[part][_sample_candidates(target[:, column], digits.target, draw, part)]
            for column, part in enumerate(self.names)
            if part != "text"
        }
        text = _random_forms(target[:, self.names.index("text")].flatten(), f"triples/scenes/{name}")
        return Split({**inputs, "text": text.unflatten(0, (-1, items))}, target)


def _random_forms(digit: Int[Tensor, " sample"], salt: str) -> Int[Tensor, "sample length"]:
    """Returns item_draw digit in a random form, all equally likely."""
    form = CounterRNG(PAIRING_SEED, 0, torch.arange(len(digit)), salt).uniform("form", 1)[:, 0] * len(FORMS)
    return spelled_digits()[digit, form.long()]


def _sample_candidates(
    digit: Int[Tensor, "sample item"], pool: Int[Tensor, " candidate"], draw: CounterRNG, purpose: str
) -> Int[Tensor, "sample item"]:
    """Returns a random candidate of item_draw digit, all equally likely."""
    order, count = pool.argsort(stable=True), pool.bincount(minlength=10)
    first = count.cumsum(0) - count
    chosen = (draw.uniform(f"candidate/{purpose}", digit.shape[1]) * count[digit]).long()
    return order[first[digit] + chosen]
