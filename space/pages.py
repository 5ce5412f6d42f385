"""The pages: five tabs over one :class:`studio.Studio`. Every action has a named endpoint."""

from __future__ import annotations

import base64
import functools
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import tradeoff
import views
from huggingface_hub import get_token
from studio import (
    WHAT,
    Pruned,
    Studio,
    can_repair,
    criteria_for,
    fixed_sparsity,
    make_config,
    removed_parts,
    speed_in_words,
)

from hf_prune import HfPruneError

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
THEME = gr.themes.Soft(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])
CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
EXAMPLES = (
    "A warm, funny and moving film that never talks down to its audience.",
    "The plot is thin, the jokes are old, and two hours feel like four.",
    "It is not without charm, but I would not call it good.",
    "Hardly a masterpiece, yet I could not stop watching.",
)
SPARSITIES = ("30 %", "50 %", "60 %", "70 %", "80 %", "90 %")
MOST_POINTS, SWEEP_SENTENCES = 6, 200
HEAVY = {"concurrency_id": "heavy", "concurrency_limit": 1}
LIGHT = {"concurrency_id": "light", "concurrency_limit": 4}
_log = logging.getLogger("hf_prune.space")


def in_words(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of a handler as sentences for the visitor; what is unexpected goes to the log."""

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except HfPruneError as error:
            message = escape(str(error), quote=False)
        except gr.Error:
            raise
        except Exception:
            _log.exception("in %s", handler.__name__)
            message = "something went wrong here, and was written to the log; what you had is still there"
        raise gr.Error(message[0].upper() + message[1:], duration=15, title="Not done", print_exception=False)

    return handle


def teller(progress: gr.Progress) -> Callable[[str, float], None]:
    """Passes on how far something is, ten times a second at most."""
    last = [0.0, ""]

    def tell(title: str, share: float) -> None:
        now = time.monotonic()
        if title != last[1] or now - last[0] > 0.1:
            last[:] = now, title
            progress(min(share, 1.0), desc=title)

    return tell


def visitor(request: gr.Request) -> str:
    """The key of who asks."""
    return str(request.session_hash)


def build(studio: Studio, results: Mapping[str, Any], *, login: bool) -> gr.Blocks:
    """The app.

    Args:
        studio: What it works with.
        results: What ``make_results.py`` measured.
        login: Whether visitors log in with Hugging Face to publish, as on a Space; else the machine's token is used.
    """
    with gr.Blocks(title="hf_prune: prune, see, compare, publish", analytics_enabled=False, fill_width=False) as demo:
        gr.Markdown(
            "# Prune a model, and see what it costs\n"
            "Take weights, heads, neurons or layers out of a text classifier, look at what is left, and compare its "
            "answers with those of the dense model. Everything shown here is measured, with "
            "[hf_prune](https://pypi.org/project/hf-prune/).",
            elem_id="top",
        )
        with gr.Tabs():
            with gr.Tab("1 Prune", id="prune"):
                choose = _prune_controls(studio)
            with gr.Tab("2 See", id="see"):
                seen = _see(studio)
            with gr.Tab("3 Compare", id="compare"):
                _compare(studio)
            with gr.Tab("4 Trade-off", id="tradeoff"):
                _tradeoff(studio, results)
            with gr.Tab("5 Publish", id="publish"):
                _publish(studio, login)
        _wire_prune(studio, choose, seen)

        def leave(request: gr.Request) -> None:
            studio.forget(visitor(request))

        demo.unload(leave)
    return demo


# --- 1 Prune --------------------------------------------------------------------------------------------------------


def _prune_controls(studio: Studio) -> dict[str, Any]:
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
                _criteria("Heads and neurons"),
                value="fisher",
                label="How it is chosen",
                info="Only what fits to what goes is on offer.",
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


def _criteria(what: str) -> list[tuple[str, str]]:
    return [(f"{name}: {why.partition(':')[0]}", name) for name, why in criteria_for(what).items()]


def _wire_prune(studio: Studio, choose: Mapping[str, Any], seen: Sequence[Any]) -> None:
    what, how, repair, sparsity = (choose[name] for name in ("what", "how", "repair", "sparsity"))

    @in_words
    def choices(what: str, how: str, repair: bool) -> list[Any]:
        """What can be combined with what goes: the criteria, the repair and the sparsity."""
        offered = criteria_for(what) if what in WHAT else {}
        if not offered:
            raise gr.Error(f"what goes is one of {', '.join(WHAT)}", print_exception=False)
        chosen = how if how in offered else ("fisher" if "fisher" in offered else "magnitude")
        fits, fixed = can_repair(what, chosen), fixed_sparsity(what)
        return [
            gr.Dropdown(choices=_criteria(what), value=chosen),
            gr.Checkbox(
                value=repair and fits,
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
        show_progress="hidden",
        **LIGHT,
    )

    @in_words
    def prune(
        model: str,
        what: str,
        how: str,
        repair: bool,
        sparsity: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Prune a copy of a model; what is shown of it, and the numbers."""
        config = make_config(what, how, repair, float(sparsity))
        pruned = studio.prune(visitor(request), (model or "").strip(), config, teller(progress))
        return [_summary(pruned), pruned.facts(), *_pictures(pruned)]

    run = choose["start"].click(
        prune,
        [choose["model"], what, how, repair, sparsity],
        [choose["said"], choose["facts"], *seen],
        api_name="prune",
        show_progress_on=choose["said"],
        **HEAVY,
    )

    def cancel(request: gr.Request) -> str:
        """Stop what is running; what was there before stays."""
        return "Cancelling: what you had stays." if studio.cancel(visitor(request)) else "Nothing of yours is running."

    choose["cancel"].click(cancel, None, choose["said"], api_name="cancel", queue=False, show_progress="hidden")
    assert run is not None


def _summary(pruned: Pruned) -> str:
    facts, gone = pruned.facts(), removed_parts(pruned.units)
    name = escape(pruned.dense.name, quote=False)
    lines = [f"### {name} is pruned ({pruned.seconds:.1f} s)"]
    before, after = facts["parameters_before"], facts["nonzero"]
    lines.append(
        f"**{after:,} of {before:,}** parameters are left and not zero ({100 * (1 - after / before):.1f} % gone)."
    )
    if pruned.structure is not None:
        parts = [f"{count:,} {kind}s" for kind, count in gone.items() if count]
        layers = [f"{was - now} of {was} layers" for now, was in pruned.structure.layers.values() if now < was]
        lines.append(f"Taken out: {', '.join([*parts, *layers]) or 'nothing'}. It is really smaller.")
        lines.append("Smaller matrices are less work: measure under **2 See** how much faster it is here.")
    else:
        lines.append(
            "Zeros alone bring no speed-up: a dense kernel multiplies by zero like by any other number. What they "
            f"bring is a smaller file: {pruned.file_bytes / 1e6:.1f} MB compressed, "
            f"{pruned.dense.file_bytes / 1e6:.1f} MB dense."
        )
    lines.append("Go on: **2 See** what is left, **3 Compare** its answers, **5 Publish** it.")
    return "\n\n".join(lines)


# --- 2 See ----------------------------------------------------------------------------------------------------------


def _see(studio: Studio) -> list[Any]:
    gr.Markdown("What was removed, and what is left. Prune a model first; its pictures then appear here.")
    with gr.Row():
        with gr.Column(min_width=320):
            sizes = gr.Dataframe(
                headers=["", "dense", "pruned", "smaller"], label="Sizes", interactive=False, wrap=True, elem_id="sizes"
            )
            measure = gr.Button("Measure the speed of both", elem_id="measure")
            times = gr.Dataframe(
                headers=["model", "median", "middle half", "95th percentile", "speed-up"],
                label="Time of a sentence of 64 tokens",
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
            layers = gr.Plot(label="Sparsity of each matrix", elem_id="layers")

    @in_words
    def timed(request: gr.Request, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """Time the dense and the pruned model in turns: rows, and what they mean."""
        result = studio.measure(visitor(request), teller(progress))
        pruned = studio.pruned(visitor(request))
        return [views.latency_rows(result), _speed(pruned)]

    measure.click(timed, None, [times, words], api_name="measure", **HEAVY)
    return [sizes, weights, units, layers, times, words]


def _pictures(pruned: Pruned) -> list[Any]:
    return [
        views.sizes(pruned.facts()),
        views.histogram(*pruned.histograms),
        views.unit_maps(pruned.units),
        views.layers(pruned.report),
        [],
        _speed(pruned),
    ]


def _speed(pruned: Pruned) -> str:
    """The explanation without its tables, which are shown as such."""
    text = (
        speed_in_words(pruned)
        .partition("\nMeasured:")[0]
        .replace("\nNothing was timed: name the dense model to compare with.", "")
    )
    lines = [escape(line.strip(), quote=False) for line in text.splitlines()[1:]]
    result = pruned.latency
    if result is None:
        lines.append("Nothing was timed yet: press the button.")
    else:
        lines.append(
            f"{result.rounds} rounds in turns, {result.dtype}, {result.device}, {result.threads} thread(s). "
            + (" ".join(result.doubts()) or f"Pruned is {result.points[1].verdict} as fast, with its 95 % interval.")
        )
    return "\n\n".join(lines)


# --- 3 Compare ------------------------------------------------------------------------------------------------------


def _compare(studio: Studio) -> None:
    gr.Markdown("Ask both models. Prune one first.")
    text = gr.Textbox(
        label="A sentence", value=EXAMPLES[0], max_length=studio.limits.characters, lines=2, elem_id="sentence"
    )
    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
    answer = gr.HTML(elem_id="answer", label="Answers")
    gr.Examples([[each] for each in EXAMPLES], [text], label="Examples", elem_id="examples")

    @in_words
    def both(text: str, request: gr.Request) -> str:
        """The probabilities that both models give to a sentence, as HTML."""
        pruned, dense, after = studio.probabilities(visitor(request), [text or ""])
        return views.side_by_side((text or "").strip(), pruned.dense.labels, dense[0].tolist(), after[0].tolist())

    gr.on([ask.click, text.submit], both, text, answer, api_name="compare", **LIGHT)

    gr.Markdown("### Where do they disagree?")
    with gr.Row():
        with gr.Column(min_width=300):
            many = gr.Textbox(
                label=f"Sentences, one a line, {studio.limits.sentences} at most",
                value="\n".join(studio.sentences),
                lines=8,
                max_lines=12,
                elem_id="many",
            )
            with gr.Row():
                find = gr.Button("Find disagreements", elem_id="find")
                score = gr.Button("Score both on held-out sentences", elem_id="score")
        with gr.Column(min_width=300):
            said = gr.Markdown(elem_id="disagreed", container=True)
            rows = gr.Dataframe(
                headers=["sentence", "dense says", "pruned says"],
                label="Sentences on which they disagree",
                interactive=False,
                wrap=True,
                elem_id="rows",
            )

    @in_words
    def disagreements(many: str, request: gr.Request) -> list[Any]:
        """How often both models agree, and the sentences on which they do not."""
        texts = [line.strip() for line in (many or "").splitlines() if line.strip()]
        pruned, dense, after = studio.probabilities(visitor(request), texts)
        labels = pruned.dense.labels
        differ = [i for i in range(len(texts)) if int(dense[i].argmax()) != int(after[i].argmax())]
        table = [
            [texts[i], *(f"{labels[int(p[i].argmax())]} ({100 * float(p[i].max()):.0f} %)" for p in (dense, after))]
            for i in differ
        ]
        return [f"They disagree on **{len(differ)} of {len(texts)}** sentences.", table]

    find.click(disagreements, many, [said, rows], api_name="disagreements", **LIGHT)

    @in_words
    def scored(request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        """The accuracy of both on the same held-out sentences, with the interval of the drop."""
        found = studio.score(visitor(request), teller(progress))
        c, n = found["comparison"], found["dense"]["n"]
        return (
            f"On {n} held-out sentences: dense **{100 * c['dense_accuracy']:.1f} %**, pruned "
            f"**{100 * c['pruned_accuracy']:.1f} %**. Drop {c['drop']:.1f} points, 95 % interval "
            f"{c['interval'][0]:.1f} to {c['interval'][1]:.1f}, p = {c['p_value']:.2g} (paired, McNemar)."
        )

    score.click(scored, None, said, api_name="score", **HEAVY)


# --- 4 Trade-off ----------------------------------------------------------------------------------------------------


def _tradeoff(studio: Studio, results: Mapping[str, Any]) -> None:
    methods = list(dict.fromkeys(p["method"] for p in results["points"]))
    gr.Markdown(
        f"Accuracy of the demo's model against what was removed, measured before: {results['note']} "
        f"Or measure a few points here."
    )
    state = gr.State({"dense": results["dense"], "points": results["points"]})
    with gr.Row():
        axis = gr.Radio(
            [("Sparsity", "sparsity"), ("File size", "size"), ("Time", "time")],
            value="sparsity",
            label="Against",
            elem_id="axis",
        )
        tolerance = gr.Slider(
            0.5, 5, value=2, step=0.5, label="Accepted drop, points", info="With 95 % confidence.", elem_id="tolerance"
        )
    shown = gr.Dropdown(methods, value=methods, multiselect=True, label="Methods", elem_id="shown")
    spot = gr.Markdown(elem_id="spot", container=True)
    chart = gr.Plot(label="Trade-off", elem_id="chart")
    table = gr.Dataframe(
        headers=["method", "sparsity", "accuracy", "drop ± s.e.", "file", "speed"],
        label="All points",
        interactive=False,
        wrap=True,
        elem_id="points",
    )
    file = gr.DownloadButton("Download the table (CSV)", elem_id="csv")
    gr.Markdown(
        f"### Measure it here\nAt most {MOST_POINTS} points, {SWEEP_SENTENCES} sentences each; takes a minute or more."
    )
    with gr.Row():
        which = gr.Dropdown(methods, value=methods[:2], multiselect=True, label="Methods to measure", elem_id="which")
        how_much = gr.CheckboxGroup(SPARSITIES, value=["50 %", "80 %"], label="Sparsities", elem_id="how-much")
    with gr.Row():
        go = gr.Button("Measure", variant="primary", elem_id="sweep")
        stop = gr.Button("Cancel", variant="stop")
        again = gr.Button("Show the earlier results", elem_id="earlier")

    @in_words
    def draw(data: Mapping[str, Any], axis: str, tolerance: float, shown: Sequence[str]) -> list[Any]:
        """The chart, the sweet spot, the table, and the file of the points."""
        if axis not in ("sparsity", "size", "time"):
            raise gr.Error("the axis is sparsity, size or time", print_exception=False)
        points = [p for p in data["points"] if p["method"] in (shown or [])]
        best = tradeoff.sweet_spot(points, axis, float(tolerance))
        words = (
            f"No point has a drop of at most {tolerance:g} points with 95 % confidence."
            if best is None
            else f"**Sweet spot:** {best['method']} at {100 * best['sparsity']:.0f} %: drop {best['drop']:.1f} points, "
            f"with 95 % confidence at most {best['drop_bound']:.1f}; {best['file_bytes'] / 1e6:.1f} MB, "
            f"{views.speed(best)}."
        )
        with tempfile.NamedTemporaryFile("w", suffix=".csv", prefix="tradeoff-", delete=False, encoding="utf-8") as out:
            out.write(tradeoff.to_csv(points))
        return [words, views.tradeoff(points, axis, data["dense"], best), views.tradeoff_rows(points), out.name]

    outputs = [spot, chart, table, file]
    settings = [state, axis, tolerance, shown]
    # Without triggers: when the page opens, and when a setting or the points change.
    gr.on(None, draw, settings, outputs, api_name="tradeoff", trigger_mode="always_last", **LIGHT)

    @in_words
    def sweep(
        which: Sequence[str],
        how_much: Sequence[str],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Measure points of the demo's model here."""
        unknown = [m for m in which or [] if m not in methods] + [s for s in how_much or [] if s not in SPARSITIES]
        if unknown:
            raise gr.Error(escape(f"{unknown[0]!r} is not on offer"), print_exception=False)
        count = len(which or []) * len(how_much or [])
        if not 0 < count <= MOST_POINTS:
            raise gr.Error(f"these are {count} points: choose 1 to {MOST_POINTS}", print_exception=False)
        tell = teller(progress)
        with studio.job(visitor(request), tell):
            dense = studio.load(studio.names[0])
            chosen = [tradeoff.parse_method(name) for name in which]
            shares = [int(s.split()[0]) / 100 for s in how_much]
            points = list(tradeoff.measure(studio, dense, chosen, shares, SWEEP_SENTENCES, tell))
        accuracy = points[0]["accuracy"] + points[0]["drop"]
        found = {"dense": {"accuracy": accuracy, "file_bytes": dense.file_bytes}, "points": points}
        return [found, gr.Dropdown(choices=list(which), value=list(which))]

    go.click(sweep, [which, how_much], [state, shown], api_name="sweep", show_progress_on=spot, **HEAVY)

    def stopped(request: gr.Request) -> str:
        return "Cancelling." if studio.cancel(visitor(request)) else "Nothing of yours is running."

    stop.click(stopped, None, spot, queue=False, api_visibility="private")

    def earlier() -> list[Any]:
        """Back to what was measured before."""
        return [
            {"dense": results["dense"], "points": results["points"]},
            gr.Dropdown(choices=methods, value=methods),
        ]

    again.click(earlier, None, [state, shown], api_name="earlier", **LIGHT)


# --- 5 Publish ------------------------------------------------------------------------------------------------------


def _publish(studio: Studio, login: bool) -> None:
    gr.Markdown(
        "The card says what was counted and measured here, and leaves out the rest: measure the speed and the "
        "accuracy first if they shall be in it. The checkpoint is compressed; plain `from_pretrained` loads it after "
        "`import hf_prune`."
    )
    name = gr.Textbox(
        "my-pruned-model",
        label="Name of the repository",
        info="In your account, or owner/name.",
        max_length=193,
        elem_id="repo",
    )
    with gr.Row():
        preview = gr.Button("Preview the card", variant="primary", elem_id="preview")
        pack = gr.Button("Make the checkpoint", elem_id="pack")
        file = gr.DownloadButton("Download", interactive=False, elem_id="download")
    with gr.Group():
        private = gr.Checkbox(True, label="Private repository", elem_id="private")
        if login:
            gr.LoginButton(elem_id="login")
        else:
            gr.Markdown("A push uses the token that this machine is logged in with (`hf auth login`, or `HF_TOKEN`).")
        push = gr.Button("Push to the Hub", elem_id="push")
    said = gr.Markdown(elem_id="pushed", container=True)
    card = gr.Markdown(elem_id="card", container=True, label="The card")

    @in_words
    def make_card(name: str, request: gr.Request) -> str:
        """The model card, as Markdown."""
        return _preview(studio.card(visitor(request), (name or "").strip()), studio.pruned(visitor(request)).folder)

    preview.click(make_card, name, card, api_name="card", **LIGHT)

    @in_words
    def archive(name: str, request: gr.Request) -> Any:
        """The checkpoint with its card, as a zip file."""
        return gr.DownloadButton(value=str(studio.archive(visitor(request), (name or "").strip())), interactive=True)

    pack.click(archive, name, file, api_name="archive", **LIGHT)

    def upload(name: str, private: bool, token: str | None, request: gr.Request) -> str:
        if token is None:
            raise gr.Error("log in with Hugging Face first", title="Not pushed", print_exception=False)
        result = studio.push(visitor(request), (name or "").strip(), token, bool(private))
        total = sum(result.files.values()) / 1e6
        return f"Pushed {len(result.files)} files, {total:.1f} MB, to [{result.repo_id}]({result.url})."

    if login:

        @in_words
        def push_with_login(name: str, private: bool, request: gr.Request, token: gr.OAuthToken | None) -> str:
            """Upload it to the account that is logged in."""
            return upload(name, private, None if token is None else token.token, request)

        push.click(push_with_login, [name, private], said, api_name="push", **LIGHT)
    else:

        @in_words
        def push_from_here(name: str, private: bool, request: gr.Request) -> str:
            """Upload it to the account that this machine is logged in with."""
            return upload(name, private, get_token(), request)

        push.click(push_from_here, [name, private], said, api_name="push", **LIGHT)


def _preview(card: str, folder: Path) -> str:
    """The card without its metadata, with its pictures in it."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)

    def embed(match: re.Match[str]) -> str:
        path = folder / match[2]
        data = base64.b64encode(path.read_bytes()).decode()
        return f"![{match[1]}](data:image/png;base64,{data})"

    return re.sub(r"!\[([^\]]*)\]\((layers\.png|weights\.png)\)", embed, text)
