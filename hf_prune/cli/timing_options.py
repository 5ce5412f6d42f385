"""Options that the commands which time models share."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_prune.cli.options import split_names
from hf_prune.cli.panels import one_of
from hf_prune.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")

Batches = Annotated[str, typer.Option(help="Batch sizes, separated by commas.")]
Lengths = Annotated[str, typer.Option(help="Tokens of each example, separated by commas.")]
Batch = Annotated[int | None, typer.Option(min=1, help="How many examples the timed batch has. [default: 1]")]
Length = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of each example that is timed; of images and sound, none. [default: 128]"),
]
Dtype = Annotated[str, one_of(DTYPES, "What all models compute in.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch. [default: its own]")]
Accelerate = Annotated[
    bool, typer.Option("--accelerate", help="Measure what faster kernels bring, at the first batch and length.")
]
Rounds = Annotated[int, typer.Option(min=1, help="How many times each is timed, in turns.")]
Warmup = Annotated[int, typer.Option(min=1, help="Untimed runs before that.")]


def split_whole_numbers(option: str, text: str) -> list[int]:
    """The whole numbers in a text, which are separated by commas.

    Raises:
        ConfigError: If one is not a whole number above 0.
    """
    parts = split_names(text)
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} is {text!r}: expected whole numbers separated by commas, such as 1,32")
    return [int(part) for part in parts]


def given_workload(batch: int | None, length: int | None, threads: int | None) -> dict[str, int]:
    """The workload that options name, without those that were not given."""
    given = {"batch_size": batch, "length": length, "threads": threads}
    return {name: value for name, value in given.items() if value is not None}


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that models are not timed in.

    Raises:
        UnknownNameError: If it is not one of ours.
    """
    if dtype not in DTYPES:
        from hf_prune.utils.registry import unknown_name

        raise unknown_name("dtype", dtype, DTYPES)
