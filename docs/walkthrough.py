"""Flow language models and flow maps: the whole method in one file, to be read from top to bottom.

    python docs/walkthrough.py      # 3.5 minutes on two CPU cores; its map: 84% valid in one step

A flow turns noise into all tokens of a text together, in many steps. A flow map learns to do it in
one. Both are computed here as on paper, in arrays (B, L, V): B texts, L tokens, a vocabulary of V.
"""

import copy
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
start = time.time()

# ---- 1. The texts: palindromes, four random letters and their mirror image.
# Each letter is uniform on its own and certain once its partner is known. Independent letters are
# a palindrome once in 26^4 = 456,976 times. So one step must make partners agree.
V, L, B = 26, 8, 128


def palindromes(n):
    half = torch.randint(V, (n, L // 2))
    return torch.cat([half, half.flip(1)], dim=1)                                    # (n, L)


# ---- 2. The path: a straight line from noise x0 to the text as a one-hot array x1.

def corrupt(y, t):
    """x_t = (1 - t) x0 + t x1, (B, L, V), of texts y (B, L) at times t (B, 1, 1)."""
    return (1 - t) * torch.randn(*y.shape, V) + t * F.one_hot(y, V)


# ---- 3. The clock: which times matter.
# At small t nothing can be read from x_t, at large t everything. So measure progress by tau, the
# share of letters that argmax x_t gets right, rescaled so that a blind guess counts as 0. Find it
# by experiment: noise a letter at every t, count, and read the table backwards to get t(tau).
noise, letter = torch.randn(50_000, V), torch.eye(V)[0]
t_table = torch.linspace(0, 1, 201)
right = torch.stack([(noise.lerp(letter, t).argmax(1) == 0).float().mean() for t in t_table])
tau_table = (right - right[0]) / (1 - right[0])                         # right[0] is about 1/V
unsure = tau_table < 1                                                  # tau = 1 has no inverse
t_table, tau_table = (F.pad(table[unsure], (0, 1), value=1.0) for table in (t_table, tau_table))


def t_of_tau(tau):
    """The times t (B, 1, 1) at which the clock shows tau (B,)."""
    i = torch.searchsorted(tau_table, tau.contiguous()).clamp(1, len(t_table) - 1)
    share = (tau - tau_table[i - 1]) / (tau_table[i] - tau_table[i - 1])
    return torch.lerp(t_table[i - 1], t_table[i], share)[:, None, None]


# ---- 4. The network: a small transformer, no causal mask, that returns logits for every letter.
# A flow is told the time of x, a flow map also where to land. The second embedding starts at zero,
# so that a map begins as its flow. Large positions help a letter to find its partner in the noise.

def waves(tau):
    phases = tau[:, None, None] * 1000 * 10_000 ** (-torch.arange(64) / 64)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)                           # (B, 1, 128)


class Network(nn.Module):
    def __init__(self, d=128, n_layer=3, n_head=4):
        super().__init__()
        self.E = nn.Parameter(torch.randn(V, d) / math.sqrt(V))         # x0 E has variance 1
        self.positions = nn.Parameter(3 * torch.randn(L, d))
        self.time_s, self.time_t = (nn.Sequential(
            nn.Linear(128, d), nn.SiLU(), nn.Linear(d, d, bias=False)) for _ in range(2))
        nn.init.zeros_(self.time_t[2].weight)
        self.blocks = nn.Sequential(*(
            nn.TransformerEncoderLayer(d, n_head, 4 * d, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True) for _ in range(n_layer)))
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, V))

    def forward(self, x, tau_s, tau_t=None):
        """Logits (B, L, V) for the state x (B, L, V) at clock times tau_s and tau_t (B,)."""
        z = x @ self.E + self.positions + self.time_s(waves(tau_s))                  # (B, L, d)
        if tau_t is not None:
            z = z + self.time_t(waves(tau_t))
        return self.head(self.blocks(z))


def train(net, steps, lr, loss):
    """Minimise loss(net, average, progress in [0, 1]) and return the moving average of net."""
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        cosine = math.cos(math.pi / 2 * step / steps) ** 2
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * cosine
        value = loss(net, average, step / steps)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for slow, fast in zip(average.parameters(), net.parameters()):
            slow.lerp_(fast.detach(), max(0.001, 9 / (10 + step)))
        if step % 200 == 0:
            print(f"  step {step:4d}  loss {value.item():.3f}  {time.time() - start:3.0f} s")
    return average


# ---- 5. The flow: learn to guess the text from x_t.
# The denoiser D_t(x), the distribution of each letter given x_t = x, is learned by cross-entropy.
# The flow is dx/dt = (D - x) / (1 - t). An Euler step from s to t takes x to (1 - h) x + h D with
# h = (t - s) / (1 - s). Steps are equal on the clock. After the last take the likeliest letters.

def flow_loss(net, target_net, progress):
    y = palindromes(B)
    tau = (torch.arange(B) + torch.rand(B)) / B                         # evenly over the clock
    return F.cross_entropy(net(corrupt(y, t_of_tau(tau)), tau).flatten(0, 1), y.flatten())


def move(x, target, s, t):
    return torch.lerp(x, target, (t - s) / (1 - s))


