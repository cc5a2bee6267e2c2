"""RollingQ on attention modules of Hugging Face: separate and fused projections, shared keys, rotary positions,
LoRA.
"""

import copy

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.tolerance import TOL

transformers = pytest.importorskip("transformers")

NAMES = ("image", "text")
LABELS = torch.tensor([-1, 0, 0, 0, 1, 1])
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30}
DECODER = {**SMALL, "intermediate_size": 20, "max_position_embeddings": 32, "pad_token_id": 0}
# config, path of the attention of the last layer, whether the rotation can be merged.
CASES = {
    "BertModel": ({**SMALL, "intermediate_size": 20}, "encoder.layer.1.attention.self", True),
    "GPT2Model": ({"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 30}, "h.1.attn", True),
    "BloomModel": ({"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 30}, "h.1.self_attention", True),
    "OPTModel": ({**SMALL, "ffn_dim": 20, "word_embed_proj_dim": 16}, "decoder.layers.1.self_attn", True),
    "LlamaModel": ({**DECODER, "num_key_value_heads": 2}, "layers.1.self_attn", False),
    "Qwen3Model": ({**DECODER, "num_key_value_heads": 2, "head_dim": 8}, "layers.1.self_attn", False),
    "Phi3Model": ({**DECODER, "num_key_value_heads": 2}, "layers.1.self_attn", False),
    "GPTNeoXModel": ({**SMALL, "intermediate_size": 20}, "layers.1.attention", False),
}


def build_model(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name.removesuffix("Model") + "Config")(**CASES[name][0], **options)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The initial weights are so small that attention is uniform.
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    return model


def inputs(seed=0):
    ids = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones(3, 6, dtype=torch.long)}


def expected_attention(model, layer):
    """The attention of the last layer as the model itself computes it."""
    return model(**inputs(), output_attentions=True).attentions[layer]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_rotation_changes_recorded_shares(name, backend):
    path, mergeable = CASES[name][1:]
    if (name, backend) == ("BloomModel", "sdpa"):
        pytest.skip("BLOOM has no SDPA")
    model = build_model(name, attn_implementation=backend)
    plain = model(**inputs()).last_hidden_state
    rolling = eq.balance.RollingQ(model, module=path, names=NAMES, beta=0.0)
    rolling.layout(LABELS)
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model(**inputs())
    assert rolling.end_epoch()["rotated"] == 1.0
    model.eval()
    rotated = model(**inputs()).last_hidden_state
    assert not torch.allclose(rotated, plain, atol=1e-4)
    with eq.watch(model, modality=LABELS, names=NAMES, layers=f"{path}*") as record:
        torch.testing.assert_close(model(**inputs()).last_hidden_state, rotated, **TOL[torch.float32])
    explicit = copy.deepcopy(model)
    explicit.set_attn_implementation("eager")
    weights = expected_attention(explicit, 1)
    share = torch.stack([weights[..., m == LABELS].sum(-1).mean(-1) for m in (0, 1)], dim=-1)
    torch.testing.assert_close(record.share(record.layers[0]), share, rtol=1e-4, atol=1e-5)
    if mergeable:
        eq.merge_rotations(model)
        assert not any("rolling" in key for key in model.state_dict())
        torch.testing.assert_close(model(**inputs()).last_hidden_state, rotated, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ConfigError, match=r"one behind the (rotary positions|norms of queries and keys)"):
            eq.merge_rotations(model)


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_statistics_match_the_attention(name):
    """The cosines, measured from the queries and keys that the attention function receives."""
    path = CASES[name][1]
    model = build_model(name, attn_implementation="eager")
    rolling = eq.balance.RollingQ(model, module=path, names=NAMES, beta=9.0, statistics="full_pass")
    rolling.layout(LABELS)
    seen = {}

    def capture(module, query, key, value, mask, **options):
        seen[module] = query, key
        return transformers.models.bert.modeling_bert.eager_attention_forward(
            module, query, key.repeat_interleave(query.shape[1] // key.shape[1], 1),
            value.repeat_interleave(query.shape[1] // key.shape[1], 1), mask, options["scaling"], 0.0,
        )  # fmt: skip

    transformers.AttentionInterface.register("capture", capture)
    model.set_attn_implementation("capture")
    with torch.no_grad():
        model(**inputs())
    query, key = seen[model.get_submodule(path)]
    rolling.measure(AdapterModule(model), [inputs()])
    log = rolling.end_epoch()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    means = [key[:, :, m == LABELS].mean(dim=2) for m in (0, 1)]
    cosine = [torch.cosine_similarity(query, mean[:, :, None], dim=-1).mean() for mean in means]
    assert log["air/image"] == pytest.approx(float(cosine[0] - cosine[1]), abs=1e-5)


class AdapterModule(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch)


def test_copies_and_states_of_a_rotary_layer():
    model, path = build_model("LlamaModel"), CASES["LlamaModel"][1]
    rolling = eq.balance.RollingQ(model, module=path, names=NAMES, beta=0.0)
    rolling.layout(LABELS)
    model.train()(**inputs())
    rolling.end_epoch()
    expected = model.eval()(**inputs()).last_hidden_state
    fresh = build_model("LlamaModel")
    eq.balance.RollingQ(fresh, module=path, names=NAMES)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), fresh):
        assert torch.equal(other(**inputs()).last_hidden_state, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_lora_weights_are_rotated_and_merged():
    peft = pytest.importorskip("peft")
    base = build_model("BertModel")
    config = peft.LoraConfig(target_modules=["query", "key"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    path = next(name for name, part in model.named_modules() if name.endswith("layer.1.attention.self"))
    rolling = eq.balance.RollingQ(model, module=path, names=NAMES, beta=0.0)
    rolling.layout(LABELS)
    model.train()(**inputs())
    assert rolling.end_epoch()["rotated"] == 1.0
    rotated = model.eval()(**inputs()).last_hidden_state
    merged = eq.merge_rotations(model)
    torch.testing.assert_close(merged(**inputs()).last_hidden_state, rotated, **TOL[torch.float32])
    merged.merge_adapter()
    torch.testing.assert_close(merged(**inputs()).last_hidden_state, rotated, rtol=1e-4, atol=1e-5)


def test_unknown_fused_projection_layout_raises():
    config = transformers.FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=30)
    with pytest.raises(
        ConfigError, match=r"order of queries, keys and values is known, got 'query_key_value' of Falcon"
    ):
        eq.balance.RollingQ(transformers.FalconModel(config), names=NAMES)
