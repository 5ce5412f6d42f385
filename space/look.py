"""How the Space looks: a theme in the colours of the package's pictures, on light and dark pages."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from views import BLUE, DENSE, GREEN, ORANGE

_SHADES = (0.94, 0.86, 0.7, 0.5, 0.25, 0.0, -0.1, -0.25, -0.4, -0.55, -0.7)  # of a hue, 50 to 950


def _shade(colour: str, light: float) -> str:
    """A colour mixed with white, or for negative shares with black."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [p + (255 - p) * light if light > 0 else p * (1 + light) for p in parts]
    return "#" + "".join(f"{round(p):02x}" for p in mixed)


def _hue(name: str, colour: str) -> gr.themes.Color:
    return gr.themes.Color(*(_shade(colour, light) for light in _SHADES), name=name)


THEME = gr.themes.Base(
    primary_hue=_hue("hf_prune-blue", BLUE),
    secondary_hue=_hue("hf_prune-green", GREEN),
    neutral_hue=gr.themes.colors.slate,
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    radius_size=gr.themes.sizes.radius_md,
).set(
    block_label_text_weight="600",
    block_title_text_weight="600",
    block_border_width="1px",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    link_text_color="*primary_600",
    link_text_color_dark="*primary_300",
    link_text_color_hover="*primary_700",
    link_text_color_hover_dark="*primary_200",
    checkbox_label_background_fill_selected="*primary_100",
    checkbox_label_background_fill_selected_dark="*primary_900",
    checkbox_label_border_color_selected="*primary_500",
    checkbox_label_border_width="1px",
    button_primary_background_fill="*primary_500",
    button_primary_background_fill_hover="*primary_600",
    button_primary_text_color="white",
    button_primary_background_fill_dark="*primary_500",
    button_primary_background_fill_hover_dark="*primary_400",
    button_primary_text_color_dark="white",
)

_COLOURS = f":root {{ --dense: {DENSE}; --pruned: {BLUE}; --gone: {ORANGE}; --gain: {GREEN}; }}\n"
CSS = _COLOURS + (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

#: The mark at the top: a weight matrix of which some cells are gone.
MARK = (
    "<svg class='mark' viewBox='0 0 44 44' role='img' aria-label='hf_prune'>"
    + "".join(
        f"<rect x='{2 + 14 * (i % 3)}' y='{2 + 14 * (i // 3)}' width='12' height='12' rx='2.5' class='{kind}'/>"
        for i, kind in enumerate("kept gone kept kept kept gone gone kept kept".split())
    )
    + "</svg>"
)
