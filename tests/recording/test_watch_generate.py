"""``eq.watch`` with ``generate``, compared with an eager forward pass over each returned sequence."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.tolerance import TOL
from helpers.vlms import IMAGE, family

NEAR = TOL[torch.float32]
LAYER = "model.language_model.layers.1.self_attn"
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
STOPS = {"max_new_tokens": 8, "do_sample": False}
"""Stops at a token that the first sample generates early."""


@pytest.fixture(autouse=True)
def ignore_warnings():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*generation flags.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


def stop_word(model, inputs):
    """Returns a token that the first sample generates third, and no sample generates earlier."""
    result = model.generate(**inputs, **GREEDY)[:, -6:]
    return int(result[0, 2])


def lengths(written, options):
    """Returns the number of generated tokens of each returned sequence, including its last one."""
    stop, result = options.get("eos_token_id"), []
    for row in written.tolist():
        result.append(row.index(stop) + 1 if stop in row else len(row))
        assert not stop or stop in row or 0 not in row
    return result


def expected_shares(model, inputs, sequences, queries="last", **options):
    """Returns the mean share of the recorded queries, one returned sequence at a time."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    prompt = inputs["input_ids"].shape[1]
    result = []
    for row, length in enumerate(lengths(sequences[:, prompt:], options)):
        sample = row // (len(sequences) // len(inputs["input_ids"]))
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        tokens = sequences[row : row + 1, : prompt + length]
        mask = nn.functional.pad(own["attention_mask"], (0, length), value=1)
        labels = torch.zeros_like(tokens)
        labels[:, :prompt] = (own["input_ids"] == IMAGE).long()
        labels[mask == 0] = -1
        with torch.no_grad():
            output = model(**{**own, "input_ids": tokens, "attention_mask": mask}, output_attentions=True)
        attention = output.attentions[1][0]
        rows = torch.zeros(prompt + length, dtype=torch.bool)
        rows[0 if queries == "all" else prompt - 1 : prompt + length - 1] = True
        if queries in ("text", "image"):
            rows[:] = labels[0] == ("text", "image").index(queries)
            rows[-1] = False
        mean = attention[:, rows & (mask[0] == 1)].double().mean(dim=1)
        result.append(torch.stack([mean[:, labels[0] == modality].sum(dim=-1) for modality in (0, 1)], dim=-1))
    model.set_attn_implementation(backend)
    return torch.stack(result).float()


def assistant():
    torch.manual_seed(4)
    config = family("llava")[0].config.get_text_config()
    config.num_hidden_layers = 1
    return transformers.LlamaForCausalLM(config).eval()


