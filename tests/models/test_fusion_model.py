"""FusionModel: tasks, unimodal heads, what encoders may return, missing modalities, every error."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from equipoise.encoders import SequenceEncoder
from equipoise.errors import ConfigError, ShapeError
from equipoise.fusion import Concat, JointAttention, Unimodal
from equipoise.models.fusion_model import FusionModel
from equipoise.tokens.token_batch import Output, Tokens
from helpers.tolerance import TOL

BATCH, DIM, OUTPUTS = 5, 14, 3
NAMES = ("audio", "image")
TASKS = ("classification", "multilabel", "regression")


def build_model(fusion=None, *, seed=0, **options):
    torch.manual_seed(seed)
    encoders = {"audio": SequenceEncoder(7, max_length=11, dim=DIM, depth=1, heads=2), "image": nn.Linear(2, DIM)}
    return FusionModel(encoders, fusion or JointAttention(DIM, dropout=0.0), OUTPUTS, **options)


def random_batch(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        "audio": torch.randn(BATCH, 11, 7, generator=random),
        "image": torch.randn(BATCH, 3, 2, generator=random),
    }


def random_target(task):
    random = torch.Generator().manual_seed(1)
    if task == "classification":
        return torch.randint(0, OUTPUTS, (BATCH,), generator=random)
    values = torch.rand(BATCH, OUTPUTS, generator=random)
    return (values > 0.5).long() if task == "multilabel" else values


def expected_loss(task, logits, expected):
    total = 0.0
    for sample in range(len(logits)):
        if task == "classification":
            total -= float(torch.log_softmax(logits[sample].double(), 0)[expected[sample]])
        for j in range(OUTPUTS) if task != "classification" else ():
            p, y = logits[sample, j].double(), expected[sample, j].double()
            if task == "multilabel":
                total -= float(y * torch.log(torch.sigmoid(p)) + (1 - y) * torch.log(torch.sigmoid(-p))) / OUTPUTS
            else:
                total += float(p - y) ** 2 / OUTPUTS
    return total / len(logits)


def test_forward_is_encoders_fusion_and_heads():
    model, inputs = build_model().eval(), random_batch()
    output = model(inputs)
    fused = model.fusion(
        {"audio": model.encoders["audio"](inputs["audio"]), "image": Tokens(model.encoders["image"](inputs["image"]))}
    )
    assert torch.equal(output.features, fused.features)
    assert torch.equal(output.logits, model.head(fused.features))
    assert output.logits.shape == (BATCH, OUTPUTS)
    assert output.names == NAMES
    assert output.share.shape == (BATCH, 1, 2)
    for name in NAMES:
        expected = model.unimodal_heads[name](output.tokens[name].pooled())
        assert torch.equal(output.unimodal_logits[name], expected)


@pytest.mark.parametrize("task", TASKS)
def test_loss_of_each_task(task):
    model = build_model(task=task)
    output, expected = model(random_batch()), random_target(task)
    loss = model.loss(output.logits, expected)
    assert float(loss.detach()) == pytest.approx(expected_loss(task, output.logits.detach(), expected), rel=1e-5)
    unimodal = sum(expected_loss(task, logits.detach(), expected) for logits in output.unimodal_logits.values())
    assert float(model.unimodal_loss(output, expected).detach()) == pytest.approx(unimodal, rel=1e-5)


def test_single_output_regression_accepts_flat_target():
    torch.manual_seed(0)
    model = FusionModel({"image": nn.Linear(2, DIM)}, Concat(DIM), 1, task="regression")
    logits = model({"image": random_batch()["image"]}).logits
    flat = torch.arange(BATCH).float()
    assert torch.equal(model.loss(logits, flat), model.loss(logits, flat[:, None]))
    assert torch.equal(model.loss(logits, flat), (logits[:, 0] - flat).square().mean())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("unimodal", ["probe", "train", "none"])
def test_parameters_trained_by_the_unimodal_loss(task, unimodal):
    model = build_model(task=task, unimodal=unimodal)
    output = model(random_batch())
    loss = model.unimodal_loss(output, random_target(task))
    assert set(output.unimodal_logits) == (set() if unimodal == "none" else set(NAMES))
    if unimodal == "none":
        assert loss == 0.0
        assert not loss.requires_grad
        return
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.unimodal_heads.parameters())
    taught = [p.grad is not None and bool(p.grad.any()) for p in model.encoders["image"].parameters()]
    assert taught == [unimodal == "train"] * 2
    audio = [p.grad is not None and bool(p.grad.any()) for p in model.encoders["audio"].parameters()]
    assert any(audio) == (unimodal == "train")
    assert all(p.grad is None for p in (*model.fusion.parameters(), *model.head.parameters()))


def test_task_loss_trains_encoders_but_not_probes():
    model = build_model()
    model.loss(model(random_batch()).logits, random_target("classification")).backward()
    assert all(p.grad is not None for p in model.encoders.parameters())
    assert all(p.grad is None for p in model.unimodal_heads.parameters())


def test_unimodal_loss_excludes_samples_without_the_modality():
    model = build_model(unimodal="train")
    present = torch.tensor([True, False, True, True, False])
    reference = random_target("classification")
    output = model(random_batch() | {"mask": {"image": present}})
    expected = expected_loss("classification", output.unimodal_logits["image"].detach()[present], reference[present])
    expected += expected_loss("classification", output.unimodal_logits["audio"].detach(), reference)
    assert float(model.unimodal_loss(output, reference).detach()) == pytest.approx(expected, rel=1e-5)
    model.unimodal_loss(output, reference).backward()
    assert model.encoders["image"].weight.grad.any()
    masked = model(random_batch() | {"mask": {"image": torch.zeros(BATCH, dtype=torch.bool)}})
    gone = model(random_batch() | {"image": None})
    assert torch.equal(model.unimodal_loss(masked, reference), model.unimodal_loss(gone, reference))
    assert model.unimodal_loss(gone, reference).isfinite()


@pytest.mark.parametrize("task", TASKS)
def test_unimodal_loss_needs_no_device_sync(task):
    """Tensors without values, which masked can look into."""
    with torch.device("meta"):
        tokens = Tokens(torch.zeros(BATCH, 3, DIM), mask=torch.ones(BATCH, 3, dtype=torch.bool))
        logits = torch.zeros(BATCH, OUTPUTS)
        output = Output(torch.zeros(BATCH, DIM), unimodal_logits={"image": logits}, tokens={"image": tokens})
    assert build_model(task=task).unimodal_loss(output, random_target(task).to("meta")).shape == ()


@pytest.mark.parametrize("task", TASKS)
def test_unimodal_loss_of_each_task_with_missing_modality(task):
    model, reference = build_model(task=task), random_target(task)
    present = torch.tensor([False, True, False, True, True])
    output = model(random_batch() | {"mask": {"audio": present}})
    logits = {name: value.detach() for name, value in output.unimodal_logits.items()}
    expected = expected_loss(task, logits["audio"][present], reference[present]) + expected_loss(
        task, logits["image"], reference
    )
    assert float(model.unimodal_loss(output, reference).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda hidden: hidden,
        lambda hidden: Tokens(hidden),
        lambda hidden: SimpleNamespace(last_hidden_state=hidden, pooler_output=None),
    ],
    ids=["tensor", "Tokens", "last_hidden_state"],
)
def test_encoder_output_formats(wrap):
    class Wrapped(nn.Linear):
        def forward(self, input):
            return wrap(super().forward(input))

    torch.manual_seed(0)
    plain = FusionModel({"image": nn.Linear(2, DIM)}, JointAttention(DIM), OUTPUTS).eval()
    other = FusionModel({"image": Wrapped(2, DIM)}, JointAttention(DIM), OUTPUTS).eval()
    other.load_state_dict(plain.state_dict())
    inputs = {"image": random_batch()["image"]}
    assert torch.equal(other(inputs).logits, plain(inputs).logits)


def test_vector_encoder_gives_one_token():
    torch.manual_seed(0)
    model = FusionModel({"image": nn.Linear(2, DIM)}, Concat(DIM), OUTPUTS)
    vectors = random_batch()["image"][:, 0]
    assert torch.equal(model({"image": vectors}).features, model.encoders["image"](vectors))


def test_sample_and_token_masks():
    model, inputs = build_model().eval(), random_batch()
    tokens = torch.rand(BATCH, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    frames = torch.arange(11).expand(BATCH, -1) < 7
    output = model(inputs | {"mask": {"image": tokens, "audio": frames}})
    assert torch.equal(output.tokens["image"].mask, tokens)
    # This encoder takes a mask itself, and its class token is never padding.
    assert torch.equal(output.tokens["audio"].mask, torch.cat([torch.ones(BATCH, 1).bool(), frames], dim=1))
    inputs["audio"][:, 7:] = 1e3
    inputs["image"][~tokens] = 1e3
    changed = model(inputs | {"mask": {"image": tokens.long(), "audio": frames.float()}})
    torch.testing.assert_close(changed.logits, output.logits, **TOL[torch.float32])


def test_missing_modality_of_a_sample_equals_missing_in_the_batch():
    model, inputs = build_model().eval(), random_batch()
    full, without = model(inputs), model(inputs | {"image": None})
    present = torch.tensor([True, False, True, True, False])
    mixed = model(inputs | {"mask": {"image": present}})
    torch.testing.assert_close(mixed.logits[present], full.logits[present], **TOL[torch.float32])
    torch.testing.assert_close(mixed.logits[~present], without.logits[~present], **TOL[torch.float32])
    assert not without.share[..., 1].any()
    assert not mixed.share[~present][..., 1].any()


def test_sample_mask_is_combined_with_encoder_mask():
    class Masked(nn.Linear):
        def forward(self, input):
            return Tokens(super().forward(input), mask=torch.tensor([[True, False, True]]).expand(len(input), -1))

    model = FusionModel({"image": Masked(2, DIM)}, Concat(DIM), OUTPUTS)
    present = torch.tensor([True, False, True, True, True])
    output = model({"image": random_batch()["image"], "mask": {"image": present}})
    assert output.tokens["image"].mask.tolist() == [[bool(p), False, bool(p)] for p in present]


def test_extra_keys_and_key_order_do_not_matter():
    model, inputs = build_model().eval(), random_batch()
    shuffled = {"target": torch.zeros(BATCH), "image": inputs["image"], "audio": inputs["audio"]}
    assert torch.equal(model(shuffled).logits, model(inputs).logits)


def test_saving_copying_and_accumulating():
    model, inputs, expected = build_model(unimodal="train"), random_batch(), random_target("classification")
    other = build_model(unimodal="train", seed=1)
    assert not torch.equal(other(inputs).logits, model(inputs).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs).logits, model(inputs).logits)
    assert torch.equal(copy.deepcopy(model)(inputs).logits, model(inputs).logits)

    model.double(), other.double()
    doubles = {name: value.double() for name, value in inputs.items()}
    output = model(doubles)
    (model.loss(output.logits, expected) + model.unimodal_loss(output, expected)).backward()
    for i in range(BATCH):
        piece = other({name: value[i : i + 1] for name, value in doubles.items()})
        loss = other.loss(piece.logits, expected[i : i + 1]) + other.unimodal_loss(piece, expected[i : i + 1])
        (loss / BATCH).backward()
    for full, summed in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(summed.grad, full.grad, **TOL[torch.float64])


def test_constructor_errors():
    encoders = {"image": nn.Linear(2, DIM)}
    for call, message in [
        (
            lambda: FusionModel({}, Concat(DIM), 2),
            r"FusionModel: expected at least one encoder and a Fusion, got 0 encoders and Concat",
        ),
        (lambda: FusionModel(encoders, nn.Linear(2, 2), 2), r"got 1 encoders and Linear"),
        (lambda: FusionModel(encoders, Concat(DIM), 2, task="ranking"), r"got task='ranking', unimodal='probe'"),
        (
            lambda: FusionModel(encoders, Concat(DIM), 2, unimodal="both"),
            r"expected task .* and unimodal probe, train, ensemble or none",
        ),
        (lambda: FusionModel(encoders, Unimodal(DIM, modality="imagge"), 2), r"Did you mean 'image'"),
        (
            lambda: FusionModel(encoders, Concat(DIM).build(("audio",)), 2),
            r"Concat: expected the modalities it was built for",
        ),
        (
            lambda: FusionModel({"mask": nn.Linear(2, DIM)}, Concat(DIM), 2),
            r"FusionModel: expected modality names .* got 'mask'",
        ),
        (lambda: FusionModel({"a.b": nn.Linear(2, DIM)}, Concat(DIM), 2), r"without dots .* got 'a\.b'"),
        (lambda: FusionModel({"keys": nn.Linear(2, DIM)}, Concat(DIM), 2), r"got 'keys'\. Rename the modality"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": ...},
            r"FusionModel 'image': expected a batch with audio, image, got a batch with audio\. Set batch\['im",
        ),
        ({"image": None, "audio": None}, r"FusionModel: expected at least one modality in the batch, got None for all"),
        (
            {"mask": {"image": torch.ones(BATCH, 2)}},
            r"mask of 'image': expected \(batch,\) or \(batch, token\) = \(5, 3\), got shape \(5, 2\)",
        ),
        ({"mask": {"image": torch.ones(3)}}, r"mask of 'image': .*got shape \(3, 3\)"),
        ({"mask": {"image": torch.ones(BATCH, 3, 1)}}, r"mask of 'image': .*got shape \(5, 3, 1\)"),
        (
            {"mask": {"audio": torch.ones(BATCH, 7)}},
            r"SequenceEncoder mask: expected \(batch, frame\) = \(5, 11\).*got shape \(5, 7\)",
        ),
        ({"audio": torch.zeros(BATCH, 11, 2)}, r"SequenceEncoder: expected .*feature = 7\), got shape \(5, 11, 2\)"),
        ({"image": torch.zeros(3, 3, 2)}, r"'image': expected batch = 5 as 'audio' has, got 3"),
        (
            {"image": torch.zeros(BATCH, 3, 5, 2)},
            r"encoder 'image': expected Tokens or a float tensor .* got shape \(5, 3, 5, 14\)",
        ),
    ],
)
def test_batch_errors(change, message):
    inputs = {name: value for name, value in (random_batch() | change).items() if value is not ...}
    with pytest.raises(ShapeError, match=message):
        build_model()(inputs)


def test_width_and_target_errors():
    model = FusionModel({"image": nn.Linear(2, 7)}, Concat(DIM), OUTPUTS)
    with pytest.raises(ShapeError, match=r"encoder 'image': .*width dim = 14, got width 7.*torch\.nn\.Linear\(7, 14\)"):
        model({"image": random_batch()["image"]})
    with pytest.raises(
        ShapeError, match=r"FusionModel\.loss: expected a target of shape .* = \(5, 3\), got shape \(3, 5\)"
    ):
        build_model(task="regression").loss(torch.zeros(BATCH, OUTPUTS), torch.zeros(OUTPUTS, BATCH))


@pytest.mark.parametrize(
    ("logits", "expected", "message"),
    [
        (torch.zeros(BATCH, OUTPUTS), torch.zeros(BATCH, 1).long(), r"target of class indices .* a target \(5, 1\)"),
        (torch.zeros(BATCH, OUTPUTS), torch.zeros(3).long(), r"got logits \(5, 3\) and a target \(3,\)"),
        (torch.zeros(OUTPUTS), torch.tensor(1), r"expected logits \(batch, output\) .* got logits \(3,\)"),
        (torch.zeros(BATCH, OUTPUTS), torch.zeros(BATCH), r"torch\.float32\. Convert one-hot rows with target\.argmax"),
        (torch.zeros(BATCH, OUTPUTS), torch.zeros(BATCH).bool(), r"of torch\.bool"),
        (
            torch.zeros(2, OUTPUTS),
            torch.tensor([1, 3]),
            r"class indices from 0 to num_outputs - 1 = 2, got .* 1 to 3\.",
        ),
        (torch.zeros(2, OUTPUTS), torch.tensor([-1, 0]), r"got indices from -1 to 0\. Number classes from 0"),
    ],
)
def test_class_index_errors(logits, expected, message):
    with pytest.raises(ShapeError, match=r"FusionModel\.loss: .*" + message):
        build_model().loss(logits, expected)


def test_integer_dtypes_of_class_indices():
    logits = torch.randn(BATCH, OUTPUTS, generator=torch.Generator().manual_seed(0))
    expected = random_target("classification")
    losses = [build_model().loss(logits, expected.to(dtype)) for dtype in (torch.int64, torch.int32, torch.uint8)]
    assert losses[0] == losses[1] == losses[2]
    assert build_model().loss(logits[:0], expected[:0]).isnan()


def test_non_dict_batch_and_mask_errors():
    model, inputs = build_model(), random_batch()
    with pytest.raises(ShapeError, match=r"expected a batch as a dict: .*, got Tensor\. Call model\(\{'audio': "):
        model(inputs["audio"])
    with pytest.raises(ShapeError, match=r"FusionModel mask: expected a dict.*, got Tensor\. Set batch\['mask'\] = "):
        model(inputs | {"mask": torch.ones(BATCH, dtype=torch.bool)})
    with pytest.raises(
        ConfigError, match=r"FusionModel mask: expected a known modality, got 'imag'\. Did you mean 'im"
    ):
        model(inputs | {"mask": {"imag": torch.ones(BATCH)}})
    with pytest.raises(ShapeError, match=r"mask of 'image': expected a tensor \(batch,\) or .*, got list"):
        model(inputs | {"mask": {"image": [True] * BATCH}})


def test_times_are_passed_to_encoders_that_accept_them():
    class Timed(nn.Module):
        def forward(self, values, times=None):
            return Tokens(values, times=times)

    model = FusionModel({"audio": Timed(), "image": nn.Identity()}, JointAttention(8), num_outputs=2)
    times = torch.tensor([[0.0, 0.5, 1.5]])
    tokens = model.encode({"audio": torch.zeros(1, 3, 8), "image": torch.zeros(1, 2, 8), "times": {"audio": times}})
    assert torch.equal(tokens["audio"].times, times)
    assert tokens["image"].times is None
