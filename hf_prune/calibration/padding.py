"""Which rows of a module's inputs are tokens, and which are padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.routed_rows import RoutedRows
from hf_prune.calibration.slabs import owner_of
from hf_prune.planning.prunable import Convolution, Transposed
from hf_prune.utils.forward import is_encoder_decoder


class Padding:
    """Knows the padding of the batch that a model is running.

    Args:
        model: The model.
        routed: Knows which tokens a router has gathered.

    Attributes:
        encoder: Where the model has a decoder as well, its encoder and the ids of all modules in it: the other modules
            see the decoder's tokens.
    """

    def __init__(self, model: nn.Module, routed: RoutedRows | None = None) -> None:
        self._routed = routed or RoutedRows()
        self.encoder = _encoder_modules(model)
        self._encoder_output: Tensor | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._size = 0  # examples in the batch

    @contextmanager
    def of(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """The model runs this batch inside; afterwards, the padding is still that of the batch."""
        self._size = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)
        self._mask = _mask(inputs.get("attention_mask"))
        self._decoder_mask = _mask(inputs.get("decoder_attention_mask"))
        self._encoder_output = None

        def keep_output(_: nn.Module, __: Any, output: Any) -> None:
            first = first_tensor(output)
            self._encoder_output = first if isinstance(first, Tensor) else None

        hook = None if self.encoder is None else self.encoder[0].register_forward_hook(keep_output)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def rows(self, module: nn.Module, x: Tensor, layout: str = "linear") -> Tensor:
        """The inputs of a module without padding: (tokens, in), or (groups, tokens, in) of a grouped convolution."""
        if layout == "conv":
            return _columns(module, x)
        mask = self.mask(module, x)
        rows = x.reshape(-1, x.shape[-1])
        return rows if mask is None else rows[mask]

    def in_place(self, x: Tensor, layout: str = "linear") -> bool:
        """Whether a row of a module's inputs is the same token in every run: not so where a router chooses the rows."""
        masks = [mask.numel() for mask in (self._mask, self._decoder_mask) if mask is not None]
        if self._routed.of(x) is not None:
            return False
        return layout == "conv" or x.dim() > 2 or len(x) in (self._size, *masks)

    def mask(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """(tokens,) bool, True for tokens and False for padding; None if there is no padding.

        Args:
            module: A module of the model, while that runs.
            x: (batch, seq, in) or (batch * seq, in) its input, or rows that a router has gathered from it.
        """
        mask = self._mask
        if self.encoder is not None and id(owner_of(module)) not in self.encoder[1]:
            # Modules of cross-attention belong to the decoder, and those that read the encoder's output see its tokens.
            encoded = self._encoder_output
            if encoded is None or x.data_ptr() != encoded.data_ptr() or x.shape != encoded.shape:
                mask = self._decoder_mask
        if mask is None:
            return None
        if (routed := self._routed.of(x)) is not None:
            size, places = routed
            return mask.reshape(-1)[places.to(mask.device)].to(x.device) if size == mask.numel() else None
        fits = x.shape[:2] == mask.shape if x.dim() == 3 else x.dim() == 2 and len(x) == mask.numel()
        return mask.reshape(-1) if fits else None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a module, which it multiplies with its weight."""
    return args[0] if args else next(iter(kwargs.values()))


def first_tensor(output: Any) -> Any:
    """The output of a module, or the first part of it; None if there is none."""
    if isinstance(output, Tensor):
        return output
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return parts[0] if isinstance(parts, list | tuple) and parts else None


def _mask(mask: Any) -> Tensor | None:
    """(batch, seq) bool, True for tokens; None for anything else than a mask of this shape."""
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """The input patches of a convolution: (positions, kernel * in), its columns ordered like a target's matrix.

    With several groups, (groups, positions, kernel * in / groups).

    Args:
        module: A convolution of one, two or three dimensions.
        x: (batch, in, *size), or without the batch.
    """
    assert isinstance(module, Convolution)
    dims = len(module.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    steps = module.stride
    if isinstance(module, Transposed):
        x, steps = _spread_out(module, x), (1,) * dims
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(zip(module.kernel_size, steps, module.dilation, strict=True)):
        x = x.unfold(dim + 2, (size - 1) * gap + 1, step)[..., ::gap]
    if isinstance(module, Transposed):  # its kernel runs backwards
        x = x.flip(list(range(-dims, 0)))
    x = x.unflatten(1, (module.groups, -1))  # (batch, groups, in, *positions, *kernel)
    x = x.movedim(1, 0).movedim(2, -1)  # (groups, batch, *positions, *kernel, in)
    rows = x.reshape(module.groups, -1, x.shape[-1] * x.shape[-1 - dims : -1].numel())
    return rows[0] if module.groups == 1 else rows


def _spread_out(module: Transposed, x: Tensor) -> Tensor:
    """The input of the ordinary convolution that a transposed one is: zeros between the inputs, and around them."""
    margins: list[int] = []
    for i, size in enumerate(module.kernel_size):
        places = torch.arange(x.shape[i + 2], device=x.device) * module.stride[i]
        wide = x.new_zeros(*x.shape[: i + 2], int(places[-1]) + 1, *x.shape[i + 3 :])
        x = wide.index_copy(i + 2, places, x)
        margin = module.dilation[i] * (size - 1) - int(module.padding[i])
        margins = [margin, margin + module.output_padding[i], *margins]  # of the last dimension first
    return nn.functional.pad(x, margins)


def _encoder_modules(model: nn.Module) -> tuple[nn.Module, set[int]] | None:
    """The encoder of a model that has a decoder as well, and the ids of all modules in it; None for other models."""
    if not is_encoder_decoder(model):
        return None
    encoder, decoder = (getattr(model, f"get_{part}", lambda: None)() for part in ("encoder", "decoder"))
    if encoder is None or decoder is None:
        return None
    return encoder, {id(module) for module in encoder.modules()}
