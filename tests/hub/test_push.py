"""Push and load with the real client library, against a Hub on the loopback interface."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_prune import (
    CheckpointError,
    HubError,
    prunable,
    prune,
    push_checkpoint,
    shrink,
)
from hf_prune.hub.card_metadata import read_facts
from hf_prune.hub.describe import describe_model
from hf_prune.utils.files import write_json
from tests import models
from tests.loopback_hub import TOKEN, USER, client_environment, listening, run_client
from tests.support.fresh_process import ForkServer

REPO = f"{USER}/pruned"


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """A function that renews the hub, the home of its clients, and where their processes are forked."""
    home = tmp_path_factory.mktemp("clients") / "home"
    imported = ("hf_prune", "pydantic.main", "typer.main", "transformers.pipelines", "transformers.trainer")
    with listening() as renew, ForkServer(*imported, **client_environment(renew(), home)) as processes:
        yield renew, home, processes


@pytest.fixture
def hub(clients):
    return clients[0]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pruned classifier with its tokenizer, a shrunk one, and one of another kind."""
    root = tmp_path_factory.mktemp("hub")
    model = prune(prunable(models.tiny_classifier()), 0.5)
    model.save_pretrained(root / "pruned")
    models.tiny_tokenizer().save_pretrained(root / "pruned")
    (root / "pruned" / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (root / "pruned" / "training_args.bin").write_bytes(b"a pickle")
    (root / "pruned" / "checkpoint-5").mkdir()
    (root / "pruned" / "checkpoint-5" / "model.safetensors").write_bytes(b"of a training")
    small = shrink(prune(models.tiny_classifier(), 0.5, granularity=("head", "neuron"), scope="global"))
    small.save_pretrained(root / "small")
    models.tiny_llama().save_pretrained(root / "llama")
    return root


@pytest.fixture
def client(hub, clients):
    _, home, processes = clients

    def run(*command, **options):
        return run_client(hub, home, *map(str, command), processes=processes, **options)

    yield run
    shutil.rmtree(home, ignore_errors=True)


def test_push_and_everything_that_loads(hub, client, folders, tmp_path):
    """One commit with all files but pickles; then plain loading, pipelines, snapshots, private and shrunk models."""
    folder = tmp_path / "named"
    said = client("push", folders / "pruned", "pruned", "--private", "--json")
    result = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert result["repo_id"] == REPO
    assert result["skipped"] == ["checkpoint-5/model.safetensors", "training_args.bin"]
    stored = hub.files(REPO)
    assert set(stored) - {".gitattributes"} == set(result["files"])
    for name, size in result["files"].items():
        assert stored[name] == (folders / "pruned" / name).read_bytes()
        assert len(stored[name]) == size
    assert sum(request.startswith("POST") and "/commit/" in request for request in hub.log) == 1
    assert hub.repos["model", REPO].private

    hub.put(f"{USER}/small", {p.name: p.read_bytes() for p in (folders / "small").iterdir()})
    client(
        f"""
import hf_prune
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification, pipeline
from hf_prune import AutoPrunedModelForSequenceClassification, MaskStore

plain = AutoModelForSequenceClassification.from_pretrained("{REPO}")
model = AutoPrunedModelForSequenceClassification.from_pretrained("{REPO}")
assert all(not model.get_parameter(n)[~m].any() for n, m in MaskStore.of(model).masks.items())
assert len(MaskStore.of(model).masks) == 14
assert pipeline("text-classification", "{REPO}")("w1 w2")[0]["label"].startswith("LABEL_")
assert "training_args.bin" not in str(list(__import__("pathlib").Path(snapshot_download("{REPO}")).iterdir()))
small = AutoModelForSequenceClassification.from_pretrained("{USER}/small")
assert small.num_parameters() < plain.num_parameters()

answer = model.push_to_hub("compressed", compressed=True, revision="packed", commit_message="Smaller")
assert answer.repo_id == "compressed" or answer.repo_id.endswith("/compressed")
again = AutoPrunedModelForSequenceClassification.from_pretrained(answer.repo_id, revision="packed")
assert all((a == b).all() for a, b in zip(again.parameters(), model.parameters()))
request = model.push_to_hub("{REPO}", create_pr=True, commit_message="A proposal", facts={{"license": "mit"}})
assert request.url.endswith("/discussions/1"), request.url
assert AutoModelForSequenceClassification.from_pretrained("{REPO}", revision="refs/pr/1")

model.save_pretrained("{folder}", push_to_hub=True, private=True)
model.save_pretrained("{folder}", push_to_hub=True, repo_id="{USER}/saved", token="{TOKEN}")
"""
    )
    assert "config.json" in hub.files(f"{USER}/compressed", "packed")
    assert "config.json" not in hub.files(f"{USER}/compressed")
    assert hub.repos["model", REPO].commits[-1].message == "A proposal"
    assert hub.files(REPO) == stored  # the proposal is not in main
    card = hub.files(REPO, "refs/pr/1")["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n")
    assert "# A card" in card
    assert "Zeros alone bring no speed-up" in card
    assert "What was counted is right." in client("verify", f"{USER}/compressed", "--revision", "packed")
    for name, private in (("named", True), ("saved", False)):
        saved = hub.files(f"{USER}/{name}")
        assert {"model.safetensors", "pruning_masks.safetensors"} <= set(saved)
        assert b"weights that were pruned are zero" in saved["README.md"]
        assert hub.repos["model", f"{USER}/{name}"].private is private


@pytest.mark.parametrize("compressed", [False, True])
def test_from_pruning_to_verified_repository(hub, client, tmp_path, compressed):
    """Pruned, saved with a card, pushed, loaded elsewhere by its name: the same bits; a flipped byte is found."""
    model = prune(prunable(models.tiny_classifier(seed=2)), 0.6)
    batch = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        save_file({"logits": model(batch).logits}, tmp_path / "logits.safetensors")
    model.save_pretrained(tmp_path / "out", compressed=compressed)
    describe_model(model, tmp_path / "out", license="mit")
    client("push", tmp_path / "out", "pruned")
    client(
        f"""
import hf_prune, torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("{REPO}")
with torch.no_grad():
    logits = model(torch.arange(1, 13).view(2, 6)).logits
expected = load_file("{tmp_path / "logits.safetensors"}")["logits"]
assert (logits.view(torch.uint8) == expected.view(torch.uint8)).all()
"""
    )
    assert "What was counted is right." in client("verify", REPO)
    files = hub.files(REPO)
    weights = bytearray(files["model.safetensors"])
    weights[8 + int.from_bytes(weights[:8], "little")] ^= 1  # of a bias
    hub.put(REPO, {**files, "model.safetensors": bytes(weights)})
    said = client("verify", REPO, code=1)
    assert ("its bytes do not match its checksum" if compressed else "SHA-256 of model.safetensors") in said


def test_spaces_and_slow_answers(hub, client, folders):
    hub.fail("GET .*/resolve/.*/config.json", "slow")
    hub.put(REPO, {p.name: p.read_bytes() for p in (folders / "pruned").iterdir() if p.is_file()})
    client(
        f"""
from huggingface_hub import HfApi, snapshot_download
from pathlib import Path
api = HfApi()
api.create_repo("{USER}/app", repo_type="space", space_sdk="gradio")
api.upload_file(path_or_fileobj=b"print()", path_in_repo="app.py", repo_id="{USER}/app", repo_type="space")
assert (Path(snapshot_download("{USER}/app", repo_type="space")) / "app.py").read_bytes() == b"print()"
from transformers import AutoConfig
assert AutoConfig.from_pretrained("{REPO}").model_type == "bert"
"""
    )
    assert hub.repos["space", f"{USER}/app"].sdk == "gradio"
    assert "does not exist, or is private" in client("verify", f"{USER}/nothing", code=1)


def test_cards_of_pushed_folders(hub, client, folders, tmp_path):
    """One is made where there is a report; the words of the repository's stay; one of other files is refused."""
    folder = shutil.copytree(folders / "small", tmp_path / "gpt2")
    write_json(folder / "sparsity_report.json", {})  # which is not believed
    hub.put(f"{USER}/made", {"README.md": b"# Words of the repository\n"})
    client("push", folder, "made")
    card = hub.files(f"{USER}/made")["README.md"].decode()
    assert "# Words of the repository" in card
    assert "Whole units were taken out" in card
    assert not (folder / "README.md").exists()
    client("card", folder, "--write")
    said = client("push", folder, f"{USER}/made", "--dry-run")
    assert "# Words of the repository" in said
    assert f'from_pretrained("{USER}/made")' in said
    assert "gpt2" not in said.replace(str(folder), "")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    commits = len(hub.repos["model", f"{USER}/made"].commits)
    assert "describes other files than those beside it" in client("push", folder, "made", code=1)
    for name in ("README.md", "sparsity_report.json", "pruning_card.json"):
        (folder / name).unlink()
    client("push", folder, "made")
    files = hub.files(f"{USER}/made")
    card = files["README.md"].decode()
    assert "# Words of the repository" in card
    assert (read_facts(card), "Whole units" in card) == ({}, False)
    assert "sparsity_report.json" not in files
    assert len(hub.repos["model", f"{USER}/made"].commits) == commits + 1


def test_a_new_branch_begins_as_the_main_one(hub, client, folders):
    """So what is in the way there is in the way here."""
    client("push", folders / "pruned", REPO)
    hub.put(REPO, {**hub.files(REPO), "model-00001-of-00002.safetensors": b"old", "models/a.safetensors": b"other"})
    assert "exists already and is public" in client(
        "push", folders / "pruned", REPO, "--private", "--revision", "secret", code=1
    )
    assert "holds a model of type 'bert', and" in client("push", folders / "llama", REPO, "--revision", "v2", code=1)
    assert set(hub.repos["model", REPO].refs) == {"main"}
    client("push", folders / "small", REPO, "--revision", "v2")
    files = hub.files(REPO, "v2")
    assert {"model.safetensors", "models/a.safetensors"} <= set(files)
    assert not {"pruning_masks.safetensors", "model-00001-of-00002.safetensors"} & set(files)
    assert "pruning_masks.safetensors" in hub.files(REPO)


def test_a_commit_is_not_made_twice(hub, client, folders):
    """When the answer is lost, it is looked for and found; a proposal too, and not an earlier one of the same files."""
    client("push", folders / "pruned", REPO)
    commits = len(hub.repos["model", REPO].commits)
    for options, place in (([], "/commit/"), (["--create-pr"], "/discussions/1"), (["--create-pr"], "/discussions/2")):
        hub.fail("POST .*/commit/", "lost")
        said = client("push", folders / "pruned", REPO, *options)
        assert "Uploaded" in said
        assert f"{hub.url}/{REPO}{place}" in said
        commits += 1
        assert len(hub.repos["model", REPO].commits) == commits


def test_a_proposal_that_was_not_made_is_not_found(hub, client, folders):
    """Though there is an earlier one of the same files."""
    client("push", folders / "pruned", REPO)
    assert "/discussions/1" in client("push", folders / "pruned", REPO, "--create-pr")
    commits = len(hub.repos["model", REPO].commits)
    hub.fail("POST .*/commit/", "drop")
    assert "the Hub cannot be reached" in client("push", folders / "pruned", REPO, "--create-pr", code=1)
    assert len(hub.repos["model", REPO].commits) == commits


def test_a_card_that_cannot_be_asked_for_is_not_overwritten(hub, client, folders):
    hub.put(REPO, {"README.md": b"# Words\n"})
    hub.fail("(GET|HEAD) .*/resolve/.*/README.md", "500", times=100)
    assert "the Hub cannot be reached" in client("push", folders / "pruned", REPO, code=1)
    assert hub.files(REPO)["README.md"] == b"# Words\n"


def test_private_means_private(hub, client, folders):
    hub.put(REPO, {"README.md": b"# Public\n"})
    before = hub.files(REPO)
    assert "public: make it private" in client("push", folders / "pruned", REPO, "--private", "--force", code=1)
    assert hub.files(REPO) == before


def test_faults(hub, client, folders):
    """Errors of the server pass, what has arrived is not sent again, and damage in a download is noticed."""
    hub.fail("POST .*/commit/", "500", times=2)
    hub.fail("POST /api/repos/create", "500")
    client("push", folders / "pruned", REPO)
    assert sum("/commit/" in request for request in hub.log) == 3

    uploads = [request for request in hub.log if request.startswith("PUT")]
    assert len(uploads) == 2  # the weights and the masks
    hub.log.clear()
    hub.fail("POST .*/commit/", "500", times=10)
    said = client("push", folders / "small", f"{USER}/small", code=1)
    assert "the Hub refused the request" in said
    assert "Traceback" not in said
    assert sum(request.startswith("PUT") for request in hub.log) == 1
    hub.faults.clear()
    client("push", folders / "small", f"{USER}/small")
    assert sum(request.startswith("PUT") for request in hub.log) == 1  # not again
    assert "config.json" in hub.files(f"{USER}/small")

    hub.blobs.clear()
    hub.log.clear()
    hub.fail("PUT /lfs/", "drop", times=2)
    client("push", folders / "small", f"{USER}/other")
    assert sum(request.startswith("PUT") for request in hub.log) == 3

    before = {name: len(repo.commits) for (_, name), repo in hub.repos.items()}
    assert "holds a model of type 'bert', and" in client("push", folders / "llama", REPO, code=1)
    assert before == {name: len(repo.commits) for (_, name), repo in hub.repos.items()}


def test_damaged_downloads(hub, client, folders):
    """A cut connection is continued; wrong bytes are refused, by the format or by us."""
    files = {p.name: p.read_bytes() for p in (folders / "pruned").iterdir() if p.is_file()}
    hub.put(REPO, files)
    hub.fail("GET .*/resolve/.*/model.safetensors", "drop")
    load = f"from hf_prune import AutoPrunedModelForSequenceClassification as A; A.from_pretrained('{REPO}')"
    client(load)
    hub.put(f"{USER}/damaged", files)
    hub.fail("GET .*/resolve/.*/pruning_masks.safetensors", "damage")
    load = f"from hf_prune import AutoPrunedModelForSequenceClassification as A; A.from_pretrained('{USER}/damaged')"
    assert "CheckpointError" in client(load, code=1)


def test_commands_take_hub_ids(hub, client, folders, tmp_path):
    """Evaluate and sweep with a model and data from the Hub."""
    hub.put(REPO, {p.name: p.read_bytes() for p in (folders / "pruned").iterdir() if p.is_file()})
    for name, n, seed in (("train", 40, 1), ("validation", 30, 0)):
        rows = models.tiny_sentences(n, seed)
        lines = [f"{text}\t{label}" for text, label in zip(rows["sentence"], rows["label"], strict=True)]
        files = hub.files(f"{USER}/data", kind="dataset") if ("dataset", f"{USER}/data") in hub.repos else {}
        files[f"{name}.tsv"] = "\n".join(["sentence\tlabel", *lines, ""]).encode()
        hub.put(f"{USER}/data", files, kind="dataset")
    said = client("evaluate", REPO, "--data", f"{USER}/data", "--json")
    found = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert found["evaluation"]["n"] == 30
    models.tiny_classifier().save_pretrained(tmp_path / "dense")
    models.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    hub.put(f"{USER}/dense", {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()})
    said = client("sweep", f"{USER}/dense", "--data", f"{USER}/data", "--sparsity", "0.6,0.7", "--out", "swept")
    assert "60 %" in said


def test_repositories_of_other_kinds_and_people(hub, client, folders):
    hub.put(REPO, {"model.onnx": b"something else", "README.md": b"# Mine"})
    before = hub.files(REPO)
    said = client("push", folders / "pruned", REPO, code=1)
    assert "holds model.onnx and no config.json" in said
    assert hub.files(REPO) == before
    assert "may not write to somebody/else" in client("push", folders / "pruned", "somebody/else", code=1)
    assert "nobody is logged in, or the Hub does not know" in client(
        "push", folders / "pruned", REPO, "--force", token=None, code=1
    )
    said = client("push", folders / "pruned", REPO, "--dry-run", "--force")
    assert "Nothing was uploaded" in said
    assert "# A card" in said
    assert hub.files(REPO) == before
    client("push", folders / "pruned", REPO, "--force")
    assert {"model.onnx", "config.json"} <= set(hub.files(REPO))
    old = {**hub.files(REPO), "model-00001-of-00002.safetensors": b"an old shard"}
    hub.put(REPO, old)
    client("push", folders / "pruned", REPO)
    assert "model-00001-of-00002.safetensors" not in hub.files(REPO)
    assert "model.onnx" in hub.files(REPO)


def test_what_is_pushed_names_its_base_and_takes_its_license(hub, client, folders, tmp_path):
    """The author's words of a repository that is named without its owner, or of a branch, stay too."""
    files = {p.name: p.read_bytes() for p in (folders / "llama").iterdir()}
    hub.put("base/llama", {**files, "README.md": b"---\nlicense: other\nlicense_link: LICENSE.txt\n---\n"})
    hub.put(f"{USER}/mine", {"README.md": b"# My words\n"})
    client(
        f"""
from hf_prune import AutoPrunedModelForCausalLM, PruningCardData
model = AutoPrunedModelForCausalLM.from_pretrained("base/llama").prune(0.5)
model.push_to_hub("mine", revision="next")
model.push_to_hub("plain", facts={{"base_model": "base/nothing"}})
model.save_pretrained("{tmp_path / "folder"}")
AutoPrunedModelForCausalLM.from_pretrained("{tmp_path / "folder"}").push_to_hub("local")
"""
    )
    card = hub.files(f"{USER}/mine", "next")["README.md"].decode()
    assert "# My words" in card
    assert "base_model: base/llama\n" in card
    assert "license: other\nlicense_link: https://huggingface.co/base/llama/blob/main/LICENSE.txt\n" in card
    assert hub.files(f"{USER}/mine")["README.md"] == b"# My words\n"
    card = hub.files(f"{USER}/plain")["README.md"].decode()
    assert "base_model: base/nothing" in card
    assert "license:" not in card
    card = hub.files(f"{USER}/local")["README.md"].decode()
    assert "base_model" not in card
    assert "license:" not in card


def test_the_trainer_pushes_our_card(hub, client, tmp_path):
    client(
        f"""
from pathlib import Path
from tests.training.test_trainer import Sentences, arguments, config, models
from hf_prune import PruningTrainer
run = PruningTrainer(
    model=models.tiny_bert(), train_dataset=Sentences(), pruning_config=config(),
    args=arguments("{tmp_path / "out"}", push_to_hub=True, hub_model_id="{USER}/trained"),
)
run.train()
run.push_to_hub()
card = Path("{tmp_path / "out" / "README.md"}")
text = card.read_text()
begin = text.index("<!-- This model card")
end = text.index("-->", begin) + 3
card.write_text(text[:begin] + text[end:] + "\\nMy own words.\\n")
run.push_to_hub()
"""
    )
    assert "My own words." in hub.files(f"{USER}/trained")["README.md"].decode()
    files = hub.files(f"{USER}/trained")
    assert {"model.safetensors", "pruning_masks.safetensors", "sparsity_report.json"} <= set(files)
    card = files["README.md"].decode()
    assert "generated_from_trainer" in card
    assert "weights that were pruned are zero" in card
    assert "What was counted is right." in client("verify", f"{USER}/trained")


def test_folders_that_are_no_checkpoints(tmp_path, folders):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        push_checkpoint(tmp_path, REPO)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickles are never uploaded"):
        push_checkpoint(tmp_path, REPO)
    (tmp_path / "model.safetensors").write_bytes((folders / "pruned" / "model.safetensors").read_bytes())
    (tmp_path / "secrets").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="links to a file outside"):
        push_checkpoint(tmp_path, REPO)


