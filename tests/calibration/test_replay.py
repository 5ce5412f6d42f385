"""Finished blocks are replayed only where that changes nothing, whatever a model does between and after its blocks."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from hf_prune.calibration import replay
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.replay import Replay
from hf_prune.calibration.tainted import Tainted, TaintedError, tainted
from hf_prune.calibration.trial import NotAlikeError, fingerprint
from hf_prune.calibration.trial import _close as close
from hf_prune.conversion.streaming.prune_stream import prune_stream
from hf_prune.criteria.base import INPUTS
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.models import same_bits, tiny_batches

WIDTH = 8


def linears(number: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(number))


class Residual(nn.Linear):
    """Adds to a residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(super().forward(x))


def residuals(number: int) -> nn.ModuleList:
    return nn.ModuleList(Residual(WIDTH, WIDTH) for _ in range(number))


class Plain(nn.Module):
    """All that later modules see of the blocks is the output of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = residuals(4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Past(Plain):
    """A module after the blocks reads what the first one put out, past all others (U-Net, DPT, deepstack)."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.late = linears(2), nn.Linear(2 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = early = torch.relu(self.blocks[0](x)) * 3
        for block in self.blocks[1:]:
            x = torch.relu(block(x))
        for layer in self.neck:
            x = torch.relu(layer(x))
        return self.out(x) + self.late(torch.cat([x, early], -1))


class UNet(Plain):
    """The second half of the blocks reads what the first half put out, in reverse."""

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.blocks[:2]:
            x = torch.tanh(block(x))
            kept.append(x)
        for block in self.blocks[2:]:
            x = torch.tanh(block(x)) + kept.pop()
        return self.out(x)


class Leaves(nn.Module):
    """Leaves twice its input for others."""

    def __init__(self, where: dict, first: bool) -> None:
        super().__init__()
        self.linear, self.first, self.where = nn.Linear(WIDTH, WIDTH), first, where

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.where["value"] = self.left(x)
        return torch.tanh(self.linear(x)) + self.where["value"]

    def left(self, x: Tensor) -> object:
        return x * 2


class LeavesNumber(Leaves):
    def left(self, x: Tensor) -> object:
        return float(x.abs().mean())


