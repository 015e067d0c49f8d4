"""A kernel launched again: on stand-ins that compute from addresses, what is handed over, when Triton is asked anew, and how little is done."""

import inspect
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from qquant.kernels import between, elementwise, jit, launcher
from qquant.kernels.replay import recorded
from tests.kernels.test_direct import at

BRAIN, WHOLE = torch.bfloat16, torch.int32


def kind(value):
    """What Triton compiles for: the type of a tensor and whether its address is a multiple of 16, or what a number is."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), value == 1, value % 16 == 0 if isinstance(value, int) else None


class Stand:
    """What `triton.jit` gives, as far as `Launcher` uses it; `work` gets the grid and all arguments by name, tensors as addresses."""

    def __init__(self, kernel, work):
        self.arg_names = list(inspect.signature(getattr(kernel, "fn", kernel)).parameters)
        self.work, self.launches, self.runs = work, 0, 0

    def __getitem__(self, grid):
        def launch(*given, **chosen):
            self.launches += 1
            fixed = tuple(chosen[name] for name in self.arg_names if name in chosen)
            self._compute(grid, *[v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given], *fixed)
            run = partial(self._run, [kind(value) for value in given], fixed)
            return SimpleNamespace(run=run, function=7, packed_metadata=(4, 1, 0))

        return launch

    def _run(self, kinds, fixed, x, y, z, stream, function, metadata, *rest):
        assert (z, stream, function, metadata, rest[:3]) == (1, 0, 7, (4, 1, 0), (None,) * 3)
        given = rest[3 : len(rest) - len(fixed)]
        for value, (what, *others) in zip(given, kinds, strict=True):
            if isinstance(what, torch.dtype):
                assert others == [value % 16 == 0], "compiled for another address"
            else:
                assert kind(value) == (what, *others), "compiled for another number"
        assert rest[len(rest) - len(fixed) :] == fixed
        self.runs += 1
        self._compute((x, y), *rest[3:])

    def _compute(self, grid, *values):
        self.work(grid, **dict(zip(self.arg_names, values, strict=True)))


def norms(grid, *, x_at, y_at, weight_at, sum_at, norm_at, H, epsilon, WIDTH, ADD, EARLY):
    assert H <= WIDTH < 2 * H
    shape = grid[0], H
    y = at(y_at, shape, BRAIN) if ADD else None
    total, norm = between.add_norm(at(x_at, shape, BRAIN), y, at(weight_at, (H,), BRAIN), epsilon)
    at(norm_at, shape, BRAIN).copy_(norm)
    if ADD:
        at(sum_at, shape, BRAIN).copy_(total)


def rotates(grid, *, qkv_at, table_at, rows_at, places_at, q_at, keys_at, values_at, capacity, HEADS, KV, HALF, EARLY):
    count, heads = grid
    assert heads == HEADS + 2 * KV
    qkv, table = at(qkv_at, (count, heads * 2 * HALF), BRAIN), at(table_at, (capacity, 2 * HALF), torch.float32)
    keys, values = (at(address, (3, KV, capacity, 2 * HALF), BRAIN) for address in (keys_at, values_at))
    query = between.rotate(qkv, table, at(rows_at, (count,), WHOLE), at(places_at, (count,), WHOLE), keys, values)
    at(q_at, query.shape, BRAIN).copy_(query)


def attends(grid, *, q_at, keys_at, values_at, position_at, out_at, capacity, scale, HEADS, GROUP, WIDTH, **_):
    count = grid[0] // HEADS
    assert scale == WIDTH**-0.5
    keys, values = (at(address, (count, HEADS // GROUP, capacity, WIDTH), BRAIN) for address in (keys_at, values_at))
    query = at(q_at, (count, HEADS * WIDTH), BRAIN)
    at(out_at, query.shape, BRAIN).copy_(between.attend(query, keys, values, at(position_at, (count,), WHOLE)))


def gates(grid, *, from_at, to_at, size, BLOCK, EARLY):
    rows, parts = grid
    assert parts == -(-size // BLOCK)
    at(to_at, (rows, size), BRAIN).copy_(between.gate(at(from_at, (rows, 2 * size), BRAIN)))


def plain_norms(grid, *, x_at, weight_at, out_at, H, epsilon, WIDTH):
    shape = grid[0], H
    norm = elementwise.rms_norm(at(x_at, shape, BRAIN), at(weight_at, (H,), BRAIN), epsilon)
    at(out_at, shape, BRAIN).copy_(norm)


def gates_of_two(grid, *, g_at, u_at, out_at, size, apart, BLOCK):
    rows = grid[0] // -(-size // BLOCK)
    g, u = (
        torch.stack([at(address + 2 * apart * row, (size,), BRAIN) for row in range(rows)]) for address in (g_at, u_at)
    )
    at(out_at, (rows, size), BRAIN).copy_(elementwise.gate(g, u))


def rotates_pairs(
    grid,
    *,
    query_at,
    key_at,
    cosine_at,
    sine_at,
    query_to,
    key_to,
    query_apart,
    key_apart,
    length,
    HEADS,
    KV,
    HALF,
    WIDTH,
    SHARED,
):
    tokens, heads = grid
    assert heads == HEADS + KV
    assert HALF <= WIDTH < 2 * HALF
    cosine, sine = (at(address, (length if SHARED else tokens, 2 * HALF), BRAIN) for address in (cosine_at, sine_at))
    for token in range(tokens):
        place = token % length if SHARED else token
        for start, to, apart, count in ((query_at, query_to, query_apart, HEADS), (key_at, key_to, key_apart, KV)):
            x = at(start + 2 * apart * token, (1, count, 1, 2 * HALF), BRAIN)
            turned = elementwise.rotate(x, cosine[place : place + 1], sine[place : place + 1])
            at(to + 4 * HALF * count * token, turned.shape, BRAIN).copy_(turned)


WORKS = {
    "between norm": (between, "_launch_norm", norms),
    "between rotate": (between, "_launch_rotate", rotates),
    "between attend": (between, "_launch_attend", attends),
    "between gate": (between, "_launch_gate", gates),
    "norm": (elementwise, "_launch_norm", plain_norms),
    "gate": (elementwise, "_launch_gate", gates_of_two),
    "rotated": (elementwise, "_launch_rotated", rotates_pairs),
}


@pytest.fixture
def stands(monkeypatch):
    """A stand-in of every kernel, by the names of `WORKS`; a CPU passes for a GPU."""
    found = {}
    for name, (module, attribute, work) in WORKS.items():
        real = getattr(module, attribute)
        found[name] = Stand(real.kernel, work)
        monkeypatch.setattr(module, attribute, launcher.Launcher(found[name], real._constants))
    return found


def states(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(BRAIN)


def asked(stand):
    return stand.launches, stand.runs


def add_norm(rows=3, width=352, add=True, epsilon=1e-6):
    """A call by the kernel and by torch: (what one gives, what the other gives)."""
    arguments = states(rows, width), states(rows, width) + 1 if add else None, states(width), epsilon
    return between.launch_add_norm(*arguments), between.add_norm(*arguments)


def rotate(count=4, heads=4, kv=2, width=32, capacity=20):
    qkv, table = states(count, (heads + 2 * kv) * width), torch.rand(capacity, width)
    rows, places = torch.tensor([2, 0, 1, 1] * count, dtype=WHOLE)[:count], torch.arange(5, 5 + count, dtype=WHOLE)
    pairs = [[torch.zeros(3, kv, capacity, width).to(BRAIN) for _ in range(2)] for _ in range(2)]
    found, truth = (
        way(qkv, table, rows, places, *pair)
        for way, pair in zip((between.launch_rotate, between.rotate), pairs, strict=True)
    )
    return (found, *pairs[0]), (truth, *pairs[1])


def attend(count=2, heads=4, kv=2, width=32, capacity=20):
    caches = [states(count, kv, capacity, width) for _ in range(2)]
    query, position = states(count, heads * width), torch.tensor([7, 3], dtype=WHOLE)
    return (between.launch_attend(query, *caches, position, 8),), (between.attend(query, *caches, position),)


def gate(rows=3, size=704):
    both = states(rows, 2 * size)
    return (between.launch_gate(both),), (between.gate(both),)


def norm(shape=(2, 3, 352), epsilon=1e-6):
    x, weight = states(*shape), states(shape[-1])
    return (elementwise.launch_rms_norm(x, weight, epsilon),), (elementwise.rms_norm(x, weight, epsilon),)


def gate_of_two(shape=(2, 3), size=704):
    g, u = states(*shape, 2 * size).chunk(2, -1)
    return (elementwise.launch_gate(g, u, elementwise._rows_apart(g)),), (elementwise.gate(g, u),)


def heads_of(count=2, length=3, heads=4, kv=2, width=24, tables=1):
    """(query, key, cosine, sine): heads of slices of one product, as transformers has them."""
    joined = states(count, length, (heads + 2 * kv) * width)
    parts = joined.split([heads * width, kv * width, kv * width], -1)
    query, key = (part.view(count, length, -1, width).transpose(1, 2) for part in parts[:2])
    angle = torch.rand(tables, length, width, generator=torch.Generator().manual_seed(3)) * 6
    return query, key, angle.cos().to(BRAIN), angle.sin().to(BRAIN)


def rotated_by_torch(query, key, cosine, sine):
    """What `apply_rotary_pos_emb` of transformers gives."""
    return [x * cosine[:, None] + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sine[:, None] for x in (query, key)]  # fmt: skip


def rotated(**sizes):
    given = heads_of(**sizes)
    apart = tuple(elementwise._tokens_apart(x) for x in given[:2])
    assert all(apart)
    return elementwise.launch_rotated(*given, apart), rotated_by_torch(*given)


def same(results):
    found, truth = results
    return all(torch.equal(one, other) for one, other in zip(found, truth, strict=True))


# what is launched, with which arguments each a time: the first of a list asks Triton, the others do not
AGAIN = {
    "between norm": (add_norm, [{}, {"rows": 7}, {}, {"rows": 1}]),
    "between rotate": (rotate, [{}, {"count": 1}, {"count": 9}]),
    "between attend": (attend, [{}, {}]),
    "between gate": (gate, [{}, {"rows": 1}, {"rows": 8}]),
    "norm": (norm, [{}, {"shape": (1, 1, 352)}, {"shape": (9, 352)}]),
    "gate": (gate_of_two, [{}, {"shape": (1, 5)}, {"shape": (4, 2)}]),
    "rotated": (rotated, [{"count": 1}, {"count": 1, "length": 9}, {"tables": 2}, {"count": 3, "tables": 3}]),
}
# each of them asks Triton, since for another number it may have compiled something else; the smallest first, so that a mistake reads no foreign memory
ANEW = {
    "between norm": (
        add_norm,
        [{"width": 1}, {"width": 100}, {"width": 104}, {}, {"add": False}, {"epsilon": 1e-2}],
    ),
    "between rotate": (rotate, [{}, {"capacity": 32}, {"capacity": 36}, {"heads": 8}, {"kv": 4}, {"width": 64}]),
    "between attend": (attend, [{}, {"capacity": 32}, {"capacity": 36}, {"heads": 8}, {"kv": 4}, {"width": 64}]),
    "between gate": (gate, [{"size": 8}, {"size": 296}, {}]),
    "norm": (norm, [{"shape": (2, 3, 1)}, {"shape": (2, 3, 104)}, {}, {"epsilon": 1e-2}]),
    "gate": (gate_of_two, [{"shape": (1, 1), "size": 8}, {"shape": (1, 1)}, {"size": 712}, {}]),
    "rotated": (
        rotated,
        [
            {"count": 1, "length": 1},
            {"tables": 2},
            {},
            {"length": 5},
            {"width": 32, "tables": 2},
            {"heads": 8, "tables": 2},
            {"kv": 4, "tables": 2},
        ],
    ),
}


@pytest.mark.parametrize("name", AGAIN)
def test_later_calls_hand_over_addresses(name, stands):
    call, calls = AGAIN[name]
    assert all(same(call(**arguments)) for arguments in calls)
    assert asked(stands[name]) == (1, len(calls) - 1)


@pytest.mark.parametrize("name", ANEW)
def test_other_sizes_are_other_kernels(name, stands):
    call, calls = ANEW[name]
    for _ in range(2):
        assert all(same(call(**arguments)) for arguments in calls)
    assert asked(stands[name]) == (len(calls), len(calls))


def test_triton_is_asked_for_what_is_not_the_same(stands, monkeypatch):
    """Odd addresses, another type, another device, early starts that were switched, and what the interpreter gives."""
    stand = stands["between gate"]
    gate()
    odd = states(3 * 2 * 704 + 1)[1:].view(3, -1)
    assert odd.data_ptr() % 16
    for _ in range(2):
        assert torch.equal(between.launch_gate(odd), between.gate(odd))
    assert asked(stand) == (3, 0)
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "current_device", lambda: 1)
        assert same(gate())
    assert asked(stand) == (4, 0)
    monkeypatch.setattr(jit, "early", not jit.early)
    assert same(gate())
    assert same(gate())
    assert asked(stand) == (5, 1)
    stand.work = lambda *_, **__: None
    between.launch_gate(states(3, 2 * 704).half())
    assert asked(stand) == (6, 1)


def test_an_odd_address_leaves_nothing_to_be_used_by_others(stands):
    odd = states(3 * 2 * 704 + 1)[1:].view(3, -1)
    between.launch_gate(odd)
    assert same(gate())
    assert same(gate())
    assert asked(stands["between gate"]) == (2, 1)


def test_other_streams_use_what_one_found(stands, monkeypatch):
    add_norm()
    seen = []
    monkeypatch.setattr(stands["between norm"], "_compute", lambda *_: None)
    (known,) = between._launch_norm._known.values()
    between._launch_norm._known = dict.fromkeys(between._launch_norm._known, (lambda *a: seen.append(a), *known[1:]))
    monkeypatch.setattr(launcher, "current_stream", lambda device: 5 - device)
    add_norm()
    assert [call[3] for call in seen] == [6]


def test_the_interpreter_is_always_asked(stands):
    class Interpreted:
        arg_names, launches = stands["between gate"].arg_names, 0

        def __getitem__(self, grid):
            def launch(*_, **__):
                self.launches += 1

            return launch

    between._launch_gate.kernel = kernel = Interpreted()
    for _ in range(3):
        between.launch_gate(states(3, 64))
    assert kernel.launches == 3


@pytest.mark.parametrize(
    ("name", "most", "made"),
    [
        ("add_norm", 20, 2),
        ("rotate", 21, 1),
        ("gate", 17, 1),
        ("rms_norm", 21, 1),
        ("gate of two", 25, 1),
        ("rotated", 32, 2),
    ],
)
def test_a_call_is_its_allocations_and_a_launch(name, most, made, stands, monkeypatch):
    """What Python does the second time: counted, since seconds depend on the machine."""
    x, y, weight, places = states(4, 352), states(4, 352), states(352), torch.arange(4, dtype=WHOLE)
    qkv, table, keys = states(4, 256), torch.rand(20, 32), torch.zeros(4, 2, 20, 32).to(BRAIN)
    pair, heads = states(1, 1, 1408).chunk(2, -1), heads_of(count=1, length=1)
    calls = {
        "add_norm": lambda: between.add_norm(x, y, weight, 1e-6),
        "rotate": lambda: between.rotate(qkv, table, places, places, keys, keys),
        "gate": lambda: between.gate(x),
        "rms_norm": lambda: elementwise.rms_norm(x, weight, 1e-6),
        "gate of two": lambda: elementwise.gate(*pair),
        "rotated": lambda: elementwise.rotated(*heads),
    }
    for stand in stands.values():
        monkeypatch.setattr(stand, "_compute", lambda *_: None)
        monkeypatch.setattr(stand, "_run", lambda *_: None)
    monkeypatch.setattr(between, "_on_gpu", lambda _: True)
    monkeypatch.setattr(elementwise, "serves", lambda _: True)
    calls[name]()
    seen = []

    def note(frame, event, what):
        if event == "call":
            seen.append(frame.f_code.co_name)
        elif event == "c_call":
            seen.append(what.__name__)

    with torch.inference_mode():
        sys.setprofile(note)
        calls[name]()
        sys.setprofile(None)
    assert len([name for name in seen if name.startswith(("empty", "new_", "zeros", "clone"))]) == made
    assert len(seen) <= most, (len(seen), seen)


def on_gpu():
    """Name -> (a call on CUDA tensors that gives tensors, what torch gives on the CPU)."""
    x, y, weight = states(5, 4096), states(5, 4096) + 1, states(4096)
    qkv, table = states(5, 12 * 128), torch.rand(320, 128)
    rows, places = torch.tensor([1, 0, 1, 1, 0], dtype=WHOLE), torch.tensor([3, 4, 5, 300, 0], dtype=WHOLE)
    caches = [states(2, 2, 320, 128) for _ in range(2)]
    query, last = states(2, 8 * 128), torch.tensor([301, 5], dtype=WHOLE)
    both = states(5, 2 * 11008)
    given = heads_of(2, 5, 8, 2, 128)
    turned = [x.transpose(1, 2).cuda().transpose(1, 2) if x.dim() == 4 else x.cuda() for x in given]
    cuda = [t.cuda() for t in (x, y, weight, qkv, table, rows, places, *caches, query, last, both)]
    cx, cy, cw, cqkv, ctable, crows, cplaces, ckeys, cvalues, cquery, clast, cboth = cuda

    def rotated(qkv, table, rows, places, keys, values):
        keys, values = keys.clone(), values.clone()
        return between.rotate(qkv, table, rows, places, keys, values), keys, values

    return {
        "add_norm": (lambda: between.add_norm(cx, cy, cw, 1e-6), between.add_norm(x, y, weight, 1e-6)),
        "norm": (lambda: between.add_norm(cx, None, cw, 1e-6)[1:], between.add_norm(x, None, weight, 1e-6)[1:]),
        "rotate": (
            lambda: rotated(cqkv, ctable, crows, cplaces, ckeys, cvalues),
            rotated(qkv, table, rows, places, *caches),
        ),
        "attend": (
            lambda: [between.attend(cquery, ckeys, cvalues, clast)],
            [between.attend(query, *caches, last)],
        ),
        "gate": (lambda: [between.gate(cboth)], [between.gate(both)]),
        "rms_norm": (lambda: [elementwise.rms_norm(cx, cw, 1e-6)], [elementwise.rms_norm(x, weight, 1e-6)]),
        "gate of slices": (lambda: [elementwise.gate(*cboth.chunk(2, -1))], [between.gate(both)]),
        "rotated": (lambda: elementwise.rotated(*turned), rotated_by_torch(*given)),
        "gate of one row": (lambda: [elementwise.gate(*cboth[:1].chunk(2, -1))], [between.gate(both[:1])]),
    }


ON_GPU = ("add_norm", "norm", "rotate", "attend", "gate", "rms_norm", "gate of slices", "gate of one row", "rotated")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_launches_on_a_gpu(name):
    """The first, later ones, those on another stream and those in a recording give what torch gives on a CPU."""
    call, truth = on_gpu()[name]

    def held(found):
        for one, other in zip(found, truth, strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one.cpu().float(), other.float(), rtol=2e-2, atol=2e-2)

    first = call()
    held(first)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(call(), first, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = call()
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(there, first, strict=True))
    made = []
    replay = recorded(lambda: made.append(call()))
    for one in made[0]:
        one.zero_()
    replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(made[0], first, strict=True))


@pytest.mark.gpu
def test_odd_addresses_on_a_gpu():
    x, weight = states(3 * 4096 + 1)[1:].view(3, 4096), states(4096)
    odd = torch.cat([x.new_zeros(1), x.flatten()]).cuda()[1:].view(3, 4096)
    assert odd.data_ptr() % 16
    truth = elementwise.rms_norm(x, weight, 1e-6).float()
    for given in (odd, odd.clone(), odd, odd.clone()):
        assert torch.allclose(elementwise.rms_norm(given, weight.cuda(), 1e-6).cpu().float(), truth, rtol=2e-2)


@pytest.mark.gpu
def test_host_microseconds_of_launches_on_a_gpu():
    with torch.inference_mode():
        for name, (call, _) in on_gpu().items():
            for _ in range(50):
                call()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(200):
                call()
            print(f"{name}: {(time.perf_counter() - began) / 200 * 1e6:.1f} us")
            torch.cuda.synchronize()
