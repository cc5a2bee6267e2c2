"""``eq.watch`` on compiled models: equal shares, and errors for models whose attention cannot be intercepted."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import equipoise as eq
from equipoise.errors import ConfigError

LABELS = torch.tensor([0, 0, 1, 1, -1])
NAMES = ("a", "b")


class CustomAttention(nn.Module):
    """Attention with torch's function, or with an explicit matrix."""

    def __init__(self, written=False):
        super().__init__()
        self.project, self.written = nn.Linear(6, 18), written

    def forward(self, tokens):
        query, key, value = self.project(tokens).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        if self.written:
            result = (query @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        else:
            result = F.scaled_dot_product_attention(query, key, value)
        return result.transpose(1, 2).flatten(2)


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(6, 6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.written = CustomAttention(), CustomAttention(written=True)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 7, batch_first=True)

    def forward(self, tokens):
        return self.encoder(self.written(self.own(tokens)))


def compile_with_torch_compile(model):
    return torch.compile(model, backend="eager")


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_submodule(model):
    model.own = torch.compile(model.own, backend="eager")
    return model


def forward_of_a_part(model):
    model.written.forward = torch.compile(model.written.forward, backend="eager")
    model.encoder.self_attn.forward = torch.compile(model.encoder.self_attn.forward, backend="eager")
    return model


def compile_of_a_part(model):
    model.encoder.compile(backend="eager")
    model.own.compile(backend="aot_eager")
    return model


COMPILED = (
    compile_with_torch_compile,
    compile_forward,
    compile_in_place,
    compile_submodule,
    forward_of_a_part,
    compile_of_a_part,
)


@pytest.fixture(autouse=True)
def ignore_warnings():
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*torch.jit.*", ".*generation flags.*"):
            warnings.filterwarnings("ignore", message=text)
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_model", COMPILED)
@pytest.mark.parametrize("ran", [False, True])
def test_compiled_models(compile_model, ran):
    torch.manual_seed(0)
    model = Model().eval()
    tokens = torch.randn(3, 5, 6)
    with torch.no_grad():
        with eq.watch(model, modality=LABELS, names=NAMES) as plain:
            expected = model(tokens)
        compiled = compile_model(copy.deepcopy(model))
        before = compiled(tokens) if ran else expected
        with eq.watch(compiled, modality=LABELS, names=NAMES) as record:
            inside = compiled(tokens)
        after = compiled(tokens)
    assert record.layers == plain.layers == ["own", "written", "encoder.self_attn"]
    for layer in plain.layers:
        torch.testing.assert_close(record.share(layer), plain.share(layer))
    assert not record.missing
    for output in (before, inside, after):
        torch.testing.assert_close(output, expected)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_code_is_reused():
    counter = torch._dynamo.testing.CompileCounter()
    result = torch.compile(Model().eval(), backend=counter)
    tokens = torch.randn(3, 5, 6)
    with torch.no_grad():
        result(tokens)
        count = counter.frame_count
        with pytest.raises(KeyError), eq.watch(result, modality=LABELS):
            {}[result(tokens)]
        result(tokens)
    assert counter.frame_count == count > 0


def test_compilation_inside_the_context():
    model = Model().eval()
    with torch.no_grad(), eq.watch(model, modality=LABELS) as record:
        torch.compile(model, backend="eager")(torch.randn(3, 5, 6))
    assert len(record.layers) == 3


def test_compiler_stance_is_restored():
    model = Model().eval()
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad(), eq.watch(model, modality=LABELS), eq.watch(model, modality=LABELS):
            model(torch.randn(3, 5, 6))
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"


def exported():
    return torch.export.export(CustomAttention(written=True), (torch.randn(3, 5, 6),)).module()


def forward_traced():
    model = Model()
    model.own.forward = torch.jit.trace(Linear().forward, (torch.randn(3, 5, 6),))
    return model


def parallel():
    layer = nn.DataParallel(CustomAttention())
    layer.device_ids = [0, 1]
    return layer


@pytest.mark.parametrize(("make", "message"), [
    (exported, "got an exported graph of operators. Watch the model that was exported"),
    (lambda: nn.Sequential(exported()), "got '0', an exported graph"),
    (lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 3))), "got a scripted one. Watch the model that was scripted"),
    (lambda: nn.Sequential(torch.jit.trace(Linear(), torch.randn(3, 5, 6))), "got '0', a scripted one"),
    (forward_traced, "got 'own.forward', a scripted one"),
    (parallel, "got nn.DataParallel over several devices, .*Watch the model inside: .module"),
])  # fmt: skip
def test_unreachable_attention_raises(make, message):
    with pytest.raises(ConfigError, match=message), eq.watch(make(), modality=LABELS):
        pytest.fail("watched")


@pytest.mark.parametrize("part", ["model", "model.language_model", "model.language_model.layers.1"])
@pytest.mark.parametrize("how", ["forward", "compile"])
def test_parts_of_a_vision_language_model(part, how):
    family = pytest.importorskip("small_vlms").family
    model, inputs = family("llava")
    with torch.no_grad(), eq.watch(model) as plain:
        model(**inputs)
    inner = model.get_submodule(part)
    if how == "forward":
        inner.forward = torch.compile(inner.forward, backend="eager")
    else:
        inner.compile(backend="eager")
    with torch.no_grad(), eq.watch(model) as record:
        model(**inputs)
    assert record.layers == plain.layers
    for layer in plain.layers:
        assert torch.equal(record.share(layer), plain.share(layer))
    with eq.watch(torch.compile(model, backend="eager"), queries="last") as full:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert full.layers == plain.layers
