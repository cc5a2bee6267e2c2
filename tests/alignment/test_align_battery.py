"""Requirements on every connector and loss: masked values, dtypes, autocast; losses without valid terms."""

import math
import warnings

import pytest
import torch

from equipoise import alignment, consistency
from equipoise.alignment import InfoNCE, SigLIP
from equipoise.consistency import ConsistencyLoss
from equipoise.consistency.matching_matrix import soft_matching
from equipoise.errors import ShapeError
from equipoise.tokens.token_batch import Tokens
from helpers.align_cases import CASES, EVERY, FOUND, KEEP, WITHOUT, normal
from helpers.tolerance import TOL

every = pytest.mark.parametrize(("name", "number"), EVERY)
LOSSES = {name for name in CASES if "nce" in name.lower() or "loss" in name.lower() or "sig" in name.lower()}


@pytest.fixture(autouse=True)
def ignore_diagonal_warning():
    """Ignores the warning that padded maps do not have the identity on the diagonal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(diagonal|identity).*")
        yield


def test_every_connector_and_loss_has_a_case():
    excused = set().union(*WITHOUT.values())
    missing = FOUND - set(CASES) - excused
    assert not missing, f"tests/helpers/align_cases.py has no case for {sorted(missing)}"
    assert not excused & set(CASES)
    assert {"QFormer", "Resampler", "InfoNCE", "info_nce", "ConsistencyLoss", "linear_attend", "triplet_loss"} <= FOUND


def outputs_and_gradients(case):
    outputs = case.run()
    leaves = [x for x in case.leaves if x.requires_grad]
    leaves += [] if case.module is None else [p for p in case.module.parameters() if p.requires_grad]
    total = sum(part.double().square().sum() for part in outputs if part.requires_grad)
    return outputs, torch.autograd.grad(total, leaves, allow_unused=True)


@every
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 3e38])
def test_masked_values_do_not_change_outputs(name, number, fill):
    case = CASES[name][number]
    (expected, slopes), (result, actual) = (
        outputs_and_gradients(case(torch.float64, 0.0)),
        outputs_and_gradients(case(torch.float64, fill)),
    )
    for part, other in [*zip(result, expected, strict=True), *zip(actual, slopes, strict=True)]:
        assert (part is None) == (other is None)
        if part is not None:
            assert part.isfinite().all()
            assert torch.equal(part, other)


@every
def test_gradients(name, number):
    """Gradients of every loss and connector with respect to its floating-point inputs, in float64."""
    case = CASES[name][number](torch.float64, 0.0)
    free = [x for x in case.leaves if x.requires_grad] or list(case.module.parameters())

    def values(*_):
        return tuple(part for part in case.run() if part.requires_grad)

    assert torch.autograd.gradcheck(values, free, fast_mode=True, atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, number, dtype):
    """Module and inputs in half precision; losses and statistics are float32."""
    expected, _ = outputs_and_gradients(CASES[name][number](torch.float64, 0.0))
    result, slopes = outputs_and_gradients(CASES[name][number](dtype, 0.0))
    for part, other in zip(result, expected, strict=True):
        error = (part.double() - other).norm() / other.norm().clamp(min=0.1)
        assert error < 4 * TOL[torch.bfloat16]["rtol"]
        if name in LOSSES:
            assert part.dtype == torch.float32
    assert all(slope is None or slope.isfinite().all() for slope in slopes)


@every
def test_autocast(name, number):
    expected, _ = outputs_and_gradients(CASES[name][number](torch.float32, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        case = CASES[name][number](torch.float32, math.nan)
        result, slopes = outputs_and_gradients(case)
    for part, other in zip(result, expected, strict=True):
        error = (part.double() - other.double()).norm() / other.double().norm().clamp(min=0.1)
        # Modules without layers introduce no rounding.
        assert error < (1e-5 if case.module is None and name != "splice" else 4 * TOL[torch.bfloat16]["rtol"])
        if name in LOSSES:
            assert part.dtype == torch.float32
    assert all(slope is None or slope.isfinite().all() for slope in slopes)


ADDITIVE = torch.zeros(2, 3).masked_fill(torch.tensor([[False, True, False]]), -math.inf)
X, ONES, SQUARE = torch.zeros(2, 3, 4), torch.ones(2, 3), torch.zeros(3, 3)


def masked_calls(mask, square):
    """Calls every function and module that takes a mask with the given mask."""
    ids, two = torch.ones(2, 3, dtype=torch.long), {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}
    gate = alignment.GatedCrossAttention(4, heads=2)
    return {
        "Tokens": lambda: Tokens(X, mask=mask),
        "QFormer": lambda: alignment.QFormer(4, dim=4, depth=1, heads=2, queries=2, vocabulary=5)(X, ids, mask=mask),
        "gated valid": lambda: gate(X, X, valid=mask[:, None]),
        "gated media_at": lambda: gate(X, X, media_at=mask),
        "media_mask": lambda: alignment.media_mask(mask, 1, 3),
        "media_mask valid": lambda: alignment.media_mask(ONES.bool(), 1, 3, valid=mask[:, None]),
        "splice": lambda: alignment.splice(X, ids, 9, X, mask=mask),
        "caption_labels": lambda: alignment.caption_labels(ids, mask),
        "linear_attend": lambda: alignment.linear_attend(X[:, None], X[:, None], X[:, None], mask=mask),
        "time_window": lambda: alignment.time_window(ONES, ONES, width=1.0, valid=mask),
        "time_causal": lambda: alignment.time_causal(ONES, ONES, valid=mask),
        "info_nce positives": lambda: alignment.info_nce(X[0], X[0], scale=1.0, positives=square),
        "info_nce ignored": lambda: alignment.info_nce(X[0], X[0], scale=1.0, ignored=square),
        "sample_negatives": lambda: alignment.sample_negatives(SQUARE, square),
        "matching_pairs": lambda: alignment.matching_pairs(SQUARE, square),
        "triplet_loss": lambda: alignment.triplet_loss(SQUARE, square),
        "recall_at_k": lambda: alignment.recall_at_k(SQUARE, relevant=square),
        "InfoNCE present": lambda: InfoNCE()(two, present={"b": mask[0, :2]}),
        "SigLIP present": lambda: SigLIP()(two, present={"b": mask[0, :2]}),
        "supermatrix": lambda: consistency.supermatrix_from_tokens([X, X], masks=[mask, mask]),
        "match": lambda: soft_matching(torch.zeros(2, 3, 3), columns=mask),
    }  # fmt: skip


@pytest.mark.parametrize("name", masked_calls(ADDITIVE, SQUARE))
def test_additive_masks_raise(name):
    square = SQUARE.masked_fill(~torch.eye(3, dtype=torch.bool), -math.inf)
    with pytest.raises(ShapeError, match=r"mask|valid|media_at|positives|ignored|present|relevant"):
        masked_calls(ADDITIVE, square)[name]()
    # If numeric masks are accepted, they must contain only 0 and 1.
    if "present" not in name:
        with pytest.raises(ShapeError):
            masked_calls(ONES, torch.ones(3, 3))[name]()


class TestNoValidSamples:
    """Losses without valid terms are an exact 0 with gradient 0, never NaN; positives are never negatives."""

    def zero(self, loss, *leaves):
        assert float(loss.detach()) == 0.0
        loss.backward()
        for leaf in leaves:
            assert leaf.grad is None or not leaf.grad.any()

    @pytest.mark.parametrize("options", [{}, {"smoothing": 0.1}, {"hard": 1.0}, {"top_k": 1}])
    def test_info_nce(self, options):
        for rows, positives in ((1, None), (1, torch.ones(1, 1) > 0), (3, torch.ones(3, 3) > 0)):
            a, b = normal(rows, 4), normal(rows, 4, seed=1)
            self.zero(alignment.info_nce(a, b, scale=2.0, positives=positives, **options), a, b)
        a, b = normal(3, 4), normal(3, 4, seed=1)
        eye = torch.eye(3, dtype=torch.bool)
        self.zero(alignment.info_nce(a, b, scale=2.0, positives=eye, ignored=~eye, **options), a, b)
        self.zero(alignment.info_nce(a, b, scale=2.0, positives=~eye & eye, **options), a, b)

    @pytest.mark.parametrize("options", [{}, {"hard": 1.0, "top_k": 2}, {"duplicates": "ignore"}])
    def test_modules(self, options):
        loss = InfoNCE(**options).double()
        for rows, ids in ((1, None), (3, torch.tensor([4, 4, 4])), (0, None)):
            a, b = normal(rows, 4), normal(rows, 4, seed=1)
            self.zero(loss(a, b, ids=ids), a, b, *loss.parameters())

    @pytest.mark.parametrize("model", [InfoNCE, SigLIP])
    def test_no_positive_pair(self, model):
        loss = model(widths={"a": 4, "b": 4}, dim=3)
        a, b = (torch.full((2, 4), math.nan).requires_grad_() for _ in range(2))
        here = torch.tensor([True, False])
        self.zero(loss({"a": a, "b": b}, present={"a": here, "b": ~here}), a, b, *loss.parameters())
        assert all(parameter.grad is not None for parameter in loss.parameters())

    def test_matching(self):
        for positives in (torch.ones(1, 1) > 0, torch.ones(3, 3) > 0):
            logits = torch.zeros(positives.shape)
            pairs = alignment.matching_pairs(logits, positives)
            assert pairs.label.tolist() == [1] * len(logits)
            scores = torch.full((len(logits), 2), math.nan).requires_grad_()
            self.zero(alignment.matching_loss(scores, pairs.label), scores)

    @pytest.mark.parametrize("logit", [-math.inf, -3e38, 0.0, 3e38, math.inf])
    def test_positives_are_never_sampled(self, logit):
        """Also if all negatives have minimal probability, or only one remains."""
        positives = torch.tensor([[True, True, False], [False, True, True], [True, True, True]])
        logits = torch.full((3, 3), logit).masked_fill(positives, 5.0)
        for seed in range(20):
            drawn = alignment.sample_negatives(logits, positives, generator=torch.Generator().manual_seed(seed))
            assert (drawn.index[:2].tolist(), drawn.valid.tolist()) == ([2, 0], [True, True, False])

    def test_triplets(self):
        for positives in (torch.ones(3, 3) > 0, torch.zeros(3, 3) > 0):
            similarity = torch.full((3, 3), math.nan).requires_grad_()
            self.zero(alignment.triplet_loss(similarity, positives), similarity)

    def test_captions(self):
        for length in (1, 4):
            logits = torch.full((2, length, 5), math.nan).requires_grad_()
            self.zero(alignment.captioning_loss(logits, torch.full((2, length), -100)), logits)

    @pytest.mark.parametrize("kind", ["rank", "nuclear", "cycle"])
    @pytest.mark.parametrize("slots", [3, None])
    def test_consistency(self, kind, slots):
        loss = ConsistencyLoss(4, slots=slots, kind=kind)
        gone, values = torch.zeros(3, 5, dtype=torch.bool), torch.full((3, 5, 4), math.nan).requires_grad_()
        parts = {"a": Tokens(values, mask=gone), "b": Tokens(torch.ones(3, 5, 4))}
        self.zero(loss(parts), values, *loss.parameters())
        parts["a"] = Tokens(values[:, :0])
        self.zero(loss(parts), values, *loss.parameters())
        self.zero(loss({"a": Tokens(values[:0]), "b": Tokens(values[:0])}), values, *loss.parameters())
        blank = torch.zeros(2, 8, 8).requires_grad_()
        assert not loss.of(blank, 2).detach().any()
        (slope,) = torch.autograd.grad(loss.of(blank, 2), blank)
        assert not slope.any()

    def test_maps_of_padding_only(self):
        blank = torch.zeros(2, 6, 6)
        assert not consistency.effective_rank(blank).any()
        assert not consistency.contradiction_excess(blank).any()
        assert not consistency.spectral(blank, sizes=(3, 3)).effective_rank.any()

    def test_padding_does_not_affect_consistency(self):
        """Two tokens that match each other, and one padding token."""
        mask = torch.tensor([[True, True, False]])
        part = torch.eye(3)[None] * 100
        matrix = consistency.supermatrix_from_tokens([part, part], masks=[mask, mask], temperature=1.0)
        assert float(consistency.cycle_error(matrix, num_modalities=2)) == 0.0

    @pytest.mark.parametrize("model", [
        lambda: alignment.Resampler(4, latents=2, depth=1, heads=2),
        lambda: alignment.QFormer(4, dim=4, depth=1, heads=2, queries=2, vocabulary=None),
    ])  # fmt: skip
    def test_empty_media_equal_missing_media(self, model):
        torch.manual_seed(0)
        module = model().double()
        result = module(Tokens(normal(3, 5, 4, keep=KEEP, fill=math.nan), mask=KEEP))
        result = result if isinstance(result, torch.Tensor) else result.queries
        nothing = module(Tokens(normal(3, 1, 4), mask=torch.zeros(3, 1, dtype=torch.bool)))
        nothing = nothing if isinstance(nothing, torch.Tensor) else nothing.queries
        torch.testing.assert_close(result[1], nothing[1], **TOL[torch.float64])
        assert not torch.allclose(result[0], nothing[0])
