"""Who and what comes in over real sockets: nobody else, and no path."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.studio_page.driving import (
    needs_extra,
    page_of,
)


@needs_extra
def test_nobody_else_gets_in(folder: Path, home: dict[str, str]) -> None:
    """Over real sockets: no token, another host, another origin, paths, the page's connection.

    The token opens once; with the cookie the page answers, and reports are those of runs.
    """
    (folder / "report.html").write_text("not yours")
    with page_of(folder, home) as served:
        _, _, token = served.address.partition("?")
        outside = "open the address"
        for path in ("/", "/report/x", "/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/docs"):
            answer = served.get(path)
            assert answer.status == 403, path
            assert outside in answer.text.lower()
        assert served.get(f"/?{token}", Host="evil.example").status == 403
        assert served.get(f"/?{token}", Origin="http://evil.example").status == 403
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
        upgrade["Sec_WebSocket_Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
        socket_path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        assert served.get(socket_path, **upgrade).status == 403
        entered = served.get(f"/?{token}")
        assert entered.status == 200
        assert not served.get("/").cookie
        cookie = entered.cookie
        assert served.get(f"/?{token}").status == 403
        assert served.get("/", Cookie=cookie).status == 200
        assert served.get(socket_path, Cookie=cookie, **upgrade).status == 101
        other = {"Origin": "http://evil.example", **upgrade}
        assert served.get(socket_path, Cookie=cookie, **other).status == 403
        for name in ("..", "%2e%2e", "..%2f..", ".studio", "%2fetc%2fpasswd", "x%00", "a/b"):
            answer = served.get(f"/report/{name}", Cookie=cookie)
            assert answer.status in (403, 404), name
            assert "not yours" not in answer.text
        for path in ("/docs", "/openapi.json", "/redoc", "/static/..%2f..%2fquick.yaml"):
            assert served.get(path, Cookie=cookie).status == 404, path
        listening = psutil.Process(served.process.pid).net_connections("tcp")
        assert {each.laddr.ip for each in listening} == {"127.0.0.1"}
