"""The page of a diagnosis: whole, harmless and readable, for one model and for several; looked at with a browser."""

import dataclasses
import functools
import json
import re

import pytest
import torch

import equipoise as eq
from equipoise.diagnostics.suite import OPTIONAL_TESTS, TESTS, Diagnosis, diagnose
from equipoise.errors import ConfigError
from equipoise.report.diagnosis_html import diagnosis_page
from equipoise.report.diagnosis_metrics import label, ordered, shown, source_of
from equipoise.report.diagnosis_words import WORDS
from helpers.fusion import DIM, FEATURES, OUTPUTS, batch, joint_model
from helpers.pages import CONTRAST, EVIL

LONG = "a-name-that-has-no-place-to-break-" * 3


def random_batches(names=("audio", "image")):
    return [batch(names, size=size, seed=seed, dtype=torch.float32) for seed, size in enumerate((13, 7))]


@pytest.fixture(scope="module")
def deep_diagnosis():
    return diagnose(joint_model(depth=3, dtype=torch.float32), random_batches(), outside=random_batches(), name="deep")


@pytest.fixture(scope="module")
def static_diagnosis():
    torch.manual_seed(0)
    encoders = {name: torch.nn.Linear(FEATURES[name], DIM) for name in ("audio", "image")}
    return diagnose(eq.FusionModel(encoders, eq.fusion.Concat(DIM), OUTPUTS), random_batches())


@pytest.fixture(scope="module")
def unimodal_diagnosis():
    return diagnose(joint_model(("audio",), heads=1, dtype=torch.float32), random_batches(("audio",)), name="audio")


@pytest.fixture(scope="module")
def three_modality_diagnosis():
    names = ("audio", "image", "text")
    return diagnose(joint_model(names, heads=3, dtype=torch.float32), random_batches(names), name=LONG)


@functools.cache
def rendered(text):
    return diagnosis_page(json.loads(text))


def page(*found):
    """The page of diagnoses, rendered once for equal content."""
    return rendered(json.dumps([diagnosis.to_dict() for diagnosis in found]))


def test_every_test_and_metric_has_texts(deep_diagnosis, static_diagnosis):
    assert set(WORDS) == {*TESTS, *OPTIONAL_TESTS}
    for metric in {**deep_diagnosis.metrics, **static_diagnosis.metrics}:
        assert source_of(metric) in TESTS, metric
        assert label(metric)[0].isupper()
    assert ordered(["flops", "loss", "accuracy", "share/audio"], WORDS) == ["accuracy", "share/audio", "flops", "loss"]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy_mask/audio", 0.5, "50.0 %"),
        ("negative_error_noise/a_b", -0.25, "0.250"),
        ("quag/avg-audio", 0.25, "25.0 %"),
        ("area/audio", 0.75, "75.0 %"),
        ("shapley/audio", -0.125, "−12.5 points"),
        ("noise_attention_p", 1e-9, "p < 0.001"),
        ("gradient/audio", 0.00123456, "0.00123"),
        ("parameters", 5926, "5.93 k"),
        ("air", -0.5, "−0.50"),
        ("changed_noise/image", 0.0, "0.0 %"),
    ],
)
def test_number_formatting(metric, value, text):
    assert shown(metric, value) == text


def test_verdict_is_first_and_links_are_valid(deep_diagnosis):
    text = page(deep_diagnosis)
    assert text.index("<h1>") < text.index('class="verdict"') < text.index('id="test-score"')
    for verdict in deep_diagnosis.verdicts:
        assert f'href="#test-{verdict.test}"' in text
    anchors = set(re.findall(r'href="#([^"]+)"', text))
    assert anchors <= set(re.findall(r'\bid="([^"]+)"', text))
    assert {f"test-{test}" for test in TESTS} <= anchors


def test_identifiers_are_unique(deep_diagnosis, static_diagnosis, three_modality_diagnosis):
    for found in ((deep_diagnosis, static_diagnosis, three_modality_diagnosis), (deep_diagnosis, deep_diagnosis)):
        result = re.findall(r'\bid="([^"]+)"', page(*found))
        assert len(result) == len(set(result))


def test_table_values_match_the_diagnosis(deep_diagnosis, static_diagnosis):
    text = page(deep_diagnosis, static_diagnosis)
    for metric in ("accuracy", "accuracy_mask/audio", "accuracy_noise/image"):
        cells = [
            f"{100 * result.metrics[metric]:.1f}\N{NO-BREAK SPACE}±" for result in (deep_diagnosis, static_diagnosis)
        ]
        row = re.search(rf'<th scope="row">{re.escape(label(metric))}</th>(.*?)</tr>', text).group(1)
        assert all(cell in row for cell in cells)


