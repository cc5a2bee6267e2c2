"""Links between modalities along the layers: against loops, under causal masks, in a Hugging Face model, an example."""

import math
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import equipoise as eq
from equipoise.diagnostics.modality_link_test import read_modality_links
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL
from oracles.plain import mean

EXACT = TOL[torch.float64]
NUMBER = {"rel": 1e-9, "abs": 1e-9}
LAYERS, BATCH, HEADS, TOKENS, DIM = 3, 2, 5, 7, 4
LABELS = torch.tensor([[0, 1, 0, 1, 1, 0, -1], [-1, 0, 0, 1, 0, 1, 0]])
REAL = torch.ones(BATCH, TOKENS, dtype=torch.bool)
REAL[0, 5:] = False


def causal_mask():
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & REAL[:, None] & REAL[:, :, None]


def random_layers(seed=0):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(LAYERS, BATCH, HEADS, TOKENS, TOKENS, generator=random, dtype=torch.float64)
    attention = scores.masked_fill(~causal_mask()[:, None], -math.inf).softmax(dim=-1).nan_to_num(0.0)
    hidden = torch.randn(LAYERS, BATCH, TOKENS, DIM, generator=random, dtype=torch.float64)
    return list(attention), list(hidden)


def slow_share(attention):
    """share[m][n] of one layer: queries of m that may see both modalities, by loops."""
    result = [[[], []], [[], []]]
    heads = attention.mean(dim=1).tolist()
    for b in range(BATCH):
        for i in range(TOKENS):
            keys = [j for j in range(TOKENS) if bool(causal_mask()[b, i, j]) and LABELS[b, j] >= 0]
            if LABELS[b, i] >= 0 and {int(LABELS[b, j]) for j in keys} == {0, 1}:
                for n in range(2):
                    part = sum(heads[b][i][j] for j in keys if LABELS[b, j] == n)
                    result[int(LABELS[b, i])][n].append(part)
    return [[mean(values) for values in row] for row in result]


def test_metrics_against_loops():
    attention, hidden = random_layers()
    result = eq.diagnostics.modality_links(attention, hidden, LABELS, mask=causal_mask())
    shares = [slow_share(layer) for layer in attention]
    torch.testing.assert_close(result.share, torch.tensor(shares, dtype=torch.float64), **EXACT)
    errors = []
    for layer in hidden:
        tokens = [[layer[b, i].numpy() for b in range(BATCH) for i in range(TOKENS) if REAL[b, i] and LABELS[b, i] == m]
                  for m in range(2)]  # fmt: skip
        one, other = (np.mean(part, axis=0) for part in tokens)
        errors.append(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert result.errors.tolist() == pytest.approx(errors, **NUMBER)
    for m in range(2):
        own = [abs(s[m][m] - s[m][1 - m]) / (s[m][m] + s[m][1 - m]) for s in shares]
        assert float(result.gap[m]) == pytest.approx(100 * mean(own), **NUMBER)
        slope = np.polyfit([1, 2, 3], [math.log(s[m][1 - m]) for s in shares], 1)[0]
        assert float(result.gamma[m, 1 - m]) == pytest.approx(math.exp(slope), **NUMBER)
        expected = sum(level * slope + math.log(error) for level, error in enumerate(errors, start=1))
        assert float(result.e_dda[m, 1 - m]) == pytest.approx(expected, **NUMBER)
        assert 0 <= float(result.r2[m, 1 - m]) <= 1
        assert math.isnan(result.gamma[m, m])
        # The last token that is none of padding writes the answer.
        last = [mean([float(layer[b, :, index, LABELS[b] == m].sum(dim=-1).mean()) for b, index in ((0, 4), (1, 6))])
                for layer in attention]  # fmt: skip
        assert result.last[:, m].tolist() == pytest.approx(last, **NUMBER)
    parts = []
    for b in range(BATCH):
        tokens = hidden[-1][b][REAL[b]].numpy()
        parts.append(np.linalg.norm(tokens - tokens.mean(axis=0)) / np.linalg.norm(tokens))
    assert float(result.residual[-1]) == pytest.approx(mean(parts), **NUMBER)


def test_summary_text():
    attention, hidden = random_layers()
    result = eq.diagnostics.modality_links(attention, hidden, LABELS, mask=causal_mask())
    rows = result.rows(("text", "image"))
    assert rows["gap of image, %"] == float(result.gap[1])
    assert rows["text to image, share"] == pytest.approx(float(result.share[:, 0, 1].mean()))
    assert rows["image to text, gamma"] == float(result.gamma[1, 0])
    assert rows["text to image, log E"] == float(result.e_dda[0, 1])
    assert rows["last token to text, share"] == pytest.approx(float(result.last[:, 0].mean()))
    assert len(rows) == 2 + 6 + 2 + 2
    with pytest.raises(ConfigError, match="modality_links: expected names of 2 modalities, got text"):
        result.rows(("text",))


def test_modalities_without_cross_attention_are_undefined():
    attention, hidden = random_layers()
    # The picture comes first and cannot look ahead.
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0])
    result = eq.diagnostics.modality_links(attention, hidden, labels, mask=causal_mask())
    assert math.isnan(result.gap[1])
    assert math.isnan(result.gamma[1, 0])
    assert not math.isnan(result.gap[0])


def test_mismatched_layers_raise():
    attention, hidden = random_layers()
    with pytest.raises(ShapeError, match=r"same layers, at least two, got 3 and 4\. The hidden_states of Hugging Face"):
        eq.diagnostics.modality_links(attention, [hidden[0], *hidden], LABELS)
    with pytest.raises(ShapeError, match="at least two, got 1 and 1"):
        eq.diagnostics.modality_links(attention[:1], hidden[:1], LABELS)
    with pytest.raises(ShapeError, match="modality_links modality: expected integer labels"):
        eq.diagnostics.modality_links(attention, hidden, LABELS[:, :3])


def test_huggingface_model_with_and_without_moda(monkeypatch):
    pytest.importorskip("transformers")
    from helpers.vlms import family

    model, inputs = family("llava")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    labels = (inputs["input_ids"] == model.config.image_token_id).long()
    model.train()
    model.set_attn_implementation("eager")
    before = read_modality_links(model, [inputs], labels)
    assert model.training
    model.eval()
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    seen = torch.ones(13, 13, dtype=torch.bool).tril().expand(2, -1, -1)
    expected = eq.diagnostics.modality_links(output.attentions, output.hidden_states[1:], labels, mask=seen)
    torch.testing.assert_close(before.share, expected.share)
    moda = eq.hf.apply_moda(model)
    torch.testing.assert_close(read_modality_links(model, [inputs], labels).share, before.share, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in moda.parameters():
            parameter.add_(0.5)
    assert not torch.equal(read_modality_links(model, [inputs], labels).share, before.share)
    moda.remove()
    assert torch.equal(read_modality_links(model, [inputs], labels).share, before.share)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(warnings, "warn", lambda *args, **kwargs: None)
    with pytest.raises(ConfigError, match=r"Use model\.set_attn_implementation\('eager'\)"):
        read_modality_links(model, [inputs], labels)
    with pytest.raises(ShapeError, match="read_modality_links: expected at least one batch, got none"):
        read_modality_links(model, [], labels)


def test_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moda_before_after", "2"])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        path = Path(__file__).parents[2] / "examples" / "moda_before_after.py"
        runpy.run_path(str(path), run_name="__main__")
    message = capsys.readouterr().out.splitlines()
    assert message[0].startswith("gap of text, %")
    assert len(message) == 12
    assert "nan" not in "".join(message)
    assert (tmp_path / "moda_before_after.png").stat().st_size > 1000
