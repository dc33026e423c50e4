"""Many sites in one process: each holds its own connection to a SuperLink, and answers by its own program.

    python crowd.py HOST:PORT FOLDER PACE

FOLDER holds ``certificates/ca.pem`` and ``keys/<name>.key``. The connection is Flower's own, as its SuperNode uses it,
with the site's key; what is missing is the hop from a SuperNode to its site's process. One visit at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from atoll.deploy.guard import make_guard
from atoll.deploy.site import Place, SiteProgram
from atoll.federated.records import from_records, to_records
from atoll.recipes.recipe import Recipe

ADDRESS, FOLDER, PACE = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
working, loaded = threading.Lock(), dict[int, Any]()


class Sharing(SiteProgram):
    """The sites of this process split one copy of the rows."""

    def _rows(self, recipe: Recipe, site: int, sites: int) -> tuple[Any, bool, Any]:
        if sites not in loaded:
            loaded[sites] = recipe.federation()
        return loaded[sites].sites[site], False, loaded[sites].tokenizer


def site(name: str) -> None:
    private: Any = load_ssh_private_key((FOLDER / "keys" / f"{name}.key").read_bytes(), None)
    home = FOLDER / f"at-{name}"
    home.mkdir()
    program = Sharing(home, Place(rehearse=True), make_guard(None, home))
    authority = (FOLDER / "certificates" / "ca.pem").read_bytes()
    keys = private, private.public_key()
    with http_request_response(ADDRESS, False, authority, keys) as (_, receive, send, _, _, pull, push, confirm):
        while True:
            found = receive()
            if found is None:
                time.sleep(PACE)
                continue
            head, tree = found
            run = head.metadata.run_id
            wanted = list({one.object_id: None for one in iterate_object_tree(tree)})
            contents = pull_objects(wanted, lambda i, run=run: pull(run, i), initial_backoff=0.1)
            request: Any = inflate_object_from_contents(tree.object_id, contents)
            request.metadata.__dict__["_message_id"] = tree.object_id
            confirm(run, tree.object_id)
            with working:
                answer = program.answer(from_records(request.content))
            if program.trouble:
                print(name, program.trouble, flush=True)
            reply = Message(to_records(answer), reply_to=request)
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                missing, session = send(reply, get_object_tree(reply), 0.0)
                objects = get_all_nested_objects(reply)
                push_objects(
                    objects, lambda i, c, run=run, session=session: push(run, session, i, c), object_ids_to_push=missing
                )


if __name__ == "__main__":
    for path in sorted((FOLDER / "keys").glob("*.key")):
        threading.Thread(target=site, args=(path.stem,), daemon=True).start()
    threading.Event().wait()
