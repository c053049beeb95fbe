"""The server as an application of Ray Serve: replicas of one model, and one store that all of them share.

    serve run am_memory_server.ray_serve:build model=demo store=/shared/conversations num_replicas=2

An ingress reads each request, and hands it to the replica whose conversation it is, by consistent hashing; the replica
runs the whole application that `am-memory serve` runs. A replica that is lost takes no finished turn with it: each was
saved before its last chunk was sent, and the next replica goes on from the store.
"""
# Without postponed annotations: Ray Serve reads those of `build`.

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
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
from am_memory.errors import InvalidInput, problems
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory_server import sse
from am_memory_server.access import Admission
from am_memory_server.affinity import affinity
from am_memory_server.app import create_app
from am_memory_server.errors import ApiError, logger
from am_memory_server.gathered import Headers, Whole, gathered, is_for_all
from am_memory_server.scheduler import SWITCH_SECONDS
from am_memory_server.settings import ServerSettings

MAX_ONGOING = 1000
"""Requests that a replica takes: they wait in its own queue, which is fair and has its own limits."""
MAX_UNSENT = 64
"""Messages of an answer that Ray has not taken yet: the application waits with more."""
DRAIN_SECONDS = 10.0
"""Beside the time that running answers have, for a replica to notice that it is to stop."""
SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
BY_CONVERSATION = RequestRouterConfig(request_router_class=ConsistentHashRouter)  # type: ignore[arg-type]
LOST = (RayActorError, RayServeException)


class RaySettings(BaseModel):
    """What the application takes: the `args` of Ray Serve's configuration.

    Attributes:
        model: a hub id, a folder, a .gguf file, or "demo", which every node can reach.
        store: a folder or fsspec URL that every node can reach: where conversations outlive their replicas.
        engine, device, dtype, compile, window_tokens, trust_remote_code: as `Memory.from_pretrained` takes them.
        policy: when and how the memory is compacted.
        server: keys, limits and the rest; `host` is the one that Ray Serve's own proxies listen on. Keys may stand in
            the environment as well, as those of `am-memory serve` do.
        num_replicas: where Ray Serve's configuration says nothing.

    Raises:
        InvalidInput, InvalidPolicy: a value out of its range, or a name that there is not.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = "demo"
    store: Annotated[str, Field(min_length=1)]
    engine: EngineName = "transformers"
    device: str | None = None
    dtype: DtypeName | None = None
    compile: bool = False
    window_tokens: int | None = None
    trust_remote_code: bool = False
    policy: MemoryPolicy = MemoryPolicy()
    server: dict[str, Any] = {}
    num_replicas: Annotated[int, Field(ge=1)] = 1

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = problems(error.errors(), type(self).model_fields, shows_values=False)  # one may be a key
            raise InvalidInput(found) from error


@serve.deployment(max_ongoing_requests=MAX_ONGOING, request_router_config=BY_CONVERSATION)
class Replica:
    """One model with the conversations that are its own; answers requests as `am-memory serve` does."""

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
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        self._app = create_app(memory, server)
        self._name = serve.get_replica_context().replica_tag

    async def messages(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """What the application sends, as it sends it; who stops to listen ends it."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue(MAX_UNSENT)
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return unread.pop() if unread else await asyncio.get_running_loop().create_future()

        async def answer() -> None:
            try:
                await self._app(scope, receive, sent.put)
            except Exception:  # not where it is given up, as nobody listens then
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

    async def whole(self, scope: dict[str, Any], body: bytes) -> Whole:
        """The same, as one answer."""
        start, *parts = [message async for message in self.messages(scope, body)]
        text = b"".join(part.get("body", b"") for part in parts)
        return Whole(self._name, start["status"], list(start["headers"]), text)


@serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})  # it only waits
class Ingress:
    """Hands each request to the replica whose conversation it is, and its answer back. Knows no model."""

    def __init__(self, replicas: DeploymentHandle[Any], server: ServerSettings) -> None:
        self._replicas, self._server = replicas, server
        self._admission = Admission(server)

    async def __call__(self, request: Request) -> Response:
        scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
        try:
            async with self._admission.body_of(request.scope, request.receive) as body:
                if is_for_all(request.method, request.url.path):
                    return await self._from_all(scope, body)
                return await self._from_one(request, scope, body)
        except ApiError as error:
            return error.response()
        except LOST as error:
            return _lost(error).response()

    async def _from_all(self, scope: dict[str, Any], body: bytes) -> Response:
        found = await self._replicas.broadcast("whole", scope, body).results_async(return_exceptions=True)
        answers = [answer for answer in found if isinstance(answer, Whole)]
        if not answers:
            raise ApiError(503, "there is no replica that answers", type="server_error", code="no_replica")
        answer = gathered(scope["path"], answers)
        return _with_headers(Response(answer.body, answer.status), answer.headers)

    async def _from_one(self, request: Request, scope: dict[str, Any], body: bytes) -> Response:
        key = affinity(request.method, scope["path"], request.headers, body, has_keys=bool(self._server.api_keys))
        replica = self._replicas.options(stream=True, session_id=key or "")
        messages = cast("AsyncIterator[Message]", replica.messages.remote(scope, body))
        start = await anext(messages)
        return _with_headers(StreamingResponse(_bodies(messages, start), start["status"]), start["headers"])


async def _bodies(messages: AsyncIterator[Message], start: Message) -> AsyncIterator[bytes]:
    """The answer's body, piece by piece; where the replica is lost on the way, a stream of events says so."""
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
        503, "the replica of this conversation was lost: ask again", type="server_error", code="replica_lost"
    )


def build(settings: RaySettings) -> Application:
    """The application; what `serve run` and the `import_path` of a configuration name.

    Raises:
        InvalidInput: a server that is open to everybody by accident, or a value out of its range.
    """
    named = {"model_name": name_of(settings.model), **settings.server}
    for kind, variable in (("api_keys", KEYS_VARIABLE), ("operator_keys", OPERATOR_KEYS_VARIABLE)):
        named[kind] = (*named.get(kind, ()), *keys_of_environment(variable))
    server = ServerSettings(**named)
    replicas = Replica.options(  # type: ignore[attr-defined]
        num_replicas=settings.num_replicas,
        graceful_shutdown_timeout_s=server.shutdown_seconds + DRAIN_SECONDS,
    ).bind(settings, server)
    return Ingress.bind(replicas, server)  # type: ignore[attr-defined, no-any-return]
