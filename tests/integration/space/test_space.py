"""What the Space does behind its pages: models, visitors, limits, and what the Hub gives it."""

import functools
import importlib
import json
import math
import re
import shutil
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
import yaml

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    ConfigError,
    DataError,
    HfPruneError,
    PruningConfig,
    verify_checkpoint,
)
from tests import models
from tests.integration.space.space_server import ROOT, SPACE, at_once, write_tiny
from tests.loopback_hub import USER, client_environment, listening, run_client
from tests.support.fresh_process import ForkServer


@pytest.fixture(scope="module")
def space():
    """The modules of the app that need no gradio."""
    sys.path.insert(0, str(SPACE))
    try:
        names = "children choices downloads limits measuring models panel sessions tradeoff views".split()
        modules = {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(SPACE))
    started = modules["children"].Children(secrets=False)
    yield SimpleNamespace(**modules, started=started)
    started.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dense(space, tiny):
    return space.models.load_dense("tiny", tiny[0], None, 10_000)


@pytest.fixture
def make(space, tiny, tmp_path):
    made = []

    def build(limits=None, **options):
        defaults = {"demo": tiny[0], "data": tiny[1], "sentences": ["w1 w2", "w3"], "children": space.started}
        limits = space.limits.Limits(**(limits or {}))
        made.append(space.sessions.Sessions(tmp_path / "visitors", limits=limits, **{**defaults, **options}))
        return made[-1]

    yield build
    for sessions in made:
        sessions.close()


def silent(title, share):
    """Hears nothing."""


HEADS = PruningConfig(0.5, granularity=("head", "neuron"), scope="global")


# --- what is on offer ---------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:repair='least_squares' changed nothing")
def test_every_combination_on_offer_prunes(space, make, dense, tmp_path):
    texts = make({"calibration": 4}).calibration_texts()
    before = models.snapshot(dense.model)
    count = 0
    for what in space.choices.WHAT:
        offered = space.choices.criteria_for(what)
        assert {"magnitude", "random"} <= set(offered)
        assert not {"movement", "snip"} & set(offered)
        for how in offered:
            for repair in (False, True) if space.choices.can_repair(what, how) else (False,):
                config = space.choices.make_config(what, how, repair, 0.5)
                pruned = space.models.prune_copy(dense, config, texts, tmp_path / str(count), silent)
                facts = pruned.facts()
                assert facts["nonzero"] < facts["parameters_before"]
                assert (facts["parameters"] < facts["parameters_before"]) == config.removes_units
                assert facts["file_bytes_compressed"] == sum(
                    p.stat().st_size for p in pruned.folder.glob("*.safetensors")
                )
                count += 1
    assert count > 40
    models.assert_unchanged(dense.model, before)


@pytest.mark.parametrize(
    ("what", "how", "repair", "sparsity", "said"),
    [
        ("Nothing", "magnitude", False, 0.5, "expected one of Single weights"),
        ("Single weights", "taylor", False, 0.5, "expected one of fast"),
        ("Heads and neurons", "wanda", False, 0.5, "expected one of fast"),
        ("Whole layers", "fisher", True, 0.5, "a repair does not go with"),
        ("Single weights", "magnitude", False, 0.99, r"expected a number from 0 to 0\.95"),
    ],
)
def test_what_excludes_one_another_is_refused(space, what, how, repair, sparsity, said):
    with pytest.raises(ConfigError, match=said):
        space.choices.make_config(what, how, repair, sparsity)


def test_two_of_four_fixes_the_sparsity(space):
    what = "Two of every four weights (2:4)"
    assert space.choices.fixed_sparsity(what) == 0.5
    assert space.choices.make_config(what, "magnitude", False, 0.9).sparsity == 0.5


def test_the_map_shows_what_is_gone(space, dense, tmp_path):
    pruned = space.models.prune_copy(dense, HEADS, ["w1 w2", "w3"], tmp_path / "out", silent)
    left = {name: (sum(kept), len(kept)) for name, kept in pruned.units.items()}
    assert left == {f"{site.kind} {site.name}": (site.units, site.before) for site in pruned.structure.sites}
    gone = space.models.count_removed_units(pruned.units)
    assert gone["head"] + gone["neuron"] > 0
    for name, share in pruned.removed_shares.items():
        now = dict(pruned.model.named_parameters())[name]
        assert share == pytest.approx(
            1 - now.count_nonzero().item() / dict(pruned.dense.model.named_parameters())[name].numel()
        )
    figure = space.views.unit_maps(pruned.units)
    assert len(figure.data) == 2
    assert space.views.unit_maps({}) is None


# --- visitors -----------------------------------------------------------------------------------------


