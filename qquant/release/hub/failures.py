"""What can go wrong between us and a hub: which failures another attempt may mend, how long to wait, and what readers see meanwhile.

429 and 5xx wait as long as the server says (RateLimit, Retry-After), else 1, 2, 4 ... 60 s, and so do broken connections; other
statuses are final. Nothing that is printed holds a token or the signature of an upload address.
"""

from __future__ import annotations

import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from qquant.errors import PublishError, QQuantError
from qquant.release.hub.request import Say
from qquant.source.hub import transport_error

ATTEMPTS = 8
LONGEST_WAIT = 60.0  # seconds, unless the server asks for more
LOGIN = (
    "\nLog in with `hf auth login`, or set HF_TOKEN; in CI, HF_OIDC_RESOURCE. The token must be allowed to write there"
)
VISIBLE, CHANGED = "Complete and visible", "Changed"
NOTHING = {VISIBLE: "Nothing of this release is visible on main", CHANGED: "Nothing was changed"}
HINTS = {401: LOGIN, 403: LOGIN}
STATED = re.compile(r"HTTP status client error \((\d{3})")  # how the client's upload library tells of an answer
BUSY = ("408", "429")
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{6,}|ms-[A-Za-z0-9-]{16,}|eyJ[\w-]+\.[\w-]+\.[\w-]+)|(?<=[?&]X-Amz-)\S+")


Result = TypeVar("Result")


def repeated(what: str, step: Callable[[], Result], say: Say, sleep: Callable[[float], None] = time.sleep) -> Result:
    """`step`, repeated while the server is busy or unreachable."""
    for attempt in range(ATTEMPTS):
        try:
            return step()
        except QQuantError:
            raise
        except failures() as error:
            wait = pause(error, attempt)
            if wait is None or attempt == ATTEMPTS - 1:
                raise
            say(f"{what}: {clean(str(error)).splitlines()[0]}; again in {wait:.0f} s")
            sleep(wait)
    raise AssertionError("unreachable")


def failures() -> tuple[type[BaseException], ...]:
    """What the client raises when a request fails: HTTP statuses, transport errors, and its own wrapper of both."""
    return (transport_error(), OSError, RuntimeError)


def pause(error: BaseException | None, attempt: int) -> float | None:
    """Seconds to wait before attempt number `attempt` + 2; None where another attempt is no use."""
    while error is not None and getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        stated = STATED.search(str(error))
        if stated:
            return None if stated[1] not in BUSY else min(LONGEST_WAIT, 2.0**attempt)
        local = isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError) and error.errno
        return None if local else min(LONGEST_WAIT, 2.0**attempt)
    if response.status_code != 429 and response.status_code < 500:
        return None
    reset = re.search(r"\bt\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    after = reset[1] if reset else response.headers.get("Retry-After", "")
    return float(after) + 1 if after.isdigit() else min(LONGEST_WAIT, 2.0**attempt)


def require_answer(endpoint: str, sleep: Callable[[float], None] = time.sleep) -> None:
    """Raise PublishError after three tries if the name of a hub does not resolve, or nothing listens there; its client would try for minutes.

    Where a proxy is set, names are its business. What is slow or says no is the client's to tell.
    """
    address = urllib.parse.urlsplit(endpoint)
    host, port = address.hostname, address.port or (80 if address.scheme == "http" else 443)
    if host is None or urllib.request.getproxies():
        return
    for wait in (1.0, 1.0, 0.0):
        try:
            with socket.create_connection((host, port), timeout=10):
                return
        except (socket.gaierror, ConnectionRefusedError) as error:
            reason = error.strerror or str(error)
            sleep(wait)
        except OSError:
            return
    raise PublishError(f"{host}: {reason}; is there a network, and is --endpoint right? Nothing was sent")


def clean(text: str) -> str:
    """`text` without tokens and signatures of upload addresses."""
    return SECRET.sub("***", text)


@contextmanager
def reported(visible: Sequence[str], what: str = VISIBLE) -> Iterator[None]:
    """Turn every failure of the hub into a PublishError that says what readers see."""
    try:
        yield
    except PublishError as error:
        raise PublishError(f"{error}\n{_seen(visible, what)}") from None
    except QQuantError:
        raise
    except failures() as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = int(getattr(getattr(cause, "response", None), "status_code", 0))
        raise PublishError(f"{clean(str(cause))}{HINTS.get(status, '')}\n{_seen(visible, what)}") from None


def _seen(visible: Sequence[str], what: str) -> str:
    if visible:
        return f"{what}: {', '.join(visible)}. The others are as they were; the same command continues."
    return f"{NOTHING[what]}; the same command continues."
