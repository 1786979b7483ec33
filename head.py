"""Losses and draws from the output head, for a slice of tokens at a time: there is never an array of logits (B, L, V).

`by_tokens` applies a function to the logits of all tokens, `sum_by_tokens` sums a loss over them and makes its gradient in
the same pass; `draw` takes tokens from their probabilities. Nothing here knows of flows: what the function is, flow.py,
flowmap.py and the baselines say.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

SLICE = 2 ** 25  # logits held at once on a CPU: 128 MiB in float32, 667 tokens at V = 50,257; on a GPU four times that


def slices(head: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of several tensors (N, ..), each of as many tokens as SLICE logits allow, on a GPU of four times that:
    every slice adds a (V, d) gradient to the head's, so fewer and larger ones are faster where there is memory for them."""
    n = max(1, (4 if tensors[0].is_cuda else 1) * SLICE // head.out_features)
    return zip(*(tensor.split(n) for tensor in tensors))


@torch.no_grad()
def by_tokens(function: Callable[..., Tensor], head: nn.Module, *tensors: Tensor) -> Tensor:
    """function(*tensors) without gradient, on slices of the B L tokens so that logits never exist for all of them.

    tensors: (B, L, ..) each; function sees (n, ..) slices and returns one (n, ..) tensor; result (B, L, ..). `head` is
    only asked for its vocabulary size.
    """
    parts = [function(*part) for part in slices(head, *(tensor.flatten(0, 1) for tensor in tensors))]
    return torch.cat(parts).unflatten(0, tensors[0].shape[:2])


def draw(p: Tensor, random: torch.Generator | None) -> Tensor:
    """One token a row, (n, 1), from probabilities p (n, V), by their cumulative sum: the first token at which it exceeds u,
    uniform.

    In float64: a float32 u has 24 bits, too few for the rarest tokens, here as in the Gumbel-max trick. They are hardly
    drawn, the text loses entropy without notice, and its generative perplexity looks better than it is (arXiv 2409.02908).
    This takes one random number a row, where torch.multinomial takes V. Where p is not finite it returns V, a
    token that no embedding has: to check here would be to wait for the device."""
    sums = p.double().cumsum(-1)                                                # u < 1, so u times the last is below the last
    u = torch.rand(len(p), 1, dtype=torch.float64, generator=random, device=p.device)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True)


def sum_by_tokens(function: Callable[..., Tensor], head: nn.Module, hidden: Tensor, *tensors: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """The sum over all tokens of a loss, to differentiate, and what `function` returned, (B, L, k), without gradient.

    function(head(hidden), *tensors) sees (n, ..) slices of hidden (B, L, d) and tensors (B, L, ..) and returns (n, k),
    losses in column 0. Gradients go to hidden and to the head's parameters, not to the other tensors. The sum can be
    differentiated once.
    """
    if torch.is_grad_enabled():
        total, values = SumBySlices.apply(function, head, hidden.flatten(0, 1),
                                          [tensor.flatten(0, 1) for tensor in tensors], *head.parameters())
        return total, values.unflatten(0, hidden.shape[:2])
    values = by_tokens(lambda hidden, *rest: function(head(hidden), *rest), head, hidden, *tensors)
    return values[..., 0].sum(), values


class SumBySlices(torch.autograd.Function):
    """The gradient of a sum over tokens is known as soon as the loss is: each slice is differentiated in the forward
    pass and its logits dropped, where keeping them takes B L V numbers and remaking them a fourth product with V."""

    @staticmethod
    def forward(ctx, function, head, hidden, tensors, *parameters):
        values, of_hidden, of_head = [], [], None
        for part, *rest in slices(head, hidden.detach(), *tensors):
            with torch.enable_grad():
                value = function(head(part.requires_grad_()), *rest)            # (n, k)
                gradient, *more = torch.autograd.grad(value[:, 0].sum(), (part, *parameters))
            values.append(value.detach())
            of_hidden.append(gradient)
            if of_head is None:
                of_head = more
            else:
                for whole, addition in zip(of_head, more):
                    whole += addition
            del value, more                                                     # logits and (V, d), before the next
        values = torch.cat(values)                                              # (B L, k)
        ctx.mark_non_differentiable(values)
        ctx.save_for_backward(torch.cat(of_hidden), *of_head)
        return values[:, 0].sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _):
        of_hidden, *of_head = (gradient.mul_(scale) for gradient in ctx.saved_tensors)
        return None, None, of_hidden, None, *of_head


class SoftmaxCrossEntropy(torch.autograd.Function):
    """-sum_v p_v log softmax(logits)_v, (n, 1), from logits (n, V) and p: (n, V), each summing to one, or (n, 1) tokens.
    The gradient softmax(logits) - p is made in place, where autograd would fill an array with zeros for it and read it
    twice. It is a tenth of the head's time."""

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        ctx.save_for_backward(log_q, p)
        return -(log_q * p).sum(-1, keepdim=True) if p.is_floating_point() else -log_q.gather(-1, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        log_q, p = ctx.saved_tensors
        q = log_q.exp_()
        if p.is_floating_point():
            q -= p
        else:
            q.scatter_add_(-1, p, q.new_full(p.shape, -1))
        return q.mul_(gradient), None
