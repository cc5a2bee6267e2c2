"""ResNet18 encoder: positions of the last feature map are tokens."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..nn.transformer import initialize_weights
from ..tokens.token_batch import Tokens
from .encoder import Encoder
from .pretrained_weights import for_channels, import_transformers, load_model

WIDTHS, DEPTHS = [64, 128, 256, 512], [2, 2, 2, 2]
"""Channels and blocks of the four stages of ResNet18."""


class ResNetEncoder(Encoder):
    """ResNet18 without pooling: each position of the last feature map of each frame is a token.

    ::

        M_t = ResNet18(frame t)                              512 x ceil(height / 32) x ceil(width / 32)
        tokens = [M_1 ; ... ; M_T] A + a                     without A if dim = 512; no class token

    ``pooled`` is the mean over time and space, the input of static fusions in earlier papers.

    Args:
        channels: image channels: 3 for RGB, 1 for a spectrogram, 2 for optical flow.
        frames: images per sample; with several, the input is (batch, frame, channel, height, width).
        dim: token width.
        pretrained: a folder or a name on the Hub of a ResNet18 with safetensors; for other numbers of channels, the
            first kernel is the mean over colors.

    Raises:
        ConfigError: the weights are of another network, or transformers is missing. DataError: the weights are not
            found.
        ShapeError: the number of channels or frames does not match.

    Because of batch norm, the tokens of a sample depend on its batch in training: accumulated small batches are not
    equivalent to one large batch, and distributed processes have separate running statistics.

    Reference: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016); RollingQ (ICML 2025), Table 7.
    Differs from the released code in: unknown; the release contains no ResNet.

    Example:
        >>> import torch
        >>> ResNetEncoder(3, frames=2, dim=16)(torch.zeros(2, 2, 3, 40, 32)).values.shape
        torch.Size([2, 4, 16])
    """

    name = "ResNetEncoder"
    reads = "(channel, height, width) or (frame, channel, height, width)"

    def __init__(self, channels: int, *, frames: int = 1, dim: int = 512, pretrained: str | None = None) -> None:
        super().__init__()
        transformers = import_transformers("ResNetEncoder")
        if min(channels, frames, dim) < 1:
            raise ConfigError(
                "ResNetEncoder", expected="channels, frames and dim of 1 or more",
                got=f"channels = {channels}, frames = {frames}, dim = {dim}",
            )  # fmt: skip
        self.channels, self.frames, self.dim = channels, frames, dim
        config = transformers.ResNetConfig(
            num_channels=channels, embedding_size=WIDTHS[0], hidden_sizes=WIDTHS, depths=DEPTHS, layer_type="basic"
        )
        self.resnet = transformers.ResNetModel(config)
        self.project = nn.Identity() if dim == WIDTHS[-1] else nn.Linear(WIDTHS[-1], dim)
        initialize_weights(self.project)
        if pretrained is not None:
            self._load_pretrained(load_model(transformers.ResNetModel, pretrained, "ResNetEncoder"))

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        if len(shape) == 4:
            return {"frames": shape[0], "channels": shape[1]}
        return {"channels": shape[0]} if len(shape) == 3 else None

    def forward(self, pixels: Float[Tensor, "batch *frame channel height width"]) -> Tokens:
        leading = (*([self.frames] if self.frames > 1 else []), self.channels)
        if pixels.ndim != len(leading) + 3 or tuple(pixels.shape[1:-2]) != leading:
            raise ShapeError(
                "ResNetEncoder", expected=f"(batch, {', '.join(map(str, leading))}, height, width)",
                got=f"shape {tuple(pixels.shape)}", fix="Build the encoder for these channels and frames.",
            )  # fmt: skip
        batch = len(pixels)
        if self.frames > 1:
            pixels = pixels.flatten(0, 1)
        maps = self.resnet(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return Tokens(self.project(maps.unflatten(0, (batch, self.frames)).flatten(1, 2)))

    def _load_pretrained(self, trained: Any) -> None:
        """Copies the weights of another ResNet18, adapted to these channels."""
        config = trained.config
        if (list(config.hidden_sizes), list(config.depths), config.layer_type) != (WIDTHS, DEPTHS, "basic"):
            raise ConfigError(
                "ResNetEncoder", expected=f"a ResNet18: hidden_sizes = {WIDTHS}, depths = {DEPTHS}, layer_type = basic",
                got=f"{list(config.hidden_sizes)}, {list(config.depths)}, {config.layer_type}",
            )  # fmt: skip
        state, kernel = trained.state_dict(), "embedder.embedder.convolution.weight"
        state[kernel] = for_channels(state[kernel], self.channels)
        self.resnet.load_state_dict(state)
