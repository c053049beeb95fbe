"""Costs of a client, with and without a key: bodies, heads, connections, and slow reading."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread
from typing import Any

import anyio
import pytest
import uvicorn
from am_memory_server import ServerSettings
from am_memory_server.connections import BoundedConnection, connections_of
from am_memory_server.errors import as_api_error
from am_memory_server.serve import uvicorn_config
from serving import NewServer, Server, until
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from am_memory.errors import InvalidInput, StorageError

ALICE, BOB, OPERATOR = "key-of-alice", "key-of-bob", "key-of-the-operator"
CHAT = "/v1/chat/completions"
ASKED = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()


class Connection:
    """Bytes to a server and back."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)

    def ask(self, *, size: int, key: str | None = None, kind: str = "application/json", sent: bytes = b"") -> None:
        """Send the head of a request with a body of `size` bytes, and a part of the body."""
        head = [f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {size}"]
        head += [f"Authorization: Bearer {key}"] if key else []
        self.socket.sendall("\r\n".join([*head, "", ""]).encode() + sent)

    def status(self) -> int:
        """The HTTP status of the answer; 0 if the connection was closed without one."""
        return int(self.answer()[9:12] or b"0")

    def answer(self) -> bytes:
        """The first bytes of the answer, at least its head."""
        try:
            return self.socket.recv(4096)
        except ConnectionResetError:
            return b""

    @property
    def is_open(self) -> bool:
        self.socket.settimeout(0)
        try:
            return self.socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        finally:
            self.socket.settimeout(30)


@contextmanager
def connected(server: Server) -> Iterator[Callable[[], Connection]]:
    """A function that opens connections; they are closed at the end of the block."""
    with ExitStack() as stack:

        def connect() -> Connection:
            connection = Connection(server.url)
            stack.callback(connection.socket.close)
            return connection

        yield connect


@pytest.mark.parametrize("key", [None, "key-of-mallory"])
def test_without_a_valid_key_no_body_is_read(new_server: NewServer, key: str | None) -> None:
    """Sixty connections without a valid key once cost a gigabyte, with 15 MB of a body each."""
    with new_server(api_keys=[ALICE]) as server, connected(server) as connect:
        connection = connect()
        connection.ask(size=15_000_000, key=key)
        assert connection.status() == 401


def test_a_refused_client_still_gets_its_answer_while_it_sends(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE]) as server, server.http("key-of-mallory") as http:
        answer = http.post(CHAT, content=b" " * 8_000_000, headers={"Content-Type": "application/json"})
        assert answer.status_code == 401
        assert http.get("/health").status_code == 200


def test_a_body_whose_length_is_too_large_is_not_read(new_server: NewServer) -> None:
    with new_server(max_body_bytes=1000) as server, connected(server) as connect:
        connection = connect()
        connection.ask(size=1001)
        assert connection.status() == 413


def test_one_key_has_a_share_of_the_pending_bytes(new_server: NewServer) -> None:
    settings = {"api_keys": [ALICE, BOB], "max_body_bytes": 1000, "max_pending_bytes": 4000}
    with new_server(**settings) as server, connected(server) as connect:
        held = [connect() for _ in range(2)]
        for connection in held:
            connection.ask(size=1000, key=ALICE, sent=b" " * 900)
        refused = connect()
        until(lambda: _status_of(connect, ALICE, size=1000, sent=b" " * 900) == 429)
        refused.ask(size=1000, key=ALICE, sent=b" " * 900)
        assert b"\r\nretry-after:" in refused.answer()
        assert _status_of(connect, BOB, size=len(ASKED), sent=ASKED) == 200
        held[0].socket.close()
        until(lambda: _status_of(connect, ALICE, size=len(ASKED), sent=ASKED.ljust(900)[: len(ASKED)]) == 200)


def _status_of(connect: Callable[[], Connection], key: str, *, size: int, sent: bytes) -> int:
    """The HTTP status of a request; 0 if the server accepted it and waits for the rest of its body."""
    connection = connect()
    connection.ask(size=size, key=key, sent=sent)
    connection.socket.settimeout(5 if len(sent) == size else 0.2)
    try:
        return connection.status()
    except TimeoutError:
        connection.socket.close()
        return 0


