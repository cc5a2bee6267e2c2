"""Finds the attention module inside a layer, and how RollingQ can rotate its queries."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import ConfigError, unknown_name
from ...nn.transformer import Attention
from .attention_call_target import AttentionCallTarget
from .fused_projection_target import FusedProjectionTarget
from .multihead_target import MultiheadRotationTarget
from .rotation_target import (
    AttentionRotationTarget,
    ForeignTarget,
    ProjectionRotationTarget,
    RotationTarget,
    is_linear,
    out_features,
)

SEPARATE = (
    ("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("to_q", "to_k"), ("q_lin", "k_lin"), ("wq", "wk"),
    ("Wq", "Wk"), ("query_proj", "key_proj"), ("linear_q", "linear_k"), ("q_linear", "k_linear"), ("fc_q", "fc_k"),
)  # fmt: skip
"""Names of separate query and key projections."""
FUSED = ("qkv", "qkv_proj", "Wqkv", "to_qkv", "in_proj", "c_attn", "query_key_value")
"""Names of one projection to queries, keys and values."""
BY_HEAD = ("GPTNeoX", "Bloom", "Persimmon")
"""Beginnings of the classes whose fused projection returns query, key and value of each head in turn."""
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_query_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "norm_q", "norm_k", "q_ln", "k_ln")
ROTARY_ARGUMENTS = {"position_embeddings", "rope", "rotary_pos_emb", "rotary_emb", "freqs_cis", "cos"}
ROTARY_MODULES = ("rotary_emb", "rotary", "rope", "rotary_embedding")


def find_rotation_target(
    layer: nn.Module, query: str | None, key: str | None, num_heads: int | None, names: Sequence[str] | None,
    module: str | None = None,
) -> RotationTarget:  # fmt: skip
    """Returns the rotation target for the arguments of RollingQ.

    Raises:
        ConfigError: arguments are missing, there is no attention or several attention modules, or the layer already has
            a RollingQ.
    """
    if module is not None:
        modules = dict(layer.named_modules())
        if module not in modules:
            raise unknown_name("RollingQ", "module", module, [name for name in modules if name])
        layer = modules[module]
    if isinstance(layer, Attention):
        target: RotationTarget = AttentionRotationTarget(layer, names)
    elif query and key:
        target = ProjectionRotationTarget(layer, query, key, num_heads, names)
    else:
        target = _foreign_target(_only_attention(layer), num_heads, names)
    if len(target.names) < 2:
        raise ConfigError(
            "RollingQ",
            expected="a layer whose queries attend to two or more modalities",
            got=f"names = {target.names}",
            fix="Build the model first (FusionModel sets the names), or pass names=(...).",
        )
    if isinstance(getattr(target.host_module, "rolling", None), nn.Module):
        raise ConfigError(
            "RollingQ",
            expected="a layer without a RollingQ",
            got="a layer that already has one",
            fix="Call fold or detach on it first.",
        )
    return target


def _only_attention(layer: nn.Module) -> nn.Module:
    """Returns the layer if it is an attention module, else the only one inside it."""
    matches = {name: part for name, part in layer.named_modules() if _is_attention(part)}
    matches = {n: part for n, part in matches.items() if not any(o != n and _holds(o, n) for o in matches)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if not matches:
        raise ConfigError(
            "RollingQ",
            expected="an equipoise Attention layer, or a module with the names of its projections",
            got=type(layer).__name__,
            fix='Pass query="q_proj", key="k_proj", num_heads=..., names=(...).',
        )
    few = ", ".join(list(matches)[:4]) + (", ..." if len(matches) > 4 else "")
    raise ConfigError(
        "RollingQ",
        expected="one attention module",
        got=f"{type(layer).__name__} with {len(matches)}: {few}",
        fix=f'Name the one to rotate: module="{list(matches)[-1]}".',
    )


def _is_attention(part: nn.Module) -> bool:
    if isinstance(part, nn.MultiheadAttention):
        return True
    return _separate(part) is not None or _fused(part) is not None


def _holds(outer: str, inner: str) -> bool:
    return not outer or inner.startswith(f"{outer}.")


def _separate(part: nn.Module) -> tuple[str, str] | None:
    children = dict(part.named_children())
    pairs = ((q, k) for q, k in SEPARATE if is_linear(children.get(q)) and is_linear(children.get(k)))
    return next(pairs, None)


def _fused(part: nn.Module) -> str | None:
    # Other modules, such as Mamba, also have an "in_proj"; only attention has a number of heads.
    children = dict(part.named_children())
    return next((name for name in FUSED if is_linear(children.get(name)) and _number(part, HEADS)), None)


def _number(part: nn.Module, names: Sequence[str]) -> int | None:
    """The first of these attributes of the module or its configuration that is a number."""
    for holder in (part, getattr(part, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _foreign_target(part: nn.Module, num_heads: int | None, names: Sequence[str] | None) -> ForeignTarget:
    if isinstance(part, nn.MultiheadAttention):
        return MultiheadRotationTarget(part, names)
    head_dim = _number(part, ("head_dim", "attention_head_size", "dim_head"))
    heads = num_heads or _number(part, HEADS)
    children: dict[str, Any] = dict(part.named_children())
    between = _between(part)
    pair = _separate(part)
    if pair is not None:
        query = children[pair[0]]
        width = out_features(query)
        if num_heads is None and head_dim is not None and width % head_dim == 0:
            heads = width // head_dim
        if between and heads and width % heads == 0:
            return AttentionCallTarget(part, query, heads=heads, head_dim=width // heads, names=names, why=between)
        target = ProjectionRotationTarget(part, *pair, heads, names)
        target.default_rows = "all"
        return target
    name = _fused(part)
    assert name is not None
    assert heads is not None
    if name == "query_key_value" and not type(part).__name__.startswith(BY_HEAD):
        raise ConfigError(
            "RollingQ", expected="a fused projection whose order of queries, keys and values is known",
            got=f"'{name}' of {type(part).__name__}", fix="Split the projection into separate linear layers.",
        )  # fmt: skip
    width = out_features(children[name])
    key_heads = _number(part, KEY_HEADS) or heads
    head_dim = head_dim or width // (heads + 2 * key_heads)
    if between:
        return AttentionCallTarget(part, children[name], heads=heads, head_dim=head_dim, names=names, why=between)
    return FusedProjectionTarget(
        children[name], name, heads=heads, head_dim=head_dim, key_heads=key_heads,
        by_head=name == "query_key_value", names=names,
    )  # fmt: skip


def _between(part: nn.Module) -> str:
    """Returns the name of the operation that changes the queries between projection and attention, or \"\"."""
    norms = (getattr(part, name, None) for name in NORMS)
    if any(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in norms):
        return "the norms of queries and keys"
    arguments = inspect.signature(part.forward).parameters
    modules = (getattr(part, name, None) for name in ROTARY_MODULES)
    if ROTARY_ARGUMENTS & set(arguments) or any(isinstance(module, nn.Module) for module in modules):
        return "the rotary positions"
    return ""
