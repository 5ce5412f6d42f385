"""The running Space: through its API, and in a real browser, on a desk and on a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from hf_prune import verify_checkpoint
from tests.integration.space.space_server import SPACE, at_once, visiting
from tests.loopback_hub import TOKEN, USER, serving

gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: pip install 'hf_prune[space]'")

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: apt install chromium, or say where it is with CHROMIUM=/path/to/it"
)
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("space"), pytest.mark.timeout(600)]
OWN, HEADS, WEIGHTS = "model", "Heads and neurons", "Single weights"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def hub():
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def app(hub, tmp_path_factory):
    """A local run: its address, and the file with all that it says."""
    with visiting(tmp_path_factory.mktemp("app"), hub) as found:
        yield found
        assert TOKEN not in found[1].read_text()


@pytest.fixture(scope="module")
def on_a_space(hub, tmp_path_factory):
    """The same as a Space runs it, with login; the machine's own token is of no use to visitors."""
    login = {"SYSTEM": "spaces", "SPACE_ID": f"{USER}/space", "OAUTH_CLIENT_ID": "client", "OAUTH_CLIENT_SECRET": "x"}
    login |= {"OAUTH_SCOPES": "openid profile write-repos manage-repos", "OPENID_PROVIDER_URL": hub.url}
    with visiting(tmp_path_factory.mktemp("space"), hub, **login) as found:
        yield found
        assert TOKEN not in found[1].read_text()


def client(app):
    return gradio_client.Client(app[0], verbose=False)


def prune(visitor, what=WEIGHTS, how="magnitude", repair=False, sparsity=0.5, model=OWN):
    return visitor.predict(model, what, how, repair, sparsity, api_name="/prune")


# --- the API ------------------------------------------------------------------------------------------------


