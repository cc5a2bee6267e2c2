"""Cost of the library on a GPU, in one command of a few minutes; prints Markdown for docs/benchmarks.md.

    python benchmarks/gpu.py                              # lengths 2048, 8192 and 32768 in bfloat16, under 8 minutes
    python benchmarks/gpu.py --device cpu --quick         # the same code on small inputs, to check that it runs

Variants alternate within each round; a ratio is the median over rounds of the time divided by that of the baseline in
the same round. Memory is the peak of the CUDA allocator above the inputs. "flex" is ``flex_attention`` with its public
log-sum-exp, compiled, once per modality: the share without this library.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import equipoise as eq
from equipoise.consistency import nuclear_norm
from equipoise.nn import DuplexAligner, modular_attention

HEADS, DIM = 16, 64
LAYERS = 4


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(actions: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every action in each round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name in list(actions)[:: 1 if turn % 2 else -1]:
            synchronize(device)
            start = time.perf_counter()
            actions[name]()
            synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def peak(action: Callable[[], Any], device: str) -> float:
    """Returns the peak memory of an action in MiB above what is allocated; NaN without CUDA."""
    if device != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def table(title: str, actions: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> None:
    """Prints milliseconds, the ratio to the first action, and peak memory."""
    times = alternate(actions, device, rounds)
    first = next(iter(actions))
    print(f"\n| {title} | ms | / {first} | peak MiB |\n|---|---|---|---|")
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times[first], strict=True))
        print(f"| {name} | {1e3 * statistics.median(taken):.2f} | {ratio:.3f} | {peak(actions[name], device):.0f} |")


def backward_too(forward: Callable[[], Any], inputs: list[Tensor]) -> Callable[[], Any]:
    def action() -> None:
        output, share = (*forward(), None)[:2]
        loss = output.float().sum() + (0 if share is None else share.square().sum())
        torch.autograd.grad(loss, inputs)

    return action


def flex_shares(query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, ...]) -> Callable[[], Any]:
    """Shares from one call of flex_attention per modality and the log-sum-exps that it returns."""
    from torch.nn.attention.flex_attention import flex_attention

    attention = torch.compile(functools.partial(flex_attention, return_lse=True))

    def action() -> tuple[Tensor, Tensor]:
        parts = [attention(query, k, v) for k, v in zip(key.split(sizes, 2), value.split(sizes, 2), strict=True)]
        share = torch.stack([lse for _, lse in parts], -1).float().softmax(-1)
        output = sum(part.float() * share[..., i : i + 1] for i, (part, _) in enumerate(parts))
        return output.to(query.dtype), share  # type: ignore[union-attr]

    return action


def attention(length: int, device: str, dtype: torch.dtype, rounds: int) -> None:
    """``attend`` against fused attention, forward and with backward, causal and not."""
    sizes = (length // 2, length // 4, length - length // 2 - length // 4)
    modality = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).to(device)
    for grad in (False, True):
        q, k, v = (torch.randn(1, HEADS, length, DIM, device=device, dtype=dtype, requires_grad=grad) for _ in range(3))
        share = functools.partial(eq.attend, q, k, v, modality=modality, num_modalities=3)
        actions: dict[str, Callable[[], Any]] = {
            "sdpa": lambda q=q, k=k, v=v: (F.scaled_dot_product_attention(q, k, v),),
            "attend": share,
            "sdpa, causal": lambda q=q, k=k, v=v: (F.scaled_dot_product_attention(q, k, v, is_causal=True),),
            "attend, causal": functools.partial(share, is_causal=True),
        }
        if device == "cuda" and not grad:
            actions["flex"] = flex_shares(q, k, v, sizes)
        if grad:
            actions = {name: backward_too(action, [q, k, v]) for name, action in actions.items()}
        with torch.set_grad_enabled(grad):
            table(
                f"attention, length {length}, {'forward and backward' if grad else 'forward'}", actions, device, rounds
            )


@torch.no_grad()
def watch(length: int, device: str, dtype: torch.dtype, rounds: int, width: int) -> None:
    """``watch`` on layers of a language model, half of whose context is an image."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        max_position_embeddings=length,
    )
    model = transformers.LlamaModel(config).to(device, dtype).eval()
    ids = torch.randint(64, (1, length), device=device)
    labels = (torch.arange(length, device=device) >= length // 2).long()

    def watched(queries: str) -> None:
        with eq.watch(model, modality=labels, names=("image", "text"), queries=queries):
            model(ids, use_cache=False)

    actions = {
        "unwatched": lambda: model(ids, use_cache=False),
        "watch, all queries": lambda: watched("all"),
        "watch, last query": lambda: watched("last"),
    }
    table(f"watch, {LAYERS} layers of width {width}, context {length}", actions, device, rounds)


@torch.no_grad()
def moda(length: int, device: str, dtype: torch.dtype, rounds: int) -> None:
    """Aligned keys and modular attention against fused attention."""
    q, k, v = (torch.randn(2, HEADS, length, DIM, device=device, dtype=dtype) for _ in range(3))
    blocks = (torch.arange(length, device=device) > length // 3).long()
    aligner = DuplexAligner(DIM).to(device)
    actions = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "duplex": lambda: F.scaled_dot_product_attention(q, aligner(k, v, modality=blocks).key, v),
        "modular": lambda: modular_attention(q, k, v, modality=blocks),
    }
    table(f"MODA, length {length}", actions, device, rounds)


def spectrum(device: str, rounds: int, size: int) -> None:
    """The nuclear norm and its gradient, by three methods."""
    leaf = torch.rand(4, size, size, device=device).softmax(-1).requires_grad_()
    actions = {
        method: lambda m=method: torch.autograd.grad(nuclear_norm(leaf, method=m).sum(), leaf)
        for method in ("svd", "gram", "polar")
    }
    table(f"nuclear norm and gradient, (4, {size}, {size})", actions, device, rounds)


def training(device: str, rounds: int, dim: int) -> None:
    """Steps of a real training in mixed precision: audio and image, with and without balancing methods."""
    generator = torch.Generator().manual_seed(0)
    size = 256 if dim > 64 else 16
    batch = {
        "audio": torch.randn(size, 128, 64, generator=generator),
        "image": torch.randn(size, 3, 64, 64, generator=generator),
        "target": torch.randint(10, (size,), generator=generator),
    }
    batch = {name: value.to(device) for name, value in batch.items()}

    def step(*names: str) -> Callable[[], None]:
        torch.manual_seed(0)
        encoders = {
            "audio": eq.encoders.SequenceEncoder(64, max_length=128, dim=dim, stride=2, depth=4),
            "image": eq.encoders.PatchEncoder(3, (64, 64), patch=8, dim=dim, depth=4),
        }
        model = eq.FusionModel(encoders, eq.fusion.JointAttention(dim), 10).to(device)
        balancers = [
            eq.balance.RollingQ(model.fusion.attention) if name == "RollingQ" else getattr(eq.balance, name)(model)
            for name in names
        ]
        balancing = eq.BalancerList(model, balancers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def action() -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = balancing.loss(model(batch), batch["target"])
            optimizer.zero_grad()
            loss.backward()
            balancing.before_step()
            optimizer.step()

        return action

    actions = {"no balancer": step(), "RollingQ": step("RollingQ"), "OGM": step("OGM"), "OGM_GE": step("OGM_GE")}
    table(f"training step, batch {size}, width {dim}, bfloat16 autocast", actions, device, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="small inputs")
    options = parser.parse_args()
    device, quick = options.device, options.quick
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rounds = options.rounds or (2 if quick else 11)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {HEADS} heads of width {DIM}")
    for length in options.lengths or ([256] if quick else [2048, 8192, 32768]):
        attention(length, device, dtype, rounds)
        watch(length, device, dtype, rounds, 64 if quick else HEADS * DIM)
    moda(256 if quick else 4096, device, dtype, rounds)
    spectrum(device, rounds, 32 if quick else 768)
    training(device, rounds, 32 if quick else 512)


if __name__ == "__main__":
    main()
