"""Prove on a small model that experts can go: that gives what the model gives when no token may choose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.cut_units import cut_units
from hf_prune.architectures.discovery.barred import BarredExperts, lower_vectors
from hf_prune.architectures.discovery.expert_neuron_proof import neuron_failures
from hf_prune.architectures.discovery.proof import computes_the_same, differ, first_line, rebuilt_model
from hf_prune.architectures.discovery.sample import FAILURES, Sample
from hf_prune.architectures.expert_groups import expert_group
from hf_prune.architectures.expert_neurons import expert_neuron_groups
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import moe_blocks, removable_blocks
from hf_prune.architectures.settings import set_setting
from hf_prune.architectures.switched_off import switch_off
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice

Kind = tuple[Any, ...]
_FAILS = "the code does not run without them"


@dataclass(frozen=True)
class ExpertProof:
    """What was proven of the mixtures of a class of models.

    Args:
        proven: By kind of mixture, what the proof adds to what was read off the class: whether the code reads the
            config, whether the config tells another number, and how many experts must stay at least.
        refused: By kind, why its experts cannot be removed.
        neurons: By kind of neurons inside experts, why they cannot be removed; None if they can.
    """

    proven: Mapping[Kind, Mapping[str, Any]]
    refused: Mapping[Kind, str]
    neurons: Mapping[Kind, str | None]


def kind_of_block(model: nn.Module, block: MoeBlock) -> Kind:
    """What mixtures of one kind have in common, whatever their layer and their sizes."""
    stack, number = block.layer
    layer = f"{stack}.{number}"

    def inside(pieces: Sequence[UnitSlice]) -> tuple[Any, ...]:
        return tuple((piece.name.removeprefix(layer), piece.dim, piece.width == 1) for piece in pieces)

    names = [block.name, block.router, *block.lists, *(f"{name}.{key}" for name, key in block.counts)]
    stack = stack.removeprefix(base_prefix(model))
    return stack, tuple(name.removeprefix(layer) for name in names), inside(block.parameters), inside(block.buffers)


def prove_experts(sample: Sample) -> ExpertProof:
    """Try each kind of mixture by itself, then all that one setting counts together; and the neurons inside experts.

    Args:
        sample: The small model; packed weights are made larger.
    """
    blocks = removable_blocks(sample.model)
    for block in moe_blocks(sample.model):
        _enlarge(sample.model, block)
    dense = sample.outputs()
    firsts: dict[Kind, MoeBlock] = {}
    for block in blocks:
        firsts.setdefault(kind_of_block(sample.model, block), block)
    least: dict[Kind, int] = {}
    refused: dict[Kind, str] = {}
    for kind, block in firsts.items():
        least[kind], failure = _fewest(sample, [block], dense)
        if failure is not None:
            refused[kind] = failure
    proven: dict[Kind, Mapping[str, Any]] = {}
    for path in dict.fromkeys(block.config for block in blocks):
        together = [(kind_of_block(sample.model, block), block) for block in blocks if block.config == path]
        kinds = {kind for kind, _ in together}
        if kinds & refused.keys():
            reading = [replace(block, reads_config=True) for _, block in together]
            fewest, failure = _fewest(sample, reading, dense, equal=True)
            if failure is None:
                proven |= {kind: {"reads_config": True, "least": fewest} for kind in kinds}
                refused = {kind: said for kind, said in refused.items() if kind not in kinds}
                continue
        fine = [replace(block, least=least[kind]) for kind, block in together if kind not in refused]
        if fine and (failure := _failure(sample, fine, dense)) is not None:
            refused |= dict.fromkeys(kinds - refused.keys(), failure)
        elif fine:
            is_rebuilt = _failure(sample, fine, dense, equal=True) is None
            proven |= {kind: {"is_rebuilt": is_rebuilt, "least": least[kind]} for kind in kinds - refused.keys()}
    return ExpertProof(proven, refused, neuron_failures(sample, expert_neuron_groups(sample.model)))


def proof_at_depth(sample: Sample, proof: ExpertProof) -> ExpertProof:
    """What of a proof holds in a model of more layers.

    Args:
        sample: That model; packed weights are made larger.
        proof: What was proven in a small model.
    """
    for block in moe_blocks(sample.model):
        _enlarge(sample.model, block)
    dense = sample.outputs()
    proven, refused = dict(proof.proven), dict(proof.refused)
    by_setting: dict[str, list[tuple[Kind, MoeBlock]]] = {}
    for block in removable_blocks(sample.model):
        if (kind := kind_of_block(sample.model, block)) in proven:
            by_setting.setdefault(block.config, []).append((kind, replace(block, **proven[kind])))
    total = len({block.layer for pairs in by_setting.values() for _, block in pairs})
    for pairs in by_setting.values():
        blocks = [block for _, block in pairs]
        failure = _failure(sample, blocks, dense, equal=any(block.reads_config for block in blocks))
        for kind in {kind for kind, _ in pairs} if failure is not None else ():
            del proven[kind]
            refused[kind] = f"in a model with {total} layers of them, {failure}"
    groups = expert_neuron_groups(sample.model)
    total = len({group.layers for group in groups})
    neurons = dict(proof.neurons)
    for kind, failure in neuron_failures(sample, groups).items():
        if failure is not None and neurons.get(kind, failure) is None:
            neurons[kind] = f"in a model with {total} layers of them, {failure}"
    return ExpertProof(proven, refused, neurons)


def _fewest(
    sample: Sample, blocks: Sequence[MoeBlock], dense: Sequence[Tensor], equal: bool = False
) -> tuple[int, str | None]:
    """How many experts must stay, if that is more than the model says, and why not even that many will do.

    Returns:
        (0 if what the model says is enough, why none can be removed; None if some can).
    """
    groups = [expert_group(sample.model, block) for block in blocks]
    first, last = max(group.minimum for group in groups), min(group.units for group in groups)
    step = max(group.runs for group in groups)
    failures = []
    for number in range(first, last, step):
        failure = _failure(sample, [replace(block, least=number) for block in blocks], dense, equal, fewest=True)
        if failure is None:
            return (0 if number == first else number), None
        failures.append(failure)
        if not failure.startswith(_FAILS):  # with more experts, code that asks for them might run
            break
    return 0, (failures or [f"a token needs all {last} of a small model, so that none can be tried"])[-1]


@torch.no_grad()
def _enlarge(model: nn.Module, block: MoeBlock) -> None:
    """Give packed experts weights that matter: each matrix has inputs of its own."""
    for piece in block.parameters:
        parameter = model.get_parameter(piece.name)
        if parameter.ndim == 3:
            parameter.mul_(parameter.shape[1] ** 0.5)


def _failure(
    sample: Sample, blocks: Sequence[MoeBlock], dense: Sequence[Tensor], equal: bool = False, fewest: bool = False
) -> str | None:
    """Why experts cannot be removed; None if that gives what the model gives when no token may choose them.

    Args:
        sample: The small model.
        blocks: Mixtures of it.
        dense: The outputs of the small model.
        equal: Remove as many from all and say so in the config, which must then build such a model. Otherwise every
            mixture loses another number of them.
        fewest: Remove as many as the blocks allow, rather than a few.
    """
    groups = [expert_group(sample.model, block) for block in blocks]
    kept = _kept(groups, equal, fewest)
    cut, switched = sample.twin(), sample.twin()
    try:
        cut_units(cut, groups, kept)
        for block, group in zip(blocks, groups, strict=True) if equal else ():
            for holder, attribute in block.outer_counts:
                setattr(cut.get_submodule(holder), attribute, len(kept[group.name]))
            set_setting(cut.config, block.config, len(kept[group.name]))
        outputs = sample.outputs(cut)
        for group in groups:
            switch_off(switched, group, kept[group.name])
        masked = sample.outputs(switched)
    except FAILURES as error:
        return f"{_FAILS} ({first_line(error)})"
    if differ(masked, outputs):
        return "outputs are others while they are switched off than without them"
    if equal and ((rebuilt := rebuilt_model(cut)) is None or not computes_the_same(sample, cut, rebuilt)):
        return "a config that counts fewer builds another model"
    return _not_barred(sample, blocks, groups, kept, dense, outputs)


def _not_barred(
    sample: Sample,
    blocks: Sequence[MoeBlock],
    groups: Sequence[UnitGroup],
    kept: Mapping[str, Tensor],
    dense: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> str | None:
    """Why outputs are not those of a model whose tokens may not choose the experts that are gone."""
    gone = {}
    for block, group in zip(blocks, groups, strict=True):
        stays = torch.zeros(group.units, dtype=torch.bool).index_fill(0, kept[group.name], True)
        gone[block.router] = (~stays).nonzero().reshape(-1)
    for named in (True, False, None):
        model = sample.model if named is None else sample.twin()
        for block in () if named is None else blocks:
            lower_vectors(model, block, gone[block.router], named is True)
        with BarredExperts(model, gone) as barred:
            expected = sample.outputs(model)
        if barred.unseen:
            return f"no product with {min(barred.unseen)} was seen that gives each of them a score"
        if not differ(outputs, expected):
            return None if differ(expected, dense) else "no token of the small model chose any of them"
    return "outputs are others without them than where no token may choose them"


def _kept(groups: Sequence[UnitGroup], equal: bool, fewest: bool) -> dict[str, Tensor]:
    """The experts that stay in each mixture, as many in each run of them."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for number, group in enumerate(groups):
        size = group.units // group.runs
        most = (group.units - group.minimum) // group.runs
        count = most if fewest else min(most, 1 if equal else 1 + number % 2)
        orders = [torch.randperm(size, generator=generator)[count:] + run * size for run in range(group.runs)]
        kept[group.name] = torch.cat(orders).sort().values
    return kept