def test_visitors_have_models_of_their_own(space, make):
    sessions = make()
    for name, sparsity in (("a", 0.3), ("b", 0.8)):
        sessions.prune(name, space.sessions.DEMO, PruningConfig(sparsity), silent)
    assert sessions.of("a").config.sparsity == 0.3
    assert sessions.of("b").config.sparsity == 0.8
    assert sessions.of("a").child is not sessions.of("b").child
    folder = sessions.of("a").folder
    sessions.forget("a")
    assert not folder.exists()
    with pytest.raises(DataError, match="there is no pruned model of yours"):
        sessions.of("a")
    assert sessions.of("b").folder.exists()


@pytest.mark.parametrize("limit", ["visitors", "kept_bytes"])
def test_memory_is_bounded(space, make, limit):
    one = make()
    one.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    assert one.of("a").memory > 2_000_000  # of the process, not of the weights alone
    sessions = make({limit: 2 if limit == "visitors" else int(2.5 * one.of("a").memory)})
    for name in "abc":
        sessions.prune(name, space.sessions.DEMO, PruningConfig(0.5), silent)
        sessions.of("a") if name == "b" else None
    assert sessions.of("a")  # was used last
    assert sessions.of("c")
    with pytest.raises(DataError, match="no pruned model"):
        sessions.of("b")
    sessions = make({"idle_seconds": -1})
    sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    with pytest.raises(DataError, match="no pruned model"):
        sessions.of("a")


def test_an_address_has_one_place_where_strangers_visit(make):
    sessions = make()
    with (
        sessions.jobs.take_turn("8.8.8.8/32"),
        sessions.jobs.take_turn("9.9.9.9/32"),
        sessions.jobs.take_turn(None),
        sessions.jobs.take_turn(None),
    ):
        with pytest.raises(ConfigError, match=r"still running for your address.*wait for it, or cancel it"):
            with sessions.jobs.take_turn("8.8.8.8/32"):
                pass
        with pytest.raises(ConfigError, match="still running for your address"):  # which the first has still
            with sessions.jobs.take_turn("8.8.8.8/32"):
                pass
    with pytest.raises(ZeroDivisionError), sessions.jobs.take_turn("8.8.8.8/32"):
        raise ZeroDivisionError
    with sessions.jobs.take_turn("8.8.8.8/32"):
        pass
    own = make(public=False)
    with own.jobs.take_turn("8.8.8.8/32"), own.jobs.take_turn("8.8.8.8/32"):
        pass


def test_cancelling_keeps_what_was_there(space, make):
    sessions = make()
    config = PruningConfig(0.5, criterion="sparsegpt")
    sessions.prune("a", space.sessions.DEMO, PruningConfig(0.3), silent)
    before, (_, dense, after) = sessions.of("a"), sessions.probabilities("a", ["w1"])
    seen = []

    def cancel(title, share):
        seen.append(title)
        if title == "Pruning" and seen.count("Pruning") == 3:
            assert sessions.jobs.cancel("a")
            assert not sessions.jobs.cancel("b")

    with pytest.raises(HfPruneError, match="cancelled; nothing has changed"):
        sessions.prune("a", space.sessions.DEMO, config, cancel)
    assert sessions.of("a") is before
    assert sessions.probabilities("a", ["w1"])[1:] == (dense, after)
    assert not sessions.jobs.cancel("a")
    with pytest.raises(HfPruneError, match="cancelled; nothing has changed"):
        sessions.measure("a", lambda *_: sessions.jobs.cancel("a"))
    sessions.prune("a", space.sessions.DEMO, config, silent)
    assert sessions.of("a").config.criterion == "sparsegpt"
    assert (
        len([path for path in sessions.folder.iterdir() if path.is_dir()]) == 1
    )  # of what was cancelled, nothing is left


def test_time_is_bounded_and_one_job_runs_at_a_time(space, make):
    sessions = make({"seconds": 0.0})
    with pytest.raises(HfPruneError, match="took longer than the 0 seconds"):
        sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5, criterion="wanda"), silent)
    with sessions.jobs.run("a"), pytest.raises(ConfigError, match="still running"), sessions.jobs.run("a"):
        pass
    assert not list(sessions.folder.glob("*"))


