"""Mixtures of nobody's family: routers and experts in several layouts, in code as people write it themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class MixConfig(PreTrainedConfig):
    """Written as before transformers made configs dataclasses, as custom code often is."""

    model_type = "mixture_of_its_own"

    def __init__(self, width=32, depth=3, ff=48, vocab=100, branches=6, active=2, block="listed", **kwargs):
        self.width, self.depth, self.ff, self.vocab = width, depth, ff, vocab
        self.branches, self.active, self.block = branches, active, block
        super().__init__(**kwargs)


class Network(nn.Module):
    """Two matrices up, one down."""

    def __init__(self, c):
        super().__init__()
        self.w1, self.w3 = nn.Linear(c.width, c.ff, bias=False), nn.Linear(c.width, c.ff, bias=False)
        self.w2 = nn.Linear(c.ff, c.width)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def add_up(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor, number: int) -> Tensor:
    """What a token's experts give, one expert after the other."""
    total = torch.zeros_like(x)
    for expert in range(number):
        token, place = torch.where(chosen == expert)
        if len(token):
            total = total.index_add(0, token, experts[expert](x[token]) * weights[token, place, None])
    return total


class Listed(nn.Module):
    """A softmax over all, then the best, with weights that no longer add up to one."""

    def __init__(self, c):
        super().__init__()
        self.count, self.k = c.branches, c.active
        self.choose = nn.Linear(c.width, c.branches)
        self.parts = nn.ModuleList([Network(c) for _ in range(c.branches)])

    def forward(self, x):
        weights, chosen = self.choose(x).softmax(-1).topk(self.k)
        return add_up(self.parts, x, chosen, weights, self.count)


class Numbered(nn.Module):
    """Experts that are attributes with a number."""

    def __init__(self, c):
        super().__init__()
        self.count, self.k = c.branches, c.active
        self.choose = nn.Linear(c.width, c.branches)
        for number in range(c.branches):
            setattr(self, f"part{number}", Network(c))

    def forward(self, x):
        weights, chosen = self.choose(x).softmax(-1).topk(self.k)
        return add_up([getattr(self, f"part{n}") for n in range(self.count)], x, chosen, weights, self.count)


class ReadsConfig(nn.Module):
    """The best, then a softmax over them; how many there are is looked up in the config."""

    def __init__(self, c):
        super().__init__()
        self.settings = c
        self.gate = nn.Linear(c.width, c.branches, bias=False)
        self.experts = nn.ModuleList([Network(c) for _ in range(c.branches)])

    def forward(self, x):
        weights, chosen = self.gate(x).topk(self.settings.active)
        shares = torch.zeros(len(x), self.settings.branches).scatter(1, chosen, weights.softmax(-1))
        return sum(self.experts[n](x) * shares[:, [n]] for n in range(self.settings.branches))


class ThreeAtOnce(nn.Module):
    """As many experts for a token as only the code says, and a shared one."""

    def __init__(self, c):
        super().__init__()
        self.router = nn.Parameter(torch.randn(c.branches, c.width) * 0.3)
        self.added = nn.Parameter(torch.rand(c.branches) * 0.1)
        self.experts = nn.ModuleList([Network(c) for _ in range(c.branches)])
        self.shared = Network(c)

    def forward(self, x):
        scores = (x @ self.router.t()).sigmoid()
        chosen = torch.topk(scores + self.added, 3).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.shared(x) + add_up(self.experts, x, chosen, weights, len(self.experts))


class PackedExperts(nn.Module):
    """Parameters of matrices, multiplied all at once; every expert counts as much as its score says."""

    def __init__(self, c):
        super().__init__()
        self.moe_gate = nn.Linear(c.width, c.branches, bias=False)
        self.up = nn.Parameter(torch.randn(c.branches, c.width, c.ff) * 0.2)
        self.down = nn.Parameter(torch.randn(c.branches, c.ff, c.width) * 0.2)

    def forward(self, x):
        scores = self.moe_gate(x)
        weights = torch.full_like(scores, float("-inf")).scatter(1, *reversed(scores.topk(2))).softmax(-1)
        hidden = F.gelu(torch.einsum("th,ehi->tei", x, self.up))
        return torch.einsum("tei,eih,te->th", hidden, self.down, weights)


class NormedScores(Listed):
    """Scores are brought to length one, so that each of them counts for all others."""

    def forward(self, x):
        weights, chosen = F.normalize(self.choose(x), dim=-1).softmax(-1).topk(self.k)
        return add_up(self.parts, x, chosen, weights, self.count)


class FirstAlways(Listed):
    """Every token also gets the first expert."""

    def forward(self, x):
        return super().forward(x) + self.parts[0](x)


class Prior(Listed):
    """Some experts are preferred by numbers that no checkpoint holds."""

    def __init__(self, c):
        super().__init__(c)
        self.register_buffer("prior", torch.linspace(-1, 1, c.branches), persistent=False)

    def forward(self, x):
        weights, chosen = (self.choose(x) + self.prior).softmax(-1).topk(self.k)
        return add_up(self.parts, x, chosen, weights, self.count)


BLOCKS: dict[str, Any] = {
    "listed": Listed,
    "numbered": Numbered,
    "reads_config": ReadsConfig,
    "three": ThreeAtOnce,
    "packed": PackedExperts,
    "prior": Prior,
    "normed": NormedScores,
    "first_always": FirstAlways,
}


class MixBlock(nn.Module):
    """A mean over the tokens before each in place of an attention, and a mixture."""

    def __init__(self, c):
        super().__init__()
        self.n1, self.n2, self.mix = nn.LayerNorm(c.width), nn.LayerNorm(c.width), nn.Linear(c.width, c.width)
        self.moe = BLOCKS[c.block](c)

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x + self.mix(self.n1(x)).cumsum(1) / steps
        return x + self.moe(self.n2(x).flatten(0, 1)).view_as(x)


class MixModel(PreTrainedModel):
    """A causal language model."""

    config_class = MixConfig
    base_model_prefix = "core"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.tok = nn.Embedding(config.vocab, config.width)
        self.stack = nn.ModuleList([MixBlock(config) for _ in range(config.depth)])
        self.fin, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocab, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.tok(input_ids)
        for block in self.stack:
            x = block(x)
        return CausalLMOutput(logits=self.head(self.fin(x)))


def mixture(block: str, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model with mixtures of one kind, and inputs for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixModel(MixConfig(block=block, **settings)).eval()
    return model, {"input_ids": torch.arange(48).view(2, 24) * 7 % 100}
