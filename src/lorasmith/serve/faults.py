"""Faults of a request, in OpenAI's shape with the status that its clients look at."""

from typing import Any

from lorasmith.errors import LorasmithError, OverlongError
from lorasmith.serve.batch import FailedError
from lorasmith.serve.scheduler import BusyError, StoppedError


class RequestError(LorasmithError):
    """Raised for a request that cannot be answered as it stands."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code


def read_fault(fault: LorasmithError) -> RequestError:
    """Return what a client is told about ``fault``."""
    match fault:
        case RequestError():
            return fault
        case BusyError():
            return RequestError(str(fault), status=429, type="rate_limit_error", code="server_busy")
        case StoppedError():
            return RequestError(str(fault), status=503, type="server_error", code="server_stopping")
        case FailedError():
            return RequestError(str(fault), status=500, type="server_error", code="answer_failed")
        case OverlongError():
            return RequestError(str(fault), param="messages", code="context_length_exceeded")
    return RequestError(str(fault))


def error_body(fault: RequestError) -> dict[str, Any]:
    """Return the body of a refusal, as OpenAI writes it."""
    return {"error": {"message": str(fault), "type": fault.type, "param": fault.param, "code": fault.code}}
