"""VisionLanguageModel: a trainable vision-language model with its losses and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...alignment import captioning_loss
from ...data.sets.scenes import IGNORED
from ...errors import ConfigError
from ...io.class_registry import instantiate
from ..self_contained import SelfContainedModel
from .grounding import pointing_metrics
from .image_conditioned_lm import ImageConditionedLM, select_samples
from .vlm_evaluation import evaluate_vlm


class VisionLanguageModel(ImageConditionedLM, SelfContainedModel):
    """A small vision-language model that answers questions about images and describes them.

    The image's patches, without the encoder's class token, pass through the connector and replace ``<image>`` in the
    text (LLaVA), or gated cross-attention in front of every block attends to them (Flamingo). The loss is the
    next-token cross entropy of answers plus that of captions; words of questions are inputs only.

    Args:
        encoder: image encoder that returns Tokens.
        words: vocabulary; contains "<image>", "<end>" and "<pad>".
        connector: ``"linear"``, ``"mlp"``, ``"qformer"``, ``"resampler"`` or ``"gated"``.
        dim: width of the language model.
        depth: number of its blocks.
        heads: number of its attention heads.
        latents: number of tokens per image of a Q-Former or a resampler.
        context: maximum number of tokens, including those of the image.

    Raises:
        ConfigError: options out of range, an unknown connector, transformers is not installed, or a batch without
            image or text. ShapeError: images of another size, a text longer than the context, or a text without
            ``<image>``.

    Reference: LLaVA (NeurIPS 2023), BLIP-2 (ICML 2023), Flamingo (NeurIPS 2022).
    Differs from the papers in: the model is small, and all parts are trained jointly from scratch.
    """

    name = "vision_language_model"

    @classmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> VisionLanguageModel:
        words = getattr(source, "lexicon", None)
        if words is None or "image" not in source.names:
            raise ConfigError(
                "model 'vision_language_model'", expected="a data set of images and texts", got=type(source).__name__,
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
        # Keep the two losses separate: captions have many more tokens than answers and would dominate.
        answers = stream.labels.masked_fill(captions[:, None], IGNORED)
        descriptions = stream.labels.masked_fill(~captions[:, None], IGNORED)
        return {"answer": captioning_loss(logits, answers), "caption": captioning_loss(logits, descriptions)}

    def evaluate(self, source: Any) -> dict[str, Any]:
        row = evaluate_vlm(self, source)
        return {**row, "metrics": row["metrics"] | pointing_metrics(self, source)}
