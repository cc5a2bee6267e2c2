"""CrossModalMatcher: losses against loops, trained parameters, missing items, metrics, recipes."""

import importlib.util
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.data import load_dataset
from equipoise.errors import ConfigError, DataError, NonFiniteError, ShapeError
from equipoise.models.cross_modal_matcher import CrossModalMatcher
from equipoise.models.cross_modal_matcher.item_maps import composed_maps, matched_items
from equipoise.models.cross_modal_matcher.matcher_evaluation import SampledItemSets, evaluate_matching
from equipoise.models.cross_modal_matcher.token_mixing import TokenMixing
from equipoise.report import plot_style
from equipoise.tokens.token_batch import Tokens
from equipoise.training import method_factory, recipes
from helpers.tolerance import TOL
from oracles import consistency as slow

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
NAMES = ("audio", "image", "text")
TWO = [["audio", "image"], ["text", "image"]]
THREE = [*TWO, ["audio", "text"]]
SCENES, ITEMS, CLASSES, DIM, WIDTH = 7, 5, 11, 6, 3
INPUTS = {"audio": 13, "image": 2, "text": 17}


class MaskedEncoder(nn.Linear):
    """An encoder for which an item of zeros is one without a token."""

    def forward(self, values):
        return Tokens(super().forward(values)[:, None], mask=(values != 0).any(dim=1)[:, None])


def as_float(value):
    return value.detach().item()


def build_model(encoder=nn.Linear, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    encoders = {name: encoder(size, DIM) for name, size in INPUTS.items()}
    options = {"pairs": TWO, "dim": DIM, "width": WIDTH, **options}
    return CrossModalMatcher(encoders, CLASSES, **options).to(dtype)


def random_scenes(dtype=torch.float64, seed=0, count=SCENES, items=ITEMS):
    torch.manual_seed(seed)
    shown = torch.rand(count, CLASSES).argsort(dim=1)[:, :items]
    target = torch.stack([shown.gather(1, torch.rand(count, items).argsort(dim=1)) for _ in NAMES], dim=1)
    return {**{n: torch.randn(count, items, size, dtype=dtype) for n, size in INPUTS.items()}, "target": target}


def softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def slow_maps(model, batch):
    """Ordered pair -> (scene, item, item), one number at a time."""
    items = {n: model.encoders[n](batch[n]).tolist() for n in NAMES}

    def projected(layer, x):
        weight, bias = (part.tolist() for part in layer.parameters())
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]

    result = {}
    for i in NAMES:
        for j in NAMES:
            if i == j:
                continue
            query, key = model.scores.query[f"{i}->{j}"], model.scores.key[f"{i}->{j}"]
            result[i, j] = np.array([
                [
                    softmax([
                        sum(a * b for a, b in zip(projected(query, x), projected(key, y), strict=True)) / WIDTH**0.5
                        for y in items[j][s]
                    ])
                    for x in items[i][s]
                ]
                for s in range(SCENES)
            ])  # fmt: skip
    return result


def test_losses_against_loops():
    model, batch = build_model(consistency=0.7), random_scenes()
    losses, result, target = model.losses(batch), slow_maps(model, batch), batch["target"].tolist()
    for pair, values in model(batch).maps.items():
        np.testing.assert_allclose(values.detach().numpy(), result[pair], **EXACT)
    terms = []
    for i, j in (("audio", "image"), ("image", "audio"), ("image", "text"), ("text", "image")):
        for s in range(SCENES):
            mine, theirs = target[s][NAMES.index(i)], target[s][NAMES.index(j)]
            terms += [-math.log(result[i, j][s][row][theirs.index(digit)]) for row, digit in enumerate(mine)]
    assert as_float(losses["matching"]) == pytest.approx(sum(terms) / len(terms), rel=1e-10)
    ranks = []
    for s in range(SCENES):
        blocks = {(NAMES.index(i), NAMES.index(j)): values[s] for (i, j), values in result.items()}
        ranks.append(math.log(slow.effective_rank(slow.supermatrix(blocks, 3, ITEMS)) / ITEMS))
    assert as_float(losses["consistency"]) == pytest.approx(0.7 * sum(ranks) / SCENES, rel=1e-6)
    messages = []
    for index, name in enumerate(NAMES):
        items = {n: model.encoders[n](batch[n]).detach().numpy() for n in NAMES}
        weight, bias = (part.detach().numpy() for part in model.probes[name].parameters())
        for s in range(SCENES):
            for row in range(ITEMS):
                read = [items[n][s][row] if n == name else result[name, n][s][row] @ items[n][s] for n in NAMES]
                messages.append(-math.log(softmax(list(weight @ np.concatenate(read) + bias))[target[s][index][row]]))
    assert as_float(losses["probe"]) == pytest.approx(sum(messages) / len(messages), rel=1e-10)