def test_a_token_in_a_message_is_not_printed():
    from hf_prune.hub.client import _clean

    assert TOKEN not in _clean(RuntimeError(f"denied for {TOKEN} at\n x"))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://does-not-exist.invalid"])
def test_a_dry_run_needs_no_hub(folders, monkeypatch, endpoint):
    """It asks once whether the Hub answers, and not again and again."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("tried again"))
    monkeypatch.setattr("hf_prune.hub.push.call_hub", lambda *_, **__: pytest.fail("asked all the same"))
    result = push_checkpoint(folders / "pruned", REPO, dry_run=True)
    assert not result.asked
    assert "model.safetensors" in result.files
    assert "The Hub did not say what that repository holds" in str(result)


@pytest.mark.parametrize("name", ["a b/c", "me/x/y", "me/-x", "me/x.git", "me/" + "x" * 97, "", "me/a--b"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_names_that_no_repository_can_have(folders, monkeypatch, name, dry_run):
    monkeypatch.setattr("hf_prune.hub.push.call_hub", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(HubError, match=rf"^{re.escape(repr(name))} is not a valid repository name: "):
        push_checkpoint(folders / "pruned", name, dry_run=dry_run)


def test_a_hub_that_fails_is_asked_once_by_a_dry_run(hub, folders, monkeypatch):
    """A proxy may answer in its place."""
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(kwargs)
        raise ConnectionError("no")

    monkeypatch.setattr("hf_prune.hub.upload.hub_answers", lambda _: True)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", failing)
    assert not push_checkpoint(folders / "pruned", REPO, dry_run=True).asked
    assert len(calls) == 1
    assert calls[0]["timeout"] <= 2


def test_a_commit_whose_answer_is_lost_has_arrived(hub, client, folders):
    """A second try finds another head than it began with; what is there is what was sent."""
    hub.put(REPO, {"config.json": (folders / "pruned" / "config.json").read_bytes(), "model.safetensors": b"old"})
    hub.fail("POST .*/commit/", "lost")
    said = client("push", folders / "pruned", REPO, "--json")
    said = json.loads(said[said.index("{") : said.rindex("}") + 1])
    commits = hub.repos["model", REPO].commits
    assert said["commit"] == commits[-1].oid
    assert said["url"].endswith(f"{REPO}/commit/{commits[-1].oid}")
    assert hub.files(REPO)["model.safetensors"] == (folders / "pruned" / "model.safetensors").read_bytes()


def test_commands_load_the_revision_that_is_asked_for(hub, client, folders, tmp_path):
    """Config, weights, masks and tokenizer, all of the same revision; of another checkpoint, the main branch."""
    dense = tmp_path / "dense"
    models.tiny_classifier().save_pretrained(dense)
    models.tiny_tokenizer().save_pretrained(dense)
    client("push", dense, REPO, "--private")
    client("push", folders / "pruned", REPO, "--revision", "sparse")

    def sparsity(*options):
        said = client("report", REPO, "--json", *options)
        return json.loads(said[said.index("{") : said.rindex("}") + 1])["target_sparsity"]

    assert sparsity() < 0.01
    assert sparsity("--revision", "sparse") == pytest.approx(0.5, abs=0.001)
    client("prune", REPO, "--revision", "sparse", "--sparsity", "0.6", "--out", tmp_path / "out")
    assert "revision: sparse" in (tmp_path / "out" / "hf_prune_run.yaml").read_text()
    assert "nowhere" in client("report", REPO, "--revision", "nowhere", code=1)


def test_weights_quantized_elsewhere_are_refused_as_by_the_other_commands(client, tmp_path):
    models.tiny_classifier().save_pretrained(tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    for options in (["--dry-run"], []):
        assert "is quantized with 'gptq': " in client("push", tmp_path / "q", REPO, *options, code=1)
