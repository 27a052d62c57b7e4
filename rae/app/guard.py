"""Guards the web page's server: only the page itself may talk to it, and only in small, well-formed requests."""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

UPLOAD = 64 * 2**20
"""Maximum upload size in bytes."""
_ENVELOPE = 2**16  # bytes around the file in an upload: boundaries and headers
_SETTINGS = 2**18  # maximum bytes of any other request: a few numbers


class RefusedError(Exception):
    """Raised to reject a request with a status code and a sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """ASGI middleware that rejects requests from other sites and oversized or malformed ones, each with a sentence.

    A page of another site can send requests to a server on this machine: with its own ``Origin``, or, if its name is made to
    point here (DNS rebinding), with a foreign ``Host``. Names are therefore checked; numeric addresses cannot be rebound.

    Args:
        app: The page's server.
        names: Host names that may serve the page, besides numeric addresses, ``localhost`` and this machine's own name; one
            that begins with a dot matches all names that end with it.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] = ()) -> None:
        self.app = app
        own = {"localhost", socket.gethostname(), socket.getfqdn()}
        self.names = {name.lower() for name in own.union(names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or rejects it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check_origin(Headers(scope=scope))
            if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = await _checked(scope, receive)
            await self.app(scope, receive, note)
        except Exception as error:
            if started:
                raise
            if not isinstance(error, RefusedError):  # the server failed on what it was sent
                log.warning("%s %s failed: %s: %s", scope["type"], scope["path"], type(error).__name__, error)
                error = RefusedError(400, "the request cannot be read; reload the page and try again")
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
            else:
                await PlainTextResponse(str(error), error.status)(scope, receive, send)

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_known(_name(host)):
            raise RefusedError(
                403, f"this page is not served as {host!r}; start rae-app with names=[{_name(host)}] if it is to be"
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise RefusedError(
                403, f"requests of {origin!r} are refused: only the page itself, {host!r}, may send them"
            )

    def _is_known(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names or any(known.startswith(".") and name.endswith(known) for known in self.names)
        return True


def _name(host: str) -> str:
    """The name or address in a ``Host`` header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0] if "]" in host else ""
    return host.partition(":")[0].lower()


async def _checked(scope: Scope, receive: Receive) -> Receive:
    """A ``receive`` that yields the request's checked body.

    Raises:
        RefusedError: The body is too large, or declared as JSON but invalid.
    """
    headers = Headers(scope=scope)
    is_upload = headers.get("content-type", "").startswith("multipart/")
    limit = UPLOAD + _ENVELOPE if is_upload else _SETTINGS
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise _too_large(limit)
    if is_upload:  # streamed to a file
        return _counted(receive, limit)
    counted, body, more = _counted(receive, limit), b"", True
    while more:
        message = await counted()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the request broke off")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if body and "json" in headers.get("content-type", ""):
        _check_json(body)
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return rest.pop() if rest else await receive()

    return replay


def _counted(receive: Receive, limit: int) -> Receive:
    """The same body, rejected as soon as it exceeds its limit, whatever its declared length."""
    seen = 0

    async def count() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return count


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"a request may have at most {limit:,} bytes and must say truly how many it has")


def _check_json(body: bytes) -> None:
    """Rejects what the page would never send.

    Raises:
        RefusedError: It is not a JSON object, contains NaN or infinity, or is nested too deeply.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        found: Any = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, f"the request is no JSON that this page sends: {reason}") from error
    if not isinstance(found, dict):
        raise RefusedError(400, f"the request is no JSON that this page sends: {type(found).__name__}, not an object")
