"""Heads, neurons and layers go from a checkpoint that is never loaded: the files are those of shrink and save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from hf_prune import PlanError, PruningConfig, prune_stream
from hf_prune.auto import load_native
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import load_meta_model
from hf_prune.conversion.streaming.shrunk_output import ShrunkOutput
from hf_prune.conversion.streaming.unit_curves import parsed
from tests import models
from tests.moe_families import tiny_moe
from tests.support.streams import Stop, assert_same_files, prune_in_memory, stop_at_record, tensors

LAYERS: dict[str, Any] = {"granularity": "layer", "sparsity": 0.4}
SETTINGS: dict[str, dict[str, Any]] = {
    "heads by magnitude": {"granularity": "head", "criterion": "magnitude", "scope": "global", "sparsity": 0.5},
    "heads and neurons at random": {"granularity": ("head", "neuron"), "criterion": "random", "target_params": 0.8},
    "heads and neurons by fisher": {"granularity": ("head", "neuron"), "criterion": "fisher", "sparsity": 0.5},
    "neurons by taylor, layer": {"granularity": "neuron", "criterion": "taylor", "scope": "layer", "sparsity": 0.5},
    "layers by magnitude": {**LAYERS, "criterion": "magnitude"},
    "layers greedily": {**LAYERS, "criterion": "greedy"},
    "layers by the default": {**LAYERS, "preset": "balanced"},
    "layers at random": {**LAYERS, "criterion": "random"},
    "heads and neurons by the default": {"granularity": ("head", "neuron"), "preset": "balanced", "sparsity": 0.5},
    "repaired by layer": {
        "granularity": ("head", "neuron"),
        "criterion": "taylor",
        "repair": "least_squares",
        "target_params": 0.7,
    },
    "repaired by loss": {
        "granularity": ("head", "neuron"),
        "criterion": "fisher",
        "repair": "least_squares",
        "objective": "loss",
    },
    "neurons by reconstruction": {
        "granularity": "neuron",
        "criterion": "reconstruction",
        "repair": "least_squares",
        "scope": "layer",
    },
    "repaired without layers": {
        "granularity": ("neuron", "layer"),
        "criterion": "fisher",
        "repair": "least_squares",
        "target_params": 0.6,
    },
    "all by fisher": {"granularity": ("head", "neuron", "layer"), "criterion": "fisher", "target_params": 0.6},
}


def deeper(kind: str) -> Any:
    """A tiny model of four layers."""
    model = models.TRANSFORMERS[kind]()
    config = model.config
    counts = [name for name in ("num_hidden_layers", "n_layer", "n_layers") if hasattr(config, name)]
    setattr(config, counts[0], 4)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * 4
    return models.fill(type(model)(config))


@pytest.mark.filterwarnings("ignore:repair='least_squares' changed nothing")  # of BERT: a norm follows the sum
@pytest.mark.covering(1)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert"])
def test_the_files_are_those_of_a_pruning_in_memory(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, config = deeper(kind), PruningConfig(**settings)
    model.save_pretrained(tmp_path / "source")
    batches = [{name: x for name, x in batch.items() if name != "labels"} for batch in models.tiny_batches(model)]
    prune_in_memory(tmp_path / "source", config, batches, tmp_path / "expected")
    data = batches if config.needs_data else None
    prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=data, cache_bytes=0)
    assert_same_files(tmp_path / "expected", tmp_path / "out")
    assert load_native(str(tmp_path / "out")).num_parameters() < model.num_parameters()


@pytest.mark.parametrize("name", ["all by fisher", "layers by the default", "repaired by loss"])
def test_an_interrupted_stream_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = deeper("llama"), PruningConfig(**SETTINGS[name])
    model.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    batches = models.tiny_batches(model)
    prune_stream(tmp_path / "source", config, tmp_path / "expected", calibration=batches)
    left, records = stop_at_record(monkeypatch)
    for steps in (1, 1, 3, 5):  # after some scores, while weights are repaired, and while files are written
        left[0] = steps
        with pytest.raises(Stop):
            prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
        assert not (tmp_path / "out").exists()
    left[0] = -1
    prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
    found = [json.dumps(record, sort_keys=True) for record in records]
    assert len(found) == len(set(found))  # nothing was done twice
    for path in (tmp_path / "expected").iterdir():
        if not path.name.startswith("."):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("settings", [SETTINGS["repaired by loss"], SETTINGS["layers by the default"]])
def test_no_more_than_the_weights_of_one_block_are_read(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deeper("llama")
    model.save_pretrained(tmp_path / "source")
    load, most = LazyWeights._load, [0]

    def watched(self: LazyWeights, name: str) -> None:
        load(self, name)
        layers = {part.split(".")[2] for part in self._loaded if ".layers." in part}
        most[0] = max(most[0], len(layers))

    monkeypatch.setattr(LazyWeights, "_load", watched)
    prune_stream(
        tmp_path / "source", PruningConfig(**settings), tmp_path / "out", calibration=models.tiny_batches(model)
    )
    assert most == [1]


@pytest.mark.parametrize("name", ["heads and neurons by fisher", "repaired by loss", "neurons by taylor, layer"])
def test_one_group_of_heads_for_all_layers(name: str, tmp_path: Path) -> None:
    """Phi-3 tells the heads of all layers by one number: one gate acts on all layers."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": models.VOCAB}
    more = {"hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 2}
    model = models.fill(Phi3ForCausalLM(Phi3Config(**sizes, **more)))
    model.save_pretrained(tmp_path / "source")
    config = PruningConfig(**{**SETTINGS[name], "granularity": ("head", "neuron"), "scope": "layer"})
    batches = models.tiny_batches(model)
    prune_in_memory(tmp_path / "source", config, batches, tmp_path / "expected")
    prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_what_every_block_reads_cannot_learn_block_by_block(tmp_path: Path) -> None:
    """Gemma 4 projects an input for every layer before the first one."""
    model, inputs = tiny_moe("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)
    model.save_pretrained(tmp_path / "source")
    config = PruningConfig(0.5, criterion="fisher_diagonal", target_modules=r".*(per_layer_model_projection|o_proj)")
    with pytest.raises(PlanError, match=r"since several blocks read what .*per_layer_model_projection.weight gives"):
        prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=[inputs()])


def test_curves_are_the_same_after_a_journal() -> None:
    losses = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(1e-60).cumsum(0)
    record = json.loads(json.dumps({"a": [list(range(49)), losses.tolist()]}))
    assert torch.equal(parsed(record)["a"].losses, losses)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_gaps_are_closed_one_by_one_and_damaged_files_are_made_again(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deeper("llama")
    model.save_pretrained(tmp_path / "source")
    config = PruningConfig(granularity="layer", criterion="random", repair="least_squares", sparsity=0.5, seed=1)
    batches = models.tiny_batches(model)
    prune_stream(tmp_path / "source", config, tmp_path / "expected", calibration=batches)
    write = ShrunkOutput.write

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(ShrunkOutput, "write", stop)
    with pytest.raises(Stop):
        prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
    monkeypatch.setattr(ShrunkOutput, "write", write)
    journal = Journal(tmp_path / "out")
    solved = [record["repaired"] for record in journal.records if record.get("repaired")]
    assert solved
    assert all(len(weights) == 1 for weights in solved)
    damage(journal.folder / "repaired" / "0.safetensors")
    (journal.folder / "journal.new").touch()  # of a journal that was about to be replaced
    prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:.*experts that saw no calibration token")
def test_neurons_of_packed_experts_are_ranked_by_gradients(tmp_path: Path) -> None:
    model, inputs = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "source")
    config = PruningConfig(granularity="neuron", criterion="fisher", scope="layer", sparsity=0.5)
    prune_in_memory(tmp_path / "source", config, [inputs()] * 2, tmp_path / "expected")
    prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=[inputs()] * 2)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_models_without_one_row_of_blocks_are_refused(tmp_path: Path) -> None:
    model = models.tiny_t5()
    model.save_pretrained(tmp_path / "source")
    config = PruningConfig(granularity="neuron", criterion="fisher", sparsity=0.5)
    with pytest.raises(PlanError, match="found 2 lists of blocks, expected one that every batch uses"):
        prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=models.tiny_batches(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*experts that saw")
@pytest.mark.parametrize("family", ["lfm2_moe", "granitemoehybrid", "nemotron_h", "dbrx"])
def test_weights_that_are_used_outside_of_their_modules_are_read(family: str, tmp_path: Path) -> None:
    """Mamba layers and short convolutions pass the weight of a convolution to a function, DBRX those of experts."""
    model, inputs = tiny_moe(family)
    model.save_pretrained(tmp_path / "source")
    batches = [inputs()] * 2
    for settings in ({"criterion": "wanda", "scope": "row"}, {"criterion": "alps", "allocation": "fisher"}):
        config = PruningConfig(0.5, **settings)
        expected = load_native(str(tmp_path / "source")).prune(config, calibration=batches)
        prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches, overwrite=True)
        found = load_native(str(tmp_path / "out"))
        assert expected.masks.keys() == found.masks.keys()
        assert all(torch.equal(mask, found.masks[name]) for name, mask in expected.masks.items())


def test_what_is_computed_from_absent_weights_is_refused(tmp_path: Path) -> None:
    """Torch returns memory that nobody has written for some functions of a tensor on the meta device."""
    model = models.tiny_llama()
    model.save_pretrained(tmp_path)
    meta_model = load_meta_model(str(tmp_path))
    weight = meta_model.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    x = torch.ones(2, 3, weight.shape[1])
    with LazyWeights(meta_model, meta_model.read, meta_model.read_rows), torch.no_grad():
        expected = meta_model.read("model.layers.0.mlp.up_proj.weight")
        assert torch.equal(x @ weight.t(), x @ expected.t())
        assert torch.equal(torch.cat([x[0], weight]), torch.cat([x[0], expected]))
        with pytest.raises(NotImplementedError, match="an input of conv1d is on the meta device"):
            torch.nn.functional.conv1d(x.mT, (weight * 2)[:, :, None])
