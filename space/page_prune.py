"""The first tab: say what you want, prune, and look at three numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import gradio as gr
import panel
from choices import GOALS, WHAT, can_repair, criteria_for, fixed_sparsity, make_config, presets_for, reason_for
from components import HEAVY, QUICK, cancel_handler, explain_errors, show_progress, take_turn, visitor
from page_see import pictures
from session import Session
from sessions import Sessions

from hf_prune import PRESETS

GOAL, PRESET = "A faster model", "balanced"
REPAIR = "Adjusts the remaining weights so that each layer's outputs change least."
SHARE = "The share that is removed."


def prune_tab(sessions: Sessions) -> dict[str, Any]:
    what = GOALS[GOAL]
    parts: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(min_width=300, scale=5):
            parts["model"] = gr.Dropdown(
                sessions.names,
                value=sessions.names[0],
                label="Model",
                info="One of the list, or the Hub id (owner/name) of a text classifier with safetensors.",
                allow_custom_value=True,
                elem_id="model",
            )
            parts["goal"] = gr.Radio(
                list(GOALS),
                value=GOAL,
                label="What you want",
                info="Faster: whole heads and neurons go. Smaller: single weights become zeros.",
                elem_id="goal",
            )
            parts["preset"] = gr.Radio(
                presets_for(what), value=PRESET, label="Method", info=reason_for(what, PRESET), elem_id="preset"
            )
            parts["sparsity"] = gr.Slider(
                0.05, 0.95, value=0.5, step=0.05, label="How much goes", info=SHARE, elem_id="sparsity"
            )
            with gr.Accordion("More: other units and methods", open=False, elem_id="more"):
                parts["what"] = gr.Radio(list(WHAT), value=what, label="What is removed", elem_id="what")
                parts["how"] = gr.Dropdown(
                    list(criteria_for(what)),
                    value=PRESET,
                    label="How it is chosen",
                    info="A preset, or a criterion. Only those that can choose these are listed.",
                    elem_id="how",
                )
                parts["repair"] = gr.Checkbox(
                    value=False,
                    interactive=False,
                    label="Repair the rest (least squares)",
                    info="The preset decides.",
                    elem_id="repair",
                )
            with gr.Row():
                parts["start"] = gr.Button("Prune", variant="primary", scale=3, elem_id="start")
                parts["cancel"] = gr.Button("Cancel", scale=1, min_width=90, elem_id="cancel")
        with gr.Column(min_width=300, scale=7):
            parts["numbers"] = gr.HTML(panel.numbers(None), elem_id="numbers", apply_default_css=False)
            parts["said"] = gr.Markdown(panel.EMPTY, elem_id="said", container=True)
            with gr.Accordion("The numbers as JSON", open=False):
                parts["facts"] = gr.JSON(label="Numbers", elem_id="facts")
    _wire_choices(parts)
    return parts


def _wire_choices(parts: Mapping[str, Any]) -> None:
    """What is chosen at one place shows at the others."""

    @explain_errors
    def choices(what: Any, how: Any, repair: Any) -> list[Any]:
        """What can be combined with what is removed: presets, criteria, the repair and the sparsity."""
        offered = criteria_for(what) if what in list(WHAT) else {}
        if not offered:
            raise gr.Error(f"what is removed is one of {', '.join(WHAT)}", print_exception=False)
        chosen = how if how in list(offered) else PRESET
        fits, fixed, presets = can_repair(what, chosen), fixed_sparsity(what), presets_for(what)
        return [
            gr.Radio(value=next((goal for goal, removed in GOALS.items() if removed == what), None)),
            gr.Radio(choices=presets, value=chosen if chosen in presets else None, info=reason_for(what, chosen)),
            gr.Radio(value=what),
            gr.Dropdown(choices=list(offered), value=chosen),
            gr.Checkbox(
                value=repair is True and fits,
                interactive=fits,
                info=REPAIR
                if fits
                else "The preset decides."
                if chosen in PRESETS
                else "Nothing to repair here: the other layers are whole.",
            ),
            gr.Slider(interactive=True, info=SHARE)
            if fixed is None
            else gr.Slider(value=fixed, interactive=False, info="Follows from 2:4."),
        ]

    def by_goal(goal: Any, how: Any, repair: Any) -> list[Any]:
        return choices(GOALS.get(str(goal)), how, repair)

    names = ("goal", "preset", "what", "how", "repair", "sparsity")
    goal, preset, what, how, repair, _ = outputs = [parts[name] for name in names]
    # Without preprocessing: gradio would refuse what the page did not offer last.
    quick = {"preprocess": False, "show_progress": "hidden", **QUICK}
    gr.on([what.input, how.input], choices, [what, how, repair], outputs, api_name="choices", **quick)
    preset.input(choices, [what, preset, repair], outputs, api_visibility="private", **quick)
    goal.input(by_goal, [goal, how, repair], outputs, api_visibility="private", **quick)


def wire(
    sessions: Sessions, parts: Mapping[str, Any], seen: Sequence[Any], measured: Sequence[Any], again: Any
) -> None:
    """Prune, and then measure at once.

    Args:
        sessions: The visitors' models.
        parts: Of the first tab.
        seen: What the second tab shows of a pruned model.
        measured: What it shows of the measurements.
        again: Its button that measures.
    """
    results = [parts["said"], parts["facts"], parts["numbers"]]
    settings = [parts[name] for name in ("model", "what", "how", "repair", "sparsity")]

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
        numbers, measured = _shown(session)
        return [*numbers, *pictures(session), *measured]

    @explain_errors
    def measure(request: gr.Request, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """Measure the dense and the pruned model side by side: how right they are, and how fast."""
        with take_turn(sessions, request):
            session = sessions.measure(visitor(request), show_progress(progress))
        return list(chain(*_shown(session)))

    run = parts["start"].click(
        prune,
        settings,
        [*results, *seen, *measured],
        api_name="prune",
        preprocess=False,  # make_config checks what fits together
        show_progress_on=parts["numbers"],
        scroll_to_output=True,
        **HEAVY,
    )
    outputs = [*results, *measured]
    at_once = run.success(
        measure,
        None,
        outputs,
        api_name="measure_at_once",
        api_visibility="private",
        show_progress_on=parts["numbers"],
        **HEAVY,
    )
    on_demand = again.click(measure, None, outputs, api_name="measure", show_progress_on=measured[0], **HEAVY)

    def not_done(request: gr.Request) -> list[Any]:
        who = visitor(request)
        if not sessions.has(who):
            return [f"**Not done**: the message says why. {panel.EMPTY}", *[gr.skip()] * (len(outputs) - 1)]
        said, *others = chain(*_shown(sessions.of(who)))
        return [f"**Not done**: the message says why. What you had is still here.\n\n{said}", *others]

    for event in (run, at_once, on_demand):
        event.failure(not_done, None, outputs, api_visibility="private", show_progress="hidden", **QUICK)

    parts["cancel"].click(
        cancel_handler(sessions),
        None,
        parts["said"],
        api_name="cancel",
        queue=False,
        show_progress="hidden",
        cancels=[run, at_once, on_demand],
    )


def _shown(session: Session) -> tuple[list[Any], list[Any]]:
    """What the first tab says of a model, and what the second one says of its measurements."""
    return (
        [panel.summary(session), session.numbers(), panel.numbers(session)],
        [panel.times(session.measured), panel.speed_words(session)],
    )
