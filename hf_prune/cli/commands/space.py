"""hf-prune space: the Gradio app, on this machine or as a Space."""

from __future__ import annotations

import functools
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.checkpoint.sources import check_model_source
from hf_prune.cli.console import echo, show
from hf_prune.cli.options import AsJson
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.sources import check_data_source


def space(
    model: Annotated[str | None, typer.Option(help="A classifier's folder. [default: the demo's model]")] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder with train/dev files for it, to calibrate with and to score on.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="[default: the first free one from 7860]")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Create or update this Space instead.")] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="For a new Space. [default: that of your account]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also overwrite a Space that holds something else.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: upload nothing, list the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prune, see, compare and publish in the browser; or push the app as a Space."""
    if as_json and push is None:
        raise ConfigError("--json prints what was pushed: add --push, or leave it out")
    if model is None and data is not None:
        raise DataError("--data goes with --model: the demo's model has sentences of its own")
    if model is not None:
        check_model_source(model)
        if not Path(model).is_dir():
            raise DataError(f"{model} is not a folder: choose models of the Hub in the app, or download it first")
    if data is not None:
        check_data_source(data)
    if push is not None:
        from hf_prune.hub.push_space import push_space

        if model is None:
            from hf_prune.cli.demo.assets import prepare_demo

            assets = prepare_demo(echo=functools.partial(echo, err=as_json))
            model, data = str(assets.model_dir), str(assets.data_dir)
            names: dict[str, str] = {}
        else:
            names = {"name": Path(model).name, "data_name": Path(data).name if data else ""}
        result = push_space(
            app_folder(), push, model=model, data=data, names=names, private=private, force=force, dry_run=dry_run
        )
        show(result, as_json)
        return
    for package in ("gradio", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{package} is not installed: run `pip install 'hf_prune[space,demo]'`")
    settings = {"HF_PRUNE_SPACE_MODEL": model, "HF_PRUNE_SPACE_DATA": data}
    settings |= {"HF_PRUNE_SPACE_OPEN": "1" if open_ else None, "GRADIO_SERVER_PORT": str(port) if port else None}
    os.environ.update({name: value for name, value in settings.items() if value is not None})
    folder = app_folder()
    sys.path.insert(0, str(folder))
    echo("Starting; stop it with Ctrl-C.")
    runpy.run_path(str(folder / "app.py"), run_name="__main__")


def app_folder() -> Path:
    """The folder with the app's files: in the installed package, or beside it in a clone.

    Raises:
        DataError: If they are in neither place.
    """
    package = Path(__file__).parents[2]
    for folder in (package / "space", package.parent / "space"):
        if (folder / "app.py").is_file():
            return folder
    raise DataError(f"the app's files are neither in {package / 'space'} nor in {package.parent / 'space'}: reinstall")
