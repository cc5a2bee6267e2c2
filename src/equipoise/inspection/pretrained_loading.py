"""Loads a decoder-only Hugging Face model with its processor from the hub, a folder, or a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from ..encoders.pretrained_weights import check_missing_weights, import_transformers, summarize_error
from ..errors import ConfigError, DataError
from .dummy_processor import DummyProcessor

AUTO_CLASSES = (
    "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM",
)  # fmt: skip
"""Auto classes of generative models; the first that supports a configuration is used."""
ENCODER_DECODERS = ("AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq")
"""Those that are also used for encoder-decoders."""

SEED = 0
"""Seed of random weights."""


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its processor, or its tokenizer for a model of text only."""

    model: Any
    processor: Any


def load_pretrained(
    source: str | Path, *, random: bool = False, revision: str | None = None,
    dtype: str | torch.dtype | None = None, device: str | torch.device | None = None, who: str = "look",
) -> LoadedModel:  # fmt: skip
    """Loads a generative model, decoder-only or an encoder-decoder, and its processor.

    Weights are loaded from safetensors only, and code from the hub is never run.

    Args:
        source: a name on the hub, or a folder written by ``save_pretrained``.
        random: initialize the weights randomly from the configuration, with a fixed seed; no weight file is needed.
            Without tokenizer files, each byte of a text is a token.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the weights; by default that of the file, and float32 for random weights.
        device: by default the accelerator if one is available, otherwise the CPU.
        who: caller that errors name.

    Returns:
        LoadedModel.

    Raises:
        ConfigError: transformers is missing, an unsupported model type, or an unknown dtype or device.
        DataError: no readable files under that name, or missing or pickled weights.

    Example:
        >>> load_pretrained("nowhere/nothing-here", dtype="float3")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        equipoise.errors.ConfigError: look dtype: expected auto, float32, bfloat16 or float16, got 'float3'.
    """
    hf = import_transformers(who)
    weight_dtype, target = model_dtype(dtype, who), pick_device(device, who)
    source = str(source)
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    config = _load(lambda: hf.AutoConfig.from_pretrained(source, **options), source, "config.json", who)
    cls = load_generative(hf, config, who)
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = cls.from_config(config, dtype=torch.float32 if weight_dtype == "auto" else weight_dtype)
    else:
        model, info = _load(
            lambda: cls.from_pretrained(
                source, dtype=weight_dtype, use_safetensors=True, output_loading_info=True, **options
            ), source, "config.json and model.safetensors", who,
        )  # fmt: skip
        check_missing_weights(model, info["missing_keys"], source, who)
    model = model.to(target).eval()
    try:
        files = "the files of a tokenizer or processor"
        return LoadedModel(model, _load(lambda: load_processor(hf, source, config, options, who), source, files, who))
    except DataError:
        if not random:
            raise
        return LoadedModel(model, DummyProcessor(model))


def load_generative(hf: Any, config: Any, who: str) -> Any:
    """Returns the auto class that builds a generative model from a configuration.

    Raises:
        ConfigError: no class supports it.
    """
    for name in AUTO_CLASSES:
        cls = getattr(hf, name, None)
        if (
            cls is not None
            and type(config) in cls._model_mapping
            and (not config.is_encoder_decoder or name in ENCODER_DECODERS)
        ):
            return cls
    raise ConfigError(
        who, expected="a generative model with images, audio or text, such as LLaVA, Whisper or Llama",
        got=f"model type '{config.model_type}'", fix="Use eq.watch(model) for other models.",
    )  # fmt: skip


def load_processor(hf: Any, source: str, config: Any, options: dict[str, Any], who: str) -> Any:
    """Loads the processor, without its video processor if only that requires a package that is not installed."""
    try:
        return hf.AutoProcessor.from_pretrained(source, **options)
    except ImportError as error:
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        cls: Any = PROCESSOR_MAPPING.get(type(config), None)
        if cls is None or "video_processor" not in cls.get_attributes():
            raise ConfigError(
                who, expected="the packages that the processor of this model requires", got=summarize_error(error),
                fix="Install the missing package.",
            ) from error  # fmt: skip
        return _without_video(hf, cls, source, options)


def _without_video(hf: Any, cls: Any, source: str, options: dict[str, Any]) -> Any:
    auto_classes = {
        "tokenizer": hf.AutoTokenizer, "image_processor": hf.AutoImageProcessor,
        "feature_extractor": hf.AutoFeatureExtractor,
    }  # fmt: skip
    parts = [
        auto_classes[name].from_pretrained(source, **options) if name in auto_classes else None
        for name in cls.get_attributes()
    ]
    settings, _ = cls.get_processor_dict(source, **options)

    class ProcessorWithoutVideo(cls):
        def check_argument_for_proper_class(self, *_: Any) -> None:
            """Skips the check, which the missing video processor would fail."""

    ProcessorWithoutVideo.__name__ = cls.__name__
    return ProcessorWithoutVideo.from_args_and_dict(parts, settings)


def model_dtype(dtype: str | torch.dtype | None, who: str) -> Any:
    """Converts a name to a torch dtype or ``"auto"``, the default."""
    dtypes = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    if dtype not in dtypes:
        raise ConfigError(f"{who} dtype", expected="auto, float32, bfloat16 or float16", got=repr(dtype))
    return dtypes[dtype]


def pick_device(device: str | torch.device | None, who: str) -> torch.device:
    """Returns the device; by default the accelerator if one is available, otherwise the CPU."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{who} device", expected="an available device, such as cpu or cuda", got=repr(str(device))
        ) from error
    return target


def _load(load_files: Any, source: str, files: str, who: str) -> Any:
    """Calls ``load_files`` and converts its errors to DataError."""
    try:
        return load_files()
    except (ConfigError, DataError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        is_folder = Path(source).is_dir()
        fix = (
            "Save model and processor there with save_pretrained(folder); pickled weights and code from the hub are "
            "not run; a configuration without weights needs random=True, or --random."
            if is_folder else "Check the name and the connection to the hub, or give a local folder."
        )  # fmt: skip
        raise DataError(
            who, expected=f"{'a folder' if is_folder else 'a folder or a name on the hub'} with {files}",
            got=f"'{source}' ({summarize_error(error)})", fix=fix,
        ) from error  # fmt: skip
