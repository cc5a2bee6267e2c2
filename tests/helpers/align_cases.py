"""Small cases of every connector and every loss of the package, with chosen values under their masks.

A case takes a type and a number to stand under every mask, and returns its module (or None), the tensors whose
gradients are compared, and a function that returns the outputs. The tests demand a case for every module and function
that they find in the packages, or the reason why it has none.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from equipoise import alignment as align
from equipoise import consistency
from equipoise.alignment.connectors.media_splice import splice
from equipoise.consistency import matching_matrix
from equipoise.tokens.token_batch import Tokens

BATCH, KEYS, WORDS = 3, 5, 7
KEEP = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
TEXT = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [True] * 2 + [False] * 5])
IDS = torch.tensor([[1, 4, 5, 6, 7, 8, 9], [1, 4, 2, 3, 0, 0, 0], [1, 6, 0, 0, 0, 0, 0]])
LABELS = torch.tensor([0, 1, 0, 1, 1])


class Case(NamedTuple):
    """See above."""

    module: nn.Module | None
    leaves: list[Tensor]
    run: Callable[[], list[Tensor]]


def normal(*shape, dtype=torch.float64, seed=0, keep=None, fill=0.0):
    """Returns a leaf tensor with ``fill`` where ``keep`` is False."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if keep is not None:
        values = values.masked_fill(~keep.reshape(*keep.shape, *[1] * (values.ndim - keep.ndim)), fill)
    return values.requires_grad_()


def prepare(module, dtype):
    torch.manual_seed(0)
    module = module().to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return module


def module_case(make, inputs, call):
    """Returns the case of a module: ``inputs(dtype, fill)`` returns leaves, ``call(module, *leaves)`` the outputs."""

    def case(dtype, fill):
        module, leaves = prepare(make, dtype), inputs(dtype, fill)
        return Case(module, leaves, lambda: [x for x in call(module, *leaves) if x is not None])

    return case


def function_case(inputs, call):
    def case(dtype, fill):
        leaves = inputs(dtype, fill)
        return Case(None, leaves, lambda: list(call(*leaves)))

    return case


def media(width=4, names=1):
    def made(dtype, fill):
        return [normal(BATCH, KEYS, width, dtype=dtype, seed=n, keep=KEEP, fill=fill) for n in range(names)]

    return made


def words(dtype, fill):
    """Returns word ids with an id outside of the vocabulary under the mask if ``fill`` is not 0 (ids cannot be NaN)."""
    return IDS.masked_fill(~TEXT, 0 if fill == 0 else -100)


def qformer(names=("image",), **options):
    return module_case(
        lambda: align.QFormer(
            dict.fromkeys(names, 4), dim=8, depth=2, heads=2, queries=2, vocabulary=11, positions=8, **options
        ),
        lambda dtype, fill: [*media(names=len(names))(dtype, fill), words(dtype, fill)],
        lambda module, *x: [
            part.masked_fill(~TEXT[..., None], 0.0) if part.shape[1] == WORDS else part
            for part in module(
                {name: Tokens(v, mask=KEEP) for name, v in zip(names, x, strict=False)}, x[-1], mask=TEXT,
                objective="matching",
            )
        ],
    )  # fmt: skip


def qformer_losses(module, media, words):
    losses = module(Tokens(media, mask=KEEP), words, mask=TEXT, generator=torch.Generator().manual_seed(0))
    return list(losses.values())


def gated(by_place):
    def call(module, text, media):
        valid = KEEP[:, None] if by_place is None else KEEP[:, None].expand(-1, 2, -1)
        return [module(text, media, valid=valid, media_at=by_place)]

    shape = (1,) if by_place is None else (2,)
    return module_case(
        lambda: align.GatedCrossAttention(8, 4, heads=2),
        lambda dtype, fill: [
            normal(BATCH, WORDS, 8, dtype=dtype, seed=1),
            normal(
                BATCH, *shape, KEYS, 4, dtype=dtype, seed=2, keep=KEEP[:, None].expand(-1, *shape, -1), fill=fill
            ),
        ],
        call,
    )  # fmt: skip


