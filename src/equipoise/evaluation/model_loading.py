"""Chooses the benchmark for a pretrained model and loads it from disk or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..encoders.pretrained_weights import import_transformers, load_model, summarize_error
from ..errors import DataError
from ..inspection import LoadedModel, load_pretrained
from ..inspection.pretrained_loading import pick_device

DUAL_ENCODER_CLASS = "AutoModelForZeroShotImageClassification"
"""Auto class of transformers for CLIP-like models."""


def matching_benchmark(source: str | Path) -> str:
    """Returns the benchmark for a model: "emoji" for two-tower models, "scenes" for generative models.

    BLIP-2 can be either; ``architectures`` in its configuration decides.

    Raises:
        ConfigError: transformers is missing. DataError: no configuration found.
    """
    hf = import_transformers("evaluate")
    config = _from_pretrained(hf.AutoConfig, source, "a folder or a name on the hub with config.json")
    generative = any("ForConditionalGeneration" in name for name in config.architectures or ())
    is_dual_encoder = type(config) in getattr(hf, DUAL_ENCODER_CLASS)._model_mapping
    return "emoji" if is_dual_encoder and not generative else "scenes"


def load_for_benchmark(
    data: str, source: str | Path, *, dtype: str | None = None, device: str | None = None
) -> LoadedModel:
    """Loads a model and its processor for a benchmark; safetensors only, code from the Hub is never run.

    ``minimal_pairs`` takes two-tower models and generative models; ``matching_benchmark`` decides.

    Raises:
        ConfigError, DataError: as in ``equipoise.inspection.load_pretrained``.
    """
    if data == "minimal_pairs":
        data = matching_benchmark(source)
    if data == "scenes":
        return load_pretrained(source, dtype=dtype, device=device, who="evaluate")
    hf = import_transformers("evaluate")
    model = load_model(getattr(hf, DUAL_ENCODER_CLASS), str(source), "evaluate", pooled=True)
    processor = _from_pretrained(hf.AutoProcessor, source, "the files of the processor next to the model")
    vocabulary = model.config.get_text_config().vocab_size
    vocabulary_size = len(getattr(processor, "tokenizer", processor))
    if 2 * vocabulary_size < vocabulary:
        # Without its files transformers builds an empty tokenizer, which would encode all captions alike.
        raise DataError(
            "evaluate",
            expected=f"a tokenizer of the model's {vocabulary} tokens",
            got=f"one of {vocabulary_size} in '{source}'",
            fix="Save the model's tokenizer there with tokenizer.save_pretrained(folder).",
        )
    return LoadedModel(model.to(pick_device(device, "evaluate")).eval(), processor)


def _from_pretrained(cls: Any, source: str | Path, expected: str) -> Any:
    """Calls ``cls.from_pretrained`` and converts its errors to DataError."""
    try:
        return cls.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            "evaluate", expected=expected, got=f"'{source}' ({summarize_error(error)})",
            fix="Save a model and its processor there with save_pretrained(folder).",
        ) from error  # fmt: skip
