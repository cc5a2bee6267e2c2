"""The CUDA path of each part of the library, against the same computation on the CPU; run with ``pytest -m cuda``."""

import copy

import pytest
import torch

import equipoise as eq
from equipoise.consistency import nuclear_norm

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
NAMES = ("audio", "image")


def build_model(fusion=None):
    torch.manual_seed(0)
    encoders = {"audio": torch.nn.Linear(5, 16), "image": torch.nn.Linear(7, 16)}
    return eq.FusionModel(
        encoders, fusion or eq.fusion.JointAttention(dim=16, heads=2), num_outputs=3, unimodal="train"
    )


def build_batch(seed=0, size=12):
    random = torch.Generator().manual_seed(seed)
    return {
        "audio": torch.randn(size, 4, 5, generator=random),
        "image": torch.randn(size, 6, 7, generator=random),
        "target": torch.arange(size) % 3,
    }


def move(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [8, 64])
def test_attend_matches_float64_on_the_cpu(dtype, is_causal, queries):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, queries, 16, generator=random, dtype=torch.float64) for _ in range(3))
    modality = torch.arange(queries) * 3 // queries
    expected = eq.attend(q, k, v, modality=modality, num_modalities=3, is_causal=is_causal)
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)]
    result = eq.attend(*inputs, modality=modality.to(DEVICE), num_modalities=3, is_causal=is_causal)
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 5e-2}
    torch.testing.assert_close(result.output.double().cpu(), expected.output, **tolerance)
    torch.testing.assert_close(result.share.double().cpu(), expected.share, **tolerance)
    gradients = torch.autograd.grad(result.output.float().sum() + result.share.square().sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["Concat", "Sum", "JointAttention", "MulT", "MBT", "JMT", "MMML", "MODA"])
def test_fusions_match_the_cpu(name):
    options = {} if name in ("Concat", "Sum") else {"heads": 2}
    model = build_model(getattr(eq.fusion, name)(16, **options)).eval()
    batch = build_batch()
    with torch.no_grad():
        expected = model(batch).logits
        result = copy.deepcopy(model).to(DEVICE)(move(batch)).logits
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_watch_matches_the_cpu():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval()
    ids, labels = torch.arange(12)[None], torch.tensor([0] * 5 + [1] * 7)
    shares = {}
    for device in ("cpu", DEVICE):
        with torch.no_grad(), eq.watch(model.to(device), modality=labels.to(device), names=NAMES) as record:
            model(ids.to(device))
        shares[device] = [record.share(layer).float().cpu() for layer in record.layers]
    torch.testing.assert_close(shares[DEVICE], shares["cpu"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["RollingQ", "OGM", "OGM_GE", "AGM", "PMR", "MMPareto", "ModalityDropout"])
def test_balancers_train_on_cuda(name):
    model = build_model(eq.fusion.Concat(16) if name != "RollingQ" else None).to(DEVICE)
    balancer = (
        eq.balance.RollingQ(model.fusion.attention, rho=1.0, beta=0.0)
        if name == "RollingQ"
        else getattr(eq.balance, name)(model)
    )
    balancing = eq.BalancerList(model, [balancer])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        batch = move(build_batch(step))
        loss = balancing.loss(model(batch), batch["target"])
        optimizer.zero_grad()
        loss.backward()
        balancing.before_step()
        optimizer.step()
    balancing.end_epoch()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["svd", "gram", "polar"])
def test_nuclear_norm_matches_the_cpu(method):
    matrix = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = torch.linalg.svdvals(matrix.double()).sum(-1)
    torch.testing.assert_close(
        nuclear_norm(matrix.to(DEVICE), method=method).double().cpu(), expected, rtol=1e-3, atol=1e-3
    )


def test_diagnosis_steering_and_reliability_run_on_cuda():
    model = build_model().to(DEVICE).eval()
    batches = [move(build_batch(seed)) for seed in range(3)]
    diagnosis = eq.diagnose(model, batches)
    assert diagnosis.metrics["accuracy"] >= 0
    with torch.no_grad(), eq.steer(model, audio=1.0):
        assert model(batches[0]).logits.isfinite().all()
    reliable = eq.Reliability.fit(model, batches, batches)
    with torch.no_grad():
        output = reliable(batches[0])
    assert output.logits.isfinite().all()
    assert set(output.reliability) == set(NAMES)


def test_alignment_losses_match_the_cpu():
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 8, generator=random) for _ in range(2))
    expected = eq.alignment.info_nce(first, second, scale=torch.tensor(2.0))
    result = eq.alignment.info_nce(first.to(DEVICE), second.to(DEVICE), scale=torch.tensor(2.0, device=DEVICE))
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)
