"""MODA in Hugging Face models: identity at initialization, causality, decoding, files, LoRA, removal, errors."""

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError, SchemaError
from equipoise.nn.attention.pseudo_attention import PseudoAttention
from helpers.tolerance import TOL

pytest.importorskip("transformers")
from helpers.vlms import family  # isort: skip

SINGLE = TOL[torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
LABELS = torch.tensor([-1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def unpadded_family(name):
    """Returns a tiny model and inputs without padding, so that positions in a forward pass and in decoding are
    equal.
    """
    model, inputs = family(name)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return model, inputs


def apply_trained_moda(model, **options):
    moda = eq.hf.apply_moda(model, **options)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moda.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=random))
    return moda


def moda_parameter_names(moda):
    """Returns the names of MODA's parameters in the model."""
    return {f"{path}.moda.{name}" for path, layer in moda.layers.items() for name, _ in layer.named_parameters()}


def hooks(model):
    """Returns the forward hooks; some models register hooks themselves."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def eval_logits(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more).logits


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "gemma3", "blip2", "qwen2_audio"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_untrained_moda_is_the_identity_and_can_be_removed(name, backend):
    model, inputs = family(name)
    model.set_attn_implementation(backend)
    before, state, others = eval_logits(model, inputs), set(model.state_dict()), hooks(model)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    moda = eq.hf.apply_moda(model)
    assert torch.equal(eval_logits(model, inputs), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == moda_parameter_names(moda)
    with torch.no_grad():
        for parameter in moda.parameters():
            parameter.add_(0.5)
    assert not torch.equal(eval_logits(model, inputs), before)
    moda.remove()
    assert torch.equal(eval_logits(model, inputs), before)
    assert set(model.state_dict()) == state
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert hooks(model) == others


# The merges do not depend on the family, so one family is enough.
DECODERS = [(name, {}) for name in ("llava", "qwen2_vl", "gemma3", "idefics3", "llama")]
DECODERS += [("llava", {"merge": "gate"}), ("llava", {"pseudo": PseudoAttention(reference=40)})]


@pytest.mark.parametrize("scope", ["prefix", "causal"])
@pytest.mark.parametrize(("name", "how"), DECODERS)
def test_decoding_equals_one_pass(name, scope, how):
    model, inputs = unpadded_family(name)
    given = {"modality": LABELS, "names": ("text", "image")} if name == "llama" else {}
    moda = apply_trained_moda(model, basis_scope=scope, **given, **how)
    steps = model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    longer = inputs | {"input_ids": steps.sequences, "attention_mask": torch.ones_like(steps.sequences)}
    for types in ("mm_token_type_ids", "token_type_ids"):
        if types in inputs:
            longer[types] = torch.nn.functional.pad(inputs[types], (0, 5))
    if given:
        moda.modality = torch.nn.functional.pad(LABELS, (0, 5))
    once = eval_logits(model, longer)[:, -6:-1]
    torch.testing.assert_close(torch.stack(steps.logits, 1), once, **SINGLE)


@pytest.mark.parametrize("scope", ["prefix", "causal"])
def test_beam_search_reorders_the_cache(scope):
    model, inputs = unpadded_family("llava")
    apply_trained_moda(model, basis_scope=scope)
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False,
             "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    cached, uncached = (model.generate(**inputs, **given, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **SINGLE)


@pytest.mark.parametrize(("scope", "first"), [("causal", 1), ("prefix", 8), ("all", None)])
@pytest.mark.parametrize("name", ["llava", "llama"])
def test_no_information_from_later_tokens(name, scope, first):
    model, inputs = unpadded_family(name)
    given = {"modality": LABELS, "names": ("text", "image")} if name == "llama" else {}
    apply_trained_moda(model, basis_scope=scope, **given)
    before = eval_logits(model, inputs)
    for index in range(first or 12, 13):
        if inputs["input_ids"][0, index] >= 80:
            continue
        other = inputs["input_ids"].clone()
        other[:, index] = (other[:, index] + 1) % 80
        after = eval_logits(model, {**inputs, "input_ids": other})
        assert torch.equal(after[:, :index], before[:, :index]) == (scope != "all")
        assert not torch.equal(after[:, index:], before[:, index:])


def test_prompt_length_sets_the_prefix():
    model, inputs = unpadded_family("llava")
    apply_trained_moda(model, prefix="prompt")
    labels = inputs["input_ids"].clone()
    labels[:, :11] = -100
    before = eval_logits(model, inputs, labels=labels)
    last = inputs["input_ids"].clone()
    last[:, 11] = (last[:, 11] + 1) % 80
    assert torch.equal(eval_logits(model, {**inputs, "input_ids": last}, labels=labels)[:, :11], before[:, :11])
    last[:, 10] = (last[:, 10] + 1) % 80
    assert not torch.equal(eval_logits(model, {**inputs, "input_ids": last}, labels=labels)[:, :10], before[:, :10])


def test_files_contain_only_moda(tmp_path):
    model, inputs = unpadded_family("llava")
    moda = apply_trained_moda(model)
    moda.save(tmp_path / "moda.safetensors")
    before = eval_logits(model, inputs)
    other, _ = family("llava")
    fresh = eq.hf.apply_moda(other)
    assert not torch.equal(eval_logits(other, inputs), before)
    fresh.load(tmp_path / "moda.safetensors")
    assert torch.equal(eval_logits(other, inputs), before)
    fresh.remove()
    with pytest.raises(SchemaError, match=r"expected MODA with .*'basis': 'covariance'.*got .*'basis': 'gram'"):
        eq.hf.apply_moda(other, basis="covariance").load(tmp_path / "moda.safetensors")
    more, _ = family("idefics3")
    moda = eq.hf.apply_moda(more)
    with pytest.raises(SchemaError, match=r"expected the 2 tensors of this model, got others, such as model\.language"):
        moda.load(tmp_path / "moda.safetensors")


def test_only_moda_is_trained_with_gradient_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        model, inputs = unpadded_family("llava")
        moda = apply_trained_moda(model)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"].clamp(max=79), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in moda.parameters()])
        assert all(p.grad is None for n, p in model.named_parameters() if n not in moda_parameter_names(moda))
    for plain, again in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(again, plain, **SINGLE)


@pytest.mark.parametrize("first", ["moda", "lora"])
def test_lora(first):
    peft = pytest.importorskip("peft")
    model, inputs = unpadded_family("llava")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["moda"] if first == "moda" else None)
    if first == "moda":
        apply_trained_moda(model)
        before = eval_logits(model, inputs)
        model = peft.get_peft_model(model, config)
        assert torch.equal(eval_logits(model, inputs), before)
    else:
        model = peft.get_peft_model(model, config)
        apply_trained_moda(model)
    model(**inputs, labels=inputs["input_ids"].clamp(max=79)).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in name for name in learning)
    assert any(".moda." in name for name in learning)
    assert all("lora_" in name or ".moda." in name for name in learning)


def test_watch_records_aligned_keys():
    model, inputs = unpadded_family("llava")
    with eq.watch(model) as before:
        eval_logits(model, inputs)
    moda = apply_trained_moda(model)
    with eq.watch(model) as after:
        eval_logits(model, inputs)
    site = next(site for site in after.layers if "language" in str(site))
    assert not torch.equal(after.share(site), before.share(site))
    moda.remove()
    with eq.watch(model) as again:
        eval_logits(model, inputs)
    assert torch.equal(again.share(site), before.share(site))


def test_labels_of_every_batch():
    model, inputs = unpadded_family("llama")
    moda = apply_trained_moda(model, modality=LABELS, names=("text", "image"))
    before = eval_logits(model, inputs)
    moda.modality = LABELS.flip(0)
    other = eval_logits(model, inputs)
    moda.modality = LABELS
    assert torch.equal(eval_logits(model, inputs), before)
    assert not torch.equal(other, before)


def test_interface_is_restored_after_an_error(monkeypatch):
    from transformers import AttentionInterface

    model, inputs = unpadded_family("llava")
    eq.hf.apply_moda(model)
    before = dict(AttentionInterface.__dict__)

    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.model.language_model.layers[1].self_attn.o_proj, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        model(**inputs)
    assert dict(AttentionInterface.__dict__) == before


@pytest.mark.parametrize("merge", ["gate", "sum", "concat"])
def test_other_merges_are_trainable(merge):
    model, inputs = family("llava")
    moda = apply_trained_moda(model, merge=merge, pseudo=PseudoAttention())
    model(**inputs, labels=inputs["input_ids"].clamp(max=79)).loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in moda.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: eq.hf.apply_moda(torch.nn.Linear(2, 2)), r"expected a Hugging Face model.*got Linear with 0"),
        (lambda m: eq.hf.apply_moda(family("whisper")[0]), r"attend to several modalities, got Whisper"),
        (lambda m: eq.hf.apply_moda(m, merge="mas"), r"expected a known merge, got 'mas'\. Did you mean 'mass'"),
        (lambda m: eq.hf.apply_moda(m, prefix="x"), r"expected a known prefix, got 'x'"),
        (lambda m: eq.hf.apply_moda(m, norm="x"), r"expected a known norm, got 'x'"),
        (lambda m: eq.hf.apply_moda(m, directions=("imag",)), r"got 'imag'\. Did you mean 'image'"),
        (lambda m: [eq.hf.apply_moda(m) for _ in range(2)], r"expected a model without MODA, got a model with MODA at"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call(family("llava")[0])


def test_tokens_of_unknown_modality():
    model, inputs = unpadded_family("llama")
    eq.hf.apply_moda(model, modality=LABELS[:5], names=("text", "image"))
    with pytest.raises(ConfigError, match=r"expected keys whose modality is known, got it has 13 keys, and modality"):
        model(**inputs)