def test_only_significant_differences_are_bold():
    metrics = {"accuracy": 0.8, "accuracy_noise/a": 0.5}
    first = Diagnosis("one", ("a",), "classification", 1000, metrics, details={"score": {}, "noise": {}})
    other = dataclasses.replace(first, name="two", metrics={"accuracy": 0.81, "accuracy_noise/a": 0.6})
    text = page(first, other)
    assert re.findall(r"<td[^>]*>([\d.]+)[^<]*<small class=\"sure\">([^ <]+)", text) == [
        ("60.0", "+10.0\N{NO-BREAK SPACE}points,")
    ]
    assert len(re.findall(r"<small>[^<]*points, p", text)) == 1


def test_skipped_tests_have_a_reason(static_diagnosis, unimodal_diagnosis, deep_diagnosis):
    for result in (static_diagnosis, unimodal_diagnosis):
        text = page(result)
        for test, reason in result.skipped.items():
            assert f"<dt>{test}</dt>" in text
            assert reason[:40] in text
            assert f'id="test-{test}"' not in text
    assert "<dt>" not in page(deep_diagnosis)


def test_embedded_data_round_trip(deep_diagnosis, static_diagnosis, three_modality_diagnosis):
    found = deep_diagnosis, static_diagnosis, three_modality_diagnosis
    (inside,) = re.findall(r'id="diagnoses">(.*?)</script>', page(*found), flags=re.DOTALL)
    assert json.loads(inside)["diagnoses"] == [diagnosis.to_dict() for diagnosis in found]


@pytest.mark.parametrize("evil", ["".join(EVIL[:2]), "".join(EVIL[2:])])
def test_user_names_are_escaped(evil):
    names = ("audio", evil)
    encoders = {"audio": torch.nn.Linear(3, DIM), "image": torch.nn.Linear(5, DIM)}
    result = diagnose(eq.FusionModel(encoders, eq.fusion.Concat(DIM), OUTPUTS), random_batches(), name=evil)
    content = json.loads(json.dumps(result.to_dict()).replace('"image"', json.dumps(names[1])))
    content["skipped"] = {"noise": evil}
    content["protocol"] = {evil: evil, "data": evil}
    text = rendered(json.dumps([content]))
    assert [part for part in EVIL if part in text] == []
    assert text.count("<script") == 2
    assert text.count("<!--") == 0


def test_minimal_diagnosis_page():
    bare = Diagnosis("bare", ("a", "b"), None, 0, {})
    text = page(bare)
    assert "<h1>Diagnosis of bare</h1>" in text
    assert "No test led to a finding" in text
    nothing = dataclasses.replace(bare, details={test: {} for test in TESTS}, metrics={"accuracy": float("nan")})
    text = page(nothing, bare)
    assert "<h1>Comparison of bare (1) and bare (2)</h1>" in text
    assert text.count("<svg") == 0
    assert "nan" not in re.sub(r"<script.*", "", text, flags=re.DOTALL).replace("dominant", "")
    with pytest.raises(ConfigError, match="diagnosis_page: expected one or more diagnoses, got none"):
        diagnosis_page([])


def test_models_with_equal_names_are_distinguished(static_diagnosis):
    twice = dataclasses.replace(static_diagnosis, name="deep")
    assert "<h1>Comparison of deep (1) and deep (2)</h1>" in page(twice, twice)


def test_report_to_a_file_or_folder(deep_diagnosis, static_diagnosis, tmp_path):
    assert static_diagnosis.report(tmp_path) == tmp_path / "report.html"
    assert deep_diagnosis.report(tmp_path / "new" / "two.html", static_diagnosis).read_text() == page(
        deep_diagnosis, static_diagnosis
    )
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "new"}


@pytest.fixture
def opened_page(open_page, tmp_path):
    """Writes the page of diagnoses and opens it."""

    def visit(*diagnoses, **options):
        path = tmp_path / "page.html"
        path.write_text(page(*diagnoses), encoding="utf-8")
        return open_page(path, **options)

    return visit


@pytest.fixture
def three_models_page(opened_page, deep_diagnosis, static_diagnosis, three_modality_diagnosis):
    return opened_page(deep_diagnosis, static_diagnosis, three_modality_diagnosis)


@pytest.mark.browser
def test_page_has_no_horizontal_scrolling(opened_page, three_models_page, three_modality_diagnosis):
    for view in (three_models_page, opened_page(three_modality_diagnosis)):
        for width in (360, 390, 1180):
            view.set_viewport_size({"width": width, "height": 800})
            assert view.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
