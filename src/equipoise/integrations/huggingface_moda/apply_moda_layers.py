"""``apply_moda`` adds MODA to a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from ...errors import unknown_name
from ...nn.attention.modular import Merge, PseudoAttention
from ...nn.duplex.duplex_aligner import Fuse, Mix, Scope
from ...nn.duplex.modality_bases import Basis, Norm
from .moda_adapter import MODAAdapter

Prefix = Literal["other", "prompt"]


def apply_moda(
    model: nn.Module, *, modality: Tensor | None = None, names: Sequence[str] | None = None, basis: Basis = "gram",
    norm: Norm = "row", normalize_keys: bool = True, fuse: Fuse = "concat", directions: Sequence[str] | None = None,
    mix: Mix = "uniform", basis_scope: Scope | None = None, prefix: Prefix = "other", merge: Merge = "mass",
    pseudo: PseudoAttention | None = None, freeze: bool = True,
) -> MODAAdapter:  # fmt: skip
    """Adds MODA to every attention layer of a Hugging Face model whose keys have several modalities.

    The model is modified in place: each such layer gets a submodule ``moda`` that transforms its keys after the rotary
    embedding and before they are cached, so that decoding with a cache equals one forward pass. With the defaults, an
    untrained MODA does not change the output. No class or configuration is replaced: generation, LoRA, Trainer and
    ``eq.watch`` (which records the aligned keys) work as before.

    Args:
        model: a Hugging Face model, or a module that holds one, such as a PEFT model.
        modality: labels of the prompt's tokens, (key,) or (batch, key), -1 = special or padding; generated tokens are
            text. By default they are derived from the inputs. Set ``modality`` of the adapter for another batch.
        names: modality names; required with ``modality``.
        basis, norm, normalize_keys, fuse, mix, basis_scope: see `DuplexAligner`.
        directions: names of the modalities whose keys change; None = all.
        prefix: where the bases' keys end with ``basis_scope="prefix"``, the default of a decoder. ``"other"`` is the
            last token whose modality differs from that of the sample's last token, such as the last image token.
            ``"prompt"`` is the last token before the first label in training, and the whole prompt in generation.
        merge: how self- and cross-attention are merged; see `modular_attention`. Values other than "mass" change the
            output before training.
        pseudo: pseudo-attention, which also changes the output; set its ``reference`` for decoding to equal one pass.
        freeze: train only MODA's parameters until it is removed. LoRA parameters of a PEFT model stay trainable.

    Returns:
        MODAAdapter, with ``parameters()``, ``save(path)``, ``load(path)``, ``names``, ``layers`` and ``remove()``.

    Raises:
        ConfigError: a model without multimodal attention, with MODA applied already, or with its own attention code;
            in a forward pass, tokens of unknown modality.

    Keys within the prefix are aligned with the whole prefix, so predictions inside the prefix depend on later tokens;
    predictions after it do not. ``basis_scope="causal"`` never does, but computes a basis for each key;
    ``"all"``, as published, makes every key depend on the answer.

    Reference: MODA (ICML 2025).
    Differs from the released code in: that code aligns only image keys, with future text and after caching, so that
    decoding uses other keys than training; its new matrix is initialized far from the identity.

    Example:
        >>> import transformers
        >>> config = transformers.LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> moda = apply_moda(transformers.LlamaForCausalLM(config))
        >>> sum(parameter.numel() for parameter in moda.parameters())
        32
    """
    options = {
        "basis": basis, "norm": norm, "normalize_keys": normalize_keys, "fuse": fuse, "mix": mix,
        "basis_scope": basis_scope,
    }  # fmt: skip
    if prefix not in get_args(Prefix):
        raise unknown_name("apply_moda", "prefix", str(prefix), get_args(Prefix))
    if merge not in get_args(Merge):
        raise unknown_name("apply_moda", "merge", str(merge), get_args(Merge))
    return MODAAdapter(
        model, modality=modality, names=names, directions=directions, prefix=prefix, merge=merge, pseudo=pseudo,
        freeze=freeze, options=options,
    )  # fmt: skip