class Aside(Plain):
    """Blocks leave something beside their outputs, anew for each batch (Gemma 3n shares keys and values)."""

    block = Leaves

    def __init__(self, fresh: bool) -> None:
        super().__init__()
        self.where, self.fresh = {}, fresh
        self.blocks = nn.ModuleList(self.block(self.where, i == 0) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.fresh:
            self.where.clear()
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Number(Aside):
    """What they leave is a number, not a tensor."""

    block = LeavesNumber


class Stages(nn.Module):
    """Blocks of different widths (SegFormer)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH + 2 * i, WIDTH + 2 * i + 2) for i in range(3))
        self.between = nn.ModuleList(nn.Linear(WIDTH + 2 * i + 2, WIDTH + 2 * i + 2) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block, between in zip(self.blocks, self.between, strict=True):
            x = torch.relu(between(torch.tanh(block(x))))
        return x


class TwoStreams(Plain):
    """Two stacks that read one another."""

    def __init__(self) -> None:
        super().__init__()
        self.others = residuals(4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(-1)
        for block, other in zip(self.blocks, self.others, strict=True):
            x = block(x + y)
            y = other(x - y)
        return self.out(x + y)


class EarlyExit(Plain):
    """Batches that are sure of themselves skip the rest, as some do and the first one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.abs().mean() > self.limit:
                break
        return self.out(x)


class EarlyRows(Plain):
    """Examples that are sure of themselves skip the rest."""

    def forward(self, x: Tensor) -> Tensor:
        found, rows = torch.zeros_like(x), torch.arange(len(x))
        for block in self.blocks:
            x = block(x)
            done = x.abs().mean(-1) > 1.2
            found[rows[done]], x, rows = x[done], x[~done], rows[~done]
        found[rows] = x
        return self.out(found)


class InPlace(nn.Module):
    """Blocks put nothing out, and change what they get."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> None:
            x.add_(torch.tanh(self.linear(x)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(InPlace.Block() for _ in range(3)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            block(x)
        return self.out(x)


class Changed(nn.Module):
    """Two layers get the same tensor, which has changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = linears(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.one(x)
        x += 2 * torch.relu(y)
        return self.two(x) + y


class Optional(Plain):
    """Some batches have another input, which runs through blocks of its own and is read by others, late."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = linears(3)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        deep = []
        for block in self.tower if image is not None else ():
            image = torch.tanh(block(image))
            deep.append(image)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if deep and i < 3:
                x = x + 3 * deep[i]
        return self.out(x)


class Switch(nn.Module):
    """Two layers get the same input, if it is large, and different ones if not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = linears(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x if x.abs().mean() > 0.5 else 5 * x.flip(-1))


class Heads(nn.Module):
    """A head after every block, tied to the embedding: pruning it changes what all blocks get."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = residuals(3)

    def forward(self, ids: Tensor) -> Tensor:
        x, logits = self.embedding(ids), 0
        for block in self.blocks:
            x = block(x)
            logits = logits + self.head(x)
        return logits


class Late(nn.Module):
    """Long inputs, and the first ones are short, go by the output of the first block once more at the end."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.blocks, self.out, self.rows, self.use = linears(3), nn.Linear(WIDTH, 4), nn.Embedding(WIDTH, WIDTH), use

    def forward(self, x: Tensor) -> Tensor:
        x = early = torch.relu(self.blocks[0](x)) * 3
        for block in self.blocks[1:]:
            x = torch.relu(block(x))
        if self.use == "gate":  # of values, not of length; what is compared with NaN is False
            x = torch.where(early.mean(-1, keepdim=True) > 4, torch.zeros_like(x), x)
        elif x.shape[1] <= 4:
            pass
        elif self.use == "index":
            x = x + self.rows(early.argmax(-1)) * 3
        elif self.use == "number":
            x = x + torch.nan_to_num(early)
        elif self.use == "fill":
            x = x.masked_fill(early > early.mean(), 0.0)
        elif self.use == "write":
            x = x.clone()
            x[early > 1] = 0.0
        elif self.use == "branch" and bool(early.mean() > -1):
            x = x * x
        return self.out(x)


class Keeps(nn.Linear):
    """Keeps something of long inputs in itself."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(super().forward(x)) * 2
        if x.shape[1] > 4:
            self.kept = y.mean((0, 1))
        return y


class LateState(nn.Module):
    """Long inputs read what the first block has kept of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(Keeps(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x if x.shape[1] <= 4 else x + self.blocks[0].kept)


LATE = ["gate", "index", "number", "fill", "write", "branch"]
ZOO = {
    **{f"late_{use}": functools.partial(Late, use) for use in LATE},
    "late_state": LateState,
    "plain": Plain,
    "past": Past,
    "unet": UNet,
    "aside": lambda: Aside(fresh=True),
    "aside_stale": lambda: Aside(fresh=False),
    "number": lambda: Number(fresh=True),
    "number_stale": lambda: Number(fresh=False),
    "stages": Stages,
    "two_streams": TwoStreams,
    "early_exit": EarlyExit,
    "early_rows": EarlyRows,
    "in_place": InPlace,
    "changed": Changed,
    "optional": Optional,
    "switch": Switch,
    "heads": Heads,
}
SETTINGS = {
    "wanda": {"criterion": "wanda", "scope": "row"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
    "least_squares": {"repair": "least_squares"},
}


def make(kind: str) -> nn.Module:
    model = models.fill(ZOO[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    return model


def batches_for(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if kind == "heads":
        return [{"ids": torch.randint(WIDTH, (24,), generator=generator)} for _ in range(4)]
    if kind.startswith("late"):
        scales = {3: 1.0, 4: 1.0, 9: 6.0, 12: 6.0}
        return [{"x": torch.randn(4, n, WIDTH, generator=generator) * scale} for n, scale in scales.items()]
    batches = [{"x": torch.randn(24, WIDTH, generator=generator)} for _ in range(4)]
    if kind in ("early_exit", "switch"):  # the first one goes through all blocks, the last one leaves midway
        batches[0]["x"] *= 0.7 if kind == "early_exit" else 1.0
        batches[-1]["x"] *= 2.5 if kind == "early_exit" else 0.2
    if kind == "optional":
        batches[2]["image"] = torch.randn(24, WIDTH, generator=generator)
    return batches


@pytest.mark.covering(1)
@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("kind", sorted(ZOO))
def test_one_call_gives_what_one_call_for_each_weight_gives(kind, settings):
    together, apart, batches = make(kind), make(kind), batches_for(kind)
    with InputReader(together, targets_of(make_plan(together, PruningConfig(criterion="wanda"))), batches) as reader:
        order = [t.module for step in reader.order() for t in step]
    prune(together, 0.5, calibration=batches, **SETTINGS[settings])
    for name in order:
        prune(apart, 0.5, calibration=batches, target_modules=name.replace(".", r"\."), **SETTINGS[settings])
    for name, parameter in apart.named_parameters():
        torch.testing.assert_close(together.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    for name, mask in MaskStore.of(apart).masks.items():
        assert torch.equal(MaskStore.of(together).masks[name], mask), name


def without_replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "pending", lambda self: [])
    monkeypatch.setattr(InputReader, "verify", lambda self: False)


@pytest.mark.covering(1)
@pytest.mark.parametrize("settings", ["sparsegpt", "least_squares"])
@pytest.mark.parametrize("kind", sorted(set(ZOO) - {"early_exit", "early_rows"} - {f"late_{use}" for use in LATE[1:]}))
def test_the_objective_loss_gives_what_it_gives_without_replaying(kind, settings, monkeypatch):
    batches, values = batches_for(kind), {**SETTINGS[settings], "objective": "loss"}
    once = prune(make(kind), 0.5, calibration=batches, **values)
    without_replaying(monkeypatch)
    whole = prune(make(kind), 0.5, calibration=batches, **values)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(once.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def tiny_qwen3_vl() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Its first blocks read what the first blocks of a vision tower put out; one of the batches has no image."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {"vocab_size": 80, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    tokens = {"image_token_id": 70, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73}
    model = models.fill(
        Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
    )
    generator = torch.Generator().manual_seed(0)
    batches: list[dict[str, Tensor]] = []
    for image in (True, False):
        ids = torch.randint(3, 60, (1, 12), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if image:
            ids[0, 2:7] = torch.tensor([72, 70, 70, 70, 70])
            batches[-1] |= {"mm_token_type_ids": (ids == 70).int(), "image_grid_thw": torch.tensor([[1, 4, 4]])}
            batches[-1]["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    return model.eval(), batches


@pytest.mark.parametrize("values", [{"criterion": "sparsegpt"}, {"criterion": "wanda", "objective": "loss"}])
def test_a_model_with_deepstack_is_pruned_as_without_replaying(values, tmp_path, monkeypatch):
    model, batches = tiny_qwen3_vl()
    if "objective" in values:
        values = {**values, "repair": "least_squares"}
    else:
        model.save_pretrained(tmp_path / "dense")
        prune_stream(tmp_path / "dense", 0.5, tmp_path / "streamed", calibration=batches, **values)
    once = prune(copy.deepcopy(model), 0.5, calibration=batches, **values)
    without_replaying(monkeypatch)
    whole = prune(model, 0.5, calibration=batches, **values)
    assert all(same_bits(once.get_parameter(name), parameter) for name, parameter in whole.named_parameters())
    if "objective" not in values:
        streamed = type(model).from_pretrained(tmp_path / "streamed")
        assert all(same_bits(streamed.get_parameter(name), parameter) for name, parameter in whole.named_parameters())


def replays(kind: str) -> tuple[list[list[bool]], list[int]]:
    """Which blocks may be replayed, and how many are in the end."""
    model, batches = make(kind), batches_for(kind)
    with InputReader(model, targets_of(make_plan(model, PruningConfig(criterion="wanda"))), batches) as reader:
        for step in reader.order():
            reader.gather(step, INPUTS)
            reader.finish(step)
        reader.advance()
        return [s.safe for s in reader.replay.sequences], [s.replayed for s in reader.replay.sequences]


def test_blocks_are_replayed_where_that_changes_nothing():
    assert replays("plain") == ([[True] * 4], [4])
    assert replays("in_place") == ([[False] * 3], [0])
    assert replays("optional") == ([[True] * 4, [True, False, False]], [4, 1])
    assert replays("heads")[0] == [[True] * 3]


def test_what_is_read_past_finished_blocks_is_computed():
    assert replays("unet") == ([[True, False, False, False]], [1])
    assert replays("past") == ([[True, False, False, False], [True, True]], [1, 2])
    assert replays("stages")[0] == [[True, False, False], [True, False, False]]
    for kind in ("aside", "aside_stale", "number", "number_stale"):
        assert replays(kind)[0] == [[False, False, True]], kind


def test_blocks_that_batches_may_leave_midway_are_not_replayed():
    model, batches = make("early_exit"), batches_for("early_exit")
    calls = []
    for batch in batches:
        handle = model.blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
        model(**batch)
        handle.remove()
        assert calls  # by the first one, at least
    assert 0 < len(calls) < len(batches)
    assert replays("early_exit") == ([[True, False, False, False]], [1])


@pytest.mark.parametrize("use", LATE)
def test_what_only_some_batches_do_ends_replaying(use):
    assert replays(f"late_{use}")[0] == [[True, False, False]] if use != "gate" else [[False] * 3]


def test_what_is_computed_from_tainted_tensors_is_tainted():
    x, y = tainted(torch.ones(3, 4)), torch.ones(3, 4)
    assert bool(torch.isnan(x.as_subclass(Tensor)).all())
    assert tainted(torch.arange(3)).as_subclass(Tensor).tolist() == [0, 1, 2]
    assert tainted("anything") == "anything"
    assert (x.shape, x.dtype, x.dim(), len(x), x.size(0)) == ((3, 4), torch.float32, 2, 3, 3)
    found = [x + y, y + x, x > 0, x.argmax(-1), torch.where(x > 0, y, y), torch.nan_to_num(x), y.masked_fill(x > 0, 1)]
    found += [
        x.sum(),
        x[0],
        torch.cat([y, x]),
        nn.functional.linear(y, x),
        nn.Linear(4, 2)(x),
        y[tainted(torch.arange(2))],
    ]
    assert all(isinstance(value, Tainted) for value in found)
    leaks = [
        lambda: bool((x > 0).any()),
        lambda: x.sum().item(),
        lambda: float(x[0, 0]),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: torch.equal(x, y),
        lambda: x.nonzero(),
        lambda: y[x > 0],
        lambda: y.masked_select(x > 0),
        lambda: y.add_(x),
        lambda: y.copy_(x),
        lambda: y.__iadd__(x),
        lambda: y.__setitem__(x > 0, 0.0),
        lambda: torch.add(y, x, out=torch.empty(3, 4)),
    ]
    for leak in leaks:
        with pytest.raises(TaintedError):
            leak()
    assert torch.equal(y, torch.ones(3, 4))


def test_a_difference_in_one_feature_counts_beside_massive_activations():
    x = torch.randn(5, 64)
    x[:, 3] = 1000
    other = x.clone()
    other[2, 10] += 0.5
    assert close(fingerprint(x), fingerprint(x.clone()))
    assert not close(fingerprint(x), fingerprint(other))
    x[1, 1] = float("nan")
    assert close(fingerprint(x), fingerprint(x.clone()))
    assert not close(fingerprint(x), fingerprint(other))


def test_the_model_is_as_it_was_and_draws_nothing():
    for kind in sorted(ZOO):
        model, batches = make(kind), batches_for(kind)
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        with InputReader(model, targets_of(make_plan(model, PruningConfig(criterion="wanda"))), batches) as reader:
            reader.order()
            reader.verify()
        assert torch.equal(torch.get_rng_state(), random)
        assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_goals_that_cannot_be_recorded_block_by_block_are_recorded_at_the_start(monkeypatch):
    """A dense model whose blocks turn out to differ is recorded anew, before anything is pruned."""
    expected = prune(models.tiny_llama(), 0.5, criterion="alps", objective="loss", calibration=tiny_batches(BUILT))
    run, calls = InputReader.run, [0]

    def fail_once(self, watchers, batches, *args, **kwargs):
        if self.replay.active and kwargs.get("after_batch") is not None and not calls[0]:
            calls[0] += 1
            raise NotAlikeError
        return run(self, watchers, batches, *args, **kwargs)

    monkeypatch.setattr(InputReader, "run", fail_once)
    found = prune(models.tiny_llama(), 0.5, criterion="alps", objective="loss", calibration=tiny_batches(BUILT))
    assert calls == [1]
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


BUILT = models.tiny_llama()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("length", [5, 16])  # 16 is the hidden size
def test_an_output_layer_tied_to_an_embedding_sees_hidden_states(criterion, length):
    model = models.tiny_llama(tie_word_embeddings=True)
    apart = models.tiny_llama()  # the same weights, but not shared
    with torch.no_grad():
        apart.load_state_dict(model.state_dict(), strict=False)
        apart.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    batches = tiny_batches(model, length=length)
    for each in (model, apart):
        prune(each, 0.5, criterion=criterion, target_modules=["lm_head"], calibration=batches)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, apart.lm_head.weight)


def test_what_may_be_replayed_is_tried_once_for_a_pruning(monkeypatch):
    tried, try_replay = [], replay.try_replay

    def noted(sequence, trace):
        tried.append(sequence)
        return try_replay(sequence, trace)

    monkeypatch.setattr(replay, "try_replay", noted)
    model = models.tiny_bert(num_hidden_layers=3)
    prune(model, sparsity=0.5, calibration=tiny_batches(model, sizes=(4, 2)), preset="best")
    assert len(tried) == 1
