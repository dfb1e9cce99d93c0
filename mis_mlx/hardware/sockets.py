"""Make the operating system notice when the other end of an open connection vanishes.

A process that dies closes its connections, and the other end knows at once. A machine that loses
power or its cable, or falls asleep, says nothing: the system asks it every few seconds and counts
it as dead after half a minute.
"""

import os
import socket
import sys

import psutil

# seconds of silence before the first question, seconds between questions, how many questions
IDLE_S = 10
EVERY_S = 5
TIMES = 4
# TCP_KEEPALIVE, TCP_RXT_CONNDROPTIME of macOS, in seconds
APPLE_IDLE = 0x10
APPLE_DROP = 0x80


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
