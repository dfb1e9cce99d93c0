"""Who is let in: requests as ASGI has them, against a door of one start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping
from typing import Any

import pytest

from mis_mlx.studio_page.guard import Door, Guard

PORT = 4321
HERE = f"127.0.0.1:{PORT}"
Sent = list[MutableMapping[str, Any]]


async def _page(scope: Any, receive: Any, send: Any) -> None:
    """What the guard stands before."""
    headers = [(b"x-frame-options", b"SAMEORIGIN")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"inside"})


def sent(
    door: Door, headers: Mapping[str, str], query: str = "", kind: str = "http", twice: str = ""
) -> Sent:
    """What comes back. twice: another host, behind the first one."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    pairs += [(b"host", twice.encode())] if twice else []
    scope = {"type": kind, "headers": pairs, "query_string": query.encode()}
    answers: Sent = []

    async def send(message: MutableMapping[str, Any]) -> None:
        answers.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nobody reads before the door is open")

    asyncio.run(Guard(_page, door)(scope, receive, send))
    return answers


def cookie_of(door: Door) -> str:
    """A cookie, got as the browser gets it."""
    _, _, token = door.address.partition("?")
    start, body = sent(door, {"host": HERE}, token)
    assert start["status"] == 200
    assert b"url=/" in body["body"]
    headers = dict(start["headers"])
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    return cookie.partition(";")[0]


def inside(answers: Sent) -> bool:
    """Whether the page answered."""
    return answers[-1].get("body") == b"inside"


def test_the_address_lets_one_browser_in() -> None:
    """Its token is good once; the cookie is good from then on, for both names of this machine."""
    door = Door(PORT)
    _, _, token = door.address.partition("?")
    cookie = cookie_of(door)
    assert inside(sent(door, {"host": HERE, "cookie": cookie}))
    assert inside(sent(door, {"host": f"localhost:{PORT}", "cookie": f"other=1; {cookie}"}))
    again = sent(door, {"host": HERE}, token)
    assert again[0]["status"] == 403
    assert inside(sent(door, {"host": HERE, "cookie": cookie}, token))


def test_a_browser_leaves_port_80_out() -> None:
    """Its host and origin are names alone; on any other port these are refused."""
    for port, lets_in in ((80, True), (PORT, False)):
        door = Door(port)
        headers = {"host": "127.0.0.1", "origin": "http://127.0.0.1"}
        assert (door.refusal(headers) == "") is lets_in


REFUSED = {
    "another host": {"host": f"evil.example:{PORT}"},
    "another port": {"host": "127.0.0.1:1"},
    "no host": {},
    "an address that only looks alike": {"host": f"{HERE}.evil.example"},
    "another page": {"host": HERE, "origin": "http://evil.example"},
    "another program on this machine": {"host": HERE, "origin": "http://127.0.0.1:1"},
    "this machine over TLS": {"host": HERE, "origin": f"https://{HERE}"},
    "a page without an origin": {"host": HERE, "origin": "null"},
    "a picture in another page": {"host": HERE, "sec-fetch-site": "cross-site"},
    "a page of another port": {"host": HERE, "sec-fetch-site": "same-site"},
}


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("what", REFUSED)
def test_others_stay_outside_even_with_the_cookie(what: str, kind: str) -> None:
    """Nor does a token help them, which stays good for the browser that it is for."""
    door = Door(PORT)
    _, _, token = door.address.partition("?")
    first = sent(door, REFUSED[what], token, kind)
    assert not inside(first)
    cookie = cookie_of(door)
    answers = sent(door, {**REFUSED[what], "cookie": cookie}, kind=kind)
    assert not inside(answers)
    if kind == "http":
        assert answers[0]["status"] == 403
    else:
        assert answers == [{**answers[0], "type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_without_the_cookie_nobody_is_let_in(kind: str) -> None:
    """No token, a wrong one, somebody else's cookie, a damaged one; a WebSocket takes no token."""
    door = Door(PORT)
    other = Door(PORT)
    cookies = ["", f"{door.cookie}=x", f"{door.cookie}={other.key}", f"{door.cookie}=\x00;;=", "é"]
    for cookie in cookies:
        assert not inside(sent(door, {"host": HERE, "cookie": cookie}, kind=kind)), cookie
    for query in ("", "token=", "token=x", f"token={other.key}", "token=%ff"):
        assert not inside(sent(door, {"host": HERE}, query, kind)), query
    if kind == "websocket":
        _, _, token = door.address.partition("?")
        assert not inside(sent(door, {"host": HERE}, token, kind))


FOREIGN = ("[a]=1", "a b=c", 'a="', "{}", "=", "ż=ó", "a[0]={x: 1}", "\x01=2", "mis_mlx_1=other")


@pytest.mark.parametrize("foreign", FOREIGN)
def test_cookies_of_other_programs_lock_nobody_out(foreign: str) -> None:
    """Whatever they look like, in front of ours and behind it: cookies do not know ports."""
    door = Door(PORT)
    cookie = cookie_of(door)
    for both in (f"{foreign}; {cookie}", f"{cookie}; {foreign}", f"{cookie};{foreign};"):
        assert inside(sent(door, {"host": HERE, "cookie": both})), both
    assert not inside(sent(door, {"host": HERE, "cookie": foreign}))


FROM_FILE = {"host": HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_file_may_lead_here_with_the_token_and_nothing_else(kind: str) -> None:
    """The browser is opened by one. Another page that opens ours without the token sees nothing of
    it, also where the browser brings the cookie.
    """
    door = Door(PORT)
    _, _, token = door.address.partition("?")
    assert not inside(sent(door, FROM_FILE, "token=x", kind))
    answers = sent(door, FROM_FILE, token, kind)
    assert (answers[0].get("status") == 200) == (kind == "http")
    cookie = f"{door.cookie}={door.key}"
    assert not inside(sent(door, {**FROM_FILE, "cookie": cookie}, kind=kind))
    if kind == "http":
        assert sent(door, FROM_FILE, token)[0]["status"] == 403


def test_a_header_that_comes_twice_fits_nothing() -> None:
    """Two hosts, of which a program behind might read the other one."""
    door = Door(PORT)
    headers = {"host": HERE, "cookie": cookie_of(door)}
    assert sent(door, headers, twice="evil.example")[0]["status"] == 403


def test_a_page_loads_nothing_from_elsewhere() -> None:
    """The policy is in every answer; a page's own header stays. It talks to its own port only, by
    WebSocket, also in a browser that does not count that as 'self'.
    """
    door = Door(PORT)
    start, _ = sent(door, {"host": HERE, "cookie": cookie_of(door)})
    headers = dict(start["headers"])
    policy = headers[b"content-security-policy"].decode()
    sources = {name: words for name, *words in map(str.split, policy.split(";"))}
    assert sources["default-src"][0] == "'self'"
    assert sources["frame-ancestors"] == ["'none'"]
    talks = ["'self'", f"ws://127.0.0.1:{PORT}", f"ws://localhost:{PORT}"]
    assert sources["connect-src"] == talks
    assert headers[b"x-frame-options"] == b"SAMEORIGIN"
    assert headers[b"referrer-policy"] == b"no-referrer"
