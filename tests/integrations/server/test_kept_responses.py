"""The responses that the server keeps for `previous_response_id`, and their bound."""

from __future__ import annotations

from am_memory_server.kept_responses import Exchange, KeptResponse, KeptResponses


def a_response(id: str, *exchanges: Exchange) -> KeptResponse:
    return KeptResponse("tea", exchanges, {"id": id})


def an_exchange(num_chars: int) -> Exchange:
    return Exchange([{"role": "user", "content": "a" * num_chars}])


def test_messages_count_until_the_last_response_that_has_them_is_forgotten() -> None:
    """A large input whose own response was deleted lived on in the next one, and counted no more."""
    kept = KeptResponses(max_responses=100, max_bytes=10_000)
    for number in range(10):
        large, small = an_exchange(4000), an_exchange(10)
        kept.keep("ada", a_response(f"large {number}", large))
        kept.keep("ada", a_response(f"next {number}", large, small))
        kept.delete("ada", f"large {number}")
    assert [number for number in range(10) if kept.get("ada", f"next {number}")] == [8, 9]


def test_messages_that_responses_share_count_once() -> None:
    kept = KeptResponses(max_responses=100, max_bytes=10_000)
    large, second = an_exchange(6000), an_exchange(10)
    kept.keep("ada", a_response("first", large))
    kept.keep("ada", a_response("second", large, second))
    assert kept.get("ada", "first")
    kept.delete_conversation("ada", "tea")
    kept.keep("ada", a_response("third", an_exchange(9000)))
    kept.keep("ada", a_response("fourth", an_exchange(500)))
    assert kept.get("ada", "third")


def test_an_early_response_still_has_its_messages() -> None:
    first, second = an_exchange(1), an_exchange(2)
    assert [len(message["content"]) for message in a_response("second", first, second).messages] == [1, 2]
