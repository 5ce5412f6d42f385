"""The app answers to its own names and its own pages only: a page elsewhere cannot push with this machine's token."""

import asyncio
import sys

import pytest

from tests.integration.space.space_server import SPACE

pytest.importorskip("starlette", reason="gradio is not installed: pip install 'hf_prune[space]'")
HERE = "localhost:7860"
EVIL = (
    "evil.example:7860", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io:7860", "evil.example@localhost",
    "localhost@evil.example", "", " ", "localhost:x", "localhost/..", "[::1", "::1", "0x7f.1", "2130706433",
    "local host", "[::1]evil.example", "[::1]80", "[localhost]",
)  # fmt: skip


@pytest.fixture(scope="module")
def guard():
    sys.path.insert(0, str(SPACE))
    try:
        import guard
    finally:
        sys.path.remove(str(SPACE))
    return guard


def answer(guard, headers, kind="http", names=frozenset()):
    """The status of the guarded app, which says 200 itself."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": "POST", "path": "/", "headers": raw}
    asyncio.run(guard.OwnPagesOnly(app, names)(scope, None, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize("host", [HERE, "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860", "192.168.1.7", "localhost"])
def test_own_names_and_addresses(guard, host):
    assert answer(guard, {"host": host}) == 200
    assert answer(guard, {"host": host, "origin": f"http://{host}"}) == 200
    assert answer(guard, {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}) == 200


@pytest.mark.parametrize("host", EVIL)
@pytest.mark.parametrize("origin", [None, "own"])
def test_a_name_that_is_rebound(guard, host, origin):
    """For the browser, such a page is of the same origin."""
    headers = {"host": host} if origin is None else {"host": host, "origin": f"http://{host}"}
    assert answer(guard, headers | {"sec-fetch-site": "same-origin"}) == 403
    assert "is not a name of this app" in guard.refusal(headers, frozenset())
    assert answer(guard, headers, "websocket") == "websocket.close"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://localhost:8000"},  # another program's page on this machine
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://["},
        {"origin": "http://[::1"},
        {"origin": "http://localhost:x"},
        {"origin": "//"},
        {"origin": "http://localhost:7860.evil.example"},
        {"origin": "file://localhost:7860"},
        {"origin": f"http://{HERE}@evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a form
    ],
)
def test_pages_of_others(guard, headers):
    assert answer(guard, {"host": HERE, **headers}) == 403
    assert "another page" in guard.refusal({"host": HERE, **headers}, frozenset())


def test_links_and_frames_are_fine(guard):
    headers = {"host": HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert answer(guard, headers) == 200


def test_names_of_a_space_and_those_that_are_listed(guard):
    names = guard.own_names({"SPACE_HOST": "Me-App.hf.space", "HF_PRUNE_SPACE_HOSTS": "prune.example, abc.gradio.live"})
    assert names == {"me-app.hf.space", "prune.example", "abc.gradio.live"}
    assert guard.own_names({}) == frozenset()
    for host in names:
        assert answer(guard, {"host": host}, names=names) == 200
        assert answer(guard, {"host": HERE, "origin": f"https://{host}"}, names=names) == 200  # behind a proxy
        assert answer(guard, {"host": host, "origin": "https://evil.example"}, names=names) == 403
    assert answer(guard, {"host": "other.hf.space"}, names=names) == 403


@pytest.mark.parametrize(
    ("forwarded", "peer", "found"),
    [
        ("8.8.8.8", "10.0.0.1", "8.8.8.8/32"),
        ("1.1.1.1, 8.8.8.8", "10.0.0.1", "8.8.8.8/32"),  # whoever writes the first part is still the last one
        ("8.8.8.8, 10.1.2.3", "10.0.0.1", "8.8.8.8/32"),
        ("2a00:1450:4001:80b::200e", "10.0.0.1", "2a00:1450:4001:80b::/64"),
        ("", "8.8.8.8", "8.8.8.8/32"),
        ("", "127.0.0.1", None),
        ("nobody", "8.8.8.8", None),
        ("", "", None),
    ],
)
def test_the_address_of_a_visitor_is_not_what_the_visitor_writes(guard, forwarded, peer, found):
    assert guard.address_of(forwarded, peer) == found
