"""Which files a push uploads, what the repository holds already, and whether a commit arrived."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from hf_prune.errors import HubError
from hf_prune.hub.client import call_hub, hub_answers
from hf_prune.utils.folders import MARK, RUN_FILE, is_never_uploaded, refuse_links
from hf_prune.utils.formatting import format_count, format_table
from hf_prune.utils.json_files import read_config
from hf_prune.utils.results import Result

_DRY_RUN_TIMEOUT = 2.0  # seconds
_INITIAL_FILES = (".gitattributes", "README.md")  # a repository with no other files counts as new


@dataclass(frozen=True, repr=False)
class PushResult(Result):
    """What was uploaded, or would be in a dry run.

    Args:
        repo_id: The repository.
        files: Size in bytes of each file, by path.
        removed: Weights of an earlier checkpoint that the commit deletes.
        skipped: Files of the folder that are not uploaded: pickles, hidden files, and checkpoints of a training.
        commit: The commit's id; None if nothing was uploaded.
        url: Address of the commit.
        card: The model card, if there is one.
        asked: Whether the Hub said what the repository holds; in a dry run it may not have answered.
    """

    bars = ("bytes",)

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

    def rows(self) -> list[dict[str, Any]]:
        """The files with their sizes."""
        return [{"file": name, "bytes": size} for name, size in self.files.items()]

    def __str__(self) -> str:
        rows = [[name, f"{format_count(size)}B"] for name, size in self.files.items()]
        rows += [[name, "deleted"] for name in self.removed]
        lines = [format_table(["file", "size"], rows, left=1)]
        if self.skipped:
            lines.append(f"Not uploaded (pickles, hidden files, checkpoints of a training): {', '.join(self.skipped)}.")
        total = f"{format_count(sum(self.files.values()))}B"
        if self.commit is None:
            lines.append(f"{len(self.files)} files, {total}, would go to {self.repo_id}. Nothing was uploaded.")
            if not self.asked:
                lines.append("The Hub did not say what that repository holds, so what would be replaced is unknown.")
            if self.card:
                lines.append(f"\nThe card:\n\n{self.card}")
        else:
            lines.append(f"Uploaded {len(self.files)} files, {total}: {self.url}")
        return "\n".join(lines)


def files_to_upload(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files of a folder that are uploaded, by path in it, and the paths of those that are not.

    Raises:
        CheckpointError: If a file is a link that leads out of the folder.
    """
    files, skipped = {}, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        name = path.relative_to(folder)
        refuse_links(folder, [name.as_posix()])
        if path.name in (MARK, RUN_FILE):  # the second one names folders of this machine
            continue
        if is_never_uploaded(name) or not path.is_file():
            skipped.append(name.as_posix())
        else:
            files[name.as_posix()] = path
    return files, tuple(skipped)


def repository_info(ask: Callable[..., Any], repo_id: str, *, dry_run: bool) -> tuple[Any, bool]:
    """Ask the Hub about a repository.

    Args:
        ask: A call of ``HfApi`` that returns the info; a dry run passes it a ``timeout``.
        repo_id: The repository, for messages.
        dry_run: Ask once, for a few seconds, and go on without an answer.

    Returns:
        The info, None if the repository does not exist; and whether the Hub answered.

    Raises:
        HubError: If it refuses or cannot be reached, except in a dry run.
    """
    if not dry_run:
        return call_hub(ask, repo_id, missing=True), True
    if not hub_answers(repo_id):
        return None, False
    try:
        return call_hub(lambda: ask(timeout=_DRY_RUN_TIMEOUT), repo_id, missing=True, attempts=1), True
    except HubError:
        return None, False


def foreign_files(names: Sequence[str]) -> str:
    """A few of a repository's files, for a message; empty if it has none but those of a new one."""
    return ", ".join(sorted(set(names) - set(_INITIAL_FILES))[:3])


