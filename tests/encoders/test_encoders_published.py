"""Encoders of the published settings: ViT and ResNet on transformers' models, against loops."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import equipoise as eq
from equipoise.encoders.pretrained_weights import for_channels
from equipoise.encoders.vit import interpolate_positions
from equipoise.errors import ConfigError, DataError, MissingExtraError, ShapeError
from equipoise.training import method_factory
from helpers.tolerance import TOL
from oracles.fusion import state_as_float64, transformer

EXACT = TOL[torch.float64]
SMALL = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
# Parameter names in the ViT of all transformers versions since 5.0, and in our stack; the first match is used.
OURS = {
    "encoder.layer.": "blocks.", "layers.": "blocks.", "attention.attention.": "attention.", "q_proj": "query",
    "k_proj": "key", "v_proj": "value", "attention.output.dense": "attention.out", "o_proj": "out",
    "layernorm_before": "norm_attention", "layernorm_after": "norm_mlp", "layernorm": "norm",
    "intermediate.dense": "mlp.0", "output.dense": "mlp.2", "fc1": "0", "fc2": "2",
}  # fmt: skip


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturb(module):
    """Perturbs every parameter, so that values of exactly 0 and 1 cannot hide errors."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter += 0.1 * normal(seed, *parameter.shape).to(parameter)
    return module


