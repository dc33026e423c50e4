"""The server's end of Flower's wire, as a small object that sends and takes messages.

:class:`ServerEnd` is what a ServerApp's process is to Flower, :class:`~atoll.deploy.site_link.SiteEnd` what a
ClientApp's process is; but no code ever comes over the wire. Flower ships an app with every run and executes it at the
sites; our sites claim Flower's tasks themselves, read the message, answer with their own installed program, and never
open the app.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from atoll.core.errors import AtollError, MessageError, RunError
from atoll.core.message import Limits, Message
from atoll.deploy.doorbell import RING
from atoll.deploy.superlink import TOKEN_HEADER
from atoll.federated.records import from_records, to_records
from atoll.federated.wire import EVALUATE, VISIT

APP = b"""[project]
name = "atoll"
version = "1.0.0"
description = "Sites never run this: they answer with their own program."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "atoll"

[tool.flwr.app.components]
serverapp = "atoll.deploy.link:none"
clientapp = "atoll.deploy.link:none"
"""
A = TypeVar("A")
B = TypeVar("B")
TYPES = {VISIT: "train", EVALUATE: "evaluate"}
"""Flower's type by kind of message; all others are queries."""
SERVER_NODE = 1
UPLOAD = 60.0  # seconds without a new piece after which an answer counts as lost
SIDE = 4  # requests or answers that are sent or fetched side by side
HEARTBEAT = 10.0  # seconds; Flower gives a task up after a minute without


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a request has no answer that can be used. ``again``: nobody is to blame, asking again may help."""

    why: str
    again: bool = False


class LinkLost(RunError):
    """The SuperLink forgot us, or cannot be reached: connect again."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """What the SuperLink knows of a site's node. ``activated`` changes when it has been started anew."""

    node_id: int
    online: bool
    activated: str


class _Shown:
    """Shows the SuperLink the secret that opens its inner interfaces (see ``superlink.py``)."""

    def __init__(self, token: str) -> None:
        self.token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers[TOKEN_HEADER] = self.token
        return call_next(context)


@contextlib.contextmanager
def link_errors(what: str) -> Iterator[None]:
    """Whatever the transport raises, in our words."""
    import httpx

    try:
        yield
    except httpx.HTTPError as e:
        why = e.response.text[:200] if isinstance(e, httpx.HTTPStatusError) else f"{type(e).__name__}: {e}"
        raise LinkLost(f"{what} failed: {why}") from e


