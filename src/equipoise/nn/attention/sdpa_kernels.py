"""Fused attention kernels that also return the log-sum-exp, which the public function does not.

The operators behind `F.scaled_dot_product_attention` are private and may change between releases. Each operator is
tested once, forward and backward, on a small case with a known result; if it is missing or its result is wrong, it is
not used, and callers fall back to public functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HeadTensor = Float[Tensor, "batch head token dim"]
Bias = Float[Tensor, "#batch #head #query key"]


class Kernel(NamedTuple):
    """A fused attention kernel. Keys may have fewer heads than queries; all widths are equal and multiples of 8.

    Attributes:
        forward: (query, key, value, bias, is_causal, scale) -> (output, log-sum-exp in float32 or better). The
            result for rows without visible keys is undefined.
        backward: (grad, query, key, value, output, log-sum-exp, bias, is_causal, scale) -> the three gradients.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Returns the kernel for a device and dtype if it passed its test, else None."""
    if torch.compiler.is_compiling():
        return None
    return _tested_kernel(device.type, device.index, dtype)


@functools.cache
def _tested_kernel(device_type: str, index: int | None, dtype: torch.dtype) -> Kernel | None:
    kernel = {"cpu": CPU, "cuda": CUDA}.get(device_type)
    if kernel is None:
        return None
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    # Private operators of other releases may raise any of these errors; then they are not used.
    try:
        return kernel if _is_correct(kernel, device, dtype) else None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _cpu_forward(query, key, value, bias, is_causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )


def _cpu_backward(grad, query, key, value, output, lse, bias, is_causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )


def _cuda_forward(query, key, value, bias, is_causal, scale):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    output, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, _aligned(bias, query, key), True, 0.0, is_causal, scale=scale
    )
    return output, lse[:, :, : query.shape[2]]


def _cuda_backward(grad, query, key, value, output, lse, bias, is_causal, scale):
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    # The operator requires a log-sum-exp padded to multiples of 32 and an RNG state, which is used by dropout only.
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf).contiguous()
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    grad_query, *grads, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, _aligned(bias, query, key), output, lse, unused, unused, 0.0,
        [True, True, True, False], is_causal, scale=scale,
    )  # fmt: skip
    grad_key, grad_value = (g.unflatten(1, (heads, group)).sum(2) for g in grads)
    return grad_query, grad_key, grad_value


def _aligned(bias, query, key):
    """Expands the bias to full size with rows aligned to 16 elements, as the operator requires."""
    if bias is None:
        return None
    rows = F.pad(bias, (0, -bias.shape[-1] % 16)) if bias.shape[-1] % 16 else bias.contiguous()
    return rows[..., : bias.shape[-1]].expand(*query.shape[:3], key.shape[2])


CPU = Kernel(_cpu_forward, _cpu_backward)
CUDA = Kernel(_cuda_forward, _cuda_backward)


def _is_correct(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Compares the kernel with the explicit formula on small inputs with grouped heads, a bias and causality."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key, value, grad = normal(2, 4, 19, 8), normal(2, 2, 37, 8), normal(2, 2, 37, 8), normal(2, 4, 19, 8)
    hidden = torch.rand(2, 1, 1, 37, generator=generator).to(device) < 0.3
    hidden[..., 0] = False
    bias = torch.zeros(2, 1, 1, 37, device=device, dtype=dtype).masked_fill(hidden, -math.inf)
    close = functools.partial(torch.allclose, rtol=0.05, atol=0.05 if dtype.itemsize < 4 else 1e-4)
    for some_bias, is_causal in ((None, False), (bias, False), (None, True), (bias, True)):
        expected = _by_formula(grad, query, key, value, some_bias, is_causal, 0.4)
        output, lse = kernel.forward(query, key, value, some_bias, is_causal, 0.4)
        grads = kernel.backward(grad, query, key, value, output, lse, some_bias, is_causal, 0.4)
        if not all(close(a.double(), b) for a, b in zip((output, lse, *grads), expected, strict=True)):
            return False
    return True


@torch.enable_grad()
def _by_formula(grad, query, key, value, bias, is_causal, scale):
    query, key, value = (t.detach().double().requires_grad_() for t in (query, key, value))
    group = query.shape[1] // key.shape[1]
    scores = scale * query @ key.repeat_interleave(group, 1).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.double()
    if is_causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    output = scores.softmax(-1) @ value.repeat_interleave(group, 1)
    grads = torch.autograd.grad(output, (query, key, value), grad.double())
    return output.detach(), scores.logsumexp(-1).detach(), *grads
