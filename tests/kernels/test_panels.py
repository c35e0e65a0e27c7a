"""A weight cut into panels."""

from hypothesis import given
from hypothesis import strategies as st

from efx_plugin.kernels import panels


@given(rows=st.integers(1, 5000), units=st.integers(1, 20), beyond=st.integers(0, 15))
def test_panels_cover_the_rows(rows, units, beyond):
    found = panels.cut(rows, 16 * units + beyond, 16)
    assert [first for first, _ in found] == [sum(height for _, height in found[:i]) for i in range(len(found))]
    assert sum(height for _, height in found) == rows
    assert all(first % 16 == 0 and 0 < height <= 16 * units for first, height in found)
