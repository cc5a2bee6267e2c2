"""Winoground scores of pretrained models on ``minimal_pairs``, by kind of pair, also with blank images."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..alignment import winoground
from ..data.sets.minimal_pairs import MinimalPair, MinimalPairs
from ..errors import ConfigError, ShapeError
from ..inspection.media_effects import mean_log_likelihood
from ..inspection.prompt_inputs import complete_inputs, prepare_prompt, tokenizer_of
from ..io.atomic_files import atomic_write
from ..nn.eval_mode import eval_mode_no_grad
from .contrastive_models import CaptionTokenizer, wrap_dual_encoder
from .generative_models import DESCRIBE, SIDE, to_pil_image

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "caption": 1 / 2}
"""Expected values of random scores."""
COLUMNS = ("pair", "kind", "caption_0", "caption_1", "s_00", "s_01", "s_10", "s_11", "blank_0", "blank_1")
Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, eq=False, repr=False)
class MinimalPairScores:
    """Scores of a model for minimal pairs.

    Attributes:
        pairs: the pairs.
        scores: (pair, image, caption): cosines, or log p(caption | image) in nats.
        blank: (pair, caption): the same with a gray image instead of each image.
        name: name of the model.
    """

    pairs: Sequence[MinimalPair]
    scores: Float[Tensor, "pair 2 2"]
    blank: Float[Tensor, "pair 2"]
    name: str = "model"

    def __post_init__(self) -> None:
        count = len(self.pairs)
        if not count or self.scores.shape != (count, 2, 2) or self.blank.shape != (count, 2):
            raise ShapeError(
                "MinimalPairScores", expected="pairs, scores (pair, 2, 2) and blank (pair, 2)",
                got=f"{count} pairs, {tuple(self.scores.shape)} and {tuple(self.blank.shape)}",
            )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Returns the fractions of solved pairs.

        ``text``, ``image`` and ``group`` are those of ``winoground``; ``caption`` is the fraction of images whose own
        caption has the higher score (chance 1/2). ``text/color`` counts pairs of that kind only. ``.../blank`` is with
        the same gray image in both places; ``text/minus_blank``, ``group/minus_blank`` and ``caption/minus_blank``
        are of the scores minus those with the gray image, which removes a preference for one of the captions.
        """
        kinds = [pair.kind for pair in self.pairs]
        same = self.blank[:, None].expand(-1, 2, -1)
        conditions = {"": self.scores, "/minus_blank": self.scores - same, "/blank": same}
        metrics = {}
        for suffix, scores in conditions.items():
            for kind in (None, *dict.fromkeys(kinds)):
                rows = [n for n, other in enumerate(kinds) if kind in (None, other)]
                result = {**winoground(scores[rows])._asdict(), "caption": _own_caption(scores[rows])}
                if suffix == "/minus_blank":
                    # Subtracting the same number from both images does not change the choice of the image.
                    del result["image"]
                metrics |= {f"{name}{f'/{kind}' if kind else ''}{suffix}": value for name, value in result.items()}
        return metrics

    def intervals(self) -> dict[str, list[float]]:
        """Returns the 95 % Wilson interval of each metric over the pairs.

        The two images of a pair are not independent, so ``caption`` counts pairs, which makes its interval wide.
        """
        counts = {pair.kind: sum(other.kind == pair.kind for other in self.pairs) for pair in self.pairs}
        totals = {
            name: next((counts[part] for part in name.split("/") if part in counts), len(self.pairs))
            for name in self.metrics()
        }  # fmt: skip
        return {name: wilson_interval(value, totals[name]) for name, value in self.metrics().items()}

    def table(self) -> str:
        """Returns a text table: one row for each kind, in percent, with 95 % intervals."""
        metrics, intervals = self.metrics(), self.intervals()
        kinds = [pair.kind for pair in self.pairs]
        names = ("text", "image", "group", "text/minus_blank", "caption", "caption/blank")
        lines = ["kind     pairs" + "".join(f"{name:>22}" for name in names)]
        for kind in (None, *dict.fromkeys(kinds)):
            cells = []
            for name in names:
                first, _, rest = name.partition("/")
                key = "/".join(part for part in (first, kind, rest) if part)
                low, high = intervals[key]
                cells.append(f"{100 * metrics[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]".rjust(22))
            count = len(kinds) if kind is None else kinds.count(kind)
            lines.append(f"{kind or 'all':<8} {count:>5}" + "".join(cells))
        chance = [CHANCE[name.partition("/")[0]] for name in names]
        lines.append("chance        " + "".join(f"{100 * value:.1f}".rjust(22) for value in chance))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.table()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``pairs.csv``, one row for each pair, and returns its path."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, (pair, scores, blank) in enumerate(zip(self.pairs, self.scores, self.blank, strict=True)):
            writer.writerow([number, pair.kind, *pair.captions, *scores.flatten().tolist(), *blank.tolist()])
        return atomic_write(Path(folder) / "pairs.csv", text.getvalue())


