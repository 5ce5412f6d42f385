"""Upload a checkpoint or a Space to the Hub, in one commit. Nothing else here uploads anything."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_prune.checkpoint.files import CARD_DATA, REPORTS
from hf_prune.checkpoint.packed.remote_code import FILE
from hf_prune.errors import CheckpointError, HubError
from hf_prune.hub.card import merge_cards, render_card, without_facts
from hf_prune.hub.card_data import PruningCardData, load_card_data
from hf_prune.hub.card_metadata import read_facts
from hf_prune.hub.check_card import check_card, check_text
from hf_prune.hub.client import MAX_ATTEMPTS, call_hub, card_of, check_repo_id, full_repo_id
from hf_prune.hub.upload import PushResult, head_with, present, proposal_with, proposals, to_upload
from hf_prune.utils.front_matter import read_card

# Of an earlier checkpoint: weights, what was counted in them, what reads them.
_EARLIER = re.compile(
    r"(model[^/]*|pruning_masks)\.safetensors|model[^/]*\.safetensors\.index\.json|"
    + "|".join(map(re.escape, (*REPORTS, CARD_DATA, FILE)))
)


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
    found = present(api, repo_id, revision, force, folder, private=private, dry_run=dry_run)
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
    call_hub(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    if revision is not None and revision != "main":
        call_hub(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    earlier = call_hub(lambda: proposals(api, repo_id), repo_id) if create_pr else {}
    try:
        commit = call_hub(
            lambda: api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            ),
            repo_id,
            tries=1 if create_pr else MAX_ATTEMPTS,  # what has a parent cannot be committed twice
        )
    except HubError:  # perhaps the commit is there, and only the answer was lost
        if create_pr:
            found_there = proposal_with(api, repo_id, contents, removed, earlier)
        else:
            found_there = head_with(api, repo_id, revision, contents, removed, parent)
        if found_there is None:
            raise
        oid, place = found_there
        return PushResult(repo_id, sizes, removed, skipped, oid, f"{api.endpoint}/{repo_id}/{place}", text)
    return PushResult(repo_id, sizes, removed, skipped, commit.oid, commit.pr_url or commit.commit_url, text)


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
    return to_upload(folder)