def branch_state(
    api: HfApi, repo_id: str, revision: str | None, force: bool, folder: Path, *, private: bool | None, dry_run: bool
) -> tuple[list[str], str | None] | None:
    """The files of a branch and its head commit; a branch that does not exist starts as the main one.

    Returns:
        None if the Hub does not answer a dry run.

    Raises:
        HubError: If the repository may not be overwritten.
    """
    info, answered = repository_info(
        lambda **options: api.model_info(repo_id, revision=revision, **options), repo_id, dry_run=dry_run
    )
    if info is None and answered and revision is not None:
        revision = None
        info, answered = repository_info(lambda **options: api.model_info(repo_id, **options), repo_id, dry_run=dry_run)
    if not answered:
        return None
    refuse_public(repo_id, info, private)
    names = [] if info is None else [file.rfilename for file in info.siblings or []]
    head = None if info is None else info.sha
    if force or not foreign_files(names):
        return names, head
    if "config.json" not in names:
        raise HubError(
            f"{repo_id} holds {foreign_files(names)} and no config.json, so it is not a transformers model: choose "
            f"another name, or pass force=True (--force) to add this checkpoint to it"
        )
    path = call_hub(lambda: hf_hub_download(repo_id, "config.json", revision=revision, token=api.token), repo_id)
    theirs, ours = (read_config(config).get("model_type") for config in (path, folder / "config.json"))
    if theirs != ours:
        raise HubError(
            f"{repo_id} holds a model of type {theirs!r}, and {folder} one of type {ours!r}: choose another name, or "
            f"pass force=True (--force) to overwrite it"
        )
    return names, head


def find_commit(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    contents: Mapping[str, str | bytes],
    removed: Sequence[str],
    parent: str | None,
) -> tuple[str, str] | None:
    """The new head of a branch, and its address below the repository's, if it has exactly these files."""
    try:
        head = str(call_hub(lambda: api.model_info(repo_id, revision=revision), repo_id).sha)
        arrived = head != parent and _has_files(api, repo_id, head, contents, removed)
    except HubError:
        return None
    return (head, f"commit/{head}") if arrived else None


def pull_request_heads(api: HfApi, repo_id: str) -> dict[str, str]:
    """The head commit of every pull request, by number."""
    refs = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
    return {ref.ref.rpartition("/")[2]: ref.target_commit for ref in refs}


def find_pull_request(
    api: HfApi,
    repo_id: str,
    contents: Mapping[str, str | bytes],
    removed: Sequence[str],
    earlier: Mapping[str, str],
) -> tuple[str, str] | None:
    """The head of a new pull request, and its address below the repository's, if it has exactly these files."""
    try:
        for number, head in call_hub(lambda: pull_request_heads(api, repo_id), repo_id).items():
            if number not in earlier and _has_files(api, repo_id, head, contents, removed):
                return head, f"discussions/{number}"
    except HubError:
        pass
    return None


def _has_files(
    api: HfApi, repo_id: str, commit: str, contents: Mapping[str, str | bytes], removed: Sequence[str]
) -> bool:
    """Whether a commit has these files, byte for byte, and none of the removed ones."""
    infos = call_hub(lambda: api.get_paths_info(repo_id, [*contents, *removed], revision=commit), repo_id)
    stored = {info.path: info for info in infos}
    if set(stored) != set(contents):
        return False
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        lfs = stored[name].lfs
        if lfs is None:  # git's own hash
            same = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == stored[name].blob_id
        else:
            same = hashlib.sha256(data).hexdigest() == lfs.sha256
        if not same:
            return False
    return True


def refuse_public(repo_id: str, info: Any, private: bool | None) -> None:
    """Make sure that a private push does not go to a public repository.

    Raises:
        HubError: If it would.
    """
    if private and info is not None and not info.private:
        raise HubError(
            f"{repo_id} exists already and is public: make it private in its settings, or choose another name"
        )
