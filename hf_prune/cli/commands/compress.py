"""hf-prune compress, decompress and migrate: checkpoints into packed weights and back, and from other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.options import Overwrite, echo, start
from hf_prune.errors import ConfigError

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]


def compress(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with a dense checkpoint.", show_default=False)
    ],
    out: Out,
    codec: Annotated[str, typer.Option(help="zstd, or none for values that lie in the file as they are.")] = "zstd",
    values: Annotated[
        str, typer.Option(help="exact, or int8, which rounds what pruning left: measure what that costs.")
    ] = "exact",
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code", help="Add a file for trust_remote_code=True, which loads it where hf_prune is missing."
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a pruned checkpoint small; with hf_prune imported, plain transformers loads it."""
    from hf_prune.conversion.compression import compress_checkpoint

    report = compress_checkpoint(folder, out, codec=codec, values=values, remote_code=remote_code, overwrite=overwrite)
    echo(f"{report}\nSaved: {out}")


def decompress(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with a compressed checkpoint.", show_default=False)
    ],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed checkpoint dense, for plain transformers alone."""
    from hf_prune.conversion.decompression import decompress_checkpoint

    echo(f"{decompress_checkpoint(folder, out, overwrite=overwrite)}\nSaved: {out}")


def migrate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that another tool wrote.", show_default=False)
    ],
    out: Out,
    adopt_zeros: Annotated[
        bool,
        typer.Option("--adopt-zeros", help="It has no masks but zeros in plain weights: make masks of those."),
    ] = False,
    min_sparsity: Annotated[
        float | None,
        typer.Option(
            help="With --adopt-zeros: weights with a smaller share of zeros get no mask. [default: 0.01]",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Carry a checkpoint over that torch.nn.utils.prune, parametrize, compressed-tensors or transformers 4 pruned."""
    if min_sparsity is not None and not adopt_zeros:
        raise ConfigError("--min-sparsity says which zeros to adopt: add --adopt-zeros, or leave it out")
    if adopt_zeros:
        from hf_prune.cli.workflows.adopt import adopt_checkpoint

        start([str(folder)])
        settings = {} if min_sparsity is None else {"min_sparsity": min_sparsity}
        text = str(adopt_checkpoint(folder, out, overwrite=overwrite, **settings))
    else:
        from hf_prune.conversion.migration import migrate_checkpoint

        text = str(migrate_checkpoint(folder, out, overwrite=overwrite))
    echo(f"{text}\nSaved: {out}")