CASES = {
    "plain": GREEDY,
    "stops": STOPS,
    "returned several times": {**GREEDY, "do_sample": True, "num_return_sequences": 3},
    "sampled until it stops": {**STOPS, "do_sample": True, "num_return_sequences": 2},
    "beams": {**GREEDY, "num_beams": 3},
    "beams returned": {**GREEDY, "num_beams": 4, "num_return_sequences": 2},
    "beams that stop": {**STOPS, "num_beams": 3, "num_return_sequences": 3},
    "beams that stop early": {**STOPS, "num_beams": 3, "early_stopping": True},
    "beams that are sampled": {**STOPS, "num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "chunks": {**GREEDY, "prefill_chunk_size": 4},
    "chunks with beams": {**GREEDY, "prefill_chunk_size": 5, "num_beams": 2},
    "no cache": {**GREEDY, "use_cache": False},
    "no cache and stops": {**STOPS, "use_cache": False},
    "no cache and beams": {**STOPS, "use_cache": False, "num_beams": 3, "num_return_sequences": 2},
    "static": {**STOPS, "cache_implementation": "static"},
    "static with beams": {**STOPS, "cache_implementation": "static", "num_beams": 2},
    "static in chunks": {**GREEDY, "cache_implementation": "static", "prefill_chunk_size": 4},
    "compiled by generate": {
        **GREEDY, "cache_implementation": "static", "compile_config": transformers.CompileConfig(backend="eager"),
    },
    "guided": {**GREEDY, "guidance_scale": 1.5},
    "a dictionary of beams": {**GREEDY, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True},
    "looked up": {**GREEDY, "prompt_lookup_num_tokens": 3},
    "looked up until it stops": {**STOPS, "prompt_lookup_num_tokens": 3},
    "assisted": {**GREEDY, "assistant_model": assistant},
    "assisted and sampled": {**GREEDY, "assistant_model": assistant, "do_sample": True},
    "its own assistant": {**GREEDY, "assistant_model": "itself"},
}  # fmt: skip


def case(name):
    model, inputs = family("llava")
    options = dict(CASES[name])
    if options.get("compile_config") is not None:
        options["compile_config"]._compile_all_devices = True
    if any(word in name for word in ("looked", "assist")):
        inputs = {key: value[:1] for key, value in inputs.items()}
        # Prompt lookup needs a prompt with repetitions.
        inputs["input_ids"][:, -2:] = inputs["input_ids"][:, -5:-3]
    if "max_new_tokens" in options and "min_new_tokens" not in options:
        options["eos_token_id"], options["pad_token_id"] = stop_word(model, inputs), 0
    if (draft := options.get("assistant_model")) is not None:
        options["assistant_model"] = model if draft == "itself" else draft()
    return model, inputs, options


QUERIES = ("last", "all", "text")


@pytest.mark.parametrize(
    ("name", "queries"),
    [
        # Each way of generating with one kind of queries, in turn; the other pairs are slow tests.
        pytest.param(name, kind, marks=[] if number in (index % 3, index) else pytest.mark.slow)
        for index, name in enumerate(CASES)
        for number, kind in enumerate(QUERIES)
    ],
)
def test_rows_are_the_returned_sequences(name, queries):
    model, inputs, options = case(name)
    torch.manual_seed(3)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(3)
    with eq.watch(model, queries=queries, tokens=True) as record:
        watched = model.generate(**inputs, **options)
    assert type(watched) is type(plain)
    plain, watched = (getattr(result, "sequences", result) for result in (plain, watched))
    assert torch.equal(plain, watched)
    assert not [layer for layer in record.missing if "language_model" in layer]
    expected = expected_shares(model, inputs, watched, queries, **options)
    torch.testing.assert_close(record.share(LAYER), expected, **NEAR)
    tokens, places = record.tokens(LAYER), record.labels(LAYER)
    for modality in range(2):
        mass = (tokens * (places == modality)[:, None]).sum(dim=-1)
        torch.testing.assert_close(mass, expected[..., modality], **NEAR)
    # Every token except the last is a query; draft tokens and tokens after the end are not counted.
    prompt, written = inputs["input_ids"].shape[1], lengths(watched[:, inputs["input_ids"].shape[1] :], options)
    each = len(watched) // len(inputs["input_ids"])
    padding = (inputs["attention_mask"] == 0).sum(dim=1).repeat_interleave(each)
    assert (places != -1).sum(dim=1).tolist() == [
        prompt + n - 1 - int(p) for n, p in zip(written, padding, strict=True)
    ]
    per_token = expected / torch.stack([(places == modality).sum(dim=1) for modality in (0, 1)], dim=-1)[:, None]
    torch.testing.assert_close(record.per_token(LAYER), per_token, **NEAR)


def assert_shares(model, inputs, options, queries="last"):
    with eq.watch(model, queries=queries) as record:
        result = model.generate(**inputs, **options)
    torch.testing.assert_close(record.share(LAYER), expected_shares(model, inputs, result, queries, **options), **NEAR)
    return record, result


def test_several_calls_in_one_context():
    model, inputs = family("llava")
    one = {**STOPS, "eos_token_id": stop_word(model, inputs), "pad_token_id": 0}
    several = [one, {**GREEDY, "num_beams": 3, "num_return_sequences": 2}, {**GREEDY, "prefill_chunk_size": 4}]
    expected = []
    with eq.watch(model, queries="last") as record:
        for options in several:
            result = model.generate(**inputs, **options)
            expected.append((result, options))
        with torch.no_grad():
            model(**inputs)
    parts = [expected_shares(model, inputs, result, **options) for result, options in expected]
    with torch.no_grad(), eq.watch(model, queries="last") as forward:
        model(**inputs)
    parts.append(forward.share(LAYER))
    torch.testing.assert_close(record.share(LAYER), torch.cat(parts), **NEAR)


@pytest.mark.parametrize("ends", [True, False])
def test_custom_stopping_criterion(ends):
    model, inputs = family("llava")

    class First(transformers.StoppingCriteria):
        """Stops the first sample after three tokens."""

        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 16, False])

    criteria = transformers.StoppingCriteriaList([First()])
    options = {"max_new_tokens": 6, "do_sample": False, "stopping_criteria": criteria}
    options |= {"eos_token_id": 96, "pad_token_id": 0} if ends else {"eos_token_id": None}
    model.generation_config.eos_token_id = None
    with eq.watch(model, queries="last") as record:
        result = model.generate(**inputs, **options)
    # With an end token, the first sequence is padded after it; without one, it continues.
    assert bool((result[0, 16:] == 0).all()) == ends
    expected = expected_shares(model, {key: value[1:] for key, value in inputs.items()}, result[1:], pad_token_id=0)
    torch.testing.assert_close(record.share(LAYER)[1:], expected, **NEAR)
    first = result[:1, :16] if ends else result[:1]
    expected = expected_shares(model, {key: value[:1] for key, value in inputs.items()}, first)
    torch.testing.assert_close(record.share(LAYER)[:1], expected, **NEAR)


