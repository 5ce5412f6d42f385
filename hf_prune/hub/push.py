"""Push a checkpoint to the Hub in one commit."""

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
from hf_prune.hub.upload import (
    PushResult,
    branch_state,
    files_to_upload,
    find_commit,
    find_pull_request,
    pull_request_heads,
)
from hf_prune.utils.front_matter import read_card

# Files of an earlier checkpoint that a new one replaces: weights, their reports and facts, the code that reads them.
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
    """Push a checkpoint's folder to a model repository, in one commit.

    A repository that does not exist is created. Large files that arrived before a failure are not sent again. Weights
    of an earlier checkpoint that the new one does not have are deleted by the same commit. The commit is refused if
    somebody else has committed in the meantime.

    The card is the folder's ``README.md``; if it names the folder, it gets the name of the repository. If its author
    wrote nothing around our part, the author's text of the repository's card is kept. A card that hf_prune wrote is
    first verified, see :func:`hf_prune.verify_checkpoint`.

    Args:
        folder: A checkpoint: ``config.json`` and weights in safetensors files.
        repo_id: ``owner/name``, or a name for a repository of your own.
        private: Make a new repository private, and refuse a public one; None takes the owner's default.
        revision: A branch, created if it does not exist; None is ``main``.
        create_pr: Open a pull request instead of committing to the branch.
        force: Also overwrite a repository that holds something else.
        dry_run: Upload nothing, but say what would be uploaded.
        commit_message: Message of the commit.
        token: Hub token; None takes the one you are logged in with.
        card: The facts for a card, if the folder has none.
        model: The model saved in the folder, if it is in memory, to verify the card with; None loads it.

    Returns:
        What was uploaded; print it.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or its card is not right, alone or beside the text of the
            repository's card.
        DataError: If the metadata of a card is not valid YAML.
        HubError: If nobody is logged in, the token may not write there, the Hub cannot be reached, or the repository
            holds something else, or is public although ``private`` is set. The repository is unchanged.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    files, skipped = _files(folder)
    api = HfApi(token=token)
    check_card(folder, model)
    if not dry_run:
        repo_id = full_repo_id(repo_id, token)
    state = branch_state(api, repo_id, revision, force, folder, private=private, dry_run=dry_run)
    existing, parent = state or ([], None)
    theirs = None if state is None else _their_card(repo_id, revision, token, dry_run=dry_run)
    text, described = _card(folder, repo_id, card, theirs)
    contents: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if text is not None:
        contents["README.md"] = text.encode()
        sizes["README.md"] = len(contents["README.md"])
    if described is not None:
        contents[CARD_DATA] = (json.dumps(described.to_dict(), indent=2) + "\n").encode()
        sizes[CARD_DATA] = len(contents[CARD_DATA])
    removed = tuple(sorted(name for name in existing if _EARLIER.fullmatch(name) and name not in contents))
    if dry_run:
        return PushResult(repo_id, sizes, removed, skipped, None, None, text, state is not None)
    call_hub(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    if revision is not None and revision != "main":
        call_hub(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    earlier = call_hub(lambda: pull_request_heads(api, repo_id), repo_id) if create_pr else {}
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
            # A commit with a parent cannot arrive twice, but a pull request can.
            attempts=1 if create_pr else MAX_ATTEMPTS,
        )
    except HubError:  # the commit may have arrived, and only the answer was lost
        if create_pr:
            arrived = find_pull_request(api, repo_id, contents, removed, earlier)
        else:
            arrived = find_commit(api, repo_id, revision, contents, removed, parent)
        if arrived is None:
            raise
        oid, place = arrived
        return PushResult(repo_id, sizes, removed, skipped, oid, f"{api.endpoint}/{repo_id}/{place}", text)
    return PushResult(repo_id, sizes, removed, skipped, commit.oid, commit.pr_url or commit.commit_url, text)


def _their_card(repo_id: str, revision: str | None, token: str | bool | None, *, dry_run: bool) -> str | None:
    """The card of a branch, or else of the main branch."""
    try:
        branches = dict.fromkeys((revision, None))
        cards = (card_of(repo_id, revision=branch, token=token) for branch in branches)
        return next(filter(None, cards), None)
    except HubError:
        if not dry_run:
            raise
        return None  # unknown


def _card(
    folder: Path, repo_id: str, card: PruningCardData | None, theirs: str | None
) -> tuple[str | None, PruningCardData | None]:
    """The card to upload, merged with that of the repository, and its facts if they changed.

    Without a card of the folder, that of the repository stays, but for our part, which describes the old weights.
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
        which = f"the card of {folder}" + (f" beside the text of the card that {repo_id} has" if theirs else "")
        check_text(text, data, f"{which} is not right", "edit README.md there first, or in this folder")
    return text, data


def _files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files to upload by path in the repository, and those that are left out, of a folder with a checkpoint."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: expected the folder of a checkpoint")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no weights in safetensors files: expected a checkpoint saved with save_pretrained; pickles "
            f"are never uploaded"
        )
    return files_to_upload(folder)
