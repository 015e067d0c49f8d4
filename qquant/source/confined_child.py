"""Runs in a process of its own, where what strangers wrote can do no harm. Imports nothing of qquant.

    python -I confined_child.py template | tokenizer       requests on standard input, answers on standard output, one after another
    python -I confined_child.py pickle SOURCE TARGET       one pickled state dict to one safetensors file

In this order: a network namespace without a network where the kernel gives one, the library that the job needs, limits of memory,
processor time, file size and open files, an audit hook that ends the process when it wants a socket, another program, a class of
pickle's own, or a file (of pickles: a file to write); then the work. Limits are set anew for every request.

    request   u32 bytes of JSON, u32 bytes behind it | {"do": what, "with": key of a text sent before, "seconds": ..., ...} | bytes
    answer    the same; {"error": one line} where the work fails, {"end": true} with it where the process is of no more use

The pickle job ends with exit status 0, or 1 and one line on stderr.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
SECONDS, BYTES_A_SECOND = 120, 20_000_000
MEMORY = 2 << 30  # bytes, all together; of pickles besides three times the file
MEMORY_PER_BYTE = 400  # of a request: a token of one letter takes so many while a text is tokenized
OUTPUT_LIMIT = 1 << 22  # characters that a template may write
FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class")  # fmt: skip
FILES = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "shutil.")
GLOBALS = ("range", "dict", "namespace", "cycler", "joiner")
TODAY = "2024-02-05"  # in every template, so that the same recipe gives the same tokens on any day


# --- what confines ------------------------------------------------------------------------------------------------------


def leave_the_network() -> None:
    """Best effort: some kernels and containers do not allow it; the audit hook stands in any case."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)


def limit(size: int) -> None:
    """Limits for a pickled file of `size` bytes."""
    with open("/proc/self/statm", encoding="ascii") as status:
        mapped = int(status.read().split()[0]) * resource.getpagesize()
    seconds = SECONDS + size // BYTES_A_SECOND
    bound(RLIMIT_AS=mapped + 3 * size + MEMORY, RLIMIT_CPU=seconds, RLIMIT_FSIZE=2 * size + (1 << 20), RLIMIT_NOFILE=64)


def bound(**limits: int) -> None:
    """Set limits of this process for good."""
    for name, value in {"RLIMIT_CORE": 0, **limits}.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def limit_request(size: int, seconds: int) -> None:
    """Limits for a request of `size` bytes: so much more processor time, and memory in all.

    The time is counted from now, by a timer: RLIMIT_CPU counts from the start, in ticks that are some tenths off what a child has used.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    value, most = MEMORY + MEMORY_PER_BYTE * size, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook of a job that reads a file."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event.startswith(FORBIDDEN):
        refuse(f"it asks for {event} {str(arguments)[:80]}")


def guard_files(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook of a job that needs no file."""
    if event.startswith((*FORBIDDEN, *FILES)):
        answer({"error": f"it asks for {event} {str(arguments)[:80]}", "end": True})
        os._exit(1)


def refuse(why: str) -> NoReturn:
    """End here, whatever would catch an exception."""
    os.write(2, f"{why}\n".encode())
    os._exit(1)


def one_line(error: BaseException) -> str:
    """What an exception says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# --- templates ----------------------------------------------------------------------------------------------------------


def template_maker() -> Callable[[str], Any]:
    """Compiles chat templates with the settings that transformers gives them."""
    import datetime

    import jinja2
    import jinja2.debug  # what it imports when a template fails must be there before files are out of reach
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks answers for training; here its content passes through."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    today = datetime.datetime.fromisoformat(TODAY)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals = {name: environment.globals[name] for name in GLOBALS}
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": today.strftime}
    environment.filters["tojson"] = tojson
    del environment.filters["random"]
    with contextlib.suppress(jinja2.TemplateError):
        environment.from_string("{{ raise_exception('') }}{{ strftime_now('%d %b') }}").render()
    return environment.from_string


def render(template: Any, variables: dict[str, Any]) -> str:
    """What a compiled template writes."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT_LIMIT:
            raise ValueError(f"it writes more than {OUTPUT_LIMIT:,} characters")
    return "".join(pieces)


