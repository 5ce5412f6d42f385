"""The third tab: the answers of both models."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
import views
from components import HEAVY, LIGHT, explain_errors, show_progress, take_turn, visitor
from sessions import Sessions

EXAMPLES = (
    "A warm, funny and moving film that never talks down to its audience.",
    "The plot is thin, the jokes are old, and two hours feel like four.",
    "It is not without charm, but I would not call it good.",
    "Hardly a masterpiece, yet I could not stop watching.",
)


def compare_tab(sessions: Sessions) -> None:
    gr.Markdown("Ask both models. Prune one first.")
    text = gr.Textbox(
        label="A sentence", value=EXAMPLES[0], max_length=sessions.limits.characters, lines=2, elem_id="sentence"
    )
    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
    answer = gr.HTML(elem_id="answer", label="Answers")
    gr.Examples([[example] for example in EXAMPLES], [text], label="Examples", elem_id="examples")

    @explain_errors
    def both(text: str, request: gr.Request) -> str:
        """The probabilities that both models give to a sentence, as HTML."""
        session, dense, pruned = sessions.probabilities(visitor(request), [text or ""])
        return views.side_by_side((text or "").strip(), session.labels, dense[0], pruned[0])

    gr.on([ask.click, text.submit], both, text, answer, api_name="compare", **LIGHT)

    gr.Markdown("### Where do they disagree?")
    with gr.Row():
        with gr.Column(min_width=300):
            many = gr.Textbox(
                label=f"Sentences, one a line, {sessions.limits.sentences} at most",
                value="\n".join(sessions.sentences),
                lines=8,
                max_lines=12,
                elem_id="many",
            )
            with gr.Row():
                find = gr.Button("Find disagreements", elem_id="find")
                score = gr.Button("Score both on held-out sentences", elem_id="score")
        with gr.Column(min_width=300):
            summary = gr.Markdown(elem_id="disagreed", container=True)
            rows = gr.Dataframe(
                headers=["sentence", "dense says", "pruned says"],
                label="Sentences on which they disagree",
                interactive=False,
                wrap=True,
                elem_id="rows",
            )

    @explain_errors
    def disagreements(many: str, request: gr.Request) -> list[Any]:
        """How often both models agree, and the sentences on which they do not."""
        texts = [line.strip() for line in (many or "").splitlines() if line.strip()]
        session, dense, pruned = sessions.probabilities(visitor(request), texts)
        differ = [i for i in range(len(texts)) if _best(dense[i]) != _best(pruned[i])]
        table = [
            [texts[i], *(f"{session.labels[_best(p[i])]} ({100 * max(p[i]):.0f} %)" for p in (dense, pruned))]
            for i in differ
        ]
        return [f"They disagree on **{len(differ)} of {len(texts)}** sentences.", table]

    find.click(disagreements, many, [summary, rows], api_name="disagreements", **LIGHT)

    @explain_errors
    def scored(request: gr.Request, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        """The accuracy of both on the same held-out sentences, with the interval of the drop."""
        with take_turn(sessions, request):
            scores = sessions.score(visitor(request), show_progress(progress))
        c, n = scores["comparison"], scores["dense"]["n"]
        doubt = f"**Warning:** {escape(c['doubt'])}.\n\n" if c["doubt"] else ""
        return (
            f"{doubt}On {n} held-out sentences: dense **{100 * c['dense_accuracy']:.1f} %**, pruned "
            f"**{100 * c['pruned_accuracy']:.1f} %**. Drop {c['drop']:.1f} points, 95 % interval "
            f"{c['interval'][0]:.1f} to {c['interval'][1]:.1f}, p = {c['p_value']:.2g} (paired, McNemar)."
        )

    score.click(scored, None, summary, api_name="score", **HEAVY)


def _best(probabilities: Sequence[float]) -> int:
    return max(range(len(probabilities)), key=probabilities.__getitem__)
