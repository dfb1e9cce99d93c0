"""Open connections: those over TCP are watched, and nothing else is touched."""

from __future__ import annotations

import socket
import sys

from mis_mlx.hardware import sockets


def test_every_connection_is_asked_and_nothing_else() -> None:
    """Two ends of a connection; a listener, a pair, a file are left alone; dead in a minute."""
    before = sockets.notice_the_dead()
    near, far = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, near, far, open(__file__, "rb"):
        with socket.create_connection(listener.getsockname()) as out, listener.accept()[0] as back:
            assert not out.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sockets.notice_the_dead() == before + 2
            for end in (out, back):
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle = sockets.APPLE_IDLE if sys.platform == "darwin" else socket.TCP_KEEPIDLE
                asks = (idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                first, every, times = (
                    end.getsockopt(socket.IPPROTO_TCP, option) for option in asks
                )
                assert 0 < first + every * times <= 60
            out.sendall(b"still there")
            assert back.recv(20) == b"still there"
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
