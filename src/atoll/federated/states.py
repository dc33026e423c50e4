"""What sites keep between visits, one message per site, in memory or in files.

A visit writes under a new tag; the engine commits the tag with its checkpoint and then drops older ones. So a
run that is killed finds the states of the last committed round untouched.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Protocol

from atoll.core.errors import MessageError, RunError
from atoll.core.files import write_atomic
from atoll.core.message import NO_LIMITS, Message, decode, detach, encode, seal, unseal


class States(Protocol):
    def get(self, site: int, tag: str) -> Message: ...

    def put(self, site: int, tag: str, state: Message) -> None: ...

    def drop(self, site: int, tag: str) -> None: ...

    def sweep(self, keep: set[tuple[int, str]]) -> None:
        """Drop everything but ``keep``: what a killed run left behind.

        Raises:
            RunError: one of ``keep`` is not there (an empty file, after a loss of power, is not).
        """


class MemoryStates:
    """States of one process without a run directory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], Message] = {}

    def get(self, site: int, tag: str) -> Message:
        return self._kept[site, tag]

    def put(self, site: int, tag: str, state: Message) -> None:
        self._kept[site, tag] = detach(state)

    def drop(self, site: int, tag: str) -> None:
        self._kept.pop((site, tag), None)

    def sweep(self, keep: set[tuple[int, str]]) -> None:
        self._kept = {key: state for key, state in self._kept.items() if key in keep}


class FileStates:
    """States as safetensors files in a folder: shared by processes, and memory does not grow with the sites."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        self.folder, self.durable = folder, durable
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what sites keep to themselves is in it

    def path(self, site: int, tag: str) -> Path:
        return self.folder / f"site{site}.{tag}.safetensors"

    def get(self, site: int, tag: str) -> Message:
        with open(self.path(site, tag), "rb") as f:
            stored = decode(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), NO_LIMITS)
        try:
            return unseal(stored)
        except MessageError as e:
            raise RunError(f"The state of site {site} cannot be read ({e}); start the run again.") from e

    def put(self, site: int, tag: str, state: Message) -> None:
        write_atomic(self.path(site, tag), encode(seal(state)), durable=self.durable)

    def drop(self, site: int, tag: str) -> None:
        self.path(site, tag).unlink(missing_ok=True)

    def sweep(self, keep: set[tuple[int, str]]) -> None:
        wanted = {self.path(site, tag).name for site, tag in keep}
        found = {path.name for path in self.folder.iterdir() if path.stat().st_size}
        if missing := sorted(wanted - found):
            raise RunError(
                f"{len(missing)} of {len(wanted)} sites' states are missing in {self.folder} (first: {missing[0]}); "
                "put the folder back, or start the run again."
            )
        for path in self.folder.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)
