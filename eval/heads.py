"""Other ways to differentiate the cross-entropy of a head, for eval/bench.py to measure.

All take a head, hidden (B, L, d) and tokens y (B, L), and return the mean in nats per token, like
flow.cross_entropy. They differ in what they hold for V = 50,257 and in what they compute:

    whole         all logits at once; three products with the vocabulary, two of them backward;
    checkpointed  the logits of a slice of tokens, recomputed in the backward pass: four products;
    builtin       F.linear_cross_entropy in chunks, which has no cap on the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flow import slices


def whole(head: nn.Module, hidden: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden.flatten(0, 1)), y.flatten())


def checkpointed(head: nn.Module, hidden: Tensor, y: Tensor) -> Tensor:
    def loss(hidden, y):
        return F.cross_entropy(head(hidden), y, reduction="sum")
    parts = slices(head, hidden.flatten(0, 1), y.flatten())
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts) / y.numel()


def builtin(head: nn.Module, hidden: Tensor, y: Tensor) -> Tensor:
    """In the default chunks. It multiplies in the dtype of its arguments, not in autocast's."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return F.linear_cross_entropy(
        hidden.flatten(0, 1).to(dtype), head.weight.to(dtype), y.flatten(),
        linear_bias=head.bias.to(dtype), options=torch.nn.LinearCrossEntropyOptions()).float()
