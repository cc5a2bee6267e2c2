"""``judge``: a model that somebody else trained, in the same evaluation as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from ..data import Dataset
from ..data.emoji import Emoji
from ..data.scenes import Scenes
from ..errors import ConfigError
from ..evaluation import evaluating
from ..language.judging import Picture, scored
from .pointing import judged_pointing
from .spaces import PretrainedSpace, Shown, judged_space
from .writers import Writer, replies


def judge(
    model: Any, processor: Any, source: Dataset, *, split: str = "test", samples: int | None = None,
    template: str = "{}", progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """The figures of a model of Hugging Face at the emoji or the scenes, named as those of our own models.

    Args:
        model: two towers (CLIP, SigLIP, BLIP-2 for retrieval) for ``Emoji``; one that reads pictures and writes
            (LLaVA, Qwen-VL, ...) for ``Scenes``. Nothing in it is trained or changed.
        processor: its own.
        source: the data.
        split: "val" or "test".
        samples: of the scenes, the first so many; all by default. The emoji are always judged whole, since every
            caption is found among all others.
        template: what captions are put into for two towers, such as ``"an emoji of {}"``.
        progress: is called after every reply and every word.

    Returns:
        metric -> number: what ``space.figures.judged`` says, or ``language.judging.judged`` with pointing.

    Raises:
        ConfigError: data of another kind, a model of another kind, fewer than one sample.
    """
    with evaluating(model):
        if isinstance(source, Emoji):
            siglip = "siglip" in str(getattr(model.config, "model_type", ""))
            tokenizer = getattr(processor, "tokenizer", processor)
            padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else -1
            closes = padding == tokenizer.eos_token_id
            space = PretrainedSpace(model, padding=padding, attends=not siglip, closes=closes)
            return judged_space(space, Shown(source, processor, template=template, fixed=siglip), split)
        if not isinstance(source, Scenes):
            raise ConfigError("judge", expected="the data emoji or scenes", got=type(source).__name__)
        count = len(source.split(split)) if samples is None else min(samples, len(source.split(split)))
        if count < 1:
            raise ConfigError("judge", expected="samples >= 1", got=f"samples = {samples}")
        return _written(Writer(model, processor), source, split, count, progress)


def _written(
    writer: Writer, source: Scenes, split: str, count: int, progress: Callable[[], None]
) -> dict[str, float]:  # fmt: skip
    metrics: dict[str, float] = {}
    for picture in get_args(Picture):
        said = dict(replies(writer, source, split, count, picture, progress))
        metrics |= scored(said, source, split, picture)
    return metrics | judged_pointing(writer, source, split, count, progress)
