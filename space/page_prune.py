"""The first two tabs: prune, and see what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
import views
from choices import WHAT, can_repair, criteria_for, fixed_sparsity, make_config
from components import HEAVY, QUICK, cancel_handler, explain_errors, show_progress, take_turn, visitor
from sessions import Session, Sessions


def prune_tab(sessions: Sessions) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(min_width=300):
            inputs["model"] = gr.Dropdown(
                sessions.names,
                value=sessions.names[0],
                label="Model",
                info="One of the list, or the Hub id (owner/name) of a text classifier with safetensors.",
                allow_custom_value=True,
                elem_id="model",
            )
            inputs["what"] = gr.Radio(
                list(WHAT),
                value="Heads and neurons",
                label="What is removed",
                info="Zeros make a file smaller; only whole heads, neurons and layers make a model faster.",
                elem_id="what",
            )
        with gr.Column(min_width=300):
            inputs["how"] = gr.Dropdown(
                list(criteria_for("Heads and neurons")),
                value="fisher",
                label="How it is chosen",
                info=_reason("Heads and neurons", "fisher"),
                elem_id="how",
            )
            inputs["repair"] = gr.Checkbox(
                value=True,
                label="Repair the rest (least squares)",
                info="Adjusts the remaining weights so that each layer's outputs change least.",
                elem_id="repair",
            )
            inputs["sparsity"] = gr.Slider(
                0.05,
                0.95,
                value=0.5,
                step=0.05,
                label="Sparsity",
                info="The share of these that is removed.",
                elem_id="sparsity",
            )
            with gr.Row():
                inputs["start"] = gr.Button("Prune", variant="primary", elem_id="start")
                inputs["cancel"] = gr.Button("Cancel", variant="stop", elem_id="cancel")
    inputs["said"] = gr.Markdown("Nothing is pruned yet.", elem_id="said", container=True)
    with gr.Accordion("The numbers as JSON", open=False):
        inputs["facts"] = gr.JSON(label="Numbers", elem_id="facts")
    return inputs


def _reason(what: str, how: str) -> str:
    return f"{criteria_for(what)[how]}. Only criteria that can choose these are listed."


def wire(sessions: Sessions, choose: Mapping[str, Any], seen: Sequence[Any]) -> None:
    what, how, repair, sparsity = (choose[name] for name in ("what", "how", "repair", "sparsity"))

    @explain_errors
    def choices(what: Any, how: Any, repair: Any) -> list[Any]:
        """What can be combined with what is removed: the criteria, the repair and the sparsity."""
        offered = criteria_for(what) if what in list(WHAT) else {}
        if not offered:
            raise gr.Error(f"what is removed is one of {', '.join(WHAT)}", print_exception=False)
        chosen = how if how in list(offered) else ("fisher" if "fisher" in offered else "magnitude")
        fits, fixed = can_repair(what, chosen), fixed_sparsity(what)
        return [
            gr.Dropdown(choices=list(offered), value=chosen, info=_reason(what, chosen)),
            gr.Checkbox(
                value=repair is True and fits,
                interactive=fits,
                info="Adjusts the remaining weights so that each layer's outputs change least."
                if fits
                else "Nothing to repair here: the other layers are whole.",
            ),
            gr.Slider(interactive=True, info="The share of these that is removed.")
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

    @explain_errors
    def prune(
        model: Any,
        what: Any,
        how: Any,
        repair: Any,
        sparsity: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Prune a copy of a model; returns a summary, the numbers, and pictures."""
        config = make_config(what, how, repair is True, sparsity)
        with take_turn(sessions, request):
            session = sessions.prune(visitor(request), str(model or "").strip(), config, show_progress(progress))
        return [_summary(session), dict(session.facts), *_pictures(session)]

    run = choose["start"].click(
        prune,
        [choose["model"], what, how, repair, sparsity],
        [choose["said"], choose["facts"], *seen],
        api_name="prune",
        preprocess=False,  # gradio would refuse what the page did not offer last; make_config checks what fits together
        show_progress_on=choose["said"],
        **HEAVY,
    )

    choose["cancel"].click(
        cancel_handler(sessions),
        None,
        choose["said"],
        api_name="cancel",
        queue=False,
        show_progress="hidden",
        cancels=[run],
    )


def _summary(session: Session) -> str:
    facts = session.facts
    name = escape(session.name, quote=False)
    lines = [f"### {name} is pruned ({facts['seconds']:.1f} s)"]
    before, after = facts["parameters_before"], facts["nonzero"]
    lines.append(
        f"**{after:,} of {before:,}** parameters are left and not zero ({100 * (1 - after / before):.1f} % gone)."
    )
    if session.layers is not None:
        units = [f"{count:,} {kind}s" for kind, count in session.removed_units.items() if count]
        layers = [f"{before - now} of {before} layers" for now, before in session.layers if now < before]
        lines.append(f"Removed: {', '.join([*units, *layers]) or 'nothing'}. It is really smaller.")
        lines.append("Smaller matrices are less work: measure under **2 See** how much faster it is here.")
    else:
        lines.append(
            "Zeros alone bring no speed-up: a dense kernel multiplies by zero like by any other number. What they "
            f"bring is a smaller file: {facts['file_bytes_compressed'] / 1e6:.1f} MB compressed, "
            f"{facts['file_bytes_before'] / 1e6:.1f} MB dense."
        )
    lines.append("Go on: **2 See** what is left, **3 Compare** its answers, **5 Publish** it.")
    return "\n\n".join(lines)


def see_tab(sessions: Sessions) -> list[Any]:
    gr.Markdown("What was removed, and what remains. Prune a model first; its pictures then appear here.")
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
            units = gr.Plot(label="Heads and neurons: blue remains, orange was removed", elem_id="units")
        with gr.Column(min_width=320):
            layers = gr.Plot(label="Removed share of each matrix", elem_id="layers")

    @explain_errors
    def timed(request: gr.Request, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """Time the dense and the pruned model in turns: rows, and what they mean."""
        with take_turn(sessions, request):
            result = sessions.measure(visitor(request), show_progress(progress))
        session = sessions.of(visitor(request))
        return [views.latency_rows(result["points"]), _speed(session)]

    measure.click(timed, None, [times, words], api_name="measure", **HEAVY)
    return [sizes, weights, units, layers, times, words]


def _pictures(session: Session) -> list[Any]:
    return [
        views.sizes(session.facts),
        views.histogram(*session.histograms),
        views.unit_maps(session.units),
        views.layers(session.removed_shares),
        [],
        _speed(session),
    ]


def _speed(session: Session) -> str:
    """Whether it is faster, and why or why not."""
    lines = [escape(line, quote=False) for line in session.reasons]
    if session.latency is None:
        lines.append("Nothing was timed yet: press the button.")
    else:
        timed, point = session.latency["latency"], session.latency["points"][1]
        lines.append(
            f"{timed['rounds']} rounds in turns, {timed['dtype']}, {timed['device']}, {timed['threads']} thread(s). "
            + (" ".join(session.latency["doubts"]) or f"Pruned is {point['verdict']} as fast, with its 95 % interval.")
        )
    return "\n\n".join(lines)
