"""The third tab: the answers of both models."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
import panel
import views
from components import LIGHT, explain_errors, visitor
from sessions import Sessions

EXAMPLES = (
    "A warm, funny and moving film that never talks down to its audience.",
    "The plot is thin, the jokes are old, and two hours feel like four.",
    "It is not without charm, but I would not call it good.",
    "Hardly a masterpiece, yet I could not stop watching.",
)
NO_ANSWER = "<p class='none-yet'>Both answers stand here, side by side. Prune a model first.</p>"


def compare_tab(sessions: Sessions) -> None:
    gr.Markdown("Ask the dense and the pruned model the same question.")
    text = gr.Textbox(
        label="A sentence", value=EXAMPLES[0], max_length=sessions.limits.characters, lines=2, elem_id="sentence"
    )
    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
    answer = gr.HTML(NO_ANSWER, elem_id="answer", label="Answers", apply_default_css=False)
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
            find = gr.Button("Find disagreements", elem_id="find")
        with gr.Column(min_width=300):
            rows = gr.HTML(
                "<p class='none-yet'>Sentences that both do not agree on stand here.</p>",
                elem_id="rows",
                apply_default_css=False,
            )

    @explain_errors
    def disagreements(many: str, request: gr.Request) -> str:
        """How often both models agree, and the sentences on which they do not, as HTML."""
        texts = [line.strip() for line in (many or "").splitlines() if line.strip()]
        session, dense, pruned = sessions.probabilities(visitor(request), texts)
        differ = [i for i in range(len(texts)) if _best(dense[i]) != _best(pruned[i])]
        table = [
            [texts[i], *(f"{session.labels[_best(p[i])]} ({100 * max(p[i]):.0f} %)" for p in (dense, pruned))]
            for i in differ
        ]
        said = f"<p>They disagree on <strong>{len(differ)} of {len(texts)}</strong> sentences.</p>"
        return said + panel.table(["sentence", "dense", "pruned"], table, empty="They agree on all of them.")

    find.click(disagreements, many, rows, api_name="disagreements", **LIGHT)


def _best(probabilities: Sequence[float]) -> int:
    return max(range(len(probabilities)), key=probabilities.__getitem__)