@pytest.mark.parametrize(("width", "least"), [(390, 150), (1280, 200)])
def test_metric_names_do_not_wrap_and_tables_scroll(three_models_page, width, least):
    view = three_models_page
    view.set_viewport_size({"width": width, "height": 800})
    names = view.locator(".test .figures tbody th")
    assert names.count() > 20
    widths = names.evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().width)")
    assert min(widths) >= least
    boxes = view.locator(".test .scroll").evaluate_all(
        "boxes => boxes.map(box => [getComputedStyle(box).overflowX, box.getBoundingClientRect().right])"
    )
    assert {overflow for overflow, _ in boxes} == {"auto"}
    assert max(right for _, right in boxes) <= width


@pytest.mark.browser
def test_text_contrast_in_both_color_schemes(opened_page, deep_diagnosis, static_diagnosis):
    light, dark = (
        opened_page(deep_diagnosis, static_diagnosis),
        opened_page(deep_diagnosis, static_diagnosis, scheme="dark"),
    )
    read = CONTRAST.replace('"p, ', '"a, dt, dd, label, .mark, caption, p, ')
    measured = {"light": light.evaluate(read), "dark": dark.evaluate(read)}
    light.click("#theme")
    measured["switched"] = light.evaluate(read)
    assert light.get_attribute("#theme", "aria-pressed") == "true"
    for name, result in measured.items():
        assert min(result["counted"]) > 50
        assert result["texts"] >= 4.5, name
        assert result["labels"] >= 4.5, name
    assert measured["dark"] == measured["switched"]


@pytest.mark.browser
def test_verdict_links_to_its_test(opened_page, deep_diagnosis):
    view = opened_page(deep_diagnosis)
    # The page scrolls at once instead of smoothly.
    view.emulate_media(reduced_motion="reduce")
    for link in view.locator(".verdict a").all():
        link.click()
        expected = link.get_attribute("href")
        assert view.evaluate("location.hash") == expected
        view.wait_for_function(
            "h => Math.abs(document.querySelector(h).getBoundingClientRect().top) < 700", arg=expected
        )


@pytest.mark.browser
def test_figures_have_labels_and_captions(three_models_page):
    view = three_models_page
    names = view.get_by_role("img").evaluate_all("parts => parts.map(part => part.ariaLabel)")
    assert len(names) == len(view.locator("svg").all()) == len(set(names)) > 30
    captions = view.locator("figcaption").all_text_contents()
    assert len(captions) == len(names)
    assert min(map(len, captions)) > 10


def explorer(view):
    """Rows of the explorer: querying modality -> texts of the cells."""
    rows = view.locator("#explorer-body tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def percent(values):
    return [f"{100 * value:.1f} %" for value in values]


@pytest.mark.browser
def test_layers_and_heads_can_be_explored_with_the_keyboard(opened_page, deep_diagnosis):
    view, layers = opened_page(deep_diagnosis), deep_diagnosis.details["attention"]["layers"]
    assert view.locator("#layer-said").inner_text() == "1 of 3"
    heads = layers[0]["share"]
    mean = [sum(head[index] for head in heads) / len(heads) for index in range(2)]
    assert explorer(view)["all queries"] == percent([*mean, 1 - sum(mean)])
    view.focus("#pick-layer")
    view.keyboard.press("ArrowRight")
    view.focus("#pick-head")
    view.keyboard.press("End")
    assert view.locator("#layer-said").inner_text() == "2 of 3"
    assert view.locator("#head-said").inner_text() == "2 of 2"
    assert view.get_attribute("#pick-head", "aria-valuetext") == "2 of 2"
    result = explorer(view)
    assert result["all queries"][:2] == percent(layers[1]["share"][1])
    for index, name in enumerate(("audio", "image")):
        assert result[name][:2] == percent(layers[1]["by_query"][1][index])
    view.focus("#pick-layer")
    view.keyboard.press("End")
    # A class token alone reads in the last layer.
    assert set(explorer(view)) == {"all queries"}


@pytest.mark.browser
def test_models_can_be_chosen_in_the_explorer(opened_page, three_models_page, static_diagnosis):
    view = three_models_page
    assert view.locator("#pick-model option").all_inner_texts() == ["deep", LONG]
    view.select_option("#pick-model", LONG)
    assert view.locator("#layer-said").inner_text() == "1 of 1"
    assert view.locator("#explorer-head th").all_inner_texts() == ["", "audio", "image", "text", "special"]
    assert opened_page(static_diagnosis).locator("#explorer").count() == 0


@pytest.mark.browser
def test_raw_numbers_can_be_downloaded(opened_page, deep_diagnosis, tmp_path):
    view = opened_page(deep_diagnosis)
    with view.expect_download() as waiting:
        view.click("#download")
    waiting.value.save_as(tmp_path / "saved" / "diagnosis.json")
    assert Diagnosis.load(tmp_path / "saved").to_dict() == deep_diagnosis.to_dict()
