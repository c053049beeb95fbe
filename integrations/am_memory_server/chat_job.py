"""A chat answer as a job of the scheduler: a part of the prompt or one token a step, updates to the client.

Both are awaited together with those of other answers.
"""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial

from am_memory.conversations.chat import HostWork, PromptProgress, answer_chat
from am_memory.conversations.chat_answer import ChatAnswer, Delta
from am_memory.events import Event
from am_memory_server.jobs import Job, Publish, Steps, TurnKey, on_host
from am_memory_server.requests import thread_of
from am_memory_server.service import CompactionLog, Service
from am_memory_server.updates import (
    Finished,
    Started,
    event_update,
    lookup_update,
    reading_update,
    size_update,
    view_update,
)

SIZE_EVERY = 8
"""Tokens between two updates of the memory's size."""


def chat_job(service: Service, key: TurnKey) -> Job:
    """The job of one answer; its preparation makes the `ChatAnswer`."""
    arrived = time.monotonic()

    def start(publish: Publish, answer: ChatAnswer) -> Steps[None]:
        return _ChatRun(service, key, arrived, publish, answer).steps()

    return start


class _ChatRun:
    """One answer that is being generated."""

    def __init__(self, service: Service, key: TurnKey, arrived: float, publish: Publish, answer: ChatAnswer) -> None:
        self.service, self.conversation, self.arrived = service, key[1], arrived
        self.publish, self.answer = publish, answer
        self.compactions = CompactionLog(thread_of(key))
        self.is_started = False
        self.num_deltas = 0

    def steps(self) -> Steps[None]:
        is_complete = False
        try:
            with closing(self.service.with_events(answer_chat(self.answer), self._on_event)) as steps:
                for step in steps:
                    if isinstance(step, HostWork):
                        yield from on_host(partial(self.service.save_or_log, step.run))
                        continue
                    self._publish_step(step)
                    if self.compactions.unwritten or self.answer.finish_reason is not None:
                        self.compactions.write(self.answer.session)
                        self.publish(view_update(self.conversation, self.answer.session))
                    yield from self.service.awaiting(self.answer.next_steps, self._on_event)
            is_complete = True
            self.publish(Finished(self.answer, self.answer.session.stats))
        finally:
            self._count(is_complete)

    def _on_event(self, event: Event) -> None:
        """A listener of the memory; an idle worker may emit the events of other conversations meanwhile."""
        self.compactions.on_event(event)
        if event.session == self.compactions.session and (update := event_update(event)) is not None:
            self.publish(update)

    def _publish_step(self, step: PromptProgress | Delta) -> None:
        session = self.answer.session
        if isinstance(step, PromptProgress):
            if not self.is_started:
                self.publish(Started())
            self.is_started = True
            self.publish(reading_update(step, session))
            return
        if self.num_deltas == 0:
            self.service.metrics.first_token_seconds.observe(time.monotonic() - self.arrived)
        if step.looked_up and step.index == 0:
            self.publish(lookup_update(step.looked_up, session))
        if self.num_deltas % SIZE_EVERY == 0:
            self.publish(size_update(session))
        self.num_deltas += 1
        self.publish(step)

    def _count(self, is_complete: bool) -> None:
        """Count the answer in the metrics."""
        metrics, answer = self.service.metrics, self.answer
        metrics.generated_tokens.inc(answer.num_generated)
        if not is_complete:
            metrics.cancelled.inc()
            return
        usage = answer.usage
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        for each in (answer, *answer.others):
            metrics.answers.labels(each.finish_reason).inc()
        metrics.answer_seconds.observe(time.monotonic() - self.arrived)
