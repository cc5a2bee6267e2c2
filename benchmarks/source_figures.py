"""Small experiments on parts of the source documents that no recipe covers: a figure and a table each, with a control.

    python benchmarks/source_figures.py pseudo --out figures        pseudo-attention (MODA): digits, causal transformer
    python benchmarks/source_figures.py sparse --out figures        sparse attention patterns: digits
    python benchmarks/source_figures.py weights --out figures       weights of the losses of modalities: digits
    python benchmarks/source_figures.py hard --out figures          hard negatives: emoji, dual encoder
    python benchmarks/source_figures.py qformer --out figures       the three losses of a Q-Former: emoji
    python benchmarks/source_figures.py time --out figures          alignment in time: two_rates

Each trains every variant with ``--seeds`` seeds on bundled or generated data, on one thread, evaluates the last epoch
on the test split, and writes STUDY.json and STUDY.png. Differences from the first variant, the control, are paired on
seeds (two-sided t-test, not corrected for the number of variants). No option was tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise as eq
from equipoise import data
from equipoise.alignment.connectors import sparse_patterns as patterns
from equipoise.alignment.losses.loss_weighting import FixedWeights, UncertaintyWeights
from equipoise.alignment.losses.qformer_losses import query_similarity
from equipoise.encoders import ConvEncoder, PatchEncoder, SequenceEncoder, TextEncoder
from equipoise.models.dual_encoder import DualEncoder
from equipoise.nn.attention.pseudo_attention import PseudoAttention
from equipoise.training import recipes
from equipoise.training.run import execute_run
from equipoise.training.run_spec import RunSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
DIM, HEADS = 48, 4
TOKENS = 16
"""Tokens of each modality of the digits."""


def train(model: nn.Module, source: data.Dataset, loss: Callable[[dict], Tensor], seed: int, epochs: int, batch: int):
    """Trains with AdamW and a learning rate that decreases to 0."""
    loader = data.loader(source, "train", batch, seed=seed, train=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for inputs in loader:
            optimizer.zero_grad()
            loss(inputs).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def test_batches(source: data.Dataset) -> Iterable[dict[str, Any]]:
    return data.loader(source, "test", 256, seed=0, train=False)


@torch.no_grad()
def accuracy(predict: Callable[[dict], Tensor], source: data.Dataset) -> float:
    right = [(predict(batch).argmax(dim=1) == batch["target"]).float() for batch in test_batches(source)]
    return 100 * float(torch.cat(right).mean())


class AttentionBlock(nn.Module):
    """Pre-norm transformer block with a given attention function of (batch, head, token, width) tensors."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class TokenClassifier(nn.Module):
    """Transformer over the tokens of audio and image and a class token, which is the first or the last one."""

    def __init__(self, attend: Attend, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.audio, self.image = nn.Linear(4 * 40, DIM), nn.Linear(4, DIM)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, DIM))
        self.positions = nn.Parameter(0.02 * torch.randn(2 * TOKENS + 1, DIM))
        self.blocks = nn.Sequential(*(AttentionBlock(attend) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 10))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        audio = self.audio(batch["audio"].reshape(-1, TOKENS, 4 * 40))
        image = self.image(F.unfold(batch["image"], 2, stride=2).transpose(1, 2))
        cls = self.cls.expand(len(audio), -1, -1)
        x = torch.cat([audio, image, cls] if self.last else [cls, audio, image], dim=1) + self.positions
        return self.head(self.blocks(x)[:, -1 if self.last else 0])


def classify_digits(attend: Attend, seed: int, *, last: bool, extra: nn.Parameter | None = None) -> float:
    source = data.load_dataset("digits")
    model = TokenClassifier(attend, last=last)
    if extra is not None:
        model.extra = extra
    train(model, source, lambda b: F.cross_entropy(model(b), b["target"]), seed, epochs=10, batch=64)
    return accuracy(model, source)


def pseudo(variant: str, seed: int) -> dict[str, float]:
    """A causal transformer over [audio; image; class token] whose attention is split by modality."""
    labels = torch.tensor([0] * TOKENS + [1] * TOKENS + [-1])
    base = nn.Parameter(torch.zeros(())) if variant == "learned base" else None
    options = {
        "ordinary mask": None,
        "pseudo-attention": PseudoAttention(decay=1.0),
        "constant": PseudoAttention(decay=0.0),
        "learned base": PseudoAttention(decay=1.0, base=0.0 if base is None else base),
    }[variant]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eq.nn.modular_attention(q, k, v, modality=labels, is_causal=True, pseudo=options).output

    return {"accuracy": classify_digits(attend, seed, last=True, extra=base)}


