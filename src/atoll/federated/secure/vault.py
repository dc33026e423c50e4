"""What a site keeps to itself for secure sums: the root of its secrets, and what it has done with them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from atoll.core.errors import RunError
from atoll.core.files import write_atomic
from atoll.core.streams import key
from atoll.privacy.secure_sum import KEY, prf


@dataclass(frozen=True, slots=True)
class Used:
    """What a site has done in a session: its last round's scope, and digests of what it masked and whom it took for
    survivors (empty: nothing yet)."""

    round: int
    scope: str
    masked: str = ""
    survivors: str = ""


class Vault(Protocol):
    """Must   last   what :meth:`remember` and :meth:`pin` were told is known to every later process of the site"""

    def secret(self, site: int) -> bytes:
        """32 bytes that nobody else knows, the same for ever."""

    def recall(self, site: int, session: str) -> Used | None: ...

    def remember(self, site: int, session: str, used: Used) -> None: ...

    def pin(self, site: int, peers: Mapping[int, bytes]) -> list[int]:
        """Keep the long-term keys of peers that are new; returns the peers whose key is not the one that was kept."""


class SimulatedVault:
    """For simulations: secrets that come from the run's seed, so they are none, and a memory that ends with the
    process."""

    def __init__(self, seed: int) -> None:
        self._root = key(seed, "secure sum").to_bytes(8, "big")
        self._used: dict[int, tuple[str, Used]] = {}

    def secret(self, site: int) -> bytes:
        return prf(self._root, site)

    def recall(self, site: int, session: str) -> Used | None:
        at, used = self._used.get(site, ("", None))
        return used if at == session else None

    def remember(self, site: int, session: str, used: Used) -> None:
        self._used[site] = session, used

    def pin(self, site: int, peers: Mapping[int, bytes]) -> list[int]:
        return []


class FileVault:
    """For a real site: files that only their owner can read.

    Args:
        folder: outlives processes. Whoever has it can unmask what the site sends; whoever loses it must join as new.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def secret(self, site: int) -> bytes:
        path = self.folder / f"site{site}.secret"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = path.with_suffix(f".{os.getpid()}")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
                f.write(secrets.token_bytes(KEY))
                f.flush()
                os.fsync(f.fileno())
            os.replace(fresh, path)
        found = path.read_bytes()
        if len(found) != KEY:
            raise RunError(f"{path} is damaged; remove it and join as a new site.")
        return found

    def recall(self, site: int, session: str) -> Used | None:
        found = self._read(site, "used").get(session)
        return Used(**found) if found is not None else None

    def remember(self, site: int, session: str, used: Used) -> None:
        self._write(site, "used", {**self._read(site, "used"), session: asdict(used)})

    def pin(self, site: int, peers: Mapping[int, bytes]) -> list[int]:
        known = self._read(site, "peers")
        if new := {str(peer): public.hex() for peer, public in peers.items() if str(peer) not in known}:
            self._write(site, "peers", {**known, **new})
        return [peer for peer, public in peers.items() if known.get(str(peer), public.hex()) != public.hex()]

    def _path(self, site: int, what: str) -> Path:
        return self.folder / f"site{site}.{what}.json"

    def _read(self, site: int, what: str) -> dict[str, Any]:
        path = self._path(site, what)
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            raise RunError(f"{path} is damaged, so this site cannot know what it has revealed; join anew.") from e
        assert isinstance(found, dict)
        return found

    def _write(self, site: int, what: str, value: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(self._path(site, what), json.dumps(value).encode())
