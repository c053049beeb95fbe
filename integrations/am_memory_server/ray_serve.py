"""The server as an application of Ray Serve: replicas of one model, and one store that all of them share.

    serve run am_memory_server.ray_serve:build model=demo store=/shared/conversations num_replicas=2

An ingress routes each request to a replica by consistent hashing of its conversation; the replica runs the same
application as `am-memory serve`. If a replica is lost, no finished turn is: each was saved before its last chunk was
sent, and another replica continues from the store.
"""
# Without postponed annotations: Ray Serve reads those of `build`.

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, cast

from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from am_memory.cli.serve import KEYS_VARIABLE, OPERATOR_KEYS_VARIABLE, keys_of_environment, name_of
from am_memory.engines.names import DtypeName, EngineName
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory_server import sse
from am_memory_server.access import Admission
from am_memory_server.affinity import affinity
from am_memory_server.app import create_app
from am_memory_server.broadcast import Headers, ReplicaAnswer, is_broadcast, merged
from am_memory_server.errors import ApiError, logger
from am_memory_server.scheduler import SWITCH_SECONDS
from am_memory_server.settings import ServerSettings, Settings

MAX_ONGOING = 1000
"""Requests that Ray sends to one replica. They wait in the replica's own queue, which is fair and has limits."""
MAX_UNSENT = 64
"""ASGI messages of one answer that Ray has not sent yet: with more, the application waits."""
DRAIN_SECONDS = 10.0
"""Added to `shutdown_seconds`: the time for a replica to notice that it has to stop."""
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
BY_CONVERSATION = RequestRouterConfig(request_router_class=ConsistentHashRouter)  # type: ignore[arg-type]
LOST = (RayActorError, RayServeException)


class RaySettings(Settings):
    """The `args` in Ray Serve's configuration of the application.

    Attributes:
        model: a hub id, a folder, a .gguf file, or "demo"; every node must be able to load it.
        store: a folder or fsspec URL that every node can reach: conversations outlive their replicas there.
        engine, device, dtype, compile, window_tokens, trust_remote_code, originals_bytes, originals_disk_bytes: see
            `Memory.from_pretrained`; of each replica.
        policy: when and how to compact.
        server: fields of `ServerSettings`; `host` is the address of Ray Serve's proxies. Keys are also read from the
            environment, as by `am-memory serve`.
        num_replicas: used unless Ray Serve's configuration sets it.

    Raises:
        InvalidInput, InvalidPolicy: a value is out of its range, or a name is unknown.
    """

    model: str = "demo"
    store: Annotated[str, Field(min_length=1)]
    engine: EngineName = "transformers"
    device: str | None = None
    dtype: DtypeName | None = None
    compile: bool = False
    window_tokens: int | None = None
    trust_remote_code: bool = False
    originals_bytes: int | None = None
    originals_disk_bytes: int | None = None
    policy: MemoryPolicy = MemoryPolicy()
    server: dict[str, Any] = Field(default_factory=dict)
    num_replicas: Annotated[int, Field(ge=1)] = 1


