"""The output of a stream: pruned files, masks and report, each written as soon as it is known."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_prune.checkpoint.companions import copy_companions
from hf_prune.checkpoint.files import INDEX, MASK_FILE, SINGLE, SPARSITY_REPORT, find_file
from hf_prune.checkpoint.mask_file import mask_metadata, pack_mask
from hf_prune.checkpoint.shards import header_bytes, read_parts, read_tensor, write_all, write_tensor
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.meta_model import MetaModel
from hf_prune.conversion.streaming.placing import COMMAND, place_output, report_entry, report_of
from hf_prune.errors import CheckpointError
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.weight_statistics import WeightStatistics
from hf_prune.kernels.matrix import Target
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.make_plan import refuse_infinite
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.planning.targets import bias_names, every_target
from hf_prune.pruning.weight_norm import lengths_name
from hf_prune.utils.files import write_text
from hf_prune.utils.output_folder import check_output

_BITS = "masks.bits"
COPIED = ("config.json", "generation_config.json", INDEX)  # unchanged


class Output:
    """The unfinished pruned checkpoint.

    Args:
        meta_model: The model.
        plan: Its plan.
        previous_masks: Masks of earlier prunings, by parameter name.
        journal: The journal, with the folder of the checkpoint.
    """

    def __init__(
        self, meta_model: MetaModel, plan: PruningPlan, previous_masks: Mapping[str, Tensor], journal: Journal
    ) -> None:
        self.meta_model = meta_model
        self.plan, self.previous_masks = plan, previous_masks
        self.reads_dense = False  # whether weights are read as the source has them, also those that are pruned already
        self.journal = journal
        self.targets = {tensor.target.name: tensor.target for tensor in plan.tensors}
        self.reports: dict[str, dict[str, Any]] = {}
        self.kept: dict[str, int] = {}
        self._copied, self._checked = set[str](), set[str]()
        self._parameters = dict(meta_model.model.named_parameters())
        self.biases: dict[str, str] = {}  # biases that the repair changes, by the target's name
        if plan.config.repair is not None:
            self.biases = bias_names(meta_model.model, list(self.targets.values()))
        self._weights = {bias: name for name, bias in self.biases.items()}
        self._weights |= {lengths: name for name in self.targets if (lengths := lengths_name(name))}
        for record in journal.records:
            self.reports |= record.get("tensors", {})
            self.kept |= record.get("kept", {})
            self._copied |= set(record.get("copied", ()))
        self._bits: dict[str, tuple[int, int]] = {}  # begin and end of each mask in the file of bits
        self._bits_size = 0
        for name in sorted({*self.targets, *previous_masks}):
            start, self._bits_size = self._bits_size, self._bits_size + (self._parameters[name].numel() + 7) // 8
            self._bits[name] = start, self._bits_size

    def done(self, name: str) -> bool:
        """Whether the final weights of a target are on the disk."""
        return name in self.kept

    def is_sound(self) -> bool:
        """Whether the files that the journal names exist with the right sizes."""
        shards = self.meta_model.shards.shards
        if not self._copied <= shards.keys():
            return False
        sizes = {self.journal.staging / name: shards[name].size for name in self._copied}
        if sizes:
            sizes[self.journal.folder / _BITS] = self._bits_size
        return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())

    # --- reading ------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """Read the current values of a parameter, in the dtype of a loaded model.

        Raises:
            PlanError: If a target has values that are not finite.
            CheckpointError: If it has nonzero weights that an earlier mask removes.
        """
        weight = self.meta_model.read(name, self._folder(name))
        if name in self.targets and not self.done(name) and name not in self._checked:
            refuse_infinite([(name, weight)])
            self._check_old_mask(name, weight)
            self._checked.add(name)
        return weight

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read the current values of some rows of a parameter."""
        return self.meta_model.read_rows(name, rows, self._folder(name))

    def _folder(self, name: str) -> Path:
        """Where the current values of a parameter are."""
        pruned = self.done(self._weights.get(name, name)) and not self.reads_dense
        return self.journal.staging if pruned else self.meta_model.shards.folder

    def _check_old_mask(self, name: str, weight: Tensor) -> None:
        old = self.previous_masks.get(name)
        if old is not None and bool(weight.masked_select(~old).any()):
            raise CheckpointError(
                f"the masks of {self.meta_model.shards.folder} are not those of its weights: {name!r} has non-zero "
                f"weights that its mask removes; restore the matching {MASK_FILE}, or delete it to prune without masks"
            )

    # --- writing ------------------------------------------------------------------------------------

    def copy_rest(self) -> None:
        """Create the weight files, with all tensors in them that are not pruned."""
        names = {key: name for name, keys in self.meta_model.keys.items() for key in keys}
        masked = {
            t.name: t for t in _masked_targets(self.meta_model.model, self.previous_masks) if t.name not in self.targets
        }
        in_no_file = [name for name, keys in self.meta_model.keys.items() if not keys]
        computed = {n: self._report(n, None, None, int(self._parameters[n].count_nonzero())) for n in in_no_file}
        bits = self.journal.folder / _BITS
        bits.touch()
        os.truncate(bits, self._bits_size)
        for shard in self.meta_model.shards.shards.values():
            if shard.name in self._copied:
                continue
            reports = dict(computed)
            kept: dict[str, int] = {}
            path = self.journal.staging / shard.name
            with path.open("wb", buffering=0) as file:
                write_all(file, shard.header)
                for entry in shard.entries:
                    name = names.get(entry.name)
                    if name in self.targets:
                        continue
                    file.seek(entry.start)
                    nonzero = 0
                    for part in read_parts(self.meta_model.shards.folder, entry):
                        write_all(file, part)
                        if name is not None:
                            nonzero += int(torch.frombuffer(part, dtype=entry.torch_dtype).count_nonzero())
                    if name in self.meta_model.parts and name is not None:  # several tensors make up one parameter
                        nonzero += (reports.get(name) or self.reports.get(name, {})).get("nonzero", 0)
                    if name in masked and (name in kept or name in self.kept):
                        continue
                    if name in masked:
                        weight = self.read(name)
                        self._check_old_mask(name, weight)
                        reports[name] = self._report(name, masked[name], weight)
                        kept[name] = self._write_mask(name, self.previous_masks[name])
                    elif name is not None:
                        reports[name] = self._report(name, None, None, nonzero)
                file.truncate(shard.size)
            self.journal.add({"copied": [shard.name], "tensors": reports, "kept": kept}, path, bits)
            self.reports |= reports
            self.kept |= kept

    def write(
        self, tensor: PlannedTensor, weight: Tensor, mask: Tensor, new: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Write the pruned weights of one target to their place in the files.

        Args:
            tensor: The target.
            weight: Its dense weights; pruned in place.
            mask: Bool of the same shape, True = keep.
            new: New values of the weight, of the bias and of lengths, if there are any, by parameter name.
        """
        name = tensor.target.name
        before = WeightStatistics.of(weight)
        if (old := self.previous_masks.get(name)) is not None:
            mask = mask & old
        if name in new:
            weight.copy_(new[name])
        zero_removed_(weight, mask)
        written = self._store(name, weight, None if name in new else mask)
        reports = {name: self._report(name, tensor.target, weight)}
        reports[name]["before"] = dataclasses.asdict(before)
        for bias in new.keys() - {name}:
            values = new[bias].to(self.meta_model.dtypes[bias])
            written += self._store(bias, values)
            reports[bias] = {**self.reports[bias], "nonzero": int(values.count_nonzero())}
        kept = self._write_mask(name, mask)
        bits = self.journal.folder / _BITS
        self.journal.add({"tensors": reports, "kept": {name: kept}}, *dict.fromkeys(written), bits)
        self.reports |= reports
        self.kept[name] = kept

    def _store(self, name: str, values: Tensor, mask: Tensor | None = None) -> list[Path]:
        """Write a parameter in the dtype of its file, and return the files.

        Args:
            name: Name of the parameter.
            values: Its values.
            mask: If the only change is zeros: the weights that keep the bits that they have in the file.
        """
        shards = self.meta_model.shards
        written = []
        for key in self.meta_model.keys[name]:
            entry, index = shards.entries[key], self.meta_model.parts.get(name, {}).get(key, ())
            if entry.torch_dtype == values.dtype:
                stored = values[index]
            elif mask is None:
                stored = values[index].to(entry.torch_dtype)
            else:
                stored = read_tensor(shards.folder, entry)
                zero_removed_(stored, mask[index])
            write_tensor(self.journal.staging, entry, stored.contiguous())
            written.append(self.journal.staging / entry.shard)
        return written

    def _write_mask(self, name: str, mask: Tensor) -> int:
        with (self.journal.folder / _BITS).open("r+b", buffering=0) as file:
            file.seek(self._bits[name][0])
            write_all(file, pack_mask(mask).data)
        return int(mask.count_nonzero())

    def _report(self, name: str, target: Target | None, weight: Tensor | None, nonzero: int = 0) -> dict[str, Any]:
        shape, itemsize = tuple(self._parameters[name].shape), self.meta_model.dtypes[name].itemsize
        return report_entry(name, shape, itemsize, self.plan.config, target, weight, nonzero)

    # --- the end ------------------------------------------------------------------------------------

    def finish(self, source: str, out: Path, overwrite: bool) -> SparsityReport:
        """Add the other files, and move the checkpoint into its folder."""
        staging = self.journal.staging
        clear(staging, self.meta_model.shards.shards)
        hub = {"local_files_only": check_model_source(source)}
        for name in COPIED[:-1] if SINGLE in self.meta_model.shards.shards else COPIED:
            if (path := find_file(source, name, hub)) is not None:
                shutil.copyfile(path, staging / name)
        copy_companions(source, staging)
        self._join_masks(staging / MASK_FILE)
        report = report_of(self.plan.model_name, list(self._parameters), self.reports, self.plan.notes)
        write_text(staging / SPARSITY_REPORT, report.to_json())
        check_output(out, COMMAND, overwrite=overwrite)
        place_output(self.journal, out, list(self._parameters), report, overwrite)
        return report

    def _join_masks(self, path: Path) -> None:
        tensors = {name: ("U8", (end - start,), end - start) for name, (start, end) in self._bits.items()}
        shapes = {name: list(self._parameters[name].shape) for name in self._bits}
        entries = {name: {"shape": shape, "kept": self.kept[name]} for name, shape in shapes.items()}
        with path.open("wb", buffering=0) as file, (self.journal.folder / _BITS).open("rb") as bits:
            write_all(file, header_bytes(tensors, mask_metadata(entries, self.plan.config)))
            shutil.copyfileobj(bits, file)


def clear(folder: Path, kept: Container[str]) -> None:
    """Remove files other than weights that an interrupted run left, since they may be incomplete."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()


def _masked_targets(model: Any, masks: Mapping[str, Tensor]) -> list[Target]:
    if not masks:
        return []
    targets = every_target(model)
    return [target for target in targets if target.name in masks]