def vit_oracle(encoder, videos, patch, depth, heads, swap):
    """Computes patches of each frame in row-major order, position embeddings over all of them, blocks and norm."""
    state = {}
    for name, value in state_as_float64(encoder.vit).items():
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        state[name] = value
    kernel, bias = (state[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    result = []
    for video in videos:
        rows = [state["embeddings.cls_token"][0, 0]]
        for picture in video:
            picture = picture.mT if swap else picture
            for top in range(0, picture.shape[1] - patch + 1, patch):
                for left in range(0, picture.shape[2] - patch + 1, patch):
                    rows.append((kernel * picture[:, top : top + patch, left : left + patch]).sum(dim=(1, 2, 3)) + bias)
        rows = torch.stack(rows) + state["embeddings.position_embeddings"][0]
        result.append(transformer(state, "", rows, [True] * len(rows), depth, heads))
    return torch.stack(result)


@pytest.mark.parametrize("axes", [None, "frequency time -> time frequency", "time frequency -> time frequency"])
@pytest.mark.parametrize("frames", [1, 3])
def test_vit(frames, axes):
    torch.manual_seed(0)
    encoder = eq.encoders.ViTEncoder(2, (7, 5), frames=frames, patch=2, dim=14, depth=2, heads=7, axes=axes).double()
    pixels = normal(1, 5, frames, 2, 7, 5)
    tokens = perturb(encoder)(pixels if frames > 1 else pixels[:, 0])
    assert tokens.cls
    assert tokens.mask is None
    swap = axes is not None and axes.startswith("frequency")
    assert encoder.grid == ((2, 3) if swap else (3, 2))
    torch.testing.assert_close(tokens.values, vit_oracle(encoder, pixels, 2, 2, 7, swap), **EXACT)


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes():
    with torch.device("meta"):
        audio = eq.encoders.ViTEncoder(1, (257, 188), axes="frequency time -> time frequency")
        image = eq.encoders.ViTEncoder(3, (224, 224))
        sounds = eq.encoders.ViTEncoder(1, (1024, 128), axes="time mel -> mel time", depth=1)
        video = eq.encoders.ViTEncoder(3, (224, 224), frames=3, depth=1)
        text = eq.encoders.SequenceEncoder(300, max_length=50, dim=120, depth=4, heads=5, bias=False)
    assert (audio.grid, image.grid, sounds.grid) == ((11, 16), (14, 14), (8, 64))
    with torch.device("meta"):
        assert parameter_count(image) - parameter_count(eq.encoders.ViTEncoder(3, (224, 224), depth=3)) == 7_087_872
    # Without positions and class tokens, as the published table counts: blocks, patch projections, final norms.
    tables = (176 + 196 + 2 + 2) * 768
    assert parameter_count(audio) + parameter_count(image) - tables == 8 * 7_087_872 + 197_376 + 590_592 + 3_072
    assert video.vit.embeddings.position_embeddings.shape == (1, 3 * 196 + 1, 768)
    # Kernel 1, no bias: 300 x 120; table and class token; four blocks of width 120 and the last norm.
    assert parameter_count(text) == 300 * 120 + (50 + 2) * 120 + 4 * (12 * 120**2 + 13 * 120) + 2 * 120
    with torch.device("meta"):
        resnet = eq.encoders.ResNetEncoder(3)
    assert parameter_count(resnet) == 11_176_512


def test_published_cost():
    """Parameters and operations as counted in the paper's Table 4; one LayerNorm of the release is unused."""
    with torch.device("meta"):
        audio = eq.encoders.ViTEncoder(1, (257, 188), axes="frequency time -> time frequency")
        encoders = {"audio": audio, "image": eq.encoders.ViTEncoder(3, (224, 224))}
    for encoder in encoders.values():
        for parameter in encoder.to_empty(device="cpu").parameters():
            nn.init.zeros_(parameter)
    model = eq.FusionModel(encoders, eq.fusion.JointAttention(768, heads=1, shortcut=False), num_outputs=6).eval()
    pictures = {"audio": torch.zeros(1, 1, 257, 188), "image": torch.zeros(1, 3, 224, 224)}
    result = eq.diagnostics.cost(model, pictures, convention="thop")
    assert result.parameters + 2 * 768 == 59_871_762
    assert round(result.gflops, 4) == 1489.1288


def bilinear(grid, rows, columns):
    """Resizes a grid (row, column, dim) bilinearly with half-pixel centers, in loops."""

    def place(index, new, old):
        at = min(max((index + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    result = torch.zeros(rows, columns, grid.shape[2], dtype=torch.float64)
    for i in range(rows):
        top, bottom, down = place(i, rows, grid.shape[0])
        for j in range(columns):
            left, right, across = place(j, columns, grid.shape[1])
            upper = (1 - across) * grid[top, left] + across * grid[top, right]
            lower = (1 - across) * grid[bottom, left] + across * grid[bottom, right]
            result[i, j] = (1 - down) * upper + down * lower
    return result


@pytest.mark.parametrize(("rows", "columns"), [(2, 7), (5, 3), (3, 5)])
def test_position_interpolation(rows, columns):
    grid = normal(0, 3, 5, 2)
    result = interpolate_positions(grid.flatten(0, 1)[None], (3, 5), (rows, columns))
    torch.testing.assert_close(result[0].unflatten(0, (rows, columns)), bilinear(grid, rows, columns), **EXACT)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A folder with a ViT of three blocks for color images with a 4 x 4 grid, in half precision."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(image_size=8, patch_size=2, layer_norm_eps=1e-6, **SMALL)
    perturb(transformers.ViTModel(config)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_pretrained_vit(vit_folder):
    options = {"frames": 2, "patch": 2, "dim": 12, "depth": 2, "heads": 3}
    encoder = eq.encoders.ViTEncoder(1, (5, 14), pretrained=str(vit_folder), **options)
    state, trained = (
        state_as_float64(part)
        for part in (encoder.vit, transformers.ViTModel.from_pretrained(vit_folder, dtype=torch.float32))
    )
    kernel = "embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(state[kernel][:, 0], sum(trained[kernel].unbind(1)) / 3, **TOL[torch.float32])
    table = "embeddings.position_embeddings"
    expected = bilinear(trained[table][0, 1:].unflatten(0, (4, 4)), 2, 7).flatten(0, 1)
    expected = torch.cat([trained[table][0, :1], expected, expected])
    torch.testing.assert_close(state[table][0], expected, **TOL[torch.float32])
    others = set(state) - {kernel, table}
    assert len(others) == 2 * 16 + 4
    assert all(torch.equal(state[name], trained[name]) for name in others)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_pretrained_resnet(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    trained = transformers.ResNetModel(config)
    trained.save_pretrained(tmp_path)
    encoder = eq.encoders.ResNetEncoder(2, frames=3, dim=7, pretrained=str(tmp_path)).eval()
    kernel = trained.embedder.embedder.convolution.weight
    with torch.no_grad():
        trained.embedder.embedder.convolution.weight = nn.Parameter(kernel.mean(1, keepdim=True).expand(-1, 2, -1, -1))
    trained.embedder.num_channels = 2
    pixels = normal(2, 2, 3, 2, 34, 65).float()
    with torch.no_grad():
        tokens = encoder(pixels)
        maps = [[trained.eval()(frame[None]).last_hidden_state[0] for frame in video] for video in pixels]
        rows = [[m[:, i, j] for m in video for i in range(2) for j in range(3)] for video in maps]
        expected = encoder.project(torch.stack([torch.stack(row) for row in rows]))
    assert tokens.values.shape == (2, 3 * 2 * 3, 7)
    assert not tokens.cls
    torch.testing.assert_close(tokens.values, expected, rtol=1e-5, atol=1e-5)


def test_kernels_for_other_channel_counts():
    kernel = normal(3, 2, 3, 2, 2)
    assert for_channels(kernel, 3) is kernel
    assert for_channels(kernel, 2).shape == (2, 2, 2, 2)


@pytest.mark.parametrize(
    "load", [eq.encoders.Backbone, lambda name: eq.encoders.ViTEncoder(3, (16, 16), pretrained=name)]
)
def test_missing_weights_raise(load, tmp_path):
    with pytest.raises(DataError, match=r"expected a folder or a name on the hub .* got '.*nowhere' \("):
        load(str(tmp_path / "nowhere"))
    transformers.ViTConfig(**SMALL).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled weights and code from the hub are not run"):
        load(str(tmp_path))


def test_weights_of_another_network_raise(vit_folder):
    with pytest.raises(DataError, match=r"all weights of a ResNetModel, got '.*', which lacks embedder\.embedder"):
        eq.encoders.ResNetEncoder(3, pretrained=str(vit_folder))


def build_vit(**options):
    return eq.encoders.ViTEncoder(3, (8, 8), **{"patch": 2, "dim": 12, "depth": 1, "heads": 3, **options})


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: build_vit(axes="time frequency"),
            ConfigError,
            r"expected axes as two names, an arrow.* got 'time frequency'",
        ),
        (
            lambda: build_vit(axes="time time -> time time"),
            ConfigError,
            r"Write for example axes=\"frequency time -> time",
        ),
        (
            lambda: build_vit(axes="time mel -> time frequency"),
            ConfigError,
            "the same names in the order of the patches",
        ),
        (
            lambda: build_vit(patch=16),
            ConfigError,
            r"one whole patch, got .* patch = 16 for \(height, width\) = \(8, 8\)",
        ),
        (lambda: build_vit(frames=0), ConfigError, "at least one frame, one block.* got frames = 0, depth = 1"),
        (lambda: build_vit(patch=0), ConfigError, "patch = 0"),
        (lambda: build_vit(heads=5), ConfigError, "ViTEncoder: expected .* a dim that heads divides, got .* heads = 5"),
        (lambda: build_vit(heads=0), ConfigError, "heads of 1 or more"),
        (
            lambda: build_vit()(torch.zeros(2, 1, 8, 8)),
            ShapeError,
            r"expected \(batch, 3, 8, 8\), got shape \(2, 1, 8, 8\)",
        ),
        (
            lambda: build_vit(frames=2)(torch.zeros(2, 3, 8, 8)),
            ShapeError,
            r"ViTEncoder: expected \(batch, 2, 3, 8, 8\), got shape \(2, 3, 8, 8\)\. Resize",
        ),
        (
            lambda: eq.encoders.ResNetEncoder(0),
            ConfigError,
            "ResNetEncoder: expected channels, frames and dim of 1 or more",
        ),
        (
            lambda: eq.encoders.ResNetEncoder(3)(torch.zeros(2, 1, 8, 8)),
            ShapeError,
            r"ResNetEncoder: expected \(batch, 3, height, width\), got shape \(2, 1, 8, 8\)",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 16, "heads": 4}, r"expected pretrained weights with hidden_size = 16, got hidden_size = 12\."),
        ({"heads": 2}, "num_attention_heads = 2, got num_attention_heads = 3. Create the encoder with"),
        ({"patch": 4}, "patch_size = 4, got patch_size = 2"),
        ({"depth": 4}, r"expected pretrained weights of depth = 4 blocks or more, got 3 blocks"),
    ],
)
def test_weights_of_another_vit_raise(vit_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        build_vit(pretrained=str(vit_folder), **options)


def test_weights_of_another_resnet_raise(tmp_path):
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a ResNet18: .*got \[4, 6\], \[1, 1\], basic"):
        eq.encoders.ResNetEncoder(3, pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (build_vit, r"ViTEncoder: expected the package 'transformers', .*pip install 'equipoise\[hf\]'"),
        (lambda: eq.encoders.ResNetEncoder(3), r"ResNetEncoder: expected the package 'transformers'"),
    ],
)
def test_missing_transformers_raises(call, fix, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=fix):
        call()


def build_encoder(name, options, shape):
    return method_factory.build_encoder(name, options, SimpleNamespace(shapes={name: shape}, vocabulary={}))


def test_recipe_names(vit_folder):
    small = {"patch": 2, "dim": 12, "depth": 1, "heads": 3}
    encoder = build_encoder("image", {"name": "ViTEncoder", **small, "pretrained": str(vit_folder)}, (2, 3, 8, 8))
    assert (encoder.frames, encoder.channels, encoder.size) == (2, 3, (8, 8))
    encoder = build_encoder("image", {"name": "ResNetEncoder", "dim": 12}, (2, 1, 8, 8))
    assert (encoder.frames, encoder.channels, encoder.dim) == (2, 1, 12)
    assert build_encoder("image", {"name": "Backbone", "model": str(vit_folder)}, (3, 8, 8)).dim == 12
    sequence = build_encoder("text", {"dim": 10, "heads": 5, "depth": 1, "bias": False}, (50, 3))
    assert (sequence.features, sequence.max_length, sequence.project.bias) == (3, 50, None)
    message = (
        r"encoder 'image': expected samples of shape \(channel, height, width\), or .*ViTEncoder for .*, "
        r"got PatchEncoder for samples of shape \(2, 3, 8, 8\)"
    )
    with pytest.raises(ConfigError, match=message):
        build_encoder("image", {"name": "PatchEncoder", "dim": 8, "patch": 2}, (2, 3, 8, 8))
