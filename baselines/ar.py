"""An autoregressive language model on the network of model.py: the mathematics, nothing read or written.

The ordinary way to write text, one token after the other, each seeing those before it. The transformer is the same, with
clean tokens instead of noise, the time held at 1 and causal attention. What the tokens so far have left in every
layer, their keys and values, is kept, so that a new token costs one row of every matrix product, not i rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import FlowTransformer, rotary_table, rotate


class Decoder:
    """A FlowTransformer read causally, with room for the keys and values of L tokens in B texts.

    With weights in bfloat16 the cache is too. Raises ValueError when more than L tokens are fed.
    """

    def __init__(self, model: FlowTransformer, B: int, L: int):
        self.model, config = model, model.config
        weight = model.embed.weight
        d_head = config.n_embd // config.n_head
        time = F.silu(model.time_s(torch.ones(1, device=weight.device)))        # (1, n_time), the same for every token
        self.modulations = [block.modulation(time)[:, None].chunk(6, dim=-1) for block in model.blocks]
        self.modulation_out = model.modulation_out(time)[:, None].chunk(2, dim=-1)
        self.cos, self.sin = (table.to(weight.dtype) for table in rotary_table(L, d_head, weight.device))
        self.cache = weight.new_empty(config.n_layer, 2, B, config.n_head, L, d_head)
        self.length = 0                                                         # tokens fed so far

    def __call__(self, tokens: Tensor) -> Tensor:
        """Feed tokens (B, n): logits (B, n, V) for the token after each of them."""
        B, n = tokens.shape
        start, end = self.length, self.length + n
        if end > self.cache.size(-2):
            raise ValueError(f"{end} tokens, but room for {self.cache.size(-2)}")
        x = F.embedding(tokens, self.model.embed.weight)                        # (B, n, d)
        if self.model.config.learned_positions:
            x = x + self.model.positions[start:end]
        cos, sin = self.cos[start:end], self.sin[start:end]
        causal = torch.ones(n, end, dtype=torch.bool, device=x.device).tril(start) if n > 1 else None
        for block, (keys, values), modulation in zip(self.model.blocks, self.cache, self.modulations):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
            qkv = block.qkv(block.norm1(x, shift1, scale1)).view(B, n, 3, block.n_head, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, n, d_head)
            keys[:, :, start:end], values[:, :, start:end] = rotate(k, cos, sin), v
            mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), keys[:, :, :end], values[:, :, :end], causal)
            x = x + gate1 * block.attn_out(mixed.transpose(1, 2).reshape(x.shape))
            hidden = F.gelu(block.mlp_in(block.norm2(x, shift2, scale2)), approximate="tanh")
            x = x + gate2 * block.mlp_out(hidden)
        self.length = end
        return self.model.head(self.model.norm_out(x, *self.modulation_out))


@torch.no_grad()
def generate(model: FlowTransformer, first: Tensor, L: int) -> Tensor:
    """Texts (B, L) that begin with the token first (B,), every next one drawn from the model's distribution."""
    decoder, tokens = Decoder(model, len(first), L), [first[:, None]]
    for _ in range(L - 1):
        probabilities = decoder(tokens[-1])[:, 0].softmax(-1)                   # (B, V)
        tokens.append(torch.multinomial(probabilities, 1))
    return torch.cat(tokens, dim=1)
