"""Make the operating system notice when the other end of an open connection vanishes.

A process that dies closes its connections, and the other end knows at once. A machine that loses
power, its cable, or falls asleep says nothing: asked every few seconds, it counts as dead after
half a minute.
"""

import os
import socket
import sys

import psutil

# silence before the first question, between questions, how many
IDLE_S = 10
EVERY_S = 5
TIMES = 4
# TCP_KEEPALIVE, TCP_RXT_CONNDROPTIME of macOS, in seconds
APPLE_IDLE = 0x10
APPLE_DROP = 0x80


def notice_the_dead() -> int:
    """Ask so on every TCP connection of this process; returns how many there are."""
    connected = [each for each in psutil.Process().net_connections("tcp") if each.raddr]
    limit_s = IDLE_S + EVERY_S * TIMES
    options = {socket.TCP_KEEPINTVL: EVERY_S, socket.TCP_KEEPCNT: TIMES}
    # The second of each pair: how long what was sent may stay unanswered.
    if sys.platform == "darwin":
        options |= {APPLE_IDLE: IDLE_S, APPLE_DROP: limit_s}
    else:
        options |= {socket.TCP_KEEPIDLE: IDLE_S, socket.TCP_USER_TIMEOUT: limit_s * 1000}
    for each in connected:
        with socket.socket(fileno=os.dup(each.fd)) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in options.items():
                end.setsockopt(socket.IPPROTO_TCP, option, value)
    return len(connected)
