"""Errors in the form of OpenAI's API, and the HTTP status of each error of the library."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from am_memory.errors import (
    AMMemoryError,
    BudgetTooSmall,
    CompactionFailed,
    InvalidInput,
    PromptTooLong,
    SessionNotFound,
    TextNotFound,
    UnsupportedOperation,
)
from am_memory.formatting import shortened
from am_memory_server.bodies import UNKNOWN_NAME
from am_memory_server.jobs import AnswerNotRead, QueueFull, ShuttingDown

logger = logging.getLogger("am_memory.server")
RETRY_SECONDS = 2
MAX_CHARS = 1000
"""Length of an error message: it may quote the request, which is long."""
MAX_PROBLEMS = 5
OWNER = re.compile(r"'(?:[0-9a-f]{16}|anonymous)/")
"""An owner before the name of a conversation or a text: the digest of a key, which is no client's business."""


class ApiError(Exception):
    """An error as an HTTP response.

    Args:
        status: the HTTP status.
        message: for people.
        type, code, param: see OpenAI's API.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.code = status, type, code
        self.message, self.param = _as_shown(message), param and _as_shown(param)

    @property
    def body(self) -> dict[str, object]:
        """The body of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> Mapping[str, str]:
        """The additional headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body, self.status, headers=dict(self.headers))


def _as_shown(text: str) -> str:
    """Valid Unicode of limited length."""
    return shortened(text.encode("utf-8", "replace").decode(), MAX_CHARS)


def unknown_text(id: str) -> ApiError:
    """The error for a compact text that is not there, or is another key's."""
    return ApiError(404, f"there is no compact text {id!r}: GET /v1/memory/texts lists them", code="text_not_found")


def as_api_error(error: Exception) -> ApiError:
    """Any error as one for the client. An internal error is logged, and its message is not sent."""
    message = OWNER.sub("'", str(error))
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded")
        case AnswerNotRead():
            return ApiError(408, message, code="answer_not_read")
        case ShuttingDown():
            return ApiError(503, message, type="server_error", code="shutting_down")
        case PromptTooLong():
            return ApiError(400, message, code="context_length_exceeded", param="messages")
        case SessionNotFound():
            return ApiError(404, message, code="session_not_found")
        case TextNotFound():
            return unknown_text(error.name.partition("/")[2])  # behind the owner
        case InvalidInput() | UnsupportedOperation():
            return ApiError(400, message)
        case BudgetTooSmall():
            return ApiError(409, message, code="nothing_to_compact")
        case CompactionFailed():
            return ApiError(503, message, type="server_error", code="compaction_failed")
        case AMMemoryError():
            logger.error("%s: %s", type(error).__name__, message)
            public = "the memory failed; see the server's log"  # the error itself may name files of the server
            return ApiError(503, public, type="server_error", code="memory_error")
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; see the server's log", type="server_error", code="internal_error")


def install(app: FastAPI) -> None:
    """Make the application answer every error in this form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors(), error.body).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code)
        answer = response.response()
        answer.headers.update(error.headers or {})
        return answer

    for kind in (ApiError, AMMemoryError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _validation_error(problems: Sequence[Any], body: Any) -> ApiError:
    """One error for several problems; its `param` is the first one's, or a more precise one inside it."""
    if problems and problems[0]["type"] == "json_invalid":
        return ApiError(400, f"the body cannot be read as JSON: {problems[0]['ctx']['error']}", code="invalid_json")
    paths = [_path(problem, body) for problem in problems]
    found = zip(paths, problems, strict=True)
    messages = [*dict.fromkeys(f"{path or 'body'}: {_message(problem)}" for path, problem in found)]
    inside = [path for path in paths if f"{path}.".startswith(f"{paths[0]}.")]
    param = max(inside, key=len) if paths[0] else None
    return ApiError(400, "; ".join(messages[:MAX_PROBLEMS]), param=param, code="invalid_request")


def _message(problem: Any) -> str:
    """A validation error in words of the API: pydantic's own speak of Python."""
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "it should")
    return message.replace("valid dictionary", "valid JSON object").replace("valid list", "valid JSON array")


def _path(problem: Any, body: Any) -> str:
    """The path of a problem in the request, such as messages.0.content; "" for the whole body.

    pydantic's own path also names the types and functions that it tried; they are left out.
    """
    kind, *parts = problem["loc"]
    if kind != "body":
        return ".".join(map(str, parts))
    path, here = list[str](), body
    for part in parts:
        is_in_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if is_in_list or (isinstance(here, dict) and part in here):
            path.append(str(part))
            here = here[part]
    if problem["type"] == UNKNOWN_NAME:
        path.append(problem["ctx"]["name"])
    if problem["type"] == "missing":
        path.append(str(parts[-1]) if parts else "")
    return ".".join(path)
