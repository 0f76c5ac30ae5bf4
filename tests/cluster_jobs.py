"""What the tests of `app.batch.cluster` run in actors: the toy of a batch, alone and as a pair."""

from functools import partial

import batch_toy
from PIL import Image


class Pair(batch_toy.Toy):
    """A session of several processes: every picture holds what they say of each other."""

    def together(self, requests, plan, watch=None, *, memory=False):
        import torch
        from torch import distributed

        outcomes = super().together(requests, plan)
        total = torch.tensor([10 ** distributed.get_rank()])
        distributed.all_reduce(total)
        for outcome in outcomes:
            outcome.pictures[0] = Image.new("RGB", (4, 4), (int(total), 0, 0))
        return outcomes


def paired(source, log):
    """Load a source in several processes."""
    batch_toy.opened(source, log)  # the fingerprint
    return Pair(source, log)


def pair(log):
    """What loads the pair, in workers."""
    return partial(paired, log=log)
