"""Upload a checkpoint or a Space to the Hub, in one commit. Nothing else here uploads anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

from hf_prune.card_data import PruningCardData, load_card_data
from hf_prune.cards import merge_cards, read_facts, render_card, without_facts
from hf_prune.checkpoint import CARD_DATA, REPORTS
from hf_prune.errors import CheckpointError, DataError, HubError
from hf_prune.files import MARK, PICKLES, read_config, refuse_links
from hf_prune.front_matter import read_card
from hf_prune.hub import TRIES, answers, asking, card_of, check_repo_id, full_repo_id
from hf_prune.remote_code import FILE
from hf_prune.tables import format_count, format_table
from hf_prune.verification import check_card, check_text

_SECONDS = 2.0  # that a dry run waits for an answer
_OWN = (".gitattributes", "README.md")  # what a new repository may have
# Of an earlier checkpoint: weights, what was counted in them, what reads them.
_EARLIER = re.compile(
    r"(model[^/]*|pruning_masks)\.safetensors|model[^/]*\.safetensors\.index\.json|"
    + "|".join(map(re.escape, (*REPORTS, CARD_DATA, FILE)))
)


@dataclass(frozen=True)
class PushResult:
    """What was uploaded, or would be.

    Args:
        repo_id: The repository.
        files: Sizes in bytes by path.
        removed: Weights of an earlier checkpoint that the commit deletes.
        skipped: Files of the folder that are not uploaded: pickles, hidden files and subfolders of checkpoints.
        commit: The commit's id; None if nothing was uploaded.
        url: Where to look at it.
        card: The model card, if there is one.
        asked: Whether the Hub said what the repository holds; of a dry run, it need not have answered.
    """

    repo_id: str
    files: dict[str, int]
    removed: tuple[str, ...]
    skipped: tuple[str, ...]
    commit: str | None
    url: str | None
    card: str | None
    asked: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "removed": list(self.removed), "skipped": list(self.skipped)}

    def __str__(self) -> str:
        rows = [[name, f"{format_count(size)}B"] for name, size in self.files.items()]
        rows += [[name, "deleted"] for name in self.removed]
        lines = [format_table(["file", "size"], rows, left=1)]
        if self.skipped:
            lines.append(f"Not uploaded, since they are pickles, hidden or of a training: {', '.join(self.skipped)}.")
        total = f"{format_count(sum(self.files.values()))}B"
        if self.commit is None:
            lines.append(f"{len(self.files)} files, {total}, would go to {self.repo_id}. Nothing was uploaded.")
            if not self.asked:
                lines.append("The Hub did not say what that repository holds, so what would be replaced is not known.")
            if self.card:
                lines.append(f"\nThe card:\n\n{self.card}")
        else:
            lines.append(f"Uploaded {len(self.files)} files, {total}: {self.url}")
        return "\n".join(lines)


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    dry_run: bool = False,
    commit_message: str = "Upload pruned model",
    token: str | bool | None = None,
    card: PruningCardData | None = None,
    model: Any = None,
) -> PushResult:
    """Upload a checkpoint's folder to a model repository, all in one commit.

    A repository that does not exist is created. Large files that arrived before a fault are not sent again by the next
    try. Weights of an earlier checkpoint that the new one does not have are deleted by the same commit, which is
    refused if somebody else commits in the meantime.

    The card is the folder's ``README.md``; one that was made for the folder's name gets that of the repository. Where
    it has no words of its author, those of the repository's card stay. If it is one of ours, everything in it is
    counted again first, as :func:`hf_prune.verify_checkpoint` does.

    Args:
        folder: A checkpoint: ``config.json`` and weights as safetensors.
        repo_id: ``owner/name``, or a name for a repository of your own.
        private: Make a new repository private; None takes the owner's default. A public one is refused then.
        revision: A branch, made if it does not exist; None is ``main``.
        create_pr: Open a pull request in place of committing to the branch.
        force: Also overwrite a repository that holds something else.
        dry_run: Upload nothing; say what would be.
        commit_message: Of the commit.
        token: Of the Hub; None takes the one you are logged in with.
        card: What to make a card of for a folder that has none.
        model: The model that the folder holds, if it is at hand: the card is compared with it; None loads it.

    Returns:
        What was uploaded; print it.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or its card is not right, or would not be beside the words
            of the repository's card.
        DataError: If the metadata of a card is no YAML.
        HubError: If nobody is logged in, may not write there, the Hub cannot be reached, or the repository holds
            something else, or is public where ``private`` is asked for. Its files are as they were.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    files, skipped = _files(folder)
    api = HfApi(token=token)
    check_card(folder, model)
    if not dry_run:
        repo_id = full_repo_id(repo_id, token)
    found = _present(api, repo_id, revision, force, folder, private=private, dry_run=dry_run)
    there, parent = found or ([], None)
    theirs = _their_card(repo_id, revision, token, dry_run=dry_run) if found is not None else None
    text, described = _card(folder, repo_id, card, theirs)
    contents: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if text is not None:
        contents["README.md"] = text.encode()
        sizes["README.md"] = len(contents["README.md"])
    if described is not None:
        contents[CARD_DATA] = (json.dumps(described.to_dict(), indent=2) + "\n").encode()
        sizes[CARD_DATA] = len(contents[CARD_DATA])
    removed = tuple(sorted(name for name in there if _EARLIER.fullmatch(name) and name not in contents))
    if dry_run:
        return PushResult(repo_id, sizes, removed, skipped, None, None, text, found is not None)
    asking(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    if revision is not None and revision != "main":
        asking(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    earlier = asking(lambda: _proposals(api, repo_id), repo_id) if create_pr else {}
    try:
        commit = asking(
            lambda: api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            ),
            repo_id,
            tries=1 if create_pr else TRIES,  # what has a parent cannot be committed twice
        )
    except HubError:  # perhaps the commit is there, and only the answer was lost
        if create_pr:
            found_there = _proposal_with(api, repo_id, contents, removed, earlier)
        else:
            found_there = _head_with(api, repo_id, revision, contents, removed, parent)
        if found_there is None:
            raise
        oid, place = found_there
        return PushResult(repo_id, sizes, removed, skipped, oid, f"{api.endpoint}/{repo_id}/{place}", text)
    return PushResult(repo_id, sizes, removed, skipped, commit.oid, commit.pr_url or commit.commit_url, text)


def push_space(
    app: Path,
    repo_id: str,
    *,
    model: str,
    data: str | None,
    names: Mapping[str, str] | None = None,
    private: bool | None = None,
    force: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> PushResult:
    """Make or update a Space: the app, this very hf_prune, and a model with sentences, in one commit.

    Args:
        app: The folder of the app.
        repo_id: ``owner/name``, or a name for a Space of your own.
        model: Folder of the model.
        data: Folder of the sentences; None for none.
        names: What the app calls the two, as ``name`` and ``data_name``; empty for the demo's.
        private: Make a new Space private; None takes the owner's default.
        force: Also overwrite a Space that holds something else.
        dry_run: Upload nothing; say what would be.
        token: Of the Hub; None takes the one you are logged in with.

    Raises:
        DataError: If a folder is not there.
        HubError: As :func:`push_checkpoint`.
    """
    check_repo_id(repo_id)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(app.iterdir()) if path.is_file()}
    skipped: list[str] = []
    package = Path(__file__).parent
    for folder, name in ((package, "hf_prune"), (Path(model), "demo/model"), (Path(data or ""), "demo/data")):
        if data is None and name == "demo/data":
            continue
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder: a Space needs the files themselves; download them first")
        found, left = _to_upload(folder)
        files |= {f"{name}/{path}": there for path, there in found.items() if not _is_made(folder == package, path)}
        skipped += [f"{name}/{path}" for path in left]
    if names:
        files["demo/names.json"] = json.dumps(names).encode()
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    api = HfApi(token=token)
    if not dry_run:
        repo_id = full_repo_id(repo_id, token)
    info, asked = None, not dry_run or answers(repo_id)
    once: dict[str, Any] = {"timeout": _SECONDS} if dry_run else {}
    tries = 1 if dry_run else TRIES
    try:
        if asked:
            info = asking(lambda: api.repo_info(repo_id, repo_type="space", **once), repo_id, missing=True, tries=tries)
    except HubError:
        if not dry_run:
            raise
        asked = False  # whether it exists is not known then
    _check_private(repo_id, info, private)
    there = [] if info is None else [each.rfilename for each in info.siblings or []]
    if not force and set(there) - set(_OWN) and "hf_prune/__init__.py" not in there:
        raise HubError(
            f"the Space {repo_id} holds {', '.join(sorted(set(there) - set(_OWN))[:3])} and no hf_prune: choose "
            f"another name, or pass --force to overwrite it"
        )
    removed = tuple(sorted(n for n in there if n.startswith(("hf_prune/", "demo/")) and n not in files))
    if dry_run:
        return PushResult(repo_id, sizes, removed, tuple(skipped), None, None, None, asked)
    asking(
        lambda: api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True), repo_id
    )
    operations: list[Any] = [CommitOperationAdd(n, f if isinstance(f, bytes) else str(f)) for n, f in files.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    commit = asking(
        lambda: api.create_commit(repo_id, operations, repo_type="space", commit_message="Update the Space"), repo_id
    )
    return PushResult(repo_id, sizes, removed, tuple(skipped), commit.oid, f"{api.endpoint}/spaces/{repo_id}", None)


def _their_card(repo_id: str, revision: str | None, token: str | bool | None, *, dry_run: bool) -> str | None:
    """The card that a branch has, or else the repository."""
    try:
        cards = (card_of(repo_id, revision=each, token=token) for each in dict.fromkeys((revision, None)))
        return next(filter(None, cards), None)
    except HubError:
        if not dry_run:
            raise
        return None  # what is there is not known then


def _card(
    folder: Path, repo_id: str, card: PruningCardData | None, theirs: str | None
) -> tuple[str | None, PruningCardData | None]:
    """The card to upload, beside one that the repository has, and what it is rendered from if that is new.

    Without a card, that of the repository stays as it is.
    """
    path, data = folder / "README.md", card
    mine = read_card(path) if path.is_file() else None if card is None else render_card(card)
    if mine is None:
        return None if theirs is None else without_facts(theirs), None
    if path.is_file():
        data = load_card_data(folder) if read_facts(mine) else None
        if data is not None and data.name == folder.resolve().name:
            data = dataclasses.replace(data, name=repo_id)
            mine = render_card(data, mine)
    text = mine if theirs is None else merge_cards(mine, theirs)
    if data is not None:
        which = (
            f"the card of {folder} beside the words of the card that {repo_id} has"
            if theirs
            else f"the card of {folder}"
        )
        check_text(text, data, f"{which} is not right", "edit README.md there first, or in this folder")
    return text, data


def _files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What is uploaded, by path in the repository, and what is not."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: expected the folder of a checkpoint")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no weights as safetensors: expected a checkpoint saved with save_pretrained; pickles are "
            f"never uploaded"
        )
    return _to_upload(folder)


