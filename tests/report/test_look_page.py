"""The page of a look: whole and harmless whatever a token holds; used with a real browser, by mouse and by keyboard."""

import functools
import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from equipoise.errors import SchemaError
from equipoise.inspection import look
from equipoise.report import plot_style
from equipoise.report.look_figures import DEEPEST
from equipoise.report.look_html import look_page, look_report
from equipoise.report.look_sentences import MeanShares, percent, verdict
from helpers import tiled_images
from helpers.look import EVIL, QUESTION, build_llama, build_llava, build_processor, tokenizer, wide_image
from helpers.pages import CONTRAST

ASKED = f"{QUESTION} {EVIL} a cat"


@pytest.fixture(scope="module")
def inspection():
    return look(
        build_llava(seed=4),
        build_processor(),
        image=wide_image(260, 180),
        text=ASKED,
        max_new_tokens=4,
        name=EVIL,
        notes=[f"note {EVIL}"],
    )


@pytest.fixture(scope="module")
def content(inspection):
    return json.loads(json.dumps(inspection.to_dict()))


def test_page_contains_values_and_escapes_tokens(content, tmp_path):
    text = look_report(content, tmp_path).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert EVIL not in text
    assert text.count("<script") == 2
    (inside,) = re.findall(r'<script type="application/json" id="look">(.*?)</script>', text, flags=re.S)
    assert json.loads(inside) == content
    for effect in content["effects"]:
        assert f">{effect['change']}</th>" in text
    assert "nan" not in re.sub(r"<script.*|base64,[^\"]*", "", text, flags=re.S).replace("dominant", "")
    assert 'src="data:image/png;base64,' in text
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"|http-equiv', "", text)


def test_sentence_contains_the_inspection_values(inspection, content):
    lead = verdict(MeanShares(content))[0]
    view = inspection.views["answer"]
    part, even = float(view.share[..., 1].mean()), float(view.uniform[:, 1].mean())
    assert f"In the answer, {percent(part)} of attention goes to the image" in lead
    assert f"{part / even:.{1 if part > even else 2}f} times its uniform share (9 of " in lead
    hidden = next(effect for effect in inspection.effects if effect.change == "image hidden")
    way = "decreases" if hidden.difference < 0 else "increases"
    assert (
        f"Without the image, the log-likelihood of the answer {way} by {abs(hidden.difference):.2f} per token." in lead
    )


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        ([{"change": "blank image", "log_likelihood": -2.0, "difference": -0.5}], "With a blank image, the"),
        ([{"change": "image hidden", "log_likelihood": -2.0, "difference": 0.001}], "the likelihood of the answer "
                                                                                    "does not change"),
        ([{"change": "image hidden", "log_likelihood": -2.0, "difference": 0.25}], "increases by 0.25 per token"),
        ([{"change": "image hidden", "log_likelihood": None, "difference": None}], "tokens)."),
        ([], "tokens)."),
    ],
)  # fmt: skip
def test_sentence_reports_the_answer_effects(content, effects, message):
    changed = content | {"effects": effects}
    assert verdict(MeanShares(changed))[0].endswith(message) or message in verdict(MeanShares(changed))[0]
    assert look_page(changed).rstrip().endswith("</html>")


def without_optional_parts(content):
    """Attention that could not be told, as NaN leaves it in the file."""
    views = {
        name: {**view, "without_sinks": [[[None] * 2] * 4] * 3, "sinks": []} for name, view in content["views"].items()
    }
    return content | {"views": views}


def test_page_with_partial_results(content):
    assert "none" in look_page(without_optional_parts(content))
    strip = content | {"grid": {"rows": 1, "columns": 9, "known": False, "why": "9 tokens are no square"}}
    assert "The positions of the tokens in the image are unknown: 9 tokens are no square." in look_page(strip)


