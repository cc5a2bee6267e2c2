"""Gradient checkpointing changes neither outputs nor gradients nor statistics, and stores fewer activations."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertModel

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.fusion import JMT, MBT, MMML, MODA, JointAttention, MidFusion, MulT
from equipoise.nn import enable_gradient_checkpointing

FUSIONS = {
    "joint": lambda: JointAttention(16, heads=2, depth=3, dropout=0.1),
    "mid": lambda: MidFusion(16, heads=2, depth=3, dropout=0.1),
    "mbt": lambda: MBT(16, heads=2, depth=3, dropout=0.1),
    "mult": lambda: MulT(16, heads=2, depth=3, dropout=0.1),
    "jmt": lambda: JMT(16, heads=2, depth=3, dropout=0.1),
    "mmml": lambda: MMML(16, heads=2, depth=3, dropout=0.1),
    "moda": lambda: MODA(16, heads=2, depth=3, dropout=0.1),
}


def build(fusion="joint"):
    torch.manual_seed(0)
    encoders = {"audio": eq.encoders.SequenceEncoder(3, max_length=20, dim=16, depth=3, heads=2, dropout=0.1),
                "image": eq.encoders.PatchEncoder(1, (8, 8), dim=16, depth=3, heads=2, patch=4)}  # fmt: skip
    return eq.FusionModel(encoders, FUSIONS[fusion](), num_outputs=3)


def batch():
    generator = torch.Generator().manual_seed(1)
    audio, image = torch.randn(6, 20, 3, generator=generator), torch.randn(6, 1, 8, 8, generator=generator)
    mask = torch.arange(20) < torch.tensor([20, 20, 12, 9, 20, 3])[:, None]
    return {"audio": audio, "image": image, "mask": {"audio": mask}, "target": torch.arange(6) % 3}


def train_step(model):
    """Returns loss, gradients and bytes of stored activations of a step."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    torch.manual_seed(2)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = batch()
        loss = model.loss(model(inputs).logits, inputs["target"])
    stored = sum(sizes.values())
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters()}, stored


@pytest.mark.parametrize("fusion", FUSIONS)
def test_equal_gradients_with_fewer_stored_activations(fusion):
    plain = build(fusion)
    other = copy.deepcopy(plain)
    assert enable_gradient_checkpointing(other) >= 6
    assert list(other.state_dict()) == list(plain.state_dict())
    (loss, gradients, stored), (same_loss, same_gradients, fewer) = train_step(plain), train_step(other)
    assert torch.equal(loss, same_loss)
    for name, gradient in gradients.items():
        assert (gradient is None) == (same_gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, same_gradients[name]), name
    assert fewer < 0.6 * stored


def test_rollingq_and_watch_count_each_pass_once():
    results = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            enable_gradient_checkpointing(model)
        balancing = eq.BalancerList(model, [eq.balance.RollingQ(model.fusion.attention, beta=0.0)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(3)
        for _ in range(3):
            inputs = batch()
            with eq.watch(model) as record:
                loss = balancing.loss(model(inputs), inputs["target"])
                optimizer.zero_grad()
                loss.backward()
            balancing.before_step()
            optimizer.step()
        balancing.end_epoch()
        results.append(
            (model.state_dict(), {name: record.share(layer=name) for name in record.layers + record.unimodal_layers})
        )
    (weights, shares), (same_weights, same_shares) = results
    assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())
    assert shares.keys() == same_shares.keys()
    assert len(shares) >= 7
    assert all(torch.equal(value, same_shares[name]) for name, value in shares.items())


def test_transformers_model_in_backbone():
    config = BertConfig(vocab_size=11, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    model = eq.encoders.Backbone(BertModel(config)).train()
    ids = torch.tensor([[1, 5, 2], [1, 2, 0]])
    gradients = []
    for enable in (False, True):
        if enable:
            assert enable_gradient_checkpointing(model) == 1
            assert model.model.encoder.layer[0].gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(4)
        model({"input_ids": ids}).values.square().sum().backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_evaluation_mode_runs_without_checkpointing():
    model = build().eval()
    enable_gradient_checkpointing(model)
    names = {type(node).__name__ for node in _graph(model(batch()).logits.grad_fn)}
    assert not any("Checkpoint" in name for name in names)


def _graph(node, seen=None):
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        for parent, _ in node.next_functions:
            _graph(parent, seen)
    return seen


class Unsupported(nn.Linear):
    """Has the method of timm's VGG."""

    def set_grad_checkpointing(self, enable=True):
        assert not enable, "gradient checkpointing not supported"


def test_unsupported_models_of_timm():
    assert enable_gradient_checkpointing(nn.ModuleList([build(), Unsupported(2, 2)])) == 9
    with pytest.raises(ConfigError, match="got Unsupported, which has none"):
        enable_gradient_checkpointing(Unsupported(2, 2))


def test_model_without_layers_raises():
    with pytest.raises(ConfigError, match="layers of equipoise, transformers or timm, got Linear"):
        enable_gradient_checkpointing(nn.Linear(2, 2))
