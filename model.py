"""The network: a bidirectional transformer that reads a noisy embedded text and its time.

It is a GPT without the causal mask and with two additions:

- **time conditioning.** The place on the clock, `tau` in [0, 1], becomes sinusoidal features, then
  a vector that shifts, scales and gates every block (adaptive layer norm, "adaLN"). A flow *map*
  has two times, where it starts (`tau`) and where it lands (`tau_t`): it adds a second embedding;
- **it starts from `z`, not from token ids.** The state of the flow is one-hot text mixed with
  noise, `x` (B, L, V). The network reads it only through the embedding, `z = x E` (B, L, d), and
  flow.py makes `z` without making `x`.

`model(z, tau)` returns hidden states (B, L, d), and `model.head` turns hidden states into logits
(.., V). They are two calls so that callers can apply the head to a few tokens at a time: at
V = 50,257 the logits of a batch are by far the largest tensor there is.

Two options are ours, not the paper's, and a network that mirrors a released checkpoint has neither:
`learned_positions` (rotary attention sees only differences of positions, and pure noise looks the
same everywhere, so at tau = 0 the network could not tell where it is) and `time_scale` (unscaled,
all phases of the sinusoids stay below one radian, and the features hardly move with tau).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelConfig:
    vocab_size: int
    block_size: int                  # L, tokens in a sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768                # d, width of the residual stream and of z
    n_time: int = 128                # width of the time embedding
    dropout: float = 0.1             # on the output of every attention and MLP branch
    flow_map: bool = False           # two time embeddings instead of one
    learned_positions: bool = True   # add a learned vector per absolute position to z
    position_std: float = 0.1        # initial size of those vectors; pure noise z0 has size 1
    time_scale: float = 30.0         # times tau before the sinusoids; 1 in the paper
    attention_softcap: float = 0.0   # logits become c tanh(logit / c); 50 in the paper, 0 = off
    logit_softcap: float = 0.0       # the same for the output logits; 30 in the paper, 0 = off
    mlp_ratio: int = 4               # an MLP's hidden layer has this times d units; 4 in the paper
    context: bool = False            # can be told tokens: a learned vector marks them

    def __post_init__(self):
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd={self.n_embd} must be an even multiple of "
                             f"n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie between 0 and 1")


def attend(q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0, path: str = "auto") -> Tensor:
    """Attention over all positions; q, k, v and the result are (B, H, L, d_head).

    path: "sdpa"    the fused kernel, which has no soft cap;
          "flex"    flex_attention, compiled: a soft cap without an (L, L) matrix, for CUDA;
          "math"    plain matrix products: the reference, and the only one with forward derivatives;
          "causal"  tokens see themselves and those before them, for baselines/ar.py: no cap;
          "auto"    sdpa without a cap, flex on CUDA with one, math elsewhere. Up to 256 tokens math
                    replaces flex (the (L, L) matrix is small), and sdpa on a CPU, where the
                    backward pass of sdpa is slower.
    Raises ValueError for sdpa or causal with a cap and for an unknown path.
    """
    if path == "auto":
        short = q.size(-2) <= 256
        if softcap:
            path = "flex" if q.is_cuda and not short else "math"
        else:
            path = "math" if q.device.type == "cpu" and short else "sdpa"
    if path == "sdpa" and not softcap:
        return F.scaled_dot_product_attention(q, k, v)
    if path == "causal" and not softcap:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if path == "flex":
        return flex(q, k, v, softcap)
    if path == "math":
        logits = q @ k.transpose(-2, -1)                            # (B, H, L, L)
        if softcap:  # in 16 bits the cap would double the error of the logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cap(logits / math.sqrt(q.size(-1)), softcap).softmax(-1).to(v.dtype) @ v
    raise ValueError(f"attention path {path!r} cannot be used with softcap={softcap}")


def cap(logits: Tensor, softcap: float) -> Tensor:
    """c tanh(logits / c): the identity for small logits, never beyond +-c. softcap 0: no cap."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def flex(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
    """Soft-capped attention without an (L, L) matrix: the fused kernel caps each score."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import; GPUs only

    def capped(score, batch, head, i, j):
        return softcap * torch.tanh(score / softcap)
    fused = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    return fused(q, k, v, score_mod=capped if softcap else None)


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile, once. Uncompiled, flex_attention holds the (L, L) matrix it should avoid."""
    return torch.compile(function)