@serve.deployment(max_ongoing_requests=MAX_ONGOING, request_router_config=BY_CONVERSATION)
class Replica:
    """One model with its share of the conversations; answers requests as `am-memory serve` does."""

    def __init__(self, settings: RaySettings, server: ServerSettings) -> None:
        memory = Memory.from_pretrained(
            settings.model,
            engine=settings.engine,
            policy=settings.policy,
            device=settings.device,
            dtype=settings.dtype,
            compile=settings.compile,
            window_tokens=settings.window_tokens,
            trust_remote_code=settings.trust_remote_code,
            store=settings.store,
            originals_bytes=settings.originals_bytes,
            originals_disk_bytes=settings.originals_disk_bytes,
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        self._app = create_app(memory, server)
        self._name = serve.get_replica_context().replica_tag

    async def messages(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """The ASGI messages of the answer, one by one. The answer is cancelled when nobody iterates any more."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue(MAX_UNSENT)
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return unread.pop() if unread else await asyncio.get_running_loop().create_future()

        async def answer() -> None:
            try:
                await self._app(scope, receive, sent.put)
            except Exception:  # but no cancellation: nobody reads the queue then
                await sent.put(None)
                raise
            await sent.put(None)

        answering = asyncio.ensure_future(answer())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await answering
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering

    async def whole(self, scope: dict[str, Any], body: bytes) -> ReplicaAnswer:
        """The same as one answer."""
        start, *parts = [message async for message in self.messages(scope, body)]
        text = b"".join(part.get("body", b"") for part in parts)
        return ReplicaAnswer(self._name, start["status"], list(start["headers"]), text)


@serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})  # it only waits
class Ingress:
    """Routes each request to the replica of its conversation, and returns the answer. Knows no model."""

    def __init__(self, replicas: DeploymentHandle[Any], server: ServerSettings) -> None:
        self._replicas, self._server = replicas, server
        self._admission = Admission(server)

    async def __call__(self, request: Request) -> Response:
        scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
        try:
            async with self._admission.body_of(request.scope, request.receive) as body:
                if is_broadcast(request.method, request.url.path):
                    return await self._from_all(scope, body)
                return await self._from_one(request, scope, body)
        except ApiError as error:
            return error.response()
        except LOST as error:
            return _lost(error).response()

    async def _from_all(self, scope: dict[str, Any], body: bytes) -> Response:
        found = await self._replicas.broadcast("whole", scope, body).results_async(return_exceptions=True)
        answers = [answer for answer in found if isinstance(answer, ReplicaAnswer)]
        if not answers:
            raise ApiError(503, "no replica answers: try again", type="server_error", code="no_replica")
        answer = merged(scope["path"], answers)
        return _with_headers(Response(answer.body, answer.status), answer.headers)

    async def _from_one(self, request: Request, scope: dict[str, Any], body: bytes) -> Response:
        key = affinity(request.method, scope["path"], request.headers, body, has_keys=bool(self._server.api_keys))
        replica = self._replicas.options(stream=True, session_id=key or "")
        messages = cast("AsyncIterator[Message]", replica.messages.remote(scope, body))
        start = await anext(messages)
        return _with_headers(StreamingResponse(_bodies(messages, start), start["status"]), start["headers"])


async def _bodies(messages: AsyncIterator[Message], start: Message) -> AsyncIterator[bytes]:
    """The body of the answer, part by part. If the replica is lost, an event stream ends with that error."""
    try:
        async for message in messages:
            yield message.get("body", b"")
    except LOST as error:
        if dict(start["headers"]).get(b"content-type", b"").partition(b";")[0] != b"text/event-stream":
            raise
        yield sse.failure(_lost(error)).encode()


def _with_headers(response: Response, headers: Headers) -> Response:
    response.raw_headers = headers
    return response


def _lost(error: Exception) -> ApiError:
    logger.warning("a replica was lost: %s", error)
    return ApiError(
        503, "the replica of this conversation was lost: try again", type="server_error", code="replica_lost"
    )


def build(settings: RaySettings) -> Application:
    """The application, for `serve run` and for `import_path` in Ray Serve's configuration.

    Raises:
        InvalidInput: a value is out of its range, or the server would be open to everybody by accident.
    """
    fields = {"model_name": name_of(settings.model), **settings.server}
    for kind, variable in (("api_keys", KEYS_VARIABLE), ("operator_keys", OPERATOR_KEYS_VARIABLE)):
        fields[kind] = (*fields.get(kind, ()), *keys_of_environment(variable))
    server = ServerSettings(**fields)
    replicas = Replica.options(  # type: ignore[attr-defined]
        num_replicas=settings.num_replicas,
        graceful_shutdown_timeout_s=server.shutdown_seconds + DRAIN_SECONDS,
    ).bind(settings, server)
    return Ingress.bind(replicas, server)  # type: ignore[attr-defined, no-any-return]
