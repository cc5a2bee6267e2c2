"""eq.adapt: the call of a foreign model stays, and balancers and diagnostics get what they need."""

import copy
import inspect

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise import balance
from equipoise.errors import ConfigError, ShapeError
from helpers import vlms
from helpers.own_models import NAMES, EncoderNet, MultiheadNet, TwoTowers, batch

ENCODERS = {"audio": "audio", "image": "image"}


def adapted_multihead(**options):
    torch.manual_seed(0)
    return eq.adapt(MultiheadNet(), encoders=ENCODERS, **options)


def adapted_encoder_net(**options):
    torch.manual_seed(0)
    return eq.adapt(EncoderNet(), encoders={"audio": "wave", "image": "pixels"}, **options)


def adapted_towers(**options):
    torch.manual_seed(0)
    model = TwoTowers()
    return eq.adapt(model, encoders=dict(model.towers), **options)


MODELS = {"multihead": adapted_multihead, "encoder": adapted_encoder_net, "towers": adapted_towers}


def test_adapted_calls_and_outputs_are_unchanged():
    data = batch()
    audio, image = data["audio"], data["image"]
    for adapted, args, kwargs in (
        (adapted_multihead(), (), {"audio": audio, "image": image}),
        (adapted_multihead(), (audio, image), {}),
        (adapted_multihead(), (audio,), {"image": image}),
        (adapted_encoder_net(), (audio, image), {}),
        (adapted_encoder_net(), (audio,), {"y": image}),
        (adapted_towers(), (data,), {}),
    ):
        expected, result = adapted.model(*args, **kwargs), adapted(*args, **kwargs)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        output = adapted.output_of(result)
        logits = (
            expected["logits"]
            if isinstance(expected, dict)
            else expected[0]
            if isinstance(expected, tuple)
            else expected
        )
        assert torch.equal(output.logits, logits)
        assert set(output.tokens) == set(output.unimodal_logits) == set(NAMES)
        assert output.features.shape == (6, adapted.head.in_features)
        assert torch.equal(adapted.head(output.features), output.logits)
    assert torch.equal(adapted_encoder_net()(data)[0], adapted_encoder_net()(audio, image)[0])
    assert torch.equal(adapted_multihead()(data), adapted_multihead()(audio, image))


def test_original_model_is_not_modified():
    model = MultiheadNet()
    keys, data = list(model.state_dict()), batch()
    adapted = eq.adapt(model, encoders=ENCODERS)
    adapted(data)
    assert list(model.state_dict()) == keys
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()
    )
    assert {name.removeprefix("model.") for name in adapted.state_dict()} >= set(keys)


def test_rng_use_is_unchanged():
    torch.manual_seed(3)
    model = MultiheadNet()
    expected = torch.rand(2)
    for example in (None, batch()):
        torch.manual_seed(3)
        model = MultiheadNet()
        eq.adapt(model, encoders=ENCODERS, example=example)(batch())
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", MODELS)
def test_encode_and_fuse_equal_the_forward_pass(name):
    adapted, data = MODELS[name](), batch()
    adapted(data)
    output = adapted.output_of(adapted(data))
    tokens = adapted.encode(data)
    again = adapted.fuse(tokens)
    torch.testing.assert_close(again.logits, output.logits)
    for part in NAMES:
        assert torch.equal(tokens[part].values, output.tokens[part].values)
    without = adapted.fuse(eq.diagnostics.modality_ablation.remove_modality(tokens, ["audio"]))
    noisy = {**data, "audio": torch.randn(6, 4, 5)}
    tokens = adapted.encode(noisy)
    other = adapted.fuse(eq.diagnostics.modality_ablation.remove_modality(tokens, ["audio"]))
    torch.testing.assert_close(without.logits, other.logits)
    assert not torch.allclose(without.logits, output.logits)


def test_key_labels_are_inferred():
    data = batch()
    labels = adapted_multihead().key_labels(data)
    assert {count: part.tolist() for count, part in labels.items()} == {8: [-1, 0, 0, 0, 0, 1, 1, 1]}
    labels = adapted_encoder_net().key_labels(data)
    assert {count: part.tolist() for count, part in labels.items()} == {7: [1, 1, 1, 0, 0, 0, 0]}
    assert adapted_towers().key_labels(data) == {}


