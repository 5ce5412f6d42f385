"""A model of nobody's family: names of its own, and attentions and networks in several layouts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    """Written as before transformers made configs dataclasses, as custom code often is."""

    model_type = "one_of_its_own"

    def __init__(
        self, width=64, nh=8, nkv=4, depth=3, ff=96, vocab=100, mixer="grouped", network="gated", breadth=1, **kwargs
    ):
        self.width, self.nh, self.nkv, self.depth, self.ff, self.vocab = width, nh, nkv, depth, ff, vocab
        self.mixer, self.network = mixer, network
        self.breadth = breadth
        super().__init__(**kwargs)


def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
    """(batch, heads, tokens, size) each."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if sink is not None:  # a token of nothing that each head may look at
        extra = sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


class Grouped(nn.Module):
    """Grouped keys, a norm of queries, a number for each head."""

    def __init__(self, c):
        super().__init__()
        self.h, self.kv, self.d = c.nh, c.nkv, c.width // c.nh
        self.wq = nn.Linear(c.width, self.h * self.d, bias=False)
        self.wk = nn.Linear(c.width, self.kv * self.d, bias=False)
        self.wv = nn.Linear(c.width, self.kv * self.d, bias=False)
        self.wo = nn.Linear(self.h * self.d, c.width, bias=False)
        self.qn = nn.LayerNorm(self.d)
        self.sink = nn.Parameter(torch.randn(self.h))

    def forward(self, x):
        b, t, _ = x.shape
        q = self.qn(self.wq(x).view(b, t, self.h, self.d)).transpose(1, 2)
        k, v = (w(x).view(b, t, self.kv, self.d).transpose(1, 2) for w in (self.wk, self.wv))
        k, v = (y.repeat_interleave(self.h // self.kv, 1) for y in (k, v))
        return self.wo(attend(q, k, v, self.sink).transpose(1, 2).reshape(b, t, self.h * self.d))


class Sloped(nn.Module):
    """A slope for each head, which no checkpoint holds, and a gate that starts at zero."""

    def __init__(self, c):
        super().__init__()
        self.h = c.nh
        self.wq, self.wk, self.wv = (nn.Linear(c.width, c.width) for _ in range(3))
        self.wo, self.alpha = nn.Linear(c.width, c.width), nn.Parameter(torch.tensor(0.0))
        self.register_buffer("slopes", torch.linspace(0.1, 1, c.nh), persistent=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (w(x).view(b, t, self.h, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = q @ k.mT + self.slopes[:, None, None] * torch.arange(t)
        return self.alpha * self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PerHead(nn.Module):
    """One matrix, head by head: query, key and value of a head are neighbours."""

    def __init__(self, c):
        super().__init__()
        self.h = c.nh
        self.qkv, self.proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, self.h, -1).transpose(1, 2).chunk(3, -1)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Thirds(nn.Module):
    """One matrix, query, key and value one after the other; the number of heads is read from the config."""

    def __init__(self, c):
        super().__init__()
        self.config, self.size = c, c.width // c.nh
        self.qkv, self.proj = nn.Linear(c.width, 3 * c.width, bias=False), nn.Linear(c.width, c.width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, -1, self.size).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Gated(nn.Module):
    """Two matrices up, one down."""

    def __init__(self, c):
        super().__init__()
        self.w1, self.w3 = nn.Linear(c.width, c.ff, bias=False), nn.Linear(c.width, c.ff, bias=False)
        self.w2 = nn.Linear(c.ff, c.width, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Interleaved(nn.Module):
    """One matrix up, gate and value of a neuron are neighbours."""

    def __init__(self, c):
        super().__init__()
        self.inn, self.out = nn.Linear(c.width, 2 * c.ff), nn.Linear(c.ff, c.width)

    def forward(self, x):
        hidden = self.inn(x)
        return self.out(nn.functional.gelu(hidden[..., ::2]) * hidden[..., 1::2])


class GatedLate(nn.Module):
    """A gate that starts at zero in every second layer, where gate and value of a neuron are neighbours."""

    def __init__(self, c, number):
        super().__init__()
        self.inn, self.out = nn.Linear(c.width, 2 * c.ff), nn.Linear(c.ff, c.width)
        self.number, self.alpha = number, nn.Parameter(torch.tensor(1.0 - number % 2))

    def forward(self, x):
        hidden = self.inn(x)
        gate, up = (hidden[..., ::2], hidden[..., 1::2]) if self.number % 2 else hidden.chunk(2, -1)
        return self.alpha * self.out(nn.functional.gelu(gate) * up)


class Halves(nn.Module):
    """One matrix up, gates first."""

    def __init__(self, c):
        super().__init__()
        self.inn, self.out = nn.Linear(c.width, 2 * c.ff), nn.Linear(c.ff, c.width)

    def forward(self, x):
        gate, up = self.inn(x).chunk(2, -1)
        return self.out(nn.functional.gelu(gate) * up)


MIXERS: dict[str, Any] = {"grouped": Grouped, "sloped": Sloped, "per_head": PerHead, "thirds": Thirds}
NETWORKS: dict[str, Any] = {"gated": Gated, "interleaved": Interleaved, "halves": Halves}  # and "late"


class OwnBlock(nn.Module):
    """Attention and network side by side."""

    def __init__(self, c, number):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.mix = MIXERS[c.mixer](c)
        self.ffw = GatedLate(c, number) if c.network == "late" else NETWORKS[c.network](c)

    def forward(self, x):
        return x + self.mix(self.n1(x)) + self.ffw(self.n2(x))


class OwnModel(PreTrainedModel):
    """A causal language model, but for the causality."""

    config_class = OwnConfig
    base_model_prefix = "core"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.tok = nn.Embedding(config.vocab, config.width)
        self.stack = nn.ModuleList([OwnBlock(config, number) for number in range(config.depth)])
        self.fin, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocab, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        x = self.tok(input_ids)
        for block in self.stack:
            x = block(x)
        return CausalLMOutput(logits=self.head(self.fin(x)))
