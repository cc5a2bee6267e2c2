"""Inspects encoder-decoder models, whose decoder reads an image or a sound by cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..recording import AttentionCall, LabeledKeys, labels_for, open_session
from ..recording.share_measurement import explicit_attention
from .attention_maps import WHOLE, AttentionMaps
from .attention_trace import TraceReader
from .encoder_prompts import EncodedPrompt
from .inspection_result import InspectedToken, InspectionView, SinkToken
from .media_effects import MediaEffect, mean_log_likelihood
from .patch_layout import PatchGrid, patch_grid
from .prompt_inputs import Inputs


class CrossAttention(NamedTuple):
    """What the decoder reads from the encoder.

    Attributes:
        views, layers, tokens, maps, grid: as in ``Inspection``; maps weigh attention by the norm of the values.
        written: (layer,) norm of the output of each cross-attention, relative to the sum with that of the
            self-attention of the same layer; mean over the queries that predict the answer.
    """

    views: dict[str, InspectionView]
    layers: tuple[str, ...]
    tokens: tuple[InspectedToken, ...]
    maps: AttentionMaps
    grid: PatchGrid | None
    written: tuple[float, ...]


class CrossTrace:
    """Handler that keeps the attention of all decoder queries on the encoder's outputs, weighted by value norms.

    Args:
        decoder: name of the decoder; attention of other modules is ignored.
        queries: number of decoder queries.

    Attributes:
        rows, weighted: layer -> (head, query, key).
        labels: (key,) modality index of each encoder position.
    """

    replaces_output = False

    def __init__(self, decoder: str, queries: int) -> None:
        self._prefix, self._queries = f"{decoder}.", queries
        self.rows: dict[str, Tensor] = {}
        self.weighted: dict[str, Tensor] = {}
        self.own: list[str] = []
        self.names: tuple[str, ...] = ()
        self.labels = torch.empty(0, dtype=torch.long)

    def on_attention(self, layer: str, backend: str, call: AttentionCall, known: LabeledKeys) -> None:
        if not layer.startswith(self._prefix) or call.sizes[0] != 1 or call.sizes[2] != self._queries:
            return
        if known.own:
            self.own.append(layer)
            return
        attention = torch.cat(list(explicit_attention(call)), dim=2)[0].float().cpu()
        norms = call.value[0].float().norm(dim=-1).cpu()
        norms = norms.repeat_interleave(len(attention) // len(norms), dim=0)
        weighted = attention * norms[:, None]
        self.rows[layer] = attention
        self.weighted[layer] = weighted / weighted.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        self.names, self.labels = known.names, known.keys.cpu().expand(1, call.sizes[3])[0]

    def replace_output(self, layer: str, call: AttentionCall, known: LabeledKeys) -> None:
        return None

    def on_missing(self, layer: str, reason: str) -> None:
        return None


def trace_cross_attention(
    model: Any, prompt: EncodedPrompt, written: Int[Tensor, "1 token"], texts: Sequence[str], exclude_top_k: int,
    target: str, encoder_texts: Sequence[str] | None, layers: Sequence[str] | str | None,
) -> tuple[float, CrossAttention]:  # fmt: skip
    """Runs prompt and answer through the model; returns the log-likelihood of the answer and the attention."""
    ids = torch.cat([prompt.start, written.to(prompt.start)], dim=1)
    logits, trace = record_cross_attention(model, {**prompt.inputs, "decoder_input_ids": ids}, layers)
    names, labels = trace.names, trace.labels
    mask = prompt.inputs.get("attention_mask")
    if mask is not None and mask.shape == (1, len(labels)):
        kept = mask[0].cpu() != 0
        labels = labels[kept]
        trace.rows, trace.weighted = (
            {layer: rows[..., kept] for layer, rows in part.items()} for part in (trace.rows, trace.weighted)
        )
    sites = tuple(trace.rows)
    positions, length = torch.arange(ids.shape[1]), prompt.start.shape[1]
    groups = {"answer": (positions >= length - 1) & (positions < len(positions) - 1), "prompt": positions < length}
    hot = (labels[:, None] == torch.arange(len(names))).float()
    uniform = (hot.sum(dim=0) / hot.sum().clamp(min=1)).expand(len(sites), -1)
    encoded = _encoder_tokens(labels, names, encoder_texts)
    views = {}
    for part in ("prompt", "answer"):
        mean = {layer: rows[:, groups[part]].mean(dim=1) for layer, rows in trace.rows.items()}
        share = torch.stack([mean[layer] @ hot for layer in sites])
        rest = []
        for layer in sites:
            few = mean[layer].clone()
            few[:, mean[layer].mean(dim=0).topk(min(exclude_top_k, few.shape[1])).indices] = 0
            part_of = few @ hot
            rest.append(part_of / part_of.sum(dim=-1, keepdim=True).clamp(min=1e-12))
        total = torch.stack([mean[layer].mean(dim=0) for layer in sites]).mean(dim=0)
        sinks = tuple(
            SinkToken(place, encoded[place].text, encoded[place].modality, float(total[place]))
            for place in total.topk(min(exclude_top_k, len(total))).indices.tolist()
        )
        views[part] = InspectionView(share, torch.stack(rest), uniform, sinks)
    readers, maps = _maps(trace, sites, groups, texts, length)
    tokens = (
        *encoded,
        *(InspectedToken(text, "text", "prompt" if n < length else "answer") for n, text in enumerate(texts)),
    )
    count = int((labels == names.index(target)).sum())
    grid = _grid(count, prompt.inputs, model.config, target)
    # Readers are positions in all tokens.
    moved = tuple(one if one.place is None else one._replace(place=one.place + len(encoded)) for one in readers)
    share_written = _written(model, prompt, ids, trace, groups["answer"])
    return mean_log_likelihood(logits[0], written[0]), CrossAttention(
        views, sites, tokens, maps._replace(readers=moved), grid, share_written
    )


def record_cross_attention(
    model: Any, inputs: Inputs, layers: Sequence[str] | str | None = None
) -> tuple[Float[Tensor, "1 token word"], CrossTrace]:
    """Runs one sample through the model; returns its logits and the attention of the decoder.

    Raises:
        ConfigError: no cross-attention was recorded.
    """
    labeler, ways, follow = labels_for(model, None, None)
    decoder = next(name for name, part in model.named_modules() if part is model.get_decoder())
    # Layers of compiled models have the names of the wrapped model.
    decoder = decoder.removeprefix("_orig_mod.")
    trace = CrossTrace(decoder, inputs["decoder_input_ids"].shape[1])
    with open_session(model, labeler, ways, follow, trace, layers or [f"{decoder}.*"]):
        logits = model(**inputs, use_cache=False).logits
    if not trace.rows:
        raise ConfigError("look", expected="a decoder with cross-attention", got="none recorded",
                          fix="Check layers=, or use eq.watch.")  # fmt: skip
    return logits, trace


def cross_effects(
    model: nn.Module, prompt: EncodedPrompt, answer: Int[Tensor, "1 token"], whole: float
) -> list[MediaEffect]:
    """Effects of hidden modalities, averaged attention and blank media on the log-likelihood of the answer."""
    from ..diagnostics.answer_likelihood import IGNORED, answer_effects

    ids = torch.cat([prompt.start, answer.to(prompt.start)], dim=1)
    labels = ids[:, 1:].clone()
    labels[:, : prompt.start.shape[1] - 1] = IGNORED
    inputs = {"decoder_input_ids": ids[:, :-1], "use_cache": False}
    descriptions = {"mask": "{} hidden", "quag": "QUAG {}"}
    effects = [
        MediaEffect(descriptions[row["change"]].format(row["of"]), row["log_likelihood"], -row["drop"])
        for row in answer_effects(model, {**prompt.inputs, **inputs}, labels) if row["change"] in descriptions
    ]  # fmt: skip
    for name, blank in prompt.blank.items():
        logits = model(**blank, decoder_input_ids=ids, use_cache=False).logits
        value = mean_log_likelihood(logits[0], answer[0])
        effects.append(MediaEffect(f"blank {name}", value, value - whole))
    return effects


def _encoder_tokens(labels: Tensor, names: Sequence[str], texts: Sequence[str] | None) -> list[InspectedToken]:
    if texts is None or len(texts) != len(labels):
        texts = [f"position {n}" for n in range(len(labels))]
    kinds: list[int] = labels.tolist()
    return [
        InspectedToken(text, names[label] if label >= 0 else None, "prompt")
        for text, label in zip(texts, kinds, strict=True)
    ]


def _maps(
    trace: CrossTrace, sites: Sequence[str], groups: dict[str, Tensor], texts: Sequence[str], length: int
) -> tuple[tuple[TraceReader, ...], AttentionMaps]:
    places = [(n, n if n < length else n - 1) for n in range(len(texts))]
    readers = (
        *(TraceReader(text, part) for part, text in WHOLE.items()),
        *(TraceReader(texts[n], "prompt" if n < length else "answer", n, query) for n, query in places),
    )
    rows = []
    for layer in sites:
        weighted = trace.weighted[layer]
        whole = torch.stack([weighted[:, groups[part]].mean(dim=1) for part in WHOLE])
        single = weighted[:, [query for _, query in places]].transpose(0, 1)
        rows.append(F.pad(torch.cat([whole, single]), (0, len(texts))))
    heads = torch.stack(rows, dim=1)
    mean, count = heads.mean(dim=2), len(heads) if heads.numel() <= 1_500_000 else 1
    return readers, AttentionMaps(readers, tuple(range(len(sites))), mean.half(), heads[:count].half())


def _grid(count: int, inputs: Inputs, config: Any, target: str) -> PatchGrid | None:
    if (patches := inputs.get("flattened_patches")) is not None:
        # Pix2Struct begins each patch with its row and column, from 1; padding has 0.
        rows, columns = (int(size) for size in patches[0, :, :2].max(dim=0).values)
        if rows * columns == count:
            return PatchGrid(rows, columns, True, f"{rows} rows of {columns} patches, from the processor")
    return patch_grid(count, inputs, config, target) if count else None


@torch.no_grad()
def _written(
    model: Any, prompt: EncodedPrompt, ids: Tensor, trace: CrossTrace, queries: Tensor
) -> tuple[float, ...]:  # fmt: skip
    norms: dict[str, Float[Tensor, " query"]] = {}

    def keep(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            norms[layer] = first[0].float().norm(dim=-1).cpu()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in (*trace.rows, *trace.own)]
    try:
        model(**prompt.inputs, decoder_input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    fractions = []
    for layer in trace.rows:
        # The self-attention of the same layer has the same parent module, or its parent's parent.
        parents = (layer.rpartition(".")[0], layer.rpartition(".")[0].rpartition(".")[0])
        own = next((name for parent in parents for name in trace.own if name.startswith(f"{parent}.")), None)
        if own is None or layer not in norms or own not in norms:
            fractions.append(float("nan"))
            continue
        fraction = norms[layer] / (norms[layer] + norms[own]).clamp(min=1e-12)
        fractions.append(float(fraction[queries].mean()))
    return tuple(fractions)