def test_downloads_of_strangers_go(space, make):
    """The ones used last stay, and what others are reading; what could not be loaded goes at once."""
    sessions = make({"downloads": 2})
    folders = {name: sessions.folder / "hub" / f"models--me--{name}" for name in "abcx"}

    def read(name, **options):
        with sessions._runner.source(f"me/{name}") as model:
            assert model["token"] is False
            (folders[name] / "snapshots").mkdir(parents=True, exist_ok=True)
            if options.get("fails"):
                raise DataError("no")

    for name in "aba":
        read(name)
    with pytest.raises(DataError):
        read("x", fails=True)
    with pytest.raises(DataError):
        read("a", fails=True)  # as when it is cancelled: it was fine before
    assert {name for name, folder in folders.items() if folder.exists()} == {"a", "b"}
    with sessions._runner.source("me/b"):
        read("c")
        assert folders["b"].exists()
    assert {name for name, folder in folders.items() if folder.exists()} == {"b", "c"}
    with pytest.raises(DataError, match="too large for this page"):
        make({"parameters": 1000}).prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "there is no sentence"),
        (["  "], "there is no sentence"),
        (["w1"] * 11, "these are 11 sentences: expected at most 10"),
        (["w" * 51], "has 51 characters: expected at most 50"),
    ],
)
def test_inputs_are_bounded(make, texts, said):
    with pytest.raises(DataError, match=said):
        make({"sentences": 10, "characters": 50}).probabilities("a", texts)


def test_many_threads_mix_nothing_up(space, make):
    sessions, wrong = make({"calibration": 4}), []

    def visit(number):
        sparsity = 0.05 * (1 + number)
        sessions.prune(str(number), space.sessions.DEMO, PruningConfig(sparsity, criterion="wanda"), silent)
        if sessions.of(str(number)).config.sparsity != sparsity:
            wrong.append(number)

    at_once(visit, 10)
    assert wrong == []
    assert len({sessions.of(str(n)).facts["nonzero"] for n in range(10)}) == 10


# --- what is measured, and published --------------------------------------------------------------------


def test_what_is_measured_goes_into_card_and_archive(space, make, tmp_path):
    sessions = make()
    sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    assert "Nothing was timed" in sessions.card("a", "mine")[0]
    measured = sessions.measure("a", silent).measured
    assert [p["model"] for p in measured["points"]] == ["dense", "pruned"]
    score = measured["evaluation"]
    assert score["dense"]["n"] == 30
    assert {"value", "reason"} & set(measured["kernels"])
    card, _ = sessions.card("a", "me/mine")
    assert "Rotten Tomatoes" in card
    assert "# mine" in card
    assert "Timed in turns, 30 rounds" in card
    assert f"{100 * score['comparison']['pruned_accuracy']:.2f}" in card
    path = sessions.archive("a", "me/mine")
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "out")
    assert {"README.md", "weights.png", "layers.png", "config.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert verify_checkpoint(tmp_path / "out").is_right
    for name in ("../x", "a/b/c", "", "a b", "-a", "a\n# b"):
        with pytest.raises(DataError, match="is not a name for a model"):
            sessions.card("a", name)


def test_both_answer_as_they_would_alone(space, make, dense):
    sessions = make()
    pruned = sessions.prune("a", space.sessions.DEMO, PruningConfig(0.8), silent)
    _, *both = sessions.probabilities("a", ["w1 w2 w3", " w4 "])
    batch = dense.tokenizer(["w4"], return_tensors="pt")
    for folder, found in zip((dense.folder, pruned.folder), both, strict=True):
        model = AutoPrunedModelForSequenceClassification.from_pretrained(folder)
        assert [len(each) for each in found] == [2, 2]
        torch.testing.assert_close(torch.tensor(found[1]), model(**batch).logits[0].softmax(-1))


def test_the_sweet_spot(space):
    points = [
        {"sparsity": s, "drop_bound": b, "file_bytes": f, "speedup": v, "faster": v > 1.1, "drop": d}
        for s, b, f, v, d in [
            (0.3, 0.5, 90, 1.0, 0.1),
            (0.6, 1.9, 50, 1.05, 0.9),
            (0.5, 1.5, 60, 2.0, 1.0),
            (0.9, 9, 10, 4, 8),
        ]
    ]
    spot = space.tradeoff.sweet_spot
    assert spot(points, "sparsity", 2) is points[1]
    assert spot(points, "size", 2) is points[1]
    assert spot(points, "time", 2) is points[2]
    assert spot(points, "time", 10) is points[3]
    assert spot(points, "sparsity", 0.1) is None
    assert spot(points[:2], "time", 2) is None  # neither is faster
    assert spot([{**p, "doubt": "its labels are reversed"} for p in points], "sparsity", 2) is None


def test_points_are_measured(space, make):
    sessions = make({"calibration": 8})
    methods = [("Single weights", "magnitude", False), ("Heads and neurons", "fisher", True)]
    points = []
    sessions.sweep("a", methods, [0.5, 0.9], 20, silent, points)
    assert [(p["method"], p["sparsity"], p["n"]) for p in points] == [
        ("magnitude, single weights", 0.5, 20),
        ("magnitude, single weights", 0.9, 20),
        ("fisher + repair, heads and neurons", 0.5, 20),
        ("fisher + repair, heads and neurons", 0.9, 20),
    ]
    assert [space.tradeoff.parse_method(p["method"]) for p in points[::2]] == methods
    assert points[1]["nonzero"] < points[0]["nonzero"]
    assert not list(sessions.folder.rglob("config.json"))  # nothing is left behind
    rows = space.tradeoff.to_csv(points).splitlines()
    assert [*rows[0].split(",")[:-1], "doubt"] == list(points[0])
    assert len(rows) == 5
    known = json.loads((SPACE / "results.json").read_text())["points"]
    together = [*known, *({**point, "here": True} for point in points)]
    figure = space.views.tradeoff(together, "sparsity", None)
    assert {line.line.dash for line in figure.data if line.name.endswith("(here, n = 20)")} == {"dash"}
    assert [note.text for note in figure.layout.annotations] == ["dense, n = 1200", "dense, n = 20"]
    shown = space.views.tradeoff_rows(together)
    assert [row[-1] for row in shown] == ["before"] * len(known) + ["here"] * 4
    assert shown[-1][4] == "20"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("method", "magic, single weights", "'magic, single weights' is not a method"),
        ("method", "magnitude, <b>", "is not a method"),
        ("sparsity", 1.5, r"sparsity is 1\.5: expected a number from 0 to 1"),
        ("accuracy", math.nan, "accuracy is nan"),
        ("accuracy", True, "accuracy is True"),
        ("accuracy", 99.0, "drop of .* which the other numbers contradict"),
        ("drop", -5.0, "drop of .* which the other numbers contradict"),
        ("drop_bound", -50.0, "drop_bound of .* contradict"),
        ("nonzero", 10**9, "nonzero of .* contradict"),
        ("speedup", 9.0, "speedup of .* contradict"),
        ("faster", True, "faster of .* contradict"),
        ("file_bytes", -1, "file_bytes is -1"),
        ("doubt", 3, "doubt of .* is 3"),
        (None, [], "is damaged: it holds a JSON list|holds a JSON list"),
        (None, {"points": []}, "KeyError"),
    ],
)
def test_results_that_were_edited_are_refused(space, tmp_path, key, value, said):
    results = json.loads((SPACE / "results.json").read_text())
    if key is not None:
        results["points"][1][key] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results if key is not None else value))
    with pytest.raises(DataError, match=said):
        space.tradeoff.read_results(path)


