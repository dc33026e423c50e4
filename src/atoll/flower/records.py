"""What a project's server and sites say to each other beside the messages of a visit."""

from __future__ import annotations

from flwr.app import RecordDict

from atoll.core.errors import MessageError
from atoll.federated.records import CONFIG

HELLO = "hello"
"""The question which site a node is."""


def with_seed(records: RecordDict, seed: int) -> RecordDict:
    """The records, saying which seed the run's random streams have."""
    records.config_records[CONFIG]["seed"] = seed
    return records


def seed_of(records: RecordDict) -> int:
    """Raises :class:`MessageError` for records that :func:`with_seed` did not make."""
    seed = records.config_records[CONFIG].get("seed") if CONFIG in records.config_records else None
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise MessageError("the request comes from another strategy than `atoll.flower.strategy`")
    return seed