def timed(**options):
    names = ("sound", "image")

    def call(module, values, times):
        tokens = Tokens(values, mask=KEEP, times=times)
        result = module(normal_query(values, times), tokens, *names)
        return [result.output, result.share]

    def normal_query(values, times):
        shape = (BATCH, 2, 8)
        return Tokens(normal(*shape, dtype=values.dtype, seed=7).detach(), times=torch.arange(2.0).expand(BATCH, -1))

    return module_case(
        lambda: align.TimedAttention(8, 2, names=names, **options),
        lambda dtype, fill: [
            normal(BATCH, KEYS, 8, dtype=dtype, seed=1, keep=KEEP, fill=fill),
            torch.arange(5.0).expand(BATCH, -1).masked_fill(~KEEP, fill),
        ],
        call,
    )


def timed_itself(module, values, times):
    tokens = Tokens(values, mask=KEEP, modality=LABELS.expand(BATCH, -1), names=("sound", "image"), times=times)
    result = module(tokens)
    return [result.output.masked_fill(~KEEP[..., None], 0.0), result.share.masked_fill(~KEEP[:, None, :, None], 0.0)]


PRESENT = {"a": torch.tensor([True, False, True, True, True]), "b": torch.tensor([True, True, True, False, True])}


def vectors(dtype, fill):
    return [normal(5, 4, dtype=dtype, seed=n, keep=keep, fill=fill) for n, keep in enumerate(PRESENT.values())]


def pair_loss(kind, **options):
    return module_case(
        lambda: kind(widths={"a": 4, "b": 4}, dim=3, **options), vectors,
        lambda module, a, b: [module({"a": a, "b": b}, present=PRESENT)],
    )  # fmt: skip


def pair_loss_of_tokens(kind):
    return module_case(
        kind, media(names=2), lambda m, a, b: [m({"a": Tokens(a, mask=KEEP), "b": Tokens(b, mask=KEEP)})]
    )


def token_loss(slots=3, **options):
    return module_case(
        lambda: consistency.ConsistencyLoss(4, slots=slots, **options), media(width=4, names=3),
        lambda module, *x: [module({str(n): Tokens(v, mask=KEEP, cls=False) for n, v in enumerate(x)})],
    )  # fmt: skip


def some(dtype, fill):
    """Returns tokens with at least one valid token per sample, as required by a supermatrix."""
    return [normal(BATCH, KEYS, 4, dtype=dtype, seed=n, keep=SOME, fill=fill) for n in range(3)]


SOME = KEEP.clone()
SOME[1, 2] = True


def maps(call):
    """Returns the case of a metric of the supermatrix of padded tokens."""
    return function_case(
        some, lambda *x: [call(consistency.supermatrix_from_tokens(x, masks=[SOME] * 3, temperature=0.5))]
    )


def ignoring(dtype, fill):
    """Returns similarities with one ignored column in the first row."""
    values = normal(4, 4, dtype=dtype, seed=0)
    return [
        values.detach().index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(fill, dtype=dtype)).requires_grad_()
    ]


def captions(dtype, fill):
    keep = torch.ones(BATCH, WORDS, dtype=torch.bool)
    keep[:, :-1] = TEXT[:, 1:]
    keep[:, -1] = False
    return [normal(BATCH, WORDS, 11, dtype=dtype, keep=keep, fill=fill)]


LABEL = IDS.masked_fill(~TEXT, -100)

