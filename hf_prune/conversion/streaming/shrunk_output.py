"""The output of a stream that removes units: smaller tensors in files of the same names, config and report."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_prune.architectures.unit_groups import staying_mask
from hf_prune.checkpoint.companions import copy_companions
from hf_prune.checkpoint.files import INDEX, SINGLE, SPARSITY_REPORT, find_file
from hf_prune.checkpoint.save import describe_structure
from hf_prune.checkpoint.shards import Shard, header_bytes, read_parts, write_all
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.meta_model import MetaModel
from hf_prune.conversion.streaming.output import clear
from hf_prune.conversion.streaming.placing import COMMAND, place_output, report_entry, report_of
from hf_prune.conversion.streaming.smaller_tensors import Cut, SmallerTensor, tensors_that_stay
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.weight_statistics import WeightStatistics
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.make_plan import refuse_infinite
from hf_prune.planning.targets import every_target, resolve_targets
from hf_prune.structured.shrink import shrink_without_weights
from hf_prune.structured.shrink_record import layer_of
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.files import write_text
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.offload_cache import raw_bytes
from hf_prune.utils.output_folder import check_output
from hf_prune.utils.progress import Bar


class ShrunkOutput:
    """The unfinished shrunk checkpoint.

    Args:
        meta_model: The dense model.
        plan: What stays of it.
        journal: The journal, with the folder of the checkpoint.
        repaired: New values of parameters in their dense shapes, by name.

    Attributes:
        model: The shrunk model, on the meta device.
    """

    def __init__(self, meta_model: MetaModel, plan: UnitPlan, journal: Journal, repaired: Mapping[str, Tensor]) -> None:
        self.meta_model, self.plan, self.journal, self._repaired = meta_model, plan, journal, repaired
        self.model: Any = copy.deepcopy(meta_model.model)
        assert plan.choice is not None
        cuts, moves = shrink_without_weights(self.model, plan.kept, plan.choice.layers, plan.config)
        self._gone = set[str]().union(*(gone for gone, _ in moves))
        self._cuts: dict[str, list[Cut]] = {}
        for name, dim, index in cuts:
            self._cuts.setdefault(name, []).append((dim, index))
        self._tensors: dict[str, list[SmallerTensor]] = {}  # by file
        for tensor in tensors_that_stay(meta_model, self._cuts, moves):
            self._tensors.setdefault(tensor.source.shard, []).append(tensor)
        self._reports: dict[str, dict[str, Any]] = {}
        self._copied: set[str] = set()
        for record in journal.records:
            self._reports |= record.get("tensors", {})
            self._copied |= set(record.get("copied", ()))

    def is_sound(self) -> bool:
        """Whether the files that the journal names exist with the right sizes."""
        shards = self.meta_model.shards.shards
        if not self._copied <= self._tensors.keys():
            return False
        sizes = {name: len(self._header(shards[name])) + self._bytes(name) for name in self._copied}
        paths = {self.journal.staging / name: size for name, size in sizes.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def write(self, progress: bool | None = None) -> None:
        """Count what is removed, and write the weight files.

        Raises:
            PlanError: If a weight that becomes smaller is not finite.
        """
        self._report_removed(progress)
        shards = [shard for shard in self.meta_model.shards.shards.values() if shard.name in self._tensors]
        for shard in Bar(shards, desc="Writing", unit="file", progress=progress):
            if shard.name not in self._copied:
                self._write_shard(shard)

    def _report_removed(self, progress: bool | None) -> None:
        """Report what may lose units as it is in a masked model: in its old shape, with zeros."""
        dense = self.meta_model.model
        targets = {t.name: t for t in every_target(dense)}
        covered = {t.name for t in resolve_targets(dense, self.plan.config, loaded=False)}
        names = list(dict.fromkeys(piece.name for group in self.plan.sites for piece in group.slices))
        names += [name for name in self.meta_model.keys if layer_of(name, self._gone) is not None]
        for name in Bar(names, desc="Counting", unit="weight", progress=progress):
            if name in self._reports:
                continue
            weight = self.meta_model.read(name)
            refuse_infinite([(name, weight)])
            before = WeightStatistics.of(weight) if name in covered else None
            weight = self._repaired.get(name, weight)
            if layer_of(name, self._gone) is not None:
                weight.zero_()
            for dim, index in self._cuts.get(name, ()):
                zero_removed_(weight, staying_mask(weight, dim, index))
            itemsize = weight.dtype.itemsize
            report = report_entry(name, tuple(weight.shape), itemsize, self.plan.config, targets.get(name), weight)
            report["before"] = None if before is None else dataclasses.asdict(before)
            self._add({name: report})

    def _write_shard(self, shard: Shard) -> None:
        reports: dict[str, dict[str, Any]] = {}
        path, folder = self.journal.staging / shard.name, self.meta_model.shards.folder
        with path.open("wb", buffering=0) as file:
            write_all(file, self._header(shard))
            for tensor in self._of(shard):
                nonzero = 0
                if tensor.name in self._repaired:
                    values = tensor.of(self._repaired[tensor.name])
                    write_all(file, raw_bytes(values))
                    nonzero = int(values.count_nonzero())
                elif tensor.cuts:
                    write_all(file, raw_bytes(tensor.read(folder)))
                else:
                    for part in read_parts(folder, tensor.source):
                        write_all(file, part)
                        nonzero += int(torch.frombuffer(part, dtype=tensor.source.torch_dtype).count_nonzero())
                if tensor.cuts:
                    continue
                self._count(tensor, nonzero, reports)
        self._add(reports, path)

    def _count(self, tensor: SmallerTensor, nonzero: int, reports: dict[str, dict[str, Any]]) -> None:
        """Note a tensor that stays as it is, unless it is a buffer, or its parameter is reported already."""
        meta_model, name = self.meta_model, tensor.name
        if name not in meta_model.keys or (earlier := self._reports.get(name, {})).get("is_target"):
            return
        if name in meta_model.parts:  # several tensors make up one parameter
            nonzero += (reports.get(name) or earlier).get("nonzero", 0)
        shape, itemsize = tuple(meta_model.model.get_parameter(name).shape), meta_model.dtypes[name].itemsize
        reports[name] = report_entry(name, shape, itemsize, self.plan.config, None, None, nonzero)

    def _add(self, reports: dict[str, dict[str, Any]], *written: Path) -> None:
        self.journal.add({"copied": [path.name for path in written], "tensors": reports}, *written)
        self._reports |= reports

    def _of(self, shard: Shard) -> list[SmallerTensor]:
        """The tensors of a file in the order of their places: those of a dtype together, by their new names."""
        dtypes = list(dict.fromkeys(entry.dtype for entry in shard.entries))
        return sorted(self._tensors[shard.name], key=lambda tensor: (dtypes.index(tensor.source.dtype), tensor.key))

    def _header(self, shard: Shard) -> bytes:
        tensors = {tensor.key: (tensor.source.dtype, tensor.shape, tensor.size) for tensor in self._of(shard)}
        return header_bytes(tensors, shard.metadata)

    def _bytes(self, name: str) -> int:
        return sum(tensor.size for tensor in self._tensors[name])

    # --- the end ------------------------------------------------------------------------------------

    def finish(self, source: str, out: Path, overwrite: bool) -> SparsityReport:
        """Add the other files, and move the checkpoint into its folder."""
        staging, model, hub = self.journal.staging, self.model, {"local_files_only": check_model_source(source)}
        clear(staging, self._tensors)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(staging)
        describe_structure(model, type(model), staging)
        if (path := find_file(source, "generation_config.json", hub)) is not None:
            shutil.copyfile(path, staging / "generation_config.json")
        elif model.can_generate():
            model.generation_config.save_pretrained(staging)
        if SINGLE not in self._tensors and (path := find_file(source, INDEX, hub)) is not None:
            self._write_index(path, staging / INDEX)
        copy_companions(source, staging)
        names = [name for name, _ in self.meta_model.model.named_parameters()]
        for name in names:
            if name not in self._reports:  # it is in no file, since its class computes it
                values: Tensor = self.meta_model.model.get_parameter(name)
                itemsize, count = self.meta_model.dtypes[name].itemsize, int(values.count_nonzero())
                self._add({name: report_entry(name, (*values.shape,), itemsize, self.plan.config, None, None, count)})
        report = report_of(self.plan.model_name, names, self._reports, (), self._structure())
        write_text(staging / SPARSITY_REPORT, report.to_json())
        check_output(out, COMMAND, overwrite=overwrite)
        place_output(self.journal, out, names, report, overwrite)
        return report

    def _structure(self) -> dict[str, Any]:
        dtypes = self.meta_model.dtypes
        sizes = {name: p.numel() * dtypes.get(name, p.dtype).itemsize for name, p in self.model.named_parameters()}
        return dataclasses.replace(structure_report(self.model), bytes=sum(sizes.values())).to_dict()

    def _write_index(self, old: str, new: Path) -> None:
        """The index with the files of the tensors that are left, and what they hold in all."""
        index = read_json_object(old)
        tensors = [tensor for of_file in self._tensors.values() for tensor in of_file]
        index["weight_map"] = {t.key: t.source.shard for t in sorted(tensors, key=lambda tensor: tensor.key)}
        totals = {"total_size": sum(t.size for t in tensors)}
        totals["total_parameters"] = sum(p.numel() for p in self.model.parameters())
        metadata = index.get("metadata") or {}
        index["metadata"] = metadata | {name: totals[name] for name in totals if name in metadata}
        write_text(new, json.dumps(index, indent=2, sort_keys=True) + "\n")