def rotary_table(L: int, d_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (L, d_head / 2) of the angles position * 10000^(-2i / d_head)."""
    half = d_head // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=device) / half)
    angles = torch.arange(L, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turn the pairs (x[i], x[i + d_head/2]) of x (B, H, L, d_head) by angles
    that grow with the position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class TimeEmbedding(nn.Module):
    """tau (B,) in [0, 1] -> 256 sinusoids, cosines first -> two-layer MLP -> (B, n_time)."""

    def __init__(self, n_time: int, time_scale: float):
        super().__init__()
        self.time_scale = time_scale
        self.fc1 = nn.Linear(256, n_time)
        self.fc2 = nn.Linear(n_time, n_time)

    def forward(self, tau: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=tau.device) / 128)
        phases = self.time_scale * tau[:, None] * frequencies       # (B, 128)
        features = torch.cat((phases.cos(), phases.sin()), dim=-1)  # (B, 256)
        # In 16 bits the rounding error would exceed the effect of a change of tau by 1 / 1024.
        with torch.autocast(tau.device.type, enabled=False):
            return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


class Norm(nn.Module):
    """Layer norm with a weight and no bias, then the time's shift and scale: norm(x) (1 + scale) +
    shift."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], self.weight), 1 + scale)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, wide = config.n_embd, config.mlp_ratio * config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.softcap = config.attention_softcap
        self.norm1 = Norm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = Norm(d)
        self.mlp_in = nn.Linear(d, wide)
        self.mlp_out = nn.Linear(wide, d)
        self.modulation = nn.Linear(config.n_time, 6 * d)  # shift, scale, gate of attention and MLP

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor, path: str) -> Tensor:
        B, L, d = x.shape
        modulation = self.modulation(time)[:, None]                 # (B, 1, 6 d)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)

        qkv = self.qkv(self.norm1(x, shift1, scale1)).view(B, L, 3, self.n_head, d // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, H, L, d_head)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = attend(q, k, v, self.softcap, path).transpose(1, 2).reshape(B, L, d)
        x = x + gate1 * F.dropout(self.attn_out(mixed), self.dropout, self.training)

        hidden = self.mlp_in(self.norm2(x, shift2, scale2))         # (B, L, mlp_ratio d)
        hidden = F.gelu(hidden, approximate="tanh")
        return x + gate2 * F.dropout(self.mlp_out(hidden), self.dropout, self.training)


class Head(nn.Linear):
    """Hidden states (.., d) -> logits (.., V), in float32 at least: under autocast the product is
    bfloat16, but the cap and the log-softmax that follow must not be."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.n_embd, config.vocab_size)
        self.softcap = config.logit_softcap
        self.compiled = False  # whether the loss of its logits is, by torch.compile: see flow.py

    def forward(self, hidden: Tensor) -> Tensor:
        weight, bias, V = self.weight, self.bias, self.out_features
        if hidden.is_cuda and V % 64 and hidden.numel() >= 256 * hidden.size(-1):
            # Rows of whole 128 bytes, without which products of many tokens are slow on a GPU.
            weight, bias = F.pad(weight, (0, 0, 0, -V % 64)), F.pad(bias, (0, -V % 64))
        logits = F.linear(hidden, weight, bias)[..., :V]
        return cap(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.softcap)


class FlowTransformer(nn.Module):
    """The denoiser D_t of a flow language model (flow.py), or the two-time denoiser delta_{s,t} of
    a flow map (flowmap.py). `embed.weight` is the matrix E (V, d) of z = x E."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, d)
        if config.learned_positions:
            self.positions = nn.Parameter(torch.empty(config.block_size, d))
        if config.context:
            self.known = nn.Parameter(torch.empty(d))
        self.time_s = TimeEmbedding(config.n_time, config.time_scale)
        if config.flow_map:
            self.time_t = TimeEmbedding(config.n_time, config.time_scale)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_out = Norm(d)
        self.modulation_out = nn.Linear(config.n_time, 2 * d)
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E starts so that x0 E, a sum of V terms, has unit variance. Every modulation and the head
        start at zero: each block begins as the identity and the model as a uniform guess. So does a
        flow map's second time embedding: the map begins as the FLM whose weights it is given."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.weight, std=self.config.vocab_size ** -0.5)
        if self.config.learned_positions:
            nn.init.normal_(self.positions, std=self.config.position_std)
        if self.config.context:
            nn.init.zeros_(self.known)
        zero = [self.head, self.modulation_out] + [block.modulation for block in self.blocks]
        for layer in zero + ([self.time_t.fc2] if self.config.flow_map else []):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, tau: Tensor, tau_t: Tensor | None = None,
                known: Tensor | None = None, attention: str = "auto") -> Tensor:
        """Hidden states (B, L, d) for the state z (B, L, d) at clock time tau (B,). A flow map also
        needs the clock time tau_t (B,) it jumps to. `known` (B, L) marks tokens shown without
        noise. `attention` is a path of `attend`. Raises ValueError when the number of times does
        not fit the network, when it cannot be told tokens, or when z is longer than the learned
        positions."""
        if (tau_t is not None) != self.config.flow_map:
            raise ValueError("a flow map takes tau and tau_t, a flow takes tau alone")
        if self.config.learned_positions:
            if z.size(1) > self.config.block_size:
                raise ValueError(f"{z.size(1)} tokens, but the model has positions for "
                                 f"{self.config.block_size}")
            z = z + self.positions[:z.size(1)]
        if self.config.context:
            if known is None:
                known = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
            z = z + known[..., None] * self.known                   # (B, L, d)
        elif known is not None:
            raise ValueError("a network without context cannot be told tokens")
        time = self.time_s(tau)
        if tau_t is not None:
            time = time + self.time_t(tau_t)
        time = F.silu(time)                                         # (B, n_time)
        d_head = self.config.n_embd // self.config.n_head
        cos, sin = rotary_table(z.size(1), d_head, z.device)
        for block in self.blocks:
            z = block(z, time, cos, sin, attention)
        shift, scale = self.modulation_out(time)[:, None].chunk(2, dim=-1)      # (B, 1, d)
        return self.norm_out(z, shift, scale)
