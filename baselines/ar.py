"""An autoregressive language model on the network of model.py: the mathematics, no input or output.

It writes text the ordinary way, one token after the other, each given those before it:
p(y) = prod_l p(y_l | y_<l). The transformer is the same, with clean tokens instead of noise, the
time held at 1, and causal attention. Its loss is exact, where the other methods have bounds.

Sampling caches the keys and values of the tokens so far in every layer. So token i costs one row of
every matrix product, not i rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flow import Clock, cross_entropy, draw_from
from model import FlowTransformer, rotary_table, rotate


def loss(model: FlowTransformer, clock: Clock | None, y: Tensor, tau: Tensor,
         rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """-log p(y_l | y_<l) in nats, from tokens y (B, L): the mean, to differentiate, and each
    (B, L). The clock, the values of tau (B,) and rng are for other methods."""
    before = F.embedding(y[:, :-1], model.embed.weight)             # (B, L - 1, d)
    x = F.pad(before, (0, 0, 1, 0))                                 # (B, L, d), first a zero
    hidden = model(x, torch.ones_like(tau), attention="causal")
    return cross_entropy(model.head, hidden, y)


class Decoder:
    """A FlowTransformer read causally, with a cache for the keys and values of L tokens in B texts,
    in the dtype of the weights. Raises ValueError when fed more than L tokens."""

    def __init__(self, model: FlowTransformer, B: int, L: int):
        self.model, config = model, model.config
        weight = model.embed.weight
        d_head = config.n_embd // config.n_head
        time = F.silu(model.time_s(torch.ones(1, device=weight.device)))    # (1, n_time)
        self.modulations = [block.modulation(time)[:, None].chunk(6, dim=-1)
                            for block in model.blocks]
        self.modulation_out = model.modulation_out(time)[:, None].chunk(2, dim=-1)
        table = rotary_table(L, d_head, weight.device)
        self.cos, self.sin = (part.to(weight.dtype) for part in table)
        self.cache = weight.new_empty(config.n_layer, 2, B, config.n_head, L, d_head)
        self.length = 0                                             # tokens fed so far

    def __call__(self, x: Tensor) -> Tensor:
        """Feed embedded tokens x (B, n, d), zeros for the start of the text. Returns logits
        (B, n, V) for the token after each."""
        B, n, _ = x.shape
        start, end = self.length, self.length + n
        if end > self.cache.size(-2):
            raise ValueError(f"{end} tokens, but room for {self.cache.size(-2)}")
        if self.model.config.learned_positions:
            x = x + self.model.positions[start:end]
        cos, sin = self.cos[start:end], self.sin[start:end]
        causal = x.new_ones(n, end, dtype=torch.bool).tril(start) if n > 1 else None
        for block, cache, modulation in zip(self.model.blocks, self.cache, self.modulations):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
            qkv = block.qkv(block.norm1(x, shift1, scale1)).view(B, n, 3, block.n_head, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # (B, H, n, d_head)
            cache[0, :, :, start:end], cache[1, :, :, start:end] = rotate(k, cos, sin), v
            keys, values = cache[:, :, :, :end]                     # (B, H, end, d_head)
            mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), keys, values, causal)
            x = x + gate1 * block.attn_out(mixed.transpose(1, 2).reshape(x.shape))
            hidden = F.gelu(block.mlp_in(block.norm2(x, shift2, scale2)), approximate="tanh")
            x = x + gate2 * block.mlp_out(hidden)
        self.length = end
        return self.model.head(self.model.norm_out(x, *self.modulation_out))


@torch.no_grad()
def sample(model: FlowTransformer, clock: Clock | None, B: int, L: int, steps: int,
           rng: torch.Generator | None, temperature: float = 1.0) -> Tensor:
    """Tokens (B, L), each drawn from the softmax of its logits / temperature. Takes L evaluations
    of the network, whatever `steps` says."""
    E = model.embed.weight
    decoder, x, tokens = Decoder(model, B, L), E.new_zeros(B, 1, E.size(1)), []
    for _ in range(L):
        p = (decoder(x)[:, 0].double() / temperature).softmax(-1)   # (B, V)
        tokens.append(draw_from(p, rng))                          # (B, 1)
        x = F.embedding(tokens[-1], E)
    return torch.cat(tokens, dim=1)
