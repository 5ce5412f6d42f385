"""hf-prune: the command line. It reads settings, calls the library, and prints."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from hf_prune.cli.app import app, command
from hf_prune.cli.commands.accelerate import accelerate
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
from hf_prune.cli.commands.trim_vocab import trim_vocab
from hf_prune.cli.commands.verify import verify
from hf_prune.cli.console import echo
from hf_prune.errors import HfPruneError
from hf_prune.utils.formatting import in_one_line

command(epilog="Example: hf-prune demo --out my-first-pruning")(demo)
command(
    epilog="Examples: hf-prune prune MODEL --sparsity 0.5 --out pruned  |  hf-prune prune MODEL --granularity 2:4 "
    "--criterion taylor --data glue/sst2 --out pruned  |  hf-prune prune MODEL --sparsity 0.5 --dry-run  |  "
    "hf-prune prune MODEL --max-drop 1.0 --criterion alps --data glue/sst2 --out pruned  |  "
    "hf-prune prune MODEL --stream --criterion wanda --scope row --data my-texts --text-column text --out pruned"
)(prune)
command(
    epilog="Examples: hf-prune evaluate pruned --data glue/sst2 --against MODEL  |  "
    "hf-prune evaluate LANGUAGE_MODEL --data wiki.test.raw --window 512"
)(evaluate)
command(
    epilog="Example: hf-prune sweep distilbert/distilbert-base-uncased-finetuned-sst-2-english "
    "--sparsity 0,0.3,0.5,0.6,0.8 --criterion magnitude --data glue/sst2"
)(sweep)
command(epilog="Example: hf-prune report pruned --dense MODEL --plots plots")(report)
command(epilog="Example: hf-prune inspect MODEL --json")(inspect)
command(epilog="Example: hf-prune export pruned pruned.onnx")(export)
command(epilog="Example: hf-prune bench MODEL pruned --batch 1,32 --length 64 --threads 1")(bench)
command(epilog="Example: hf-prune accelerate pruned --length 32 --threads 1 --out acceleration.json")(accelerate)
command(epilog="Example: hf-prune explain pruned --against MODEL")(explain)
command(epilog="Example: hf-prune trim-vocab MODEL --texts glue/sst2 --out smaller")(trim_vocab)
command(epilog="Example: hf-prune train MODEL --sparsity 0.8 --teacher self --data glue/sst2 --out pruned")(train)
command(epilog="Example: hf-prune lottery MODEL --sparsity 0.8 --rounds 5 --data glue/sst2 --out ticket")(lottery)
command(epilog="Example: hf-prune card pruned --evaluation scores.json --base-model ID --write")(card)
command(epilog="Example: hf-prune verify MODEL --evaluate --data glue/sst2")(verify)
command(epilog="Example: hf-prune push pruned me/bert-sst2-80 --dry-run")(push)
command(epilog="Example: hf-prune compress pruned small")(compress)
command(epilog="Example: hf-prune decompress small pruned")(decompress)
command(epilog="Examples: hf-prune migrate old new  |  hf-prune migrate sparse out --adopt-zeros")(migrate)
command(epilog="Example: hf-prune space --open")(space)
command(name="list", epilog="Example: hf-prune list --json")(list_)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can fix becomes one line on stderr and exit code 1."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: echo(f"warning: {in_one_line(str(message))}", err=True)
        try:
            app(arguments)
        except (HfPruneError, OSError) as error:
            echo(f"error: {in_one_line(str(error))}", err=True)
            sys.exit(1)