def test_the_committed_results_can_be_shown(space):
    results = space.tradeoff.read_results(SPACE / "results.json")
    assert results == json.loads((SPACE / "results.json").read_text())
    assert len({p["method"] for p in results["points"]}) >= 5
    for axis in ("sparsity", "size", "time"):
        best = space.tradeoff.sweet_spot(results["points"], axis, 2)
        figure = space.views.tradeoff(results["points"], axis, best)
        assert figure.data[-1].name == "sweet spot"
    assert all(space.tradeoff.parse_method(p["method"]) for p in results["points"])


RATIO = {"value": 1.8, "low": 1.7, "high": 1.9, "is_real": True, "dense_seconds": 0.009, "seconds": 0.005, "cpu": "<x>"}


def seen(space, removed=False, **measured):
    """A session of which this is measured."""
    facts = {"parameters_before": 100, "nonzero": 40, "parameters": 100, "seconds": 1.0}
    facts |= {"file_bytes_before": 90_000_000, "file_bytes_compressed": 30_000_000}
    layers = [[2, 2]] if removed else None
    more = {"name": "<b>", "facts": facts, "layers": layers, "removed_units": {"head": 3}, "reasons": ["Zeros: 60 %."]}
    return SimpleNamespace(measured=measured, **more)


def test_three_numbers_with_their_errors(space):
    assert space.panel.numbers(None).count("–") == 3
    assert space.panel.numbers(seen(space)).count("not measured yet") == 2
    comparison = {"pruned_accuracy": 0.8, "dense_accuracy": 0.9, "drop": 10.0, "drop_standard_error": 1.5, "n": 400}
    evaluation = {"comparison": {**comparison, "doubt": ""}}
    shown = space.panel.numbers(seen(space, evaluation=evaluation, plain=RATIO))
    assert "80.0 <small>± 2.0 %</small>" in shown  # sqrt(0.8 * 0.2 / 400)
    assert "dense 90.0 %<br>10.0 points lost, ± 1.5" in shown
    assert "30 <small>MB</small>" in shown
    assert "3.00 times smaller, compressed" in shown
    assert "1.80×</div><p>dense 9.0 ms<br>pruned 5.0 ms<br>95 % interval 1.70 to 1.90; one sentence" in shown
    assert "31 <small>of 32</small>" in space.panel.numbers(seen(space, agreement=(31, 32)))


