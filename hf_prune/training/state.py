"""What a training checkpoint holds for pruning: masks, learned scores, and checksums of the files that belong together.

This file is written last. It lists the weights and the masks by size and checksum, so that a checkpoint that is
incomplete after an interruption, or whose files were exchanged, is refused instead of resumed with other masks.
"""

from __future__ import annotations

import json
import reprlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import load_masks, save_masks
from hf_prune.errors import CheckpointError
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.training.run_record import differences
from hf_prune.utils.files import atomic_path
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.notices import warn_user

STATE_FILE = "pruning_state.safetensors"
_HEADER = "hf_prune"
_FORMAT, _VERSION = "hf_prune.training", 1
_CHECKED = (
    "*.safetensors",
    "config.json",
    "optimizer.*",
    "scheduler.pt",
    "trainer_state.json",
    "pytorch_model_fsdp*",  # of FSDP, a file or a folder
    "pytorch_model_fsdp*/*",
    "optimizer_*/*",
)
OLD_RUN_FILE = "training_run.json"
_ADVICE = "start over in another folder, or pass --allow-changes (allow_changes=True) to resume with the changes"
_CHUNK = 1 << 22
_SHOWN = 5  # differences that a message names


def save_training(folder: Path, store: MaskStore | None, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write masks and state into a checkpoint that is otherwise complete.

    Args:
        folder: The checkpoint.
        store: The masks, None if nothing was pruned yet.
        state: Tensors by name.
        facts: Settings that must be the same when the training is resumed, plain values for JSON.
    """
    (folder / STATE_FILE).unlink(missing_ok=True)
    if store is not None:
        save_masks(store, folder / MASK_FILE)
    header = {"format": _FORMAT, "version": _VERSION, "facts": dict(facts), "files": _files(folder)}
    with atomic_path(folder / STATE_FILE) as temporary:
        save_file(dict(state), temporary, {_HEADER: json.dumps(header, sort_keys=True, default=str)})


def load_training(folder: Path, facts: Mapping[str, Any]) -> tuple[MaskStore | None, dict[str, Tensor]]:
    """Read what :func:`save_training` wrote.

    Args:
        folder: The checkpoint.
        facts: The present settings.

    Raises:
        CheckpointError: If a file is missing, damaged or not the saved one, or a setting has changed.
    """
    files, before, state = check_training(folder)
    now = {key: value for key, value in json.loads(json.dumps(dict(facts))).items() if key in before}
    known = {key: before[key] for key in now}
    if known != now:
        raise CheckpointError(
            f"{folder} was pruned with other settings ({_describe(differences(known, now)) or 'by another version'}): "
            f"its masks cannot be continued with these; use the same settings, or start over in another folder"
        )
    return load_masks(folder / MASK_FILE) if MASK_FILE in files else None, state


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if there is none.

    Newer ones that an interruption left incomplete are skipped with a warning, and written again when the training
    gets there.

    Args:
        folder: Where the checkpoints of the run are.
    """
    numbered = [(int(path.name[11:]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    for _, path in sorted(numbered, reverse=True):
        try:
            check_training(path)
        except CheckpointError as error:
            warn_user(f"skipping an incomplete checkpoint: {error}")
        else:
            return path
    return None


def check_old_run(folder: Path, run: Callable[[], Mapping[str, Any]]) -> bool:
    """Compare a training with ``training_run.json``, which earlier versions wrote beside the checkpoints.

    Args:
        folder: The checkpoint to resume from, which does not say itself what training it belongs to.
        run: Returns what must not have changed, plain values for JSON.

    Returns:
        Whether there is such a file.

    Raises:
        CheckpointError: If something has changed.
    """
    path = folder.parent / OLD_RUN_FILE
    if not path.is_file():
        return False
    try:
        before = read_json_object(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ADVICE}") from error
    _refuse_other_run(path, differences(_as_it_was(before), json.loads(json.dumps(dict(run())))))
    return True


def check_same_run(folder: Path, facts: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Make sure that a checkpoint belongs to this training.

    The weights in memory may be the initial ones of the training, or those of the checkpoint.

    Args:
        folder: The checkpoint.
        facts: The facts stored in it.
        run: The present facts, from :func:`hf_prune.training.run_record.run_facts`.

    Returns:
        The facts of the training as it started.

    Raises:
        CheckpointError: If something differs.
    """
    now = json.loads(json.dumps(dict(run), default=str))
    before, reached = facts.get("run"), facts.get("weights_now")
    if not (isinstance(before, dict) and isinstance(reached, dict)):
        warn_user(
            f"{folder} does not say what it was trained with (an earlier version made it): that arguments, data and "
            f"model are the same was not checked",
        )
        return now
    compared = before | reached if now["weights"] == reached.get("weights") else before
    if None in (now["weights"], compared.get("weights")):  # unknown, as of weights that are spread over processes
        now, compared = {**now, "weights": None}, {**compared, "weights": None}
    _refuse_other_run(folder, differences(_as_it_was(compared), now))
    return before


def _as_it_was(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facts of a training with what earlier versions do not say: beside a teacher they had dropout."""
    distillation = facts.get("distillation")
    if not isinstance(distillation, dict):
        return facts
    return {**facts, "distillation": {"dropout": True, **distillation}}


def says_its_run(folder: Path) -> bool:
    """Whether a complete checkpoint says which training it belongs to; those of earlier versions do not."""
    with safe_open(folder / STATE_FILE, "pt") as file:
        return isinstance(json.loads(file.metadata()[_HEADER])["facts"].get("run"), dict)


def _refuse_other_run(path: Path, changes: Iterable[tuple[str, Any, Any]]) -> None:
    if description := _describe(changes):
        raise CheckpointError(
            f"{path} belongs to another training ({description}): expected the same settings, data and model; use "
            f"them, {_ADVICE}"
        )


def _describe(changes: Iterable[tuple[str, Any, Any]]) -> str:
    texts = [f"{name} was {reprlib.repr(old)}, now {reprlib.repr(new)}" for name, old, new in changes]
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return "; ".join([*texts[:_SHOWN], *more])


def check_training(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Make sure that a checkpoint is complete, and that its files belong together.

    Args:
        folder: The checkpoint.

    Returns:
        Its files, the facts stored in it, and the tensors.

    Raises:
        CheckpointError: If not.
    """
    path = folder / STATE_FILE
    advice = "resume from an earlier checkpoint, or start over"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE_FILE}: saving was interrupted, or it was not made by a PruningTrainer; {advice}"
        )
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}
        version = (header["format"], header["version"])
        files, before = dict(header["files"]), dict(header["facts"])
    except (OSError, SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; {advice}") from error
    if version != (_FORMAT, _VERSION):
        raise CheckpointError(
            f"{path} has format and version {version}: expected {(_FORMAT, _VERSION)}; update hf_prune"
        )
    now = _files(folder)
    for name, saved in files.items():
        if name not in now:
            raise CheckpointError(f"{folder} lacks {name}, which it had when it was saved; {advice}")
        if now[name] != saved:
            raise CheckpointError(f"{folder / name} is not the file that was saved with {STATE_FILE}; {advice}")
    if MASK_FILE in now and MASK_FILE not in files:
        raise CheckpointError(f"{folder / MASK_FILE} was not there when the checkpoint was saved; {advice}")
    return files, before, state


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and checksum of the files that belong together."""
    paths = {
        path for pattern in _CHECKED for path in folder.glob(pattern) if path.is_file() and path.name != STATE_FILE
    }
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in sorted(paths)}


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total
