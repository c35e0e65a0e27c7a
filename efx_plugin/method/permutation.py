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
    groups = dealt.T.contiguous()
    for _ in range(ROUNDS):
        for place in range(m):
            others = torch.cat([groups[:, :place], groups[:, place + 1 :]], dim=1)
            surpassed = scores[:, others].topk(m - n, dim=2).values[..., -1]
            movable = groups[:, place].clone()
            gains = torch.stack(
                [(scores[:, one : one + 1] - surpassed).clamp_min_(0).sum(0) for one in movable.tolist()]
            )
            members, places = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
            groups[torch.as_tensor(places), place] = movable[torch.as_tensor(members)]
    groups = groups.sort(dim=1).values  # within a group any order does, and so does any order of groups
    order = groups[groups[:, 0].argsort()].flatten()
    present = torch.arange(inputs, device=scores.device)
    return order if _kept(scores[:, order], n, m) > _kept(scores, n, m) else present


def _kept(scores: Tensor, n: int, m: int) -> Tensor:
    return scores.reshape(len(scores), -1, m).topk(m - n, dim=2).values.sum(dtype=torch.float64)