@pytest.mark.parametrize(
    ("kernels", "said", "number"),
    [
        (RATIO, r"with `model\.accelerate\(\)` it is \*\*1\.80 times as fast .*on &lt;x&gt;", "1.80×"),
        ({**RATIO, "low": 0.9, "is_real": False}, r"it is no faster either at this sparsity: 1\.80", "1.00×"),
        ({"reason": "no gain."}, r"but here: no gain\.", "1.00×"),
    ],
)
def test_what_zeros_bring_is_what_was_measured(space, kernels, said, number):
    plain = {**RATIO, "value": 1.0, "low": 0.9, "high": 1.1, "is_real": False}
    session = seen(space, plain=plain, kernels=kernels)
    assert re.search(rf"PyTorch multiplies by zeros.*: 1\.00 times as fast.*{said}", space.panel.summary(session))
    assert number in space.panel.numbers(session)
    assert "is measured" in space.panel.summary(seen(space))
    assert "zeros" not in space.panel.summary(seen(space, removed=True, plain=plain))


def test_what_visitors_type_is_escaped(space):
    assert "<i>" not in space.panel.table(["a", "b"], [["<i>", "<i>"]], empty="")
    assert "<b>" not in space.panel.summary(seen(space))
    found = space.views.side_by_side("<script>alert(1)</script>", ["<b>", "&"], [0.9, 0.1], [0.2, 0.8])
    assert "<script>" not in found
    assert "<b>" not in found.replace("<strong>", "")
    assert "They disagree" in found
    assert "-70.0" in found


# --- the files of the Space -----------------------------------------------------------------------------


def test_the_space_needs_what_the_package_needs():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert lines[0].startswith("--extra-index-url")
    assert lines[1:] == [*project["dependencies"], *project["optional-dependencies"]["space"]]


def test_the_front_matter_is_as_the_hub_wants_it():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "license"} <= set(front)
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    pinned = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert front["sdk_version"] == pinned[1]


# --- the Hub ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A function that renews the hub, and one that runs a process whose Hub it is."""
    home = tmp_path_factory.mktemp("clients") / "home"
    with listening() as renew, ForkServer("hf_prune", "typer.main", **client_environment(renew(), home)) as processes:
        yield renew, lambda hub, *command, **options: run_client(hub, home, *command, processes=processes, **options)


@pytest.fixture
def hub(clients):
    return clients[0]()


def test_models_of_the_hub(hub, clients, tiny, tmp_path):
    """One good model, and all that must not be loaded; strangers do not get what the machine's token could read."""
    files = {p.name: p.read_bytes() for p in tiny[0].iterdir()}
    config = json.loads(files["config.json"])

    def changed(**values):
        return {**files, "config.json": json.dumps({**config, **values}).encode()}

    hub.put(f"{USER}/good", {**files, "evil.py": b"raise SystemExit(1)", "more/x.safetensors": b"?"})
    hub.put(f"{USER}/remote", changed(auto_map={"AutoModelForSequenceClassification": "evil.Model"}))
    hub.put(f"{USER}/pickle", {"config.json": files["config.json"], "pytorch_model.bin": b"?"})
    hub.put(f"{USER}/causal", changed(architectures=["GPT2LMHeadModel"]))
    hub.put(f"{USER}/bomb", changed(hidden_size=10**9))
    hub.put(f"{USER}/wide", changed(vocab_size=1_000_000, hidden_size=8192))
    hub.put(f"{USER}/score", changed(id2label={"0": "score"}, label2id={"score": 0}))
    hub.put(f"{USER}/multi", changed(problem_type="multi_label_classification"))
    hub.put(f"{USER}/globs", {**files, "*.safetensors": b"?"})
    hub.put(f"{USER}/book", {**files, "README.md": b"a" * 2_000_000})
    hub.put(f"{USER}/deep", changed(num_hidden_layers=10**6))
    hub.put(f"{USER}/broken", {**files, "model.safetensors": b"no tensors"})
    hub.put(f"{USER}/large", {**files, "model.safetensors": b"0" * 200_000})
    hub.put(f"{USER}/secret", files)
    hub.repos["model", f"{USER}/secret"].private = True
    script = f"""
import sys, json
sys.path.insert(0, {str(SPACE)!r})
from pathlib import Path
from limits import Limits
from sessions import Sessions
from hf_prune import PruningConfig
said = {{}}
out = Path({str(tmp_path / "out")!r})
sessions = Sessions(out, demo=None, data=None, sentences=["w1"], limits=Limits(download_bytes=100_000))
def load(sessions, name):
    sessions.prune("a", name, PruningConfig(0.5), lambda *_: None)
    return sessions.of("a").name
for name in "good remote pickle causal bomb wide score multi globs book deep broken large secret none".split():
    try:
        said[name] = load(sessions, "{USER}/" + name)
    except Exception as error:
        said[name] = f"{{type(error).__name__}}: {{error}}"
for name in ("../../etc/passwd", "/etc", "a/../b", "me", "me/x y", "https://x/y", "me/x" + "y" * 300, "a/b/c", ""):
    try:
        load(sessions, name)
    except Exception as error:
        said[name] = f"{{type(error).__name__}}: {{error}}"
private = Sessions(out, demo=None, data=None, sentences=["w1"], public=False)
said["own"] = load(private, "{USER}/secret")
print("SAID" + json.dumps(said) + "END")
"""
    out = clients[1](hub, script)
    said = json.loads(out[out.index("SAID") + 4 : out.index("END")])
    for name, found in (("good", "good"), ("remote", "remote"), ("own", "secret")):
        assert said[name] == f"{USER}/{found}"
    assert "pickles are never opened" in said["pickle"]
    assert "expected a text classifier" in said["causal"]
    assert "hidden_size = 1000000000" in said["bomb"]
    assert "num_hidden_layers = 1000000" in said["deep"]
    assert "builds more than 150,000,000 parameters, and was stopped there" in said["wide"]
    assert "one of several classes" in said["score"]
    assert "one of several classes" in said["multi"]
    assert "that no model needs" in said["globs"]
    assert "that no model needs" in said["book"]
    left = {path.name for path in (tmp_path / "out" / "hub").glob("models--*")}
    assert left == {f"models--{USER}--{name}" for name in ("good", "remote")}
    assert said["broken"].startswith(f"DataError: {USER}/broken/model.safetensors cannot be read")
    assert "too large for this page" in said["large"]
    for name in ("secret", "none"):
        assert "is not on the Hub, or is private" in said[name]
    hostile = [name for name in said if name not in ("good", "own") and not re.fullmatch(r"\w+", name)]
    assert len(hostile) >= 7
    for name in hostile:
        assert "is not a model on the Hub" in said[name]
    assert not any("evil.py" in request or "more/" in request for request in hub.log)