def test_every_action_has_an_endpoint_that_the_readme_lists(app):
    listed = re.findall(r"^\| `(/\w+)` \|", (SPACE / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(client(app).view_api(return_format="dict", print_info=False)["named_endpoints"])


def test_all_of_it_by_a_program(app, hub, tmp_path):
    visitor = client(app)
    said, numbers, panel, sizes, weights, units, layers, times, words = prune(visitor, HEADS, "fisher", True)
    assert "It is really smaller" in said
    assert numbers["parameters"] < numbers["parameters_before"] == 5970
    assert f"<td data-of='dense'>5,970</td><td data-of='pruned'>{numbers['parameters']:,}</td>" in sizes
    assert all(picture["type"] == "plotly" for picture in (weights, units, layers))
    assert "Not timed yet" in times
    assert "Nothing was timed yet" in words
    assert panel.count("not measured yet") == 2
    _, numbers, panel, times, words = visitor.predict(api_name="/measure")
    assert numbers["evaluation"]["dense"]["n"] == 30
    assert numbers["plain"]["low"] <= numbers["plain"]["value"] <= numbers["plain"]["high"]
    assert "not measured" not in panel
    assert re.findall("<th scope='row'>(\\w+)</th>", times) == ["dense", "pruned"]
    assert "30 rounds in turns" in words
    assert "<strong>LABEL_" in visitor.predict("w1 <b>w2</b>", api_name="/compare")
    assert "&lt;b&gt;" in visitor.predict("w1 <b>w2</b>", api_name="/compare")
    rows = visitor.predict("w1 w2\n\nw3 w4", api_name="/disagreements")
    assert re.search(r"<strong>\d of 2</strong>", rows)
    card = visitor.predict("mine", api_name="/card")
    assert card.count("data:image/png;base64,") == 1  # weights; no matrix of it has zeros
    assert "Timed in turns" in card
    archive = visitor.predict("mine", api_name="/archive")
    with zipfile.ZipFile(archive["value"] if isinstance(archive, dict) else archive) as file:
        file.extractall(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").is_right
    assert "Pushed" in visitor.predict("mine", True, api_name="/push")
    assert hub.repos["model", f"{USER}/mine"].private
    assert "Timed in turns" in hub.files(f"{USER}/mine")["README.md"].decode()
    one = ["magnitude, single weights"]
    spot, _, table, file = visitor.predict("size", 2, one, api_name="/tradeoff")
    results = json.loads((SPACE / "results.json").read_text())
    mine = [p for p in results["points"] if p["method"] in one]
    assert table.count("<tr>") - 1 == len(mine) == Path(file).read_text().count("\n") - 1
    assert "magnitude, single weights at 30 %" in spot
    visitor.predict(one, ["50 %", "90 %"], api_name="/sweep")  # of another model than the demo's: not beside its points
    _, _, table, _ = visitor.predict("sparsity", 2, one, api_name="/tradeoff")
    assert re.findall("<tr class='here'>.*?sparsity'>(\\d+ %)<.*?sentences'>(\\d+)<", table) == [
        ("50 %", "30"),
        ("90 %", "30"),
    ]
    assert "before" not in table
    visitor.predict(one, ["50 %", "70 %"], api_name="/sweep")  # those of before stay
    _, _, table, _ = visitor.predict("sparsity", 2, one, api_name="/tradeoff")
    assert re.findall("<tr class='here'>.*?sparsity'>(\\d+ %)<", table) == ["90 %", "50 %", "70 %"]
    visitor.predict(api_name="/earlier")
    _, _, table, _ = visitor.predict("sparsity", 2, one, api_name="/tradeoff")
    assert table.count("<tr>") - 1 == len(mine)
    assert visitor.predict(api_name="/cancel") == "Nothing of yours is running."


def test_what_is_offered_together(app):
    visitor = client(app)
    goal, preset, _, how, repair, sparsity = visitor.predict(
        "Two of every four weights (2:4)", "fisher", True, api_name="/choices"
    )
    assert goal["value"] is None
    assert preset["value"] == how["value"] == "balanced"
    assert {choice[0] for choice in how["choices"]} >= {"wanda", "alps"}
    assert sparsity["value"] == 0.5
    assert not sparsity["interactive"]
    _, preset, _, _, repair, sparsity = visitor.predict("Whole layers", "fisher", True, api_name="/choices")
    assert preset["value"] is None
    assert not repair["value"]
    assert not repair["interactive"]
    assert sparsity["interactive"]
    goal, preset, *_ = visitor.predict(HEADS, "fast", True, api_name="/choices")
    assert goal["value"] == "A faster model"
    assert [choice[0] for choice in preset["choices"]] == ["fast", "balanced"]  # best comes to the same as balanced


@pytest.mark.parametrize(
    ("endpoint", "words", "said"),
    [
        ("/measure", [], "There is no pruned model of yours"),
        ("/compare", ["w1"], "There is no pruned model of yours"),
        ("/compare", ["w" * 5000], "expected at most 1000"),
        ("/disagreements", ["w1\n" * 300], "expected at most 200"),
        ("/card", ["../../etc"], "is not a name for a model"),
        ("/push", ["<script>", True], "&lt;script&gt;"),
        ("/prune", ["../../etc/passwd", WEIGHTS, "magnitude", False, 0.5], "is not a model on the Hub"),
        ("/prune", ["me/nothing", WEIGHTS, "magnitude", False, 0.5], "is not on the Hub, or is private"),
        ("/prune", [OWN, WEIGHTS, "alps", False, 7], "expected a number from 0 to 0.95"),
        ("/prune", [OWN, WEIGHTS, ["alps"], False, 0.5], "expected one of fast"),
        ("/prune", [OWN, HEADS, "wanda", False, 0.5], "expected one of fast"),
        ("/sweep", [["magnitude, single weights"], []], "choose 1 to 6"),
    ],
)
def test_errors_are_in_words(app, endpoint, words, said):
    with pytest.raises(Exception, match=re.escape(said)) as error:  # gradio_client has no class for it in all versions
        client(app).predict(*words, api_name=endpoint)
    assert "Traceback" not in str(error.value)
    assert "hf_prune.space" not in app[1].read_text()  # nothing unexpected was logged


def test_cancelling(app):
    visitor = client(app)
    prune(visitor)
    job = visitor.submit(OWN, WEIGHTS, "fisher_diagonal", True, 0.9, api_name="/prune")
    while (said := visitor.predict(api_name="/cancel")).startswith("Nothing") and not job.done():
        time.sleep(0.05)
    assert said == "Cancelling: what you had stays."
    with pytest.raises(Exception, match="Cancelled; nothing has changed"):
        job.result()
    assert "Criterion magnitude" in visitor.predict("mine", api_name="/card")


def test_an_axis_that_is_none(app):
    with pytest.raises(Exception, match="not in the list of choices"):
        client(app).predict("age", 2, [], api_name="/tradeoff")


def test_ten_visitors_at_once(app):
    """Each prunes differently, at the same time; each then sees its own."""
    found, errors = {}, []

    def visit(number):
        try:
            visitor = client(app)
            sparsity = 0.05 * (1 + number)
            how = "random" if number % 2 else "wanda"
            _, numbers, *_ = prune(visitor, how=how, sparsity=sparsity)
            card = visitor.predict(f"visitor-{number}", api_name="/card")
            found[number] = (numbers["settings"]["criterion"], numbers["settings"]["sparsity"], card)
            assert f"# visitor-{number}" in card
        except Exception as error:
            errors.append(error)

    at_once(visit, 10)
    assert errors == []
    for number, (how, sparsity, card) in found.items():
        assert how == ("random" if number % 2 else "wanda")
        assert sparsity == pytest.approx(0.05 * (1 + number))
        assert f"Criterion {how}" in card
    assert len(found) == 10


def test_strangers_do_not_push_with_the_token_of_the_space(on_a_space, hub):
    visitor = client(on_a_space)
    prune(visitor)
    with pytest.raises(Exception, match="log in with Hugging Face first"):
        visitor.predict("stolen", True, api_name="/push")
    assert ("model", f"{USER}/stolen") not in hub.repos


ENDPOINTS = ("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/upload", "/gradio_api/queue/join")
ENDPOINTS += (
    "/gradio_api/call/push_from_here",
    "/gradio_api/run/push",
    "/gradio_api/call/cancel",
    "/login/huggingface",
)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_no_endpoint_answers_to_other_names_and_other_pages(app, on_a_space, path):
    """A page whose name was rebound to this machine, and one that has a browser send the cookie of a login."""
    rebound = [{"Host": "evil.example"}, {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}]
    foreign = [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
    for address, _ in (app, on_a_space):
        for headers in rebound + foreign:
            for data in (None, b'{"data": ["stolen", true], "session_hash": "x"}'):
                request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(request, timeout=30)
                assert refused.value.code == 403
                words = b"is not a name of this app" if headers in rebound else b"another page"
                assert words in refused.value.read()


def test_a_private_push_does_not_go_into_a_public_repository(app, hub):
    hub.put(f"{USER}/public", {"config.json": b'{"model_type": "bert"}'})
    visitor = client(app)
    prune(visitor)
    with pytest.raises(Exception, match="exists already and is public"):
        visitor.predict("public", True, api_name="/push")
    assert set(hub.files(f"{USER}/public")) == {"config.json"}


# --- in the browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    pages, errors = [], []

    def opened(app, size=DESK, **options):
        page = chromium.new_page(viewport=size, **options)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(app[0].replace("127.0.0.1", "localhost"))  # where a browser keeps the cookie of a login without https
        page.get_by_role("tab", name="1 Prune").wait_for()
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert errors == []


def tab(page, name):
    """A tab, or where a phone has no room for it, the menu of those that are left."""
    wanted = page.get_by_role("tab", name=name)
    if wanted.count() == 0 or not wanted.first.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    else:
        wanted.first.click()


def no_wider_than_the_page(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


@needs_browser
@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone"])
def test_all_five_parts(app, visit, hub, tmp_path, size, scheme):
    page = visit(app, size, color_scheme=scheme)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    no_wider_than_the_page(page)
    best = page.locator("#preset label").filter(has_text=re.compile(r"^\s*best\s*$"))  # for units it is `balanced`
    page.get_by_label("A smaller file").check()
    best.wait_for()
    page.get_by_label("A faster model").check()
    best.wait_for(state="hidden")
    page.locator("#start").click()
    page.locator("#said", has_text="It is really smaller").wait_for()
    page.locator("#numbers", has_text="95 % interval").wait_for()  # measured at once
    assert re.search(r"Accuracy\s+[\d.]+ ± [\d.]+ %\s+dense [\d.]+ %", page.locator("#numbers").inner_text())
    assert re.search(r"[\d,]+ of 5,970 parameters are left and not zero", page.locator("#said").inner_text())

    tab(page, "2 See")
    for picture in ("weights", "units", "layers"):
        page.locator(f"#{picture} .js-plotly-plot .main-svg").first.wait_for()
    assert "layer 1: 1 of 2" in page.locator("#units").inner_text()
    assert "5,970" in page.locator("#sizes").inner_text()
    page.locator("#measure").click()
    page.locator("#speed", has_text="30 rounds in turns").wait_for()
    assert re.search(r"dense\s+[\d.]+ ms", page.locator("#times").inner_text())
    no_wider_than_the_page(page)

    tab(page, "3 Compare")
    page.get_by_role("textbox", name="A sentence").fill("w1 <img src=x onerror=document.title='hacked'> w2")
    page.locator("#ask").click()
    page.locator("#answer", has_text="<img src=x").wait_for()  # the one before was to a sentence of ours
    assert page.title() != "hacked"
    assert page.locator("#answer .bar").count() == 4
    page.get_by_role("button", name="The plot is thin").or_(page.get_by_text("The plot is thin")).first.click()
    page.locator("#many textarea").fill("w1 w2\nw3 w4\nw5")
    page.locator("#find").click()
    page.locator("#rows", has_text="of 3").wait_for()
    no_wider_than_the_page(page)

    tab(page, "4 Trade-off")
    page.locator("#chart .js-plotly-plot .main-svg").first.wait_for()
    assert "Sweet spot" in page.locator("#spot").inner_text()
    assert "sweet spot" in page.locator("#chart").inner_text()
    page.locator("#axis").get_by_label("Time").check()
    page.locator("#chart", has_text="time of a sentence").wait_for()
    page.locator("#tolerance input[type=number]").fill("5")
    page.locator("#tolerance input[type=number]").press("Enter")
    page.locator("#spot", has_text="fisher + repair, heads and neurons at 70 %").wait_for()
    assert "as fast" in page.locator("#spot").inner_text()
    with page.expect_download() as download:
        page.locator("#csv").click()
    assert Path(download.value.path()).read_text().startswith("method,sparsity,accuracy")
    no_wider_than_the_page(page)

    tab(page, "5 Publish")
    name = f"from-{scheme}"
    page.get_by_role("textbox", name="Name of the repository").fill(name)
    page.locator("#preview").click()
    page.locator("#card h1", has_text=name).wait_for()
    assert "Timed in turns" in page.locator("#card").inner_text()
    assert page.locator("#card img").evaluate_all("all => all.every(each => each.naturalWidth > 100)")
    page.locator("#pack").click()
    page.locator("#download:not([disabled])").wait_for()
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        assert {"README.md", "config.json", "weights.png"} <= set(file.namelist())
    page.locator("#push").click()
    page.locator("#pushed", has_text=f"{USER}/{name}").wait_for()
    assert "config.json" in hub.files(f"{USER}/{name}")
    assert page.locator("input[type=password]").count() == 0
    no_wider_than_the_page(page)


@needs_browser
def test_settings_that_exclude_one_another(app, visit):
    page = visit(app)
    slider = page.locator("#sparsity input[type=range]")
    assert slider.is_enabled()
    page.get_by_text("More: other units and methods").click()
    page.get_by_label("Two of every four weights").check()
    page.locator("#sparsity", has_text="Follows from 2:4").wait_for()
    assert slider.is_disabled()
    page.get_by_role("combobox", name="Model").or_(page.locator("#model input")).first.fill("nobody/nothing")
    page.keyboard.press("Enter")
    page.locator("#start").click()
    page.get_by_text("is not on the Hub, or is private").wait_for()
    page.locator("#said", has_text="Not done").wait_for()
    assert "Nothing is pruned yet" in page.locator("#said").inner_text()


@needs_browser
def test_the_keyboard_is_enough_and_everything_has_a_label(app, visit):
    page = visit(app)
    page.get_by_role("tab", name="1 Prune").focus()
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    page.keyboard.press("Enter")
    page.locator("#said", has_text="parameters are left").wait_for()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')].filter(each =>
            each.offsetParent && !(each.labels?.length || each.ariaLabel || each.title || each.innerText.trim()
            || each.getAttribute('aria-labelledby') || each.placeholder)).map(each => each.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


@needs_browser
def test_login_and_push_on_a_space(on_a_space, visit, hub):
    page = visit(on_a_space)
    page.wait_for_timeout(1500)  # nobody is faster; by then the page has asked who is logged in
    page.locator("#login").click()
    page.locator("#login", has_text=f"Logout ({USER})").wait_for()
    page.locator("#start").click()
    page.locator("#said", has_text="parameters are left").wait_for()
    tab(page, "5 Publish")
    page.get_by_role("textbox", name="Name of the repository").fill("after-login")
    page.locator("#push").click()
    page.locator("#pushed", has_text=f"{USER}/after-login").wait_for()
    assert "config.json" in hub.files(f"{USER}/after-login")
    assert TOKEN not in page.content()
