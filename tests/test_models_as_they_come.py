"""Compiled models, gradient checkpointing, adapters and speech: pruned as plain ones are, saved, and loaded again."""

import copy

import pytest
import torch
import transformers as tf

from hf_prune import HfPruneError, MaskStore, PlanError, prunable, prune, shrink, sparsity_report
from tests import models

CALIBRATED = {"criterion": "wanda", "scope": "row"}
UNITS = {"granularity": ("head", "neuron"), "criterion": "fisher"}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# --- torch.compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, CALIBRATED, UNITS])
def test_a_compiled_model_is_pruned_like_the_model_in_it(settings, tmp_path):
    model, plain = models.tiny_bert(), models.tiny_bert()
    batches = models.tiny_batches(model)
    compiled = torch.compile(model, backend="eager")
    compiled(**batches[0])
    assert prunable(compiled) is compiled
    compiled.prune(0.5, calibration=batches, **settings)
    prune(plain, 0.5, calibration=batches, **settings)
    models.assert_unchanged(model, models.snapshot(plain))
    assert torch.equal(logits(compiled, batches[0]), logits(plain, batches[0]))
    assert sparsity_report(compiled).target_sparsity == sparsity_report(plain).target_sparsity
    if "granularity" in settings:
        masked = logits(compiled, batches[0])
        shrink(compiled)
        assert torch.allclose(logits(compiled, batches[0]), masked, atol=1e-6)
    compiled.save_pretrained(tmp_path)
    again = tf.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, batches[0]), logits(compiled, batches[0]))


@pytest.mark.parametrize("settings", [CALIBRATED, {"criterion": "sparsegpt", "granularity": "2:4"}])
def test_hooks_of_a_calibration_are_not_compiled(settings):
    model, plain = models.tiny_llama(), models.tiny_llama()
    batches = models.tiny_batches(model)
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    torch.compiler.reset()  # what other tests compiled counts towards its limit for the code of a layer
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend=backend)
    logits(model, batches[0])
    before = len(frames)
    assert before
    prune(model, 0.5, calibration=batches, **settings)
    assert len(frames) == before
    prune(plain, 0.5, calibration=batches, **settings)
    found = {name.replace("._orig_mod", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(found[name], p) for name, p in plain.named_parameters())
    assert torch.equal(logits(model, batches[0]), logits(plain, batches[0]))


# --- gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [models.tiny_bert, models.tiny_llama, models.tiny_t5])
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "taylor"},
        CALIBRATED,
        {**CALIBRATED, "polish": "distill"},
        {**UNITS, "repair": "least_squares"},
    ],
    ids=["taylor", "wanda", "polish", "units"],
)
def test_gradient_checkpointing_changes_nothing_and_stays_on(make, settings):
    model, plain = make(), make()
    batches = models.tiny_batches(model)
    model.activation_checkpointing_enable()
    model.train()
    prune(model, 0.5, calibration=batches, **settings)
    prune(plain, 0.5, calibration=batches, **settings)
    models.assert_unchanged(model, models.snapshot(plain))
    assert model.is_activation_checkpointing
    assert model.training


# --- speech -----------------------------------------------------------------------------------------

SMALL = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 60}
WAVES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
WAVES |= {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
WAVES |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}


def whisper():
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    settings = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16, **tokens}
    config = tf.WhisperConfig(**SMALL, **settings, suppress_tokens=None, begin_suppress_tokens=None)
    return tf.WhisperForConditionalGeneration(config)


def speech_to_text():
    settings = {"input_feat_per_channel": 8, "max_source_positions": 64, "max_target_positions": 16}
    config = tf.Speech2TextConfig(**SMALL, **settings, conv_channels=16, pad_token_id=1, eos_token_id=2)
    return tf.Speech2TextForConditionalGeneration(config)


def moonshine():
    numbers = ("hidden_layers", "attention_heads", "key_value_heads")
    settings = {f"{side}_num_{what}": 2 for side in ("encoder", "decoder") for what in numbers}
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
    config = tf.MoonshineConfig(**sizes, **settings)
    return tf.MoonshineForConditionalGeneration(config)


def tokens():
    return torch.randint(4, 50, (2, 6))


SPEECH = {
    "whisper": (whisper, lambda: {"input_features": torch.randn(2, 8, 40), "labels": tokens()}),
    "wav2vec2": (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**WAVES)), lambda: {"input_values": torch.randn(2, 400)}),
    "hubert": (lambda: tf.HubertForCTC(tf.HubertConfig(**WAVES)), lambda: {"input_values": torch.randn(2, 400)}),
    "speech2text": (
        speech_to_text,
        lambda: {
            "input_features": torch.randn(2, 40, 8),
            "attention_mask": torch.ones(2, 40, dtype=torch.long),
            "labels": tokens(),
        },
    ),
    "moonshine": (
        moonshine,
        lambda: {"input_values": torch.randn(2, 4000), "decoder_input_ids": tokens()},
    ),
}


@pytest.mark.parametrize("settings", [{}, CALIBRATED, {"criterion": "sparsegpt", "granularity": "2:4"}])
@pytest.mark.parametrize("kind", SPEECH)
@pytest.mark.filterwarnings("ignore:Left dense")
def test_speech_is_pruned_on_its_batches_and_loaded_by_the_plain_class(kind, settings, tmp_path):
    make, batch = SPEECH[kind]
    model = prunable(models.fill(make()).eval())
    batches = [batch(), batch()]
    dense = logits(model, batches[0])
    model.prune(0.5, calibration=batches, **settings)
    assert model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)
    pruned = logits(model, batches[0])
    assert bool(torch.isfinite(pruned).all())
    assert not torch.equal(pruned, dense)
    for compressed in (False, True):
        model.save_pretrained(tmp_path / str(compressed), compressed=compressed)
        again = getattr(tf, type(model).__name__).from_pretrained(tmp_path / str(compressed)).eval()
        assert torch.equal(logits(again, batches[0]), pruned)


# --- quantized ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "mxfp4", "compressed-tensors"])
def test_a_quantized_model_is_refused_with_what_to_do(method):
    model = models.tiny_llama()
    before = models.snapshot(model)
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(PlanError, match=rf"is quantized with '{method}': expected .*; prune before quantizing"):
        prune(model, 0.5)
    models.assert_unchanged(model, before)
    assert MaskStore.of(model) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_eight_bits_are_refused_with_what_to_do(dtype):
    model = copy.deepcopy(models.tiny_llama())
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(HfPruneError, match=r"up_proj.weight is torch\.\w+8\w*: expected .*prune before quant"):
        prune(model, 0.5)
    assert MaskStore.of(model) is None