# --- hostile models -----------------------------------------------------------------------------------------


@pytest.fixture
def dotted(tiny, tmp_path):
    """A tokenizer that makes a billion characters of a dot."""
    folder = shutil.copytree(tiny[0], tmp_path / "dotted")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    longer = {"type": "Replace", "pattern": {"String": "."}, "content": "." * 10}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [longer] * 9}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def only_linux():
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is limited on Linux only")


def test_memory_and_time_of_a_process_are_limited(space, make, dotted):
    only_linux()
    sessions = make({"memory_bytes": 300_000_000}, demo=dotted, data=None, sentences=["w1 ."])
    with pytest.raises(
        HfPruneError, match=r"most likely it needs more than the 0\.3 GB of memory that one visitor may"
    ):
        sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    limits = {"memory_bytes": 10_000_000, "seconds": 10}  # a thread that dies of it may be waited for
    sessions = make(limits, demo=dotted, data=None, sentences=["w1"])
    with pytest.raises(HfPruneError, match=r"needs more than|took longer than the 10 seconds"):
        sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    sessions = make({"seconds": 1.5}, demo=dotted, data=None, sentences=["w1 ."])
    with pytest.raises(HfPruneError, match="took longer than the 2 seconds"):
        sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    assert not sessions._shelf.visitors()
    assert not [path for path in sessions.folder.glob("*") if path.is_dir()]


def test_while_one_hangs_others_are_served_and_it_can_be_cancelled(space, make, dotted):
    sessions = make(demo=dotted, data=None, sentences=["w1 ."])
    served = []

    def meanwhile(title, share):
        """What others do while the tokenizer of this one is busy."""
        if title == "Reading sentences to learn from":
            sessions.sentences = ["w1"]
            for name in "bc":
                sessions.prune(name, space.sessions.DEMO, PruningConfig(0.5), silent)
                served.append(sessions.probabilities(name, ["w1", "w2"])[1])
            assert sessions.jobs.cancel("a")

    with pytest.raises(HfPruneError, match="cancelled; nothing has changed"):
        sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), meanwhile)
    assert len(served) == 2
    with pytest.raises(DataError, match="no pruned model of yours"):
        sessions.of("a")
    assert sessions.of("b")


def test_a_sentence_that_a_model_cannot_take_ends_its_process_alone(space, make, dotted):
    only_linux()
    limits = {"memory_bytes": 300_000_000}
    sessions = make(limits, demo=dotted, data=None, sentences=["w1"])
    for name in "ab":
        sessions.prune(name, space.sessions.DEMO, PruningConfig(0.5), silent)
    folder = sessions.of("a").folder
    with pytest.raises(HfPruneError, match="Your pruned model went with it: prune one again"):
        sessions.probabilities("a", ["a dot."])
    with pytest.raises(DataError, match="no pruned model of yours"):
        sessions.of("a")
    assert not folder.exists()
    assert len(sessions.probabilities("b", ["w1"])[1]) == 1
    sessions.limits = space.limits.Limits(answer_seconds=0.0)
    with pytest.raises(HfPruneError, match=r"took longer than the 0 seconds.*went with it"):
        sessions.probabilities("b", ["w1"])


