"""Make the operating system notice when the other end of an open connection vanishes.

A process that dies closes its connections, and the other end knows at once. A machine that loses
power or its cable, or falls asleep, says nothing: the system asks it every few seconds and counts
it as dead after half a minute.
"""

import asyncio
import contextlib
import os
import socket
import sys

import psutil

from mis_mlx.types import MisError

# seconds of silence before the first question, seconds between questions, how many questions
IDLE_S = 10
EVERY_S = 5
TIMES = 4
# TCP_KEEPALIVE, TCP_RXT_CONNDROPTIME of macOS, in seconds
APPLE_IDLE = 0x10
APPLE_DROP = 0x80
LOOK_S = 0.02  # between two tries to connect


def notice_the_dead() -> int:
    """Turn the questions on for all TCP connections of this process and return their number."""
    sockets = psutil.Process().net_connections("tcp")
    connected = [connection for connection in sockets if connection.raddr]
    limit_s = IDLE_S + EVERY_S * TIMES
    options = {socket.TCP_KEEPINTVL: EVERY_S, socket.TCP_KEEPCNT: TIMES}
    # The second of each pair: how long sent data may stay unanswered.
    if sys.platform == "darwin":
        options |= {APPLE_IDLE: IDLE_S, APPLE_DROP: limit_s}
    else:
        options |= {socket.TCP_KEEPIDLE: IDLE_S, socket.TCP_USER_TIMEOUT: limit_s * 1000}
    for connection in connected:
        # A copy of the descriptor: closing it leaves the connection open.
        with socket.socket(fileno=os.dup(connection.fd)) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in options.items():
                end.setsockopt(socket.IPPROTO_TCP, option, value)
    return len(connected)


def port(wanted: int) -> int:
    """A port of 127.0.0.1 where nobody listens: the wanted one, or any for 0. MisError if taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
        except OSError as error:
            why = f"--port {wanted} is taken or not allowed ({error.strerror})"
            raise MisError(f"{why}: give another one, or 0 for any") from None
        return int(listener.getsockname()[1])


async def listening(host: str, number: int) -> None:
    """Return when somebody listens there."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, number)
            writer.close()
            return
        await asyncio.sleep(LOOK_S)
