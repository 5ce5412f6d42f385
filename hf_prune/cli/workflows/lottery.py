"""Search for a lottery ticket, starting from a checkpoint."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.companions import copy_companions
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.cli.workflows.train import SEEN, TrainingSettings, training_arguments
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.planning.config import PruningConfig
from hf_prune.training.lottery import LotteryResult, find_ticket
from hf_prune.training.trainer import PruningTrainer
from hf_prune.utils.files import write_json
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.output_folder import check_output


@writes_alone("lottery")
def lottery_checkpoint(
    source: str,
    config: PruningConfig,
    out: Path,
    task: ClassificationTask,
    *,
    settings: TrainingSettings | None = None,
    score_split: str = "validation",
    rounds: int = 5,
    rewind_to: int = 0,
    overwrite: bool = False,
) -> LotteryResult:
    """Search for a lottery ticket, starting from the weights of a checkpoint; see :func:`hf_prune.find_ticket`.

    The folder gets the trained sparse model, ``ticket.safetensors`` with the weights that it started from, and
    ``lottery.json``.

    Args:
        source: Folder or Hub id of a sequence classifier.
        config: The settings after the last round.
        out: The folder.
        task: What it learns from and is scored on.
        settings: How each round is trained.
        score_split: The split to score after each round.
        rounds: How many times to prune.
        rewind_to: Step after which the early weights are taken.
        overwrite: Replace what is in the way in ``out``.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    from safetensors.torch import save_file

    settings = settings or TrainingSettings()
    refuse_same_split(task.source, settings.split, score_split, "trained and scored on", SEEN)
    check_output(out, "lottery", [source], overwrite=overwrite)
    model, tokenizer = load_for_task(source, task)
    examples = task.training_examples(settings.split, model, tokenizer)

    def accuracy(prediction: Any) -> Mapping[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:

        def make_trainer(changed: Any) -> PruningTrainer:
            return PruningTrainer(
                model=changed,
                args=training_arguments(settings, Path(folder), saves=False),
                train_dataset=examples,
                eval_dataset=task.training_examples(score_split, model, tokenizer),
                data_collator=task.data_collator(tokenizer),
                compute_metrics=accuracy,
            )

        with contextlib.redirect_stdout(sys.stderr):
            result = find_ticket(model, make_trainer, config, rounds=rounds, rewind_to=rewind_to)
    shared: dict[int, str] = {}
    ticket = {n: t for n, t in result.ticket.items() if shared.setdefault(t.data_ptr(), n) == n}
    with staged_checkpoint(out, "lottery", overwrite=overwrite) as staging:
        model.eval().save_pretrained(staging)
        copy_companions(source, staging)
        save_file({name: tensor.contiguous() for name, tensor in ticket.items()}, staging / "ticket.safetensors")
        write_json(staging / "lottery.json", {"config": config.to_dict(), "rewind_to": rewind_to, **result.to_dict()})
    return result