def test_one_visitor_does_not_keep_many_requests_waiting(space, make, monkeypatch):
    monkeypatch.setattr(space.children, "_PATIENCE", 0.01)
    sessions = make()
    pruned = sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    with pruned.child.turn, pytest.raises(ConfigError, match="something of yours is still running: wait for it"):
        sessions.probabilities("a", ["w1"])
    assert len(sessions.probabilities("a", ["w1"])[1]) == 1
    pruned.child.end()
    with pytest.raises(HfPruneError, match=r"was stopped with what you had running before\. Your pruned model went"):
        sessions.probabilities("a", ["w1"])


def test_processes_that_are_killed_are_replaced(space, make):
    """The one that forks is gone, and with it all that it forked."""
    only_linux()
    sessions = make()
    sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    space.started._ready.kill()
    space.started._ready.wait()
    with pytest.raises(HfPruneError, match="went with it"):
        sessions.probabilities("a", ["w1"])
    sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    assert len(sessions.probabilities("a", ["w1"])[1]) == 1


def test_where_nothing_can_be_forked_a_process_is_kept_ready(space, make, monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.setattr(space.children, "FORKS", False)
    sessions = make(children=space.children.Children(secrets=False))
    monkeypatch.setattr(space.children.Children, "prepare", lambda self: None)  # one is enough here
    try:
        sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
        assert len(sessions.probabilities("a", ["w1"])[1]) == 1
    finally:
        sessions.close()
        sessions._runner.children.close()


def test_processes_of_strangers_do_not_know_the_secrets_of_the_machine(space, monkeypatch):
    for name in ("HF_TOKEN", "OAUTH_CLIENT_SECRET", "MY_API_KEY"):
        monkeypatch.setenv(name, "hf_secret")
    monkeypatch.setattr(space.children.Children, "prepare", lambda self: None)
    assert "hf_secret" not in space.children.Children(secrets=False)._environment.values()
    assert space.children.Children(secrets=True)._environment["HF_TOKEN"] == "hf_secret"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_groups": 10**7}, "num_hidden_groups = 10000000"),
        ({"block_sizes": [4, 4, 10**7]}, "block_sizes = 10000000"),
        ({"text_config": {"deep": [{"vocab_size": 1e300}]}}, r"vocab_size = 1e\+300"),
        ({"num_hidden_layers": 129}, "num_hidden_layers = 129"),
        ({"num_labels": 1_900_000}, "num_labels = 1900000"),
        ({"x": 10**400}, "x = 1000"),
        ({"x": [-(10**4000)]}, "x = -1000"),
        ({"x": functools.reduce(lambda inner, _: [inner], range(3000), 1)}, "is nested too deeply for any model"),
        ({"hidden_size": -(10**7)}, "hidden_size = -10000000"),
        ({"architectures": []}, "a model without a class"),
        ({"architectures": "BertModel"}, "is BertModel"),
        ({"architectures": {"0": 1}}, "expected a text classifier"),
        ({"architectures": [None]}, "is None"),
    ],
)
def test_configs_that_are_refused_unread(space, values, said):
    config = {"architectures": ["BertForSequenceClassification"], "layer_norm_eps": 1e-12, "pad_token_id": None}
    space.downloads.check_config("me/x", config)
    with pytest.raises(DataError, match=f"me/x .*{said}"):
        space.downloads.check_config("me/x", {**config, **values})


@pytest.mark.parametrize("text", ["[" * 10**5, "{", "\ud800"])
def test_configs_that_are_no_json(space, tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"the config\.json of me/x cannot be read"):
        space.downloads._read_json("me/x", tmp_path / "config.json")
    for other in (None, [], 1, "x"):
        with pytest.raises(DataError, match="a model without a class"):
            space.downloads.check_config("me/x", other)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10_000}, "builds more than 20,000 (modules|tensors), and was stopped there"),
        ({"vocab_size": 10**9}, "builds more than 150,000,000 parameters"),
        ({"id2label": {str(i): "a" for i in range(101)}}, "knows 101 classes: expected at most 100"),
        ({"id2label": {"0": "score"}}, "does not choose one of several classes"),
        ({"id2label": 3}, "cannot be loaded"),
        ({"hidden_size": "x"}, "cannot be loaded"),
        ({"hidden_size": 0}, "cannot be loaded"),
        ({"model_type": "unknown", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot be loaded"),
    ],
)
def test_models_that_are_refused_unbuilt(space, tiny, tmp_path, values, said):
    folder = shutil.copytree(tiny[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(DataError, match=said) as error:
        space.models.load_dense("me/x", folder, None, 150_000_000)
    assert str(folder) not in str(error.value)


def test_weights_of_another_architecture_are_refused(space, tiny, tmp_path):
    folder = shutil.copytree(tiny[0], tmp_path / "model")
    models.tiny_distilbert().config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["DistilBertForSequenceClassification"]})
    )
    with pytest.raises(DataError, match=r"would be random"):
        space.models.load_dense("me/x", folder, None, 150_000_000)