def serve_template(template: Any, request: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
    """`render`: each of `many` sets of variables, with the `shared` ones, to a text; a failure says `at` which."""
    texts: list[bytes] = []
    for variables in request["many"]:
        try:
            texts.append(render(template, request["shared"] | variables).encode("utf-8", "surrogatepass"))
        except MemoryError:
            raise
        except Exception as failure:  # noqa: BLE001  whatever it is, the template did it
            return {"error": one_line(failure), "at": len(texts)}, b""
    return {"sizes": [len(text) for text in texts]}, b"".join(texts)


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def tokenizer_maker() -> Callable[[str], Any]:
    """Reads the text of a tokenizer.json."""
    import tokenizers

    def made(text: str) -> Any:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    return made


def serve_tokenizer(tokenizer: Any, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """`describe`; `encode` texts of these `sizes` to u32 ids; `decode` u32 ids to text."""
    if request["do"] == "encode":
        tokenizer.encode_special_tokens = not request["special"]
        encoded, position = [], 0
        for size in request["sizes"]:
            text = content[position : position + size].decode("utf-8", "surrogatepass")
            encoded.append(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
            position += size
        ids = [number for one in encoded for number in one]
        return {"counts": [len(one) for one in encoded]}, struct.pack(f"<{len(ids)}I", *ids)
    if request["do"] == "decode":
        numbers = struct.unpack(f"<{len(content) // 4}I", content)
        return {}, tokenizer.decode(numbers, skip_special_tokens=False).encode("utf-8", "surrogatepass")
    added = tokenizer.get_added_tokens_decoder().items()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    listed = [[number, token.content, token.special] for number, token in added]
    return {"size": size, "added": listed}, b""


# --- requests -----------------------------------------------------------------------------------------------------------

JOBS = {"template": (template_maker, serve_template), "tokenizer": (tokenizer_maker, serve_tokenizer)}


def read(count: int) -> bytes:
    """`count` bytes of standard input; the end of it ends the process."""
    pieces, left = [], count
    while left:
        piece = os.read(0, min(left, 1 << 20))
        if not piece:
            os._exit(0)
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def requests() -> Iterator[tuple[dict[str, Any], bytes]]:
    """What comes in."""
    while True:
        head, tail = struct.unpack("<II", read(8))
        yield json.loads(read(head)), read(tail)


def answer(content: dict[str, Any], data: bytes = b"") -> None:
    """Send one answer."""
    text = json.dumps(content).encode()
    rest = memoryview(struct.pack("<II", len(text), len(data)) + text + data)
    while rest:
        rest = rest[os.write(1, rest) :]


def serve(job: str) -> None:
    """Answer requests until there are no more."""
    maker, work = JOBS[job]
    make = maker()
    bound(RLIMIT_FSIZE=0, RLIMIT_NOFILE=16)
    sys.addaudithook(guard_files)
    made: dict[str, Any] = {}
    for request, content in requests():
        limit_request(len(content), request["seconds"])
        try:
            if request["do"] == "make":
                made[request["with"]] = make(content.decode("utf-8", "surrogatepass"))
                reply: tuple[dict[str, Any], bytes] = {}, b""
            else:
                reply = work(made[request["with"]], request, content)
        except MemoryError:
            answer({"error": f"it takes more than {MEMORY >> 30} GiB of memory", "end": True})
            os._exit(1)
        except BaseException as failure:  # noqa: BLE001  a panic of tokenizers is no Exception
            answer({"error": one_line(failure), "line": getattr(failure, "lineno", None)})
        else:
            answer(*reply)


# --- pickles ------------------------------------------------------------------------------------------------------------


def convert(source: str, target: str) -> None:
    """One state dict to one safetensors file."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    limit(os.stat(source).st_size)
    sys.addaudithook(guard)
    content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        refuse("it is no mapping of names to tensors")
    save_file({str(name): value.contiguous().clone() for name, value in content.items()}, target, {"format": "pt"})


def main() -> None:
    """Do the job that the command line names."""
    leave_the_network()
    if sys.argv[1] == "pickle":
        convert(sys.argv[2], sys.argv[3])
    else:
        serve(sys.argv[1])


if __name__ == "__main__":
    try:
        main()
    except (Exception, MemoryError) as failure:  # noqa: BLE001  told to the parent in one line
        refuse(f"{type(failure).__name__}: {one_line(failure)}")