@pytest.mark.parametrize("shade", plot_style.MODALITY)
def test_numbers_have_contrast_in_the_darkest_cell(shade):
    for paper, ink, color in (
        ("#fdfcfa", plot_style.INK, shade),
        ("#15171a", plot_style.THEME[plot_style.INK][1], plot_style.THEME[shade][1]),
    ):
        ground = [(1 - DEEPEST) * p + DEEPEST * c for p, c in zip(*map(to_rgb, (paper, color)), strict=True)]
        low, high = sorted((luminance(ground), luminance(to_rgb(ink))))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(rgb):
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_invalid_inspection_raises(content, tmp_path):
    with pytest.raises(SchemaError, match="look_report: expected a look of schema 1, got look of schema 2"):
        look_report(content | {"schema": 2}, tmp_path)
    with pytest.raises(SchemaError, match="expected a look of schema 1, got no look of schema 1"):
        look_page({"schema": 1, "runs": []})
    with pytest.raises(SchemaError, match="expected a look of schema 1, got list"):
        look_page([])
    assert list(tmp_path.iterdir()) == []


@functools.cache
def rendered(text):
    return look_page(json.loads(text))


@pytest.fixture
def opened_page(open_page, tmp_path):
    """Writes the page of an inspection, rendered once for equal content, and opens it."""

    def visit(content, **options):
        path = tmp_path / "page.html"
        path.write_text(rendered(json.dumps(content)), encoding="utf-8")
        return open_page(path, data_urls=True, **options)

    return visit


def displayed_value(view):
    return view.locator("#told").text_content().replace("\u00a0", " ")


def pixels(view):
    return view.locator("#map").evaluate("canvas => canvas.toDataURL()")


def colors(view):
    return view.eval_on_selector_all(".chip", "chips => chips.map(c => c.style.getPropertyValue('--part'))")


@pytest.mark.browser
def test_layer_head_and_token_selection_update_the_map(opened_page, inspection, content):
    view = opened_page(content)
    first = pixels(view)
    assert view.locator("#map").evaluate("canvas => [canvas.width, canvas.height]") == [3, 3]
    assert view.locator("#layer-said").text_content() == "all, mean"
    view.locator("#layer").fill("3")
    second = pixels(view)
    assert view.locator("#layer-said").text_content() == "2"
    view.locator("#head").fill("2")
    third = pixels(view)
    assert view.locator("#head-said").text_content() == "1"
    view.get_by_role("button", name="cat", exact=True).first.click()
    fourth = pixels(view)
    assert len({first, second, third, fourth}) == 4
    index = next(n for n, reader in enumerate(inspection.maps.readers) if reader.text == "cat")
    row = inspection.maps.by_head[index, 2, 1].float().numpy()
    image = [n for n, token in enumerate(inspection.tokens) if token.modality == "image"]
    part, best = float(row[image].sum()), int(np.argmax(row[image]))
    message = displayed_value(view)
    assert "Attention of “cat” in layer 2, head 1:" in message
    assert f"{shown(part)} to the 9 tokens of image" in message
    assert f"in row {best // 3 + 1} of 3, column {best % 3 + 1} of 3: {shown(row[image][best])}." in message
    assert view.locator("#map").get_attribute("aria-label").replace("\u00a0", " ").endswith(message.partition(". ")[2])


def shown(value):
    """As the script writes it."""
    figure = 100 * float(value)
    return f"{figure:.{0 if figure >= 9.95 else 1 if figure >= 0.095 else 2}f} %"


@pytest.mark.browser
def test_words_are_colored_by_the_selected_value(opened_page, content):
    view = opened_page(content)
    looks = colors(view)
    view.get_by_label("attention of the selected token to them").check()
    read = colors(view)
    assert looks != read
    assert max(int(part.rstrip("%")) for part in read) == 44
    # A word before the picture, or the chosen token's own future, cannot be read.
    first = view.locator(".chip[data-place]").nth(0)
    first.click()
    assert first.get_attribute("aria-pressed") == "true"
    assert "%" in first.get_attribute("title")


