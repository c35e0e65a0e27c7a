"""An order of channels in which N:M pruning loses less.

Of every M consecutive inputs of a row N are pruned, however much the M are worth. Where the order of the inputs is
free, it decides which of them compete, and important ones need not meet (channel permutations, Pool and Yu, NeurIPS
2021).

The best order is hard to find. As in RIA (ICLR 2024), inputs are dealt to the groups of M by what they are worth in
all, and then the k-th members of all groups, k = 1 ... M, are dealt anew at once: an input that joins the other M − 1
of a group adds to what is kept of a row what it exceeds the (M − N)-th largest of them by. That is a linear assignment,
which is solved exactly.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Rounds over all places of a group; a third one gains a tenth of what two do.
ROUNDS = 2
# Members that are dealt at once, of groups chosen by lot: time grows with their number. Of the 384 groups of a down
# projection of SmolLM2-135M, 96 at once gain nine tenths of what all do.
AT_ONCE = 512


def channel_order(scores: Tensor, n: int, m: int) -> Tensor:
    """An order of the inputs, int64 [in], under which the m − n largest scores of every m consecutive ones sum to much.

    It is never worse than the order that they have.

    Args:
        scores: fp32 [rows, in], not negative: what is lost where a weight is pruned.
        n, m: n of every m consecutive inputs are pruned; m divides `in`.
    """
    inputs = scores.shape[1]
    dealt = scores.sum(dim=0).argsort(descending=True, stable=True).view(m, inputs // m)
    dealt[1::2] = dealt[1::2].flip(1)  # the group with the best first member gets the worst second one
    groups, lots = dealt.T.contiguous(), torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        for place in range(m):
            for some in torch.randperm(len(groups), generator=lots).split(AT_ONCE):
                groups[some, place] = _dealt_anew(scores, groups[some], place, m - n)
    groups = groups.sort(dim=1).values  # within a group any order does, and so does any order of groups
    order = groups[groups[:, 0].argsort()].flatten()
    present = torch.arange(inputs, device=scores.device)
    return order if _kept(scores[:, order], n, m) > _kept(scores, n, m) else present


def _dealt_anew(scores: Tensor, groups: Tensor, place: int, kept: int) -> Tensor:
    """The members at that place of all groups [groups, m], dealt to them so that the `kept` largest sum to most."""
    members = groups[:, place]
    others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
    surpassed = scores[:, others].topk(kept, dim=2).values[..., -1]
    gains = [(scores[:, one : one + 1] - surpassed).clamp_min_(0).sum(dim=0) for one in members.tolist()]
    chosen, dealt_to = linear_sum_assignment(torch.stack(gains).cpu().numpy(), maximize=True)
    result = torch.empty_like(members)
    result[torch.as_tensor(dealt_to)] = members[torch.as_tensor(chosen)]
    return result


def _kept(scores: Tensor, n: int, m: int) -> Tensor:
    return scores.reshape(len(scores), -1, m).topk(m - n, dim=2).values.sum(dtype=torch.float64)
