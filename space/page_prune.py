"""The first two tabs: prune, and see what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
import views
from common import HEAVY, QUICK, canceller, in_words, place, teller, visitor
from studio import Pruned, Studio
from work import WHAT, can_repair, criteria_for, fixed_sparsity, make_config


def prune_tab(studio: Studio) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(min_width=300):
            found["model"] = gr.Dropdown(
                studio.names,
                value=studio.names[0],
                label="Model",
                info="One of the list, or the Hub id (owner/name) of a text classifier with safetensors.",
                allow_custom_value=True,
                elem_id="model",
            )
            found["what"] = gr.Radio(
                list(WHAT),
                value="Heads and neurons",
                label="What goes",
                info="Zeros make a file smaller; only whole heads, neurons and layers make a model faster.",
                elem_id="what",
            )
        with gr.Column(min_width=300):
            found["how"] = gr.Dropdown(
                list(criteria_for("Heads and neurons")),
                value="fisher",
                label="How it is chosen",
                info=_reason("Heads and neurons", "fisher"),
                elem_id="how",
            )
            found["repair"] = gr.Checkbox(
                value=True,
                label="Repair what stays (least squares)",
                info="Gives what stays new values, so that each layer's outputs change least.",
                elem_id="repair",
            )
            found["sparsity"] = gr.Slider(
                0.05,
                0.95,
                value=0.5,
                step=0.05,
                label="Sparsity",
                info="The share of what may go that goes.",
                elem_id="sparsity",
            )
            with gr.Row():
                found["start"] = gr.Button("Prune", variant="primary", elem_id="start")
                found["cancel"] = gr.Button("Cancel", variant="stop", elem_id="cancel")
    found["said"] = gr.Markdown("Nothing is pruned yet.", elem_id="said", container=True)
    with gr.Accordion("The numbers as JSON", open=False):
        found["facts"] = gr.JSON(label="Numbers", elem_id="facts")
    return found


def _reason(what: str, how: str) -> str:
    return f"{criteria_for(what)[how]}. On offer is what fits to what goes."


def wire(studio: Studio, choose: Mapping[str, Any], seen: Sequence[Any]) -> None:
    what, how, repair, sparsity = (choose[name] for name in ("what", "how", "repair", "sparsity"))

    @in_words
    def choices(what: Any, how: Any, repair: Any) -> list[Any]:
        """What can be combined with what goes: the criteria, the repair and the sparsity."""
        offered = criteria_for(what) if what in list(WHAT) else {}
        if not offered:
            raise gr.Error(f"what goes is one of {', '.join(WHAT)}", print_exception=False)
        chosen = how if how in list(offered) else ("fisher" if "fisher" in offered else "magnitude")
        fits, fixed = can_repair(what, chosen), fixed_sparsity(what)
        return [
            gr.Dropdown(choices=list(offered), value=chosen, info=_reason(what, chosen)),
            gr.Checkbox(
                value=repair is True and fits,
                interactive=fits,
                info="Gives what stays new values, so that each layer's outputs change least."
                if fits
                else "Nothing to repair here: what stays gets the same inputs as before.",
            ),
            gr.Slider(interactive=True, info="The share of what may go that goes.")
            if fixed is None
            else gr.Slider(value=fixed, interactive=False, info="Follows from 2:4."),
        ]

    gr.on(
        [what.input, how.input],
        choices,
        [what, how, repair],
        [how, repair, sparsity],
        api_name="choices",
        preprocess=False,  # as below
        show_progress="hidden",
        **QUICK,
    )

    @in_words
    def prune(
        model: Any,
        what: Any,
        how: Any,
        repair: Any,
        sparsity: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Prune a copy of a model; what is shown of it, and the numbers."""
        config = make_config(what, how, repair is True, sparsity)
        with place(studio, request):
            pruned = studio.prune(visitor(request), str(model or "").strip(), config, teller(progress))
        return [_summary(pruned), dict(pruned.facts), *_pictures(pruned)]

    run = choose["start"].click(
        prune,
        [choose["model"], what, how, repair, sparsity],
        [choose["said"], choose["facts"], *seen],
        api_name="prune",
        preprocess=False,  # gradio refuses what the page did not offer last; we, what does not fit
        show_progress_on=choose["said"],
        **HEAVY,
    )

    choose["cancel"].click(
        canceller(studio), None, choose["said"], api_name="cancel", queue=False, show_progress="hidden", cancels=[run]
    )


