"""Builds src/equipoise/data/sets/emoji.npz: emoji images with names, keywords, parts and splits.

Reads three Debian packages (bookworm), installed or unpacked with dpkg -x into one folder:

    apt-get download fonts-noto-color-emoji unicode-cldr-core unicode-data
    for package in *.deb; do dpkg -x $package emoji; done
    python scripts/make_emoji.py emoji

Needs Pillow with raqm, which renders character sequences as one glyph. The same versions of the packages, Pillow
and zlib give the same file, byte for byte; the test compares its SHA-256 with ATLAS_SHA256 in
src/equipoise/data/sets/emoji.py.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
LIST = "usr/share/unicode/emoji/emoji-test.txt"
KEYWORDS = "usr/share/unicode/cldr/common/annotations/en.xml", "usr/share/unicode/cldr/common/annotationsDerived/en.xml"
TARGET = Path(__file__).parents[1] / "src/equipoise/data/sets/emoji.npz"
STRIKE = 109
"""Size of the bitmaps in the font, in pixels."""
SIDE = 32
TONE = re.compile(r"(?P<base>[^:]+): (?:(?P<tone>[\w-]+ skin tone)(?:, )?)?(?P<rest>.*)")
COLORS = r"red|orange|yellow|green|blue|light blue|purple|brown|black|white|gray|pink"
COLORED = re.compile(rf"(?P<color>{COLORS}) (?P<shape>heart|circle|square|book|apple)")
SIZED = re.compile(
    rf"(?:(?P<a>{COLORS}) (?P<b>large|medium|medium-small|small)|(?P<c>large|small) (?P<d>{COLORS})) "
    r"(?P<shape>square|diamond)"
)
CLOCK = re.compile(
    r"(?P<hour>one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)(?: |-)(?P<half>o’clock|thirty)"
)
HELD = {"test": 0.15, "val": 0.10}
"""Fraction of the combinations of each family."""


class Emoji(NamedTuple):
    """A character or sequence, its name, keywords, the parts of its name, and the family of combinations it is in."""

    text: str
    name: str
    keywords: tuple[str, ...]
    parts: tuple[str, ...]
    family: str


def main(folder: Path) -> None:
    if not features.check("raqm"):
        raise SystemExit("Pillow was built without raqm, and would draw sequences as several glyphs.")
    named = parse_names(folder / LIST)
    annotations = parse_keywords([folder / path for path in KEYWORDS])
    font = ImageFont.truetype(str(folder / FONT), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    names = set(named.values())
    rows, pictures = [], []
    for text, name in named.items():
        picture = render(text, font)
        if picture is None or name.count("skin tone") > 1:
            continue
        parts, family = parts_of(name, names)
        words = [word for word in annotations.get(text.replace("\N{VARIATION SELECTOR-16}", ""), []) if word != name]
        rows.append(Emoji(text, name, tuple(words), parts, family))
        pictures.append(picture)
    palette, levels = quantize(pictures)
    split = assign_splits(rows, [level.tobytes() for level in levels])
    write(
        TARGET, palette=palette, levels=levels, split=split,
        text=np.array([row.text for row in rows]), name=np.array([row.name for row in rows]),
        keywords=np.array(["|".join(row.keywords) for row in rows]),
        parts=np.array(["|".join(row.parts) for row in rows]), family=np.array([row.family for row in rows]),
    )  # fmt: skip
    print(f"{TARGET.name}: {len(rows)} images, {TARGET.stat().st_size} bytes")  # noqa: T201
    print(f"SHA-256 {hashlib.sha256(TARGET.read_bytes()).hexdigest()}")  # noqa: T201
    for number, which in enumerate(("train", "val", "test")):
        count = Counter(row.family or "single" for row, own in zip(rows, split, strict=True) if own == number)
        print(which, int((split == number).sum()), dict(count))  # noqa: T201


def parse_names(path: Path) -> dict[str, str]:
    """Parses emoji-test.txt: character or sequence -> name."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(.+?)\s*; fully-qualified\s*# \S+ E\S+ (.+)", line):
            found["".join(chr(int(code, 16)) for code in match[1].split())] = match[2]
    return found


