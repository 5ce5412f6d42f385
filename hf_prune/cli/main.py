"""hf-prune: the command line. It reads settings, calls the library, and prints."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence

from hf_prune.cli.app import app, command
from hf_prune.cli.commands.accelerate import accelerate
from hf_prune.cli.commands.auto import auto
from hf_prune.cli.commands.bench import bench
from hf_prune.cli.commands.card import card
from hf_prune.cli.commands.compress import compress
from hf_prune.cli.commands.decompress import decompress
from hf_prune.cli.commands.demo import demo
from hf_prune.cli.commands.evaluate import evaluate
from hf_prune.cli.commands.explain import explain
from hf_prune.cli.commands.export import export
from hf_prune.cli.commands.inspect import inspect
from hf_prune.cli.commands.list import list_
from hf_prune.cli.commands.lottery import lottery
from hf_prune.cli.commands.migrate import migrate
from hf_prune.cli.commands.prune import prune
from hf_prune.cli.commands.push import push
from hf_prune.cli.commands.report import report
from hf_prune.cli.commands.space import space
from hf_prune.cli.commands.sweep import sweep
from hf_prune.cli.commands.train import train
from hf_prune.cli.commands.trim_hidden import trim_hidden
from hf_prune.cli.commands.trim_vocab import trim_vocab
from hf_prune.cli.commands.verify import verify
from hf_prune.cli.console import echo, is_quiet, prints_json
from hf_prune.errors import HfPruneError
from hf_prune.utils.formatting import in_one_line

_START, _PRUNE, _MEASURE, _CONVERT, _SHARE = "Start here", "Prune", "Measure", "Convert", "Share"


def _add(function: Callable[..., None], panel: str, *examples: str, name: str | None = None) -> None:
    """Add a command; the order of the calls is that of the help."""
    epilog = ("Example" if len(examples) == 1 else "Examples") + ":\n" + "\n".join(f"  {line}" for line in examples)
    command(name=name, rich_help_panel=panel, epilog=epilog)(function)


_add(demo, _START, "hf-prune demo --out my-first-pruning")
_add(list_, _START, "hf-prune list --json", "hf-prune list presets", name="list")
_add(inspect, _START, "hf-prune inspect MODEL --json")
_add(
    prune,
    _PRUNE,
    "hf-prune prune MODEL --sparsity 0.5 --out pruned",
    "hf-prune prune MODEL --granularity 2:4 --criterion taylor --data glue/sst2 --out pruned",
    "hf-prune prune MODEL --sparsity 0.5 --dry-run",
    "hf-prune prune MODEL --max-drop 1.0 --criterion alps --data glue/sst2 --out pruned",
    "hf-prune prune MODEL --stream --criterion wanda --scope row --data my-texts --text-column text --out pruned",
)
_add(
    auto,
    _PRUNE,
    "hf-prune auto MODEL --data glue/sst2 --goal faster --out faster",
    "hf-prune auto LANGUAGE_MODEL --data my-texts --goal smaller --max-drop 5 --time-limit 30m --out small",
)
_add(train, _PRUNE, "hf-prune train MODEL --sparsity 0.8 --teacher self --data glue/sst2 --out pruned")
_add(lottery, _PRUNE, "hf-prune lottery MODEL --sparsity 0.8 --rounds 5 --data glue/sst2 --out ticket")
_add(trim_vocab, _PRUNE, "hf-prune trim-vocab MODEL --texts glue/sst2 --out smaller")
_add(trim_hidden, _PRUNE, "hf-prune trim-hidden MODEL --size 0.9 --data glue/sst2 --out narrower")
_add(
    evaluate,
    _MEASURE,
    "hf-prune evaluate pruned --data glue/sst2 --against MODEL",
    "hf-prune evaluate LANGUAGE_MODEL --data wiki.test.raw --window 512",
)
_add(
    sweep,
    _MEASURE,
    "hf-prune sweep MODEL --sparsity 0,0.3,0.5,0.6,0.8 --criterion magnitude --data glue/sst2",
)
_add(report, _MEASURE, "hf-prune report pruned --dense MODEL --plots plots")
_add(bench, _MEASURE, "hf-prune bench MODEL pruned --batch 1,32 --length 64 --threads 1")
_add(explain, _MEASURE, "hf-prune explain pruned --against MODEL")
_add(accelerate, _MEASURE, "hf-prune accelerate pruned --length 32 --threads 1 --out acceleration.json")
_add(compress, _CONVERT, "hf-prune compress pruned small")
_add(decompress, _CONVERT, "hf-prune decompress small pruned")
_add(export, _CONVERT, "hf-prune export pruned pruned.onnx")
_add(migrate, _CONVERT, "hf-prune migrate old new", "hf-prune migrate sparse out --adopt-zeros")
_add(card, _SHARE, "hf-prune card pruned --evaluation scores.json --base-model ID --write")
_add(verify, _SHARE, "hf-prune verify MODEL --evaluate --data glue/sst2")
_add(push, _SHARE, "hf-prune push pruned me/bert-sst2-80 --dry-run")
_add(space, _SHARE, "hf-prune space --open")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if not is_quiet():
        echo(f"warning: {in_one_line(str(message))}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can fix becomes one line on stderr and exit code 1.

    With ``--json``, stdout gets it as well, as ``{"error": "…"}``.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(arguments)
        except (HfPruneError, OSError) as error:
            text = in_one_line(str(error))
            echo(f"error: {text}", err=True)
            if prints_json(sys.argv[1:] if arguments is None else arguments):
                echo(json.dumps({"error": text}))
            sys.exit(1)
