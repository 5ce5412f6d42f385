"""The command line app that commands belong to."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from hf_prune import __version__
from hf_prune.cli.console import echo, show_notices
from hf_prune.cli.panels import arrange
from hf_prune.cli.run_file import named_file, option_values
from hf_prune.errors import ConfigError, HfPruneError
from hf_prune.utils.registry import meant_by

_TAG = re.compile(r"(?=\[[a-z#/@])")  # what rich reads as markup
_PLACEHOLDERS = {int: "N", float: "NUMBER", Path: "PATH"}


def _print_help(command: Any, ctx: typer.Context) -> None:
    """Print help in panels, as wide as the terminal, and without colours where it is piped.

    Texts are printed as they are written: brackets are no markup.
    """
    from typer import rich_utils

    shown = copy.copy(command)
    shown.help, shown.epilog = _escaped(command.help), _escaped(command.epilog)
    shown.get_params = lambda ctx: [_as_shown(param) for param in command.get_params(ctx)]
    rich_utils.rich_format_help(obj=shown, ctx=ctx, markup_mode="rich")


def _escaped(text: str | None) -> str | None:
    return text and _TAG.sub(r"\\", text)


def _as_shown(param: Any) -> Any:
    shown = copy.copy(param)
    shown.help, shown.min, shown.max = _escaped(param.help), None, None  # a range is said where it is left
    if shown.param_type_name == "option" and shown.metavar is None:
        kind = param.type_descriptor.annotation
        shown.metavar = "" if param.is_flag else _PLACEHOLDERS.get(kind, "TEXT")
    return shown


class Group(typer.core.TyperGroup):
    """The list of commands."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Print the help."""
        _print_help(self, ctx)


app = typer.Typer(
    name="hf-prune",
    help="Prune Hugging Face models, see what it costs and what it brings, and save the result.",
    epilog="Start with: hf-prune demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # errors are plain lines; of the help see _print_help
    pretty_exceptions_enable=False,
    cls=Group,
)


class Command(typer.core.TyperCommand):
    """A command that knows what other tools call its options."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params = arrange(self.params)

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """The arguments and options, in the order of the help."""
        return arrange(super().get_params(ctx))

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Print the help."""
        _print_help(self, ctx)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the arguments, unless one of them is an option of another tool: then suggest ours."""
        if ctx.resilient_parsing:  # a shell asks for completions
            return super().parse_args(ctx, args)
        options = {option for param in self.get_params(ctx) for option in (*param.opts, *param.secondary_opts)}
        for option in (arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else None]):
            if option.startswith("--") and option not in options:
                meant = meant_by("setting", option[2:], [name[2:].replace("-", "_") for name in options])
                ours = re.sub(r"^'(\w+)'", lambda name: f"--{name[1].replace('_', '-')}", meant or "")
                if ours.split(",")[0] in options:
                    ctx.fail(f"No such option: {option} (did you mean {ours}?)")
        if "--config" in options:
            settings = getattr(self.callback, "setting_names", ())
            ctx.default_map = option_values(args, str(self.name), self.get_params(ctx), settings)
        of_file, path, line = ctx.default_map or {}, named_file(args), [arg.partition("=")[0] for arg in args]
        try:
            return super().parse_args(ctx, args)  # which empties the list
        except typer.BadParameter as error:
            name = "" if error.param is None else error.param.name
            if error.param is None or name not in of_file or {*error.param.opts} & {*line}:
                raise  # the value is of the command line
            raise ConfigError(f"--config {path}: {name} is {of_file[name]!r}: {error.message}") from error

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; errors name settings as its options do, not as Python does."""
        from hf_prune.utils.progress import showing_progress

        try:
            with showing_progress():
                return super().invoke(ctx)
        except KeyboardInterrupt:  # see also console.resumable
            echo("\nInterrupted. Nothing was written: outputs appear when they are complete.", err=True)
            raise typer.Exit(130) from None
        except HfPruneError as error:
            names = {param.name: param.opts[0] for param in self.get_params(ctx) if "_" in (param.name or "")}
            names |= {"text_columns": names["text_column"]} if "text_column" in names else {}
            spelled = re.compile(rf"(?<![\w.'/\"-])({'|'.join(names)})(?![\w.'/\"(-]|=True)")
            if names:
                error.args = tuple(
                    spelled.sub(lambda name: names[name[1]], arg) if isinstance(arg, str) else arg for arg in error.args
                )
            raise


command = functools.partial(app.command, cls=Command)


def _version(asked: bool) -> None:
    if asked:
        echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune Hugging Face models, see what it costs and what it brings, and save the result."""
    show_notices()