@pytest.mark.parametrize("training", [True, False])
def test_watch_attributes_the_keys_of_an_adapted_model(training):
    adapted, data = adapted_encoder_net(), batch()
    adapted.train(training)
    with eq.watch(adapted) as record:
        adapted(data)
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0])
    with eq.watch(adapted.model, modality=labels, names=NAMES) as direct:
        adapted.model(data["audio"], data["image"])
    assert [name.removeprefix("model.") for name in record.layers] == direct.layers
    for mine, other in zip(record.layers, direct.layers, strict=True):
        torch.testing.assert_close(record.share(mine), direct.share(other))


def balancer_names():
    skipped = ("Balancer", "RollingQ", "ProgressiveRollingQ")
    classes = {name: part for name, part in vars(balance).items() if inspect.isclass(part) and name not in skipped}
    return [name for name, part in sorted(classes.items()) if issubclass(part, balance.Balancer)]


REFUSED = {
    "multihead": {
        "AMCo": "logits that are a sum over modalities",
        "Greedy": "a fusion of equipoise, which a method can wrap",
        "MLA": "a linear head on the concatenated pooled tokens",
        "MMCosine": "a linear head on the concatenated pooled tokens",
        "QMF": "a linear head on the concatenated pooled tokens",
        "ReconBoost": "a linear head on the concatenated pooled tokens",
        "TMC": "a linear head on the concatenated pooled tokens",
    },
    "towers": {"Greedy": "a fusion of equipoise, which a method can wrap"},
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("method", balancer_names())
def test_every_balancer_trains_or_raises_with_reason(method, kind):
    data = batch()
    adapted = MODELS[kind](unimodal="train", example=data)
    options = {"teachers": {n: copy.deepcopy(e) for n, e in adapted.encoders.items()}} if method == "UMT" else {}

    def train():
        balancing = eq.BalancerList(adapted, [getattr(balance, method)(adapted, **options)])
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
        balancing.attach_optimizer(optimizer)
        for _ in range(2):
            for _ in range(balancing.steps_per_batch):
                optimizer.zero_grad()
                balancing.loss(adapted(data), data["target"]).backward()
                balancing.before_step()
                optimizer.step()
            if balancing.reviews:
                balancing.review([data], [data])
            balancing.end_epoch()

    if method in REFUSED[kind]:
        with pytest.raises(ConfigError, match=REFUSED[kind][method]):
            train()
    else:
        before = copy.deepcopy(adapted.state_dict())
        train()
        assert any(
            not torch.equal(value, before[name]) for name, value in adapted.state_dict().items() if name in before
        )


def test_balancers_equal_those_of_a_fusion_model():
    """The same weights as a FusionModel with Concat: OGM changes gradients alike."""
    torch.manual_seed(0)
    encoders = {"audio": nn.Linear(5, 8), "image": nn.Linear(7, 8)}
    own = eq.FusionModel(encoders, eq.fusion.Concat(8), 3, unimodal="none")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.i, self.out = (
                copy.deepcopy(part) for part in (encoders["audio"], encoders["image"], own.head)
            )

        def forward(self, audio, image):
            return self.out(torch.cat([self.a(audio).mean(1), self.i(image).mean(1)], dim=1))

    if not isinstance(own.head, nn.Linear):
        pytest.skip("the head of Concat is not linear")
    adapted = eq.adapt(Net(), encoders={"audio": "a", "image": "i"}, heads=False)
    data, gradients = batch(), []
    for model in (own, adapted):
        balancing = eq.BalancerList(model, [eq.balance.OGM(model, alpha=0.5)])
        balancing.loss(model(data), data["target"]).backward()
        balancing.before_step()
        gradients.append([p.grad for name in NAMES for p in model.encoders[name].parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_outputs_of_several_passes():
    adapted = adapted_multihead()
    results = [adapted(batch(seed)) for seed in range(3)]
    outputs = [adapted.output_of(result) for result in results]
    for seed, output in enumerate(outputs):
        assert torch.equal(output.tokens["audio"].values, adapted.model.audio(batch(seed)["audio"]))
    with pytest.raises(ConfigError, match="the value that the adapted model returned"):
        adapted.output_of(adapted.model(**{name: batch()[name] for name in NAMES}))


def test_copies_are_independent():
    adapted, data = adapted_multihead(), batch()
    adapted(data)
    with eq.watch(adapted):
        adapted(data)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(data), adapted(data))
    assert torch.equal(twin.output_of(twin(data)).features, adapted.output_of(adapted(data)).features)
    twin.load_state_dict(adapted.state_dict())


def test_custom_losses_and_heads():
    data = batch()
    adapted = adapted_multihead(
        loss=lambda logits, target: nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    )
    output = adapted.output_of(adapted(data))
    expected = nn.functional.cross_entropy(output.logits, data["target"], label_smoothing=0.1)
    torch.testing.assert_close(adapted.loss(output.logits, data["target"]), expected)
    torch.testing.assert_close(adapted.sample_losses(output.logits, data["target"]).mean(), expected)
    balancing = eq.BalancerList(adapted)
    total = balancing.loss(adapted(data), data["target"], task_loss=torch.tensor(5.0))
    torch.testing.assert_close(total - 5.0, adapted.unimodal_loss(output, data["target"]))
    heads = adapted_multihead(heads={name: nn.Linear(8, 3) for name in NAMES}, unimodal="train")
    output = heads.output_of(heads(data))
    torch.testing.assert_close(
        output.unimodal_logits["audio"], heads.unimodal_heads["audio"](output.tokens["audio"].pooled())
    )


def test_missing_modalities_of_samples_are_masked():
    adapted, data = adapted_multihead(), batch()
    mask = torch.tensor([True, False, True, True, True, True])
    output = adapted.output_of(adapted({**data, "mask": {"audio": mask}}))
    assert torch.equal(output.tokens["audio"].present(), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoders": {}}, r"encoders=\{modality: module\}, got MultiheadNet and encoders = \{\}.*watch and RollingQ "
                           r"work"),
        ({"encoders": {"audio": "audoi", "image": "image"}}, r"encoder 'audio': expected a known module, got "
                                                             r"'audoi'\. Did"),
        ({"encoders": {"audio": nn.Linear(2, 2)}}, r"a module inside MultiheadNet, or its dotted name, got Linear"),
        ({"encoders": {"audio": "audio", "image": "audio"}}, r"a separate encoder for each modality"),
        ({"encoders": {"mask": "audio"}}, r"modality names without dots that are not reserved, got 'mask'"),
        ({"encoders": {"sound": "audio", "image": "image", "text": "norm"}}, r"a forward with arguments for sound, "
                                                                             r"image, text"),
        ({"names": ("audio",)}, r"an order of audio, image"),
        ({"heads": {"audio": "norm"}}, r"a head for each of audio, image"),
        ({"head": "norm"}, r"a known number of outputs.*OGM, PMR, MMPareto"),
        ({"inputs": {"sound": "audio"}}, r"names of audio, image, got 'sound'"),
        ({"unimodal": "ensemble"}, r"unimodal = 'probe' or 'train'"),
    ],
)  # fmt: skip
def test_missing_parts_raise_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        eq.adapt(MultiheadNet(), **{"encoders": ENCODERS, **options})


