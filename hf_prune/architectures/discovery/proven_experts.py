"""The mixtures of a model whose experts, and their neurons, are proven to be removable; once for each class."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hf_prune.architectures.discovery.depth import deep_config, is_steady, running_sample
from hf_prune.architectures.discovery.expert_neuron_proof import kind_of_neurons
from hf_prune.architectures.discovery.expert_proof import (
    ExpertProof,
    kind_of_block,
    proof_at_depth,
    prove_experts,
)
from hf_prune.architectures.discovery.holders import model_holders, native_class
from hf_prune.architectures.discovery.proof import first_line
from hf_prune.architectures.discovery.sample import FAILURES, make_sample, plain_surroundings
from hf_prune.architectures.expert_neurons import expert_neuron_groups
from hf_prune.architectures.growth import built
from hf_prune.architectures.memory import remembered, text_of
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import moe_blocks, removable_blocks, tokens_per_choice
from hf_prune.architectures.settings import set_setting
from hf_prune.architectures.small_models import small_config
from hf_prune.architectures.unit_groups import UnitGroup

_FEWEST = 6  # experts of the small model
_PROOFS: dict[tuple[Any, str], ExpertProof | str] = {}
_AT_DEPTH: dict[tuple[Any, str, str], ExpertProof] = {}
_SMALL: dict[tuple[Any, str], tuple[Any, str]] = {}


def proven_blocks(model: Any) -> tuple[list[MoeBlock], list[str]]:
    """The mixtures of a model whose experts can be removed, and why those of others cannot; proven once for each class.

    Args:
        model: A transformers model, on any device; only its class, its config and its shapes are looked at.
    """
    blocks = removable_blocks(model)
    if not blocks:
        return [], []
    proof = _proof_of(model)
    proven: list[MoeBlock] = []
    refused: dict[str, str] = {}
    for block in blocks:
        kind = kind_of_block(model, block)
        if isinstance(proof, ExpertProof) and kind in proof.proven:
            proven.append(replace(block, **proof.proven[kind]))
            continue
        failure = _why_not(proof, proof.refused.get(kind) if isinstance(proof, ExpertProof) else None)
        refused.setdefault(failure, f"the experts of {block.name} were found, but {failure}")
    return proven, list(refused.values())


def proven_neurons(model: Any) -> tuple[list[UnitGroup], list[str]]:
    """The neurons inside experts that can be removed, and why others cannot; as :func:`proven_blocks`."""
    groups = expert_neuron_groups(model)
    if not groups:
        return [], []
    proof = _proof_of(model)
    proven: dict[str, UnitGroup] = {}
    failures: dict[str, str] = {}
    for group in groups:
        kind = kind_of_neurons(model, group)
        if isinstance(proof, ExpertProof) and kind in proof.neurons and proof.neurons[kind] is None:
            proven.setdefault(group.name, group)
            continue
        failure = _why_not(proof, proof.neurons.get(kind) if isinstance(proof, ExpertProof) else None)
        failures.setdefault(group.name, f"the neurons of {group.name} were found, but {failure}")
    refused = {failure.partition(", but ")[2]: failure for name, failure in failures.items() if name not in proven}
    return [*proven.values()], list(refused.values())


def _why_not(proof: ExpertProof | str, failure: str | None) -> str:
    if isinstance(proof, str):
        return f"a small model could not be run to prove that they can go ({proof})"
    return failure or "a small model of the same config has none to prove it on"


def _proof_of(model: Any) -> ExpertProof | str:
    """What holds of a model; a sentence if no small one can be run."""
    proof: ExpertProof | str = ""
    with plain_surroundings():
        for holder in model_holders(model):
            proof = _proof(native_class(holder), holder.config)
            if isinstance(proof, ExpertProof):
                break
    return proof


def _proof(model_class: Any, config: Any) -> ExpertProof | str:
    """What holds of a class and config; a sentence if no small model can be run."""

    def small() -> tuple[Any, str]:
        made = small_config(config)
        return made, text_of(made)

    try:
        made, text = remembered(_SMALL, (model_class, text_of(config)), small)
    except FAILURES as error:
        return first_line(error)
    proof = remembered(_PROOFS, (model_class, text), lambda: _proven_on_small(model_class, made, config))
    return proof if isinstance(proof, str) else _at_depth(model_class, config, proof, text)


def _at_depth(model_class: Any, config: Any, proof: ExpertProof, text: str) -> ExpertProof:
    """What of a proof holds in a model of as many layers; all of it where none can be run."""
    try:
        deep = deep_config(config)
    except FAILURES:
        return proof
    if deep is None:
        return proof
    return remembered(_AT_DEPTH, (model_class, text, deep[1]), lambda: _proven_deep(model_class, deep[0], proof))


def _proven_deep(model_class: Any, deep: Any, proof: ExpertProof) -> ExpertProof:
    candidate = next(_candidates(model_class, deep, deep))
    sample = running_sample(model_class, candidate)
    if sample is None:
        return proof
    found = proof_at_depth(sample, proof)
    return found if found == proof or is_steady(sample) else proof


def _proven_on_small(model_class: Any, small: Any, config: Any) -> ExpertProof | str:
    reason = ""
    for candidate in _candidates(model_class, small, config):
        try:
            sample = make_sample(model_class, candidate)
            sample.outputs()
        except FAILURES as error:
            reason = reason or first_line(error)
            continue
        if moe_blocks(sample.model):
            return prove_experts(sample)
    return reason or "it has no experts"


def _candidates(model_class: Any, small: Any, config: Any) -> Iterator[Any]:
    """Configs to try: a small one with experts that can go, a small one as it is, and that of the model itself."""
    changed = copy.deepcopy(small)
    for candidate in (changed, small, copy.deepcopy(config)):
        for name in ("output_router_logits", "text_config.output_router_logits"):  # which have an entry for each expert
            try:
                set_setting(candidate, name, False)
            except AttributeError:
                continue
        if candidate is changed:
            try:
                plain = built(model_class, changed)
                least: dict[str, int] = {}
                for block in removable_blocks(plain):
                    most = max(least.get(block.config, 0), tokens_per_choice(plain, block)[0])
                    least[block.config] = most
                for path, minimum in least.items():
                    set_setting(changed, path, max(_FEWEST, 2 * minimum))
            except FAILURES:
                continue
        yield candidate
