"""Miniature raw copies of the published data sets, in the layouts in which they are distributed."""

import pickle
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from equipoise.data.layouts import find_layout, prepare

EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
ACTORS = [1001 + i for i in range(10)]
SMALL = {"cremad": {"size": 8}, "kinetics_sounds": {"size": 8}, "ucf101": {"size": 8}, "hmdb51": {"size": 8}}
LAYOUTS = ("cremad", "kinetics_sounds", "mosei", "mosi", "av_mnist", "ucf101", "hmdb51")


def write_wav(path, *, seconds=0.1, rate=16_000, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    soundfile.write(path, values, rate)


def write_images(folder, count, *, gray=False, name="frame_{:05d}.jpg", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(1, count + 1):
        shape = (12, 16) if gray else (12, 16, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name.format(number))


def make_cremad(root):
    """Ten actors, each with two emotions: 20 clips, of which the last two of the list are for the test."""
    stems = [
        f"{actor}_DFA_{EMOTIONS[(index + k) % 6]}_XX" for index, actor in enumerate(ACTORS) for k in range(2)
    ]  # fmt: skip
    for seed, stem in enumerate(stems):
        write_wav(root / "AudioWAV" / f"{stem}.wav", seed=seed)
        write_images(root / "Image-01-FPS" / stem, 2, name="{:05d}.jpg", seed=seed)
    for name, part in (("train", stems[:-4]), ("test", stems[-4:])):
        lines = "".join(f"{stem},{stem.split('_')[2]}\n" for stem in part)
        (root / f"{name}.csv").write_text(lines, encoding="utf-8-sig")


def make_kinetics_sounds(root):
    """Sixteen clips of four classes; half of the sounds are arrays, half wav files."""
    clips = {"train": [f"clip{i:07d}_000010_000020" for i in range(12)], "test": [f"test{i:07d}" for i in range(4)]}
    for split, names in clips.items():
        (root / f"my_{split}.txt").parent.mkdir(parents=True, exist_ok=True)
        (root / f"my_{split}.txt").write_text("".join(f"{name},10,{i % 4}\n" for i, name in enumerate(names)))
        for seed, name in enumerate(names):
            write_images(root / "visual" / name, 9, seed=seed)
            if seed % 2:
                write_wav(root / "audio" / f"{name}.wav", seed=seed)
            else:
                (root / "audio").mkdir(exist_ok=True)
                np.save(
                    root / "audio" / f"{name}.npy", np.random.default_rng(seed).normal(size=(1024, 128)).astype("f")
                )


def sentiment_content(sizes, ids, *, widths=(6, 4, 3), steps=5):
    """A pickle's content: {split: text, audio, vision, labels, id}."""
    rng, content, start = np.random.default_rng(0), {}, 0
    for split, count in sizes.items():
        part = {
            name: rng.normal(size=(count, steps, width)).astype("float32")
            for name, width in zip(("text", "audio", "vision"), widths, strict=True)
        }
        # Words begin at the second step.
        part["text"][:, 0] = 0
        scores = np.resize(np.array([-2.0, 0.0, 1.5, -0.4, 2.4, -1.0]), count)
        content[split] = {**part, "labels": scores.reshape(-1, 1, 1), "id": ids(split, start, count)}
        start += count
    return content


SIZES = {"train": 12, "valid": 4, "test": 6}


def make_mosei(root, **changes):
    """MultiBench's form: ids are arrays of the video, start and end."""
    content = sentiment_content(
        SIZES, lambda split, start, n: np.array([[f"video{(start + i) // 2}", "0.0", str(i)] for i in range(n)])
    )
    for name, value in changes.items():
        content["train"][name] = value(content["train"][name])
    root.mkdir(parents=True, exist_ok=True)
    (root / "mosei_senti_data.pkl").write_bytes(pickle.dumps(content, protocol=4))


def make_mosi(root):
    """MMSA's form: ids as video$_$clip, regression labels, texts and lengths of unaligned sequences."""
    content = sentiment_content(SIZES, lambda split, start, n: [f"vid{(start + i) // 2}$_${i}" for i in range(n)])
    for part in content.values():
        scores = part.pop("labels").reshape(-1)
        part["regression_labels"] = scores.astype("float32")
        part["raw_text"] = np.array([f"text {i}" for i in range(len(scores))], dtype=object)
        part["audio"] = np.pad(part["audio"], ((0, 0), (0, 2), (0, 0)))
        part["audio_lengths"] = [5] * len(scores)
        part["annotations"] = ["Neutral"] * len(scores)
    root.mkdir(parents=True, exist_ok=True)
    (root / "aligned_50.pkl").write_bytes(pickle.dumps(content, protocol=4))


def make_av_mnist(root):
    """24 training and 8 test samples."""
    rng = np.random.default_rng(0)
    for folder in ("image", "audio"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", 24), ("test", 8)):
        np.save(root / "image" / f"{split}_data.npy", rng.normal(size=(count, 784)))
        np.save(root / "audio" / f"{split}_data.npy", rng.integers(0, 256, (count, 112, 112), dtype=np.uint8))
        np.save(root / f"{split}_labels.npy", np.arange(count) % 10)


def make_ucf101(root):
    """Three actions, four source videos for training and one for the test, two clips of each."""
    lists = {"train": [], "test": []}
    for label in ("Archery", "BabyCrawling", "Diving"):
        for group in range(1, 6):
            for clip in (1, 2):
                name = f"v_{label}_g{group:02d}_c{clip:02d}"
                lists["test" if group == 1 else "train"].append(f"{label}/{name}.avi")
                write_flow_clip(root, name, seed=group)
    folder = root / "ucfTrainTestlist"
    folder.mkdir()
    (folder / "trainlist01.txt").write_text("".join(f"{line} 1\n" for line in lists["train"]))
    (folder / "testlist01.txt").write_text("".join(f"{line}\n" for line in lists["test"]))


def write_flow_clip(root, name, *, seed=0):
    write_images(root / "rgb" / name, 6, seed=seed)
    for axis in "uv":
        write_images(
            root / f"flow_{axis}" / name, 6, gray=True, name="frame{:06d}.jpg", seed=seed + 100 * (axis == "v")
        )


def make_hmdb51(root):
    """Three actions, of which one is known to UCF-101; six source videos each."""
    folder = root / "testTrainMulti_7030_splits"
    folder.mkdir(parents=True)
    for label in ("brush_hair", "chew", "wave"):
        lines = []
        for source in range(6):
            name = f"Film{source}_{label}_u_nm_np1_ba_goo_0"
            lines.append(f"{name}.avi {(1, 1, 1, 1, 2, 0)[source]}\n")
            write_flow_clip(root, name, seed=source)
        (folder / f"{label}_test_split1.txt").write_text("".join(lines))


def make_raw(name, root):
    """Writes the miniature raw copy of a layout."""
    globals()[f"make_{name}"](Path(root))
    return Path(root)


def prepare_raw(name, root, out, **options):
    """Makes a raw copy, if there is none, and prepares it."""
    if not Path(root).exists():
        make_raw(name, root)
    settings = {key: options.pop(key) for key in ("split", "paths", "copy", "workers", "progress") if key in options}
    return prepare(find_layout(name), root, out, options={**SMALL.get(name, {}), **options}, **settings)