@pytest.mark.browser
def test_keyboard_navigation(opened_page, content):
    view = opened_page(content)
    view.focus("#layer")
    view.keyboard.press("ArrowRight")
    assert "in layer 0, all heads" in displayed_value(view)
    view.keyboard.press("Tab")
    view.keyboard.press("End")
    assert "in layer 0, head 3" in displayed_value(view)
    # One stop for all words; arrows go from one to the next.
    view.keyboard.press("Tab")
    assert "the whole answer" in displayed_value(view)
    view.keyboard.press("Home")
    assert "the whole prompt" in displayed_value(view)
    view.keyboard.press("ArrowRight")
    assert "“what”" in displayed_value(view)
    pressed = view.locator(".chip[aria-pressed=true]")
    assert pressed.count() == 1
    assert pressed.evaluate("e => e === document.activeElement")
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.name") == "color"


@pytest.mark.browser
def test_image_is_below_its_map_and_can_be_shown_alone(opened_page, content):
    view = opened_page(content)
    frame, canvas = (view.locator(name).bounding_box() for name in ("#frame", "#map"))
    left, upper, right, lower = content["frame"]
    assert canvas["x"] - frame["x"] == pytest.approx(left * frame["width"], abs=1)
    assert canvas["width"] == pytest.approx((right - left) * frame["width"], abs=1)
    assert canvas["height"] == pytest.approx((lower - upper) * frame["height"], abs=1)
    before = pixels(view)
    view.get_by_label("emphasize low attention").check()
    assert pixels(view) != before
    view.get_by_label("overlay on the image").uncheck()
    assert not view.locator("#map").is_visible()
    assert view.locator("#frame img").evaluate("e => e.naturalWidth") == 260


def assert_no_horizontal_scrolling(view, *widths):
    for width in widths:
        view.set_viewport_size({"width": width, "height": 800})
        assert view.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_page_has_no_horizontal_scrolling(opened_page, content):
    long = [{**token, "text": token["text"] * 30} for token in content["tokens"]]
    assert_no_horizontal_scrolling(opened_page(content | {"tokens": long}), 360, 390, 1180)


CHIPS = """() => {
  const channel = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    const [r, g, b] = text.startsWith("color(") ? found : found.map((c) => c / 255);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  return [...document.querySelectorAll(".chip")].map((chip) => {
    const { color, backgroundColor } = getComputedStyle(chip);
    const [ink, ground] = [light(color), light(backgroundColor)];
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  });
}"""


@pytest.mark.browser
def test_text_contrast_in_both_color_schemes(opened_page, content):
    light, dark = opened_page(content), opened_page(content, scheme="dark")
    measured = {"light": light.evaluate(CONTRAST), "dark": dark.evaluate(CONTRAST)}
    for mode in ("looks", "read"):
        for view in (light, dark):
            view.locator(f"input[value={mode}]").check()
            assert min(view.evaluate(CHIPS)) >= 4.5
    light.click("#theme")
    measured["switched"] = light.evaluate(CONTRAST)
    assert light.get_attribute("#theme", "aria-pressed") == "true"
    for name, result in measured.items():
        assert min(result["counted"]) > 50
        assert result["texts"] >= 4.5, name
        assert result["labels"] >= 4.5, name
    assert measured["dark"] == measured["switched"]


@pytest.mark.browser
def test_markup_in_tokens_is_escaped(opened_page, content):
    view = opened_page(content)
    view.wait_for_load_state("networkidle")
    view.get_by_role("button", name=EVIL, exact=True).first.click()
    assert f"Attention of “{EVIL}” in all layers" in displayed_value(view)
    assert view.locator(".subtitle").text_content().startswith(EVIL)
    assert view.locator(".notice").text_content() == f"note {EVIL}"


