"""A network link that is slow: two TAP devices, and this process, which carries frames from one to the other.

    python -m tests.helpers.slow_link NAME OTHER SECONDS BITS

Each frame waits for those before it at so many bits a second, then arrives SECONDS later; what finds the queue full is
lost. Not tc's netem, because not every kernel has it. Prints "ready" when both devices are there; they go with the
process.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field

#: From linux/if_tun.h.
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES = 65536
#: What waits for its turn at most.
QUEUE_BYTES = 128 * 1024
#: Before a device that is down is looked at again.
PAUSE_SECONDS = 0.1


@dataclass
class Direction:
    """Frames on their way from one device to the other."""

    source: int
    target: int
    seconds: float
    bits: float
    free_at: float = 0.0  # when what waits has been sent
    frames: deque[tuple[float, bytes]] = field(default_factory=deque)  # when each arrives, in order

    def take(self, now: float) -> None:
        try:
            frame = os.read(self.source, FRAME_BYTES)
        except OSError:  # the device is down
            time.sleep(PAUSE_SECONDS)
            return
        self.free_at = max(self.free_at, now)
        if (self.free_at - now) * self.bits / 8 > QUEUE_BYTES:
            return
        self.free_at += 8 * len(frame) / self.bits
        self.frames.append((self.free_at + self.seconds, frame))

    def give(self, now: float) -> None:
        while self.frames and self.frames[0][0] <= now:
            _, frame = self.frames.popleft()
            with contextlib.suppress(OSError):  # the device is down
                os.write(self.target, frame)


def open_tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def main(name: str, other: str, seconds: float, bits: float) -> None:
    one, two = open_tap(name), open_tap(other)
    directions = (Direction(one, two, seconds, bits), Direction(two, one, seconds, bits))
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        due = [direction.frames[0][0] - now for direction in directions if direction.frames]
        ready, _, _ = select.select([one, two], [], [], max(0.0, min(due)) if due else None)
        now = time.monotonic()
        for direction in directions:
            if direction.source in ready:
                direction.take(now)
            direction.give(now)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
