"""What a client is told when its request is not answered: an HTTP status and the error object of OpenAI's interface."""

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):
    """One sentence for the client. `param` is the field of the request, `code` a word that programs can compare.

    reason: under which the failure is counted in the metrics; "" for what is the client's own.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, reason: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.reason = reason
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shutting_down() -> Problem:
    return Problem(503, "the server is shutting down; ask again later", code="shutting_down", reason="shutting_down")


def failed(message: str) -> Problem:
    """The server's own failure, which no other request of the client would mend."""
    return Problem(500, message, code="server_failed", reason="failed")