def parse_keywords(paths: list[Path]) -> dict[str, list[str]]:
    """Parses CLDR annotations: character or sequence, without variation selectors -> English keywords."""
    found = {}
    for path in paths:
        for entry in ElementTree.parse(path).iter("annotation"):
            if entry.get("type") is None:
                found[entry.get("cp")] = [word.strip() for word in (entry.text or "").split("|")]
    return found


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Renders an emoji on white; None if the font has no single glyph for it."""
    left, top, right, bottom = font.getbbox(text)
    if right - left > 1.4 * STRIKE or right - left < 0.5 * STRIKE:
        return None
    side = int(max(right - left, bottom - top)) + 4
    canvas = Image.new("RGB", (side, side), "white")
    position = (side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top
    ImageDraw.Draw(canvas).text(position, text, font=font, embedded_color=True)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def quantize(pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Returns a shared palette of (256, 3) colors, and the (image, row, column) palette indices of all images."""
    atlas = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    image = atlas.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    palette = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
    return palette, np.asarray(image, dtype=np.uint8).reshape(len(pictures), SIDE, SIDE)


def parts_of(name: str, names: set[str]) -> tuple[tuple[str, ...], str]:
    """Parts of a name and its family of combinations; the name itself and "" if it is not a combination."""
    if (match := COLORED.fullmatch(name)) is not None:
        return (match["color"], match["shape"]), "colour"
    if (match := SIZED.fullmatch(name)) is not None:
        return tuple(part for part in match.groups() if part), "colour"
    if (match := CLOCK.fullmatch(name)) is not None:
        return (match["hour"], match["half"]), "clock"
    if name.endswith(" face") and name.removesuffix(" face") in names:
        return (name.removesuffix(" face"), "face"), "face"
    for who, other in (("cat", "face"), ("face", "cat")):
        if re.search(rf"\b{who}\b", name) and re.sub(rf"\b{who}\b", other, name) in names - {name}:
            return (re.sub(rf" ?\b{who}\b", "", name).strip(), who), "cat"
    base, tone, more = name, None, []
    if (match := TONE.fullmatch(name)) is not None and not name.startswith(("flag", "keycap")):
        base, tone = match["base"], match["tone"]
        more = [part for part in match["rest"].split(", ") if part]
    who, what = person(base, names)
    parts = tuple(part for part in (who, what, *more, tone) if part)
    if len(parts) < 2:
        return (name,), ""
    return parts, ("family" if base in ("family", "kiss", "couple with heart") else "people" if who else "body")


PEOPLE = ("man", "woman", "person", "men", "women", "people")


def person(base: str, names: set[str]) -> tuple[str | None, str | None]:
    """("woman", "running") for "woman running"; (None, base) if no other person has this name."""
    who, _, what = base.partition(" ")
    if who in PEOPLE and what:
        others = [other for other in PEOPLE if other != who]
        if any(f"{other} {what}" in names for other in others) or what in names:
            return who, what
    if base in ("man", "woman", "person"):
        return base, None
    return None, base


def assign_splits(rows: list[Emoji], pictures: list[bytes]) -> np.ndarray:
    """Assigns splits (0 = train, 1 = val, 2 = test): combinations are held out, all of their parts stay in training.

    Emoji with the same image stay in training. Combinations are tried in the order of a hash of their names. A
    combination is held out if at least half of the images of each of its parts stay in training, and each of its words
    is in another name that stays in training.
    """
    twins = {picture for picture, count in Counter(pictures).items() if count > 1}
    total: Counter[str] = Counter(part for row in rows for part in set(row.parts))
    left, words = total.copy(), Counter(word for row in rows for word in set(re.findall(r"\w+", row.name.lower())))
    split = np.zeros(len(rows), dtype=np.uint8)
    families = defaultdict(list)
    for index, row in enumerate(rows):
        if row.family and pictures[index] not in twins:
            families[row.family].append(index)
    for members in families.values():
        members.sort(key=lambda index: hashlib.sha256(rows[index].name.encode()).digest())
        wanted = {2: round(HELD["test"] * len(members)), 1: round(HELD["val"] * len(members))}
        for index in members:
            which = next((number for number, count in wanted.items() if count), None)
            parts, name = set(rows[index].parts), set(re.findall(r"\w+", rows[index].name.lower()))
            if which is None:
                break
            if any(left[part] - 1 < total[part] / 2 for part in parts) or any(words[word] < 2 for word in name):
                continue
            split[index], wanted[which] = which, wanted[which] - 1
            left.subtract(parts)
            words.subtract(name)
    return split


def write(path: Path, **arrays: np.ndarray) -> None:
    """Writes an npz file with fixed timestamps, so that its bytes are reproducible."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
