"""A slow cable between two network namespaces: TAP devices, and a process that hands their frames on late.

tc's netem would do this in the kernel, but many kernels of virtual machines come without it (tbf, the rate limit, is
in all of them).

    python -m tests.cluster.cable NAMESPACE NAMESPACE DELAY_S

makes the device cable0 in both and says "ready"; both are gone when it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import sys
import time

DEVICE = b"cable0"
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LARGEST_FRAME = 65_600


def plug_in(namespace: str) -> int:
    """File descriptor of a new TAP device in `namespace`, which this process enters for it."""
    space = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(space, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(space)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TAP | IFF_NO_PI))
    return tap


def carry(ends: list[int], delay_s: float) -> None:
    """Frames of each end to the other one, `delay_s` later, for ever."""
    poll = select.epoll()
    for end in ends:
        poll.register(end, select.EPOLLIN)
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        due_in = max(0.0, waiting[0][0] - time.monotonic()) if waiting else -1
        for end, _ in poll.poll(due_in):
            frame = os.read(end, LARGEST_FRAME)
            count += 1
            heapq.heappush(waiting, (time.monotonic() + delay_s, count, ends[end == ends[0]], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, other, frame = heapq.heappop(waiting)
            try:
                os.write(other, frame)
            except OSError:  # the other end is down or full: a cable loses such frames
                continue


if __name__ == "__main__":
    taps = [plug_in(namespace) for namespace in sys.argv[1:3]]
    print("ready", flush=True)
    carry(taps, float(sys.argv[3]))
