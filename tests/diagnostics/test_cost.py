"""Parameters and operations against counts by hand, and against the published table (spec A.1)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equipoise.balance import RollingQ
from equipoise.diagnostics import cost
from equipoise.encoders import PatchEncoder
from equipoise.errors import ConfigError, ShapeError
from equipoise.fusion import JMT, MBT, MMML, JointAttention
from equipoise.models.fusion_model import FusionModel
from equipoise.nn.transformer import Attention

CONVENTIONS = ("full", "thop")


class Plain(nn.Module):
    """Attention by the public function alone."""

    def forward(self, batch):
        return F.scaled_dot_product_attention(*batch)


class StatefulModel(nn.Module):
    """Everything that can be disturbed: dropout, random numbers, a module in another mode, and a crash on demand."""

    def __init__(self, crash=False):
        super().__init__()
        self.crash = crash
        self.linear, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.layer = nn.TransformerEncoderLayer(5, 1, 7, batch_first=True)
        self.linear.eval()
        self.norm.bias.requires_grad_(False)

    def forward(self, batch):
        assert not any(module.training for module in self.modules())
        hidden = self.layer(self.linear(batch)[:, None])[:, 0]
        if self.crash:
            raise RuntimeError("out of order")
        return self.norm(hidden + torch.rand(5))


class ViewModel(nn.Module):
    """Hands a bare view of its own class token, and one of the batch, to a layer."""

    def __init__(self):
        super().__init__()
        self.cls, self.linear = nn.Parameter(torch.zeros(5)), nn.Linear(5, 3)

    def forward(self, batch):
        return self.linear(self.cls.expand(len(batch), 1, -1)) + self.linear(batch[..., :5])


# A.1


@pytest.fixture(scope="module")
def published_model():
    """Vanilla MT on CREMA-D with one picture; the reference computes all rows of its fusion layer."""
    torch.manual_seed(0)
    size = {"patch": 16, "dim": 768, "depth": 4, "heads": 12}
    # 188 x 257 spectrograms are 11 x 16 whole patches.
    encoders = {"audio": PatchEncoder(1, (176, 256), **size), "image": PatchEncoder(3, (224, 224), **size)}
    return FusionModel(encoders, JointAttention(768, heads=1, shortcut=False), num_outputs=6, unimodal="probe").eval()


PICTURES = {"audio": torch.zeros(1, 1, 176, 256), "image": torch.zeros(1, 3, 224, 224)}
UNUSED_NORM = 2 * 768
"""The released code makes a LayerNorm in its fusion layer and never calls it."""


def test_published_table(published_model):
    result = cost(published_model, PICTURES, convention="thop")
    assert result.parameters + UNUSED_NORM == 59_871_762
    assert round(result.gflops, 4) == 1489.1288
    balancer = RollingQ(published_model.fusion.attention)
    try:
        rolling = cost(published_model, PICTURES, convention="thop")
    finally:
        balancer.detach()
    assert rolling.parameters + UNUSED_NORM == 60_461_586
    assert rolling.parameters - result.parameters == 589_824
    assert round(rolling.gflops, 4) == 1489.2043


def test_published_parameter_count(published_model):
    # The release also holds two unused bottleneck tokens for each modality.
    result = sum(p.numel() for p in published_model.parameters())
    assert result + UNUSED_NORM + 2 * 2 * 768 == 60_164_370


def published_with(fusion, *, norms=True):
    """The same encoders under another fusion, all zeros: only shapes are counted."""
    size = {"patch": 16, "dim": 768, "depth": 4, "heads": 12}
    with torch.device("meta"):
        encoders = {"audio": PatchEncoder(1, (176, 256), **size), "image": PatchEncoder(3, (224, 224), **size)}
        if not norms:
            for encoder in encoders.values():
                encoder.transformer.norm = nn.Identity()
        model = FusionModel(encoders, fusion(), num_outputs=6, unimodal="probe")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_published_mbt():
    # The release has its norms behind the last fused block, and none between encoder and fusion.
    model = published_with(lambda: MBT(768, depth=4, bottlenecks=2), norms=False)
    result = cost(model, PICTURES, convention="thop")
    heads = 2 * 4_614
    assert result.parameters == 114_206_220 - heads + 3 * 4_614
    assert round(result.gflops, 4) == round(2746.8961 + 0.0018, 4)
    assert (round(result.parameters / 1e6, 2), round(result.gflops, 2)) == (114.21, 2746.90)


def test_published_mmml():
    # Its head is narrower than the released code's 512: with 384 both figures come out.
    model = published_with(lambda: MMML(768, depth=1, heads=12, hidden=384))
    assert sum(p.numel() for p in model.fusion.layers.parameters()) == 18_903_552
    result = cost(model, PICTURES, convention="thop")
    probes = 2 * 4_614
    assert (round(result.parameters / 1e6, 2), round(result.gflops, 2)) == (77.88, 1828.29)
    assert round(result.gflops - probes * 2 * 64 / 1e9, 3) == 1828.288
    wide = published_with(lambda: MMML(768, depth=1, heads=12))
    assert round(cost(wide, PICTURES, convention="thop").parameters / 1e6, 2) == 77.98


def test_published_jmt_is_close():
    # The table's tool does not see torch's own attention modules, which the release uses; so ours are taken out.
    model = published_with(lambda: JMT(768, heads=12))
    macs = []
    attentions = [m for m in model.fusion.modules() if isinstance(m, Attention)]
    unseen = [part for attention in attentions for part in attention.modules() if isinstance(part, nn.Linear)]
    for part in unseen:
        part.register_forward_hook(lambda m, x, y: macs.append(y.numel() * m.in_features))
    result = cost(model, PICTURES, convention="thop")
    parameters = result.parameters - sum(p.numel() for part in unseen for p in part.parameters())
    gflops = result.gflops - 2 * 64 * sum(macs) / 1e9
    # One joining layer and three feed-forward pairs are the 8 d^2 of the table; over 197 places they are all its cost.
    norms, head, probes = 6 * 2 * 768, 6 * 768 * 6 + 6, 2 * 4_614
    assert parameters == 57_494_016 + 8 * 768**2 + 7 * 768 + norms + head + probes
    assert parameters == pytest.approx(62.23e6, rel=6e-4)
    assert gflops == pytest.approx(1494.87, rel=4e-4)
    without = gflops - 2 * 64 * (197 * 6 * 4 * 768 + head) / 1e9
    assert round(without + 2 * 64 * 4_608 / 1e9, 3) == 1494.867


def test_class_token_row_costs_less(published_model):
    full = cost(published_model, PICTURES, convention="full")
    published_model.fusion.shortcut = True
    try:
        short = cost(published_model, PICTURES, convention="full")
    finally:
        published_model.fusion.shortcut = False
    assert short.parameters == full.parameters
    # Q and output projection of 374 of 375 rows, and their scores and sums; shares cost a little in either.
    saved = 374 * (2 * 2 * 768**2 + 2 * 2 * 375 * 768)
    assert full.flops - short.flops == pytest.approx(saved, rel=0.01)


# By hand


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 7])
def test_full_count_of_a_fusion_model(batch, heads):
    d, tokens, outputs = 14, {"audio": 2 * 3 + 1, "image": 5 * 2 + 1}, 3
    size = {"patch": 2, "dim": d, "depth": 2, "heads": heads}
    encoders = {"audio": PatchEncoder(1, (4, 6), **size), "image": PatchEncoder(3, (10, 4), **size)}
    model = FusionModel(encoders, JointAttention(d, heads=heads), outputs)
    result = cost(model, {"audio": torch.zeros(batch, 1, 4, 6), "image": torch.zeros(batch, 3, 10, 4)})
    macs = 0
    for name, channels in (("audio", 1), ("image", 3)):
        n = tokens[name]
        macs += (n - 1) * d * channels * 2 * 2
        macs += 2 * (n * 12 * d * d + 2 * n * n * d)
    keys = sum(tokens.values()) + 1
    macs += 2 * d * d + 2 * keys * d * d + 2 * keys * d
    macs += 3 * d * outputs
    # One row's shares cost at most a product of its attention with the keys' labels, in each head.
    assert macs <= result.macs <= macs + heads * keys * 2
    assert result.flops == 2 * result.macs
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.gflops == result.flops / 1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_full_counts_fused_attention(dtype, masked):
    query, key, value = (torch.zeros(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = torch.ones(5, 7, dtype=torch.bool) if masked else None
    result = cost(Plain(), [query, key, value] + ([mask] if masked else []))
    assert result.macs == 3 * 5 * 7 * (8 + 8)
    assert result.parameters == 0


def test_full_counts_operations_in_the_fast_path():
    layer = nn.TransformerEncoderLayer(10, 5, 13, batch_first=True).eval()
    result = cost(layer, torch.zeros(2, 7, 10))
    assert result.macs == 7 * (4 * 10 * 10 + 2 * 10 * 13) + 2 * 7 * 7 * 10
    assert result.parameters == sum(p.numel() for p in layer.parameters())


def test_thop_rules():
    batch = torch.zeros(2, 4, 7, 7)
    result = cost(nn.Conv2d(4, 6, (3, 5), groups=2), batch, convention="thop")
    assert result.macs == 6 * 5 * 3 * (4 // 2) * 3 * 5
    assert result.parameters == 6 * 2 * 3 * 5 + 6
    assert cost(nn.BatchNorm2d(4), batch, convention="thop").macs == 4 * 4 * 49
    assert cost(nn.LayerNorm(7), batch, convention="thop").macs == 4 * 4 * 49
    bare = cost(nn.LayerNorm(7, elementwise_affine=False), batch, convention="thop")
    assert (bare.macs, bare.parameters) == (2 * 4 * 49, 0)
    assert cost(nn.Linear(7, 11), batch, convention="thop").macs == 4 * 7 * 7 * 11


def test_thop_excludes_attention_products_embeddings_and_multihead_attention():
    layer = nn.TransformerEncoderLayer(10, 5, 13, batch_first=True)
    result = cost(layer, torch.zeros(2, 7, 10), convention="thop")
    assert result.macs == 7 * (2 * 10 * 13 + 2 * 4 * 10)
    assert result.parameters == (10 * 13 + 13) + (13 * 10 + 10) + 2 * 20
    encoder = PatchEncoder(1, (4, 6), patch=2, dim=14, depth=1, heads=2)
    tables = 14 + 7 * 14
    result = cost(encoder, torch.zeros(2, 1, 4, 6), convention="thop")
    assert result.parameters == sum(p.numel() for p in encoder.parameters()) - tables
    assert result.macs == 6 * 14 * 4 + 7 * (12 * 14 * 14 + 3 * 4 * 14)


def test_thop_counts_parameters_once_and_every_call():
    shared = nn.Linear(5, 5)
    result = cost(nn.Sequential(shared, shared), torch.zeros(3, 5), convention="thop")
    assert (result.parameters, result.macs) == (30, 50)


@pytest.mark.parametrize("heads", [1, 7])
def test_thop_counts_rotations_per_head(heads):
    model = FusionModel({"a": nn.Linear(3, 14), "b": nn.Linear(2, 14)}, JointAttention(14, heads=heads), 5)
    batch = {"a": torch.zeros(2, 3, 3), "b": torch.zeros(2, 1, 2)}
    before = cost(model, batch, convention="thop")
    RollingQ(model.fusion.attention)
    after = cost(model, batch, convention="thop")
    assert after.parameters - before.parameters == heads * (14 // heads) ** 2
    assert after.macs - before.macs == heads * (14 // heads) ** 2
    # In full it is what it is: a buffer.
    assert cost(model, batch).parameters == sum(p.numel() for p in model.parameters())


def test_batch_size_scales_gflops_only():
    layer, batch = nn.Linear(3, 5), torch.zeros(7, 3)
    assert cost(layer, batch).gflops == 30 / 1e9
    assert cost(layer, batch, convention="thop").gflops == 64 * 30 / 1e9
    many = cost(layer, batch, batch_size=10)
    assert (many.gflops, many.flops, many.batch_size) == (300 / 1e9, 30, 10)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_views_of_tensors_with_gradient_are_counted(requires_grad):
    result = cost(ViewModel(), torch.zeros(2, 7, 11, requires_grad=requires_grad))
    assert result.macs == (1 + 7) * 5 * 3
    assert result.parameters == 5 + 5 * 3 + 3


# No trace


def state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        [module.training for module in model.modules()],
        [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        {name: value.tolist() for name, value in model.state_dict().items()},
        [(p.grad, p.requires_grad) for p in model.parameters()],
        torch.get_rng_state().tolist(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("crash", "batch", "error"),
    [
        (False, torch.zeros(2, 3), None),
        (False, torch.zeros(2, 7), "shapes cannot be multiplied"),
        (True, torch.zeros(2, 3), "out of order"),
    ],
    ids=["normal", "user error", "model error"],
)
def test_model_state_is_restored(convention, crash, batch, error):
    model = StatefulModel(crash)
    before = state(model)
    if error is None:
        assert cost(model, batch, convention=convention).flops > 0
    else:
        with pytest.raises(RuntimeError, match=error):
            cost(model, batch, convention=convention)
    assert state(model) == before


@pytest.mark.parametrize("enabled", [True, False])
def test_fast_path_setting_is_restored(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        cost(nn.Linear(3, 5), torch.zeros(2, 3))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize(
    ("batch", "options", "kind", "message"),
    [
        (
            torch.zeros(2, 3),
            {"convention": "fvcore"},
            ConfigError,
            r"cost: expected convention 'full' or 'thop', got 'fvcore'",
        ),
        (
            {"a": None, "b": "x"},
            {},
            ShapeError,
            r"cost: expected a batch with tensors of one or more samples, got dict",
        ),
        (torch.zeros(0, 3), {}, ShapeError, r"got a first tensor of shape \(0, 3\)"),
        (torch.tensor(1.0), {}, ShapeError, r"got a first tensor of shape \(\)"),
    ],
)
def test_errors(batch, options, kind, message):
    with pytest.raises(kind, match=message):
        cost(nn.Linear(3, 5), batch, **options)
