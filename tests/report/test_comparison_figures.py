"""figures.py and canvas.py: pictures follow the numbers, the page's theme and nothing else."""

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from equipoise.report import comparison_figures, comparison_text, plot_style
from equipoise.report.results_view import ResultsView
from helpers.fake_results import fake_results, fake_run, fake_run_with_r, results_view

SVG = "{http://www.w3.org/2000/svg}"

DRAWN = {
    "scores": lambda r: comparison_figures.scores(r, "accuracy"),
    "noise scores": lambda r: comparison_figures.scores(r, "accuracy_noise/audio"),
    "share": lambda r: comparison_figures.attention_share(r, "joint+rollingq"),
    "share on noise": lambda r: comparison_figures.share_on_noise(r, "joint"),
    "keys before": lambda r: comparison_figures.key_cosines(r, "joint+rollingq", "before"),
    "keys after": lambda r: comparison_figures.key_cosines(r, "joint", "after"),
    "imbalance": comparison_figures.imbalance,
    "rotations": comparison_figures.rotations,
    "differences": lambda r: comparison_figures.paired_differences(r, "accuracy"),
}


@pytest.fixture(scope="module")
def view():
    return ResultsView(fake_results())


def svg_texts(svg):
    return [" ".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_labeled_scalable_themed_and_deterministic(view, name):
    before = dict(matplotlib.rcParams)
    svg = DRAWN[name](view)
    assert svg == DRAWN[name](view)
    assert dict(matplotlib.rcParams) == before
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert len(root.attrib["aria-label"]) > 20
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    assert list(root.iter(f"{SVG}text")), "text became outlines"
    assert "<style" not in svg
    # Every color is the page's to change; only the fallbacks are fixed.
    assert not re.findall(r"(?<!,)#[0-9a-f]{6}\b", svg)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)


def test_figure_ids_are_distinct(view):
    result = [set(re.findall(r'\bid="([^"]+)"', draw(view))) for draw in DRAWN.values()]
    assert sum(map(len, result)) == len(set().union(*result))
    for draw in DRAWN.values():
        svg = draw(view)
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_title_contains_r(view):
    mean = np.mean([run["metrics"]["noise_attention_r"] for run in view.runs if run["method"] == "joint"])
    assert f"joint · r = {mean:+.2f}".replace("-", "−") in svg_texts(comparison_figures.share_on_noise(view, "joint"))


@pytest.mark.parametrize(
    "name",
    ["$x^{2}$ <b>&amp;", "<img src=x onerror=alert(1)>", "</script>", "数字 ☃", "#1d2126 id=\"a\" 'DejaVu Sans'"],
)
def test_names_are_shown_verbatim(name):
    named = ResultsView(fake_results(methods=("concat", "joint"), seeds=2, rename={"joint": name}))
    for draw in (comparison_figures.scores, comparison_figures.imbalance, comparison_figures.paired_differences):
        shown = svg_texts(draw(named))
        assert any(text.startswith(name[:12]) for text in shown), shown
    assert name in ElementTree.fromstring(comparison_figures.scores(named)).attrib["aria-label"]


def test_missing_values_are_not_drawn():
    bare = ResultsView(fake_results(methods=("audio", "concat"), seeds=1, history=False))
    drawn = {
        name
        for name, draw in DRAWN.items()
        if name not in ("share", "share on noise", "keys before", "keys after") and draw(bare)
    }
    assert drawn == {"scores", "noise scores", "differences"}
    assert comparison_figures.attention_share(bare, "concat") is None
    assert comparison_figures.share_on_noise(bare, "concat") is None
    assert comparison_figures.key_cosines(bare, "concat", "after") is None
    assert comparison_figures.scores(bare, "no such metric") is None
    assert comparison_figures.summary_png(bare) is None


def test_png_signature(view):
    png = comparison_figures.summary_png(view)
    assert png.startswith(b"\x89PNG")
    assert png == comparison_figures.summary_png(view)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_colors_have_contrast_in_both_schemes():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for light, (_, dark) in plot_style.THEME.items():
        if light != plot_style.GRID:
            assert contrast(light, "#fdfcfa") >= 4.5, light
            assert contrast(dark, "#15171a") >= 4.5, dark


def test_key_plot_shows_the_noise_level():
    # In this moment image was destroyed, although the run as a whole is about audio.
    def part(counts):
        return {"cosine": {"edges": [-1, 0, 1], "counts": counts}}

    state = {
        "clean": {"audio": part([1, 3]), "image": part([3, 1])},
        "noise": {"audio": part([1, 3]), "image": part([0, 4])},
    }
    readings = results_view([fake_run_with_r("joint", 0, "audio") | {"keys": {"after": state}}])
    assert readings.replaced("joint", "after") == "image"
    assert "image replaced by noise" in svg_texts(comparison_figures.key_cosines(readings, "joint", "after"))
    state["noise"]["audio"] = part([2, 2])
    assert readings.replaced("joint", "after") == "audio"
    state["noise"]["audio"] = part([1, 3])
    assert "With noise, the mean cosine of image changes by +0.75 to +0.50" in comparison_text.keys_text(
        readings, "joint", "after"
    )


def test_curve_labels_do_not_overlap():
    history = [{"epoch": e, "share": {"audio": 0.5, "image": 0.501, "text": 0.499}} for e in (1, 2)]
    root = ElementTree.fromstring(
        comparison_figures.attention_share(results_view([fake_run("m", 0, history=history)]), "m")
    )
    heights = sorted(float(t.attrib["y"]) for t in root.iter(f"{SVG}text") if t.text in ("audio", "image", "text"))
    assert len(heights) == 3
    assert min(np.diff(heights)) > 9


@pytest.mark.parametrize("span", [1.0, 0.05, 0.004, 0.0003])
@pytest.mark.parametrize("draw", [comparison_figures.scores, comparison_figures.paired_differences])
def test_tick_labels_of_small_ranges_differ(draw, span):
    result = fake_results()
    for number, run in enumerate(result["runs"]):
        run["metrics"]["accuracy"] = 0.5 + span * number / 100
    labels = re.findall(
        r"^[+−]?[\d.]+(?: %)?$", "\n".join(svg_texts(draw(results_view(result["runs"]), "accuracy"))), re.MULTILINE
    )
    assert len(labels) >= 3
    assert len(labels) == len(set(labels))
