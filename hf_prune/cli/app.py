"""The command line app that commands belong to."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any

import typer
import typer.core

from hf_prune import __version__
from hf_prune.cli.console import echo, show_notices
from hf_prune.errors import HfPruneError
from hf_prune.utils.registry import meant_by

app = typer.Typer(
    name="hf-prune",
    help="Prune Hugging Face models, see what it costs and what it brings, and save the result.",
    epilog="Start with: hf-prune demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Command(typer.core.TyperCommand):
    """A command that knows what other tools call its options."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the arguments, unless one of them is an option of another tool: then suggest ours."""
        options = {option for param in self.get_params(ctx) for option in (*param.opts, *param.secondary_opts)}
        for option in (arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else None]):
            if option.startswith("--") and option not in options:
                meant = meant_by("setting", option[2:], [name[2:].replace("-", "_") for name in options])
                ours = re.sub(r"^'(\w+)'", lambda name: f"--{name[1].replace('_', '-')}", meant or "")
                if ours.split(",")[0] in options:
                    ctx.fail(f"No such option: {option} (did you mean {ours}?)")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; errors name settings as its options do, not as Python does."""
        try:
            return super().invoke(ctx)
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