@pytest.mark.browser
def test_figures_have_labels(opened_page, content):
    view = opened_page(content)
    pictures = view.get_by_role("img").all()
    assert len(pictures) == 6 == len(view.locator("svg, img, canvas").all())
    names = [picture.get_attribute("aria-label") or picture.get_attribute("alt") for picture in pictures]
    assert len(set(names)) == 6
    assert min(map(len, names)) > 20


@pytest.mark.browser
def test_raw_numbers_can_be_downloaded(opened_page, content, tmp_path):
    view = opened_page(content)
    with view.expect_download() as waiting:
        view.click("#download")
    assert waiting.value.suggested_filename == "look.json"
    waiting.value.save_as(tmp_path / "look.json")
    assert json.loads((tmp_path / "look.json").read_text()) == content


@pytest.mark.browser
def test_single_heads_of_large_models_cover_the_answer(opened_page, inspection, content):
    few = inspection.maps._replace(by_head=inspection.maps.by_head[:1]).to_dict()
    view = opened_page(content | {"maps": json.loads(json.dumps(few))})
    view.locator("#head").fill("1")
    assert "head 0" in displayed_value(view)
    view.get_by_role("button", name="cat", exact=True).first.click()
    assert view.locator("#head").is_disabled()
    assert "all heads" in displayed_value(view)


@pytest.mark.browser
def test_text_model_page_has_words_only(opened_page):
    alone = look(build_llama(), tokenizer(), text=QUESTION, answer="a cat")
    view = opened_page(alone.to_dict(), width=390)
    assert view.locator("canvas, img").count() == 0
    view.get_by_role("button", name="mat", exact=True).click()
    assert "Attention of “mat” in all layers, all heads: 100 % to the 8 tokens of text." in displayed_value(view)
    assert view.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_several_images_have_one_map_each(opened_page):
    images = [wide_image(), wide_image(20, 20), wide_image(18, 26)]
    several = look(build_llava(), build_processor(), image=images, text=QUESTION, max_new_tokens=3)
    view = opened_page(several.to_dict())
    assert_no_horizontal_scrolling(view, 1280, 390)
    maps = view.locator("canvas.map").evaluate_all("all => all.map(one => [one.toDataURL(), one.ariaLabel])")
    assert len({pixels for pixels, _ in maps}) == 3
    assert all(f"over image {number}." in label for number, (_, label) in enumerate(maps, start=1))
    answer = several.maps.mean[0].float().mean(dim=0)
    share = float(answer[list(several.scenes[1].places)].sum())
    assert f"image 2 {100 * share:.0f} %" in view.locator("#told").text_content().replace("\u00a0", " ")
    view.locator("#over").uncheck()
    assert not any(view.locator("canvas.map").evaluate_all("all => all.map(one => one.checkVisibility())"))


@pytest.mark.browser
def test_tiles_and_overview_are_drawn_over_the_visible_image(opened_page):
    model, processor = tiled_images.build("llava_next")
    inspection = look(model, processor, image=wide_image(120, 60), text=QUESTION, max_new_tokens=2)
    view = opened_page(inspection.to_dict())
    assert_no_horizontal_scrolling(view, 1280, 390)
    tiles, overview = view.locator("canvas.map").evaluate_all(
        "all => all.map(one => ({size: [one.width, one.height], label: one.ariaLabel, alpha:"
        " [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data].filter((_, i) => i % 4 === 3)}))"
    )
    assert tiles["size"] == overview["size"] == [120, 60]
    # The image is visible under all tokens.
    assert all(0 < min(one["alpha"]) <= max(one["alpha"]) < 230 for one in (tiles, overview))
    assert "over tiles." in tiles["label"]
    assert "over overview." in overview["label"]
    answer = inspection.maps.mean[0].float().mean(dim=0)
    text = displayed_value(view).replace("\u00a0", " ")
    for places, words in [
        (inspection.scenes[0].places, "tiles {}"),
        (inspection.scenes[1].places, "overview {}"),
        (inspection.unplaced, "cover no single region (8): {}"),
    ]:
        assert words.format(percent(float(answer[list(places)].sum()))) in text
