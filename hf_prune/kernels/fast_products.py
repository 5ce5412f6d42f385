"""float32 matrix products through oneDNN, where that is much faster than torch's default and as exact."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.utils.distributed import broadcast

_LARGE = 1 << 18  # values of a matrix whose products take long enough to matter
_FAST = ContextVar("fast products", default=False)  # of the thread that is inside, while it is
_ROUNDS = 7
_FASTER = 1.5  # times; a smaller gain is near enough to the noise that two runs might decide differently
_AGREES = 1e-5  # the largest difference to the exact product, as a share of the largest value
_SHORT = 256  # queries of an attention, below which its products are too small for oneDNN
_SHAPES = ((128, 384, 384), (256, 384, 1536), (256, 768, 768))  # tokens, inputs, outputs


@contextmanager
def fast_products(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Multiply float32 matrices on the CPU through oneDNN within this context, if it pays.

    PyTorch multiplies them with MKL, which on processors of other makers than Intel's may reach half of their speed.
    oneDNN is reached by ``torch.set_float32_matmul_precision("medium")``, which also allows less exact products: so it
    is compared with exact ones first, once per process, and timed. With several processes, the first decides for all.
    Sums are in another order, so that results may differ in the last digits of float32.

    Fused attention of short texts is left out. It makes many small products, and oneDNN takes longer to begin one than
    MKL to do it: with 40 tokens, attention forwards and backwards took 8 and 12 times as long.

    Args:
        tensors: What will be multiplied; without large float32 matrices, or off the CPU, nothing changes.
    """
    large = [t for t in tensors if t.dim() >= 2 and t.numel() >= _LARGE]
    suits = bool(large) and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in large)
    if not suits or torch.get_float32_matmul_precision() != "highest" or not _decided_by_the_first_process():
        yield
        return
    with _through_onednn(), _short_attention_by_default():
        token = _FAST.set(True)
        try:
            yield
        finally:
            _FAST.reset(token)


@contextmanager
def ordinary_products() -> Iterator[None]:
    """Inside, everything multiplies as it does outside of :func:`fast_products`: for timing what people will run."""
    if not _FAST.get():
        yield
        return
    token = _FAST.set(False)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("medium")
        _FAST.reset(token)


def _decided_by_the_first_process() -> bool:
    return bool(broadcast(torch.tensor([onednn_is_faster()])))


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices much faster than torch's default here, and as exactly."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    gains = []
    with torch.no_grad():
        for tokens, inputs, outputs in _SHAPES:
            x = torch.randn(tokens, inputs, generator=generator)
            weight = torch.randn(outputs, inputs, generator=generator)
            gradient = torch.randn(tokens, outputs, generator=generator)
            for a, b in ((x, weight.t()), (gradient, weight), (gradient.t(), x), (x.t(), x)):
                exact = a.double() @ b.double()
                with _through_onednn():
                    difference = (a @ b - exact).abs().max()
                if float(difference) > _AGREES * float(exact.abs().max()):
                    return False
            gains.append(_gain(functools.partial(torch.nn.functional.linear, x, weight)))
    return math.prod(gains) ** (1 / len(gains)) >= _FASTER


def _gain(product: Callable[[], Tensor]) -> float:
    """How many times as fast a product is through oneDNN: the shortest time of each, taken in turns."""
    default = onednn = math.inf
    for _ in range(_ROUNDS):
        default = min(default, _seconds(product))
        with _through_onednn():
            onednn = min(onednn, _seconds(product))
    return default / onednn


def _seconds(product: Callable[[], Tensor]) -> float:
    """Of the processor, all threads together, so that other processes do not count."""
    begin = time.process_time()
    product()
    return time.process_time() - begin


@contextmanager
def _through_onednn() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def _short_attention_by_default() -> Iterator[None]:
    """Inside, fused attention of few queries multiplies as outside, also on the way back.

    There it has a node of its own, except with dropout.
    """
    attention = nn.functional.scaled_dot_product_attention

    def begin(*_: Any) -> None:
        if _FAST.get():
            torch.set_float32_matmul_precision("highest")

    def end(*_: Any) -> None:
        if _FAST.get():
            torch.set_float32_matmul_precision("medium")

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[-2] >= _SHORT or torch.compiler.is_compiling():
            return attention(query, *args, **kwargs)
        begin()
        try:
            output = attention(query, *args, **kwargs)
        finally:
            end()
        if (node := output.grad_fn) is not None and "ScaledDotProduct" in node.name():
            node.register_prehook(begin)
            node.register_hook(end)
        return output

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = attention
