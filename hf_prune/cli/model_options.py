"""Options of every command that loads a model: where it comes from, where it runs, and what is printed meanwhile."""

from __future__ import annotations

import functools
import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.custom_code import trust_remote_code
from hf_prune.cli.console import verbosity
from hf_prune.cli.panels import one_of
from hf_prune.cli.run_file import choosing, pruning_settings, read_run_file, write_run_file
from hf_prune.cli.settings import config_values
from hf_prune.errors import HfPruneError
from hf_prune.utils.load_options import DEVICES, DTYPES, LoadOptions, loading_with

Device = Annotated[
    str, one_of(DEVICES, "Where the model runs; auto is the accelerator of this machine, or else the CPU.")
]
Dtype = Annotated[str, one_of(DTYPES, "Of the weights; auto is that of the checkpoint.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of MODEL on the Hub. [default: main]", show_default=False)
]
Token = Annotated[
    str | None,
    typer.Option(help="Token for the Hub; never printed or written.", envvar="HF_TOKEN", show_default=False),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the model code in checkpoints that bring their own. Only if you trust it."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of what is random.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print what the libraries log, and where an error came from.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML or JSON file with settings of this command; options override it.", show_default=False),
]

SOURCE: Mapping[str, tuple[Any, Any]] = {
    "revision": (Revision, None),
    "token": (Token, None),
    "trust_remote_code": (TrustRemoteCode, False),
}
CODE = {"trust_remote_code": SOURCE["trust_remote_code"]}  # of folders
LOCAL = {"token": SOURCE["token"], **CODE}
DTYPE: Mapping[str, tuple[Any, Any]] = {"dtype": (Dtype, "auto")}
MACHINE: Mapping[str, tuple[Any, Any]] = {"device": (Device, "auto"), **DTYPE}
RUN: Mapping[str, tuple[Any, Any]] = {
    "seed": (Seed, None),
    "config": (Config, None),
    "verbose": (Verbose, False),
    "quiet": (Quiet, False),
}
#: Of commands in which nothing is random; they take a seed all the same, so that earlier lines and run files work.
UNSEEDED = {**RUN, "seed": (Annotated[int | None, typer.Option(hidden=True)], None)}
_DECIDE = ("target_size", "max_drop", "max_flips")  # options that decide the sparsity, in place of the settings


def loads_model(
    *tables: Mapping[str, tuple[Any, Any]], name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of commands that load a model, and apply them while it runs.

    Options that the command has itself, it gets as well. Afterwards the settings of the run are written into the
    folder that its option ``--out`` names, if it wrote one, also where it ends with exit code 1.

    Args:
        *tables: Which options: of ``SOURCE``, ``MACHINE``, ``RUN`` or ``UNSEEDED``, and their parts; by default all but
            the last.
        name: The name of the command, if it is not that of the function.
    """
    options = {key: value for table in tables or (SOURCE, MACHINE, RUN) for key, value in table.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = signature.parameters
        added = [
            Parameter(key, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in options.items()
            if key not in own
        ]
        parameters = [*own.values(), *added]
        defaults = {parameter.name: parameter.default for parameter in parameters}
        first = next(iter(own))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {key: default for key, default in defaults.items() if default is not Parameter.empty} | values
            model = given[first]
            file = {} if given.get("config") is None else read_run_file(given["config"])  # which a run may replace
            with ExitStack() as stack:
                stack.enter_context(verbosity(bool(given.get("verbose")), bool(given.get("quiet"))))
                stack.enter_context(_token(given.get("token")))
                stack.enter_context(loading_with(_load_options(model, given)))
                stack.enter_context(trust_remote_code(bool(given.get("trust_remote_code"))))
                seed = file.get("seed") if given.get("seed") is None else given["seed"]
                if isinstance(seed, int):
                    from transformers import set_seed

                    set_seed(seed)
                chosen = stack.enter_context(choosing())
                stack.enter_context(_traced(bool(given.get("verbose"))))
                ended = None
                try:
                    command(**{key: value for key, value in values.items() if key in own})
                except typer.Exit as stop:  # a run that missed what was asked for has an output all the same
                    if stop.exit_code != 1:
                        raise
                    ended = stop
            if isinstance(out := given.get("out"), Path) and out.is_dir() and not given.get("dry_run"):
                names: tuple[str, ...] = getattr(command, "setting_names", ())
                said = config_values({key: given[key] for key in names if given.get(key) is not None})
                named = {**(pruning_settings(file) if names else {}), **said}
                if any(given.get(key) is not None for key in _DECIDE):
                    chosen.pop("sparsity", None)
                if "preset" in chosen:  # several may have the same settings
                    chosen["preset"] = named.get("preset", chosen["preset"])
                settings = chosen or named
                plain = {k: chosen.get(k) if value is None else value for k, value in given.items() if k not in names}
                _write(out, name or command.__name__.replace("_", "-"), plain, defaults, settings)
            if ended is not None:
                raise ended

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _load_options(model: Any, given: Mapping[str, Any]) -> LoadOptions:
    return LoadOptions(
        model=str(model[0] if isinstance(model, list) and model else model),
        revision=given.get("revision"),
        device=given.get("device") or "cpu",
        dtype=given.get("dtype") or "auto",
    )


@contextmanager
def _token(token: str | None) -> Iterator[None]:
    """Let the libraries of the Hub find a token where they look for it."""
    before = os.environ.get("HF_TOKEN")
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if token:
            os.environ.pop("HF_TOKEN")
            if before is not None:
                os.environ["HF_TOKEN"] = before


@contextmanager
def _traced(verbose: bool) -> Iterator[None]:
    """Print where an error came from, if that is asked for; the error itself becomes one line as always."""
    try:
        yield
    except (HfPruneError, OSError):
        if verbose:
            traceback.print_exc()
        raise


def _write(
    out: Path, name: str, plain: Mapping[str, Any], defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    from hf_prune.utils.distributed import is_main_process

    if is_main_process():
        write_run_file(out, name, plain, defaults, {key: v for key, v in settings.items() if key not in plain})
