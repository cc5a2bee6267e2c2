"""The pairs of av_digits as token features of two frozen pretrained encoders: Whisper (audio) and DINOv2 (image).

    python benchmarks/rollingq_study.py run av_digits --pretrained MODELS/whisper-tiny.en MODELS/dinov2-small ...

Samples, splits and images (reconstructions from four principal components) are those of av_digits. The recordings are
the published waveforms, padded to 0.64 s, with white noise of the same energy (``snr`` = 0 dB), of one seed for each
recording. Whisper's encoder reads one second in place of 30 (the first 50 of its positions); its first 32 tokens are
kept. Images are enlarged to 56 x 56 pixels: 16 patches and the class token. Both are standardized by training features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from scipy.signal import resample_poly
from torch import Tensor

from equipoise.data.data_root import find_data_dir
from equipoise.data.dataset import Split, standardize
from equipoise.data.label_pairing import match_by_label
from equipoise.data.log_mel_spectrogram import RATE, framed
from equipoise.data.sets.av_digits import FLOOR, SPEAKERS, AVDigits
from equipoise.data.sets.av_digits import _voices as voices_of_splits
from equipoise.data.sets.spoken_digits_files import read_recordings, read_wav
from equipoise.data.user_datasets import TensorDataset
from equipoise.errors import ConfigError

TOKENS = 32
BATCH = 128


def load_waveforms(folder: Path, snr: float) -> list[Tensor]:
    """Returns (sample,) waveforms at 16 kHz with noise, in the order of digit, speaker and take."""
    labels = {path: path.stem.split("_") for path in folder.glob("*.wav")}
    found = []
    for path in sorted(labels, key=lambda path: (int(labels[path][0]), labels[path][1], int(labels[path][2]))):
        clean = framed(read_wav(path))
        noise = torch.randn(len(clean), generator=torch.Generator().manual_seed(len(found)))
        noisy = clean + noise * clean.std() * 10 ** (-snr / 20)
        found.append(torch.from_numpy(resample_poly(noisy.numpy(), 16_000, RATE)))
    return found


@torch.no_grad()
def audio_features(folder: Path, waveforms: list[Tensor]) -> Tensor:
    """Returns (recording, 32, dim), the output of Whisper's encoder on one second."""
    model: Any = transformers.WhisperModel.from_pretrained(folder).eval().encoder
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder, chunk_length=1)
    seconds = model.config.max_source_positions // 50
    model.config.max_source_positions //= seconds
    model.max_source_positions = model.config.max_source_positions
    model.embed_positions = torch.nn.Embedding.from_pretrained(model.embed_positions.weight[:50])
    parts = []
    for start in range(0, len(waveforms), BATCH):
        chunk = [one.numpy() for one in waveforms[start : start + BATCH]]
        inputs = extractor(chunk, sampling_rate=16_000, return_tensors="pt")
        parts.append(model(inputs.input_features).last_hidden_state[:, :TOKENS])
    return torch.cat(parts)


@torch.no_grad()
def image_features(folder: Path, images: Tensor) -> Tensor:
    """Returns (image, 17, dim), the output of DINOv2; ``images`` (image, 1, 28, 28) are standardized."""
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    parts = []
    for chunk in images.split(BATCH):
        pixels = torch.nn.functional.interpolate(chunk, size=(56, 56), mode="bicubic").div(6).add(0.5).clamp(0, 1)
        parts.append(model((pixels - mean[:, None, None]) / std[:, None, None]).last_hidden_state)
    return torch.cat(parts)


def pretrained_digits(audio: Path, image: Path, fold: str, cache: Path, snr: float = 0.0) -> TensorDataset:
    """Returns the data set of one fold; features are computed once and kept in ``cache``.

    Raises:
        ConfigError: the features in ``cache`` are those of other encoders or another ``snr``.
    """
    source = AVDigits(fold=fold)
    folder = find_data_dir("fsdd/recordings", None, "It contains the Free Spoken Digit Dataset.")
    file, encoders = cache / f"features_{fold}.pt", f"{audio.name}, {image.name}, snr {snr:g}"
    if not file.is_file():
        voices = audio_features(audio, load_waveforms(folder, snr))
        images = {name: image_features(image, source.split(name).inputs["image"]) for name in ("train", "val", "test")}
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"voices": voices, "images": images, "encoders": encoders}, file)
    kept = torch.load(file, weights_only=True)
    if kept.get("encoders", encoders) != encoders:
        raise ConfigError(
            str(file), expected=f"features of {encoders}", got=kept["encoders"], fix="Choose another --out."
        )
    spoken = read_recordings(folder, SPEAKERS, FLOOR)
    inputs = {}
    for name, rows in voices_of_splits(spoken, fold).items():
        partner = match_by_label(source.split(name).target, spoken.digit[rows], f"av_digits/{fold}/{name}")
        inputs[name] = {"audio": kept["voices"][rows[partner]], "image": kept["images"][name]}
    reference = inputs["train"]
    splits = [
        Split(
            {key: standardize(values, reference[key]) for key, values in inputs[name].items()},
            source.split(name).target, groups=source.split(name).groups,
        )
        for name in ("train", "val", "test")
    ]  # fmt: skip
    return TensorDataset(*splits, num_outputs=10)
