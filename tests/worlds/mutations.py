"""Every field of a JSON value replaced by values that it should not have, or taken away."""

import copy

DELETED = object()
STRANGE = (
    DELETED, None, True, -1, 0, 10**30, 1e308, -0.5, "", "x", "nan", "<script>", "a\nb\x1b[2J\x00", "9" * 5000, [], {}, [[]],
    [None, {"a": [1]}], {"a": {"b": []}}, ["x"] * 3, "../../evil",
)  # fmt: skip


def places(value, at=()):
    """Paths of all fields and items, the root not among them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutations(value, stride=1, first=0):
    """(path, strange value, copy of `value` with it), every `stride`-th of them."""
    pairs = [(path, strange) for path in places(value) for strange in STRANGE]
    for path, strange in pairs[first::stride]:
        changed = copy.deepcopy(value)
        place = changed
        for key in path[:-1]:
            place = place[key]
        if strange is DELETED:
            del place[path[-1]]
        else:
            place[path[-1]] = strange
        yield path, strange, changed
