"""DGL against gradients computed by hand: encoders by unimodal losses, fusion by the multimodal loss; errors."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.fusion.subset_tokens import keep_modalities
from helpers.fusion import DIM, NAMES, batch
from helpers.steps import fused, step
from helpers.tasks import TASKS, batch_for, static
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
FUSIONS = {
    "concat": lambda: eq.fusion.Concat(DIM),
    "joint": lambda: eq.fusion.JointAttention(DIM, heads=2, dropout=0.0, cls_std=1.0),
    "gated": lambda: eq.fusion.Gated(DIM),
}


def attached(names=("audio", "image"), *, fusion="concat", alpha=2.5, **options):
    made = fused(names, fusion=FUSIONS[fusion](), **{"unimodal": "none", **options})
    return made, eq.BalancerList(made, [eq.balance.DGL(made, alpha=alpha)])


def by_hand(made, inputs, alpha):
    """Returns name of parameter -> gradient, from two separate backward passes through copies."""
    frozen, fusing = copy.deepcopy(made), copy.deepcopy(made)
    for model in (frozen, fusing):
        model.preparations, model.transforms, model.results = [], [], []
    for part in (frozen.fusion, frozen.head):
        part.requires_grad_(False)
    tokens, losses = frozen.encode(inputs), []
    size = len(inputs["target"])
    for name in made.names:
        here = inputs.get("mask", {}).get(name, torch.ones(size, dtype=torch.bool))
        logits = frozen.fuse(keep_modalities(tokens, [name])).logits
        losses += [frozen.sample_losses(logits, inputs["target"])[here].mean()]
    (alpha * sum(losses)).backward()
    fusing.encoders.requires_grad_(False)
    fusing.loss(fusing(inputs).logits, inputs["target"]).backward()
    found = {key: p.grad for key, p in frozen.named_parameters() if p.grad is not None}
    return {**found, **{key: p.grad for key, p in fusing.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("missing", [(), ("audio", "image")])
def test_gradients_are_those_of_two_separate_losses(fusion, number, missing):
    names = NAMES[:number]
    made, balancing = attached(names, fusion=fusion)
    inputs = batch(names, size=7, missing=missing)
    expected, found = by_hand(made, inputs, 2.5), step(made, balancing, inputs)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **EXACT)


@pytest.mark.parametrize("task", TASKS)
def test_concatenation_is_trained_as_by_the_released_code(task):
    """There the unimodal logits are those of the head with zeros in place of the other features."""
    made, balancing = attached(task=task, alpha=4.0)
    inputs = batch_for(task, size=7)
    found = step(made, balancing, inputs)
    pooled = [tokens.pooled() for tokens in made.encode(inputs).values()]
    weight, bias = made.head.weight.detach(), made.head.bias.detach()
    zero = torch.zeros_like(pooled[0])
    parts = (torch.cat([pooled[0], zero], dim=1), torch.cat([zero, pooled[1]], dim=1))
    loss = 4.0 * sum(made.loss(part @ weight.T + bias, inputs["target"]) for part in parts)
    for name in made.names:
        (gradient,) = torch.autograd.grad(loss, made.encoders[name].weight, retain_graph=True)
        torch.testing.assert_close(found[f"encoders.{name}.weight"], gradient, **EXACT)
    joint = made.loss(torch.cat(pooled, dim=1).detach() @ made.head.weight.T + made.head.bias, inputs["target"])
    torch.testing.assert_close(found["head.weight"], torch.autograd.grad(joint, made.head.weight)[0], **EXACT)


def test_the_value_of_the_loss():
    made, balancing = attached()
    inputs = batch(size=7)
    output = made.train()(inputs)
    alone = [made.fuse(keep_modalities(output.tokens, [name])).logits for name in made.names]
    expected = sum(2.5 * made.loss(logits, inputs["target"]) for logits in alone)
    expected = expected + made.loss(output.logits, inputs["target"])
    torch.testing.assert_close(balancing.loss(output, inputs["target"]), expected, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(balancing.loss(made(inputs), inputs["target"]), expected.detach(), **EXACT)


def test_tokens_of_the_output_reach_the_encoders_and_its_logits_do_not():
    made, _ = attached()
    output = made.train()(batch())
    weight = made.encoders["audio"].weight
    assert torch.autograd.grad(output.tokens["audio"].values.sum(), weight)[0].any()
    (gradient,) = torch.autograd.grad(output.logits.sum(), weight, allow_unused=True)
    assert gradient is None
    torch.testing.assert_close(made.eval()(batch()).logits, output.logits, **EXACT)


def test_the_log_is_the_mean_unimodal_loss():
    made, balancing = attached()
    inputs, other = batch(size=7, missing=("image",)), batch(size=5, seed=1)
    sums, counts = {"audio": 0.0, "image": 0.0}, {"audio": 0, "image": 0}
    for each in (inputs, other):
        with torch.no_grad():
            tokens = made.eval().encode(each)
            for name in made.names:
                here = each.get("mask", {}).get(name, torch.ones(len(each["target"]), dtype=torch.bool))
                logits = made.fuse(keep_modalities(tokens, [name])).logits
                sums[name] += float(made.sample_losses(logits, each["target"])[here].sum())
                counts[name] += int(here.sum())
        step(made, balancing, each)
    expected = {f"loss/{name}": sums[name] / counts[name] for name in made.names}
    assert balancing.end_epoch() == pytest.approx(expected)
    assert balancing.end_epoch() == {"loss/audio": 0.0, "loss/image": 0.0}


def test_gradients_in_half_precision_do_not_underflow():
    """The gradient through the fusion is that of the sum over samples, which loss scaling does not reach."""
    made, balancing = attached(dtype=torch.float32)
    inputs = batch(size=5, dtype=torch.float32)
    exact = step(made, balancing, inputs)
    half = made.half()
    inputs = batch(size=5, dtype=torch.float16)
    found = step(half, balancing, inputs)
    for key in ("encoders.audio.weight", "encoders.image.weight"):
        torch.testing.assert_close(found[key].float(), exact[key], rtol=0.05, atol=2e-3)


def test_reentrant_checkpointing_of_the_fusion_is_refused():
    made, balancing = attached()
    inside = made.fusion.forward

    def forward(tokens):
        names = list(tokens)

        def features(*values):
            return inside({n: eq.Tokens(v) for n, v in zip(names, values, strict=True)}).features

        values = [part.values for part in tokens.values()]
        if not torch.is_grad_enabled():
            return inside(tokens)
        return eq.Output(
            features=checkpoint(features, *values, use_reentrant=True), tokens=dict(tokens), names=made.names
        )

    made.fusion.forward = forward
    with pytest.raises(ConfigError, match=r"DGL: expected a graph .*use_reentrant=False"):
        balancing.loss(made.train()({**batch(), "image": batch()["image"]}), batch()["target"])


@pytest.mark.parametrize("other", ["LFM", "MBSD", "MMPareto", "ReconBoost"])
def test_methods_whose_loss_would_not_reach_the_encoders_are_refused(other):
    made = static(unimodal="train")
    with pytest.raises(ConfigError, match="its loss would not reach the encoders, which DGL trains"):
        eq.BalancerList(made, [eq.balance.DGL(made), getattr(eq.balance, other)(made)])


def test_errors():
    with pytest.raises(ConfigError, match="DGL: expected two or more modalities, got audio"):
        eq.balance.DGL(static(("audio",)))
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="DGL: expected a finite alpha > 0"):
            eq.balance.DGL(static(), alpha=alpha)
