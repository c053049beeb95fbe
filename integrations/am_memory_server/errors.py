"""Errors in OpenAI's form, and which of ours are whose fault."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
    UnsupportedOperation,
)
from am_memory_server.scheduler import QueueFull, ShuttingDown

logger = logging.getLogger("am_memory.server")
RETRY_SECONDS = 2


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        type, code, param: as OpenAI's API has them.
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
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param

    @property
    def body(self) -> dict[str, object]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> Mapping[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=dict(self.headers))


def as_api_error(error: Exception) -> ApiError:
    """Any error as one for the client; what is a fault of ours is logged, and not told."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded")
        case ShuttingDown():
            return ApiError(503, message, type="server_error", code="shutting_down")
        case PromptTooLong():
            return ApiError(400, message, code="context_length_exceeded", param="messages")
        case SessionNotFound():
            return ApiError(404, message, code="session_not_found")
        case InvalidInput() | UnsupportedOperation():
            return ApiError(400, message)
        case BudgetTooSmall():
            return ApiError(409, message, code="nothing_to_compact")
        case CompactionFailed():
            return ApiError(503, message, type="server_error", code="compaction_failed")
        case AMMemoryError():
            logger.error("%s: %s", type(error).__name__, message)
            return ApiError(503, message, type="server_error", code="memory_error")
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has more", type="server_error", code="internal_error")


def install(app: FastAPI) -> None:
    """Have every error of the application answered in this form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors()).response()

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


def _validation_error(problems: Any) -> ApiError:
    """The first problem names the parameter; all are told."""
    told = []
    for problem in problems:
        where = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path"))
        told.append(f"{where or 'body'}: {problem['msg']}")
    first = told[0].partition(":")[0] if told else None
    return ApiError(400, "; ".join(told[:5]).encode("utf-8", "replace").decode(), param=first, code="invalid_request")
