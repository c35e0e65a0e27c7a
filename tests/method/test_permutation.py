"""An order of channels has each of them once, keeps no less than the present one, and finds what was hidden."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efx_plugin.method import permutation
from efx_plugin.method.permutation import channel_order


def kept(scores, n, m):
    return float(scores.unflatten(1, (-1, m)).topk(m - n, dim=2).values.sum(dtype=torch.float64))


@settings(max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(1, 8),
    st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)]),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([3, 512]),
)
def test_every_input_stands_somewhere_and_no_less_is_kept(rows, groups, n_of_m, seed, ties, at_once):
    n, m = n_of_m
    scores = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed)).square()
    if ties:
        scores = (3 * scores).round()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "AT_ONCE", at_once)
        order = channel_order(scores, n, m)
        assert torch.equal(order, channel_order(scores, n, m))
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(groups * m))
    assert kept(scores[:, order], n, m) >= kept(scores, n, m)


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8)])
def test_important_channels_that_stood_together_are_parted(n, m):
    """Half of the channels hold everything, and stand together: parted, nothing of them is lost."""
    scores = torch.rand(20, 16 * m, generator=torch.Generator().manual_seed(0)) * 1e-3
    scores[:, : 8 * m] += 1
    assert kept(scores, n, m) < 0.6 * float(scores.sum())
    order = channel_order(scores, n, m)
    assert kept(scores[:, order], n, m) > 0.999 * float(scores.sum())


def test_rows_that_want_other_channels_share_an_order():
    """Each pair of channels matters to one row alone; groups of two pairs for the same row lose one of them."""
    rows = torch.eye(8).repeat_interleave(4, dim=1)  # four channels that matter to each of eight rows
    assert kept(rows, 2, 4) == 16
    order = channel_order(rows, 2, 4)
    assert kept(rows[:, order], 2, 4) == 32
