"""Models of nobody's family whose blocks stand where no list of layers is: piece by piece, in attributes, in a dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput


class PlaceConfig(PreTrainedConfig):
    """Sizes in the words of custom code."""

    model_type = "one_without_a_list"

    def __init__(self, vocab_size=64, dim=48, depth=3, heads=6, dim_head=16, mlp_dim=80, **kwargs):
        self.vocab_size, self.dim, self.depth, self.heads = vocab_size, dim, depth, heads
        self.dim_head, self.mlp_dim = dim_head, mlp_dim
        super().__init__(**kwargs)


class Attention(nn.Module):
    """A norm, one matrix for queries, keys and values, and an output in a sequence of modules."""

    def __init__(self, c):
        super().__init__()
        inner = c.heads * c.dim_head
        self.heads, self.scale, self.norm = c.heads, c.dim_head**-0.5, nn.LayerNorm(c.dim)
        self.to_qkv = nn.Linear(c.dim, inner * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, c.dim), nn.Dropout(0.0))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (y.reshape(b, t, self.heads, -1).transpose(1, 2) for y in self.to_qkv(self.norm(x)).chunk(3, -1))
        attention = (q @ k.mT * self.scale).softmax(-1)
        return self.to_out((attention @ v).transpose(1, 2).reshape(b, t, -1))


def network(c):
    """A feed-forward network without a class of its own."""
    return nn.Sequential(
        nn.LayerNorm(c.dim), nn.Linear(c.dim, c.mlp_dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(c.mlp_dim, c.dim)
    )


class Block(nn.Module):
    """An attention and a network."""

    def __init__(self, c):
        super().__init__()
        self.attend, self.feed = Attention(c), network(c)

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.feed(x)


class Placed(PreTrainedModel):
    """What all of them share."""

    config_class = PlaceConfig
    base_model_prefix = "core"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.emb, self.norm = nn.Embedding(config.vocab_size, config.dim), nn.LayerNorm(config.dim)
        self.place(config)
        self.post_init()

    def place(self, config: Any) -> None:
        raise NotImplementedError

    def run(self, x):
        raise NotImplementedError

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return BaseModelOutput(last_hidden_state=self.norm(self.run(self.emb(input_ids))))


class Pairs(Placed):
    """A list of lists: no layer is run as a whole."""

    def place(self, config):
        self.layers = nn.ModuleList([nn.ModuleList([Attention(config), network(config)]) for _ in range(config.depth)])

    def run(self, x):
        for attend, feed in self.layers:
            x = attend(x) + x
            x = feed(x) + x
        return x


class Named(Placed):
    """Blocks in attributes that are numbered by hand."""

    def place(self, config):
        self.block1, self.block2 = Block(config), Block(config)

    def run(self, x):
        return self.block2(self.block1(x))


class Numbered(Placed):
    """As many attributes as the config says."""

    def place(self, config):
        for number in range(config.depth):
            setattr(self, f"layer_{number}", Block(config))

    def run(self, x):
        for number in range(self.config.depth):
            x = getattr(self, f"layer_{number}")(x)
        return x


class Dict(Placed):
    """Blocks in a dict."""

    def place(self, config):
        self.blocks = nn.ModuleDict({f"block_{number}": Block(config) for number in range(config.depth)})

    def run(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


class Flat(Placed):
    """One layer, and all of it in the model itself."""

    def place(self, config):
        inner, self.n_head = config.heads * config.dim_head, config.heads
        self.q, self.k, self.v = (nn.Linear(config.dim, inner) for _ in range(3))
        self.o, self.fc1 = nn.Linear(inner, config.dim), nn.Linear(config.dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def run(self, x):
        b, t, _ = x.shape
        q, k, v = (matrix(x).view(b, t, self.n_head, -1).transpose(1, 2) for matrix in (self.q, self.k, self.v))
        x = x + self.o(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.fc2(torch.relu(self.fc1(nn.functional.layer_norm(x, x.shape[-1:]))))


class Projected(Placed):
    """A list of layers, and a network behind it."""

    def place(self, config):
        self.layers = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.projector = nn.Sequential(nn.Linear(config.dim, config.mlp_dim), nn.Linear(config.mlp_dim, config.dim))

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.projector(self.norm(x))


PLACED: dict[Any, tuple[int, int]] = {  # with the number of places that have heads, and neurons
    Pairs: (3, 3), Named: (2, 2), Numbered: (3, 3), Dict: (3, 3), Flat: (1, 1), Projected: (3, 4),
}  # fmt: skip


class RigidConfig(PreTrainedConfig):
    """Numbers of which no smaller ones fit together."""

    model_type = "one_of_one_size"

    def __init__(self, columns=10, hidden_size=40, **kwargs):
        self.columns, self.hidden_size = columns, hidden_size
        super().__init__(**kwargs)


class Rigid(PreTrainedModel):
    """A network for rows of a table, whose forward pass takes them under a name of its own."""

    config_class = RigidConfig

    def __init__(self, config):
        super().__init__(config)
        assert config.hidden_size == 40
        self.inp, self.norm = nn.Linear(config.columns, 40), nn.LayerNorm(40)
        self.up, self.down, self.out = nn.Linear(40, 100), nn.Linear(100, 40), nn.Linear(40, 2)
        self.factor = 1.0
        self.post_init()

    def forward(self, rows):
        hidden = self.inp(rows)
        return {"logits": self.out(hidden + self.down(torch.relu(self.up(self.norm(hidden))))) * self.factor}


class NoNumbers(Rigid):
    """Its outputs are no numbers, so nothing that is removed would show."""

    def forward(self, rows):
        return {"logits": super().forward(rows)["logits"] * float("nan")}


class OfTorch(Placed):
    """Layers of torch."""

    def place(self, config):
        layer = nn.TransformerEncoderLayer(config.dim, config.heads, config.mlp_dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.depth)

    def run(self, x):
        return self.encoder(x)