@pytest.mark.parametrize("name", ["beams returned", "chunks", "no cache and beams", "looked up", "chunks with beams"])
def test_custom_labels_and_masks(name):
    model, inputs, options = case(name)
    own = (inputs["input_ids"] == IMAGE).long().masked_fill(inputs["attention_mask"] == 0, -1)
    mask = own == 1
    with eq.watch(model, queries="last") as messages:
        model.generate(**inputs, **options)
    with eq.watch(model, queries="last", modality=own, names=("text", "image")) as given:
        model.generate(**inputs, **options)
    assert torch.equal(given.share(LAYER), messages.share(LAYER))
    with eq.watch(model, queries=mask) as masked:
        result = model.generate(**inputs, **options)
    torch.testing.assert_close(masked.share(LAYER), expected_shares(model, inputs, result, "image", **options), **NEAR)
    with (
        pytest.warns(UserWarning, match=r"queries is a mask of shape \(\d, 12\)"),
        eq.watch(model, queries=mask[:, 1:]),
    ):
        model.generate(**inputs, **options)


def test_custom_decoding_loop():
    model, inputs = family("llava")

    def two_at_once(model, input_ids, generation_config=None, **kwargs):
        kwargs.pop("logits_processor"), kwargs.pop("stopping_criteria")
        step = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        return torch.cat([input_ids, model(**step).logits[:, -1:].argmax(dim=-1)], dim=1)

    message = "custom decoding loop .custom_generate., whose steps cannot be distinguished"
    with pytest.warns(UserWarning, match=message), eq.watch(model, queries="last") as record:
        model.generate(**inputs, custom_generate=two_at_once, max_new_tokens=1)
    with pytest.raises(ConfigError, match=message):
        record.share(LAYER)

    def around(model, input_ids, **kwargs):
        return type(model)._sample(model, input_ids, **kwargs)

    assert_shares(model, inputs, {**GREEDY, "custom_generate": around})


def test_early_exit():
    torch.manual_seed(0)
    model, inputs = family("llama")
    inputs = {key: value[:1] for key, value in inputs.items()}
    with eq.watch(model, queries="last", tokens=True) as plain:
        words = model.generate(**inputs, **GREEDY)
    with eq.watch(model, queries="last", tokens=True) as record:
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_early_exit=1), words)
    for layer in plain.layers:
        torch.testing.assert_close(record.tokens(layer), plain.tokens(layer), **NEAR)


