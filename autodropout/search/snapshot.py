"""Snapshots: the state of a search after so many records of its journal, so that resuming need not replay them all.

Nothing depends on them: without one, or with one that does not fit, the journal is replayed from its beginning. The
file is a line of JSON, for the eye, and what `torch.save` makes of `Search.state_dict`:

    {"schema": 1, "records": 5120, "journal": "<SHA-256 of the journal's first size bytes>", "size": 1843211,
     "state": "<SHA-256 of what follows>"}
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from typing import Any

import torch

from ..files import write_atomically
from .core import Search
from .journal import Journal

SCHEMA = 1
FILE = "snapshot.pt"


class SnapshotError(ValueError):
    """The snapshot does not fit; the message says why."""


def write_snapshot(journal: Journal, search: Search) -> None:
    """Keeps the state of a search to which all records of the journal have happened. Replaces an older snapshot.

    Raises:
        OSError: it cannot be written; the older one is still there.
    """
    buffer = io.BytesIO()
    torch.save(search.state_dict(), buffer)
    state = buffer.getvalue()
    head = {
        "schema": SCHEMA,
        "records": journal.length,
        "size": journal.size,
        "journal": journal.digest(),
        "state": hashlib.sha256(state).hexdigest(),
    }
    content = json.dumps(head).encode() + b"\n" + state
    write_atomically(journal.path.with_name(FILE), lambda file: file.write(content))


def read_snapshot(journal: Journal) -> tuple[int, dict[str, Any]] | None:
    """How many records of the journal the snapshot covers, and the state after them; None if there is no snapshot.

    Raises:
        SnapshotError: it is torn, damaged, of another schema or of another journal.
    """
    path = journal.path.with_name(FILE)
    try:
        head, _, state = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"it cannot be read ({error.strerror})") from error
    try:
        fields = json.loads(head)
        schema, records, size = fields["schema"], int(fields["records"]), int(fields["size"])
        prefix, digest = fields["journal"], fields["state"]
    except (ValueError, TypeError, KeyError) as error:
        raise SnapshotError("its first line is damaged") from error
    if schema != SCHEMA:
        raise SnapshotError(f"it has schema {schema!r}, and this version of autodropout reads schema {SCHEMA}")
    if hashlib.sha256(state).hexdigest() != digest:
        raise SnapshotError("it is incomplete or damaged")
    if records > journal.length or size > journal.size or journal.digest(size) != prefix:
        raise SnapshotError("it is of another journal")
    try:
        # Tensors and plain values only: whatever else would need the right to run code when it is loaded.
        state_dict: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True)
    except pickle.UnpicklingError as error:
        raise SnapshotError("its state holds other things than tensors and plain Python values") from error
    return records, state_dict
