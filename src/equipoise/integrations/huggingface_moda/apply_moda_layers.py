"""`apply_moda`: MODA in a Hugging Face model."""

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
    """Puts MODA into every attention of a Hugging Face model in which modalities meet.

    The model is changed in place: each such attention gets a submodule ``moda``, and its keys pass through it after
    their rotation and before they are cached, so that decoding with a cache equals one pass. Untrained, with the
    defaults, the model computes exactly what it did. No class or configuration is replaced: generation, LoRA,
    Trainer and `eq.watch`, which sees the aligned keys, go on as before.

    Args:
        model: a Hugging Face model, or a module that holds one, such as a PEFT model.
        modality: labels of the prompt's tokens, (key,) or (batch, key), -1 = special or padding; tokens that follow are
            text. By default the model's inputs tell them. ``modality`` of what is returned sets them for another batch.
        names: of the modalities; needed with ``modality``.
        basis, norm, normalize_keys, fuse, mix, basis_scope: see `DuplexAligner`.
        directions: names of the modalities whose keys change; None = all.
        prefix: where the bases' keys end with ``basis_scope="prefix"``, the default of a decoder. ``"other"`` is the
            last token that is of another modality than the sample's last token, such as the last picture.
            ``"prompt"`` is the last one before the first label in training, and all of the prompt when generating.
        merge: how self and cross attention are joined; see `modular_attention`. Others than "mass" change the model
            from the start on.
        pseudo: pseudo-attention, which changes it too; give it a ``reference`` to decode as in one pass.
        freeze: only MODA's parameters train, until it is removed. A PEFT model is taken as it is, LoRA and all.

    Returns:
        Moda, with ``parameters()``, ``save(path)``, ``load(path)``, ``names``, ``layers`` and ``remove()``.

    Raises:
        ConfigError: a model in which no modalities meet, that has MODA already, or that computes attention by itself;
            at a forward pass, tokens whose modality cannot be known.

    Keys within the prefix are aligned with all of the prefix, so what is predicted inside of it knows of later tokens;
    what is predicted after it does not. ``basis_scope="causal"`` leaks nowhere and costs a basis for each key;
    ``"all"``, as published, lets every key know the answer.

    Reference: MODA (ICML 2025); spec 5.
    Differs from the released code in: that aligns image keys alone, with future text, after they are cached, so that
    decoding reads other keys than training; its new matrix starts far from the identity.

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