def test_consistency_loss_kinds():
    batch = random_scenes()
    for kind in ("cycle", "nuclear"):
        model = build_model(consistency=2.0, kind=kind)
        blocks = {(NAMES.index(i), NAMES.index(j)): values for (i, j), values in slow_maps(model, batch).items()}
        values = []
        for s in range(SCENES):
            matrix = slow.supermatrix({pair: part[s] for pair, part in blocks.items()}, 3, ITEMS)
            values.append(slow.cycle_error(matrix, 3) if kind == "cycle" else slow.nuclear(matrix) / len(matrix) - 1)
        assert as_float(model.losses(batch)["consistency"]) == pytest.approx(2 * sum(values) / SCENES, rel=1e-6)


def test_temperature_affects_the_consistency_term_only():
    batch, plain, sharp = random_scenes(), build_model(consistency=1.0), build_model(consistency=1.0, temperature=0.2)
    result = plain(batch)
    expected = {pair: (5 * values).softmax(dim=-1) for pair, values in result.scores.items()}
    matrix = sharp.supermatrix(sharp(batch), temperature=0.2)
    torch.testing.assert_close(matrix[:, :ITEMS, ITEMS : 2 * ITEMS], expected["audio", "image"], **EXACT)
    assert torch.equal(plain.losses(batch)["matching"], sharp.losses(batch)["matching"])
    assert as_float(plain.losses(batch)["consistency"]) != pytest.approx(as_float(sharp.losses(batch)["consistency"]))


def gradient_sums(model, name, batch):
    model.zero_grad()
    model.losses(batch)[name].backward()
    return {key: as_float(p.grad.abs().sum()) for key, p in model.named_parameters() if p.grad is not None}


def test_unlisted_pair_is_trained_by_the_consistency_term_only():
    model, batch = build_model(consistency=1.0), random_scenes()
    ways = [f"scores.{part}.{way}.weight" for part in ("query", "key") for way in ("audio->text", "text->audio")]
    listed = [f"scores.{part}.{way}.weight" for part in ("query", "key") for way in ("image->text", "audio->image")]
    matching = gradient_sums(model, "matching", batch)
    assert all(matching.get(way, 0.0) == 0 for way in ways)
    assert all(matching[way] > 0 for way in listed)
    assert all(gradient_sums(model, "consistency", batch)[way] > 0 for way in ways + listed)
    messages = build_model(pairs=THREE, transfer=["audio", "text"])
    assert all(gradient_sums(messages, "matching", batch)[way] > 0 for way in ways)


def test_probe_loss_trains_the_probe_only():
    result = gradient_sums(build_model(mixing="attention"), "probe", random_scenes())
    assert {key.split(".")[0] for key, size in result.items() if size > 0} == {"probes"}


def test_item_order_does_not_matter():
    model, batch = build_model(consistency=1.0, mixing="moda"), random_scenes()
    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(1))
    moved = {**batch, "image": batch["image"][:, order], "target": batch["target"].clone()}
    moved["target"][:, 1] = batch["target"][:, 1, order]
    for name, loss in model.losses(batch).items():
        torch.testing.assert_close(model.losses(moved)[name], loss, **EXACT)
    one, other = model(batch).maps["audio", "image"], model(moved).maps["audio", "image"]
    torch.testing.assert_close(other, one[..., order], **EXACT)


