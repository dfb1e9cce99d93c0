"""Who may come in: the browser that this program opened, on this machine, and nobody else.

Stands before every request, also for pictures and for the page's own connection (WebSocket).
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HOST = "127.0.0.1"
MONTH_S = 30 * 24 * 3600
HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
# What a page of ours may load: nothing from elsewhere. NiceGUI's pages hold scripts and styles.
# Old browsers do not count a WebSocket to the same port as 'self'.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws://127.0.0.1:{port} ws://localhost:{port}; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
REFUSED = "mis_mlx studio: {}. Open the address that `mis_mlx studio` printed.\n"
# A page and not a redirect: the cookie is not sent on while the way leads here from a file.
ENTERED = (
    '<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>mis_mlx studio</title>'
)


class Door:
    """The secrets of one start: a token for the address, good once, and a key for the cookie."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.key = secrets.token_urlsafe(32)
        self._token = secrets.token_urlsafe(32)

    @property
    def address(self) -> str:
        """What the browser opens first."""
        return f"http://{HOST}:{self.port}/?token={self._token}"

    @property
    def cookie(self) -> str:
        """Its name: cookies do not know ports, so that two programs need two names."""
        return f"mis_mlx_{self.port}"

    def take(self, token: str) -> bool:
        """Whether this is the token; then it is spent: an address stays in a browser's history."""
        right = bool(self._token) and hmac.compare_digest(token.encode(), self._token.encode())
        if right:
            self._token = ""
        return right

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Why a request does not come from our own page or address; empty where it does."""
        hosts = [f"{HOST}:{self.port}", f"localhost:{self.port}"]
        if self.port == 80:  # which no browser writes behind a name
            hosts += [HOST, "localhost"]
        host = headers.get("host", "")
        if host not in hosts:
            return f"the host {host[:80]!r} is not this machine"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return f"the origin {origin[:80]!r} is another page"
        return ""

    def from_elsewhere(self, headers: Mapping[str, str]) -> str:
        """Why a request without a token is another page's; empty where it is our own page's."""
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "another page sent this"
        return ""

    def known(self, headers: Mapping[str, str]) -> bool:
        """Whether the request brings our cookie."""
        # Other programs of this machine set cookies, too; a parser may drop all for one of them.
        for cookie in headers.get("cookie", "").split(";"):
            name, _, value = cookie.strip().partition("=")
            if name == self.cookie and hmac.compare_digest(value.encode(), self.key.encode()):
                return True
        return False


class Guard:
    """ASGI middleware with a `Door`."""

    def __init__(self, app: Any, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, let a browser in, or refuse with 403 and a sentence."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        why = self.door.refusal(headers)
        elsewhere = self.door.from_elsewhere(headers)
        # Our own file in the browser counts as another page. That one may open us as a page, with
        # the token, and nothing else.
        may_enter = scope["type"] == "http" and not why
        if elsewhere and headers.get("sec-fetch-mode") != "navigate":
            may_enter = False
        why = why or elsewhere
        if not why and self.door.known(headers):
            await self.app(scope, receive, _with_headers(send, self.door.port))
        elif may_enter and self.door.take(_token(scope)):
            await _let_in(send, self.door)
        elif why:
            await _refuse(scope, send, why)
        else:
            await _refuse(scope, send, "no token, or one that was used before")


def _headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; one that comes twice counts as both together, which fits nothing."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name = raw_name.decode("latin-1").lower()
        value = raw_value.decode("latin-1")
        joiner = "; " if name == "cookie" else ", "
        found[name] = f"{found[name]}{joiner}{value}" if name in found else value
    return found


def _token(scope: Scope) -> str:
    query = parse_qs(scope["query_string"].decode("latin-1"))
    return query.get("token", [""])[0]


async def _refuse(scope: Scope, send: Send, why: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": why[:100]})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSED.format(why).encode()})


async def _let_in(send: Send, door: Door) -> None:
    """The cookie, and an address without the token."""
    cookie = f"{door.cookie}={door.key}; Path=/; Max-Age={MONTH_S}; HttpOnly; SameSite=Strict"
    headers = [
        (b"content-type", b"text/html; charset=utf-8"),
        (b"content-security-policy", b"default-src 'none'"),
        (b"set-cookie", cookie.encode()),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ENTERED.encode()})


def _with_headers(send: Send, port: int) -> Send:
    """`send` that adds HEADERS and POLICY to a response, as far as it has none of its own."""
    ours = {**HEADERS, "content-security-policy": POLICY.format(port=port)}

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", []))
            names = {name.lower() for name, _ in given}
            for name, value in ours.items():
                if name.encode() not in names:
                    given.append((name.encode(), value.encode()))
            message = {**message, "headers": given}
        await send(message)

    return sending
