"""A site's end of Flower's wire: it claims requests from its own SuperNode, and answers them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from atoll.core.errors import AtollError
from atoll.core.message import Limits, Message
from atoll.deploy.link import LinkLost, link_errors, put_together
from atoll.federated.records import from_records, to_records

ALIVE = 5.0  # seconds between signs of life during a visit
PIECE = 1.0  # seconds without a new piece of a request after which we ask whether our SuperNode has given it up


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
            with link_errors("asking the SuperNode for work"):
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
    with link_errors("signing off"), client:
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
        with link_errors("reading a request"):
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
            whole = put_together(tree.object_id, contents, limits)
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

        with link_errors("handing an answer to the SuperNode"):
            push_message(self._client, FlowerMessage(to_records(message), reply_to=self._flower), self._context)
            push_task_output(self._client, self._context, "completed", "")
        self._client.close()
