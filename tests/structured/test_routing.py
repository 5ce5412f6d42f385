"""What calibration sees of routers and experts, against what the modules compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_prune import CalibrationError, ConfigError, MaskStore, PruningConfig, prune, shrink
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.switched_off import units_that_run
from hf_prune.cli.main import main
from hf_prune.structured import routing
from hf_prune.structured.routing import observe_routing
from tests.models import tiny_tokenizer
from tests.moe_families import MODELS, tiny_moe


def batches(inputs: Any, number: int = 3) -> list[dict[str, Tensor]]:
    """Some batches of other tokens than the first one's."""
    return [{name: (ids * (i + 1) + i) % 60 + 3 for name, ids in inputs().items()} for i in range(number)]


@torch.no_grad()
def by_hand(model: Any, data: list[dict[str, Tensor]], layer: int) -> tuple[Tensor, Tensor, int]:
    """Tokens and norms of each expert of a Mixtral, from the gate and one product for each token and choice."""
    block, inputs = model.model.layers[layer].mlp, []
    hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    for batch in data:
        model(**batch)
    hook.remove()
    tokens, norms = torch.zeros(8), torch.zeros(8)
    x = torch.cat(inputs)
    scores = (x @ block.gate.weight.t()).softmax(-1)
    for token, score in zip(x, scores, strict=True):
        best = score.topk(2)
        for expert, weight in zip(best.indices.tolist(), best.values / best.values.sum(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            output = block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
            tokens[expert] += 1
            norms[expert] += weight * output.norm()
    return tokens, norms, len(x)


def test_what_is_observed_is_what_the_modules_compute() -> None:
    model, inputs = tiny_moe("mixtral")
    data = batches(inputs)
    groups = kind_named("expert").groups(model)
    seen = observe_routing(model, groups, data)
    for layer, group in enumerate(groups):
        tokens, norms, total = by_hand(model, data, layer)
        observed = seen[group.name]
        assert observed.total == total == 72
        assert observed.tokens.tolist() == tokens.tolist()
        assert torch.allclose(observed.norms.float(), norms, rtol=1e-4)
        assert torch.allclose(observed.reap.float(), norms / tokens.clamp_min(1), rtol=1e-4)
        assert torch.allclose(observed.frequency.float(), tokens / total)


@pytest.mark.parametrize("model_type", [name for name in MODELS if name not in ("jetmoe", "gemma4_text")])
def test_one_expert_at_a_time_gives_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for classes that are called differently is exact where the other one works as well.

    It cannot be gone where there is no module around router and experts that only adds up what the experts compute.
    """
    model, inputs = tiny_moe(model_type)
    groups = kind_named("expert").groups(model)
    data = batches(inputs, 1)
    seen = observe_routing(model, groups, data)
    monkeypatch.setattr(routing, "_routed_call", lambda *_: None)
    alone = observe_routing(model, groups, data)
    for name, observed in seen.items():
        assert observed.tokens.sum() > 0
        assert torch.equal(observed.tokens, alone[name].tokens)
        assert torch.allclose(observed.norms, alone[name].norms, rtol=1e-3, atol=1e-5)


def test_padding_does_not_count() -> None:
    model, inputs = tiny_moe("qwen3_moe")
    ids = inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    groups = kind_named("expert").groups(model)
    seen = observe_routing(model, groups, [{"input_ids": ids, "attention_mask": mask}])
    assert {observed.total for observed in seen.values()} == {12 + 5}
    assert all(observed.tokens.sum() == 2 * 17 for observed in seen.values())


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_experts_with_the_lowest_scores_go(criterion: str) -> None:
    model, inputs = tiny_moe("olmoe")
    data, groups = batches(inputs), kind_named("expert").groups(model)
    scores = {name: getattr(seen, criterion) for name, seen in observe_routing(model, groups, data).items()}
    prune(model, 0.5, granularity="expert", criterion=criterion, calibration=data)
    for group in groups:
        kept = MaskStore.of(model).masks[group.slices[0].name].flatten(1).all(1)
        assert scores[group.name][kept].min() >= scores[group.name][~kept].max()
    assert {group.units for group in kind_named("expert").groups(shrink(model))} == {4}


def test_a_masked_model_is_observed_by_the_numbers_of_all_experts() -> None:
    model, inputs = tiny_moe("mixtral")
    data, groups = batches(inputs), kind_named("expert").groups(model)
    prune(model, 0.5, granularity="expert", criterion="reap", calibration=data)
    seen = observe_routing(model, groups, data)
    for group in groups:
        kept = MaskStore.of(model).masks[group.slices[0].name].flatten(1).all(1)
        assert seen[group.name].tokens[~kept].sum() == 0
        assert seen[group.name].tokens[kept].sum() == 2 * seen[group.name].total
    prune(model, 5 / 8, granularity="expert", criterion="reap", calibration=data)
    assert {group.units for group in kind_named("expert").groups(shrink(model))} == {3}


def test_experts_without_tokens_are_named_unless_they_are_switched_off() -> None:
    model, inputs = tiny_moe("mixtral")
    prune(model, 1 / 8, granularity="expert")
    (first, *_) = groups = kind_named("expert").groups(model)
    running = [units_that_run(model, group).tolist() for group in groups]
    with pytest.warns(UserWarning, match=r"(\d+) of 14 experts saw no calibration token") as warned:
        prune(
            model,
            0.5,
            granularity="expert",
            criterion="reap",
            calibration=[{"input_ids": inputs()["input_ids"][:1, :1]}],
        )
    assert f"{first.name}[" in str(warned[0].message)
    assert int(str(warned[0].message).split()[0]) == sum(len(units) for units in running) - 2 * len(groups)


def test_experts_that_no_forward_pass_calls_are_refused() -> None:
    model, inputs = tiny_moe("jetmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"no token was seen on its way to layers\.0\.self_attention\.experts"):
        prune(model, 0.5, granularity="expert", criterion="reap", calibration=batches(inputs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    spared = {"exclude_modules": r".*self_attention.*", "calibration": batches(inputs)}
    with pytest.warns(UserWarning, match="saw no calibration token"):
        prune(model, 0.5, granularity="expert", criterion="reap", **spared)
    assert sorted(group.units for group in kind_named("expert").groups(shrink(model))) == [4, 4, 8, 8]


def test_reap_needs_texts_and_ranks_experts_only() -> None:
    model, _ = tiny_moe("mixtral")
    with pytest.raises(CalibrationError, match="'reap' needs calibration data"):
        prune(model, 0.5, granularity="expert", criterion="reap")
    with pytest.raises(ConfigError, match=r"'reap' cannot rank heads: expected one of fisher, magnitude"):
        PruningConfig(granularity="head", criterion="reap")
    with pytest.raises(ConfigError, match=r"'frequency' cannot rank neurons"):
        PruningConfig(granularity=("expert", "neuron"), criterion="frequency")


@pytest.mark.filterwarnings("ignore:Token indices sequence length", "ignore:1 of 16 experts saw no calibration token")
def test_the_command_line_removes_experts_with_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = tiny_moe("qwen3_moe")
    tokenizer = tiny_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    words = [f"w{number}" for number in range(40)]
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(words) for _ in range(60)))
    options = ["--granularity", "expert", "--criterion", "reap", "--sparsity", "0.5", "--window", "16"]
    data = ["--data", str(tmp_path / "texts.txt"), "--calibration-samples", "4"]
    with pytest.raises(SystemExit) as done:
        main(["prune", str(tmp_path / "dense"), *options, *data, "--details", "--out", str(tmp_path / "pruned")])
    output, errors = capsys.readouterr()
    assert done.value.code == 0, errors
    assert re.search(r"layers\.1\.mlp\.experts +experts +8 +4", output)
    assert "It loads with plain transformers, without hf_prune." in output
    loaded = type(model).from_pretrained(tmp_path / "pruned")
    assert {group.units for group in kind_named("expert").groups(loaded)} == {4}
    with pytest.raises(SystemExit, match="0"):
        main(["list"])
    listed = capsys.readouterr().out
    assert re.search(r"reap +texts +router-weighted norm", listed)
    assert re.search(r"expert +layer, global +experts of a mixture", listed)