def test_shared_space_has_one_projection_per_modality():
    model, own = build_model(shared=True), build_model()
    scores = model(random_scenes()).scores
    torch.testing.assert_close(scores["audio", "text"], scores["text", "audio"].transpose(1, 2), **EXACT)
    sizes = [sum(p.numel() for p in part.scores.parameters()) for part in (model, own)]
    assert sizes == [3 * DIM * WIDTH, 6 * 2 * (DIM + 1) * WIDTH]


def test_untrained_moda_equals_attention():
    plain, moda = build_model(mixing="attention", heads=2), build_model(mixing="moda", heads=2, merge="mass")
    missing, extra = moda.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert all(".aligner." in key for key in missing)
    batch = random_scenes()
    torch.testing.assert_close(moda(batch).items["text"], plain(batch).items["text"], rtol=1e-6, atol=1e-7)
    gated = build_model(mixing="moda", heads=2, merge="gate")
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(gated(batch).items["text"], plain(batch).items["text"], rtol=1e-3)


@pytest.mark.parametrize("mixing", ["none", "attention", "moda"])
@pytest.mark.parametrize("sinkhorn", [0, 20])
def test_missing_items_are_excluded(mixing, sinkhorn):
    model, batch = build_model(MaskedEncoder, consistency=1.0, mixing=mixing, sinkhorn=sinkhorn), random_scenes()
    batch["text"][0, 2] = 0.0
    batch["text"][3] = 0.0
    result = model(batch)
    assert not result.present["text"][0, 2]
    assert as_float(result.maps["audio", "text"][0, :, 2].abs().sum()) == 0
    assert as_float(result.maps["text", "audio"][0, 2].abs().sum()) == 0
    assert model.complete(result).tolist() == [False, True, True, False, True, True, True]
    losses = model.losses(batch)
    sum(losses.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    # Whatever the target says of an item that is not there.
    other = {**batch, "target": batch["target"].clone()}
    other["target"][3, 2] = other["target"][3, 2].roll(1)
    for name, loss in model.losses(other).items():
        torch.testing.assert_close(loss, losses[name], **EXACT)
    # The term sees the other scenes alone.
    rest = {name: values[model.complete(result)] for name, values in batch.items()}
    torch.testing.assert_close(model.losses(rest)["consistency"], losses["consistency"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mixing", ["none", "moda"])
def test_batch_without_a_modality(mixing):
    model, batch = build_model(consistency=1.0, mixing=mixing), random_scenes()
    for lacking in ({**batch, "text": None}, {k: v for k, v in batch.items() if k != "text"}):
        losses = model.losses(lacking)
        assert set(model(lacking).maps) == {("audio", "image"), ("image", "audio")}
        assert as_float(losses["consistency"]) == 0
        assert all(bool(torch.isfinite(loss)) for loss in losses.values())
    one = model.losses({"text": batch["text"], "target": batch["target"]})
    assert as_float(one["matching"]) == 0
    sum(one.values()).backward()
    with pytest.raises(
        ShapeError, match=r"expected at least one modality, all with the same number of scenes, got \{\}"
    ):
        model({"target": batch["target"]})


def test_single_item_has_zero_loss():
    model = build_model(consistency=1.0)
    losses = model.losses(random_scenes(items=1))
    assert as_float(losses["matching"]) == pytest.approx(0, abs=1e-12)
    assert as_float(losses["consistency"]) == pytest.approx(0, abs=1e-6)
    sum(losses.values()).backward()


def test_invalid_batches_raise():
    model, batch = build_model(), random_scenes()
    batch["image"][3, 1, 0] = math.nan
    with pytest.raises(NonFiniteError, match="CrossModalMatcher 'image': expected finite inputs, got NaN or infinity"):
        model.losses(batch)
    batch = random_scenes()
    with pytest.raises(ShapeError, match=r"'audio': expected \(batch, item, \.\.\.\), got shape \(7, 13\)"):
        model({**batch, "audio": batch["audio"][:, 0]})
    with pytest.raises(ShapeError, match=r"same number of scenes, got {'audio': 2, 'image': 7, 'text': 7}"):
        model({**batch, "audio": batch["audio"][:2]})
    with pytest.raises(ShapeError, match=r"target: expected class indices \(batch, modality, item\) = \(7, 3, 5\)"):
        model.losses({**batch, "target": batch["target"][:, 0]})
    with pytest.raises(ShapeError, match=r"encoder 'audio': expected tokens of width dim = 4, got 6"):
        build_model(dim=4)(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, r"pairs: expected one or more pairs, as \[\[audio, image\], \[image, text\]\], got \[\]"),
        ({"pairs": "audio-image"}, r"expected one or more pairs"),
        (
            {"pairs": [["audio", "image", "text"]]},
            r"expected two modalities as a pair, got \['audio', 'image', 'text'\]",
        ),
        ({"pairs": [["audio", "audio"]]}, r"expected two modalities as a pair"),
        ({"pairs": [["audio", "imag"]]}, r"expected a known modality, got 'imag'\. Did you mean 'image'"),
        ({"pairs": [["audio", "image"], ["image", "audio"]]}, r"expected each pair once"),
        ({"pairs": THREE}, r"transfer: expected the pair to evaluate, since all are trained, got None\. Set transfer"),
        ({"transfer": ["audio", "smell"]}, r"expected a known modality, got 'smell'"),
        ({"consistency": -1.0}, r"expected a finite consistency >= 0, temperature > 0, .*, got consistency = -1\.0"),
        ({"consistency": math.nan}, r"got consistency = nan"),
        ({"temperature": 0.0}, r"temperature = 0\.0"),
        ({"width": 0}, r"width = 0"),
        ({"sinkhorn": -1}, r"sinkhorn = -1"),
        ({"consistency": 1.0, "kind": "nuclar"}, r"expected a known kind, got 'nuclar'\. Did you mean 'nuclear'"),
        ({"mixing": "mode"}, r"Mixing: expected a known kind, got 'mode'\. Did you mean 'moda'"),
        ({"mixing": "moda", "depth": 0}, r"Mixing: expected depth >= 1, got depth = 0"),
        ({"dim": None}, r"expected encoders of one width, got {'audio': None"),
    ],
)
def test_invalid_arguments_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(**options)


def test_two_modalities_raise():
    with pytest.raises(ConfigError, match="expected three or more modalities, got 2"):
        CrossModalMatcher({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}, 5, pairs=[["a", "b"]], dim=3)


def test_data_with_single_items_raise():
    source = SimpleNamespace(task="classification", num_outputs=10)
    with pytest.raises(ConfigError, match=r"expected data of scenes .* for classification\. Use data: {name: triples"):
        CrossModalMatcher.for_data(source, {}, pairs=TWO)
    source.task = "correspondence"
    encoders = {name: nn.Linear(size, DIM) for name, size in INPUTS.items()}
    with pytest.raises(
        ConfigError, match=r"expected a known option of CrossModalMatcher, got 'pair'\. Did you mean 'pairs'"
    ):
        CrossModalMatcher.for_data(source, encoders, pair=TWO, dim=DIM)
    assert CrossModalMatcher.for_data(source, encoders, pairs=TWO, dim=DIM).transfer == ("audio", "text")


def test_matched_items_and_composed_maps():
    index, has = matched_items(torch.tensor([[[7, 3, 1], [3, 7, 2]]]), 1, 0)
    assert index[0][has[0]].tolist() == [1, 0]
    assert has.tolist() == [[True, True, False]]
    eye, turn = torch.eye(3), torch.eye(3)[[1, 2, 0]]
    result = {("a", "b"): turn, ("b", "c"): turn, ("a", "d"): eye, ("d", "c"): eye}
    assert torch.equal(composed_maps({**result, ("a", "c"): eye}, "a", "c"), (turn @ turn + eye) / 2)


def true_matching(target, wrong=()):
    """Scenes with the true maps, hard; those of the ordered pairs in ``wrong`` are moved on by one column."""
    maps, index, has = {}, {}, {}
    for i, one in enumerate(NAMES):
        for j, other in enumerate(NAMES):
            if i != j:
                index[one, other], has[one, other] = matched_items(target, i, j)
                columns = index[one, other] + ((one, other) in wrong)
                maps[one, other] = torch.eye(target.shape[-1])[columns % target.shape[-1]]
    messages = {"audio": torch.tensor([1.0]), "image": torch.tensor([1.0, 0.0]), "text": torch.tensor([0.0])}
    return SampledItemSets(maps, index, has, torch.ones(len(target), dtype=torch.bool), messages)


def test_scores_of_known_maps():
    target = random_scenes()["target"]
    trained, transfer = [("audio", "image"), ("image", "text")], ("audio", "text")
    result = evaluate_matching([true_matching(target)], NAMES, trained, transfer)
    assert result.pop("accuracy/audio") == 1
    assert (result.pop("accuracy"), result.pop("accuracy/image"), result.pop("accuracy/text")) == (0.5, 0.5, 0)
    assert result.pop("chance") == 1 / ITEMS
    assert result.pop("cycle_error") == 0
    assert result.pop("consistency") == pytest.approx(1)
    assert set(result.values()) == {1.0}
    # One way wrong, in the first two batches of three: a third is right, and the other way everywhere.
    both = [true_matching(target, wrong=[transfer]), true_matching(target, wrong=[transfer]), true_matching(target)]
    result = evaluate_matching(iter(both), NAMES, trained, transfer)
    assert result["transfer"] == result["matching/audio-text"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["transfer_composed"] == result["matching"] == 1
    # What is composed goes wrong with either part.
    result = evaluate_matching([true_matching(target, wrong=[("audio", "image")])], NAMES, trained, transfer)
    assert (result["transfer"], result["transfer_composed"], result["matching"]) == (1, 0.5, 0.75)


def test_tied_map_entries_count_as_chance():
    known = true_matching(random_scenes()["target"])
    pair = ("audio", "image")
    result = evaluate_matching(
        [known._replace(maps={p: torch.ones_like(m) for p, m in known.maps.items()})], NAMES, [pair], pair
    )
    assert [result[name] for name in ("matching", "transfer", "transfer_composed")] == pytest.approx(
        [result["chance"]] * 3
    )
    known.maps[pair][0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="evaluate: expected a map from audio to image without NaN"):
        evaluate_matching([known], NAMES, [pair], pair)


def test_evaluation_without_complete_scene_raises():
    known = true_matching(random_scenes()["target"])
    with pytest.raises(DataError, match="evaluate: expected a scene without missing items, got none"):
        evaluate_matching([known._replace(complete=~known.complete)], NAMES, [("audio", "image")], ("audio", "text"))


class PatternData:
    """Every class has a random pattern in each modality: easy scenes, and new ones in each batch."""

    task, num_outputs = "correspondence", CLASSES

    def batches(self, split, batch_size, *, seed, epoch, train):
        patterns = {
            n: torch.randn(CLASSES, size, generator=torch.Generator().manual_seed(size)) for n, size in INPUTS.items()
        }
        for number in range(40 if train else 1):
            batch = random_scenes(torch.float32, seed=1000 * epoch + number + (0 if train else 10**6), count=64)
            target = batch["target"]
            yield {n: patterns[n][target[:, index]] for index, n in enumerate(NAMES)} | {"target": target}


def train_on_patterns(**options):
    model, source = build_model(dtype=torch.float32, width=8, **options), PatternData()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for epoch in range(3):
        for batch in source.batches("train", 64, seed=0, epoch=epoch, train=True):
            optimizer.zero_grad()
            sum(model.losses(batch).values()).backward()
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.evaluate(source)["metrics"]


def test_consistency_transfers_to_an_untrained_pair():
    plain, agreeing = train_on_patterns(encoder=WideEncoder), train_on_patterns(encoder=WideEncoder, consistency=1.0)
    assert plain["matching"] > 0.9
    assert agreeing["matching"] > 0.9
    assert plain["transfer"] < 0.5 < 0.8 < agreeing["transfer"]
    assert agreeing["consistency"] > plain["consistency"]


class WideEncoder(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, outputs))


def test_evaluation_does_not_change_the_model():
    model = build_model(dtype=torch.float32)
    model.encoders["text"].eval()
    model.evaluate_split(PatternData(), "val")
    assert model.training
    assert not model.encoders["text"].training
    assert all(p.grad is None for p in model.parameters())


def test_token_mixing():
    parts = {"audio": torch.randn(2, 3, DIM), "text": torch.randn(2, 5, DIM)}
    assert TokenMixing(NAMES, DIM)(parts, {}) == parts
    mixed = TokenMixing(NAMES, DIM, kind="moda", heads=2)(parts, {"text": torch.ones(2, 5, dtype=torch.bool)})
    assert {name: values.shape for name, values in mixed.items()} == {n: v.shape for n, v in parts.items()}


def test_recipe_variants_learn():
    recipe = recipes.load_recipe("transfer")
    source = load_dataset("triples", **{key: value for key, value in recipe.data.items() if key != "name"})
    batch = source.batch("train", torch.arange(3), seed=0, epoch=0, train=True)
    assert set(recipe.methods) == set(recipe.variants)
    for method in recipe.methods:
        torch.manual_seed(0)
        model, balancers = method_factory.build_model(method_factory.parse_method(method, recipe), recipe, source)
        assert balancers == []
        losses = model.losses(batch)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        untold = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert all("audio->text" in name or "text->audio" in name for name in untold)
        assert len(untold) == (8 if method in ("plain", "attention", "moda") else 0)
        assert ("consistency" in losses) == bool(recipe.variants[method].get("consistency"))
        assert model.transfer == ("audio", "text")


def test_recipe_documentation_page():
    """The script that makes the tables and the picture, on runs whose figures are known."""
    index = importlib.util.spec_from_file_location("page", Path(__file__).parents[2] / "scripts" / "transfer.py")
    page = importlib.util.module_from_spec(index)
    index.loader.exec_module(page)
    figures = {"plain": (0.2, 0.3), "consistency": (0.7, 0.9), "attention": (0.3, 0.3), "moda": (0.5, 0.6)}
    shared = {"transfer_synchronized": 0.5, "consistency": 0.625, "chance": 0.25}
    runs = [
        {"method": method, "seed": seed, "fold": None,
         "metrics": {"transfer": value, "transfer_composed": 0.4 + seed / 10, **shared}}
        for method, values in figures.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    lines = page.table(runs, {"transfer": "unsupervised", "consistency": "score"}, "transfer").splitlines()
    assert lines[0] == "| variant | unsupervised | score | against | difference |"
    assert lines[2] == "| plain | 25.0 \u00b1 7.1 | 0.62 \u00b1 0.00 |  |  |"
    assert lines[5].startswith("| moda | 55.0 \u00b1 7.1 | 0.62 \u00b1 0.00 | attention | +25.0 (2 of 2, p = ")
    ways = page.routes(runs).splitlines()
    assert ways[2] == "| plain, composed | 45.0 \u00b1 7.1 |  |  |"
    assert ways[3].startswith("| consistency, direct | 80.0 \u00b1 14.1 | plain, composed | +35.0 (2 of 2, p = ")
    with plot_style.style_context():
        assert plot_style.to_png(page.figure(runs)).startswith(b"\x89PNG")


def test_unequal_item_counts_raise():
    batch = random_scenes()
    batch["text"] = batch["text"][:, :2]
    with pytest.raises(ShapeError, match=r"expected equally many items in all modalities, got \{.*'text': 2\}"):
        build_model().losses(batch)
