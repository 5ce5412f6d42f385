"""Push a Space with the app, this package and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_prune.errors import DataError, HubError
from hf_prune.hub.client import call_hub, check_repo_id, full_repo_id
from hf_prune.hub.upload import PushResult, files_to_upload, foreign_files, refuse_public, repository_info


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
    """Create or update a Space in one commit: the app, this installation of hf_prune, a model and its sentences.

    Args:
        app: Folder of the app.
        repo_id: ``owner/name``, or a name for a Space of your own.
        model: Folder of the model.
        data: Folder of the sentences; None for none.
        names: How the app calls model and data, as ``name`` and ``data_name``; empty for those of the demo.
        private: Make a new Space private, and refuse a public one; None takes the owner's default.
        force: Also overwrite a Space that holds something else.
        dry_run: Upload nothing, but say what would be uploaded.
        token: Hub token; None takes the one you are logged in with.

    Raises:
        DataError: If a folder does not exist.
        HubError: As of :func:`push_checkpoint`.
    """
    check_repo_id(repo_id)
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(app.iterdir()) if path.is_file()}
    skipped: list[str] = []
    package = Path(__file__).parents[1]
    for folder, name in ((package, "hf_prune"), (Path(model), "demo/model"), (Path(data or ""), "demo/data")):
        if data is None and name == "demo/data":
            continue
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: a Space needs the files themselves; download them first")
        paths, left_out = files_to_upload(folder)
        if folder == package:
            paths = {path: file for path, file in paths.items() if not _is_not_source(path)}
        files |= {f"{name}/{path}": file for path, file in paths.items()}
        skipped += [f"{name}/{path}" for path in left_out]
    if names:
        files["demo/names.json"] = json.dumps(names).encode()
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    api = HfApi(token=token)
    if not dry_run:
        repo_id = full_repo_id(repo_id, token)
    info, answered = repository_info(
        lambda **options: api.repo_info(repo_id, repo_type="space", **options), repo_id, dry_run=dry_run
    )
    refuse_public(repo_id, info, private)
    existing = [] if info is None else [file.rfilename for file in info.siblings or []]
    if not force and foreign_files(existing) and "hf_prune/__init__.py" not in existing:
        raise HubError(
            f"the Space {repo_id} holds {foreign_files(existing)} and no hf_prune: choose another name, or pass "
            f"--force to overwrite it"
        )
    removed = tuple(sorted(n for n in existing if n.startswith(("hf_prune/", "demo/")) and n not in files))
    if dry_run:
        return PushResult(repo_id, sizes, removed, tuple(skipped), None, None, None, answered)
    call_hub(
        lambda: api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True), repo_id
    )
    operations: list[Any] = [CommitOperationAdd(n, f if isinstance(f, bytes) else str(f)) for n, f in files.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    commit = call_hub(
        lambda: api.create_commit(repo_id, operations, repo_type="space", commit_message="Update the Space"), repo_id
    )
    return PushResult(repo_id, sizes, removed, tuple(skipped), commit.oid, f"{api.endpoint}/spaces/{repo_id}", None)


def _is_not_source(path: str) -> bool:
    """Whether a file of the package was compiled, or belongs to the app, which the Space has at its top."""
    return "__pycache__" in path.split("/") or path.startswith("space/")
