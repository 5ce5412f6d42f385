"""Where options stand in the help, and values that an option completes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

OTHER = "Output"  # the panel of options that no panel names, and of --help
#: Panels in the order of the help, with the parameters that they show, whichever command takes them.
PANELS = {
    "What is removed": "preset presets goal sparsity criterion granularity scope allocation target_modules "
    "exclude_modules only keep_masks adopt_zeros min_sparsity texts keep_tokens min_count round_to size",
    "Instead of a sparsity": "target_params target_flops target_speedup target_size workload max_drop max_flips "
    "held_out time_limit uniform",
    "Models": "against dense model",
    "Data": "data text_column label_column split score_split calibration_split calibration_samples window metric limit "
    "batch_size prompts batch length new_tokens lm_eval include_path evaluate evaluation latency acceleration dataset",
    "How": "objective repair steps polish polish_samples shrink stream seed tolerance warmup codec values gguf_type "
    "quantize cache remote_code rounds rewind_to schedule begin end every shrink_at config",
    "Training": "epochs learning_rate accumulation bf16 teacher temperature hidden task dropout checkpoints "
    "allow_changes report_to",
    "Where it runs": "accelerate device dtype dtypes threads revision token trust_remote_code",
    "Repository": "private create_pr force message base_model license_ language example command name push",
    OTHER: "",
}
_PANEL = {parameter: panel for panel, parameters in PANELS.items() for parameter in parameters.split()}
_ORDER = {panel: place for place, panel in enumerate(PANELS)}


def arrange(parameters: Iterable[Any]) -> list[Any]:
    """Put options into their panels, in the order of the panels; arguments and options that name one keep it.

    Args:
        parameters: The arguments and options of a command.
    """
    for option in (p for p in parameters if p.param_type_name == "option"):
        option.rich_help_panel = option.rich_help_panel or _PANEL.get(option.name, OTHER)
    return sorted(parameters, key=lambda p: _ORDER.get(p.rich_help_panel, -1))


def one_of(values: Iterable[str], help: str, **options: Any) -> Any:
    """An option that shows and completes the values that it takes; what else is given is refused where it is read.

    Args:
        values: What it takes.
        help: What it is for.
        **options: More for ``typer.Option``.
    """
    values = tuple(values)
    return typer.Option(help=help, metavar="|".join(values), autocompletion=lambda: list(values), **options)


def criterion_names() -> list[str]:
    """The criteria of single weights, to complete; read without loading PyTorch."""
    from hf_prune.utils.registry_source import read_entries

    criteria = read_entries("hf_prune.criteria", {"description"})
    return [name for name, values in criteria.items() if values]
