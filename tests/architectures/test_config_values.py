"""A small config says what the config says, whichever way its class takes settings."""

from __future__ import annotations

import pytest
import transformers
from transformers import LlavaConfig
from transformers.configuration_utils import PreTrainedConfig

from hf_prune import describe_units
from hf_prune.architectures.config_sizes import number_of_layers
from hf_prune.architectures.config_values import with_values
from hf_prune.architectures.settings import objection_to
from hf_prune.architectures.small_configs import small_config
from tests.architectures.custom_models import OwnConfig, OwnModel


class HandsOn(OwnConfig):
    """Gives its parent all that it does not know."""

    model_type = "hands_on"

    def __init__(self, tau=1.0, **kwargs):
        self.tau = tau
        super().__init__(**kwargs)


class Pops(PreTrainedConfig):
    """Takes settings out of keyword arguments, and derives sizes of others."""

    model_type = "pops"

    def __init__(self, **kwargs):
        self.hidden_size, self.mixer = kwargs.pop("hidden_size", 64), kwargs.pop("mixer", "grouped")
        self.n_layers, self._style = kwargs.pop("n_layers", 4), kwargs.pop("style", "plain")
        super().__init__(**kwargs)
        self.inner_total = 3 * self.hidden_size

    @property
    def style(self):
        return self._style


class Deaf(PreTrainedConfig):
    """Says one thing whatever it is told, once it is made."""

    model_type = "deaf"
    heard = "nothing"

    def __init__(self, word="said", **kwargs):
        super().__init__(**kwargs)
        self.__dict__["word"] = word if word == "said" else "else"

    def __setattr__(self, name, value):
        super().__setattr__(name, "else" if name == "word" else value)


class HandedOn(OwnModel):
    config_class = HandsOn


def test_settings_that_a_parent_takes_stay():
    small = small_config(HandsOn(mixer="per_head", network="halves", tau=2.0, depth=5))
    assert (small.mixer, small.network, small.tau) == ("per_head", "halves", 2.0)
    assert small.depth == 2


def test_settings_that_are_taken_out_of_keyword_arguments_stay():
    small = small_config(Pops(hidden_size=256, mixer="thirds", n_layers=7, style="odd"))
    assert (small.mixer, small.style, small.hidden_size, small.n_layers) == ("thirds", "odd", 64, 2)
    assert small.inner_total == 192  # which follows from the hidden size
    assert number_of_layers(Pops(n_layers=7)) == 7


def test_what_a_class_does_not_take_at_all_is_refused():
    config = Deaf()
    config.__dict__["word"] = "kept"
    with pytest.raises(ValueError, match="its word would be 'else' in place of 'kept'"):
        with_values(config, dict(vars(config)))
    assert config.word == "kept"


def test_a_config_inside_another_objects_too():
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(text_config=text)
    assert objection_to(config, {"text_config.num_attention_heads": 2}) is None
    assert "not a multiple" in (objection_to(config, {"text_config.num_attention_heads": 3}) or "")
    assert config.text_config.num_attention_heads == 4


def test_a_config_objects_to_a_size_that_layers_have_for_themselves():
    config = small_config(transformers.CONFIG_MAPPING["dots3_note"]())
    said = objection_to(config, {"text_config.num_attention_heads": 1})
    assert said == "'num_attention_heads' is a per-layer attribute and may vary across layers"


def test_a_model_is_not_proven_on_another_one():
    config = HandsOn(mixer="sloped", depth=2)  # a part of each head is not saved
    refused = describe_units(HandedOn(config).eval()).refused
    assert any("not saved" in reason for reason in refused.values())
