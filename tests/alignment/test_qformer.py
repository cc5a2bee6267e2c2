"""Q-Former: attention masks by perturbation, the implementation of transformers as reference, heads and losses."""

import math
from copy import deepcopy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise.alignment.connectors.cross_width_attention import CrossWidthAttention
from equipoise.alignment.connectors.qformer import OBJECTIVES, QFormer, objective_mask
from equipoise.alignment.losses.hard_negatives import same_ids
from equipoise.alignment.losses.image_text_matching import (
    MatchingHead,
    caption_labels,
    captioning_loss,
    matching_loss,
    matching_pairs,
)
from equipoise.alignment.losses.qformer_losses import QFormerLosses, query_similarity
from equipoise.errors import ConfigError, ShapeError
from equipoise.recording import watch
from equipoise.tokens.token_batch import Tokens
from helpers.tolerance import TOL
from oracles import align as slow

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
BATCH, WORDS, QUERIES, DIM, VOCABULARY = 3, 5, 4, 6, 11
WIDTHS = {"image": 7, "audio": 2, "depth": 3}
LENGTHS = {"image": 5, "audio": 3, "depth": 2}


def build_qformer(names=("image",), seed=0, **options):
    torch.manual_seed(seed)
    options = {"depth": 3, "heads": 2, "queries": QUERIES, "vocabulary": VOCABULARY, "positions": 8, **options}
    model = QFormer({name: WIDTHS[name] for name in names}, dim=DIM, **options).double()
    with torch.no_grad():
        model.queries.normal_()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def media_tokens(names=("image",), seed=1, masks=()):
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for name in names:
        values = torch.randn(BATCH, LENGTHS[name], WIDTHS[name], generator=random, dtype=torch.float64)
        mask = torch.rand(BATCH, LENGTHS[name], generator=random) < 0.6 if name in masks else None
        parts[name] = Tokens(values, mask=mask)
    return parts


IDS = torch.randint(VOCABULARY, (BATCH, WORDS), generator=torch.Generator().manual_seed(2))
OTHER = (IDS + 1) % VOCABULARY


def allclose(one, other):
    return torch.allclose(one, other, **EXACT)


def test_attention_masks():
    words = torch.tensor([[True, True, False]])
    expected = {
        "contrastive": ["11000", "11000", "00110", "00110", "00110"],
        "matching": ["11110", "11110", "11110", "11110", "11110"],
        "captioning": ["11000", "11000", "11100", "11110", "11110"],
    }
    for objective, rows in expected.items():
        mask = objective_mask(objective, 2, words)[0]
        assert ["".join(str(int(seen)) for seen in row) for row in mask] == rows
    with pytest.raises(ConfigError, match="a known objective, got 'itm'"):
        objective_mask("itm", 2, words)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_text_reaches_queries_only_in_matching(objective):
    model = build_qformer()
    one, other = (model(media_tokens(), ids, objective=objective) for ids in (IDS, OTHER))
    assert allclose(one.queries, other.queries) == (objective != "matching")
    assert not allclose(one.text, other.text)
    alone = model(media_tokens()).queries
    assert allclose(one.queries, alone) == (objective != "matching")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_media_reach_text_except_in_the_contrastive_task(objective):
    model = build_qformer()
    one, other = (model(media_tokens(seed=seed), IDS, objective=objective) for seed in (1, 3))
    assert allclose(one.text, other.text) == (objective == "contrastive")
    assert not allclose(one.queries, other.queries)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_later_words_reach_earlier_words_except_in_captioning(objective):
    model = build_qformer()
    for index in range(1, WORDS):
        changed = IDS.clone()
        changed[:, index:] = OTHER[:, index:]
        one, other = (model(media_tokens(), ids, objective=objective).text for ids in (IDS, changed))
        assert allclose(one[:, :index], other[:, :index]) == (objective == "captioning")
        assert not allclose(one[:, index:], other[:, index:])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_has_no_effect(objective):
    model = build_qformer()
    padded = torch.cat([IDS, OTHER[:, :2]], dim=1)
    mask = torch.arange(WORDS + 2).expand(BATCH, -1) < WORDS
    one, other = (
        model(media_tokens(), IDS, objective=objective),
        model(media_tokens(), padded, mask=mask, objective=objective),
    )
    torch.testing.assert_close(other.queries, one.queries, **EXACT)
    torch.testing.assert_close(other.text[:, :WORDS], one.text, **EXACT)