def sparse(variant: str, seed: int) -> dict[str, float]:
    """Every pattern contains the class token, as a query and as a key."""
    size = 2 * TOKENS + 1
    build = {
        "all pairs": lambda: patterns.local(size, size, width=size),
        "local": lambda: patterns.local(size, size, width=3),
        "strided": lambda: patterns.strided(size, size, step=4),
        "random": lambda: patterns.random_keys(size, size, count=6, seed=seed),
        "class token only": lambda: patterns.global_tokens(size, size, count=1),
    }
    cls = patterns.global_tokens(size, size, count=1)
    fixed = None if variant == "top-k" else build[variant]() | cls

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = cls.mask if fixed is None else fixed.mask
        if fixed is None:
            mask = mask | patterns.top_k(q @ k.transpose(-1, -2), k=6).mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    # The class token may be one of the k keys already: an upper bound.
    density = (size + 7 * (size - 1)) / size**2 if fixed is None else fixed.density
    return {"accuracy": classify_digits(attend, seed, last=False), "pairs": 100 * density}


def weights(variant: str, seed: int) -> dict[str, float]:
    """Concatenation with a unimodal head for each modality; the three losses are weighted."""
    source = data.load_dataset("digits")
    encoders = {
        "audio": SequenceEncoder(40, max_length=64, dim=DIM, depth=1, heads=HEADS, stride=4),
        "image": PatchEncoder(1, (8, 8), patch=2, dim=DIM, depth=1, heads=HEADS),
    }
    model = eq.FusionModel(encoders, eq.fusion.Concat(DIM), num_outputs=10, unimodal="train")
    chosen = {"audio x 3": {"audio": 3.0}, "fused alone": {"audio": 0.0, "image": 0.0}}
    weighting = UncertaintyWeights(("fused", *encoders)) if variant == "uncertainty" else None
    model.weighting = weighting or FixedWeights(chosen.get(variant, {}))

    def loss(batch: dict[str, Tensor]) -> Tensor:
        output = model(batch)
        logits = {"fused": output.logits, **output.unimodal_logits}
        return model.weighting({name: F.cross_entropy(z, batch["target"]) for name, z in logits.items()}).total

    train(model, source, loss, seed, epochs=12, batch=64)
    heads = {f"{name} head": accuracy(lambda b, n=name: model(b).unimodal_logits[n], source) for name in encoders}
    return {"accuracy": accuracy(lambda b: model(b).logits, source), **heads}


def hard(variant: str, seed: int) -> dict[str, float]:
    source = data.load_dataset("emoji")
    encoders = {
        "image": ConvEncoder(3, (32, 32), dim=64, widths=(16, 32, 64)),
        "text": TextEncoder(source.vocabulary["text"], max_length=24, dim=64, depth=0),
    }
    model = DualEncoder.for_data(source, encoders, dim=64)
    options = {"hard, beta 0.1": {"hard": 0.1}, "16 nearest": {"top_k": 16}}
    model.loss = eq.alignment.InfoNCE(**options.get(variant, {}))
    train(model, source, lambda b: sum(model.losses(b).values()), seed, epochs=8, batch=256)
    with torch.no_grad():
        vectors = model.embed(source.batch("test", torch.arange(len(source.test)), seed=0, epoch=0, train=False))
    return recalls(vectors["image"] @ vectors["text"].T)


def recalls(similarity: Tensor) -> dict[str, float]:
    by_image, by_text = eq.alignment.retrieval(similarity, k=(1,))
    return {"image to text, R@1": 100 * by_image.recall[1], "text to image, R@1": 100 * by_text.recall[1]}


