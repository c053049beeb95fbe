"""Two replicas on one machine: a conversation stays on one of them, streams, and survives its loss."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import until

from am_memory.cli.serve import KEYS_VARIABLE
from am_memory.errors import InvalidInput, InvalidPolicy

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'attention-matching-memory[ray]'")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # Ray's own
]

APP = "am-memory"
MOST_LOAD = 3
"""Of each core: with 3 all went well, with 7 Ray's own processes did not start in time."""
SMALL: Any = {"object_store_memory": 100 * 2**20}
ALICE, BOB, OPERATOR = "key-of-alice", "key-of-bob", "key-of-the-operator"
SESSIONS = "/v1/memory/sessions"
HELLO = {"role": "user", "content": "hello, this is the first of several messages"}


class Cluster:
    """Two replicas of the tiny model behind one address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def http(self, key: str = ALICE) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def client(self, key: str = ALICE) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def figures(self, name: str) -> dict[str, float]:
        """A metric of each replica."""
        with self.http(OPERATOR) as http:
            text = http.get("/metrics").text
        found = re.findall(rf'^am_memory_{name}{{replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}


@pytest.fixture(scope="module")
def cluster(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from am_memory_server.ray_serve import RaySettings, build
    from ray import serve

    if os.getloadavg()[0] > MOST_LOAD * (os.cpu_count() or 1):
        pytest.skip("the machine is too busy for Ray, which gives its processes a minute to start")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name in ("READY_CHECK", "HEALTH_CHECK"):  # on a busy machine, else, each proxy is killed while it starts
            patch.setenv(f"RAY_SERVE_PROXY_{name}_TIMEOUT_S", "120")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # nobody else's; and Ray leaves none in the user's home
        try:
            ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, **SMALL)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        except Exception as error:  # knows nothing of ours yet: it gives a machine 60 s to start its processes
            ray.shutdown()
            pytest.skip(f"Ray does not start here: {error}")
        policy = {"trigger_tokens": 300, "keep_ratio": 0.25, "pinned": 3, "keep_recent": 16, "chunk_tokens": 64}
        settings = {
            "model": str(model_folder),
            "store": str(tmp_path_factory.mktemp("shared")),
            "policy": policy,
            "server": {"model_name": "tiny", "max_tokens": 8, "api_keys": [ALICE, BOB], "operator_keys": [OPERATOR]},
            "num_replicas": 2,
        }
        serve.run(build(RaySettings.model_validate(settings)), name=APP)
        yield Cluster(f"http://127.0.0.1:{port}")
        serve.shutdown()
        ray.shutdown()


def ask(client: openai.OpenAI, messages: list[Any], conversation: str | None = None, **options: Any) -> Any:
    named = {} if conversation is None else {"metadata": {"conversation_id": conversation}}
    return client.chat.completions.create(model="tiny", messages=messages, temperature=0, **named, **options)


def answered(messages: list[Any], answer: Any) -> list[Any]:
    """The conversation with the answer and one more question."""
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    return [*messages, said, {"role": "user", "content": "and what else?"}]


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


@pytest.mark.parametrize("conversation", ["named", None], ids=["with an id", "by its opening messages"])
def test_a_conversation_keeps_to_one_replica_and_only_what_is_new_is_read(
    cluster: Cluster, conversation: str | None
) -> None:
    client, before = cluster.client(), cluster.figures("prompt_tokens_total")
    messages: list[Any] = [{"role": "user", "content": f"the first message of {conversation}"}]
    answer = ask(client, messages, conversation)
    for _ in range(4):
        messages, known = answered(messages, answer), answer.usage.total_tokens
        answer = ask(client, messages, conversation)
        assert cached(answer) == known
    after = cluster.figures("prompt_tokens_total")
    assert sum(after[replica] > before[replica] for replica in after) == 1


def test_both_replicas_work(cluster: Cluster) -> None:
    for number in range(12):
        ask(cluster.client(), [HELLO], f"one of several, {number}", max_tokens=1)
    tokens = cluster.figures("prompt_tokens_total")
    assert len(tokens) == 2
    assert min(tokens.values()) > 0


def test_an_answer_streams_and_ends_with_its_client(cluster: Cluster) -> None:
    before = sum(cluster.figures("cancelled_total").values())
    stream = ask(cluster.client(), [HELLO], "endless", max_tokens=16000, stream=True)
    pieces = [next(iter(stream)) for _ in range(5)]
    assert sum(cluster.figures("active").values()) == 1  # it came before the answer was whole
    stream.close()
    assert all(piece.choices[0].finish_reason is None for piece in pieces)
    until(lambda: sum(cluster.figures("cancelled_total").values()) == before + 1)
    assert sum(cluster.figures("active").values()) == 0


def test_streamed_and_whole_answers_are_the_same(cluster: Cluster) -> None:
    whole = ask(cluster.client(), [HELLO], "whole")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(cluster.client(), [HELLO], "streamed", **options))
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_errors_and_the_page_pass_through_the_ingress(cluster: Cluster) -> None:
    with cluster.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert "<title>am-memory</title>" in http.get("/").text
        wrong = http.post("/v1/chat/completions", json={"messages": []})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_request")
    with pytest.raises(openai.AuthenticationError):
        ask(cluster.client("key-of-mallory"), [HELLO])
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        cluster.client().chat.completions.create(model="other", messages=[HELLO])  # type: ignore[list-item]


def test_all_sessions_of_a_key_are_listed_and_none_of_another(cluster: Cluster) -> None:
    names = {f"listed {number}" for number in range(6)}
    for name in names:
        ask(cluster.client(), [HELLO], name, max_tokens=1)
    ask(cluster.client(BOB), [HELLO], "of bob", max_tokens=1)
    with cluster.http() as alice, cluster.http(BOB) as bob:
        entries = {entry["id"]: entry for entry in alice.get(SESSIONS).json()["data"]}
        assert names <= {*entries}
        assert all(entries[name]["stats"]["logical_tokens"] > 0 for name in names)
        assert [entry["id"] for entry in bob.get(SESSIONS).json()["data"]] == ["of bob"]
        assert bob.get(f"{SESSIONS}/listed 0").status_code == 404


def test_a_deletion_reaches_all_replicas(cluster: Cluster) -> None:
    ask(cluster.client(), [HELLO], "secret")
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "query_string": b""}
    headers = [(b"authorization", f"Bearer {ALICE}".encode())]
    asked = {**scope, "path": f"{SESSIONS}/secret", "raw_path": b"", "headers": headers}
    handle = ray.serve.get_deployment_handle("Replica", APP)
    looked = handle.broadcast("whole", asked, b"").results()  # it lies in the memory of both now
    assert [answer.status for answer in looked] == [200, 200]
    with cluster.http() as http:
        assert http.delete(f"{SESSIONS}/secret").json()["deleted"]
        assert "secret" not in [entry["id"] for entry in http.get(SESSIONS).json()["data"]]
        assert http.delete(f"{SESSIONS}/secret").status_code == 404
    assert [answer.status for answer in handle.broadcast("whole", asked, b"").results()] == [404, 404]


def test_an_application_that_is_open_to_everybody_by_accident_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from am_memory_server.ray_serve import RaySettings, build

    settings = RaySettings(store="somewhere", server={"host": "0.0.0.0"})
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(InvalidInput, match="there is no API key"):
        build(settings)
    monkeypatch.setenv(KEYS_VARIABLE, ALICE)
    assert build(settings)


def test_a_store_is_required() -> None:
    from am_memory_server.ray_serve import RaySettings

    with pytest.raises(InvalidInput, match="store: Field required"):
        RaySettings.model_validate({})


def test_an_unknown_setting_is_refused_with_the_nearest_one() -> None:
    from am_memory_server.ray_serve import RaySettings, build

    with pytest.raises(InvalidInput, match=r"there is no num_replica \(did you mean num_replicas\?\)"):
        RaySettings.model_validate({"store": "somewhere", "num_replica": 2})
    with pytest.raises(InvalidPolicy, match=r"there is no triger_tokens \(did you mean trigger_tokens\?\)"):
        RaySettings.model_validate({"store": "somewhere", "policy": {"triger_tokens": 2000}})
    with pytest.raises(InvalidInput, match=r"there is no max_session \(did you mean max_sessions\?\)"):
        build(RaySettings(store="somewhere", server={"max_session": 2}))


def test_a_conversation_survives_its_replica(cluster: Cluster) -> None:
    before = cluster.figures("prompt_tokens_total")
    client, messages = cluster.client(), [HELLO]
    answer = ask(client, messages, "survivor")
    messages, known = answered(messages, answer), answer.usage.total_tokens
    after = cluster.figures("prompt_tokens_total")
    (owner,) = [replica for replica in after if after[replica] > before[replica]]
    stream = ask(client, [{"role": "user", "content": "under way"}], "survivor", max_tokens=16000, stream=True)
    next(iter(stream))
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{APP}#Replica#{owner}", namespace="serve"))
    with pytest.raises(openai.APIError, match="lost: try again"):
        list(stream)
    again = ask(client.with_options(max_retries=5), messages, "survivor")
    assert cached(again) == known
    until(lambda: len(cluster.figures("active")) == 2, seconds=60)  # a new replica took the place of the lost one
    assert owner not in cluster.figures("active")
    assert cached(ask(client, answered(messages, again), "survivor")) == again.usage.total_tokens
