"""DualEncoder: losses against double loops, two and three modalities, missing modalities, metrics."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.data import load_dataset
from equipoise.data.sets.emoji import Combinations
from equipoise.data.sets.scenes import Scenes
from equipoise.encoders import PatchEncoder, SequenceEncoder, TextEncoder
from equipoise.errors import ConfigError, NonFiniteError, ShapeError
from equipoise.models.dual_encoder import DualEncoder
from equipoise.models.dual_encoder.dual_encoder_metrics import (
    composition_metrics,
    embedding_metrics,
    evaluate_dual_encoder,
    full_gallery_metrics,
    retrieval_by_group,
    retrieval_metrics,
)
from equipoise.models.self_contained import SelfContainedModel
from helpers.tolerance import TOL
from oracles.align import info_nce, siglip

CLOSE = TOL[torch.float32]
TEXT = torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0], [2, 5, 0], [4, 0, 0]])


def build_encoders(*names):
    torch.manual_seed(0)
    result = {
        "image": PatchEncoder(3, (4, 4), patch=2, dim=6, depth=1, heads=2),
        "text": TextEncoder(7, max_length=5, dim=10, depth=1, heads=2),
        "audio": SequenceEncoder(5, max_length=7, dim=8, depth=1, heads=2),
    }
    return {name: result[name] for name in names}


def build_model(*names, **options):
    layer = build_encoders(*(names or ("image", "text")))
    torch.manual_seed(1)
    return DualEncoder(layer, **{"dim": 11, **options})


def random_inputs(*names, count=5):
    generator = torch.Generator().manual_seed(2)
    result = {
        "image": torch.randn(count, 3, 4, 4, generator=generator),
        "text": TEXT[:count],
        "audio": torch.randn(count, 7, 5, generator=generator),
    }
    return {name: result[name] for name in (names or ("image", "text"))}


def loss_values(model, batch):
    return {name: float(loss.detach()) for name, loss in model.losses(batch).items()}


def embeddings(model, batch):
    with torch.no_grad():
        return {name: part.double().numpy() for name, part in model.embed(batch).items()}


def test_embeddings_are_normalized_and_of_equal_width():
    result = build_model("image", "text", "audio").embed(random_inputs("image", "text", "audio"))
    assert list(result) == ["image", "text", "audio"]
    for part in result.values():
        assert part.shape == (5, 11)
        torch.testing.assert_close(part.norm(dim=1), torch.ones(5), **CLOSE)


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
@pytest.mark.parametrize("target", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_loss_of_two_modalities_against_loops(loss, target):
    model, batch = build_model(loss=loss), random_inputs()
    result = loss_values(model, {**batch, "target": torch.tensor(target)})
    u = embeddings(model, batch)
    same = torch.tensor([[one == other for other in target] for one in target]).numpy()
    if loss == "info_nce":
        expected = info_nce(u["image"], u["text"], 1 / 0.07, positives=same)
    else:
        expected = siglip(u["image"], u["text"], 10.0, -10.0, ids=target)
    assert list(result) == ["image-text"]
    assert result["image-text"] == pytest.approx(expected, rel=1e-5)


def test_loss_of_three_modalities_is_the_mean_over_pairs():
    model, batch = build_model("image", "text", "audio"), random_inputs("image", "text", "audio")
    result = loss_values(model, {**batch, "target": torch.arange(5)})
    u = embeddings(model, batch)
    for one, other in (("image", "text"), ("image", "audio"), ("text", "audio")):
        expected = info_nce(u[one], u[other], 1 / 0.07) / 3
        assert result[f"{one}-{other}"] == pytest.approx(expected, rel=1e-5)


def test_anchor_limits_the_pairs():
    model, batch = build_model("image", "text", "audio", anchor="text"), random_inputs("image", "text", "audio")
    result = loss_values(model, {**batch, "target": torch.arange(5)})
    u = embeddings(model, batch)
    assert set(result) == {"text-image", "text-audio"}
    assert result["text-audio"] == pytest.approx(info_nce(u["text"], u["audio"], 1 / 0.07) / 2, rel=1e-5)
    with pytest.raises(ConfigError, match=r"DualEncoder: expected a known anchor, got 'texts'\. Did you mean 'text'"):
        build_model(anchor="texts")


def test_batch_with_missing_modality():
    model, batch = build_model("image", "text", "audio"), random_inputs("text", "audio")
    result = loss_values(model, {**batch, "target": torch.arange(5)})
    u = embeddings(model, batch)
    assert list(result) == ["text-audio"]
    assert result["text-audio"] == pytest.approx(info_nce(u["text"], u["audio"], 1 / 0.07), rel=1e-5)


def test_sample_with_missing_caption():
    model, batch = build_model(), random_inputs()
    batch["text"] = batch["text"].clone()
    batch["text"][1] = 0
    (loss,) = model.losses({**batch, "target": torch.arange(5)}).values()
    u, kept = embeddings(model, batch), [0, 2, 3, 4]
    assert not u["text"][1].any()
    assert float(loss.detach()) == pytest.approx(info_nce(u["image"][kept], u["text"][kept], 1 / 0.07), rel=1e-5)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_no_complete_pair_gives_zero_loss():
    model, batch = build_model(), random_inputs()
    batch["text"] = torch.zeros_like(batch["text"])
    (loss,) = model.losses({**batch, "target": torch.arange(5)}).values()
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_all_parameters_get_gradients():
    model, batch = build_model("image", "text", "audio"), random_inputs("image", "text", "audio")
    sum(model.losses({**batch, "target": torch.arange(5)}).values()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The bias of keys adds the same to every logit of a softmax.
    assert all(name.endswith("key.bias") or "positions" in name for name in still), still


def test_training_increases_similarity_of_pairs():
    model, batch = build_model(), random_inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        loss = sum(model.losses({**batch, "target": torch.arange(5)}).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = model.embed(batch)
    assert eq.alignment.recall_at_k(result["image"] @ result["text"].T, 1) == 1.0


def test_initial_scale_and_bias():
    assert float(build_model(scale=5.0).loss.log_scale.detach()) == pytest.approx(math.log(5.0))
    model = build_model(loss="siglip", scale=3.0, bias=-2.0).loss
    assert (float(model.log_scale.detach()), float(model.bias.detach())) == (pytest.approx(math.log(3.0)), -2.0)
    assert build_model(smoothing=0.1).loss.options["smoothing"] == 0.1


def nan_batch():
    return {**random_inputs(), "image": torch.full((5, 3, 4, 4), torch.nan)}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: build_model("image"), ConfigError, "DualEncoder: expected two or more modalities, got image"),
        (lambda: DualEncoder({}), ConfigError, "expected two or more modalities, got none"),
        (lambda: build_model(loss="infonce"), ConfigError, r"expected a known loss, got 'infonce'\. Did you mean "
                                                           r"'info_nce'"),
        (lambda: build_model(bias=1.0), ConfigError, "loss 'info_nce': expected a known option of InfoNCE, got 'bias'"),
        (lambda: build_model(loss="siglip", smoothing=0.1), ConfigError, "a known option of SigLIP, got 'smoothing'"),
        (lambda: build_model(scale=-1.0), ConfigError, "DualEncoder loss 'info_nce', InfoNCE: expected 0 < scale"),
        (
            lambda: DualEncoder({"image": nn.Flatten(), "text": nn.Flatten()}), ConfigError,
            "DualEncoder encoder 'image': expected an attribute dim, the width of its tokens, got Flatten without "
            "dim. Set",
        ),
        (
            lambda: build_model().losses({"text": TEXT, "target": torch.arange(5)}), ConfigError,
            r"DualEncoder losses: expected two or more .*, got 'text' without 'image'\. A batch needs at least",
        ),
        (lambda: build_model().embed({"sound": TEXT}), ConfigError, "expected one or more of image, text, got sound"),
        (lambda: build_model().embed({}), ConfigError, "got nothing"),
        (
            lambda: build_model().embed({**random_inputs(), "text": TEXT[:4]}), ShapeError,
            "DualEncoder 'text': expected as many samples as 'image' has = 5, got 4. Omit a modality from",
        ),
        (lambda: build_model().embed(nan_batch()), NonFiniteError, "'image': expected finite inputs, got NaN"),
        (lambda: build_model().embed({"image": torch.zeros(2, 1, 4, 4)}), ShapeError, r"got shape \(2, 1, 4, 4\)"),
        (lambda: build_model().embed({"text": torch.ones(2, 6, dtype=torch.long)}), ShapeError, "1 to 5 words, got 6"),
    ],
)  # fmt: skip
def test_invalid_input_raises(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


class MemoryData:
    """A data set in memory, of one split three times over."""

    task = "retrieval"

    def __init__(self, batch, target):
        self.names, self.held, self.target = tuple(batch), batch, target
        self.train = self.val = self.test = SimpleNamespace(inputs=batch, target=target)
        self.shapes = {name: tuple(values.shape[1:]) for name, values in batch.items()}

    def split(self, name):
        return getattr(self, name)

    def batches(self, split, size, **rest):
        yield {**self.held, "target": self.target}


class ComposedData(MemoryData):
    """The first two samples are put together of two parts."""

    def combinations(self, split):
        parts = torch.tensor([[[1, 0, 0], [2, 0, 0]], [[3, 0, 0], [4, 0, 0]]])
        return Combinations(torch.tensor([0, 1]), "text", parts, torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("names", [("image", "text"), ("image", "text", "audio")])
def test_retrieval_metrics_in_both_directions(names):
    model = build_model(*names)
    result = model.evaluate(MemoryData(random_inputs(*names), torch.arange(5)))["metrics"]
    u = embeddings(model.eval(), random_inputs(*names))
    recalls = []
    for one in names:
        for other in names:
            if one != other:
                cosines = torch.tensor(u[one] @ u[other].T)
                own = [1 + int((row > row[index]).sum()) for index, row in enumerate(cosines)]
                recalls.append(sum(rank <= 1 for rank in own) / 5)
                assert result[f"{one}_to_{other}/recall@1"] == pytest.approx(recalls[-1])
                assert result[f"{one}_to_{other}/mrr"] == pytest.approx(sum(1 / rank for rank in own) / 5)
                assert result[f"{one}_to_{other}/median_rank"] == sorted(own)[2]
    assert result["recall@1"] == pytest.approx(sum(recalls) / len(recalls))
    assert result["chance/recall@1"] == pytest.approx(1 / 5)
    assert result["chance/recall@5"] == 1.0
    assert {f"uniformity/{name}" for name in names} <= set(result)
    assert f"cka/{names[0]}-{names[1]}" in result
    assert "composed_to_image/recall@1" not in result


def test_duplicates_count_as_correct():
    same = torch.eye(3)[[0, 0, 1]]
    result = retrieval_metrics({"image": same, "text": same}, torch.tensor([4, 4, 7]))
    assert result["recall@1"] == 1.0
    assert result["chance/recall@1"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    apart = retrieval_metrics({"image": same, "text": same}, torch.tensor([4, 5, 7]))
    assert apart["recall@1"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_incomplete_pairs_are_excluded():
    one, other = torch.eye(4), torch.eye(4).clone()
    other[2] = 0
    result = retrieval_metrics({"image": one, "text": other}, torch.arange(4))
    assert result["chance/recall@1"] == pytest.approx(1 / 3)
    assert retrieval_metrics({"image": one, "text": torch.zeros(4, 4)}, torch.arange(4)) == {}
    assert "cka/image-text" not in embedding_metrics({"image": one, "text": torch.zeros(4, 4)})


def test_group_recall_uses_the_full_gallery():
    image, text = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    result = retrieval_by_group({"image": image, "text": text}, torch.arange(4), ["a", "b", "b", "c"])
    assert result == {"recall@1/a": 1.0, "recall@1/b": 0.5, "recall@1/c": 0.0}
    assert retrieval_by_group({"image": image, "text": torch.zeros(4, 4)}, torch.arange(4), list("abbc")) == {}


def test_full_gallery_metrics():
    asks = {"image": torch.eye(3), "text": torch.eye(3)}
    more = {name: torch.cat([part, part[:1]]) for name, part in asks.items()}
    result = full_gallery_metrics(asks, torch.arange(3), more, torch.tensor([0, 1, 2, 9]))
    # The right item ties with a wrong one: it is first in half of the orders.
    assert result["image_to_text_among_all/recall@1"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert result["image_to_text_among_all/recall@5"] == 1.0


def test_composition_metrics():
    model = build_model().eval()
    source = ComposedData(random_inputs(), torch.arange(5))
    held = {name: torch.from_numpy(part).float() for name, part in embeddings(model, random_inputs()).items()}
    with torch.no_grad():
        result = composition_metrics(model, source, "test", held)
        parts = model.embed({"text": torch.tensor([[1], [2], [3], [4]])})["text"]
    added = [parts[0] + parts[1], parts[2] + parts[3]]
    cosines = [[float(a @ held["image"][row] / a.norm()) for row in (0, 1)] for a in added]
    expected = ((cosines[0][0] - cosines[0][1]) + (cosines[1][1] - cosines[1][0])) / 2
    assert result["compositionality/image"] == pytest.approx(expected, abs=1e-6)
    solved = ((cosines[0][0] > cosines[0][1]) + (cosines[1][1] > cosines[1][0])) / 2
    assert result["composed_to_image/recall@1"] == solved
    assert result["chance/composed_to_image/recall@1"] == 0.5
    full = evaluate_dual_encoder(model, source, "test")
    assert full["compositionality/image"] == pytest.approx(expected, abs=1e-6)


def test_evaluation_restores_the_model_state():
    model = build_model(dropout=0.5).train()
    state = torch.random.get_rng_state()
    source = MemoryData(random_inputs(), torch.arange(5))
    assert model.evaluate(source) == model.evaluate(source)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_for_data_and_recipe_options():
    assert issubclass(DualEncoder, SelfContainedModel)
    assert eq.models.DualEncoder is DualEncoder
    model = DualEncoder.for_data(
        MemoryData(random_inputs(), torch.arange(5)), build_encoders("image", "text"), dim=7, loss="siglip"
    )
    assert model.embed(random_inputs())["text"].shape == (5, 7)
    with pytest.raises(ConfigError, match="model 'dual_encoder': expected a known option of DualEncoder, got 'dims'"):
        DualEncoder.for_data(MemoryData(random_inputs(), torch.arange(5)), build_encoders("image", "text"), dims=7)
    scenes = MemoryData(
        {name: values[:, None] for name, values in random_inputs().items()}, torch.zeros(5, 2, 1).long()
    )
    with pytest.raises(
        ConfigError, match=r"expected data with one item per sample.*got MemoryData for retrieval.*items: 1"
    ):
        DualEncoder.for_data(scenes, build_encoders("image", "text"))


def test_question_answering_data_raise():
    with pytest.raises(ConfigError, match=r"expected data with one item per sample.*got Scenes for language"):
        DualEncoder.for_data(Scenes(samples=128), build_encoders("image", "text"))


def test_text_given_as_vectors():
    source = load_dataset("triples", letters="vectors")
    towers = {"image": torch.nn.Flatten(), "text": torch.nn.Flatten()}
    towers["image"].dim, towers["text"].dim = 64, 216
    batch = source.batch("val", torch.arange(3), seed=0, epoch=0, train=False)
    result = DualEncoder.for_data(source, towers, dim=5).embed(batch)
    assert {name: part.shape for name, part in result.items()} == {"image": (3, 5), "text": (3, 5)}


@pytest.mark.parametrize("options", [{"dim": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_options_out_of_range_raise(options):
    with pytest.raises(ConfigError, match=r"DualEncoder: expected dim >= 1 and 0 <= dropout < 1, got dim = "):
        DualEncoder(build_encoders("image", "text"), **options)


def test_documentation_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs/methods/dual_encoder.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, {})
    assert "image-text" in capsys.readouterr().out
