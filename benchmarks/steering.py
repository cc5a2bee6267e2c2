"""Time of attention with offsets of its logits, as ``eq.steer`` computes it, relative to plain fused attention.

    python benchmarks/steering.py

One thread, float32, CPU time; half of the keys belong to the steered modality. The variants alternate within each
round; ratios are medians over rounds. Half a minute.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from equipoise.diagnostics.logit_offsets import add_offsets
from equipoise.recording import AttentionCall
from equipoise.recording.attention_call import KeyOffsets
from equipoise.recording.share_measurement import attention_output

HEADS, ROUNDS = 8, 7


@torch.no_grad()
def ratio(width: int, length: int, is_causal: bool) -> float:
    query, key, value = torch.randn(3, 1, HEADS, length, width, generator=torch.Generator().manual_seed(0)).unbind(0)
    members = torch.zeros(1, 1, length, dtype=torch.bool)
    members[..., 35 : 35 + length // 2] = True
    offsets = KeyOffsets(members, torch.ones(1, 1, 1, 1))
    call = AttentionCall(query, key, value, is_causal=is_causal)
    ratios = []
    for turn in range(ROUNDS + 1):
        start = time.process_time()
        F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        between = time.process_time()
        attention_output(add_offsets(call, offsets))
        if turn:
            ratios.append((time.process_time() - between) / (between - start))
    return statistics.median(ratios)


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\nlength  width  causal  relative to plain")
    for length, width, is_causal in ((1024, 64, True), (1024, 128, True), (1024, 64, False), (2048, 128, True)):
        print(f"{length:6}{width:7}{is_causal!s:>8}{ratio(width, length, is_causal):19.3f}")


if __name__ == "__main__":
    main()
