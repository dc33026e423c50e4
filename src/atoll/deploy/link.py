"""Both ends of Flower's wire, as two small objects that send and take messages.

:class:`ServerEnd` is what a ServerApp's process is to Flower, :class:`SiteEnd` what a ClientApp's process is; but no
code ever comes over the wire. Flower ships an app with every run and executes it at the sites; our sites claim
Flower's tasks themselves, read the message, answer with their own installed program, and never open the app.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
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
ALIVE = 5.0  # seconds between signs of life during a visit
PIECE = 1.0  # seconds without a new piece of a request after which we ask whether our SuperNode has given it up
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
def _link_errors(what: str) -> Iterator[None]:
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

        with self._control() as control, _link_errors("registering the sites"):
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
        with self._control() as control, _link_errors("starting a run at the SuperLink"):
            started = control.StartRun(
                StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})))
            )
        if not started.HasField("run_id"):
            raise LinkLost("the SuperLink would not start a run")
        signed = SuperExecAuthHttpInterceptor(
            master_secret=self._secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        with self._runtime(signed) as claims, _link_errors("claiming the run at the SuperLink"):
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
        with _link_errors("opening the run at the SuperLink"):
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
        with _link_errors("ringing for a node"):
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
        with _link_errors("the heartbeat"):
            if not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                raise LinkLost("the SuperLink has given our run up")
        self._beat = time.monotonic()

    def nodes(self) -> dict[int, NodeState]:
        """The nodes that are online, by number."""
        from flwr.proto.runtime_pb2 import GetNodesRequest

        with _link_errors("asking for nodes"):
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
        with no_object_id_recompute(), _link_errors("sending a request"):
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
            with _link_errors("asking for answers"):
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
            return from_records(_whole(a.tree.object_id, a.contents, self.limits).content, self.limits)
        except ObjectUnavailableError:
            return Lost("its answer never came in full", again=True) if a.idle > UPLOAD else None
        except AtollError as e:
            return Lost(str(e))
        except Exception as e:  # a stranger's bytes may break Flower's reader in ways that nobody foresaw
            with _link_errors("fetching an answer"):
                _raise_transport(e)
            return Lost(f"its answer cannot be read ({type(e).__name__})")

    def _confirm(self, a: _Arriving) -> None:
        """The SuperLink may forget an answer. That it may not is a loss of its memory alone."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.proto.node_pb2 import Node

        number = a.proto.metadata.message_id
        with contextlib.suppress(LinkLost), _link_errors("confirming an answer"):
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


class SiteEnd:
    """A site's end: claims what its own SuperNode has received, and answers.

    Args:
        address: ``host:port`` of the SuperNode's local interface.
        secret: shared with that SuperNode.
    """

    def __init__(self, address: str, secret: bytes, limits: Limits = Limits()) -> None:
        self.address, self.limits, self._secret = address, limits, secret
        self._claims: Any = None
        self._token = ""

    def _open(self, *more: Any) -> Any:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(
            self.address, insecure=True, root_certificates=None, interceptors=[version, *more]
        )

    def take(self) -> Taken | None:
        """The next request, or None when there is none yet."""
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor

        if not self._claim():
            return None
        token, self._token = self._token, ""
        return Taken(self._open(RuntimeTokenHttpInterceptor(token)), self.limits, self._claim)

    def _claim(self) -> bool:
        """Whether there is a request to take. The SuperNode works on one at a time: a new one means that it has given
        up the last, which may never come in full."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

        if self._claims is None:
            self._claims = self._open(
                SuperExecAuthHttpInterceptor(
                    master_secret=self._secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
                )
            )
        if not self._token:
            with _link_errors("asking the SuperNode for work"):
                got = self._claims.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            self._token = str(got.token)
        return bool(self._token)

    def close(self) -> None:
        if self._claims is not None:
            self._claims.close()
            self._claims = None


def sign_off(address: str, authority: bytes, key: bytes, node: int) -> None:
    """Tell the SuperLink that a node of ours is gone: until then it lets no other take its place.

    Args:
        key: the site's private key (OpenSSH).

    Raises:
        LinkLost: it could not be told.
    """
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private: Any = load_ssh_private_key(key, None)
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    signed = NodeAuthHttpInterceptor(private, private.public_key())
    client = FleetHttpClient.from_server_address(address, False, authority, [version, signed])
    with _link_errors("signing off"), client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))


class Taken:
    """A request that this site has claimed. ``message`` is its content, or why it cannot be read.

    Args:
        moved_on: whether the SuperNode has begun with another request.
    """

    def __init__(self, client: Any, limits: Limits, moved_on: Callable[[], bool]) -> None:
        from flwr.common.serde import context_from_proto
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest

        self._client = client
        self.message: Message | str = ""
        with _link_errors("reading a request"):
            given = client.PullTaskInput(PullTaskInputRequest())  # the app that comes along is not opened
            self._context = context_from_proto(given.context)
            self.node: int = self._context.node_id
            trees = client.PullMessages(PullAppMessagesRequest()).message_object_trees
            if not trees:
                raise LinkLost("the SuperNode has lost a request")
            with self.at_work():
                self._read(trees[0], limits, moved_on)

    def _read(self, tree: Any, limits: Limits, moved_on: Callable[[], bool]) -> None:
        """Fetch and read the message, however slowly it comes. One that the SuperNode has given up is left: the server
        asks again."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

        node, run = Node(node_id=self.node), self._context.run_id
        pull = make_pull_object_fn_protobuf(self._client.PullObject, node, run)
        contents: dict[str, bytes] = {}
        since = time.monotonic()
        wanted = {one.object_id: None for one in iterate_object_tree(tree)}
        while missing := [i for i in wanted if i not in contents]:
            try:
                contents[missing[0]] = pull(missing[0])
                since = time.monotonic()
            except ObjectUnavailableError as e:
                if time.monotonic() - since > PIECE and moved_on():
                    raise LinkLost("a request never came in full") from e
                time.sleep(0.02)
            if sum(map(len, contents.values())) > limits.max_bytes + limits.max_header_bytes:
                raise LinkLost("a request is too long")
        try:
            whole = _whole(tree.object_id, contents, limits)
        except Exception as e:  # without its form there is nothing that could be answered
            raise LinkLost(f"a request cannot be put together ({type(e).__name__})") from e
        whole.metadata.__dict__["_message_id"] = tree.object_id  # the pieces do not say it
        self._flower = whole
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
        )
        try:
            self.message = from_records(whole.content, limits)
        except AtollError as e:
            self.message = str(e)
        except Exception as e:
            self.message = f"unreadable request ({type(e).__name__})"

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Show signs of life while the answer is being worked out."""
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        done = threading.Event()

        def beat() -> None:
            while not done.wait(ALIVE):
                with contextlib.suppress(Exception):  # the answer itself will tell
                    self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def answer(self, message: Message) -> None:
        """Hand the answer to the SuperNode; raises :class:`LinkLost`."""
        from flwr.app import Message as FlowerMessage
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        with _link_errors("handing an answer to the SuperNode"):
            push_message(self._client, FlowerMessage(to_records(message), reply_to=self._flower), self._context)
            push_task_output(self._client, self._context, "completed", "")
        self._client.close()


def _whole(root: str, contents: dict[str, bytes], limits: Limits) -> Any:
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