def test_skipped_encoder_raises():
    model = MultiheadNet()
    model.unused = nn.Linear(5, 8)
    with pytest.raises(ConfigError, match="a forward pass through the encoder 'unused' of 'audio'"):
        eq.adapt(model, encoders={"audio": "unused", "image": "image"}, example=batch())


def test_model_without_head():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.i = nn.Linear(5, 3), nn.Linear(7, 3)

        def forward(self, audio, image):
            return self.a(audio).mean(1) + self.i(image).mean(1)

    with pytest.raises(
        ConfigError, match="a final head, whose input are the features, got Pooled without a linear layer"
    ):
        eq.adapt(Pooled(), encoders={"audio": "a", "image": "i"})
    adapted, data = eq.adapt(Pooled(), encoders={"audio": "a", "image": "i"}, head=False, num_outputs=3), batch()
    balancing = eq.BalancerList(adapted, [eq.balance.OGM(adapted)])
    balancing.loss(adapted(data), data["target"]).backward()
    balancing.before_step()


def test_encoders_must_return_tokens_of_the_batch():
    class Transposed(MultiheadNet):
        def forward(self, audio, image):
            return super().forward(audio, image)

    model = Transposed()
    model.audio = nn.Sequential(nn.Linear(5, 8), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 4)))
    eq.adapt(model, encoders=ENCODERS, example=batch())
    with pytest.raises(ShapeError, match="encoder 'audio': expected tokens with the batch of 6 samples first"):
        eq.adapt(model, encoders={"audio": "audio.1", "image": "image"}, example=batch())


