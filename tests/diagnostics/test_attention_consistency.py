"""Consistency of a model's attention: planted maps are found and named, figures against loops, reasons, no trace."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import equipoise as eq
from equipoise.consistency import (
    contradiction_excess,
    ideal_spectrum,
    pool_to_slots,
    spectral,
    top_energy,
    worst_cycles,
)
from equipoise.diagnostics.suite import diagnose
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from equipoise.report.diagnosis_html import diagnosis_page
from helpers.consistency import CONCEPTS, EYE, NAMES, SWAP, TOKENS, concept_batch, planted_fusion
from helpers.fusion import DIM, FEATURES, OUTPUTS, batch, joint_model
from helpers.model_state import FailingModel, model_state
from helpers.pages import CONTRAST, EVIL
from helpers.tolerance import TOL
from oracles import consistency as slow

EXACT = TOL[torch.float64]
ROUND = EYE[[1, 2, 0]]
THREE = ("audio", "image", "text")


def single_layer(result):
    (layer,) = result.layers
    return layer


def build_model(fusion, names=THREE):
    torch.manual_seed(0)
    return eq.FusionModel({name: nn.Linear(FEATURES[name], DIM) for name in names}, fusion, OUTPUTS).double()


# Maps as they are planted -> consistency score, cycle error.
PLANTED = {
    "all agree": ((EYE, EYE, EYE), 1.0, 0.0),
    "other permutations that agree": ((SWAP, SWAP @ ROUND, ROUND), 1.0, 0.0),
    "swapped": ((EYE, EYE, SWAP), 0.7531, 2 / 3),
    "a cycle of three": ((EYE, EYE, ROUND), 0.5328, 1.0),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_maps_match_the_worked_example(case):
    maps, score, error = PLANTED[case]
    layer = single_layer(eq.diagnostics.attention_consistency(planted_fusion(*maps), [concept_batch()]))
    assert layer.site == "fusion.blocks.0.attention"
    assert (layer.score, layer.cycle_error) == pytest.approx((score, error), abs=1e-4)
    assert (layer.pair_error, layer.spread) == pytest.approx((0, 0), abs=1e-6)
    # Of even maps, by the same table.
    assert layer.even == pytest.approx(0.6, abs=1e-4)
    expected = eq.consistency.supermatrix({(0, 1): maps[0], (0, 2): maps[1], (1, 2): maps[2]}).double()
    torch.testing.assert_close(layer.matrix, expected, rtol=0, atol=1e-6)
    assert layer.spectrum == pytest.approx(np.linalg.svd(expected.numpy(), compute_uv=False), abs=1e-5)
    assert layer.ideal == (3, 3, 3, 0, 0, 0, 0, 0, 0)


def test_planted_swap_is_reported_as_inconsistent_cycle():
    result = eq.diagnostics.attention_consistency(planted_fusion(on=SWAP), [concept_batch()], tokens=TOKENS, worst=2)
    assert [str(cycle) for cycle in result.worst.cycles] == [
        "audio 'bark' -> video 'dog' -> text 'man' -> audio 'noise'",
        "audio 'bark' -> text 'dog' -> video 'man' -> audio 'noise'",
    ]
    assert result.worst.cycles[0].strength == pytest.approx(1, abs=1e-5)
    assert result.worst.cycles[0].even == pytest.approx(1 / 27)
    message = str(result).splitlines()
    assert message[0].startswith("fusion.blocks.0.attention: score 0.75 (uniform attention 0.60), cycle error 0.67")
    assert message[1] == "audio 'bark' -> video 'dog' -> text 'man' -> audio 'noise' (1.00)"
    # What the swap leaves alone goes round well.
    all_ = single_layer(
        eq.diagnostics.attention_consistency(planted_fusion(on=SWAP), [concept_batch()], tokens=TOKENS, worst=99)
    ).cycles
    assert not any("silence" in station or "none" in station for cycle in all_ for station in cycle.way)
    assert single_layer(eq.diagnostics.attention_consistency(planted_fusion(), [concept_batch()])).cycles == ()


def test_two_modalities_have_round_trips_only():
    result = planted_fusion(SWAP, names=NAMES[:2])
    layer = single_layer(eq.diagnostics.attention_consistency(result, [concept_batch(NAMES[:2])]))
    assert layer.score == pytest.approx(1, abs=1e-4)
    assert layer.cycle_error == layer.pair_error == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        # audio goes by the swap, and video back by identity.
        weight = result.fusion.blocks[0].attention.query.weight
        weight.copy_(weight.max() * eq.consistency.supermatrix({(0, 1): SWAP, (1, 0): EYE}).t())
    layer = single_layer(eq.diagnostics.attention_consistency(result, [concept_batch(NAMES[:2])]))
    assert layer.cycle_error == layer.pair_error == pytest.approx(2 / 3, abs=1e-5)
    assert layer.cycles[0].way == ("audio token 1", "video token 2", "audio token 2")


class Recorded:
    """What the first attention core of a model is given, in each batch."""

    def __init__(self, layer):
        self.calls = []
        layer.core.register_forward_pre_hook(lambda core, args, kwargs: self.calls.append((args, kwargs)),
                                             with_kwargs=True)  # fmt: skip


def slow_samples(calls, count):
    """Per sample: {(i, j): map} by loops over queries and keys, heads first; None where a modality is missing."""
    result = []
    for (query, key, _), kwargs in calls:
        labels, mask = kwargs["modality"].tolist(), kwargs["mask"]
        for b in range(len(query)):
            real = [mask is None or bool(mask[b, j]) for j in range(len(labels))]
            places = [[j for j, m in enumerate(labels) if m == i and real[j]] for i in range(count)]
            rows = {}
            for i in itertools.chain(*places):
                weights = np.zeros(len(labels))
                for h in range(query.shape[1]):
                    scores = [float(query[b, h, i] @ key[b, h, j]) / math.sqrt(query.shape[-1])
                              if real[j] else -math.inf for j in range(len(labels))]  # fmt: skip
                    exp = np.exp(np.array(scores) - max(scores))
                    weights += exp / exp.sum() / query.shape[1]
                rows[i] = weights
            blocks = {}
            for m, n in itertools.permutations(range(count), 2):
                block = np.array([[rows[i][j] for j in places[n]] for i in places[m]])
                blocks[m, n] = block / block.sum(axis=1, keepdims=True) if block.size else None
            result.append(None if any(block is None for block in blocks.values()) else blocks)
    return result


def slow_scores(blocks, count):
    """Score, cycle error and pair error of one sample with any numbers of tokens."""
    sizes = [blocks[i, (i + 1) % count].shape[0] for i in range(count)]
    full = np.block([[np.eye(sizes[i]) if i == j else blocks[i, j] for j in range(count)] for i in range(count)])
    both, total = (full + full.T) / 2, sum(sizes)
    score = (total - slow.effective_rank(both)) / (total - min(sizes))
    cycles = [
        ((blocks[i, j] @ blocks[j, k] - blocks[i, k]) ** 2).sum() / (2 * sizes[i])
        for i, j, k in itertools.permutations(range(count), 3)
    ]
    pairs = [
        ((blocks[i, j] @ blocks[j, i] - np.eye(sizes[i])) ** 2).sum() / (2 * sizes[i])
        for i, j in itertools.permutations(range(count), 2)
    ]
    energy = np.linalg.svd(both, compute_uv=False)[: min(sizes)].sum() / total
    rank, excess = slow.effective_rank(both), slow.nuclear(both) / total - 1
    return score, rank, excess, energy, np.mean(cycles or pairs), np.mean(pairs)


@pytest.mark.parametrize("names", [THREE[:2], THREE])
def test_scores_against_loops_with_padding_and_missing_modalities(names):
    model = joint_model(names, depth=2)
    loader = [batch(names, size=5), batch(names, size=7, seed=1)]
    # Ends of audio are padding in some samples, and one sample has no text or image at all.
    lengths = torch.tensor([7, 3, 5, 7, 2])
    loader[0]["mask"] = {"audio": torch.arange(7) < lengths[:, None], names[-1]: torch.arange(5) != 3}
    result = single_layer(eq.diagnostics.attention_consistency(model, loader))
    recorded = Recorded(model.fusion.blocks[0].attention)
    model.eval()
    with torch.no_grad():
        for inputs in loader:
            model(inputs)
    full = [blocks for blocks in slow_samples(recorded.calls, len(names)) if blocks is not None]
    expected = np.mean([slow_scores(blocks, len(names)) for blocks in full], axis=0)
    assert result.samples == len(full) == 11
    got = (result.score, result.effective_rank, result.contradiction_excess, result.top_energy, result.cycle_error,
           result.pair_error)  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-8)
    # Lengths differ, so that the shortest decides into how many stretches audio is cut.
    assert result.sizes[0] == 2
    assert result.tokens[:2] == ("audio part 1 of 2", "audio part 2 of 2")


def test_padding_changes_nothing():
    model, short = joint_model(THREE, depth=2), batch(THREE)
    long = {name: values if name == "target" else nn.functional.pad(values, (0, 0, 0, 4), value=9.0)
            for name, values in short.items()}  # fmt: skip
    long["mask"] = {name: torch.arange(short[name].shape[1] + 4).expand(5, -1) < short[name].shape[1] for name in THREE}
    one, other = (single_layer(eq.diagnostics.attention_consistency(model, [inputs])) for inputs in (short, long))
    torch.testing.assert_close(one.matrix, other.matrix, **EXACT)
    assert (one.score, one.cycle_error) == pytest.approx((other.score, other.cycle_error))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), order=st.permutations(range(CONCEPTS)))
def test_token_names_do_not_matter(seed, order):
    model, plain = joint_model(THREE, depth=2, seed=seed % 7), batch(THREE, seed=seed)
    other = {**plain, "text": plain["text"][:, list(order)]}
    one, two = (single_layer(eq.diagnostics.attention_consistency(model, [inputs])) for inputs in (plain, other))
    for figure in ("score", "effective_rank", "contradiction_excess", "top_energy", "cycle_error", "pair_error"):
        assert getattr(one, figure) == pytest.approx(getattr(two, figure), rel=1e-6)


def test_layers_with_complementary_maps_are_combined():
    model = build_model(eq.fusion.MBT(DIM, depth=2, heads=2, exchange="cross"))
    result = eq.diagnostics.attention_consistency(model, [batch(THREE)])
    assert [layer.site for layer in result.layers] == [f"fusion.blocks.*.{number}.attention" for number in range(2)]
    recorded = {name: Recorded(model.fusion.blocks[name][0].attention) for name in THREE}
    model.eval()
    with torch.no_grad():
        model(batch(THREE))
    sizes = result.layers[0].sizes
    for index, name in enumerate(THREE):
        # Each block's own rows come first.
        (query, key, _), kwargs = recorded[name].calls[0]
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1).mean(dim=1)[:, : sizes[index]]
        for other in range(3):
            if other != index:
                part = weights[..., kwargs["modality"] == other]
                block = (part / part.sum(dim=-1, keepdim=True)).mean(dim=0)
                rows, columns = ([sum(sizes[:i]), sum(sizes[: i + 1])] for i in (index, other))
                torch.testing.assert_close(result.layers[0].matrix[slice(*rows), slice(*columns)], block, **EXACT)


@pytest.mark.parametrize(
    "fusion", [eq.fusion.MidFusion(DIM, heads=2), eq.fusion.MODA(DIM, heads=2), eq.fusion.JointAttention(DIM, depth=3)]
)
def test_all_layers_with_cross_modal_attention(fusion):
    result = eq.diagnostics.attention_consistency(build_model(fusion), [batch(THREE)])
    last = len(result.layers)
    assert [layer.site for layer in result.layers] == [f"fusion.blocks.{n}.attention" for n in range(last)]
    assert result.skipped == {f"fusion.blocks.{last}.attention": "all queries are special tokens such as a class token"}
    assert result.worst is max(result.layers, key=lambda layer: layer.cycle_error)


def test_token_similarity_in_place_of_attention():
    tokens = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = {"audio": [2, 0, 1], "image": [0, 1, 2], "text": [1, 2, 0]}
    model = eq.FusionModel({name: nn.Identity() for name in names}, eq.fusion.Concat(7), 2).double()
    inputs = {name: tokens[:, order] for name, order in names.items()}
    layer = single_layer(eq.diagnostics.attention_consistency(model, [inputs], source="tokens", temperature=0.01))
    assert (layer.site, layer.samples) == ("tokens", 1)
    assert layer.score == pytest.approx(1, abs=1e-3)
    there = torch.eye(3, dtype=torch.float64)[[2, 0, 1]]
    torch.testing.assert_close(layer.matrix[:3, 3:6], there, rtol=0, atol=1e-3)


def test_loader_is_read_up_to_the_limit():
    seen = []

    def loader():
        for seed in range(5):
            seen.append(seed)
            yield batch(THREE, seed=seed)

    result = single_layer(eq.diagnostics.attention_consistency(joint_model(THREE, depth=2), loader(), samples=7))
    assert (result.samples, seen) == (7, [0, 1])
    both = {name: torch.cat([batch(THREE, seed=s)[name] for s in range(2)])[:7] for name in batch(THREE)}
    again = single_layer(eq.diagnostics.attention_consistency(joint_model(THREE, depth=2), [both]))
    torch.testing.assert_close(result.matrix, again.matrix, **EXACT)


def test_long_sequences_are_pooled():
    long = {**batch(THREE), "audio": torch.randn(5, 13, 3, dtype=torch.float64)}
    words = {"audio": [f"w{n}" for n in range(13)]}
    layer = single_layer(
        eq.diagnostics.attention_consistency(joint_model(THREE, depth=2), [long], tokens=words, parts=4)
    )
    assert layer.sizes == (4, 4, 3)
    assert layer.tokens[:5] == (
        "audio 'w0' to 'w3'", "audio 'w3' to 'w6'", "audio 'w6' to 'w9'", "audio 'w9' to 'w12'", "image tokens 1 to 2",
    )  # fmt: skip
    torch.testing.assert_close(layer.matrix[:4, 4:8].sum(dim=1), torch.ones(4, dtype=torch.float64), **EXACT)


def test_pooling_against_loops():
    sizes, parts = (5, 3), (2, 3)
    blocks = [torch.rand(5, 3, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)]
    matrix = eq.consistency.supermatrix({(0, 1): blocks[0], (1, 0): blocks[1]})
    result = pool_to_slots(matrix, sizes=sizes, parts=parts)
    # Five tokens in two stretches: two and a half each.
    stretch = [[(0, 1.0), (1, 1.0), (2, 0.5)], [(2, 0.5), (3, 1.0), (4, 1.0)]]
    for part, tokens in enumerate(stretch):
        for other in range(3):
            assert float(result[part, 2 + other]) == pytest.approx(
                sum(w * float(blocks[0][t, other]) for t, w in tokens) / 2.5
            )
            assert float(result[2 + other, part]) == pytest.approx(
                sum(w * float(blocks[1][other, t]) for t, w in tokens)
            )
    assert torch.equal(result[:2, :2], torch.eye(2, dtype=torch.float64))
    with pytest.raises(
        ShapeError,
        match=r"pool_to_slots parts: expected one number for each of \(5, 3\), from 1 to this size, got \(2, 4\)",
    ):
        pool_to_slots(matrix, sizes=sizes, parts=(2, 4))


@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 2), (2, 3, 5)])
def test_spectral_scores_against_loops(sizes):
    random = torch.Generator().manual_seed(len(sizes))
    blocks = {
        (i, j): torch.rand(a, b, generator=random, dtype=torch.float64).softmax(dim=-1)
        for i, a in enumerate(sizes) for j, b in enumerate(sizes) if i != j
    }  # fmt: skip
    matrix = eq.consistency.supermatrix(blocks, symmetrize=True)
    expected = (
        eq.consistency.consistency_score(matrix, sizes=sizes),
        eq.consistency.effective_rank(matrix),
        contradiction_excess(matrix),
        top_energy(matrix, sizes=sizes),
    )
    result = spectral(matrix, sizes=sizes)
    assert [float(value) for value in result] == pytest.approx([float(value) for value in expected], rel=1e-6, abs=1e-9)


def test_ideal_scores_with_unequal_token_counts():
    hard = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    matrix = eq.consistency.supermatrix({(0, 1): hard})
    values = torch.linalg.svdvals(matrix).tolist()
    assert values == pytest.approx(ideal_spectrum((3, 2)), abs=1e-6)
    assert float(top_energy(matrix, sizes=(3, 2))) == pytest.approx(4 / 5)
    assert worst_cycles(matrix, sizes=(3, 2)) == []


REASONS = {
    "a class token alone": (
        lambda: eq.fusion.JointAttention(DIM),
        r"in 'fusion\.attention' all queries are special tokens",
    ),
    "bottlenecks": (
        lambda: eq.fusion.MBT(DIM),
        r"'fusion\.blocks\.audio\.0\.attention' tokens attend only to their own modality",
    ),
    "streams": (lambda: eq.fusion.MMML(DIM), "the modality of the queries is unknown"),
    "hidden": (lambda: eq.fusion.MulT(DIM), "got no attention over tokens of known modalities"),
    "static": (lambda: eq.fusion.Concat(DIM), "got no attention over tokens of known modalities"),
}


@pytest.mark.parametrize("case", REASONS)
def test_missing_maps_have_a_reason(case):
    fusion, reason = REASONS[case]
    with pytest.raises(
        ConfigError,
        match=f"expected a layer with attention between the tokens of all modalities.*{reason}.*compare the tokens "
        f"of the encoders",
    ):
        eq.diagnostics.attention_consistency(build_model(fusion()), [batch(THREE)])
    assert (
        eq.diagnostics.attention_consistency(build_model(fusion()), [batch(THREE)], source="tokens").layers[0].samples
        == 5
    )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"source": "keys"}, ConfigError, "expected source 'attention' or 'tokens', .* got source = 'keys'"),
        ({"samples": 0}, ConfigError, "samples >= 1, .* samples = 0"),
        ({"parts": 0}, ConfigError, "parts >= 1, .* parts = 0"),
        ({"worst": -1}, ConfigError, "worst >= 0 .* worst = -1"),
        ({"temperature": 0.0}, ConfigError, "temperature > 0, .* temperature = 0"),
        ({"tokens": {"audio": ["one"]}}, ShapeError, "tokens 'audio': expected a name for each of its 7 tokens, got 1"),
        ({"tokens": {"audoi": ["one"]}}, ConfigError, "known modality, got 'audoi'. Did you mean 'audio'"),
    ],
)
def test_invalid_options_raise(options, kind, message):
    with pytest.raises(kind, match=message):
        eq.diagnostics.attention_consistency(joint_model(THREE, depth=2), [batch(THREE)], **options)


def test_invalid_data_raise():
    model = joint_model(THREE, depth=2)
    with pytest.raises(ShapeError, match="expected at least one batch, got none"):
        eq.diagnostics.attention_consistency(model, [])
    with pytest.raises(ConfigError, match="expected two or more modalities, got one, 'audio'"):
        eq.diagnostics.attention_consistency(joint_model(("audio",), depth=2), [batch(("audio",))])
    broken = batch(THREE)
    broken["audio"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="expected finite numbers, got NaN or infinity"):
        eq.diagnostics.attention_consistency(model, [broken])
    gone = {**batch(THREE), "mask": {"text": torch.zeros(5, dtype=torch.bool)}}
    with pytest.raises(ConfigError, match="no sample has maps between all modalities"):
        eq.diagnostics.attention_consistency(model, [gone])
    with pytest.raises(ConfigError, match="expected samples with tokens of all modalities, got none"):
        eq.diagnostics.attention_consistency(model, [gone], source="tokens")


@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error"])
def test_model_state_is_restored(ends):
    model, loader = joint_model(depth=2, dropout=0.5).train(), [batch(seed=seed) for seed in range(2)]
    model.fusion.eval()
    model.loss(model(loader[0]).logits, loader[0]["target"]).backward()
    if ends == "with the model's error":
        model.encoders["audio"] = FailingModel()
    before = model_state(model, loader)
    if ends == "well":
        eq.diagnostics.attention_consistency(model, loader)
    elif ends == "with a user's error":
        with pytest.raises(ShapeError, match="audio"):
            eq.diagnostics.attention_consistency(model, loader, tokens={"audio": ()})
    else:
        with pytest.raises(RuntimeError, match="broken"):
            eq.diagnostics.attention_consistency(model, loader)
    assert model_state(model, loader) == before


@pytest.fixture(scope="module")
def swapped_diagnosis():
    return diagnose(
        planted_fusion(on=SWAP), [concept_batch(size=7)], tokens=TOKENS, tests=["consistency"], name="swapped"
    )


def test_diagnosis_contains_score_and_maps(swapped_diagnosis, tmp_path):
    site = "fusion.blocks.0.attention"
    result = eq.diagnostics.attention_consistency(planted_fusion(on=SWAP), [concept_batch(size=7)], tokens=TOKENS)
    assert swapped_diagnosis.metrics[f"consistency/{site}"] == result.worst.score
    assert swapped_diagnosis.metrics[f"cycle_error/{site}"] == result.worst.cycle_error
    assert swapped_diagnosis.metrics[f"pair_error/{site}"] == result.worst.pair_error
    swapped_diagnosis.save(tmp_path)
    details = eq.Diagnosis.load(tmp_path).details["consistency"]["layers"][0]
    assert details["cycles"][0]["way"] == list(result.worst.cycles[0].way)
    torch.testing.assert_close(torch.tensor(details["matrix"]).double(), result.worst.matrix, rtol=0, atol=1e-4)
    two = diagnose(planted_fusion(names=NAMES[:2]), [concept_batch(NAMES[:2])], tests=["consistency"])
    assert f"pair_error/{site}" in two.metrics
    assert f"cycle_error/{site}" not in two.metrics
    one = diagnose(joint_model(("audio",), depth=2, dtype=torch.float32), [batch(("audio",), dtype=torch.float32)])
    assert one.skipped["consistency"] == "the model has one modality: consistency needs at least two"
    with pytest.raises(ConfigError, match="diagnose tokens: expected a known modality, got 'sound'"):
        diagnose(planted_fusion(), [concept_batch()], tokens={"sound": ()})


def test_page_shows_maps_and_worst_cycle(swapped_diagnosis):
    text = diagnosis_page([swapped_diagnosis.to_dict()])
    shown = re.search(r'id="test-consistency".*?</section>', text, re.DOTALL).group(0)
    assert shown.count("<svg") == 2
    way = ("audio 'bark'", "video 'dog'", "text 'man'", "audio 'noise'")
    assert f"{' → '.join(way)} (100\N{NO-BREAK SPACE}%)".replace("'", "&#39;") in shown
    assert "are 73\N{NO-BREAK SPACE}% of the sum; 100\N{NO-BREAK SPACE}% for consistent maps" in shown
    # A cell for each 1 of the nine blocks, and each of them a path.
    assert len(re.findall(r"<path[^>]*clip-path[^>]*fill: var\(--fig-(?:accent|grid)", shown)) >= 27
    well = diagnosis_page([diagnose(planted_fusion(), [concept_batch()], tests=["consistency"]).to_dict()])
    assert "All cycles are consistent." in well


@pytest.mark.parametrize("evil", EVIL)
def test_token_names_are_escaped(evil):
    tokens = {**TOKENS, "video": (evil, "man", "street")}
    result = diagnose(planted_fusion(on=SWAP), [concept_batch()], tokens=tokens, tests=["consistency"])
    text = diagnosis_page([result.to_dict()])
    assert evil not in text
    assert text.count("<script") == 2


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figure_is_legible_on_small_screens(swapped_diagnosis, open_page, tmp_path, scheme):
    long = {name: tuple(f"{word} without a place to break" * 3 for word in words) for name, words in TOKENS.items()}
    other = diagnose(planted_fusion(on=ROUND), [concept_batch()], tokens=long, tests=["consistency"])
    (tmp_path / "page.html").write_text(
        diagnosis_page([swapped_diagnosis.to_dict(), other.to_dict()]), encoding="utf-8"
    )
    view = open_page(tmp_path / "page.html", width=390, scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    shown = view.locator("#test-consistency")
    assert shown.locator("svg[role=img]").count() == shown.locator("figcaption").count() == 4
    assert "Consistency of swapped. fusion.blocks.0.attention" in shown.locator("svg").first.get_attribute("aria-label")
    measured = view.evaluate(CONTRAST)
    assert min(measured["texts"], measured["labels"]) >= 4.5
    # A cell is as strong as its map, in the color of the page's theme.
    fills = shown.locator("svg").first.evaluate(
        "svg => [...svg.querySelectorAll('path')].map(p => getComputedStyle(p).fill)"
    )
    accent = {"light": "rgb(0, 112, 90)", "dark": "rgb(79, 207, 174)"}[scheme]
    assert fills.count(accent) == 18


def test_uniform_maps_have_no_inconsistent_cycles_and_no_warnings():
    even = planted_fusion(sharpness=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = diagnose(even, [concept_batch()], tests=["consistency"])
    layer = result.details["consistency"]["layers"][0]
    assert layer["score"] == pytest.approx(layer["even"])
    assert layer["score"] == pytest.approx(0.6)
    text = diagnosis_page([result.to_dict()])
    assert "No inconsistent cycle has 3 times its strength under uniform attention." in text
