"""What the pages are made of: who the visitor is, progress, error messages, queues and buttons."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import gradio as gr
from guard import address_of
from sessions import Sessions

from hf_prune import HfPruneError

# Gradio's queues. Long jobs hold up no others, since models run in processes of their own.
HEAVY = {"concurrency_id": "heavy", "concurrency_limit": 4}
LIGHT = {"concurrency_id": "light", "concurrency_limit": 16}
QUICK = {"concurrency_id": "quick", "concurrency_limit": None}  # needs no model
_log = logging.getLogger("hf_prune.space")


def explain_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show a handler's errors to the visitor as sentences; unexpected ones go to the log."""

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except HfPruneError as error:
            message = escape(str(error), quote=False)
        except gr.Error:
            raise
        except Exception:
            _log.exception("hf_prune.space: in %s", handler.__name__)
            message = "something went wrong here, and was written to the log; what you had is still there"
        raise gr.Error(message[0].upper() + message[1:], duration=15, title="Not done", print_exception=False)

    return handle


def show_progress(progress: gr.Progress) -> Callable[[str, float], None]:
    """A function that shows progress, at most ten times a second."""
    last = [0.0, ""]

    def show(title: str, share: float) -> None:
        now = time.monotonic()
        if title != last[1] or now - last[0] > 0.1:
            last[:] = now, title
            progress(min(share, 1.0), desc=title)

    return show


def visitor(request: gr.Request) -> str:
    """The key of the visitor who sent a request."""
    if not request.session_hash:
        raise gr.Error("send a session_hash, as gradio_client does: it says whose model this is", print_exception=False)
    return str(request.session_hash)


def take_turn(sessions: Sessions, request: gr.Request) -> AbstractContextManager[None]:
    """Within this context, the visitor has something long running, and nobody else at their address."""
    peer = request.client.host if request.client is not None else ""
    return sessions.jobs.take_turn(address_of(request.headers.get("x-forwarded-for", ""), peer))


def cancel_handler(sessions: Sessions) -> Callable[..., str]:
    """The handler of a button that cancels."""

    def cancel(request: gr.Request) -> str:
        """Stop what is running; what was there before stays."""
        if sessions.jobs.cancel(visitor(request)):
            return "Cancelling: what you had stays."
        return "Nothing of yours is running."

    return cancel
