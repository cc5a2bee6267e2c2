"""``watch``: which share of attention every layer and head of a model gives to every modality."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import ConfigError
from .attention_record import AttentionRecord
from .encoder_submodules import unimodal_encoders
from .equipoise_interceptor import has_own_layers, intercept_own_layers
from .generation_loops import decoding_loops
from .huggingface_interceptor import intercept_huggingface
from .multihead_interceptor import intercept_multihead
from .recording_session import Interceptor, RecordingSession
from .submodels import is_pretrained_model
from .token_labels import TokenLabeler, UserLabels, check_labels, check_queries
from .token_map import CompositeLabeler, TokenMap
from .torch_function_interceptor import intercept_torch_functions
from .unrecorded_layers import Noting, find_unrecorded_layers


@contextmanager
def watch(
    model: nn.Module,
    *,
    modality: Int[Tensor, " key"] | Int[Tensor, "batch key"] | None = None,
    names: Sequence[str] | None = None,
    queries: str | Bool[Tensor, "batch query"] = "all",
    sites: Sequence[str] | str | None = None,
    tokens: bool = False,
) -> Iterator[AttentionRecord]:
    """Watches the attention of any model while it runs in the block.

    share^m = mean over the watched queries of sum_{j in m} A_ij: exact, of the attention before dropout, for every
    sample and head. No attention matrix is built where the model builds none, outputs stay what they are bit for bit,
    and when the block is left, also by an exception, the model is as it was. Only what ``torch.compile`` has compiled
    runs uncompiled in the block, in all threads, and its output may differ by rounding.

    Ways in, chosen at each place and told by ``seen.ways``: equipoise's own layers; ``nn.MultiheadAttention`` and
    ``nn.TransformerEncoder``, fast path included; ``F.scaled_dot_product_attention``; attention written out with a
    softmax over keys; transformers' attention interface with whatever backend the model has.

    Args:
        model: any module; not a scripted or exported one.
        modality: (key,) or (batch, key) label of every key, an index into ``names``, -1 = special. Not needed for
            fusions of equipoise, which know, and for Hugging Face models, where ``mm_token_type_ids`` or the
            placeholders' ids in the configuration tell; where a model is given one, it goes before these.
        names: of the modalities; for Hugging Face models some of text, image, video, audio.
        queries: whose attention: ``"all"`` that are not padding; ``"last"``, which writes the next token (in
            ``generate``, the mean over those that wrote the answer); ``"answer"``, those whose next token has a label,
            else like ``"last"``; a modality's name; or True for the watched in a mask (batch, query).
        sites: names or patterns (``"*.layers.1?.*"``) of the modules to watch; all by default.
        tokens: also keep attention on every single key, at the price of a pass of its own.

    Yields:
        Seen, which fills while the model runs in the thread that opened the block, or in one that is started in it.
        Batches that follow one another are further samples. Under ``generate`` the samples are the returned sequences,
        and only the queries that they hold count, each once: no padding after the end, no beams or drafts that were
        dropped. Decoding loops of your own (``custom_generate``) are reported in ``seen.missing``.

    Raises:
        ConfigError: a scripted or exported model, unknown queries, names that do not fit; afterward, from ``seen``,
            attention that stayed hidden, with what cannot be seen and why.

    A share is no proof of use: values may be small or cancel, some tokens are sinks. Test causally before concluding.

    Reference: spec 8.1; RollingQ (ICML 2025) measures the class row of its fusion layer alone.

    Example:
        >>> import torch
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> with watch(layer, modality=torch.tensor([0, 0, 1]), names=("audio", "image")) as seen:
        ...     _ = layer(*[torch.zeros(5, 3, 8)] * 3)
        >>> seen.share("MultiheadAttention")[0]
        tensor([[0.6667, 0.3333],
                [0.6667, 0.3333]])
    """
    labeler, ways, follow = labels_for(model, modality, names)
    seen = AttentionRecord(labeler, check_queries(queries, labeler.names), tokens=tokens)
    with open_session(model, labeler, ways, follow, seen, sites) as session:
        seen.session = session
        yield seen
    if (session.called or session.threads.elsewhere) and not seen.complete:
        warnings.warn(str(seen.nothing()), stacklevel=3)
    elif seen.missing:
        warnings.warn(f"watch: {seen.missing_in_words()}.", stacklevel=3)


Way = Callable[[RecordingSession], AbstractContextManager[None]]
HUGGING_FACE: tuple[Way, ...] = (intercept_torch_functions, intercept_huggingface, intercept_multihead, decoding_loops)


def labels_for(
    model: nn.Module, modality: Any, names: Sequence[str] | None
) -> tuple[TokenLabeler, tuple[Way, ...], list[Way]]:
    """Who knows the modality of this model's keys, which ways lead in, and what has to be followed besides."""
    ways: tuple[Way, ...]
    if not isinstance(model, nn.Module):
        raise ConfigError("watch", expected="a torch.nn.Module", got=type(model).__name__)
    given = None if modality is None else check_labels(modality)
    roots = [] if has_own_layers(model) else is_pretrained_model(model)
    if len(roots) == 1 and _is_all(model, roots[0]):
        whole = TokenMap(roots[0], given, names)
        return whole, (whole.tracing, *HUGGING_FACE), [whole.following]
    if roots:
        maps = [TokenMap.inside(root, given if len(roots) == 1 else None, names) for root in roots]
        labeler = CompositeLabeler(UserLabels(given, names), maps)
        ways = (*(part.tracing for part in maps), *HUGGING_FACE)
        return labeler, ways, [part.following for part in maps]
    ways = (intercept_own_layers,) if has_own_layers(model) else ()
    if given is not None or not ways:
        ways = (*ways, intercept_torch_functions, intercept_multihead)
    return UserLabels(given, names, unimodal_encoders(model)), ways, []


def _is_all(model: nn.Module, root: nn.Module) -> bool:
    """Whether nothing but wrappers stands around a model: all that learns is inside."""
    inside = {id(part) for part in root.parameters()}
    return all(id(part) in inside for part in model.parameters())


@contextmanager
def open_session(
    model: nn.Module, labeler: TokenLabeler, ways: tuple[Way, ...], follow: list[Way], handler: Interceptor,
    sites: Sequence[str] | str | None = None,
) -> Iterator[RecordingSession]:  # fmt: skip
    """A session over a model, open while the block runs."""
    patterns = [sites] if isinstance(sites, str) else sites
    noting = Noting(labeler)
    session = RecordingSession(model, noting, handler, sites=patterns)
    with find_unrecorded_layers(session, noting, handler, patterns), session.open(*ways, *follow):
        yield session
