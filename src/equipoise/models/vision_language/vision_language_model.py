"""The reader of pictures as what a recipe trains: its losses, and its judgment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...alignment import captioning_loss
from ...data.sets.scenes import IGNORED
from ...errors import ConfigError
from ...registry import instantiate
from ..self_contained import SelfContainedModel
from .grounding import pointing_metrics
from .image_conditioned_lm import ImageConditionedLM, select_samples
from .vlm_evaluation import evaluate_vlm


class VisionLanguageModel(ImageConditionedLM, SelfContainedModel):
    """A small vision-language model: it answers questions about pictures and describes them.

    The picture's patches, without the encoder's class token, go through the connector and stand in the text where it
    has ``<image>`` (LLaVA), or are read by gated cross-attention in front of every block (Flamingo). The loss is the
    next-token cross entropy of answers, plus that of captions; words of a question are read and not predicted.

    Args:
        encoder: pictures -> Tokens.
        words: the vocabulary; it holds "<image>", "<end>" and "<pad>".
        connector: ``"linear"``, ``"mlp"``, ``"qformer"``, ``"resampler"`` or ``"gated"``.
        dim: width of the language model.
        depth: its blocks.
        heads: its attention heads.
        latents: tokens that a Q-Former or a resampler makes of a picture.
        context: the most tokens that it reads, those of the picture included.

    Raises:
        ConfigError: options out of range, an unknown connector, transformers that is not installed, a batch without
            picture or without text. ShapeError: pictures of another size, a text longer than the context, a text
            without its picture.

    Reference: LLaVA (NeurIPS 2023), BLIP-2 (ICML 2023), Flamingo (NeurIPS 2022); spec 7.4 to 7.7.
    Differs from the papers in: everything is small and trained from scratch, all parts at once.
    """

    name = "vision_language_model"

    @classmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> VisionLanguageModel:
        words = getattr(source, "lexicon", None)
        if words is None or "image" not in source.names:
            raise ConfigError(
                "model 'vision_language_model'", expected="a data set of pictures and texts", got=type(source).__name__,
                fix="Use data: {name: scenes}.",
            )  # fmt: skip
        if set(encoders) != {"image"}:
            raise ConfigError("model 'vision_language_model'", expected="one encoder, image", got=f"{sorted(encoders)}")
        return instantiate(cls, "model 'vision_language_model'", options, encoder=encoders["image"], words=words)

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stream = self.stream(
            self.patches(select_samples(batch, "image")), select_samples(batch, "text"), select_samples(batch, "labels")
        )
        logits, captions = self.logits(stream), select_samples(batch, "target") == IGNORED
        # Apart, since the many words of captions would drown the single ones of answers.
        answers = stream.labels.masked_fill(captions[:, None], IGNORED)
        described = stream.labels.masked_fill(~captions[:, None], IGNORED)
        return {"answer": captioning_loss(logits, answers), "caption": captioning_loss(logits, described)}

    def evaluate(self, source: Any) -> dict[str, Any]:
        row = evaluate_vlm(self, source)
        return {**row, "metrics": row["metrics"] | pointing_metrics(self, source)}
