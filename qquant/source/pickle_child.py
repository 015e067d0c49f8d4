"""Runs in a process of its own: one pickled state dict to one safetensors file. Imports nothing of qquant.

    python -I pickle_child.py SOURCE TARGET

In this order: a network namespace without a network where the kernel gives one, torch and safetensors, limits of memory, time, file
size and open files, an audit hook that ends the process when it wants a socket, another program, a class of pickle's own, or a file
to write; then torch.load with weights_only=True. Exit status 0, or 1 with one line on stderr.
"""

import contextlib
import ctypes
import os
import resource
import sys
from typing import Any, NoReturn

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
SECONDS, BYTES_A_SECOND = 120, 20_000_000
MEMORY = 2 << 30  # bytes besides three times the file
FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class")  # fmt: skip


def leave_the_network() -> None:
    """Best effort: some kernels and containers do not allow it; the audit hook stands in any case."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)


def limit(size: int) -> None:
    """Limits for a file of `size` bytes."""
    with open("/proc/self/statm", encoding="ascii") as status:
        mapped = int(status.read().split()[0]) * resource.getpagesize()
    seconds = SECONDS + size // BYTES_A_SECOND
    for what, value in (
        (resource.RLIMIT_AS, mapped + 3 * size + MEMORY),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 20)),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event.startswith(FORBIDDEN):
        refuse(f"it asks for {event} {str(arguments)[:80]}")


def refuse(why: str) -> NoReturn:
    """End here, whatever would catch an exception."""
    os.write(2, f"{why}\n".encode())
    os._exit(1)


def main() -> None:
    """Convert."""
    source, target = sys.argv[1], sys.argv[2]
    leave_the_network()
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    limit(os.stat(source).st_size)
    sys.addaudithook(guard)
    content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        refuse("it is no mapping of names to tensors")
    save_file({str(name): value.contiguous().clone() for name, value in content.items()}, target, {"format": "pt"})


if __name__ == "__main__":
    try:
        main()
    except (Exception, MemoryError) as failure:  # noqa: BLE001  told to the parent in one line
        refuse(f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:300])
