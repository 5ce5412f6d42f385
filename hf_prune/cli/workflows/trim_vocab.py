"""Trim the vocabulary of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_prune.auto import load_native
from hf_prune.checkpoint.companions import copy_companions, has_tokenizer, tokenizer_files
from hf_prune.checkpoint.native import load_tokenizer
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.errors import DataError
from hf_prune.evaluation.data.columns import find_text_columns
from hf_prune.evaluation.data.loading import column_names, load_texts
from hf_prune.structured.vocabulary.trim import TrimResult, trim_vocabulary
from hf_prune.utils.files import write_json
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.output_folder import check_output


def read_corpus(sources: Sequence[str], splits: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """The texts of several data sets.

    Args:
        sources: Files, folders or Hub ids; see :func:`hf_prune.load_texts`.
        splits: Splits of each; a file is a single split.
        columns: The columns that hold text, where there are columns; None for those with usual names.

    Raises:
        DataError: If one cannot be found or read.
    """
    return [
        text
        for source in sources
        for split in (splits[:1] if Path(source).is_file() else splits)
        for column in columns or _text_columns(source)
        for text in load_texts(source, split, text_column=column)
    ]


def _text_columns(source: str) -> tuple[str, ...]:
    available = column_names(source)
    return find_text_columns(available, repr(source)) if available else ("text",)


@writes_alone("trim-vocab")
def trim_checkpoint(
    source: str,
    out: Path | None,
    texts: Sequence[str] | None,
    *,
    keep: Sequence[str] = (),
    min_count: int = 1,
    round_to: int | None = None,
    overwrite: bool = False,
) -> TrimResult:
    """Trim the vocabulary of a checkpoint into a folder: weights, the new tokenizer, ``vocabulary_report.json``.

    Args:
        source: Folder or Hub id.
        out: The folder: new, empty, or an earlier output; None only reports what would be left.
        texts: See :func:`hf_prune.trim_vocabulary`, also for the other settings.
        keep: Tokens that are always kept.
        min_count: Also remove tokens that are used less often.
        round_to: Make the number of tokens a multiple of this.
        overwrite: Replace what is in the way in ``out``.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
        DataError: If the source cannot be found, or has no tokenizer.
    """
    if out is not None:
        check_output(out, "trim-vocab", [source], overwrite=overwrite)
    offline = check_model_source(source)
    if not has_tokenizer(source, local_files_only=offline):
        raise DataError(f"{source!r} has no tokenizer: expected one beside the model, to count its tokens")
    model, tokenizer = load_native(source), load_tokenizer(source, local_files_only=offline)
    result = trim_vocabulary(model, tokenizer, texts, keep=keep, min_count=min_count, round_to=round_to)
    if out is None:
        return result
    with staged_checkpoint(out, "trim-vocab", overwrite=overwrite) as staging:
        model.save_pretrained(staging)
        copy_companions(source, staging)
        for name in tokenizer_files():  # those of the old tokenizer must not mix with the new one
            (staging / name).unlink(missing_ok=True)
        result.tokenizer.save_pretrained(staging)
        write_json(staging / "vocabulary_report.json", result.to_dict())
    return result
