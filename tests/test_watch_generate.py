"""Shares under ``generate``, against a plain pass of an eager model over each returned sequence."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import nn

import equipoise as eq
from small_vlms import IMAGE, family
from tolerance import TOL

NEAR = TOL[torch.float32]
LAYER = "model.language_model.layers.1.self_attn"
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
STOPS = {"max_new_tokens": 8, "do_sample": False}
"""Ends at a word that the first sample writes early."""


@pytest.fixture(autouse=True)
def calm():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*generation flags.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


def stop_word(model, inputs):
    """A word that the first sample writes third, and no sample writes earlier."""
    found = model.generate(**inputs, **GREEDY)[:, -6:]
    return int(found[0, 2])


def lengths(written, options):
    """How many tokens of each returned sequence were written before it was complete."""
    stop, found = options.get("eos_token_id"), []
    for row in written.tolist():
        found.append(row.index(stop) + 1 if stop in row else len(row))
        assert not stop or stop in row or 0 not in row
    return found


def truth(model, inputs, sequences, queries="last", **options):
    """Mean share of the watched queries, one returned sequence at a time."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    prompt = inputs["input_ids"].shape[1]
    found = []
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
        found.append(torch.stack([mean[:, labels[0] == modality].sum(dim=-1) for modality in (0, 1)], dim=-1))
    model.set_attn_implementation(backend)
    return torch.stack(found).float()


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
        # A prompt that repeats itself has something to look up.
        inputs["input_ids"][:, -2:] = inputs["input_ids"][:, -5:-3]
    if "max_new_tokens" in options and "min_new_tokens" not in options:
        options["eos_token_id"], options["pad_token_id"] = stop_word(model, inputs), 0
    if (draft := options.get("assistant_model")) is not None:
        options["assistant_model"] = model if draft == "itself" else draft()
    return model, inputs, options


@pytest.mark.parametrize("queries", ["last", "all", "text"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_returned_sequences(name, queries):
    model, inputs, options = case(name)
    torch.manual_seed(3)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(3)
    with eq.watch(model, queries=queries, tokens=True) as seen:
        watched = model.generate(**inputs, **options)
    assert type(watched) is type(plain)
    plain, watched = (getattr(found, "sequences", found) for found in (plain, watched))
    assert torch.equal(plain, watched)
    assert not [site for site in seen.missing if "language_model" in site]
    expected = truth(model, inputs, watched, queries, **options)
    torch.testing.assert_close(seen.share(LAYER), expected, **NEAR)
    tokens, places = seen.tokens(LAYER), seen.labels(LAYER)
    for modality in range(2):
        mass = (tokens * (places == modality)[:, None]).sum(dim=-1)
        torch.testing.assert_close(mass, expected[..., modality], **NEAR)
    # Every token but the last was read by some query, and no token of a draft or after the end counts.
    prompt, written = inputs["input_ids"].shape[1], lengths(watched[:, inputs["input_ids"].shape[1] :], options)
    each = len(watched) // len(inputs["input_ids"])
    padding = (inputs["attention_mask"] == 0).sum(dim=1).repeat_interleave(each)
    assert (places != -1).sum(dim=1).tolist() == [
        prompt + n - 1 - int(p) for n, p in zip(written, padding, strict=True)
    ]
    per_token = expected / torch.stack([(places == modality).sum(dim=1) for modality in (0, 1)], dim=-1)[:, None]
    torch.testing.assert_close(seen.per_token(LAYER), per_token, **NEAR)
