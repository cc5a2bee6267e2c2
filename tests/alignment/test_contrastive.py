"""InfoNCE, SigLIP and hard negatives against double loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from equipoise.alignment.losses.contrastive import InfoNCE, info_nce, row_losses
from equipoise.alignment.losses.hard_negatives import (
    hard_negative_log_weights,
    nearest_negatives,
    same_ids,
    sample_negatives,
    triplet_loss,
)
from equipoise.alignment.losses.sigmoid_loss import SigLIP, siglip, sum_over_pairs
from equipoise.errors import ConfigError, ShapeError
from equipoise.tokens.token_batch import Output, Tokens
from helpers.tolerance import TOL
from oracles import align as slow

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
BATCH, DIM = 7, 5
IDS = torch.tensor([4, 9, 4, 1, 9, 4, 2])


def unit_vectors(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=random, dtype=torch.float64), dim=-1)


A, B, C = (unit_vectors(BATCH, DIM, seed=seed) for seed in range(3))


def as_float(value):
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def assert_close(result, expected, tolerance=EXACT):
    assert as_float(result) == pytest.approx(as_float(expected), rel=tolerance["rtol"], abs=tolerance["atol"])


def test_reference_values():
    eye = torch.eye(2, dtype=torch.float64)
    assert float(info_nce(eye, eye, scale=1.0)) == pytest.approx(0.313262, abs=1e-6)
    assert float(siglip(eye, eye, scale=10.0, bias=-10.0)) == pytest.approx(0.693193, abs=1e-6)
    same = unit_vectors(1, DIM).expand(BATCH, DIM)
    assert_close(info_nce(same, same, scale=37.0), math.log(BATCH))
    # Initial values: one positive per row, and each negative classified with near certainty.
    assert_close(SigLIP().double()(eye, eye), math.log(2) + math.log1p(math.exp(-10)), SINGLE)


@pytest.mark.parametrize(
    "options", [{}, {"smoothing": 0.1}, {"beta": 0.7}, {"top_k": 2}, {"smoothing": 0.3, "beta": 0.2, "top_k": 3}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce(options, masked):
    masks = {}
    if masked:
        positives, ignored = np.eye(BATCH, dtype=bool), np.zeros((BATCH, BATCH), dtype=bool)
        positives[0, 2] = positives[2, 0] = True
        positives[4, 4] = False
        ignored[1, 5] = ignored[3, 0] = ignored[6, 6] = True
        masks = {"positives": positives, "ignored": ignored}
    names = {"beta": "hard"}
    result = info_nce(
        A, B, scale=3.0,
        **{names.get(name, name): value for name, value in options.items()},
        **{name: torch.from_numpy(mask) for name, mask in masks.items()},
    )  # fmt: skip
    assert_close(result, slow.info_nce(A.numpy(), B.numpy(), 3.0, **masks, **options))


@pytest.mark.parametrize("tile", [1, 2, 3, BATCH, 100])
@pytest.mark.parametrize("ids", [None, IDS])
def test_siglip(tile, ids):
    result = siglip(A, B, scale=3.0, bias=-2.0, ids=ids, tile=tile)
    assert_close(result, slow.siglip(A.numpy(), B.numpy(), 3.0, -2.0, None if ids is None else ids.tolist()))


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(BATCH)))
def test_pair_order_does_not_matter(order):
    order = list(order)
    assert_close(info_nce(A[order], B[order], scale=5.0), info_nce(A, B, scale=5.0))
    assert_close(info_nce(B, A, scale=5.0), info_nce(A, B, scale=5.0))
    assert_close(siglip(A[order], B[order], scale=5.0, bias=-1.0, tile=3), siglip(A, B, scale=5.0, bias=-1.0))


def leaf_tensors(*values):
    return [value.clone().requires_grad_() for value in values]


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "hard": 0.5}, {"positives": same_ids(IDS)}])
def test_gradients_of_info_nce(options):
    scale = torch.tensor(2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, scale=s, **options), leaf_tensors(A, B, scale))


@pytest.mark.parametrize("tile", [2, 100])
def test_gradients_of_siglip(tile):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (2.0, -1.0)]

    def loss(a, b, scale, bias):
        return siglip(a, b, scale=scale, bias=bias, ids=IDS, tile=tile)

    assert torch.autograd.gradcheck(loss, leaf_tensors(A, B, *numbers))
    with torch.no_grad():
        assert_close(loss(A, B, *numbers), siglip(A, B, scale=2.0, bias=-1.0, ids=IDS))
    # A rectangular matrix: the rows of one process against those of all.
    part = sum_over_pairs(A[:3], B, 2.0, -1.0, IDS[:3], IDS, 2) + sum_over_pairs(A[3:], B, 2.0, -1.0, IDS[3:], IDS, 5)
    assert_close(part / BATCH, siglip(A, B, scale=2.0, bias=-1.0, ids=IDS))


def test_one_hot_vectors():
    """Gradients are summed over tiles; a missing tile would change single rows here."""
    a, b = leaf_tensors(A, B)
    siglip(a, b, scale=3.0, bias=-2.0, tile=3).backward()
    p, q = leaf_tensors(A, B)
    logits = 3.0 * p @ q.T - 2.0
    sign = 2 * torch.eye(BATCH, dtype=torch.float64) - 1
    (F.softplus(-sign * logits).sum() / BATCH).backward()
    torch.testing.assert_close(a.grad, p.grad, **EXACT)
    torch.testing.assert_close(b.grad, q.grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_float32(dtype):
    a, b = A.to(dtype).requires_grad_(), B.to(dtype)
    for loss in (lambda x: info_nce(x, b, scale=100.0), lambda x: siglip(x, b, scale=100.0, bias=-10.0)):
        result = loss(a)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, loss(a.float()), **SINGLE)
        (grad,) = torch.autograd.grad(result, a)
        assert grad.dtype == dtype
        assert grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        expected = info_nce(A.float(), B.float(), scale=100.0)
    torch.testing.assert_close(expected, info_nce(A.float(), B.float(), scale=100.0), **SINGLE)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.2}])
def test_full_masks_have_no_effect(options):
    eye, none = torch.eye(BATCH, dtype=torch.bool), torch.zeros(BATCH, BATCH, dtype=torch.bool)
    plain = info_nce(A, B, scale=3.0, **options)
    for masks in ({"positives": eye}, {"ignored": none}, {"top_k": BATCH}):
        assert_close(info_nce(A, B, scale=3.0, **options, **masks), plain)
    for ids in (None, torch.arange(BATCH).flip(0)):
        assert_close(InfoNCE(scale=3.0, **options).double()(A, B, ids=ids), plain, SINGLE)


def test_duplicates_are_not_negatives():
    texts = B.clone()
    texts[2], texts[5], texts[4] = texts[0], texts[0], texts[1]
    plain = info_nce(texts, texts, scale=50.0)
    assert float(plain) > 0.3  # duplicates of a row are as similar as the row itself
    twins = same_ids(IDS)
    for loss in (
        info_nce(texts, texts, scale=50.0, ignored=twins),
        InfoNCE(scale=50.0, duplicates="ignore").double()(texts, texts, ids=IDS),
    ):
        assert as_float(loss) < 1e-3
    partners = info_nce(A, B, scale=3.0, positives=twins)
    assert_close(InfoNCE(scale=3.0).double()(A, B, ids=IDS), partners, SINGLE)
    assert_close(partners, slow.info_nce(A.numpy(), B.numpy(), 3.0, twins.numpy()))


def test_three_modalities_form_pairs():
    parts = {"audio": A, "image": B, "text": C}
    pairs = {("audio", "image"): (A, B), ("audio", "text"): (A, C), ("image", "text"): (B, C)}
    loss = InfoNCE(scale=3.0).double()
    terms = loss.terms(parts)
    assert terms.keys() == pairs.keys()
    for name, (a, b) in pairs.items():
        assert as_float(terms[name]) == pytest.approx(slow.info_nce(a.numpy(), b.numpy(), 3.0), rel=SINGLE["rtol"])
    assert_close(loss(parts), sum(as_float(term) for term in terms.values()) / 3)
    anchored = InfoNCE(scale=3.0, anchor="text").double().terms(parts)
    assert set(anchored) == {("text", "audio"), ("text", "image")}
    for name in ("audio", "image"):
        assert_close(anchored["text", name], terms[name, "text"])
    sigmoid = SigLIP(scale=3.0, bias=-2.0, tile=2).double().terms(parts)
    for name, (a, b) in pairs.items():
        assert as_float(sigmoid[name]) == pytest.approx(
            slow.siglip(a.numpy(), b.numpy(), 3.0, -2.0), rel=SINGLE["rtol"]
        )


@pytest.mark.parametrize("model", [InfoNCE, SigLIP])
def test_missing_modality_is_excluded_from_its_pairs(model):
    here = torch.tensor([True, False, True, True, False, True, True])
    parts, loss = {"audio": A, "image": B, "text": C}, model().double()
    terms = loss.terms(parts, present={"image": here})
    full = loss.terms(parts)
    assert_close(terms["audio", "text"], full["audio", "text"])
    assert_close(terms["audio", "image"], loss(A[here], B[here]))
    tokens = {"audio": Tokens(A[:, None]), "image": Tokens(B[:, None], mask=here[:, None]), "text": Tokens(C[:, None])}
    assert_close(loss(tokens), loss(parts, present={"image": here}))
    assert_close(loss.penalty(Output(features=A, tokens=tokens, names=tuple(tokens))), loss(tokens))
    values = B.clone().requires_grad_()
    without_values = loss(A, values) * 0 + loss(
        {"a": A, "b": values}, present={"b": torch.zeros(BATCH, dtype=torch.bool)}
    )
    assert as_float(without_values) == 0.0
    without_values.backward()
    assert float(values.grad.abs().max()) == 0.0
    assert loss.terms({"a": A, "b": B}, present={"b": ~here & here}) == {}
    assert as_float(loss(A[:0], B[:0])) == 0.0


@pytest.mark.parametrize("model", [InfoNCE, SigLIP])
@pytest.mark.parametrize("there", [0.0, math.nan])
def test_missing_modalities_do_not_affect_gradients(model, there):
    here = torch.arange(BATCH) != 2
    values = B.clone().index_fill(0, torch.tensor([2]), there).requires_grad_()
    loss = model(widths={"a": DIM, "b": DIM}, dim=3).double()
    result = loss({"a": A, "b": values}, present={"b": here})
    assert_close(result, loss({"a": A[here], "b": B[here]}))
    result.backward()
    assert float(values.grad[2].abs().max()) == 0.0
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
    empty = Tokens(B[:, None][:, :0])
    assert loss.terms({"a": A, "b": empty}) == {}


def test_gradient_scaler_prevents_underflow_in_half_precision():
    """Gradients of 1e-8 underflow in half precision unless the loss is scaled."""
    a, b = A.half().requires_grad_(), B.half()
    (siglip(a, b, scale=1e-6, bias=-10.0) * 2.0**20).backward()
    reference = A.half().float().requires_grad_()
    siglip(reference, b.float(), scale=1e-6, bias=-10.0).backward()
    assert float(reference.grad.half().abs().max()) < 1e-6
    torch.testing.assert_close(a.grad.float() / 2**20, reference.grad, rtol=TOL[torch.float16]["rtol"], atol=1e-9)


@pytest.mark.parametrize("model", [InfoNCE, SigLIP])
def test_embeddings_are_normalized_and_projected(model):
    loss = model().double()
    assert_close(loss(3 * A, B), loss(A, 0.1 * B))
    torch.manual_seed(0)
    loss = model(widths={"audio": 3, "image": DIM}, dim=2).double()
    audio = unit_vectors(BATCH, 3, seed=5)
    expected = model().double()(audio @ loss.heads["audio"].weight.T, B @ loss.heads["image"].weight.T)
    assert_close(loss({"audio": audio, "image": B}), expected)


def test_scale_is_learned_and_clamped():
    loss = InfoNCE()
    assert as_float(loss.log_scale.exp()) == pytest.approx(1 / 0.07)
    sigmoid = SigLIP()
    assert (as_float(sigmoid.log_scale), as_float(sigmoid.bias)) == pytest.approx((math.log(10), -10))
    loss(A, B).backward()
    sigmoid(A, B).backward()
    for parameter in (loss.log_scale, sigmoid.log_scale, sigmoid.bias):
        assert float(parameter.grad.abs()) > 0
    for result in (InfoNCE(), SigLIP(max_scale=100.0)):
        with torch.no_grad():
            result.log_scale.fill_(9.0)
        far = result(A, B)
        assert as_float(result.log_scale.exp()) == pytest.approx(100.0)
        far.backward()
        assert float(result.log_scale.grad.abs()) > 0  # clamped, but still trainable
    assert not any(parameter.requires_grad for parameter in InfoNCE(learn=False).parameters())
    other = InfoNCE(scale=2.0)
    other.load_state_dict(loss.state_dict())
    assert_close(other(A, B), loss(A, B))


def test_nan_is_propagated():
    broken = A.clone()
    broken[1, 1] = math.nan
    assert info_nce(broken, B, scale=2.0).isnan()
    assert siglip(broken, B, scale=2.0, bias=-1.0).isnan()


def test_weights_of_hard_negatives():
    negatives = ~torch.eye(BATCH, dtype=torch.bool)
    weights = hard_negative_log_weights(3 * A @ B.T, negatives, 0.5).exp()
    torch.testing.assert_close((weights * negatives).sum(dim=1), torch.full((BATCH,), BATCH - 1.0).double(), **EXACT)
    assert torch.equal(weights.diagonal(), torch.ones(BATCH).double())
    z = 3 * A @ B.T
    torch.testing.assert_close((weights[0, 1] / weights[0, 2]).log(), 0.5 * (z[0, 1] - z[0, 2]), **EXACT)
    torch.testing.assert_close(hard_negative_log_weights(z, negatives, 0.0), torch.zeros_like(z), **EXACT)
    alone = hard_negative_log_weights(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), 1.0)
    assert float(alone) == 0.0
    assert_close(info_nce(A[:1], B[:1], scale=2.0, hard=1.0, top_k=3), 0.0)


def test_hardest_negatives_include_ties():
    logits = torch.tensor([[5.0, 2.0, 2.0, 1.0, 0.0]])
    negatives = torch.tensor([[False, True, True, True, True]])
    assert nearest_negatives(logits, negatives, 1)[0].tolist() == [False, True, True, False, False]
    assert nearest_negatives(logits, negatives, 3)[0].tolist() == [False, True, True, True, False]
    assert nearest_negatives(logits, negatives, 9)[0].tolist() == negatives[0].tolist()


def test_negatives_are_sampled_by_similarity():
    logits = torch.tensor([[9.0, 1.0, 0.0, 2.0], [0.0, 9.0, 0.0, 0.0]])
    positives = torch.tensor([[True, False, False, False], [False, True, True, False]])
    random = torch.Generator().manual_seed(0)
    draws = torch.stack([sample_negatives(logits, positives, generator=random).index for _ in range(4000)])
    counts = [[float((draws[:, i] == j).double().mean()) for j in range(4)] for i in range(2)]
    total = math.exp(1) + 1 + math.exp(2)
    expected = [[0.0, math.exp(1) / total, 1 / total, math.exp(2) / total], [0.5, 0.0, 0.0, 0.5]]
    for one, other in zip(counts, expected, strict=True):
        assert one == pytest.approx(other, abs=0.03)  # four standard errors of 4000 samples
    for i in range(2):
        assert not positives[i][draws[:, i]].any()


def test_batch_of_one_has_no_negatives():
    drawn = sample_negatives(torch.zeros(1, 1))
    assert (drawn.index.tolist(), drawn.valid.tolist()) == ([0], [False])
    same = sample_negatives(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool))
    assert not same.valid.any()
    assert sample_negatives(torch.zeros(0, 0)).index.shape == (0,)
    assert float(triplet_loss(torch.ones(1, 1))) == 0.0


def test_sampling_does_not_advance_the_global_rng():
    state = torch.random.get_rng_state()
    sample_negatives(torch.zeros(5, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("masked", [False, True])
def test_triplets(masked):
    positives = same_ids(IDS) if masked else torch.eye(BATCH, dtype=torch.bool)
    if masked:
        positives = positives.clone()
        positives[3] = False
    similarity = A @ B.T
    result = triplet_loss(similarity, positives if masked else None, margin=0.3)
    assert_close(result, slow.triplet(similarity.tolist(), positives.tolist(), 0.3))
    assert torch.autograd.gradcheck(lambda s: triplet_loss(s, positives), leaf_tensors(similarity))


def test_rows_without_positive_are_excluded():
    logits, positives = (3 * A @ B.T).requires_grad_(), torch.eye(BATCH, dtype=torch.bool)
    positives[2] = False
    losses, counted = row_losses(logits, positives, ignored=(~positives).clone().index_fill(0, torch.tensor([2]), True))
    assert counted.tolist() == [True, True, False, True, True, True, True]
    assert as_float(losses[2]) == 0.0
    losses.sum().backward()
    assert float(logits.grad[2].abs().max()) == 0.0
    assert logits.grad.isfinite().all()


def test_errors():
    with pytest.raises(ShapeError, match=r"info_nce a: expected .* with at least one row, got shape \(0, 5\)"):
        info_nce(A[:0], B[:0], scale=1.0)
    with pytest.raises(ShapeError, match=r"siglip b: expected \(batch, dim\) = \(7, 5\) as a has, got \(6, 5\)"):
        siglip(A, B[:6], scale=1.0, bias=0.0)
    with pytest.raises(ShapeError, match=r"info_nce a: .* got shape \(7, 5\), torch.int64"):
        info_nce(A.long(), B, scale=1.0)
    with pytest.raises(ShapeError, match=r"info_nce positives: expected a boolean mask .* same_ids\(ids\) makes one"):
        info_nce(A, B, scale=1.0, positives=torch.eye(BATCH))
    with pytest.raises(ShapeError, match=r"siglip ids: expected shape \(batch,\) = \(7,\), got \(6,\)"):
        siglip(A, B, scale=1.0, bias=0.0, ids=IDS[:6])
    with pytest.raises(ConfigError, match=r"siglip: expected tile >= 1, got tile = 0"):
        siglip(A, B, scale=1.0, bias=0.0, tile=0)
    for options, message in (
        ({"smoothing": 1.0}, r"smoothing in \[0, 1\)"), ({"hard": -1.0}, "hard >= 0"), ({"top_k": 0}, "top_k >= 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"info_nce: expected {message}"):
            info_nce(A, B, scale=1.0, **options)
        with pytest.raises(ConfigError, match=f"InfoNCE: expected {message}"):
            InfoNCE(**options)
    with pytest.raises(ConfigError, match="nearest_negatives: expected k >= 1"):
        nearest_negatives(A, A > 0, 0)
    with pytest.raises(ShapeError, match=r"sample_negatives: expected scores of shape \(batch, batch\)"):
        sample_negatives(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"triplet_loss positives: expected a boolean mask"):
        triplet_loss(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))


def test_errors_of_the_modules():
    loss = InfoNCE()
    with pytest.raises(ConfigError, match="InfoNCE: expected two or more modalities, got 1"):
        loss({"audio": A})
    with pytest.raises(ConfigError, match="InfoNCE: expected two or more modalities, got an empty mapping"):
        loss({})
    with pytest.raises(ShapeError, match=r"InfoNCE: expected two tensors .* got Tensor and NoneType"):
        loss(A)
    with pytest.raises(ShapeError, match=r"InfoNCE 'image': expected \(batch, dim\) = \(7, 5\) as 'audio' has"):
        loss({"audio": A, "image": B[:, :3]})
    with pytest.raises(ShapeError, match=r"InfoNCE 'b': expected a floating tensor .* Pool tokens first"):
        loss(A, B[:, None])
    with pytest.raises(ShapeError, match=r"InfoNCE ids: expected shape \(batch,\) = \(7,\)"):
        loss(A, B, ids=IDS[:2])
    with pytest.raises(ConfigError, match="a known modality in present, got 'imag'"):
        loss({"audio": A, "image": B}, present={"imag": IDS > 1})
    with pytest.raises(ShapeError, match=r"InfoNCE present\['image'\]: expected shape \(batch,\) = \(7,\)"):
        loss({"audio": A, "image": B}, present={"image": IDS[:3] > 1})
    with pytest.raises(ConfigError, match="InfoNCE: expected a known anchor, got 'text'"):
        InfoNCE(anchor="text")({"audio": A, "image": B})
    with pytest.raises(ConfigError, match="SigLIP: expected a known anchor, got 'text'"):
        SigLIP(anchor="text", widths={"audio": 3}, dim=2)
    with pytest.raises(ConfigError, match="InfoNCE: expected widths and dim, or none"):
        InfoNCE(dim=3)
    with pytest.raises(ConfigError, match="a known modality, got 'image'"):
        InfoNCE(widths={"audio": DIM}, dim=2)({"audio": A.float(), "image": B.float()})
    with pytest.raises(ShapeError, match="InfoNCE 'audio': expected width = 3, got 5"):
        InfoNCE(widths={"audio": 3}, dim=2)({"audio": A.float(), "image": B.float()})
    with pytest.raises(ConfigError, match=r"InfoNCE: expected 0 < scale <= max_scale = 100.0, got scale = 101.0"):
        InfoNCE(scale=101.0)
    with pytest.raises(ConfigError, match="InfoNCE: expected a known treatment of duplicates"):
        InfoNCE(duplicates="both")
    with pytest.raises(ConfigError, match="SigLIP: expected 0 < scale"):
        SigLIP(scale=0.0)
    with pytest.raises(ConfigError, match="SigLIP: expected tile >= 1"):
        SigLIP(tile=0)
