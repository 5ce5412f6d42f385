"""Checkpoints with code of their own: refused unless trusted, and then pruned, scored, timed and described."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_prune.checkpoint.custom_code import is_trusted
from tests import models
from tests.support.command_line import run_command

CONFIGURATION = """
from transformers import PretrainedConfig

class MixerConfig(PretrainedConfig):
    model_type = "mixer_of_a_test"

    def __init__(self, vocab_size=48, hidden_size=16, num_hidden_layers=2, intermediate_size=24, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.intermediate_size = num_hidden_layers, intermediate_size
        super().__init__(**kwargs)
"""
LAYERS = """
from torch import nn

class MixerLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.norm(x))))
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from .configuration_mixer import MixerConfig
from .layers_mixer import MixerLayer

class MixerForSequenceClassification(PreTrainedModel):
    config_class = MixerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MixerLayer(config) for _ in range(config.num_hidden_layers))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
"""
CODE = {"configuration_mixer.py": CONFIGURATION, "layers_mixer.py": LAYERS, "modeling_mixer.py": MODELING}
TRUST = "--trust-remote-code"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A checkpoint with code of its own, and labelled sentences."""
    root = tmp_path_factory.mktemp("custom")
    model = root / "model"
    model.mkdir()
    for name, text in CODE.items():
        (model / name).write_text(text)
    named = {
        "AutoConfig": "configuration_mixer.MixerConfig",
        "AutoModelForSequenceClassification": "modeling_mixer.MixerForSequenceClassification",
    }
    described = {"model_type": "mixer_of_a_test", "architectures": ["MixerForSequenceClassification"]}
    (model / "config.json").write_text(json.dumps({**described, "auto_map": named}))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, trust_remote_code=True)
    built = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
    save_file(built.state_dict(), model / "model.safetensors", {"format": "pt"})
    models.tiny_tokenizer().save_pretrained(model)
    (root / "data").mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        sentences = models.tiny_sentences(24, seed)
        rows = [f"{a}\t{b}" for a, b in zip(sentences["sentence"], sentences["label"], strict=True)]
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return str(model), str(root / "data")


@pytest.fixture
def hf_prune(capsys):
    return functools.partial(run_command, capsys)


def loaded(folder: Path):
    return AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("command", ["inspect", "report", "bench", "evaluate", "prune", "export"])
def test_code_runs_only_if_it_is_trusted(command, folders, hf_prune, tmp_path):
    more = {"prune": ["--sparsity", "0.5", "--out", tmp_path / "out"], "export": [tmp_path / "out.onnx"]}
    more["evaluate"] = ["--data", folders[1]]
    code, _, err = hf_prune(command, folders[0], *more.get(command, []))
    assert code == 1
    assert err.count("\n") == 1
    assert "code of its own (configuration_mixer.py, modeling_mixer.py), which runs only if you trust it" in err
    assert TRUST in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings", [["--criterion", "wanda", "--data"], ["--stream"], ["--granularity", "neuron"]], ids=lambda s: s[0]
)
def test_trusted_code_is_pruned_and_goes_along(settings, folders, hf_prune, tmp_path):
    settings = [*settings, folders[1]] if settings[-1] == "--data" else settings
    out = tmp_path / "out"
    assert hf_prune("prune", folders[0], "--sparsity", 0.5, *settings, "--out", out, TRUST)[0] == 0
    assert not is_trusted()
    assert {path.name for path in out.glob("*.py")} == CODE.keys()
    model = loaded(out)
    removed = sum(int((p == 0).sum()) for name, p in model.named_parameters() if "proj.weight" in name)
    kept = sum(p.numel() for name, p in model.named_parameters() if "proj.weight" in name)
    assert (kept == 768 and removed == 0) if "neuron" in settings else removed == 768
    for command in (["report", out], ["evaluate", out, "--data", folders[1], "--against", folders[0]]):
        code, said, _ = hf_prune(*command, TRUST)
        assert (code, bool(said)) == (0, True)


def test_trusted_code_is_inspected_timed_and_compressed(folders, hf_prune, tmp_path):
    code, said, _ = hf_prune("inspect", folders[0], TRUST)
    assert (code, "down_proj" in said) == (0, True)
    assert hf_prune("bench", folders[0], "--length", 4, "--rounds", 2, "--warmup", 1, TRUST)[0] == 0
    sparse, small = tmp_path / "sparse", tmp_path / "small"
    hf_prune("prune", folders[0], "--sparsity", 0.5, "--out", sparse, TRUST)
    assert hf_prune("compress", sparse, small)[0] == 0
    batch = models.tiny_batches(loaded(sparse))[0]
    with torch.no_grad():
        assert torch.equal(loaded(small)(**batch).logits, loaded(sparse)(**batch).logits)


def test_code_that_cannot_run_is_named(folders, hf_prune, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(folders[0]).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "modeling_mixer.py").write_text(MODELING.replace("class MixerForSequence", "class OtherForSequence"))
    code, _, err = hf_prune("report", broken, TRUST)
    assert code == 1
    assert "the code of" in err
    assert "cannot be run" in err