def test_whole_layers_are_seen_to_go(space, dense, tmp_path):
    config = PruningConfig(0.5, granularity="layer", scope="global")
    pruned = space.models.prune_copy(dense, config, ["w1"], tmp_path / "out", silent)
    gone = [share for name, share in pruned.removed_shares.items() if ".layer." in name]
    assert sorted(set(gone)) == [0, 1]
    before, after = pruned.histograms
    assert before.counts.sum() > 1.5 * after.counts.sum()


@pytest.mark.parametrize("lock", ["reading", "turn"])
def test_what_is_being_packed_goes_afterwards(space, make, lock):
    sessions = make()
    pruned = sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)
    with pruned.reading if lock == "reading" else pruned.child.turn:
        sessions.forget("a")
        assert pruned.folder.exists()
    for _ in range(100):
        if not pruned.folder.exists():
            break
        time.sleep(0.05)
    assert not pruned.folder.exists()


def test_a_space_without_sentences_prunes(make):
    sessions = make(data=None, name="mine")
    sessions.prune("a", "mine", PruningConfig(0.5, criterion="wanda"), silent)
    same, n = sessions.measure("a", silent).measured["agreement"]
    assert 0 <= same <= n == 2
    assert sessions.of("a").numbers()["evaluation"] is None
    with pytest.raises(DataError, match="no labelled sentences"):
        sessions.sweep("a", [("Single weights", "magnitude", False)], [0.5], 2, silent, [])


def test_what_was_measured_before_the_time_is_up_is_kept(make, space):
    sessions = make()
    sessions.prune("a", space.sessions.DEMO, PruningConfig(0.5), silent)

    def cancel(title, share):
        if title == "Choosing kernels that skip zeros":
            sessions.jobs.cancel("a")

    with pytest.raises(HfPruneError, match="cancelled"):
        sessions.measure("a", cancel)
    assert {"evaluation", "plain"} <= set(sessions.of("a").measured)


def test_push_of_the_space(hub, clients, tiny):
    def client(*words, **options):
        return clients[1](hub, "space", *words, **options)

    options = ["--model", str(tiny[0]), "--data", str(tiny[1])]
    (tiny[0] / ".env").write_text("secret")
    said = client("--push", "mine", *options, "--dry-run")
    assert "Nothing was uploaded" in said
    assert ("space", f"{USER}/mine") not in hub.repos
    said = client("--push", "mine", *options, "--private")
    assert f"{hub.url}/spaces/{USER}/mine" in said
    repo = hub.repos["space", f"{USER}/mine"]
    assert repo.private
    assert repo.sdk == "gradio"
    files = hub.files(f"{USER}/mine", kind="space")
    assert files["app.py"] == (SPACE / "app.py").read_bytes()
    assert files["hf_prune/pipeline.py"] == (ROOT / "hf_prune" / "pipeline.py").read_bytes()
    assert {
        "README.md",
        "requirements.txt",
        "results.json",
        "demo/model/model.safetensors",
        "demo/data/dev.tsv",
    } <= set(files)
    assert not [n for n in files if "__pycache__" in n or n.startswith("hf_prune/space/") or n.endswith(".env")]
    assert "demo/model/.env" in said
    assert json.loads(files["demo/names.json"]) == {"name": "model", "data_name": "data"}
    hub.put(f"{USER}/mine", {**files, "hf_prune/old.py": b"", "notes.md": b""}, kind="space")
    client("--push", f"{USER}/mine", *options)
    files = hub.files(f"{USER}/mine", kind="space")
    assert "hf_prune/old.py" not in files
    assert "notes.md" in files  # not ours
    hub.put(f"{USER}/other", {"app.py": b"print()"}, kind="space")
    assert "holds app.py and no hf_prune" in client("--push", f"{USER}/other", *options, code=1)
    assert hub.files(f"{USER}/other", kind="space") == {"app.py": b"print()"}
    assert "may not write" in client("--push", "somebody/else", *options, code=1)
    hub.put(f"{USER}/model", {p.name: p.read_bytes() for p in tiny[0].iterdir()})
    assert "is not a folder" in client("--push", "mine", "--model", f"{USER}/model", code=1)
    assert "--data goes with --model" in client("--data", str(tiny[1]), code=1)
