"""Who may talk to the app: programs, and pages of its own under a name of its own.

A page elsewhere can give its name this machine's address and then pass for a page of this app, which pushes with this
machine's token. Such a page has a name that is not ours. Other pages say where they come from.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

_HOST = re.compile(r"(\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(:[0-9]{0,5})?")


class OwnPagesOnly:
    """ASGI middleware that refuses requests to names that are not the app's, or from pages of other sites.

    Args:
        app: The app that it guards.
        names: The app's hosts, besides localhost and bare addresses, which no other site can have as a name.
    """

    def __init__(self, app: Any, names: frozenset[str] = frozenset()) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on, or refuse."""
        reason = refusal(Headers(scope=scope), self.names) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason[:120]})
        else:
            await PlainTextResponse(reason, status_code=403)(scope, receive, send)


def own_names(environment: Mapping[str, str]) -> frozenset[str]:
    """The app's hosts: those of its Space, and those that ``HF_PRUNE_SPACE_HOSTS`` lists, with commas."""
    listed = ",".join(environment.get(name, "") for name in ("SPACE_HOST", "HF_PRUNE_SPACE_HOSTS"))
    return frozenset(name.strip().lower() for name in listed.split(",") if name.strip())


def refusal(headers: Mapping[str, str], names: frozenset[str]) -> str | None:
    """Why a request is refused: it is not for this app, or from another site's page. None if it is not refused.

    Args:
        headers: The request's headers, in lower case.
        names: The app's hosts.
    """
    host, origin = headers.get("host", "").lower(), headers.get("origin")
    name = _host_name(host)
    if name != "localhost" and name not in names and not _is_address(name):
        return (
            f"{host[:100]!r} is not a name of this app: open it as localhost, or list its names in "
            f"HF_PRUNE_SPACE_HOSTS, with commas, before you start it"
        )
    if origin is not None:
        scheme, _, netloc = origin.lower().partition("://")
        is_own = netloc == host or _host_name(netloc) in names
        return None if is_own and scheme in ("http", "https") else "this comes from another page than the app's"
    foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
    if foreign and headers.get("sec-fetch-mode") != "navigate":  # links to the app, and frames with it, are fine
        return "this comes from another page than the app's"
    return None


def _host_name(host: str) -> str:
    """A host without its port; empty if it is not valid."""
    match = _HOST.fullmatch(host)
    return "" if match is None else match["address"] or match["name"]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def address_of(forwarded: str, peer: str) -> str | None:
    """The last public address that a request came through, as a network; None if there is none.

    Proxies append the address that they saw, so the first ones may be made up by the client. For IPv6 it is the /64
    network, since one person can have any number of its addresses.

    Args:
        forwarded: The header ``X-Forwarded-For``.
        peer: The address of the connection.
    """
    for text in reversed(forwarded.split(",") if forwarded else [peer]):
        try:
            address = ipaddress.ip_address(text.strip())
        except ValueError:
            continue
        if address.is_global:
            bits = 64 if address.version == 6 else 32
            return str(ipaddress.ip_network((address, bits), strict=False))
    return None
