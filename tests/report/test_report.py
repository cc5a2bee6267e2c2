"""The comparison report: content, escaping and partial results, viewed in a real browser."""

import functools
import json
import re

import pytest

from equipoise.errors import DataError, SchemaError
from equipoise.report import comparison_page, report
from equipoise.report.html_page import embedded
from equipoise.results import result_rows
from helpers.fake_results import fake_results
from helpers.pages import CONTRAST, EVIL

HOLLOW = {
    "history": [{"epoch": 1, "loss": None}, {}],
    "keys": {"after": {}},
    "shares": {"clean": {"edges": [], "counts": []}},
}
"""Parts of a run that are there and hold nothing."""


def partial_results(**changes):
    return fake_results(seeds=2, epochs=4) | changes


@functools.cache
def rendered(text):
    return comparison_page.page(json.loads(text))


def page(content):
    """The page of results, rendered once for equal content."""
    return rendered(json.dumps(content))


def remove_key(content, *keys):
    return content | {"runs": [{k: v for k, v in run.items() if k not in keys} for run in content["runs"]]}


def test_report_inputs_and_outputs(tmp_path):
    content = fake_results(methods=("concat", "joint"), seeds=1, epochs=2)
    path = result_rows.write_results(tmp_path / "results.json", content)
    pages = [
        report(path, tmp_path / "a.html"),
        report(tmp_path, tmp_path),
        report(content, tmp_path / "new" / "b.html"),
    ]
    assert [p.name for p in pages] == ["a.html", "report.html", "b.html"]
    assert {p.read_text(encoding="utf-8") for p in pages} == {page(content)}


def test_page_is_small_and_complete():
    text = page(fake_results())
    assert len(text.encode()) < 1.5e6
    assert text.count("<svg") == text.count("<figcaption>") == 19
    assert "joint+rollingq has a higher attention–noise correlation than joint" in text


def test_table_matches_the_summary():
    content = fake_results()
    text = page(content)
    for row in content["summary"]:
        if row["metric"] == "accuracy":
            assert f"{100 * row['mean']:.1f} ± {100 * row['sd']:.1f}" in text
            if row["difference"] is not None:
                assert f"{100 * row['difference']:+.1f}".replace("-", "−") + ", p " in text