def test_all_keys_together_have_a_limit_of_pending_bytes(new_server: NewServer) -> None:
    keys = [f"key-number-{number}" for number in range(5)]
    with new_server(api_keys=keys, max_body_bytes=1000, max_pending_bytes=4000) as server, connected(server) as connect:
        for key in keys[:4]:
            connect().ask(size=1000, key=key, sent=b" " * 999)
        until(lambda: _status_of(connect, keys[4], size=1000, sent=b" " * 900) == 503)


def test_the_bytes_of_a_request_count_until_its_answer_has_ended(new_server: NewServer) -> None:
    """Otherwise only the number of waiting requests would be limited, at 16 MB each."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 2000, "stream": True})
    with new_server(max_body_bytes=1000, max_pending_bytes=1000) as server, connected(server) as connect:
        answered = connect()
        answered.ask(size=len(body), sent=body.encode())
        assert answered.status() == 200
        other = connect()
        other.ask(size=len(body), sent=body.encode())
        assert other.status() == 429
        answered.socket.close()
        until(lambda: _status_of(connect, "", size=len(ASKED), sent=ASKED) == 200)


def test_a_body_that_arrives_too_slowly_is_refused(new_server: NewServer) -> None:
    with new_server(body_seconds=0.2) as server, connected(server) as connect:
        connection = connect()
        connection.ask(size=1000, sent=b"{")
        assert connection.status() == 408


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nHost: local", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"]
)
def test_an_idle_connection_is_closed(new_server: NewServer, sent: bytes) -> None:
    with new_server(idle_seconds=0.2) as server, connected(server) as connect:
        connection = connect()
        connection.socket.sendall(sent)
        while connection.answer():
            pass


def test_a_head_without_an_end_is_refused(new_server: NewServer) -> None:
    with new_server() as server, connected(server) as connect:
        connection = connect()
        connection.socket.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 40_000)
        assert connection.status() == 400


def test_a_new_connection_closes_the_oldest_idle_one(new_server: NewServer) -> None:
    with new_server(max_connections=3) as server, connected(server) as connect:
        idle = [connect() for _ in range(10)]
        until(lambda: sum(connection.is_open for connection in idle) == 3)
        assert all(connection.is_open for connection in idle[-3:])
        asking = connect()
        asking.socket.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert asking.status() == 200


def test_with_no_idle_connection_a_new_one_gets_a_503(new_server: NewServer) -> None:
    with new_server(max_connections=2) as server, connected(server) as connect:
        working = [connect() for _ in range(2)]
        for connection in working:
            connection.ask(size=1000, sent=b"{")

        def refused() -> bool:
            one_more = connect()
            one_more.socket.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = one_more.answer()
            return answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer and b"overloaded" in answer

        until(refused)
        assert all(connection.is_open for connection in working)


CHUNK = b"x" * 65536
MANY = 2000


def test_a_client_that_does_not_read_costs_only_buffers_and_is_disconnected() -> None:
    """It once kept its connection, and stayed active, for ever."""
    sent: list[int] = []
    ended: list[bool] = []

    async def chunks() -> AsyncIterator[bytes]:
        try:
            for number in range(MANY):
                sent.append(number)
                yield CHUNK
                await anyio.sleep(0)  # as one that waits for the next token
        finally:
            ended.append(True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(chunks())(scope, receive, send)

    settings = ServerSettings(idle_seconds=0.3)
    config = uvicorn_config(app, settings, log_level="error")
    config.lifespan = "off"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config)
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        until(lambda: server.started)
        connection = Connection(f"http://127.0.0.1:{listener.getsockname()[1]}")
        connection.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: ended)
        assert len(sent) < MANY / 2
        connection.socket.close()
        server.should_exit = True
        thread.join()


class Clock:
    """An event loop whose timers run when a test says so."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def call_later(self, seconds: float, call: Callable[[], None]) -> Any:
        self.due.append(call)
        return self

    def cancel(self) -> None:
        self.due.clear()

    def tick(self) -> None:
        self.due.pop()()


class Pipe:
    """A transport with a given number of unsent bytes at each call."""

    def __init__(self, *unsent: int) -> None:
        self.unsent, self.is_aborted = list(unsent), False

    def get_write_buffer_size(self) -> int:
        return self.unsent.pop(0) if len(self.unsent) > 1 else self.unsent[0]

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def get_extra_info(self, name: str) -> None:
        return None


