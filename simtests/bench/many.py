"""Many programs that call one served machine at the same time; every answer is one that only its caller can get."""

import os
import time

from vfio import open_backend, uapi
from vfio.backends import remote

_ROUNDS = 250


def told(url: str, clients: int = 64) -> str:
    """What came of it, in a line."""
    seconds, wrong = measured(url, clients)
    calls = clients * _ROUNDS * 4
    one, _ = measured(url, 1)
    return (
        f"{clients} programs at once: {calls / seconds:,.0f} calls a second in all, {wrong} wrong or lost answers "
        f"(one program: {_ROUNDS * 4 / one:,.0f})"
    )


def measured(url: str, clients: int) -> tuple[float, int]:
    """Seconds from the first call to the last answer, and how many answers were not what they should be."""
    ready, go = os.pipe(), os.pipe()
    children = []
    for number in range(clients):
        pid = os.fork()
        if pid == 0:
            os.close(go[1])
            _live(url, number, ready[1], go[0])
        children.append(pid)
    os.close(go[0])
    for _ in children:
        os.read(ready[0], 1)
    begin = time.perf_counter()
    os.close(go[1])
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    seconds = time.perf_counter() - begin
    for fd in ready:
        os.close(fd)
    return seconds, sum(end != 0 for end in ends)


def _live(url: str, number: int, ready: int, go: int) -> None:
    """A program; it never returns."""
    status = 1
    try:
        remote.leave()
        limit = (number + 1) << 20
        backend = open_backend(f"{url.partition('?')[0]}?uid=0&memlock={limit}")
        fds = [backend.open("/dev/vfio/vfio", os.O_RDWR) for _ in range(1 + number % 4)]
        os.write(ready, b"+")
        os.read(go, 1)
        for _ in range(_ROUNDS):
            assert backend.ioctl(fds[-1], uapi.VFIO_CHECK_EXTENSION, uapi.VFIO_SPAPR_TCE_v2_IOMMU) == 1
            assert backend.ioctl(fds[0], uapi.VFIO_CHECK_EXTENSION, 99) == 0
            assert backend.locked().limit == limit
            assert backend.ioctl(fds[number % len(fds)], uapi.VFIO_GET_API_VERSION) == 0
        assert backend.readlink("/proc/self") == str(os.getpid())
        assert len(backend.listdir("/proc/self/fd")) == len(fds)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(status)