CASES = {
    "QFormer": [qformer(), qformer(("image", "audio")), qformer(("image", "audio"), combine="concat")],
    "QFormerLosses": [
        module_case(
            lambda: align.QFormerLosses(
                align.QFormer(4, dim=8, depth=1, heads=2, queries=2, vocabulary=11, positions=8), embed=3
            ),
            lambda dtype, fill: [*media()(dtype, fill), words(dtype, fill)],
            qformer_losses,
        )
    ],
    "Resampler": [
        module_case(
            lambda: align.Resampler(4, latents=2, depth=2, heads=2), media(), lambda m, x: [m(Tokens(x, mask=KEEP))]
        ),
        module_case(
            lambda: align.Resampler(4, latents=2, depth=1, heads=2, names=("a", "b")),
            media(names=2),
            lambda m, a, b: [m({"a": Tokens(a, mask=KEEP), "b": Tokens(b, mask=KEEP)})],
        ),
    ],
    "Projector": [
        module_case(
            lambda: align.Projector(4, 6),
            media(),
            lambda m, x: [(made := m(Tokens(x, mask=KEEP))).values.masked_fill(~made.mask[..., None], 0.0)],
        ),
        module_case(
            lambda: align.Projector(4, 6),
            media(),
            lambda m, x: [
                m.splice(
                    torch.ones(BATCH, 2, 6, dtype=x.dtype), torch.tensor([[7, 9]] * BATCH), 9, Tokens(x, mask=KEEP)
                ).embeddings
            ],
        ),
    ],
    "GatedCrossAttention": [gated(None), gated(torch.tensor([[False, True] + [False] * 4 + [True]] * BATCH))],
    "TimedAttention": [
        timed(),
        timed(bias="linear", window=1.0),
        timed(bias=None, window=0.5, causal=True, rotate=True),
        module_case(
            lambda: align.TimedAttention(8, 2, names=("sound", "image"), rotate=True, window=2.0),
            lambda dtype, fill: [
                normal(BATCH, KEYS, 8, dtype=dtype, seed=1, keep=KEEP, fill=fill),
                torch.arange(5.0).expand(BATCH, -1).masked_fill(~KEEP, fill),
            ],
            timed_itself,
        ),
    ],
    "TimeBias": [
        module_case(
            lambda: align.TimeBias(("a", "b"), kind="linear"),
            lambda dtype, fill: [torch.arange(5.0).to(dtype).expand(BATCH, -1).masked_fill(~KEEP, fill)],
            lambda m, times: [
                m(*[Tokens(torch.zeros(BATCH, KEYS, 1), mask=KEEP, times=times)] * 2, "a", "b").masked_fill(
                    ~(KEEP[:, None] & KEEP[:, :, None]), 0.0
                )
            ],
        )
    ],
    "InfoNCE": [
        pair_loss(align.InfoNCE),
        pair_loss(align.InfoNCE, hard=0.5, top_k=1),
        pair_loss_of_tokens(align.InfoNCE),
    ],
    "SigLIP": [pair_loss(align.SigLIP), pair_loss_of_tokens(align.SigLIP)],
    "MatchingHead": [
        module_case(lambda: align.MatchingHead(4), lambda d, fill: [normal(2, 3, 4, dtype=d)], lambda m, x: [m(x)])
    ],
    "FixedWeights": [
        module_case(
            lambda: align.FixedWeights({"a": 2.0}),
            lambda d, fill: [normal(dtype=d), normal(dtype=d, seed=1)],
            lambda m, a, b: [m({"a": a, "b": b}).total],
        )
    ],
    "UncertaintyWeights": [
        module_case(
            lambda: align.UncertaintyWeights(["a", "b"]),
            lambda d, fill: [normal(dtype=d), normal(dtype=d, seed=1)],
            lambda m, a, b: [m({"a": a, "b": b}).total],
        )
    ],
    "ConsistencyLoss": [
        token_loss(),
        token_loss(kind="cycle"),
        token_loss(kind="nuclear", sinkhorn=2),
        token_loss(slots=None),
    ],
    "info_nce": [
        function_case(lambda d, fill: vectors(d, 0.0), lambda a, b: [align.info_nce(a, b, scale=2.0)]),
    ],
    "siglip": [function_case(lambda d, fill: vectors(d, 0.0), lambda a, b: [align.siglip(a, b, scale=2.0, bias=-1.0)])],
    "captioning_loss": [function_case(captions, lambda x: [align.captioning_loss(x, LABEL, smoothing=0.1)])],
    "matching_loss": [
        function_case(
            lambda d, fill: [normal(3, 2, dtype=d)], lambda x: [align.matching_loss(x, torch.tensor([1, 0, 1]))]
        )
    ],
    "triplet_loss": [function_case(lambda d, fill: [normal(3, 3, dtype=d)], lambda x: [align.triplet_loss(x)])],
    "linear_attend": [
        function_case(
            lambda d, fill: [
                normal(BATCH, 2, 3, 4, dtype=d),
                *(
                    normal(BATCH, 2, KEYS, 4, dtype=d, seed=s, keep=KEEP[:, None].expand(-1, 2, -1), fill=fill)
                    for s in (1, 2)
                ),
            ],
            lambda q, k, v: [align.linear_attend(q, k, v, mask=KEEP)],
        )
    ],
    "splice": [
        function_case(
            lambda d, fill: [
                normal(BATCH, WORDS, 4, dtype=d, keep=TEXT, fill=fill),
                *media()(d, fill),
            ],
            lambda text, x: [
                splice(text, torch.where(TEXT & (IDS == 1), 99, IDS), 99, Tokens(x, mask=KEEP), mask=TEXT).embeddings
            ],
        )
    ],
    "query_similarity": [
        function_case(
            lambda d, fill: [normal(2, 3, 4, dtype=d), normal(2, 4, dtype=d, seed=1)],
            lambda q, t: [align.query_similarity(q, t)],
        )
    ],
    "uncertainty_weighted": [
        function_case(
            lambda d, fill: [normal(dtype=d), normal(dtype=d, seed=1)],
            lambda x, s: [align.uncertainty_weighted({"a": x}, {"a": s})],
        )
    ],
    "warping_cost": [
        function_case(lambda d, fill: [normal(3, 4, dtype=d)], lambda x: [align.dtw_cost(x, softness=0.5)])
    ],
    "modality_gap": [function_case(lambda d, fill: vectors(d, 0.0), lambda a, b: [align.modality_gap(a, b)])],
    "alignment": [function_case(lambda d, fill: vectors(d, 0.0), lambda a, b: [align.alignment(a, b)])],
    "uniformity": [function_case(lambda d, fill: vectors(d, 0.0)[:1], lambda a: [align.uniformity(a)])],
    "linear_cka": [function_case(lambda d, fill: vectors(d, 0.0), lambda a, b: [align.linear_cka(a, b)])],
    "additive_compositionality": [
        function_case(
            lambda d, fill: [normal(3, 2, 4, dtype=d), normal(3, 4, dtype=d, seed=1)],
            lambda parts, whole: [align.additive_compositionality(parts, whole)],
        )
    ],
    "supermatrix_from_tokens": [
        function_case(
            some,
            lambda *x, rounds=rounds: [consistency.supermatrix_from_tokens(x, masks=[SOME] * 3, sinkhorn=rounds)],
        )
        for rounds in (0, 3)
    ],
    "supermatrix_from_attention": [
        function_case(
            lambda d, fill: [normal(2, 5, 5, dtype=d)],
            lambda x: [consistency.supermatrix_from_attention(x.softmax(dim=-1), LABELS)],
        )
    ],
    "match": [
        function_case(
            lambda d, fill: [normal(BATCH, KEYS, KEYS, dtype=d, keep=KEEP[:, None] & KEEP[:, :, None], fill=fill)],
            lambda x, rounds=rounds, dustbin=dustbin: [
                matching_matrix.soft_matching(x, rows=KEEP, columns=KEEP, sinkhorn=rounds, dustbin=dustbin)
            ],
        )
        for rounds, dustbin in ((0, None), (3, None), (3, 0.0))
    ],
    "consistency_score": [maps(lambda p: consistency.consistency_score(p, num_modalities=3))],
    "cycle_error": [maps(lambda p: consistency.cycle_error(p, num_modalities=3))],
    "pair_error": [maps(lambda p: consistency.pair_error(p, num_modalities=3))],
    "nuclear_norm": [maps(consistency.nuclear_norm), maps(lambda p: consistency.nuclear_norm(p, method="svd"))],
    "effective_rank": [maps(consistency.effective_rank)],
    "contradiction_excess": [maps(consistency.contradiction_excess)],
    "top_energy": [maps(lambda p: consistency.top_energy(p, num_modalities=3))],
    "pooled": [maps(lambda p: consistency.pool_to_slots(p, sizes=(5, 5, 5), parts=(2, 2, 2)))],
}
# Functions with a mask argument but without a case, and the reason.
WITHOUT = {
    "made of masks and whole numbers alone": {"caption_labels", "matching_pairs", "media_mask", "objective_mask"},
    "draws, figures and masks, without a gradient": {
        "found_within", "mean_average_precision", "mean_rank", "mean_reciprocal_rank", "median_rank", "ranks",
        "recall_at_k", "retrieval", "sample_negatives", "time_causal", "time_window",
    },
    "its parts have cases": {"supermatrix"},
}  # fmt: skip
MASKS = {"mask", "masks", "valid", "present", "positives", "ignored", "relevant", "rows", "columns"}


def public_mask_names(*packages):
    """Returns the names of all public modules, losses and functions with a mask argument."""
    names = set()
    for name, value in [pair for package in packages for pair in vars(package).items() if pair[0][0] != "_"]:
        if inspect.isclass(value) and issubclass(value, nn.Module):
            names.add(name)
        if inspect.isfunction(value) and (MASKS & set(inspect.signature(value).parameters) or name.endswith("loss")):
            names.add(name)
    return names


FOUND = public_mask_names(align, consistency)
EVERY = [(name, number) for name, cases in CASES.items() for number in range(len(cases))]
