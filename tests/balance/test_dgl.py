"""DGL against gradients computed by hand: encoders by unimodal losses, fusion by the multimodal loss; errors."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.fusion.subset_tokens import keep_modalities
from helpers.fusion import DIM, NAMES, batch
from helpers.steps import attention_model, step
from helpers.tasks import TASKS, additive_model, batch_for
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
FUSIONS = {
    "concat": lambda: eq.fusion.Concat(DIM),
    "joint": lambda: eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0),
    "gated": lambda: eq.fusion.Gated(DIM),
}


def attached(names=("audio", "image"), *, fusion="concat", alpha=2.5, **options):
    model = attention_model(names, fusion=FUSIONS[fusion](), **{"unimodal": "none", **options})
    return model, eq.BalancerList(model, [eq.balance.DGL(model, alpha=alpha)])


def by_hand(net, inputs, alpha):
    """Returns name of parameter -> gradient, from two separate backward passes through copies."""
    frozen, fusing = copy.deepcopy(net), copy.deepcopy(net)
    for model in (frozen, fusing):
        model.preparations, model.transforms, model.results = [], [], []
    for part in (frozen.fusion, frozen.head):
        part.requires_grad_(False)
    tokens, losses = frozen.encode(inputs), []
    size = len(inputs["target"])
    for name in net.names:
        here = inputs.get("mask", {}).get(name, torch.ones(size, dtype=torch.bool))
        logits = frozen.fuse(keep_modalities(tokens, [name])).logits
        losses += [frozen.sample_losses(logits, inputs["target"])[here].mean()]
    (alpha * sum(losses)).backward()
    fusing.encoders.requires_grad_(False)
    fusing.loss(fusing(inputs).logits, inputs["target"]).backward()
    result = {key: p.grad for key, p in frozen.named_parameters() if p.grad is not None}
    return {**result, **{key: p.grad for key, p in fusing.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_gradients_are_those_of_two_separate_losses(fusion, number, missing):
    names = NAMES[:number]
    result, balancing = attached(names, fusion=fusion)
    inputs = batch(names, size=7, missing=missing)
    expected, actual = by_hand(result, inputs, 2.5), step(result, balancing, inputs)
    assert expected.keys() == actual.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_concatenation_is_trained_as_by_the_released_code(task):
    """There the unimodal logits are those of the head with zeros in place of the other features."""
    result, balancing = attached(task=task, alpha=4.0)
    inputs = batch_for(task, size=7)
    actual = step(result, balancing, inputs)
    pooled = [tokens.pooled() for tokens in result.encode(inputs).values()]
    weight, bias = result.head.weight.detach(), result.head.bias.detach()
    zero = torch.zeros_like(pooled[0])
    parts = (torch.cat([pooled[0], zero], dim=1), torch.cat([zero, pooled[1]], dim=1))
    loss = 4.0 * sum(result.loss(part @ weight.T + bias, inputs["target"]) for part in parts)
    for name in result.names:
        (gradient,) = torch.autograd.grad(loss, result.encoders[name].weight, retain_graph=True)
        torch.testing.assert_close(actual[f"encoders.{name}.weight"], gradient, **EXACT)
    joint = result.loss(torch.cat(pooled, dim=1).detach() @ result.head.weight.T + result.head.bias, inputs["target"])
    torch.testing.assert_close(actual["head.weight"], torch.autograd.grad(joint, result.head.weight)[0], **EXACT)


def test_the_value_of_the_loss():
    result, balancing = attached()
    inputs = batch(size=7)
    output = result.train()(inputs)
    alone = [result.fuse(keep_modalities(output.tokens, [name])).logits for name in result.names]
    expected = sum(2.5 * result.loss(logits, inputs["target"]) for logits in alone)
    expected = expected + result.loss(output.logits, inputs["target"])
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(balancing.loss(result(inputs), inputs["target"]), expected.detach(), **EXACT)


def test_tokens_of_the_output_reach_the_encoders_and_its_logits_do_not():
    result, _ = attached()
    output = result.train()(batch())
    weight = result.encoders["audio"].weight
    assert torch.autograd.grad(output.tokens["audio"].values.sum(), weight)[0].any()
    (gradient,) = torch.autograd.grad(output.logits.sum(), weight, allow_unused=True)
    assert gradient is None
    torch.testing.assert_close(result.eval()(batch()).logits, output.logits, **EXACT)


def test_the_log_is_the_mean_unimodal_loss():
    result, balancing = attached()
    inputs, other = batch(size=7, missing=("image",)), batch(size=5, seed=1)
    sums, counts = {"audio": 0.0, "image": 0.0}, {"audio": 0, "image": 0}
    for each in (inputs, other):
        with torch.no_grad():
            tokens = result.eval().encode(each)
            for name in result.names:
                here = each.get("mask", {}).get(name, torch.ones(len(each["target"]), dtype=torch.bool))
                logits = result.fuse(keep_modalities(tokens, [name])).logits
                sums[name] += float(result.sample_losses(logits, each["target"])[here].sum())
                counts[name] += int(here.sum())
        step(result, balancing, each)
    expected = {f"loss/{name}": sums[name] / counts[name] for name in result.names}
    assert balancing.end_epoch() == pytest.approx(expected)
    assert balancing.end_epoch() == {"loss/audio": 0.0, "loss/image": 0.0}


def test_gradients_in_half_precision_do_not_underflow():
    """The gradient through the fusion is that of the sum over samples, which loss scaling does not reach."""
    result, balancing = attached(dtype=torch.float32)
    inputs = batch(size=5, dtype=torch.float32)
    exact = step(result, balancing, inputs)
    half = result.half()
    inputs = batch(size=5, dtype=torch.float16)
    actual = step(half, balancing, inputs)
    for key in ("encoders.audio.weight", "encoders.image.weight"):
        torch.testing.assert_close(actual[key].float(), exact[key], rtol=0.05, atol=2e-3)


def test_reentrant_checkpointing_of_the_fusion_raises():
    result, balancing = attached()
    inside = result.fusion.forward

    def forward(tokens):
        names = list(tokens)

        def features(*values):
            return inside({n: eq.Tokens(v) for n, v in zip(names, values, strict=True)}).features

        values = [part.values for part in tokens.values()]
        if not torch.is_grad_enabled():
            return inside(tokens)
        return eq.Output(
            features=checkpoint(features, *values, use_reentrant=True), tokens=dict(tokens), names=result.names
        )

    result.fusion.forward = forward
    with pytest.raises(ConfigError, match=r"DGL: expected a graph .*use_reentrant=False"):
        balancing.loss(result.train()({**batch(), "image": batch()["image"]}), batch()["target"])


@pytest.mark.parametrize("other", ["LFM", "MBSD", "MMPareto", "ReconBoost"])
def test_methods_whose_loss_does_not_reach_the_encoders_raise(other):
    model = additive_model(unimodal="train")
    with pytest.raises(ConfigError, match="its loss would not reach the encoders, which DGL trains"):
        eq.BalancerList(model, [eq.balance.DGL(model), getattr(eq.balance, other)(model)])


def test_errors():
    with pytest.raises(ConfigError, match="DGL: expected two or more modalities, got audio"):
        eq.balance.DGL(additive_model(("audio",)))
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="DGL: expected a finite alpha > 0"):
            eq.balance.DGL(additive_model(), alpha=alpha)