def _summary(pruned: Pruned) -> str:
    facts = pruned.facts
    name = escape(pruned.name, quote=False)
    lines = [f"### {name} is pruned ({facts['seconds']:.1f} s)"]
    before, after = facts["parameters_before"], facts["nonzero"]
    lines.append(
        f"**{after:,} of {before:,}** parameters are left and not zero ({100 * (1 - after / before):.1f} % gone)."
    )
    if pruned.layers is not None:
        parts = [f"{count:,} {kind}s" for kind, count in pruned.parts.items() if count]
        layers = [f"{was - now} of {was} layers" for now, was in pruned.layers if now < was]
        lines.append(f"Taken out: {', '.join([*parts, *layers]) or 'nothing'}. It is really smaller.")
        lines.append("Smaller matrices are less work: measure under **2 See** how much faster it is here.")
    else:
        lines.append(
            "Zeros alone bring no speed-up: a dense kernel multiplies by zero like by any other number. What they "
            f"bring is a smaller file: {facts['file_bytes_compressed'] / 1e6:.1f} MB compressed, "
            f"{facts['file_bytes_before'] / 1e6:.1f} MB dense."
        )
    lines.append("Go on: **2 See** what is left, **3 Compare** its answers, **5 Publish** it.")
    return "\n\n".join(lines)


def see_tab(studio: Studio) -> list[Any]:
    gr.Markdown("What was removed, and what is left. Prune a model first; its pictures then appear here.")
    with gr.Row():
        with gr.Column(min_width=320):
            sizes = gr.Dataframe(
                headers=["", "dense", "pruned", "smaller"],
                column_widths=["34%", "24%", "24%", "18%"],
                label="Sizes",
                interactive=False,
                wrap=True,
                elem_id="sizes",
            )
            measure = gr.Button("Measure the speed of both", elem_id="measure")
            times = gr.Dataframe(
                headers=["model", "median", "middle half", "speed-up"],
                column_widths=["16%", "18%", "30%", "36%"],
                label="Time of a sentence",
                interactive=False,
                wrap=True,
                elem_id="times",
            )
            words = gr.Markdown(elem_id="speed", container=True)
        with gr.Column(min_width=320):
            weights = gr.Plot(label="Weights before and after", elem_id="weights")
    with gr.Row():
        with gr.Column(min_width=320):
            units = gr.Plot(label="Heads and neurons: blue is left, orange is gone", elem_id="units")
        with gr.Column(min_width=320):
            layers = gr.Plot(label="Gone of each matrix", elem_id="layers")

    @in_words
    def timed(request: gr.Request, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """Time the dense and the pruned model in turns: rows, and what they mean."""
        with place(studio, request):
            result = studio.measure(visitor(request), teller(progress))
        pruned = studio.pruned(visitor(request))
        return [views.latency_rows(result["points"]), _speed(pruned)]

    measure.click(timed, None, [times, words], api_name="measure", **HEAVY)
    return [sizes, weights, units, layers, times, words]


def _pictures(pruned: Pruned) -> list[Any]:
    return [
        views.sizes(pruned.facts),
        views.histogram(*pruned.histograms),
        views.unit_maps(pruned.units),
        views.layers(pruned.gone),
        [],
        _speed(pruned),
    ]


def _speed(pruned: Pruned) -> str:
    """Whether it is faster, and why not."""
    lines = [escape(line, quote=False) for line in pruned.reasons]
    if pruned.latency is None:
        lines.append("Nothing was timed yet: press the button.")
    else:
        timed, point = pruned.latency["latency"], pruned.latency["points"][1]
        lines.append(
            f"{timed['rounds']} rounds in turns, {timed['dtype']}, {timed['device']}, {timed['threads']} thread(s). "
            + (" ".join(pruned.latency["doubts"]) or f"Pruned is {point['verdict']} as fast, with its 95 % interval.")
        )
    return "\n\n".join(lines)
