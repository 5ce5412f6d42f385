"""What all pages share: who asks, how far something is, and errors in words."""

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
from studio import Studio

from hf_prune import HfPruneError

# One that takes long is not waited for: models run in processes of their own.
HEAVY = {"concurrency_id": "heavy", "concurrency_limit": 4}
LIGHT = {"concurrency_id": "light", "concurrency_limit": 16}
QUICK = {"concurrency_id": "quick", "concurrency_limit": None}  # what asks no model
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
            _log.exception("hf_prune.space: in %s", handler.__name__)
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
    if not request.session_hash:
        raise gr.Error("send a session_hash, as gradio_client does: it says whose model this is", print_exception=False)
    return str(request.session_hash)


def place(studio: Studio, request: gr.Request) -> AbstractContextManager[None]:
    """Within this context, who asks has something long running, and nobody else at their address."""
    peer = request.client.host if request.client is not None else ""
    return studio.place(address_of(request.headers.get("x-forwarded-for", ""), peer))


def canceller(studio: Studio) -> Callable[..., str]:
    """What a button that cancels calls."""

    def cancel(request: gr.Request) -> str:
        """Stop what is running; what was there before stays."""
        return "Cancelling: what you had stays." if studio.cancel(visitor(request)) else "Nothing of yours is running."

    return cancel
