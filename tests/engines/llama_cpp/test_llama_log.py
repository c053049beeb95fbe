"""llama.cpp's log: the whole process has one, and several threads make contexts at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from am_memory.engines.llama_cpp.library import _log_collector, captured_log


def test_each_capture_has_the_lines_of_its_own_time() -> None:
    """A callback that was freed while another thread logged ended the process."""

    def captured(number: int) -> list[str]:
        with captured_log() as lines:
            _log_collector()(2, f"{number} said\n".encode(), None)
        return lines

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(captured, range(400)))
    assert found == [[f"{number} said\n"] for number in range(400)]
    _log_collector()(2, b"nobody listens\n", None)
    assert found[-1] == ["399 said\n"]