def qformer(variant: str, seed: int) -> dict[str, float]:
    """A Q-Former on 16 image patches and the first eight words; its losses are contrastive, matching and captioning."""
    source = data.load_dataset("emoji")
    words = source.vocabulary["text"]
    former = eq.alignment.QFormer(
        192, dim=DIM, depth=2, heads=HEADS, queries=4, vocabulary=words + 1, positions=25
    )  # fmt: skip
    model = eq.alignment.QFormerLosses(former, embed=32)
    names = ("contrastive", "matching", "captioning") if variant == "all three" else variant.split(" + ")

    def parts(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        patches = F.unfold(batch["image"], 8, stride=8).transpose(1, 2)
        ids = batch["text"][:, :8]
        ids = torch.cat([torch.full_like(ids[:, :1], words), ids], dim=1)
        return patches, ids, ids > 0

    generator = torch.Generator().manual_seed(seed)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        media, ids, mask = parts(batch)
        losses = model(media, ids, mask=mask, ids=batch["target"], generator=generator)
        return torch.stack([losses[name] for name in names]).sum()

    train(model, source, loss, seed, epochs=4, batch=128)
    with torch.no_grad():
        batch = source.batch("test", torch.arange(len(source.test)), seed=0, epoch=0, train=False)
        media, ids, mask = parts(batch)
        queries, text = model.embed(media, ids, mask=mask)
        found = recalls(query_similarity(queries, text))
        right = [
            model.match(media, i, mask=m).argmax(dim=1) for i, m in ((ids, mask), (ids.roll(1, 0), mask.roll(1, 0)))
        ]
        found["matching"] = 50 * float((right[0] == 1).float().mean() + (right[1] == 0).float().mean())
        next_word = model.caption(media, ids, mask=mask)[:, :-1].argmax(dim=-1)
        found["next word"] = 100 * float((next_word == ids[:, 1:])[mask[:, 1:]].float().mean())
    return found


def in_time(variant: str, seed: int) -> dict[str, float]:
    recipe = recipes.load_recipe("two_rates")
    method = {"index positions": "mid", "time positions": "mid_time", "time bias": "timed"}[variant]
    with tempfile.TemporaryDirectory() as folder:
        run = execute_run(RunSpec(recipe, method, seed, None), Path(folder), trainer_options={"accelerator": "cpu"})
    return {"accuracy": 100 * run["metrics"]["accuracy"]}


class Study(NamedTuple):
    title: str
    measure: Callable[[str, int], dict[str, float]]
    variants: tuple[str, ...]


STUDIES = {
    "pseudo": Study(
        "Masked keys receive attention", pseudo, ("ordinary mask", "pseudo-attention", "constant", "learned base")
    ),
    "sparse": Study(
        "Sparse attention patterns", sparse,
        ("all pairs", "local", "strided", "random", "top-k", "class token only"),
    ),
    "weights": Study(
        "Weights of the losses", weights, ("equal", "audio x 3", "uncertainty", "fused alone")
    ),
    "hard": Study("Hard negatives", hard, ("InfoNCE", "hard, beta 0.1", "16 nearest")),
    "qformer": Study(
        "Losses of a Q-Former", qformer,
        ("all three", "contrastive"),
    ),
    "time": Study("Alignment in time", in_time, ("index positions", "time positions", "time bias")),
}  # fmt: skip


def paired(values: list[float], control: list[float]) -> tuple[float, float | None]:
    """Returns the mean difference and the p-value of a paired t-test; None if it is undefined."""
    differences = [a - b for a, b in zip(values, control, strict=True)]
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return statistics.mean(differences), None
    return statistics.mean(differences), float(stats.ttest_rel(values, control).pvalue)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(study: Study, rows: dict[str, dict[str, list[float]]]) -> None:
    metrics = list(rows[study.variants[0]])
    print(f"| variant | {' | '.join(metrics)} |\n|---|{'---|' * len(metrics)}")
    for variant, found in rows.items():
        cells = []
        for metric in metrics:
            cell = f"{statistics.mean(found[metric]):.1f} ± {spread(found[metric]):.1f}"
            if variant != study.variants[0]:
                change, p = paired(found[metric], rows[study.variants[0]][metric])
                cell += f" ({change:+.1f}{'' if p is None else f', p = {p:.3f}'})".replace("-", "−")
            cells.append(cell)
        print(f"| {variant} | {' | '.join(cells)} |")


def draw(study: Study, rows: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [name for name in rows[study.variants[0]] if name != "pairs"]
    figure, axes = pyplot.subplots(
        1, len(metrics), figsize=(2.2 + 2.4 * len(metrics), 0.9 + 0.32 * len(rows)), sharey=True, squeeze=False
    )  # fmt: skip
    for axis, metric in zip(axes[0], metrics, strict=True):
        for place, found in enumerate(rows.values()):
            mean = statistics.mean(found[metric])
            axis.errorbar(mean, place, xerr=spread(found[metric]), color="#2a5d8f", fmt="|", markersize=11, capsize=2)
            axis.plot(found[metric], [place] * len(found[metric]), "o", color="#2a5d8f", markersize=3, alpha=0.6)
        axis.axvline(statistics.mean(rows[study.variants[0]][metric]), color="#999999", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"{metric} (%)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(rows)), list(rows))
    axes[0][0].invert_yaxis()
    figure.suptitle(study.title, x=0.02, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study, started = STUDIES[options.study], time.process_time()
    rows: dict[str, dict[str, list[float]]] = {variant: {} for variant in study.variants}
    for seed in range(options.seeds):
        for variant in study.variants:
            torch.manual_seed(seed)
            for metric, value in study.measure(variant, seed).items():
                rows[variant].setdefault(metric, []).append(value)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"study": options.study, "seeds": options.seeds, "control": study.variants[0], "rows": rows}
    (options.out / f"{options.study}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print_table(study, rows)
    draw(study, rows, options.out / f"{options.study}.png")
    print(f"{time.process_time() - started:.0f} s of CPU time; {options.out / options.study}.png")


if __name__ == "__main__":
    main()
