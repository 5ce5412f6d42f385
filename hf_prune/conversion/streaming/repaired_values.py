"""New values of parameters of an unfinished run, on the disk until they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_prune.conversion.streaming.journal import Journal


class RepairedValues(Mapping[str, Tensor]):
    """Parameters that a repair has found new values for, by name; those of an interrupted run are among them.

    Args:
        journal: Of the run. If a file that it names is missing or has another size, the repair starts again.

    Attributes:
        complete: Whether the last values were written: an empty set of them says so.
    """

    def __init__(self, journal: Journal) -> None:
        self._folder, self._journal, self._files = journal.folder / "repaired", journal, dict[str, str]()
        self._folder.mkdir(exist_ok=True)
        if not self._is_sound():
            journal.forget({"repaired", "copied", "tensors"})
        records = [record["repaired"] for record in journal.records if "repaired" in record]
        for record in records:
            self._files |= record
        self.complete = {} in records

    def _is_sound(self) -> bool:
        sizes = {name: size for record in self._journal.records for name, size in record.get("sizes", {}).items()}
        paths = {self._folder / name: size for name, size in sizes.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write new values, and say so in the journal.

        Args:
            tensors: Parameters in their dense shapes; none to say that there will be no more.
        """
        if not tensors:
            self._journal.add({"repaired": {}})
            self.complete = True
            return
        path = self._folder / f"{len(self._files)}.safetensors"
        save_file(dict(tensors), path)
        files = dict.fromkeys(tensors, path.name)
        self._journal.add({"repaired": files, "sizes": {path.name: path.stat().st_size}}, path)
        self._files |= files

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self._folder / self._files[name])[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
