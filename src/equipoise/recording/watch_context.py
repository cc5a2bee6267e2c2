"""``watch``: records the attention of each layer and head of a model on each modality."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import ConfigError
from .attention_record import AttentionRecord
from .composite_labeler import CompositeLabeler
from .confirmed_labels import label_block
from .encoder_submodules import unimodal_encoders
from .equipoise_interceptor import has_own_layers, intercept_own_layers
from .generation_loops import decoding_loops
from .huggingface_interceptor import intercept_huggingface
from .multihead_interceptor import intercept_multihead
from .recording_session import AttentionHandler, RecordingSession
from .submodels import outermost_pretrained_models
from .token_labels import TokenLabeler, UserLabels, check_labels, check_queries
from .token_map import TokenMap
from .torch_function_interceptor import intercept_torch_functions
from .unrecorded_layers import TrackingLabeler, find_unrecorded_layers


@contextmanager
def watch(
    model: nn.Module,
    *,
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"] | None = None,
    names: Sequence[str] | None = None,
    queries: str | Bool[Tensor, "batch query"] = "all",
    layers: Sequence[str] | str | None = None,
    tokens: bool = False,
) -> Iterator[AttentionRecord]:
    """Records the attention of a model on each modality while the block runs.

    share^m = mean over queries of sum_{j in m} A_ij, where A is the attention before dropout: exact, for every sample
    and head. No attention matrix is built if the model builds none, outputs are unchanged bit for bit, and the model is
    restored when the block exits, also after an exception. Code compiled with ``torch.compile`` runs uncompiled in the
    block, in all threads, so that its outputs may differ by rounding.

    Attention is intercepted in equipoise's own layers, ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` (fast
    path included), ``F.scaled_dot_product_attention``, softmax over keys, and transformers' attention interface with
    any backend; ``record.backends`` has the one used by each layer.

    Args:
        model: any module that is not scripted or exported.
        modality: (key,) or (batch, key) label of each key, an index into ``names``; -1 = special. Not needed for the
            fusions of equipoise, nor for Hugging Face models whose ``mm_token_type_ids`` or placeholder tokens identify
            the modalities; labels passed here take precedence.
        names: modality names; for Hugging Face models a subset of text, image, video, audio.
        queries: queries to average over: ``"all"`` except padding; ``"last"``, which predicts the next token (under
            ``generate``, the mean over the queries that generated the answer); ``"answer"``, those whose next token has
            a label, else as ``"last"``; a modality name; or a boolean mask (batch, query).
        layers: names or patterns (``"*.layers.1?.*"``) of the modules to record; all by default.
        tokens: also records the attention on each key; computes the scores a second time.

    Yields:
        AttentionRecord, filled while the model runs in the thread that entered the block or in threads started in the
        block. Successive batches are appended as further samples. Under ``generate`` the samples are the returned
        sequences, and only their queries are recorded, each once: no padding after the end, no discarded beams or draft
        tokens. Custom decoding loops (``custom_generate``) are listed in ``record.missing``.

    Raises:
        ConfigError: a scripted or exported model, unknown queries, names that do not match the labels. The methods of
            the record raise it if no attention was recorded.

    Warns:
        UserWarning: at the end of the block, for layers without attribution; ``record.missing`` has the reasons.

    Attention does not prove use: values may be small or cancel, and some tokens are attention sinks. Use the causal
    tests of ``eq.diagnostics`` before drawing conclusions.

    Reference: RollingQ (ICML 2025), which reports the share of the class token in its fusion layer.

    Example:
        >>> import torch
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> with watch(layer, modality=torch.tensor([0, 0, 1]), names=("audio", "image")) as record:
        ...     _ = layer(*[torch.zeros(5, 3, 8)] * 3)
        >>> record.share("MultiheadAttention")[0]
        tensor([[0.6667, 0.3333],
                [0.6667, 0.3333]])
    """
    labeler, interceptors, observers = labels_for(model, modality, names)
    record = AttentionRecord(labeler, check_queries(queries, labeler.names), tokens=tokens)
    with open_session(model, labeler, interceptors, observers, record, layers) as session:
        record.session = session
        yield record
    if (session.called or session.threads.unrecorded) and not record.complete:
        warnings.warn(str(record.nothing()), stacklevel=3)
    elif record.missing:
        warnings.warn(f"watch: {record.missing_summary()}.", stacklevel=3)


InterceptorFactory = Callable[[RecordingSession], AbstractContextManager[None]]
HUGGING_FACE: tuple[InterceptorFactory, ...] = (
    intercept_torch_functions, intercept_huggingface, intercept_multihead, decoding_loops,
)  # fmt: skip


def labels_for(
    model: nn.Module, modality: Any, names: Sequence[str] | None
) -> tuple[TokenLabeler, tuple[InterceptorFactory, ...], list[InterceptorFactory]]:
    """Returns the labeler of a model's keys, the interceptors of its attention, and the observers of its inputs."""
    interceptors: tuple[InterceptorFactory, ...]
    if not isinstance(model, nn.Module):
        raise ConfigError("watch", expected="a torch.nn.Module", got=type(model).__name__)
    labels = None if modality is None else check_labels(modality)
    if labels is None and names is None and (block := label_block(model)) is not None and block.confirmed:
        token_map = block.shared("map", lambda: TokenMap(outermost_pretrained_models(model)[0], traced=False))
        return token_map, (intercept_huggingface, intercept_multihead, decoding_loops), [token_map.following]
    adapted = next((part for part in model.modules() if hasattr(part, "key_labeler")), None)
    if adapted is not None and labels is None:
        # Foreign models of `eq.adapt`, which measure the labels of their keys.
        labeler, interceptors = adapted.key_labeler()  # type: ignore[operator]
        return labeler, interceptors, []
    roots = [] if has_own_layers(model) else outermost_pretrained_models(model)
    if len(roots) == 1 and _is_all(model, roots[0]):
        token_map = TokenMap(roots[0], labels, names)
        return token_map, (token_map.tracing, *HUGGING_FACE), [token_map.following]
    if roots:
        maps = [TokenMap.inside(root, labels if len(roots) == 1 else None, names) for root in roots]
        labeler = CompositeLabeler(UserLabels(labels, names), maps)
        interceptors = (*(part.tracing for part in maps), *HUGGING_FACE)
        return labeler, interceptors, [part.following for part in maps]
    interceptors = (intercept_own_layers,) if has_own_layers(model) else ()
    interceptors = (*interceptors, intercept_torch_functions, intercept_multihead)
    return UserLabels(labels, names, unimodal_encoders(model)), interceptors, []


def _is_all(model: nn.Module, root: nn.Module) -> bool:
    """Whether ``root`` holds all parameters of ``model``, so that the modules around it are only wrappers."""
    inside = {id(part) for part in root.parameters()}
    return all(id(part) in inside for part in model.parameters())


@contextmanager
def open_session(
    model: nn.Module, labeler: TokenLabeler, interceptors: tuple[InterceptorFactory, ...],
    observers: list[InterceptorFactory], handler: AttentionHandler, layers: Sequence[str] | str | None = None,
) -> Iterator[RecordingSession]:  # fmt: skip
    """Opens a recording session for a model while the block runs."""
    patterns = [layers] if isinstance(layers, str) else layers
    tracking = TrackingLabeler(labeler)
    session = RecordingSession(model, tracking, handler, layers=patterns)
    if (block := label_block(model)) is not None:
        block.sessions.append((labeler, session))
    unrecorded = find_unrecorded_layers(session, tracking, handler, patterns)
    known = block is not None and block.confirmed
    with nullcontext() if known else unrecorded, session.open(*interceptors, *observers):
        yield session