class ServerEnd:
    """The server's end: registers sites, opens a run, sends requests to nodes and takes their answers.

    Args:
        address: ``host:port`` of the SuperLink.
        authority: the federation's ``ca.pem``, as bytes.
        token: opens the SuperLink's inner interfaces.
        secret: shared with the SuperLink, signs the claim of our task.
    """

    def __init__(self, address: str, authority: bytes, token: str, secret: bytes, limits: Limits = Limits()) -> None:
        self.address, self.authority, self.limits = address, authority, limits
        self._shown, self._secret = _Shown(token), secret
        self._client: Any = None
        self._bell: Any = None
        self._run, self._task, self._beat = 0, 0, 0.0
        self._arriving: dict[str, _Arriving] = {}
        self._pool = ThreadPoolExecutor(SIDE)

    # ---------------------------------------------------------------- connection

    def register(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        """Make the sites' public keys known; returns the node of each. Known keys keep theirs, others are removed."""
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

        with self._control() as control, link_errors("registering the sites"):
            there = {n.public_key: n.node_id for n in control.ListNodes(ListNodesRequest()).nodes_info}
            wanted = {_ssh_bytes(pem): name for name, pem in keys.items()}
            out = {}
            for key, node in there.items():
                if key in wanted:
                    out[wanted[key]] = node
                else:
                    control.UnregisterNode(UnregisterNodeRequest(node_id=node))
            for key, name in wanted.items():
                if name not in out:
                    out[name] = control.RegisterNode(RegisterNodeRequest(public_key=key)).node_id
        return out

    def open(self) -> None:
        """Start a run at the SuperLink and claim its server task."""
        from flwr.cli.build import build_fab_from_files
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
        from flwr.supercore.constant import TaskType
        from flwr.supercore.fab import Fab
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor

        content, _ = build_fab_from_files({"pyproject.toml": APP})
        with self._control() as control, link_errors("starting a run at the SuperLink"):
            started = control.StartRun(
                StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})))
            )
        if not started.HasField("run_id"):
            raise LinkLost("the SuperLink would not start a run")
        signed = SuperExecAuthHttpInterceptor(
            master_secret=self._secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        with self._runtime(signed) as claims, link_errors("claiming the run at the SuperLink"):
            for _ in range(100):
                got = claims.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                if got.token and got.task.run_id == started.run_id:
                    break
            else:
                raise LinkLost("the SuperLink gave no server task for our run")
        self.close()
        self._arriving.clear()
        self._client = self._runtime(RuntimeTokenHttpInterceptor(got.token))
        self._bell = self._doorbell()
        with link_errors("opening the run at the SuperLink"):
            given = self._client.PullTaskInput(PullTaskInputRequest())
        self._run, self._task, self._beat = started.run_id, given.task_id, 0.0

    def _tls(self) -> dict[str, Any]:
        return {"insecure": False, "root_certificates": self.authority}

    def _control(self) -> Any:
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        version = RuntimeVersionHttpInterceptor(component_name="flwr")
        return ControlHttpClient.from_server_address(self.address, interceptors=[version, self._shown], **self._tls())

    def _runtime(self, *more: Any) -> Any:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        first: list[Any] = [RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), self._shown]
        return RuntimeHttpClient.from_server_address(self.address, interceptors=[*first, *more], **self._tls())

    def _doorbell(self) -> Any:
        import ssl

        import httpx

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.authority.decode("ascii"))
        return httpx.Client(
            base_url=f"https://{self.address}", verify=context, headers={TOKEN_HEADER: self._shown.token}
        )

    def _ring(self, *nodes: int) -> None:
        """Tell nodes that there is work; without any, tell the SuperLink that we leave."""
        with link_errors("ringing for a node"):
            self._bell.post(RING, json=nodes).raise_for_status()

    def close(self) -> None:
        if self._client is not None:
            with contextlib.suppress(LinkLost):
                self._ring()
            self._bell.close()
            self._client.close()
            self._client = self._bell = None

    # ---------------------------------------------------------------- messages

    def beat(self) -> None:
        """Tell the SuperLink now and then that we are here."""
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        if time.monotonic() - self._beat < HEARTBEAT:
            return
        with link_errors("the heartbeat"):
            if not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                raise LinkLost("the SuperLink has given our run up")
        self._beat = time.monotonic()

    def nodes(self) -> dict[int, NodeState]:
        """The nodes that are online, by number."""
        from flwr.proto.runtime_pb2 import GetNodesRequest

        with link_errors("asking for nodes"):
            found = self._client.GetNodes(GetNodesRequest()).nodes
        return {n.node_id: NodeState(n.node_id, n.status == "online", n.last_activated_at) for n in found}

    def send(self, node: int, message: Message, ttl: float) -> str:
        """Send a request; returns the number under which :meth:`take` finds the answer."""
        from flwr.app import Message as FlowerMessage
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.node_pb2 import Node
        from flwr.proto.runtime_pb2 import PushAppMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import push_objects
        from flwr.supercore.task_identity import TaskIdentity

        # Flower's messages take their sender from this global.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._task, self._run, SERVER_NODE
        kind = TYPES.get(message.kind, "query")
        flower = FlowerMessage(to_records(message), node, kind, ttl=ttl)
        with no_object_id_recompute(), link_errors("sending a request"):
            flower.metadata.__dict__["_message_id"] = flower.object_id
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(flower))],
                message_object_trees=[get_object_tree(flower)],
            )
            answer = self._client.PushMessages(request)
            push = make_push_object_fn_protobuf(
                self._client.PushObject, Node(node_id=SERVER_NODE), self._run, answer.session_id
            )
            push_objects(get_all_nested_objects(flower), push, object_ids_to_push=set(answer.objects_to_push))
            self._ring(node)
        if not answer.message_ids or not answer.message_ids[0]:
            raise LinkLost("the SuperLink did not take a request")
        return str(answer.message_ids[0])

    def take(self, numbers: Iterable[str]) -> Iterator[tuple[str, Message | Lost]]:
        """The answers that are here in full, each with the number of its request. Waits for nobody."""
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        numbers = list(numbers)
        wanted = [n for n in numbers if n not in self._arriving]
        if wanted:
            with link_errors("asking for answers"):
                found = self._client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
            for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                number = proto.metadata.reply_to_message_id
                self._arriving[number] = _Arriving(proto, tree, time.monotonic())
        arriving = [n for n in numbers if n in self._arriving]
        for number, answer in side_by_side(self._pool, self._fetch, arriving):
            if answer is not None:
                del self._arriving[number]
                yield number, answer

    def _fetch(self, number: str) -> Message | Lost | None:
        arriving = self._arriving[number]
        answer = self._read(arriving)
        if answer is not None:
            self._confirm(arriving)
        return answer

    def _read(self, a: _Arriving) -> Message | Lost | None:
        """An answer's content, fetched piece by piece as long as it stays within the limit; None while pieces are
        still on their way up."""
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

        if a.proto.HasField("error"):
            return Lost(f"no answer from its node ({a.proto.error.reason[:200]})", again=True)
        try:
            pull = make_pull_object_fn_protobuf(self._client.PullObject, Node(node_id=SERVER_NODE), self._run)
            for one in iterate_object_tree(a.tree):
                if one.object_id in a.contents:
                    continue
                a.contents[one.object_id] = piece = pull(one.object_id)
                a.size, a.since = a.size + len(piece), time.monotonic()
                if a.size > self.limits.max_bytes + self.limits.max_header_bytes:
                    return Lost(f"its answer has more than {self.limits.max_bytes:,} bytes")
            return from_records(put_together(a.tree.object_id, a.contents, self.limits).content, self.limits)
        except ObjectUnavailableError:
            return Lost("its answer never came in full", again=True) if a.idle > UPLOAD else None
        except AtollError as e:
            return Lost(str(e))
        except Exception as e:  # a stranger's bytes may break Flower's reader in ways that nobody foresaw
            with link_errors("fetching an answer"):
                _raise_transport(e)
            return Lost(f"its answer cannot be read ({type(e).__name__})")

    def _confirm(self, a: _Arriving) -> None:
        """The SuperLink may forget an answer. That it may not is a loss of its memory alone."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.proto.node_pb2 import Node

        number = a.proto.metadata.message_id
        with contextlib.suppress(LinkLost), link_errors("confirming an answer"):
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=Node(node_id=SERVER_NODE), run_id=self._run, message_object_id=number
                )
            )


def side_by_side(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A]) -> Iterator[tuple[A, B]]:
    """Each item and what came of it, as they end; the first error ends all, and no work is left behind."""
    futures = {pool.submit(work, item): item for item in items}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@dataclass(slots=True)
class _Arriving:
    """An answer of which the SuperLink has heard; its pieces come one after the other."""

    proto: Any
    tree: Any
    since: float
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0

    @property
    def idle(self) -> float:
        return time.monotonic() - self.since


def _raise_transport(e: Exception) -> None:
    import httpx

    if isinstance(e, httpx.HTTPError):
        raise e


def put_together(root: str, contents: dict[str, bytes], limits: Limits) -> Any:
    """The message that the pieces make. An array lists its chunks, and may list one a thousand times over: what they
    add up to is known before any of it takes memory."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    size = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            listed = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            size += sum(len(contents[children[i]]) for i in listed)
    if size > limits.max_bytes + limits.max_header_bytes:
        raise MessageError(f"A message of {size:,} bytes is over the limit of {limits.max_bytes:,}.")
    return inflate_object_from_contents(root, contents)


def _ssh_bytes(pem: bytes) -> bytes:
    """The form in which Flower knows a public key."""
    from cryptography.hazmat.primitives import serialization
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key: Any = serialization.load_pem_public_key(pem)
    return bytes(public_key_to_bytes(key))


def none(*_: Any) -> None:
    """What a Flower that opened our app would find."""
    raise MessageError("Atoll's sites answer with their own program (`atoll join`); this app is empty")