def test_modules_without_adapt_raise_with_fix():
    model = MultiheadNet()
    for build in (eq.balance.OGM, eq.balance.MMPareto, eq.balance.ModalityCorruption, eq.BalancerList):
        with pytest.raises(ConfigError, match=r"got MultiheadNet without names.*eq\.adapt\(model, encoders="):
            build(model)
    with pytest.raises(ConfigError, match=r"eq\.adapt\(model, encoders="):
        eq.diagnostics.noise_response(model, [batch()])
    with pytest.raises(ConfigError, match="noise_response: expected"):
        eq.diagnostics.noise_response(adapted_towers(), [batch()])


def test_loader_tuples_and_other_keys():
    data = batch()
    adapted = adapted_encoder_net(example=(data["audio"], data["image"], data["target"]))
    loader = [(data["audio"], data["image"], data["target"])]
    expected = eq.diagnose(adapted, [data], tests=["score", "response"]).metrics
    assert eq.diagnose(adapted, loader, tests=["score", "response"]).metrics == expected
    assert (
        eq.diagnose(adapted, [((data["audio"], data["image"]), data["target"])], tests=["score"]).metrics["accuracy"]
        == (expected["accuracy"])
    )
    renamed = eq.adapt(
        adapted.model, encoders={"audio": "wave", "image": "pixels"}, inputs={"audio": "x", "image": "y"}
    )
    assert (
        eq.diagnose(
            renamed, [{"x": data["audio"], "y": data["image"], "labels": data["target"]}], tests=["score"]
        ).metrics["accuracy"]
        == (expected["accuracy"])
    )
    with pytest.raises(ShapeError, match=r"a dict, or a tuple \(audio, image, target\), got 4 parts"):
        eq.diagnose(adapted, [(*loader[0], data["audio"])])
    function = eq.adapt(
        adapted.model, encoders={"audio": "wave", "image": "pixels"}, inputs=lambda b: (b["audio"], b["image"])
    )
    assert torch.equal(function(data)[0], adapted(data)[0])


def test_full_diagnosis():
    data = [batch(seed) for seed in range(2)]
    result = eq.diagnose(adapted_encoder_net(), data)
    assert set(result.skipped) == {"ood", "collapse"}
    assert result.name == "encodernet"
    assert result.details["attention"]["layers"][0]["site"] == "model.fusion.layers.0.self_attn"


def test_vision_language_model_labels():
    model, inputs = vlms.llava()
    adapted = eq.adapt(
        model, encoders={"image": "model.multi_modal_projector", "text": "model.language_model.embed_tokens"},
        inputs={"image": "pixel_values", "text": "input_ids"}, logits=lambda result: result.logits[:, -1], heads=False,
    ).eval()  # fmt: skip
    with eq.watch(adapted) as record:
        adapted(**inputs)
    with eq.watch(model) as native:
        model(**inputs)
    result = {name.removeprefix("model."): record.share(name) for name in record.layers}
    assert list(result) == native.layers
    order = [native.names.index(name) for name in adapted.names]
    for name, share in result.items():
        torch.testing.assert_close(share, native.share(name)[..., order])
