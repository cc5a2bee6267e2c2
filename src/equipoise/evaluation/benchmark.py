"""``judge``: a model that somebody else trained, in the same evaluation as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from ..data import Dataset
from ..data.sets.emoji import Emoji
from ..data.sets.scenes import Scenes
from ..errors import ConfigError
from ..models.vision_language.vlm_evaluation import Picture, score_answers
from ..nn.eval_mode import eval_mode_no_grad
from .contrastive_models import PretrainedDualEncoder, ProcessedDataset, evaluate_contrastive
from .generative_models import GenerativeVLM, pretrained_answers
from .pointing import evaluate_pointing


def evaluate(
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
    with eval_mode_no_grad(model):
        if isinstance(source, Emoji):
            siglip = "siglip" in str(getattr(model.config, "model_type", ""))
            tokenizer = getattr(processor, "tokenizer", processor)
            padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else -1
            closes = padding == tokenizer.eos_token_id
            space = PretrainedDualEncoder(model, padding=padding, attends=not siglip, closes=closes)
            return evaluate_contrastive(
                space, ProcessedDataset(source, processor, template=template, fixed=siglip), split
            )
        if not isinstance(source, Scenes):
            raise ConfigError("judge", expected="the data emoji or scenes", got=type(source).__name__)
        count = len(source.split(split)) if samples is None else min(samples, len(source.split(split)))
        if count < 1:
            raise ConfigError("judge", expected="samples >= 1", got=f"samples = {samples}")
        return _written(GenerativeVLM(model, processor), source, split, count, progress)


def _written(
    writer: GenerativeVLM, source: Scenes, split: str, count: int, progress: Callable[[], None]
) -> dict[str, float]:  # fmt: skip
    metrics: dict[str, float] = {}
    for picture in get_args(Picture):
        said = dict(pretrained_answers(writer, source, split, count, picture, progress))
        metrics |= score_answers(said, source, split, picture)
    return metrics | evaluate_pointing(writer, source, split, count, progress)
