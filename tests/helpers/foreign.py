"""Attention modules in the style of other libraries, with other names of the projections."""

import torch
from torch import nn
from torch.nn import functional as F


def labels(tokens):
    """Returns labels of a class token and two modalities."""
    return torch.tensor([-1] + [0] * 2 + [1] * (tokens - 3))


class GroupedAttention(nn.Module):
    """Self-attention whose keys are shared by groups of query heads."""

    def __init__(self, dim, heads, keyheads, *, bias=True):
        super().__init__()
        self.heads, self.keyheads, width = heads, keyheads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, keyheads * width, bias=bias)
        self.v_proj = nn.Linear(dim, keyheads * width, bias=bias)

    def forward(self, tokens, source=None, mask=None):
        source = tokens if source is None else source
        query = self.q_proj(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.k_proj(source).unflatten(-1, (self.keyheads, -1)).transpose(1, 2)
        value = self.v_proj(source).unflatten(-1, (self.keyheads, -1)).transpose(1, 2)
        group = self.heads // self.keyheads
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        mask = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class DecoderLayer(nn.Module):
    """A decoder layer with cross-attention to the tokens of several modalities."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.cross = GroupedAttention(dim, heads, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens, memory):
        tokens = tokens + self.cross(self.norm(tokens), memory)
        return tokens + self.mlp(tokens)


class TimmAttention(nn.Module):
    """Attention as in timm: one projection to queries, keys and values, with optional norms of queries and keys."""

    def __init__(self, dim, num_heads, *, qk_norm=False, qkv_bias=True):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))
