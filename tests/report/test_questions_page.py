"""The page of questions under several conditions: complete, harmless, and readable in a browser."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from equipoise.evaluation.questions.blind_test import blind
from equipoise.report.questions_html import questions_page
from helpers.pages import CONTRAST, EVIL


@pytest.fixture(scope="module")
def content():
    """Result of a black box that needs the image, with a steering curve, and texts that try to inject markup."""
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    rows = [
        {"image": Image.new("RGB", (4, 4), colors[name]), "question": f"Which color? {EVIL[index % len(EVIL)]}",
         "answer": name, "choices": [*colors, EVIL[0]], "category": f"{EVIL[1]} {index % 2}"}
        for index, name in enumerate(("red", "blue") * 8)
    ]  # fmt: skip
    names = {value: name for name, value in colors.items()}
    result = blind(lambda image, prompt: EVIL[2] if image is None else names.get(image.getpixel((0, 0)), "?"), rows)
    result.betas, random = (-2.0, 0.0, 2.0), np.random.default_rng(0)
    for column in ("attention_share", "log_likelihood"):
        result.extra[column] = list(random.random(len(rows)))
    for beta in ("-2", "2"):
        result.extra[f"steer {beta}"] = [float(value) for value in random.integers(2, size=len(rows))]
        result.extra[f"steer {beta} attention_share"] = list(random.random(len(rows)))
        result.extra[f"steer {beta} log_likelihood"] = list(-random.random(len(rows)))
    return result.to_dict()


@functools.cache
def rendered(text):
    return questions_page(json.loads(text))


def test_texts_are_escaped(content):
    page = rendered(json.dumps(content))
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert page.count("<svg") == 2


def test_without_other_conditions_and_curve(content):
    page = questions_page({**content, "sentences": [], "as_well": None, "steering": []})
    assert "Questions under several conditions" in page
    assert "<svg" not in page


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_page_in_a_browser(open_page, content, tmp_path, width, scheme):
    path = tmp_path / "questions.html"
    path.write_text(rendered(json.dumps(content)), encoding="utf-8")
    view = open_page(path, width=width, scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    contrast = view.evaluate(CONTRAST)
    assert (contrast["paper"] > 0.5) == (scheme == "light")
    assert contrast["texts"] > 4.5
    assert contrast["labels"] > 4.5
    figures = view.locator("figure svg").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().right)")
    assert len(figures) == 2
    assert max(figures) <= width
    assert view.locator("tbody tr").count() > 16