def _is_made(of_the_package: bool, path: str) -> bool:
    """What a run made, or what the Space has in its own place."""
    return of_the_package and ("__pycache__" in path.split("/") or path.startswith("space/"))


def _to_upload(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What is uploaded of a folder, by path in it, and what is not: pickles, hidden files, checkpoints."""
    files, skipped = {}, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        refuse_links(folder, [path.relative_to(folder).as_posix()])
        name = path.relative_to(folder).as_posix()
        if path.name == MARK:
            continue
        parts = name.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if hidden or parts[0].startswith("checkpoint-") or path.suffix.lower() in PICKLES or not path.is_file():
            skipped.append(name)
        else:
            files[name] = path
    return files, tuple(skipped)


def _present(
    api: HfApi, repo_id: str, revision: str | None, force: bool, folder: Path, *, private: bool | None, dry_run: bool
) -> tuple[list[str], str | None] | None:
    """The files and the head of a branch, which begins as the main one if it is not there yet.

    A dry run asks once, for no more than seconds: None if the Hub does not say.

    Raises:
        HubError: If it may not be overwritten.
    """
    if dry_run and not answers(repo_id):
        return None
    once: dict[str, Any] = {"timeout": _SECONDS} if dry_run else {}
    tries = 1 if dry_run else TRIES
    try:
        info = asking(lambda: api.model_info(repo_id, revision=revision, **once), repo_id, missing=True, tries=tries)
        if info is None and revision is not None:
            revision = None
            info = asking(lambda: api.model_info(repo_id, **once), repo_id, missing=True, tries=tries)
    except HubError:
        if dry_run:
            return None
        raise
    _check_private(repo_id, info, private)
    names = [] if info is None else [each.rfilename for each in info.siblings or []]
    head = None if info is None else info.sha
    if force or not set(names) - set(_OWN):
        return names, head
    if "config.json" not in names:
        raise HubError(
            f"{repo_id} holds {', '.join(sorted(set(names) - set(_OWN))[:3])} and no config.json: it is no model of "
            f"transformers; choose another name, or pass force=True (--force) to add this checkpoint to it"
        )
    path = asking(lambda: hf_hub_download(repo_id, "config.json", revision=revision, token=api.token), repo_id)
    found, own = _model_type(Path(path)), _model_type(folder / "config.json")
    if found != own:
        raise HubError(
            f"{repo_id} holds a model of type {found!r}, and {folder} one of type {own!r}: choose another name, or "
            f"pass force=True (--force) to overwrite it"
        )
    return names, head


def _head_with(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    contents: Mapping[str, str | bytes],
    removed: Sequence[str],
    parent: str | None,
) -> tuple[str, str] | None:
    """The head of a branch and where to look at it, if it is a new one and has just these files; None if not."""
    try:
        head = str(asking(lambda: api.model_info(repo_id, revision=revision), repo_id).sha)
        is_it = head != parent and _has_files(api, repo_id, head, contents, removed)
    except HubError:
        return None
    return (head, f"commit/{head}") if is_it else None


def _proposals(api: HfApi, repo_id: str) -> dict[str, str]:
    """The heads of all pull requests, by number."""
    refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
    return {each.ref.rpartition("/")[2]: each.target_commit for each in refs}


def _proposal_with(
    api: HfApi,
    repo_id: str,
    contents: Mapping[str, str | bytes],
    removed: Sequence[str],
    earlier: Mapping[str, str],
) -> tuple[str, str] | None:
    """The head of a pull request and where to look at it, if it is a new one and has just these files; None if none."""
    try:
        for number, head in asking(lambda: _proposals(api, repo_id), repo_id).items():
            if number not in earlier and _has_files(api, repo_id, head, contents, removed):
                return head, f"discussions/{number}"
    except HubError:
        pass
    return None


def _has_files(
    api: HfApi, repo_id: str, commit: str, contents: Mapping[str, str | bytes], removed: Sequence[str]
) -> bool:
    """Whether a commit has these files, byte for byte, and none of those that were removed."""
    found = asking(lambda: api.get_paths_info(repo_id, [*contents, *removed], revision=commit), repo_id)
    there = {each.path: each for each in found}
    if set(there) != set(contents):
        return False
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        lfs = there[name].lfs
        own = (
            hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if lfs is None
            else hashlib.sha256(data).hexdigest()
        )
        if own != (there[name].blob_id if lfs is None else lfs.sha256):
            return False
    return True


def _check_private(repo_id: str, info: Any, private: bool | None) -> None:
    if private and info is not None and not info.private:
        raise HubError(f"{repo_id} is there already and public: make it private in its settings first, or name another")


def _model_type(path: Path) -> Any:
    return read_config(path).get("model_type")
