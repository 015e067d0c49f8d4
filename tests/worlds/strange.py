"""What strangers write: values of any kind for hypothesis, and a reader held against the reference."""

from hypothesis import settings
from hypothesis import strategies as st

from qquant.errors import InputError

FAST = settings(deadline=5000, max_examples=60)
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)


def refused(read, path, reference):
    """`read` refuses the file, or takes it and the reference does too."""
    try:
        read(path)
    except InputError:
        return
    reference(path)
