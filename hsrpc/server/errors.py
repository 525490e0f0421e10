"""Errors that the server adds to those of the engine."""

from __future__ import annotations

from hsrpc.errors import HsrpcError


class MalformedRequestError(HsrpcError):
    """The bytes of a request are not what they should be."""

    def __init__(self, expected: str) -> None:
        self.expected = expected
        """What they should be, for the client."""
        super().__init__(f"the request is not {expected}")


class LateRequestError(HsrpcError):
    """A request has not come whole in time, or while others waited to be read."""

    def __init__(self, seconds: float) -> None:
        limit = f"within {seconds:g} s, or sooner where others waited for their turn"
        super().__init__(f"the request did not come whole {limit}; send it at once, and end the stream")


class CrowdedError(HsrpcError):
    """Too many requests of a connection wait to be read."""

    def __init__(self) -> None:
        super().__init__("too many requests of this connection wait to be read; send fewer at once, each of them whole")


class MessageCountError(HsrpcError):
    """A call of a method that takes one request has none, or several."""

    def __init__(self, found: str) -> None:
        super().__init__(f"this method takes one message, and {found} came; send one, and then end the stream")


class NoSuchMethodError(HsrpcError):
    """A call is of a method that the server does not have."""

    def __init__(self) -> None:
        super().__init__("no such method here; compare its name and the server's version")


class NotSupportedError(HsrpcError):
    """A request asks for something that this server does not do."""

    def __init__(self, feature: str) -> None:
        self.feature = feature
        super().__init__(f"{feature} is not supported by this server; leave it out")


class UnauthenticatedError(HsrpcError):
    """A client has not said who it is, or nobody knows it by what it said."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(problem)


class NotOwnerError(HsrpcError):
    """A client means a request of another."""


class StalledClientError(HsrpcError):
    """A client left its stream unread."""


class StreamResetError(StalledClientError):
    """A client left its stream unread, which has been reset: nothing more can be said to the client."""
