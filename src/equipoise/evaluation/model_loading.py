"""Which work fits a published model, and the model as it is read from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..encoders.pretrained_weights import import_transformers, load_model
from ..errors import DataError
from ..inspection import LoadedModel, load_pretrained
from ..inspection.pretrained_loading import pick_device

TOWERS = "AutoModelForZeroShotImageClassification"
"""Of transformers: models that bring pictures and words to one space."""


def matching_benchmark(source: str | Path) -> str:
    """The data at which a model is judged: "emoji" with two towers, "scenes" where it writes.

    BLIP-2 can be either; what the folder was saved from decides.

    Raises:
        ConfigError: transformers is missing. DataError: no configuration there.
    """
    hf = import_transformers("judge")
    config = _read(hf.AutoConfig, source, "a folder or a name on the hub with config.json")
    writes = any("ForConditionalGeneration" in name for name in config.architectures or ())
    return "emoji" if type(config) in getattr(hf, TOWERS)._model_mapping and not writes else "scenes"


def load_for_benchmark(
    data: str, source: str | Path, *, dtype: str | None = None, device: str | None = None
) -> LoadedModel:
    """The model and its processor, for that work; safetensors only, no code from the hub is run.

    Raises:
        ConfigError, DataError: as ``look.load_any``.
    """
    if data == "scenes":
        return load_pretrained(source, dtype=dtype, device=device)
    hf = import_transformers("judge")
    model = load_model(getattr(hf, TOWERS), str(source), "judge", pooled=True).to(pick_device(device)).eval()
    processor = _read(hf.AutoProcessor, source, "the files of its processor beside the model")
    words = model.config.get_text_config().vocab_size
    known = len(getattr(processor, "tokenizer", processor))
    if 2 * known < words:
        # Without its files transformers makes a tokenizer that knows nothing, and every caption would read the same.
        raise DataError(
            "judge", expected=f"a tokenizer of the model's {words} tokens", got=f"one of {known} in '{source}'",
            fix="Save its own there with tokenizer.save_pretrained(folder).",
        )  # fmt: skip
    return LoadedModel(model, processor)


def _read(cls: Any, source: str | Path, what: str) -> Any:
    """What a class of transformers finds there."""
    try:
        return cls.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            "judge", expected=what, got=f"'{source}' ({' '.join(str(error).split())[:200]})",
            fix="Save a model and its processor there with save_pretrained(folder).",
        ) from error  # fmt: skip