def test_cross_attention_layers():
    for every, expected in ((1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), (3, [1, 0, 0, 1])):
        model = build_qformer(depth=4, every=every)
        assert [len(layer.reading) for layer in model.layers] == expected
        assert [any("reading" in name for name, _ in layer.named_parameters()) for layer in model.layers] == [
            bool(count) for count in expected
        ]


def test_query_mlps_are_initialized_with_the_text_mlps():
    torch.manual_seed(0)
    model = QFormer(5, dim=DIM, depth=2, heads=2, vocabulary=VOCABULARY)
    assert QFormer(5, dim=DIM, depth=2, heads=2, vocabulary=None).words is None
    for layer in model.layers:
        for one, other in zip(layer.query_ffn.parameters(), layer.text_ffn.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("combine", ["sum", "concat"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_modalities(combine, count):
    names = tuple(WIDTHS)[:count]
    model = build_qformer(names, combine=combine)
    full = model(media_tokens(names), IDS, objective="matching")
    assert full.queries.shape == (BATCH, QUERIES, DIM)
    for name in names:
        changed = {**media_tokens(names), name: media_tokens(names, seed=9)[name]}
        assert not allclose(model(changed).queries, model(media_tokens(names)).queries)
    order = dict(reversed(media_tokens(names).items()))
    assert allclose(model(order).queries, model(media_tokens(names)).queries)


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_missing_modality_has_no_effect(combine):
    names = ("image", "audio")
    model, parts = build_qformer(names, combine=combine), media_tokens(names)
    gone = torch.ones(BATCH, LENGTHS["audio"], dtype=torch.bool)
    gone[1] = False
    one, other = (
        model({**parts, "audio": Tokens(values, mask=gone)}).queries
        for values in (parts["audio"].values, media_tokens(names, seed=8)["audio"].values)
    )
    assert allclose(one[1], other[1])
    assert not allclose(one[0], other[0])
    if combine == "sum":
        with torch.no_grad():
            for name, parameter in (silent := deepcopy(model)).named_parameters():
                if "reading.audio.out" in name:
                    parameter.zero_()
        assert allclose(one[1], silent({**parts, "audio": Tokens(parts["audio"].values, mask=gone)}).queries[1])
        none = Tokens(parts["image"].values, mask=torch.zeros(BATCH, LENGTHS["image"], dtype=torch.bool))
        blind = model({"image": none, "audio": Tokens(parts["audio"].values, mask=gone)}).queries
        assert blind.isfinite().all()


def test_watch_records_the_cross_attention_shares():
    names = ("image", "audio")
    model = build_qformer(names, combine="concat", depth=1)
    # The keys of the self-attention are the learned queries, which belong to no modality.
    with pytest.warns(UserWarning, match="'layers.0.attention' is not in the table"), watch(model) as seen:
        model(media_tokens(names))
    site = next(site for site in seen.layers if "reading" in site)
    share = seen.share(site)
    assert share.shape == (BATCH, 2, 2)
    torch.testing.assert_close(share.sum(dim=-1), torch.ones(BATCH, 2, dtype=share.dtype), **SINGLE)


def test_against_transformers():
    """Equals the implementation in transformers with the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    config = transformers.Blip2QFormerConfig(
        vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=3, num_attention_heads=2, intermediate_size=4 * DIM,
        encoder_hidden_size=7, cross_attention_frequency=2, use_qformer_text_input=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, ours = Blip2QFormerModel(config).double().eval(), build_qformer()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    copied = {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    for i in range(3):
        here, there = f"layers.{i}", f"encoder.layer.{i}"
        pairs = (
            {"attention": "attention", "reading.image": "crossattention"} if i % 2 == 0 else {"attention": "attention"}
        )
        for mine, its in pairs.items():
            for kind in ("weight", "bias"):
                for name in ("query", "key", "value"):
                    copied[f"{here}.{mine}.{name}.{kind}"] = f"{there}.{its}.attention.{name}.{kind}"
                copied[f"{here}.{mine}.out.{kind}"] = f"{there}.{its}.output.dense.{kind}"
                norm = "norm" if mine == "attention" else "reading_norm"
                copied[f"{here}.{norm}.{kind}"] = f"{there}.{its}.output.LayerNorm.{kind}"
        for mine, its in (("text_ffn", ""), ("query_ffn", "_query")):
            for kind in ("weight", "bias"):
                copied[f"{here}.{mine}.mlp.0.{kind}"] = f"{there}.intermediate{its}.dense.{kind}"
                copied[f"{here}.{mine}.mlp.2.{kind}"] = f"{there}.output{its}.dense.{kind}"
                copied[f"{here}.{mine}.norm.{kind}"] = f"{there}.output{its}.LayerNorm.{kind}"
    state, source = ours.state_dict(), theirs.state_dict()
    assert {name for name in state if name.startswith(("layers", "norm"))} == set(copied)
    assert {name for name in source if "position_ids" not in name} == set(copied.values())
    ours.load_state_dict({**state, **{mine: source[its] for mine, its in copied.items()}})
    image = media_tokens()["image"].values
    hidden = torch.cat([ours.queries.expand(BATCH, -1, -1), ours._embed_words(IDS, BATCH)], dim=1)
    for ids in (IDS, None):
        result = ours(image, ids, objective="matching")
        expected = theirs(
            query_embeds=hidden if ids is not None else hidden[:, :QUERIES], query_length=QUERIES,
            encoder_hidden_states=ours.media_norms["image"](image),
        ).last_hidden_state  # fmt: skip
        torch.testing.assert_close(result.queries, expected[:, :QUERIES], rtol=EXACT["rtol"], atol=EXACT["rtol"])
        if ids is not None:
            torch.testing.assert_close(result.text, expected[:, QUERIES:], rtol=EXACT["rtol"], atol=EXACT["rtol"])


def test_cross_attention_matches_attend():
    torch.manual_seed(0)
    layer = CrossWidthAttention(4, 3, heads=1).double()
    tokens, source = torch.randn(1, 2, 4).double(), torch.randn(1, 5, 3).double()
    mask = torch.tensor([[[True, False, True, True, False], [False] * 5]])
    with torch.no_grad():
        query, key, value = layer.query(tokens)[0], layer.key(source)[0], layer.value(source)[0]
        expected = layer.out(torch.from_numpy(slow.soft_attention(*(x.numpy() for x in (query, key, value)), mask[0])))
    torch.testing.assert_close(layer(tokens, source, mask=mask).output[0], expected, **EXACT)
    with pytest.raises(ShapeError, match="CrossWidthAttention: expected dim = 4 and source_dim = 3, got 4 and None"):
        layer(tokens)
    with pytest.raises(ShapeError, match="CrossWidthAttention: expected dim = 4 and source_dim = 3, got 4 and 4"):
        layer(tokens, tokens)


def test_similarity_is_the_maximum_over_queries():
    queries, text = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4, 5), (2, 5)))
    for i in range(3):
        for j in range(2):
            expected = max(float(q @ text[j]) for q in queries[i])
            assert float(query_similarity(queries, text)[i, j]) == pytest.approx(expected, rel=EXACT["rtol"])


def build_losses(**options):
    torch.manual_seed(5)
    return QFormerLosses(build_qformer(depth=2), embed=3, **options).double()


def test_three_losses_against_loops():
    losses = build_losses(smoothing=0.1, bos=10)
    random = torch.Generator().manual_seed(4)
    result = losses(media_tokens(), IDS, generator=random)
    queries, text = losses.embed(media_tokens(), IDS)
    logits = (query_similarity(queries, text) / losses.temperature).detach()
    eye = torch.eye(BATCH, dtype=torch.bool).numpy()
    expected = [slow.directed_info_nce(z.numpy(), eye, smoothing=0.1) for z in (logits, logits.T)]
    assert float(result["contrastive"].detach()) == pytest.approx(sum(expected) / 2, rel=EXACT["rtol"])
    pairs = matching_pairs(logits, generator=torch.Generator().manual_seed(4))
    match_logits = losses.match({"image": Tokens(media_tokens()["image"].values[pairs.a])}, IDS[pairs.b])
    torch.testing.assert_close(result["matching"], matching_loss(match_logits, pairs.label), **EXACT)
    words = losses.caption(media_tokens(), torch.cat([torch.full((BATCH, 1), 10), IDS[:, 1:]], dim=1)).detach()
    assert float(result["captioning"].detach()) == pytest.approx(
        slow.captioning(words.tolist(), IDS.tolist()), rel=EXACT["rtol"]
    )
    sum(result.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in losses.parameters())


def test_losses_of_one_pair_and_of_duplicates():
    losses = build_losses(smoothing=0.0)
    one = losses({"image": Tokens(media_tokens()["image"].values[:1])}, IDS[:1])
    assert float(one["contrastive"].detach()) == pytest.approx(0.0, abs=EXACT["rtol"])
    assert float(one["matching"].detach()) == 0.0
    assert float(one["captioning"].detach()) > 0
    twins = losses(media_tokens(), IDS, ids=torch.tensor([4, 4, 4]))
    assert float(twins["matching"].detach()) == 0.0
    masked = losses(media_tokens(), IDS, mask=torch.arange(WORDS).expand(BATCH, -1) < 1)
    assert float(masked["captioning"].detach()) == 0.0


def test_captions_are_causal():
    losses = build_losses()
    changed = IDS.clone()
    changed[:, 3:] = OTHER[:, 3:]
    one, other = losses.caption(media_tokens(), IDS), losses.caption(media_tokens(), changed)
    torch.testing.assert_close(one[:, :3], other[:, :3], **EXACT)
    assert not allclose(one[:, 3:], other[:, 3:])


def test_training_decreases_all_losses():
    losses = build_losses()
    parts, random = media_tokens(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(losses.parameters(), lr=0.02)
    history = []
    for _ in range(60):
        result = losses(parts, IDS, generator=random)
        history.append({name: float(loss.detach()) for name, loss in result.items()})
        optimizer.zero_grad()
        sum(result.values()).backward()
        optimizer.step()
    for name in history[0]:
        early, late = (sum(step[name] for step in part) for part in (history[:5], history[-5:]))
        assert late < 0.8 * early, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_has_no_effect(dropout):
    model, result = build_qformer(dropout=dropout), []
    for checkpointed in (False, True):
        model.zero_grad()
        torch.manual_seed(7)
        image = media_tokens()["image"].values.requires_grad_()
        if checkpointed:
            queries = checkpoint(model, image, IDS, objective="matching", use_reentrant=False).queries
        else:
            queries = model(image, IDS, objective="matching").queries
        queries.square().sum().backward()
        result.append([queries.detach(), image.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*result, strict=True):
        assert (one is other is None) or torch.equal(one, other)


def test_matching_pairs():
    logits, ids = torch.zeros(4, 4), torch.tensor([0, 1, 0, 2])
    pairs = matching_pairs(logits, same_ids(ids), generator=torch.Generator().manual_seed(0))
    assert (len(pairs.a), int(pairs.label.sum())) == (12, 4)
    assert pairs.a[:4].tolist() == pairs.b[:4].tolist() == pairs.a[4:8].tolist() == pairs.b[8:].tolist() == [0, 1, 2, 3]
    assert ((ids[pairs.a] == ids[pairs.b]) == pairs.label.bool()).all()
    alone = matching_pairs(torch.zeros(1, 1))
    assert (alone.a.tolist(), alone.b.tolist(), alone.label.tolist()) == ([0], [0], [1])
    # The nearest one almost surely: p = 1 - 3e-9.
    near = torch.full((3, 3), 0.0).index_put((torch.tensor([0]), torch.tensor([2])), torch.tensor(20.0))
    assert int(matching_pairs(near).b[3]) == 2
    assert int(matching_pairs(near).a[8]) == 0


def test_matching_head_and_loss():
    torch.manual_seed(0)
    head, queries = MatchingHead(DIM).double(), torch.randn(2, QUERIES, DIM, dtype=torch.float64)
    expected = sum(head.linear(queries[:, q]) for q in range(QUERIES)) / QUERIES
    torch.testing.assert_close(head(queries), expected, **EXACT)
    logits, label = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1, 0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert float(matching_loss(logits, label)) == pytest.approx(expected)
    assert float(matching_loss(logits, torch.tensor([1, 1]))) == 0.0
    with pytest.raises(ShapeError, match=r"matching_loss: expected logits \(pair, 2\) and labels \(pair,\)"):
        matching_loss(logits[:, :1], label)


def test_captioning_loss():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=random, dtype=torch.float64)
    labels = torch.tensor([[-100, 3, 4, 0, -100], [6, 6, -100, 1, 2]])
    assert float(captioning_loss(logits, labels)) == pytest.approx(
        slow.captioning(logits.tolist(), labels.tolist()), rel=EXACT["rtol"]
    )
    assert float(captioning_loss(logits, torch.full_like(labels, -100))) == 0.0
    assert float(captioning_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3).long(), smoothing=0.3)) == pytest.approx(
        math.log(4)
    )
    assert float(captioning_loss(logits[:, :1], labels[:, :1])) == 0.0
    with pytest.raises(ShapeError, match=r"captioning_loss: expected logits \(batch, token, word\)"):
        captioning_loss(logits, labels[:, :3])
    with pytest.raises(ConfigError, match="captioning_loss: expected smoothing in"):
        captioning_loss(logits, labels, smoothing=1.0)


def test_caption_labels():
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 4, 3]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert caption_labels(ids).tolist() == ids.tolist()
    assert caption_labels(ids, mask).tolist() == [[5, 6, 7, -100], [-100, 9, 4, 3]]
    expected = [[-100, -100, 7, -100], [-100, -100, -100, 3]]
    assert caption_labels(ids, mask, prompt=2).tolist() == expected
    assert caption_labels(ids, mask, prompt=torch.tensor([2, 0])).tolist() == [expected[0], [-100, 9, 4, 3]]


def test_errors():
    model = build_qformer()
    with pytest.raises(ConfigError, match="QFormer: expected depth, queries and every >= 1, got 0, 4 and 2"):
        build_qformer(depth=0)
    with pytest.raises(ConfigError, match="a known way to combine, got 'mean'"):
        build_qformer(combine="mean")
    with pytest.raises(ConfigError, match="QFormer: expected at least one modality"):
        QFormer({})
    with pytest.raises(ConfigError, match=r"expected media by name: image, audio, got Tensor"):
        build_qformer(("image", "audio"))(media_tokens()["image"].values)
    with pytest.raises(ConfigError, match=r"expected media \['audio', 'image'\], got \['image'\]. Mask missing media"):
        build_qformer(("image", "audio"))(media_tokens())
    with pytest.raises(ShapeError, match="QFormer 'image': expected width = 7, got 2"):
        model(media_tokens(("audio",))["audio"])
    with pytest.raises(ShapeError, match=r"QFormer 'image': expected \(batch, token, dim\), got shape \(3, 7\)"):
        model(torch.zeros(3, 7))
    with pytest.raises(ShapeError, match=r"QFormer input_ids: .*\(3, at most 8\), got \(2, 5\)"):
        model(media_tokens(), IDS[:2])
    with pytest.raises(ShapeError, match=r"QFormer input_ids: .*\(3, at most 8\), got \(3, 10\)"):
        model(media_tokens(), IDS.repeat(1, 2))
    with pytest.raises(ShapeError, match=r"QFormer mask: expected a boolean mask .*torch.int64"):
        model(media_tokens(), IDS, mask=IDS)
    with pytest.raises(ConfigError, match="a known objective, got 'itc'"):
        model(media_tokens(), IDS, objective="itc")
    silent = build_qformer(vocabulary=None)
    with pytest.raises(ConfigError, match="QFormer: expected no text, since vocabulary=None, got input_ids"):
        silent(media_tokens(), IDS)
    with pytest.raises(ConfigError, match="QFormer: expected a vocabulary, for text"):
        QFormerLosses(silent)
    with pytest.raises(ConfigError, match=r"expected temperature in \[0.001, 0.5\], got 0.0"):
        build_losses(temperature=0.0)
    with pytest.raises(ShapeError, match=r"QFormerLosses ids: expected \(batch,\) = \(3,\)"):
        build_losses()(media_tokens(), IDS, ids=IDS[:2, 0])
