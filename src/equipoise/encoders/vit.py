"""ViT-B/16 truncated to its first blocks: the encoder of the RollingQ experiments."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError
from ..nn.transformer import initialize_weights
from ..tokens.token_batch import Tokens
from .encoder import Encoder
from .pretrained_weights import for_channels, import_transformers, load_model


class ViTEncoder(Encoder):
    """The first blocks of a Vision Transformer, for images, videos and spectrograms.

    ::

        x = [c ; patches of frame 1 ; ... ; patches of frame T] + P      one table P over all frames
        x <- x + Attention(LN(x)),  x <- x + MLP(LN(x))                  depth times
        tokens = LN(x)                                                   token 0 is the class token c

    Frames share the patch projection. Pixels at the right and bottom edges that do not fill a patch are ignored.

    Args:
        channels: image channels: 3 for RGB, 1 for a spectrogram, 2 for optical flow.
        size: (height, width) as stored.
        frames: images per sample; with several, the input is (batch, frame, channel, height, width).
        patch: side of a patch in pixels.
        dim: token width.
        depth: number of blocks.
        heads: attention heads.
        axes: names of the stored axes and their order in the patches, such as ``"frequency time -> time frequency"``,
            which transposes the input; by default the input is not transposed.
        pretrained: a folder or a name on the Hub of a ViT with safetensors. Its first ``depth`` blocks, class token and
            final norm are copied. For other numbers of channels, the patch kernel is the mean over colors; positions
            are interpolated bilinearly from the trained grid and repeated for each frame.

    Raises:
        ConfigError: the size is smaller than a patch, dim is not divisible by heads, axes are invalid, the weights have
            another shape, or transformers is missing. DataError: the weights are not found. ShapeError: the shape of
            the images does not match.

    By default a block has 12 d^2 + 13 d = 7,087,872 parameters. Training from scratch requires far more data than
    common
    multimodal benchmarks contain: use ``PatchEncoder`` with a small width, or ``pretrained``.

    Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021); RollingQ (ICML 2025).
    Differs from the released code in: the choice of blocks and the derivation of audio weights, which neither the code
    nor the paper specifies; axes are transposed only if ``axes`` says so (always in the release).

    Example:
        >>> encoder = ViTEncoder(1, (12, 9), patch=4, dim=16, depth=1, heads=2, axes="frequency time -> time frequency")
        >>> encoder.grid, encoder(torch.zeros(5, 1, 12, 9)).values.shape
        ((2, 3), torch.Size([5, 7, 16]))
    """

    name = "ViTEncoder"
    reads = "(channel, height, width) or (frame, channel, height, width)"

    def __init__(
        self, channels: int, size: tuple[int, int], *, frames: int = 1, patch: int = 16, dim: int = 768,
        depth: int = 4, heads: int = 12, axes: str | None = None, pretrained: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        transformers = import_transformers("ViTEncoder")
        self.swapped = _swapped(axes)
        height, width = reversed(size) if self.swapped else size
        self.grid = (height // max(patch, 1), width // max(patch, 1))
        if min(*self.grid, frames, patch, depth) < 1:
            raise ConfigError(
                "ViTEncoder", expected="at least one frame, one block and one whole patch",
                got=f"frames = {frames}, depth = {depth}, patch = {patch} for (height, width) = {(height, width)}",
            )  # fmt: skip
        # Some versions of transformers silently build narrower heads.
        if channels < 1 or dim < 1 or heads < 1 or dim % heads:
            raise ConfigError(
                "ViTEncoder", expected="channels, dim and heads of 1 or more, and a dim that heads divides",
                got=f"channels = {channels}, dim = {dim}, heads = {heads}",
            )  # fmt: skip
        self.channels, self.size, self.frames, self.patch, self.dim = channels, tuple(size), frames, patch, dim
        config = transformers.ViTConfig(
            hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim,
            # Frames are stacked vertically, so that their patches are in frame order and share one position table.
            image_size=[frames * self.grid[0] * patch, self.grid[1] * patch], patch_size=patch, num_channels=channels,
            layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.vit = transformers.ViTModel(config, add_pooling_layer=False)
        initialize_weights(self.vit)
        projection = self.vit.embeddings.patch_embeddings.projection
        nn.init.kaiming_normal_(projection.weight, mode="fan_out")
        nn.init.zeros_(projection.bias)
        if pretrained is not None:
            self._load_pretrained(load_model(transformers.ViTModel, pretrained, "ViTEncoder", add_pooling_layer=False))

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        if len(shape) == 4:
            return {"frames": shape[0], "channels": shape[1], "size": shape[2:]}
        return {"channels": shape[0], "size": shape[1:]} if len(shape) == 3 else None

    def forward(self, pixels: Float[Tensor, "batch *frame channel height width"]) -> Tokens:
        expected = (*([self.frames] if self.frames > 1 else []), self.channels, *self.size)
        if tuple(pixels.shape[1:]) != expected:
            raise ShapeError(
                "ViTEncoder", expected=f"(batch, {', '.join(map(str, expected))})", got=f"shape {tuple(pixels.shape)}",
                fix="Resize the images, or create the encoder for their size and number of frames.",
            )  # fmt: skip
        if self.swapped:
            pixels = pixels.transpose(-1, -2)
        rows, columns = self.grid
        pixels = pixels[..., : rows * self.patch, : columns * self.patch]
        if self.frames > 1:
            pixels = pixels.transpose(1, 2).flatten(2, 3)
        return Tokens(self.vit(pixels).last_hidden_state, cls=True)

    @torch.no_grad()
    def _load_pretrained(self, trained: Any) -> None:
        """Copies the weights of another ViT, adapted to these channels and this grid."""
        source, target = trained.config, self.vit.config
        for field in ("hidden_size", "num_attention_heads", "intermediate_size", "patch_size"):
            if getattr(source, field) != getattr(target, field):
                raise ConfigError(
                    "ViTEncoder",
                    expected=f"pretrained weights with {field} = {getattr(target, field)}",
                    got=f"{field} = {getattr(source, field)}",
                    fix=f"Create the encoder with the {field} of the weights.",
                )
        if source.num_hidden_layers < target.num_hidden_layers:
            raise ConfigError(
                "ViTEncoder", expected=f"pretrained weights of depth = {target.num_hidden_layers} blocks or more",
                got=f"{source.num_hidden_layers} blocks",
            )  # fmt: skip
        state = {name: value for name, value in trained.state_dict().items() if name in self.vit.state_dict()}
        kernel, table = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
        height, width = trained.embeddings.patch_embeddings.image_size
        grid = (height // source.patch_size, width // source.patch_size)
        state[kernel] = for_channels(state[kernel], self.channels)
        state[table] = torch.cat(
            [state[table][:, :1], *[interpolate_positions(state[table][:, 1:], grid, self.grid)] * self.frames], dim=1
        )
        self.vit.load_state_dict(state)


def interpolate_positions(
    table: Float[Tensor, "1 token dim"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 other dim"]:
    """Interpolates a table of positions (without the class token) bilinearly to another grid."""
    grid = table.unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def _swapped(axes: str | None) -> bool:
    """Returns whether the two axes are transposed."""
    if axes is None:
        return False
    stored, _, target = (part.split() for part in axes.partition("->"))
    if len(set(stored)) != 2 or len(stored) != 2 or sorted(stored) != sorted(target):
        raise ConfigError(
            "ViTEncoder", expected="axes as two names, an arrow, and the same names in the order of the patches",
            got=repr(axes), fix='Write for example axes="frequency time -> time frequency".',
        )  # fmt: skip
    return stored != target
