"""A small Llama from transformers, and hooks that add gated cross-attention to its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...alignment import GatedCrossAttention
from ...errors import ConfigError, require_extra


def small_llama(words: int, *, dim: int, depth: int, heads: int, context: int) -> Any:
    """Builds a randomly initialized ``LlamaForCausalLM`` that uses ``F.scaled_dot_product_attention``.

    Args:
        words: vocabulary size.
        dim: model width.
        depth: number of blocks.
        heads: number of attention heads, each dim / heads wide.
        context: maximum number of tokens.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: ``dim`` is not a multiple of ``2 * heads``.
    """
    if depth < 1 or heads < 1 or dim % (2 * heads):
        raise ConfigError(
            "VisionLanguageModel", expected="depth >= 1 and dim a multiple of 2 heads, for rotary positions",
            got=f"depth = {depth}, dim = {dim}, heads = {heads}",
        )  # fmt: skip
    with require_extra("VisionLanguageModel"):
        from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=words, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, use_cache=False,
        initializer_range=dim**-0.5, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )  # fmt: skip
    return LlamaForCausalLM(config)


@contextmanager
def cross_attending_blocks(
    blocks: Sequence[nn.Module], gates: Sequence[GatedCrossAttention], media: Tensor, media_at: Tensor
) -> Iterator[None]:
    """Context manager: runs each gated cross-attention layer before its block of the language model.

    Args:
        blocks: blocks of the language model.
        gates: one gated cross-attention layer per block.
        media: (batch, patch, width), one medium per text.
        media_at: (batch, word) True at the medium's position in the text.
    """
    with ExitStack() as stack:
        for block, gate in zip(blocks, gates, strict=True):

            def before(_: nn.Module, args: tuple, gate: GatedCrossAttention = gate) -> tuple:
                return gate(args[0], media, media_at=media_at), *args[1:]

            stack.callback(block.register_forward_pre_hook(before).remove)
        yield