def test_embedded_data_round_trip():
    content = fake_results(methods=("concat",), seeds=1, epochs=1)
    content["protocol"] |= {f"note {i}": evil for i, evil in enumerate(EVIL)}
    text = page(content)
    (inside,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', text, flags=re.S)
    assert json.loads(inside) == content
    assert "<" not in str(embedded(content))


@pytest.mark.parametrize("evil", ["".join(EVIL[:2]), "".join(EVIL[2:])])
def test_user_names_are_escaped(evil):
    names = {"joint": evil, "audio": evil + "2"}
    content = fake_results(methods=("audio", "concat", "joint"), seeds=2, fold=evil, epochs=3, rename=names)
    content["protocol"] |= {evil: evil, "data": evil, "noise_modality": evil, "nested": {evil: [evil]}}
    content["environment"] |= {evil: evil}
    text = page(content)
    assert [part for part in EVIL if part in text] == []
    assert text.count("<script") == 2
    assert "<img" not in text
    assert text.count("<!--") == 0


@pytest.mark.parametrize(
    "content",
    [
        partial_results(runs=[], summary=[]),
        partial_results(summary=[]),
        partial_results(protocol={}, environment={}),
        remove_key(partial_results(), "history"),
        remove_key(partial_results(), "keys", "shares"),
        remove_key(partial_results(), "history", "keys", "shares"),
        fake_results(methods=("image",), seeds=1, epochs=2),
        fake_results(methods=("joint",), seeds=1, epochs=1),
        fake_results(methods=("joint+rollingq",), seeds=3, epochs=2),
        fake_results(methods=("audio", "image", "concat"), seeds=2),
        result_rows.build_results([{"method": "m", "seed": 0, "fold": None, "metrics": {}}], {}),
        result_rows.build_results(
            [{"method": "m", "seed": 0, "fold": None, "metrics": {"mae": 0.2, "accuracy": None}}], {}
        ),
        result_rows.build_results(
            [{"method": "m", "seed": 0, "fold": None, "metrics": {"accuracy": 0.2}} | HOLLOW], {}
        ),
    ],
)  # fmt: skip
def test_page_of_partial_results(content):
    text = page(result_rows.validate_results(content, "test"))
    assert text.rstrip().endswith("</html>")
    assert "nan" not in re.sub(r"<script.*", "", text, flags=re.S).replace("dominant", "")


def test_page_reports_incomplete_comparison():
    content = fake_results(methods=("concat",), seeds=1, epochs=0)
    assert "Not all planned runs" not in page(content | {"complete": True, "failures": []})
    assert "Not all planned runs have finished" in page(content | {"complete": False, "failures": []})
    failure = {"method": "joint", "seed": 0, "fold": None, "error": "<b>boom</b>", "kind": "X"}
    assert "joint, seed 0 failed and is not included: &lt;b&gt;boom" in page(content | {"failures": [failure]})


def test_minimal_rows():
    content = partial_results()
    keep = ("method", "metric", "mean", "sd", "n", "difference", "p")
    text = page(content | {"summary": [{k: row[k] for k in keep} for row in content["summary"]]})
    assert "joint+rollingq" in text


def test_invalid_results_raise(tmp_path):
    with pytest.raises(SchemaError, match=r"report: expected schema 1, got schema 9"):
        report(partial_results(schema=9), tmp_path / "r.html")
    with pytest.raises(DataError, match="expected a results file, got no such file"):
        report(tmp_path / "nothing.json", tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def full_results():
    return fake_results()


@pytest.fixture(scope="module")
def written_page(tmp_path_factory):
    """Writes the page of results."""

    def write(content):
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(page(content), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def results_with_long_names():
    return fake_results(seeds=2, rename={"joint": "joint-with-a-name-that-has-no-place-to-break-" * 3})


@pytest.fixture
def opened_page(open_page, written_page):
    """Writes the page of results and opens it."""
    return lambda content, **options: open_page(written_page(content), **options)


@pytest.mark.browser
def test_page_has_no_horizontal_scrolling(opened_page, results_with_long_names):
    view = opened_page(results_with_long_names)
    for width in (360, 390, 1180):
        view.set_viewport_size({"width": width, "height": 800})
        assert view.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_text_contrast_in_both_color_schemes(opened_page, full_results):
    light, dark = opened_page(full_results), opened_page(full_results, scheme="dark")
    measured = {"light": light.evaluate(CONTRAST), "dark": dark.evaluate(CONTRAST)}
    light.click("#theme")
    measured["switched"] = light.evaluate(CONTRAST)
    assert light.get_attribute("#theme", "aria-pressed") == "true"
    for name, result in measured.items():
        assert min(result["counted"]) > 50
        assert result["texts"] >= 4.5, name
        assert result["labels"] >= 4.5, name
    assert measured["light"]["paper"] > 0.9
    assert measured["dark"] == measured["switched"]
    assert measured["dark"]["paper"] < 0.02
    light.click("#theme")
    assert light.evaluate(CONTRAST) == measured["light"]


def column(view, index):
    script = "cells => cells.map(c => c.firstChild.textContent)"
    return view.eval_on_selector_all(f"#figures tbody tr > :nth-child({index})", script)


@pytest.mark.browser
def test_table_sorts_by_mouse_and_by_keyboard(opened_page, full_results):
    view = opened_page(full_results)
    accuracy = view.locator("#figures thead th").nth(1)
    accuracy.locator("button").click()
    assert column(view, 1) == ["concat", "joint+rollingq", "image", "joint", "audio"]
    assert accuracy.get_attribute("aria-sort") == "descending"
    assert view.locator("#sorted").text_content() == "Sorted by Accuracy %, descending."
    view.keyboard.press("Enter")
    assert column(view, 1) == ["audio", "joint", "image", "joint+rollingq", "concat"]
    view.keyboard.press("Shift+Tab")
    view.keyboard.press("Space")
    assert column(view, 1) == ["audio", "concat", "image", "joint", "joint+rollingq"]
    assert [h.get_attribute("aria-sort") for h in view.locator("#figures thead th").all()[:2]] == ["ascending", "none"]


@pytest.mark.browser
def test_methods_without_value_are_sorted_last(opened_page, full_results):
    view = opened_page(full_results)
    button = view.locator("#figures thead button").filter(has_text="Attention–noise correlation r").first
    button.click()
    assert column(view, 1)[:2] == ["joint+rollingq", "joint"]
    button.click()
    assert column(view, 1)[:2] == ["joint", "joint+rollingq"]


@pytest.mark.browser
def test_figures_have_labels_and_captions(opened_page, full_results):
    view = opened_page(full_results)
    names = view.get_by_role("img").evaluate_all("parts => parts.map(part => part.ariaLabel)")
    assert len(names) == 19 == view.locator("svg, img").count()
    assert len(set(names)) == len(names)
    captions = view.locator("figcaption").all_text_contents()
    assert len(captions) == 19
    assert min(map(len, captions)) > 20


@pytest.mark.browser
def test_raw_numbers_can_be_downloaded(opened_page, full_results, tmp_path):
    view = opened_page(full_results)
    with view.expect_download() as waiting:
        view.click("#download")
    waiting.value.save_as(tmp_path / "saved" / "results.json")
    assert result_rows.load_results(tmp_path / "saved") == full_results


@pytest.mark.browser
@pytest.mark.parametrize("evil", ["".join(EVIL[:2]), "".join(EVIL[2:])])
def test_markup_in_names_is_escaped(opened_page, evil):
    content = fake_results(methods=("concat", "joint"), seeds=2, epochs=2, rename={"joint": evil})
    content["protocol"]["data"] = evil
    view = opened_page(content)
    view.wait_for_load_state("networkidle")
    assert column(view, 1) == ["concat", evil]
    assert view.locator(".subtitle").text_content().startswith(evil)
    assert evil[:12] in view.locator("svg").first.text_content()


@pytest.mark.browser
def test_page_without_results_has_no_errors(opened_page):
    view = opened_page(result_rows.build_results([], {}), width=360)
    assert view.locator("h1").text_content() == "No run yet"
    assert view.locator("#figures").count() == 0
