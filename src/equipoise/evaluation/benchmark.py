"""``evaluate``: benchmarks a pretrained model with the metrics of our own models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from ..data import Dataset
from ..data.sets.emoji import Emoji
from ..data.sets.minimal_pairs import MinimalPairs
from ..data.sets.scenes import Scenes
from ..errors import ConfigError
from ..models.vision_language.vlm_evaluation import ImageCondition, score_answers
from ..nn.eval_mode import eval_mode_no_grad
from .contrastive_models import ProcessedDataset, evaluate_contrastive, wrap_dual_encoder
from .generative_models import GenerativeVLM, pretrained_answers
from .minimal_pair_scores import score_pairs
from .pointing import evaluate_pointing


def evaluate(
    model: Any, processor: Any, source: Dataset, *, split: str = "test", samples: int | None = None,
    template: str = "{}", progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Evaluates a Hugging Face model on ``emoji``, ``scenes`` or ``minimal_pairs``.

    Args:
        model: a two-tower model (CLIP, SigLIP, BLIP-2 for retrieval) for ``Emoji``, or a generative vision-language
            model (LLaVA, Qwen-VL, ...) for ``Scenes``; either for ``MinimalPairs``. It is not trained or changed.
        processor: processor of the model.
        source: data set.
        split: "val" or "test".
        samples: number of leading samples of ``Scenes``; all by default. The other data sets are always evaluated in
            full.
        template: caption template for two-tower models, such as ``"an emoji of {}"``.
        progress: called after every reply, word and pair.

    Returns:
        metric name -> value: the metrics of ``evaluate_dual_encoder``, those of ``evaluate_vlm`` and
        ``evaluate_pointing``, as of our own models; or those of ``MinimalPairScores``.

    Raises:
        ConfigError: an unsupported data set or model, or fewer than one sample.
    """
    with eval_mode_no_grad(model):
        if isinstance(source, MinimalPairs):
            return score_pairs(model, processor, source, split=split, template=template, progress=progress).metrics()
        if isinstance(source, Emoji):
            encoder, siglip = wrap_dual_encoder(model, processor)
            dataset = ProcessedDataset(source, processor, template=template, pad_to_limit=siglip)
            return evaluate_contrastive(encoder, dataset, split)
        if not isinstance(source, Scenes):
            raise ConfigError(
                "evaluate", expected="the data set emoji, scenes or minimal_pairs", got=type(source).__name__
            )
        count = len(source.split(split)) if samples is None else min(samples, len(source.split(split)))
        if count < 1:
            raise ConfigError("evaluate", expected="samples >= 1", got=f"samples = {samples}")
        return _evaluate_generative(GenerativeVLM(model, processor), source, split, count, progress)


def _evaluate_generative(
    vlm: GenerativeVLM, source: Scenes, split: str, count: int, progress: Callable[[], None]
) -> dict[str, float]:  # fmt: skip
    metrics: dict[str, float] = {}
    for condition in get_args(ImageCondition):
        replies = dict(pretrained_answers(vlm, source, split, count, condition, progress))
        metrics |= score_answers(replies, source, split, condition)
    return metrics | evaluate_pointing(vlm, source, split, count, progress)