@torch.no_grad()
def report(name, net, all_steps, is_map, n=1000):
    for steps in all_steps:
        x, tau = torch.randn(n, L, V), torch.linspace(0, 1, steps + 1)[:, None].expand(-1, n)
        for tau_s, tau_t in zip(tau[:-1], tau[1:]):
            target = net(x, tau_s, tau_t if is_map else None).softmax(-1)
            x = move(x, target, t_of_tau(tau_s), t_of_tau(tau_t))
        y = target.argmax(-1)                                                        # (n, L)
        valid = (y == y.flip(1)).all(dim=1).float().mean().item()
        texts = " ".join("".join(chr(97 + token) for token in text) for text in y[:4].tolist())
        print(f"{name}, steps: {steps:2d}  valid palindromes: {valid:.3f}  {texts}")


flow = train(Network(), 600, 3e-3, flow_loss)
report("flow", flow, (1, 2, 8, 64), is_map=False)

# ---- 6. The flow map: learn where the flow will end up.
# One Euler step fails: at t = 0 every letter is as likely as any other. But x at s determines where
# the flow carries it at t. Write this jump like an Euler step, X_{s,t}(x) = (1 - h) x + h delta.
# Then delta_{s,t}(x) averages the D met on the way: a distribution, to be learned by two rules:
#   diagonal    delta_{t,t} = D_t: a jump of no length is what the flow, the teacher, knows;
#   semigroup   delta_{s,t}(x) = g delta_{s,u}(x) + (1 - g) delta_{u,t}(X_{s,u}(x)), with
#               g = (1 - t)(u - s) / ((1 - u)(t - s)): two jumps land where one does.
# So long jumps learn from shorter ones. Their targets have no gradient and come from the moving
# average of the student. The jump 0 -> 1 writes the samples; its share of the batch grows as the
# jumps it learns from improve. The real programs share E, so here it is frozen too.
split, n = 0.5, B // 4                                                  # n rows on the diagonal


def map_loss(student, target_net, progress):
    length, full = torch.rand(B).clamp_min(1e-3), torch.rand(B) < 0.8 * progress
    length[:n], full[:n] = 0, False
    tau_s = torch.where(full, 0.0, torch.rand(B) * (1 - length))
    tau_t = torch.where(full, 1.0, tau_s + length)
    tau_u = torch.lerp(tau_s, tau_t, split)
    s, u, t = (t_of_tau(tau) for tau in (tau_s, tau_u, tau_t))
    x = corrupt(palindromes(B), s)
    with torch.no_grad():
        diagonal = flow(x[:n], tau_s[:n]).softmax(-1)
        first = target_net(x[n:], tau_s[n:], tau_u[n:]).softmax(-1)
        x_u = move(x[n:], first, s[n:], u[n:])
        second = target_net(x_u, tau_u[n:], tau_t[n:]).softmax(-1)
        g = ((1 - t) * (u - s) / ((1 - u) * (t - s)))[n:]
        target = torch.cat([diagonal, g * first + (1 - g) * second])                 # (B, L, V)
    return F.cross_entropy(student(x, tau_s, tau_t).flatten(0, 1), target.flatten(0, 1))


student = copy.deepcopy(flow).requires_grad_(True)
student.E.requires_grad_(False)
report("map", train(student, 1300, 1.5e-3, map_loss), (1, 2, 4), is_map=True)

# ---- 7. Why the real programs never hold an array of shape (B, L, V).
# The network reads x only as z = x E. Noise x0 E is Gaussian with covariance E^T E, and so is
# xi C^T with C C^T = E^T E and xi in d dimensions. So draw that, and follow the flow in z.
E = torch.randn(200, 4)                                                 # V = 200, d = 4
C = torch.linalg.cholesky(E.T @ E)
torch.testing.assert_close(C @ C.T, E.T @ E)
for z0 in torch.randn(20_000, 200) @ E, torch.randn(20_000, 4) @ C.T:
    assert (z0.T.cov() - E.T @ E).norm() < 0.05 * (E.T @ E).norm()

# The loss is a sum over tokens. So compute the logits of a few tokens, differentiate, forget them
# and go on: the loss and its gradients are those at once.
hidden, head = torch.randn(60, 4, requires_grad=True), torch.randn(200, 4, requires_grad=True)
y = torch.randint(200, (60,))
at_once = F.cross_entropy(hidden @ head.T, y)
gradients = torch.autograd.grad(at_once, (hidden, head))
total = 0.0
for part in torch.arange(60).split(16):
    loss = F.cross_entropy(hidden[part] @ head.T, y[part], reduction="sum") / 60
    loss.backward()                                                     # adds to .grad
    total += loss.item()
torch.testing.assert_close(total, at_once.item())
torch.testing.assert_close((hidden.grad, head.grad), gradients)
print(f"Both shortcuts agree with the long way. {time.time() - start:.0f} s in all.")

# ---- Exercises.
# 1. Change split to 0.25. Expect about the same share in one step, a little less in two and four.
# 2. Teach it to write sums: let palindromes() return texts such as 27+48=075, V = 12 and L = 9, and
#    report() check them. A digit depends on four others, not on one: expect it to take longer.
# 3. Remove the positions and see: no letter knows its partner. Expect pairs in the wrong places.