def test_a_slow_client_stays_connected_and_a_stopped_one_does_not() -> None:
    settings, clock, pipe = ServerSettings(), Clock(), Pipe(0, 900, 600, 600, 600)
    config = uvicorn_config(lambda: None, settings)  # type: ignore[arg-type]
    connection: BoundedConnection = connections_of(settings)(  # type: ignore[assignment]
        config=config,
        server_state=ServerState(),
        app_state={},
        _loop=clock,  # type: ignore[arg-type]
    )
    connection.connection_made(pipe)  # type: ignore[arg-type]
    connection.pause_writing()
    clock.tick()
    assert not pipe.is_aborted
    clock.tick()
    assert pipe.is_aborted


def test_metrics_need_an_operators_key(new_server: NewServer) -> None:
    """Any key could read in /metrics how many others are active, and how many tokens they use."""
    with (
        new_server(api_keys=[ALICE, BOB], operator_keys=[OPERATOR]) as server,
        server.http(ALICE) as alice,
        server.http(OPERATOR) as operator,
        server.http() as anybody,
    ):
        refused = alice.get("/metrics")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")
        assert anybody.get("/metrics").status_code == 401
        assert "am_memory_active 0.0" in operator.get("/metrics").text
        for path in ("/v1/models", "/v1/memory/sessions"):
            refused = operator.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_key")


def test_with_api_keys_but_no_operators_key_nobody_sees_the_metrics(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE]) as server, server.http(ALICE) as alice:
        assert alice.get("/metrics").status_code == 403


def test_one_key_can_be_both_and_a_local_server_needs_none(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE], operator_keys=[ALICE]) as server, server.http(ALICE) as alice:
        assert alice.get("/metrics").status_code == alice.get("/v1/models").status_code == 200
    with new_server() as server, server.http() as anybody:
        assert anybody.get("/metrics").status_code == 200
    with new_server(operator_keys=[OPERATOR]) as server, server.http() as anybody:
        assert anybody.get("/metrics").status_code == 403
        assert anybody.get("/v1/models").status_code == 200


def test_every_path_that_is_not_open_needs_a_key(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE]) as server, server.http() as http:
        for path in ("/health", "/openapi.json", "/", "/static/app.js"):
            assert http.get(path).status_code == 200, path
        for path in ("/metrics", "/v1/models", "/nothing", "/v1/memory/sessions/x", "/health/", "/static"):
            assert http.get(path).status_code == 401, path


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.2", "[::1]", "[::FFFF:127.0.0.1]", "chat.localhost"],
)
@pytest.mark.parametrize("port", ["", ":8000"])
def test_all_names_of_this_machine_are_accepted(server: Server, host: str, port: str) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"Host": host + port}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example", "10.0.0.1", "0.0.0.0",
        "[::2]", "[::1", "::1]", "[localhost]evil.example", "", ":8000", "localhost..", "127.0.0.1@evil.example",
    ],
)  # fmt: skip
def test_other_host_names_are_refused(server: Server, host: str) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "multipart/form-data"]
)
def test_a_body_of_another_media_type_is_refused(server: Server, kind: str) -> None:
    """These made an internal error; and any web page can make a browser send them to any server."""
    for path in (CHAT, "/v1/completions", "/v1/memory/sessions/a/compact", "/v1/memory/sessions/a/fork"):
        with server.http() as http:
            answer = http.post(path, content=ASKED, headers={"Content-Type": kind} if kind else {})
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_every_json_media_type_is_accepted(server: Server, kind: str) -> None:
    with server.http() as http:
        assert http.post(CHAT, content=ASKED, headers={"Content-Type": kind}).status_code == 200


def test_no_error_shows_where_the_server_stores_data() -> None:
    """An error of the store once showed its folder, and the digest of a key."""
    answer = as_api_error(StorageError("/data/conversations/0a1b/one.session is damaged"))
    assert (answer.status, answer.code) == (503, "memory_error")
    assert "/data" not in answer.message


def test_settings_that_leave_no_room_for_one_request_are_refused() -> None:
    with pytest.raises(InvalidInput, match="max_body_bytes 100 is above 50"):
        ServerSettings(max_body_bytes=100, max_pending_bytes=100, api_keys=(ALICE, BOB))
