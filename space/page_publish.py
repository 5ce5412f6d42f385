"""The fifth tab: the card, the checkpoint, the push."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import gradio as gr
from components import LIGHT, explain_errors, visitor
from huggingface_hub import get_token
from sessions import Sessions


def publish_tab(sessions: Sessions, login: bool) -> None:
    gr.Markdown(
        "The card says only what was counted and measured here. The checkpoint is compressed; plain `from_pretrained` "
        "loads it after `import hf_prune`."
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
    private = gr.Checkbox(True, label="Private repository", elem_id="private")
    if login:
        gr.Markdown("A push goes to the account that you log in with, at the top of this page.")
    else:
        gr.Markdown("A push uses the token that this machine is logged in with (`hf auth login`, or `HF_TOKEN`).")
    push = gr.Button("Push to the Hub", elem_id="push")
    said = gr.Markdown("Nothing was pushed yet.", elem_id="pushed", container=True)
    card = gr.Markdown("The card stands here, as it will on the Hub.", elem_id="card", container=True, label="The card")

    @explain_errors
    def make_card(name: str, request: gr.Request) -> str:
        """The model card, as Markdown."""
        return _preview(*sessions.card(visitor(request), (name or "").strip()))

    preview.click(make_card, name, card, api_name="card", **LIGHT)

    @explain_errors
    def archive(name: str, request: gr.Request) -> Any:
        """The checkpoint with its card, as a zip file."""
        return gr.DownloadButton(value=str(sessions.archive(visitor(request), (name or "").strip())), interactive=True)

    pack.click(archive, name, file, api_name="archive", **LIGHT)

    def upload(name: str, private: bool, token: str | None, request: gr.Request) -> str:
        if token is None:
            raise gr.Error("log in with Hugging Face first", title="Not pushed", print_exception=False)
        result = sessions.push(visitor(request), (name or "").strip(), token, bool(private))
        total = sum(result["files"].values()) / 1e6
        return f"Pushed {len(result['files'])} files, {total:.1f} MB, to [{result['repo_id']}]({result['url']})."

    if login:

        @explain_errors
        def push_with_login(name: str, private: bool, request: gr.Request, token: gr.OAuthToken | None) -> str:
            """Upload it to the account that is logged in."""
            return upload(name, private, None if token is None else token.token, request)

        push.click(push_with_login, [name, private], said, api_name="push", **LIGHT)
    else:

        @explain_errors
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
