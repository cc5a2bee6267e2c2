"""Traces which model input each position of a tensor comes from, through the functions that the model calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int8
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .origin_codes import (
    MIXED,
    NEUTRAL,
    align_codes,
    coded_arguments,
    codes_after_attention,
    codes_along_output,
    combine_codes,
    explicit_equation,
    full_codes,
    reduce_codes,
    resolve_queries,
    summarize_codes,
    tensors_in,
)

# Functions that move elements without arithmetic; they are applied to the codes directly.
# name -> positions of the moved arguments; all others are indices, masks or sizes.
MOVES: Mapping[str, tuple[int, ...]] = dict.fromkeys(
    [
        "view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze",
        "unsqueeze", "expand", "repeat", "repeat_interleave", "split", "chunk", "tensor_split",
        "split_with_sizes", "unbind", "__getitem__", "__iter__", "__get__", "index_select", "gather",
        "take_along_dim", "roll", "flip", "contiguous", "clone", "detach", "t",
        "swapaxes", "swapdims", "narrow", "select", "movedim", "moveaxis", "unfold",
        "masked_select", "pixel_shuffle", "pixel_unshuffle", "pad", "pad_sequence", "masked_fill", "masked_fill_",
        "index_fill", "tril", "triu", "cat", "concat", "concatenate", "stack",
        "hstack", "vstack", "tile", "broadcast_to", "rot90",
    ],
    (0,),
) | {
    "masked_scatter": (0, 2), "masked_scatter_": (0, 2), "where": (1, 2), "scatter": (0, 3), "scatter_": (0, 3),
    "index_copy": (0, 3), "index_copy_": (0, 3), "index_put": (0, 2), "index_put_": (0, 2), "__setitem__": (0, 2),
    "copy_": (0, 1),
}  # fmt: skip
JOINS = ("cat", "concat", "concatenate", "masked_scatter", "masked_scatter_", "__setitem__", "where", "index_put",
         "index_put_", "scatter", "scatter_", "index_copy", "index_copy_")  # fmt: skip
TURNS = ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "__get__")
PRODUCTS = {
    "matmul": (0, 1), "__matmul__": (0, 1), "bmm": (0, 1), "mm": (0, 1), "baddbmm": (1, 2), "baddbmm_": (1, 2),
    "addmm": (1, 2), "addbmm": (1, 2),
}  # fmt: skip
SHAPES = (
    "expand_as", "view_as", "reshape_as", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
    "randn_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "arange", "zeros", "ones", "full",
)  # fmt: skip
KEEPS_IDS = ("add", "sub", "mul", "__add__", "__sub__", "__mul__", "__radd__", "__rsub__", "clamp", "to", "long", "int",
             "type", "where", "clip", "remainder", "__mod__", "cuda", "cpu")  # fmt: skip
"""Functions that map token ids to token ids; other functions of ids return positions, lengths or masks."""
REORDERING = ("sort", "argsort", "topk", "fft", "rfft", "irfft", "fft2", "fftn", "cumsum", "msort")


class Provenance:
    """Codes of tensors: for each element, the index of the input that its position comes from.

    Residual streams keep the codes of their positions: the result of attention or a matrix product has the codes of the
    rows of the left operand. Only rows that depend on no input, such as learned queries, get the code of the keys they
    attend to. Sums of several inputs, and results of unknown functions without a matching position, are ``MIXED``, so
    that no modality is reported without evidence.

    Attributes:
        active: whether functions are currently traced.
    """

    def __init__(self) -> None:
        self.active = False
        self._codes: Any = WeakTensorKeyDictionary()
        self._columns: Any = WeakTensorKeyDictionary()

    def mark(self, tensor: Tensor, code: int) -> None:
        """Assigns one code to all elements of an input."""
        if tensor not in self._codes:
            self._codes[tensor] = full_codes(tensor, code)

    def codes_of(self, tensor: Tensor) -> Int8[Tensor, ...] | None:
        """Returns the codes of a tensor, of the same shape; None if it depends on no input or was not traced."""
        return self._codes.get(tensor)

    def keys_of_scores(self, scores: Tensor) -> Int8[Tensor, "... key"] | None:
        """Returns the codes of the keys of attention scores; None if they are not a product of queries and keys."""
        return self._columns.get(scores)

    def propagate(self, source: Tensor | None, output: Tensor) -> None:
        """Copies codes to an output whose computation could not be traced."""
        if source is not None and output not in self._codes and (codes := self.codes_of(source)) is not None:
            self._codes[output] = align_codes(codes, output.shape)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Traces the functions called in the block while ``active`` is set."""
        with _ProvenanceMode(self):
            yield

    def record(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Sets the codes of the tensors that a function returned or modified."""
        name = getattr(func, "__name__", "")
        if name in SHAPES:
            return
        tensors = [t for t in tensors_in((*args, *kwargs.values())) if t in self._codes or t in self._columns]
        if not tensors and name not in PRODUCTS and name != "einsum":
            return
        outputs = [args[0]] if name == "__setitem__" else list(tensors_in((result,)))
        if not outputs:
            return
        try:
            self._apply_rule(func, name, args, kwargs, result, outputs, tensors)
        except (RuntimeError, TypeError, IndexError, ValueError, KeyError):
            # Unsupported arguments: the origin of the result is unknown.
            for output in outputs:
                self._set(output, full_codes(output, MIXED))

    def _apply_rule(
        self, func, name: str, args: tuple, kwargs: dict, result: Any, outputs: list, tensors: list
    ) -> None:
        if name in MOVES and args:
            return self._move(func, name, args, kwargs, outputs)
        if name == "embedding":
            ids = self.codes_of(args[0] if args else kwargs["input"])
            return None if ids is None else self._set(result, ids[..., None].expand(result.shape))
        if name in PRODUCTS or name == "einsum":
            return self._product(name, args, kwargs, result)
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            query, key = (args[n] if len(args) > n else kwargs[word] for n, word in enumerate(("query", "key")))
            return self._attend(query, key, outputs[0])
        floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        for output in outputs:
            if output.dtype == torch.bool:
                continue
            if not floats and (output.is_floating_point() or name.rstrip("_") not in KEEPS_IDS):
                continue
            codes = [c for t in (floats or tensors) if (c := self.codes_of(t)) is not None]
            if codes:
                reordered = name in REORDERING
                self._set(output, combine_codes([summarize_codes(c) if reordered else c for c in codes], output.shape))
            columns = [c for t in tensors if (c := self._columns.get(t)) is not None and c.shape == output.shape]
            if columns and name != "linear":
                self._columns[output] = combine_codes(columns, output.shape)
        return None

    def _set(self, tensor: Tensor, codes: Tensor) -> None:
        self._codes[tensor] = codes if codes.shape == tensor.shape else codes.expand(tensor.shape)

    def _move(self, func, name: str, args: tuple[Any, ...], kwargs: dict, outputs: list[Tensor]) -> None:
        if name in TURNS and isinstance(args[0], Tensor) and args[0] in self._columns:
            sizes = [2 + dim for dim in range(args[0].ndim)]
            if func(torch.empty(sizes, device="meta"), *args[1:], **kwargs).shape[-1] != sizes[-1]:
                # The scores are transposed: their rows are the keys now.
                rows, columns = self._codes[args[0]], self._columns[args[0]]
                self._codes[outputs[0]] = func(columns, *args[1:], **kwargs)
                self._columns[outputs[0]] = func(rows, *args[1:], **kwargs)
                return
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        for book in (self._codes, self._columns):
            positions = MOVES[name]
            moved = [args[p] for p in positions if p < len(args)]
            if not any(t in book for t in tensors_in(moved)):
                if book is self._codes and name in ("__getitem__", "index_select", "gather"):
                    self._look_up(args, outputs)
                continue
            coded: list[Any] = [coded_arguments(a, book) if p in positions else a for p, a in enumerate(args)]
            if name in JOINS and book is self._codes:
                coded = resolve_queries(coded, positions)
            keywords = {k: coded_arguments(v, book) if k in ("source", "src", "other", "values") else v
                        for k, v in kwargs.items() if k != "value" and k != "out"}  # fmt: skip
            if name in ("masked_fill", "masked_fill_", "index_fill", "tril", "triu"):
                book[outputs[0]] = coded[0]
                continue
            if in_place:
                written: Any = args[0]  # pyright: ignore[reportGeneralTypeIssues]
                if (base := written._base) is not None and base in book:
                    # Writing into a view changes its base tensor.
                    book[base] = full_codes(base, MIXED)
                coded[0] = coded[0].clone(memory_format=torch.contiguous_format)
            if name == "pad":
                moved_codes = func(*coded[:2], **{k: v for k, v in kwargs.items() if k in ("mode", "pad")})
            elif name == "__setitem__":
                if not isinstance(coded[2], Tensor):
                    coded[2] = 0
                func(*coded)
                moved_codes = coded[0]
            elif name == "where" and len(args) < 3:
                continue
            else:
                moved_codes = func(*(0 if p in positions and isinstance(a, float) else a for p, a in enumerate(coded)),
                                   **keywords)  # fmt: skip
            for output, codes in zip(outputs, tensors_in((moved_codes,)), strict=True):
                if codes.shape != output.shape:
                    raise ValueError("codes have another shape")
                book[output] = codes.to(torch.int8)

    def _look_up(self, args: tuple, outputs: list[Tensor]) -> None:
        """A lookup in a table without codes: the result has the codes of the indices."""
        codes = [c for t in tensors_in(args[1:]) if t.dtype != torch.bool and (c := self.codes_of(t)) is not None]
        for output in outputs if codes else ():
            first = codes[0]
            while first.ndim < output.ndim:
                first = first[..., None]
            self._set(output, combine_codes([first, *codes[1:]], output.shape))

    def _product(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        if name == "einsum":
            parts = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
            if len(parts) != 2 or not isinstance(args[0], str) or "->" not in args[0]:
                codes = [c for part in parts if (c := self.codes_of(part)) is not None]
                return self._set(result, summarize_codes(*codes).expand(result.shape)) if codes else None
            equation, left, right = args[0], *parts
        else:
            equation = None
            left, right = (args[n] if n < len(args) else kwargs["other"] for n in PRODUCTS[name])
        rows, columns = self.codes_of(left), self.codes_of(right)
        learned = any(isinstance(part, nn.Parameter) for part in (left, right))
        if rows is None and columns is None and (learned or not result.is_floating_point()):
            return None
        rows = full_codes(left, NEUTRAL) if rows is None else rows
        columns = full_codes(right, NEUTRAL) if columns is None else columns
        last = columns
        if equation is None:
            rows = reduce_codes(rows, -1)
            rows = rows if right.ndim > 1 else rows[..., 0]
            last = columns = reduce_codes(columns, -2) if right.ndim > 1 else summarize_codes(columns)
        else:
            equation = explicit_equation(equation, left.ndim, right.ndim)
            inputs, output = equation.replace(" ", "").split("->")
            names = inputs.split(",")
            rows, columns = (codes_along_output(c, n, output) for c, n in zip((rows, columns), names, strict=True))
            last = rows if output[-1] in names[0] and output[-1] not in names[1] else columns
        codes = (
            torch.where(rows != NEUTRAL, rows, columns)
            if isinstance(left, nn.Parameter)
            else codes_after_attention(rows, columns)
        )
        self._set(result, codes.expand(result.shape))
        if not learned:
            self._columns[result] = last.expand(result.shape)
        return None

    def _attend(self, query: Tensor, key: Tensor, output: Tensor) -> None:
        rows, keys = self.codes_of(query), self.codes_of(key)
        rows = full_codes(query, NEUTRAL) if rows is None else reduce_codes(rows, -1)
        keys = full_codes(key, NEUTRAL) if keys is None else keys
        self._set(output, codes_after_attention(rows, summarize_codes(keys)).expand(output.shape))


class _ProvenanceMode(TorchFunctionMode):
    def __init__(self, provenance: Provenance) -> None:
        super().__init__()
        self._provenance = provenance

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._provenance.active and not torch.compiler.is_compiling():
            self._provenance.record(func, args, kwargs, result)
        return result