def score_pairs(
    model: Any, processor: Any, source: MinimalPairs, *, split: str = "test", template: str = "{}",
    name: str | None = None, progress: Callable[[], None] = lambda: None,
) -> MinimalPairScores:  # fmt: skip
    """Scores both captions of each pair with both images and with a gray image.

    ::

        two-tower model:   s(image, caption) = cosine of the embeddings
        generative model:  s(image, caption) = sum over the caption's tokens of log p(token | image, prompt, all before)

    The gray image has the mean of all training images, as in the benchmark ``scenes``. Images are enlarged to 192
    pixels.

    Args:
        model: a two-tower model (CLIP, SigLIP), or a generative vision-language model. It is not trained or changed.
        processor: its processor.
        source: the data set ``minimal_pairs``.
        split: "train", "val" or "test".
        template: text with ``{}`` in place of the caption, for two-tower models.
        name: name of the model in the results.
        progress: called after every pair.

    Raises:
        ConfigError: another data set or model, or a template without ``{}``.

    Reference: Thrush et al., Winoground (CVPR 2022); scores of generative models: Lin et al., "Revisiting the role of
    language priors in vision-language models" (ICML 2024).
    """
    if not isinstance(source, MinimalPairs):
        raise ConfigError("score_pairs", expected="the data set minimal_pairs", got=type(source).__name__)
    pairs = source.pairs(split)
    level = round(source.train.inputs["image"].float().mean().item())
    gray = Image.new("RGB", (SIDE, SIDE), (level, level, level))
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError("score_pairs", expected="a two-tower model or a decoder-only vision-language model",
                          got=f"the encoder-decoder {type(model).__name__}")  # fmt: skip
    score = _generative(model, processor) if model.can_generate() else _contrastive(model, processor, template)
    rows = []
    with eval_mode_no_grad(model):
        for number, pair in enumerate(pairs):
            images = [to_pil_image(source, split, 2 * number + one) for one in (0, 1)]
            rows.append(score([*images, gray], pair.captions))
            progress()
    table = torch.stack(rows)
    label = name or getattr(model, "name_or_path", "") or type(model).__name__
    return MinimalPairScores(pairs, table[:, :2], table[:, 2], label)


def wilson_interval(rate: float, count: int) -> list[float]:
    """Returns the 95 % Wilson score interval of a fraction of ``count`` samples.

    Reference: Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 1927).

    Example:
        >>> [round(end, 3) for end in wilson_interval(0.5, 100)]
        [0.404, 0.596]
    """
    square = Z**2 / count
    center, half = rate + square / 2, Z * math.sqrt(rate * (1 - rate) / count + square / (4 * count))
    return [max(0.0, (center - half) / (1 + square)), min(1.0, (center + half) / (1 + square))]


Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Float[Tensor, "image caption"]]


def _own_caption(scores: Float[Tensor, "pair 2 2"]) -> float:
    own, other = scores.diagonal(dim1=1, dim2=2), scores.flip(2).diagonal(dim1=1, dim2=2)
    return float(((own > other).double() + (own == other).double() / 2).mean())


def _contrastive(model: Any, processor: Any, template: str) -> Scorer:
    encoder, siglip = wrap_dual_encoder(model, processor)
    tokenize = CaptionTokenizer(processor, template=template, pad_to_limit=siglip)

    def score(images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        device = next(model.parameters()).device
        given = {"image": pixels.to(device), "text": tokenize(captions).to(device)}
        embedded = encoder.embed(given)
        products = embedded["image"] @ embedded["text"].T
        return (products.amax(dim=1) if products.ndim == 3 else products).double().cpu()

    return score


def _generative(model: Any, processor: Any) -> Scorer:
    tokenizer = tokenizer_of(processor)

    def score(images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        return torch.tensor([list(_caption_scores(image, captions)) for image in images], dtype=torch.float64)

    def _caption_scores(image: Image.Image, captions: Sequence[str]) -> Iterator[float]:
        inputs = prepare_prompt(model, processor, DESCRIBE, image).inputs
        for caption in captions:
            ids = tokenizer(caption, add_special_tokens=False, return_tensors="pt")["input_ids"]
            complete = complete_inputs(inputs, ids, model.config.model_type)
            logits = model(**complete, use_cache=False).logits[0]
            yield len(ids[0]) * mean_log_likelihood(logits, ids[0])

    return score
