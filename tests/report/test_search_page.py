"""The search gallery: content, escaping, and use in a real browser by mouse and keyboard."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.errors import SchemaError
from equipoise.evaluation.search import IndexEntry, SearchHit, SearchResult, result_gallery
from equipoise.evaluation.search.gallery_images import result_to_dict
from equipoise.report.search_html import search_page, search_report
from equipoise.report.search_sheet import SheetRow, contact_sheet
from helpers.pages import CONTRAST
from helpers.search import EVIL


def colored(red, green, blue):
    return torch.tensor([red, green, blue], dtype=torch.uint8).expand(32, 32, 3).clone()


def search_result(question="red heart", picture=None, unseen=(), count=9, tied=2):
    entries = [
        IndexEntry(f"name {n}", colored(20 * n, 90, 200), "\N{RED APPLE}", ("one", f"two {n}"), n % 2 == 0)
        for n in range(count)
    ]
    entries[2] = IndexEntry(EVIL, None, "", (EVIL,), None)
    hits = [SearchHit(1 + n - (n == 4), 0.9 - 0.11 * n, entry) for n, entry in enumerate(entries)]
    return SearchResult(question, picture, hits, tied, list(unseen), 3395)


@pytest.fixture(scope="module")
def content():
    return result_to_dict(search_result(unseen=["hearty"]), model=f"runs/{EVIL}", notes=[f"note {EVIL}"])


def test_page_contains_results_and_escapes_them(content, tmp_path):
    path = result_gallery(search_result(), tmp_path, model="runs/emoji")
    assert path == tmp_path / "gallery.html"
    text = search_page(content)
    assert EVIL not in text
    assert text.count("<script") == 1
    assert text.count('class="card"') == 9
    assert text.count('src="data:image/png;base64,') == 8
    assert "http" not in text.replace("http-equiv", "")
    assert "“red heart”" in text
    assert "9 nearest images of 3,395; 2 more have the same score as the last one." in text
    assert "Not in the training captions: “hearty”." in text


def test_image_query_shows_captions(tmp_path):
    asked = result_to_dict(search_result("cat.png", colored(1, 2, 3), tied=0), model="")
    text = search_page(asked)
    assert "<h1>What is cat.png?</h1>" in text
    assert "9 nearest captions of 3,395." in text
    assert text.count('src="data:image/png;base64,') == 9


def test_bars_and_cosines_below_zero(content):
    low = {**content, "hits": [{**hit, "score": -0.25} for hit in content["hits"]]}
    text = search_page(low)
    assert text.count("width:0.0%") == 9
    assert text.count("−0.250") == 18
    assert search_page({**content, "hits": []}).count('class="card"') == 0


def test_invalid_search_results_raise(content, tmp_path):
    with pytest.raises(SchemaError, match="search_report: expected a search of schema 1, got look of schema 1"):
        search_report({**content, "kind": "look"}, tmp_path)
    with pytest.raises(SchemaError, match="got search of schema 2"):
        search_page({**content, "schema": 2})
    with pytest.raises(SchemaError, match="got list"):
        search_page([])
    assert list(tmp_path.iterdir()) == []


def test_gallery_has_one_row_per_query():
    result = [(f"a rather long name {n}", 0.5 - n, colored(40 * n, 200, 0), n != 1) for n in range(3)]
    one, two = (
        contact_sheet([SheetRow("red heart", result), *more]) for more in ([], [SheetRow("$what$", result[:1])])
    )
    widths = [Image.open(io.BytesIO(png)).size for png in (one, two)]
    assert widths[0][0] == widths[1][0]
    assert abs(widths[1][1] - 2 * widths[0][1]) <= 1
    pixels = np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).reshape(-1, 3)
    for n in range(3):
        assert (pixels == (40 * n, 200, 0)).all(axis=1).sum() > 1000


@pytest.fixture
def opened_page(open_page, tmp_path):
    """Writes the page of a search and opens it."""
    return lambda content, **options: open_page(
        search_report(content, tmp_path / "page.html"), data_urls=True, **options
    )


def card_details(view):
    return view.locator("#told").text_content()


def press_keys(view):
    return view.eval_on_selector_all(".card[aria-pressed=true]", "cards => cards.map(c => c.dataset.name)")


@pytest.mark.browser
def test_card_details_on_hover(opened_page, content):
    view = opened_page(content)
    assert card_details(view) == ""
    view.locator(".card").nth(1).click()
    assert card_details(view) == "2. name 1: cosine 0.790, not seen in training. Also called: one, two 1."
    view.locator(".card").nth(2).click()
    assert card_details(view) == f"3. {EVIL}: cosine 0.680, user image. Also called: {EVIL}."
    assert press_keys(view) == [EVIL]
    assert view.locator(".card img").first.evaluate("e => e.naturalWidth") == 32


@pytest.mark.browser
def test_keyboard_navigation(opened_page, content):
    view = opened_page(content)
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.className") == "skip"
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.id") == "theme"
    # One stop for all cards; arrows go from one to the next.
    view.keyboard.press("Tab")
    focused = "document.activeElement.dataset.name"
    assert view.evaluate(focused) == "name 0"
    view.keyboard.press("ArrowRight")
    assert view.evaluate(focused) == "name 1"
    view.keyboard.press("Enter")
    assert press_keys(view) == ["name 1"]
    columns = view.evaluate(
        "getComputedStyle(document.getElementById('gallery')).gridTemplateColumns.split(' ').length"
    )
    view.keyboard.press("ArrowDown")
    assert view.evaluate(focused) == f"name {1 + columns}"
    view.keyboard.press("ArrowUp")
    view.keyboard.press("End")
    assert view.evaluate(focused) == "name 8"
    view.keyboard.press("ArrowRight")
    assert view.evaluate(focused) == "name 8"
    view.keyboard.press("Home")
    view.keyboard.press("Space")
    assert press_keys(view) == ["name 0"]
    assert view.eval_on_selector_all(".card", "cards => cards.filter(c => c.tabIndex === 0).length") == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1180])
def test_page_has_no_horizontal_scrolling(opened_page, content, width):
    long = {**content, "question": "x" * 300, "hits": [{**hit, "name": "y" * 200} for hit in content["hits"]]}
    view = opened_page(long, width=width)
    view.locator(".card").first.click()
    assert view.evaluate("document.documentElement.scrollWidth") <= width


CARDS = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  return [...document.querySelectorAll(".card .name, .card .score, .card .new")].map((text) => {
    const ink = light(getComputedStyle(text).color);
    const ground = light(getComputedStyle(text.closest(".card")).backgroundColor);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  });
}"""


@pytest.mark.browser
def test_text_contrast_in_both_color_schemes(opened_page, content):
    light, dark = opened_page(content), opened_page(content, scheme="dark")
    for view in (light, dark):
        assert view.evaluate(CONTRAST)["texts"] >= 4.5
        assert min(view.evaluate(CARDS)) >= 4.5
    light.click("#theme")
    assert light.get_attribute("#theme", "aria-pressed") == "true"
    assert light.evaluate(CARDS) == dark.evaluate(CARDS)


@pytest.mark.browser
def test_screen_reader_names_are_not_repeated(opened_page, content):
    view = opened_page(content)
    view.get_by_role("button", name=re.compile("^name 3 4")).click()
    assert press_keys(view) == ["name 3"]
    assert view.get_by_role("img").count() == 0
    assert view.get_by_role("list").count() == 1
