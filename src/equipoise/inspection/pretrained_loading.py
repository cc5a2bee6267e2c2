"""Any Hugging Face model that writes text, with its processor; from the hub, a folder, or a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from ..encoders.pretrained_weights import import_transformers
from ..errors import ConfigError, DataError
from .dummy_processor import DummyProcessor

WRITERS = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
"""Classes of transformers whose models write text; the first that knows a configuration is taken."""

SEED = 0
"""Of random weights."""


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its processor, or its tokenizer where it reads text alone."""

    model: Any
    processor: Any


def load_pretrained(
    source: str | Path, *, random: bool = False, revision: str | None = None,
    dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
) -> LoadedModel:  # fmt: skip
    """A model that writes text, and its processor.

    Args:
        source: a name on the hub, or a folder as ``save_pretrained`` writes it.
        random: random weights, always the same, of the configuration; no file of weights is read, or need be there.
            Without files of a tokenizer, every byte of a text is a token.
        revision: branch, tag or commit on the hub.
        dtype: of the weights; by default that of the file, and single precision for random ones.
        device: by default the accelerator where there is one.

    Returns:
        Loaded.

    Raises:
        ConfigError: transformers is missing, a model of another kind, an unknown dtype or device.
        DataError: nothing readable under that name; weights that are missing, or pickled.

    Weights are read as safetensors only, and code from the hub is never run.

    Example:
        >>> load_pretrained("nowhere/nothing-here", dtype="float3")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        equipoise.errors.ConfigError: look dtype: expected auto, float32, bfloat16 or float16, got 'float3'.
    """
    hf = import_transformers("look")
    kind, place = model_dtype(dtype), pick_device(device)
    source = str(source)
    where: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        where["revision"] = revision
    config = _read(lambda: hf.AutoConfig.from_pretrained(source, **where), source, "config.json")
    cls = load_generative(hf, config)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = cls.from_config(config, dtype=torch.float32 if kind == "auto" else kind)
    else:
        model, found = _read(
            lambda: cls.from_pretrained(
                source, dtype=kind, use_safetensors=True, output_loading_info=True, **where
            ), source, "config.json and model.safetensors",
        )  # fmt: skip
        if missing := sorted(found["missing_keys"]):
            raise DataError(
                "look", expected=f"all weights of a {type(model).__name__}",
                got=f"'{source}', which lacks {missing[0]}", fix="Give the folder of a model of this kind.",
            )  # fmt: skip
    model = model.to(place).eval()
    try:
        what = "the files of a tokenizer or processor"
        return LoadedModel(model, _read(lambda: load_processor(hf, source, config, where), source, what))
    except DataError:
        if not random:
            raise
        return LoadedModel(model, DummyProcessor(model))


def load_generative(hf: Any, config: Any) -> Any:
    """The class of transformers that builds a model which writes text out of this configuration.

    Raises:
        ConfigError: there is none.
    """
    for name in WRITERS:
        cls = getattr(hf, name, None)
        if cls is not None and type(config) in cls._model_mapping and not config.is_encoder_decoder:
            return cls
    raise ConfigError(
        "look", expected="a model that reads and writes one sequence of tokens, such as LLaVA, Qwen-VL or Llama",
        got=f"one of type '{config.model_type}'", fix="Watch any other model with eq.watch(model).",
    )  # fmt: skip


def load_processor(hf: Any, source: str, config: Any, where: dict[str, Any]) -> Any:
    """The processor; without its part for videos, where only that needs a package that is not installed."""
    try:
        return hf.AutoProcessor.from_pretrained(source, **where)
    except ImportError as error:
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        cls: Any = PROCESSOR_MAPPING.get(type(config), None)
        if cls is None or "video_processor" not in cls.get_attributes():
            raise ConfigError(
                "look", expected="what the processor of this model needs", got=_line(error), fix="Install it."
            ) from error
        return _without_video(hf, cls, source, where)


def _without_video(hf: Any, cls: Any, source: str, where: dict[str, Any]) -> Any:
    readers = {
        "tokenizer": hf.AutoTokenizer, "image_processor": hf.AutoImageProcessor,
        "feature_extractor": hf.AutoFeatureExtractor,
    }  # fmt: skip
    parts = [
        readers[name].from_pretrained(source, **where) if name in readers else None for name in cls.get_attributes()
    ]
    settings, _ = cls.get_processor_dict(source, **where)

    class Still(cls):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            """The missing part is of no class."""

    Still.__name__ = cls.__name__
    return Still.from_args_and_dict(parts, settings)


def model_dtype(dtype: str | torch.dtype | None) -> Any:
    """A dtype of torch, or ``"auto"``."""
    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    if dtype not in known:
        raise ConfigError("look dtype", expected="auto, float32, bfloat16 or float16", got=repr(dtype))
    return known[dtype]


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant; by default the accelerator where there is one."""
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "look device", expected="a device of this computer, such as cpu or cuda", got=repr(str(device))
        ) from error
    return place


def _read(load: Any, source: str, what: str) -> Any:
    """What is read from a folder or from the hub, or an error that tells what is missing."""
    try:
        return load()
    except (ConfigError, DataError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        there = Path(source).is_dir()
        fix = (
            "Save model and processor there with save_pretrained(folder); pickled weights and code from the hub are "
            "not run; a configuration without weights needs random=True, or --random."
            if there else "Is the name right, and the hub within reach? A folder on this computer does without it."
        )  # fmt: skip
        raise DataError(
            "look", expected=f"{'a folder' if there else 'a folder or a name on the hub'} with {what}",
            got=f"'{source}' ({_line(error)})", fix=fix,
        ) from error  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