@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2},
    {"use_cache": False}, {"use_cache": False, "num_beams": 2},
])  # fmt: skip
def test_encoder_decoder(options):
    model, inputs = family("florence2")
    del inputs["decoder_input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    torch.manual_seed(2)
    with eq.watch(model, queries="last") as record:
        result = model.generate(**inputs, **options)
    each = len(result) // 2
    many = {key: value.repeat_interleave(each, dim=0) for key, value in inputs.items()}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**many, decoder_input_ids=result[:, :-1], output_attentions=True)
    labels = (many["input_ids"] == IMAGE).long().masked_fill(many["attention_mask"] == 0, -1)
    mean = output.cross_attentions[1].mean(dim=2)
    expected = torch.stack([(mean * (labels == m)[:, None]).sum(dim=-1) for m in (0, 1)], dim=-1)
    share = record.share("model.language_model.decoder.layers.1.encoder_attn")
    torch.testing.assert_close(share, expected, **NEAR)
    # The encoder ran once per sample; its rows are expanded to the returned sequences.
    assert all(len(record.share(layer)) == len(result) for layer in record.layers)
    with torch.no_grad(), eq.watch(model, queries="last") as forward:
        model(**many, decoder_input_ids=result[:, :-1])
    layer = "model.language_model.encoder.layers.1.self_attn"
    torch.testing.assert_close(record.share(layer), forward.share(layer), **NEAR)


@pytest.mark.parametrize("name", ["whisper", "t5", "blip2", "mllama", "qwen2_vl", "git", "blip"])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}, {}])
def test_families(name, options):
    model, inputs = family(name)
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 3, "do_sample": False, **options}
    given = {"modality": torch.tensor([1] * 5 + [0] * 13), "names": ("text", "image")} if name == "git" else {}
    plain = model.generate(**inputs, **options)
    with eq.watch(model, queries="last", **given) as record:
        result = model.generate(**inputs, **options)
    assert torch.equal(plain, result)
    for layer in record.layers:
        if "qformer" not in layer:
            assert len(record.share(layer)) == 2 * options.get("num_return_sequences", 1)
            everything = record.share(layer).sum(dim=-1) + record.special(layer) + record.sink(layer)
            torch.testing.assert_close(everything, torch.ones_like(everything), **NEAR)


def test_nested_and_repeated_contexts():
    model, inputs = family("llava")
    options = {**GREEDY, "num_beams": 3}
    with eq.watch(model, queries="last") as outer, eq.watch(model, queries="all") as inner:
        result = model.generate(**inputs, **options)
    labels = (inputs["input_ids"] == IMAGE).long().masked_fill(inputs["attention_mask"] == 0, -1)
    given = {"modality": labels, "names": ("text", "image"), "queries": "last"}
    with eq.watch(model.model.language_model, **given) as part, eq.watch(model, queries="last") as full:
        model.generate(**inputs, **options)
    with eq.watch(model.model, queries="last") as body:
        model.generate(**inputs, **options)
    torch.testing.assert_close(outer.share(LAYER), expected_shares(model, inputs, result), **NEAR)
    torch.testing.assert_close(inner.share(LAYER), expected_shares(model, inputs, result, "all"), **NEAR)
    assert torch.equal(full.share(LAYER), outer.share(LAYER))
    for record, layer in ((part, "layers.1.self_attn"), (body, "language_model.layers.1.self_attn")):
        assert torch.equal(record.share(layer), outer.share(LAYER))


def test_error_inside_generate():
    model, inputs = family("llava")

    class Breaks(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 14:
                raise KeyError("broken")
            return scores

    options = {**GREEDY, "num_beams": 3}
    broken = transformers.LogitsProcessorList([Breaks()])
    with eq.watch(model, queries="last") as record:
        with pytest.raises(KeyError, match="broken"):
            model.generate(**inputs, **options, logits_processor=broken)
        result = model.generate(**inputs, **options)
    torch.testing.assert_close(record.share(LAYER), expected_shares(model, inputs, result), **NEAR)
    assert all(name not in vars(type(model)) for name in ("_sample", "_beam_search", "generate"))
