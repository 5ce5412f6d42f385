"""Push a Space that shows a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_prune.errors import DataError, HubError
from hf_prune.hub.client import MAX_ATTEMPTS, call_hub, check_repo_id, full_repo_id, hub_answers
from hf_prune.hub.upload import OWN, SECONDS, PushResult, check_private, to_upload


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
    package = Path(__file__).parents[1]
    for folder, name in ((package, "hf_prune"), (Path(model), "demo/model"), (Path(data or ""), "demo/data")):
        if data is None and name == "demo/data":
            continue
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder: a Space needs the files themselves; download them first")
        found, left = to_upload(folder)
        files |= {f"{name}/{path}": there for path, there in found.items() if not _is_made(folder == package, path)}
        skipped += [f"{name}/{path}" for path in left]
    if names:
        files["demo/names.json"] = json.dumps(names).encode()
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    api = HfApi(token=token)
    if not dry_run:
        repo_id = full_repo_id(repo_id, token)
    info, asked = None, not dry_run or hub_answers(repo_id)
    once: dict[str, Any] = {"timeout": SECONDS} if dry_run else {}
    tries = 1 if dry_run else MAX_ATTEMPTS
    try:
        if asked:
            info = call_hub(
                lambda: api.repo_info(repo_id, repo_type="space", **once), repo_id, missing=True, tries=tries
            )
    except HubError:
        if not dry_run:
            raise
        asked = False  # whether it exists is not known then
    check_private(repo_id, info, private)
    there = [] if info is None else [each.rfilename for each in info.siblings or []]
    if not force and set(there) - set(OWN) and "hf_prune/__init__.py" not in there:
        raise HubError(
            f"the Space {repo_id} holds {', '.join(sorted(set(there) - set(OWN))[:3])} and no hf_prune: choose "
            f"another name, or pass --force to overwrite it"
        )
    removed = tuple(sorted(n for n in there if n.startswith(("hf_prune/", "demo/")) and n not in files))
    if dry_run:
        return PushResult(repo_id, sizes, removed, tuple(skipped), None, None, None, asked)
    call_hub(
        lambda: api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True), repo_id
    )
    operations: list[Any] = [CommitOperationAdd(n, f if isinstance(f, bytes) else str(f)) for n, f in files.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    commit = call_hub(
        lambda: api.create_commit(repo_id, operations, repo_type="space", commit_message="Update the Space"), repo_id
    )
    return PushResult(repo_id, sizes, removed, tuple(skipped), commit.oid, f"{api.endpoint}/spaces/{repo_id}", None)


def _is_made(of_the_package: bool, path: str) -> bool:
    """What a run made, or what the Space has in its own place."""
    return of_the_package and ("__pycache__" in path.split("/") or path.startswith("space/"))
