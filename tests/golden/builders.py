"""Models and data whose every bit is the same on any machine: integers, scaled by powers of two.

Models are float64, so that what different processors round differently is far below what the golden values compare.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from tests import models

LENGTH = 8


def exact(shape: Any, seed: int, bits: int = 26) -> Tensor:
    """Numbers between -1 and 1, float64, without the vectorised functions that ``randn`` calls."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << bits
    return torch.randint(-half + 1, half, tuple(shape), generator=generator).double() / half


def exact_values(model: Any, scale: float = 0.25, bits: int = 26) -> Any:
    """Give a model exact weights, by name; norms are near the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = exact(parameter.shape, zlib.crc32(name.encode()), bits)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + values / 8 if is_norm else values * scale)
    return model.eval()


def build(kind: str, **settings: Any) -> Any:
    """A small model by the name of its builder, float64."""
    return exact_values(getattr(models, f"tiny_{kind}")(**settings).double())


def batches(kind: str, labels: bool = False) -> list[dict[str, Tensor]]:
    """Calibration batches for such a model, some of it padded; more tokens than any layer has inputs."""
    found = []
    sizes = (8, 6) if kind == "gpt2" else (4, 3)
    for number, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(100 + number)
        if kind in ("vit", "resnet"):
            batch = {"pixel_values": exact((size, 3, 32, 32), 200 + number)}
            target = torch.randint(0, 3, (size,), generator=generator)
        else:
            ids = torch.randint(4, models.VOCAB, (size, LENGTH), generator=generator)
            mask = torch.ones_like(ids)
            if kind in ("bert", "t5"):
                mask[0, LENGTH - 2 :] = 0
            batch = {"input_ids": ids, "attention_mask": mask}
            target = torch.randint(0, 2, (size,), generator=generator) if kind == "bert" else ids.clone()
        if labels or kind == "t5":
            batch["labels"] = target
        found.append(batch)
    return found


class Sentences(torch.utils.data.Dataset):
    """Random tokens; the label is whether the first one is even."""

    def __init__(self, n: int = 64) -> None:
        self.ids = torch.randint(4, models.VOCAB, (n, 6), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = self.ids[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}
