"""hf-prune inspect: options, help, and what it prints."""

from __future__ import annotations

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import SOURCE, UNSEEDED, loads_model
from hf_prune.cli.options import AsJson, Model
from hf_prune.cli.startup import start


@loads_model(SOURCE, UNSEEDED)
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show what can be removed as a whole: layers, heads, neurons, experts; and what cannot, and why.

    Only the config is read, so a folder needs no weights.
    """
    start([model])
    from hf_prune.cli.workflows.inspect import describe_checkpoint

    description = describe_checkpoint(model)
    echo(description.to_json() if as_json else str(description))
