"""python -m pytest tests/test_context.py

Known tokens, refinement and autoguidance at V = 3 against independent computations: the exact
posterior given any tokens by enumeration, its flow map integrated in float64, losses in loops,
rounds counted and moves made by hand."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_flowmap import BOTH_S, BOTH_T, CLOCK, TAU_S, TAU_T, ExactFlow, ExactFlowMap, V

import flow
import flowmap
from flow import Given, draw_known, move
from flowmap import OBJECTIVES, Denoiser, refine
from lib.machine import generator
from model import FlowTransformer, Head, ModelConfig

PAIRS = torch.tensor([[.30, .04, .06], [.03, .25, .02], [.05, .05, .20]], dtype=torch.float64)
TRIPLES = PAIRS[:, :, None] * (PAIRS / PAIRS.sum(1, keepdim=True))  # a Markov chain
CRITICAL = {2: 13.82, 7: 24.32, 8: 26.12, 26: 54.05}   # chi-square by degrees of freedom, 1 in 1000


class Exact(ExactFlowMap):
    """The exact denoiser (one time) and flow map (two) of a table of probabilities, (V,) * L, told
    any tokens, by enumeration of the V^L texts. E = identity, so z = x. A place counts
    t / (1 - t)^2 in the posterior, a known one infinitely: 1e6 stands for that."""

    def __init__(self, table):
        super().__init__()
        texts = torch.tensor(list(itertools.product(range(V), repeat=table.ndim)))
        self.texts = F.one_hot(texts, V).double().flatten(1)        # (V^L, L V)
        self.log_p = table.flatten().log()
        self.inverse = torch.eye(V, dtype=torch.float64)
        self.embed = torch.nn.Embedding.from_pretrained(self.inverse)

    def denoise(self, z, t):
        t = t[:, None, None].clamp_max(1 - 1e-4)
        weight = torch.where(self.known[..., None], 1e6, t / (1 - t) ** 2)      # (B, L, 1)
        p = (self.log_p + (z * weight).flatten(1) @ self.texts.T).softmax(-1)
        return (p @ self.texts).view(z.shape)

    def __call__(self, z, *times, known, attention="auto"):
        self.known = known
        return (ExactFlow, ExactFlowMap)[len(times) - 1].__call__(self, z, *times)


class Careless(Exact):
    """Sure of a wrong token, `shift` away, wherever it was told the right one."""

    def __init__(self, table, shift):
        super().__init__(table)
        self.shift = shift

    def __call__(self, z, *times, known, **options):
        hidden = super().__call__(z, *times, known=known)
        return torch.where(known[..., None], hidden.roll(self.shift, -1), hidden)


class Independent(Exact):
    """One jump draws every token from its exact law given the known ones, but each on its own, by
    Gumbel's trick with noise made from z."""

    def __call__(self, z, *times, known):
        self.known = known
        return self.denoise(z, 0 * times[0]).log() - (-torch.special.ndtr(z).log()).log()


def network(flow_map=False, context=True, E=None):
    """A small network with random weights, or with E given."""
    model = FlowTransformer(ModelConfig(V, 5, n_layer=1, n_head=2, n_embd=4, n_time=8, dropout=0.0,
                                        flow_map=flow_map, context=context)).double().eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 or name == "known":
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    if E is not None:
        model.embed.weight.data.copy_(E)
    return model


def some_known(B, L):
    """Tokens, and which are known: about half, in the first row all and in the last none."""
    known = torch.rand(B, L) < 0.5
    known[0], known[-1] = True, False
    return torch.randint(V, (B, L)), known


def normal(*shape, rng=None):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def counts(tokens, V=V):
    """How often each of the V^L texts occurs, in the order of a table."""
    places = V ** torch.arange(tokens.size(1) - 1, -1, -1)
    return torch.bincount((tokens * places).sum(1), minlength=V ** tokens.size(1)).double()


def chi_square(found, p):
    expected = found.sum() * p.flatten()
    return ((found - expected) ** 2 / expected).sum().item()

# ------------------------------------------------------------------------------ the exact posterior

def test_flow_told_tokens_samples_the_conditional_law():
    """All sets of known tokens of three, 2,000 texts each in 60 steps. The law is read off the
    table. By chance alone the total variation is 0.02, and 0.04 where nothing is known."""
    cases = [((0, 0, 0), (0, 0, 0)), ((1, 2, 2), (1, 0, 0)), ((0, 1, 1), (0, 1, 0)),
             ((2, 0, 0), (1, 0, 1)), ((0, 2, 1), (1, 1, 0)), ((1, 1, 2), (0, 0, 1)),
             ((2, 1, 0), (0, 1, 1)), ((0, 1, 2), (1, 1, 1))]
    y, known = (torch.tensor(column).repeat_interleave(2000, 0) for column in zip(*cases))
    told = Given(Exact(TRIPLES), y, known.bool())
    tokens = flow.sample(told, CLOCK, normal(16_000, 3, V), 60)
    for (given, mask), texts in zip(cases, tokens.split(2000)):
        law = torch.zeros_like(TRIPLES)
        chosen = tuple(x if m else slice(None) for x, m in zip(given, mask))
        law[chosen] = TRIPLES[chosen] / TRIPLES[chosen].sum()
        assert (counts(texts) / 2000 - law.flatten()).abs().sum() / 2 < 0.06, (given, mask)
        assert not any(mask) or (TRIPLES - law).abs().sum() / 2 > 0.5


@pytest.mark.parametrize("flow_map", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_every_sampler_shows_and_keeps_the_known_tokens(flow_map, gamma):
    model, (y, known), seen = network(flow_map), some_known(40, 5), []
    weak, noise = network(flow_map, E=model.embed.weight), lambda: normal(40, 5, 4)
    for net in (model, weak):
        net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    guided = dict(weak=Given(weak, y, known), eta=2.0)
    for steps, options in itertools.product(range(1, 6), ({}, guided, dict(temperature=0.5))):
        tokens = (flowmap if flow_map else flow).sample(Given(model, y, known), CLOCK, noise(),
                                                        steps, gamma, noise, **options)
        assert torch.equal(tokens[known], y[known]) and not torch.equal(tokens, y)
        if flow_map:
            tokens = refine(model, CLOCK, noise, steps, 2, generator(0), y, known)
            assert torch.equal(tokens[known], y[known]) and not torch.equal(tokens, y)
    for z in seen:
        assert torch.equal(z[known], model.embed.weight[y[known]])


def test_two_jumps_told_tokens_are_one():
    """Told one token of a pair, the flow map is that of the other one alone. It is the same in two
    jumps, whatever the first leaves at the known place."""
    y, known = torch.randint(V, (6, 2)), torch.tensor([[True, False], [False, True]] * 3)
    told, z, tau_u = Given(Exact(PAIRS), y, known), normal(6, 2, V), (TAU_S + TAU_T) / 2
    s, u, t = (CLOCK.t_of_tau(tau) for tau in (TAU_S, tau_u, TAU_T))
    delta, alone = told(z, TAU_S, TAU_T).exp(), Exact(PAIRS[0])
    alone.log_p = torch.where(known[:, :1], PAIRS[y[:, 0]], PAIRS.T[y[:, 1]]).log()     # (B, V)
    single = alone(z[~known][:, None], TAU_S, TAU_T, known=known[:, :1] & False).exp()
    assert torch.allclose(delta[~known], single[:, 0], atol=1e-8)
    once = move(z, delta, s, t)
    middle = move(z, told(z, TAU_S, tau_u).exp(), s, u)
    twice = move(middle, told(middle, tau_u, TAU_T).exp(), u, t)
    assert torch.allclose(twice[~known], once[~known], atol=1e-8)
    assert (once - z)[~known].abs().max() > 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_at_the_exact_flow_map_told_tokens_is_zero(objective):
    """All three networks are wrong at the known places, the student otherwise than the others.
    Neither the loss nor the way to the other places may depend on that."""
    y = torch.tensor([[0, 0], [1, 2], [2, 1], [1, 0], [0, 2], [2, 2], [1, 1], [0, 1]])
    known = torch.tensor([[1, 0], [0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [1, 0]]).bool()
    student, other, teacher = (Careless(PAIRS, shift) for shift in (1, 2, 2))
    mean, losses, cut = flowmap.loss(student, other, teacher, CLOCK, objective, y, BOTH_S, BOTH_T,
                                     generator(0), 2, known=known)
    assert losses.abs().max() < 1e-5 and cut.abs().max() < 1e-5
    assert (losses[known] == 0).all() and (cut[known[2:]] == 0).all()
    assert torch.autograd.grad(16 * mean, student.head.bias)[0].abs().max() < 1e-4


@pytest.mark.parametrize("objective", ["lsd", "esd"])
def test_no_derivative_at_known_places(objective):
    """A network that shows its input, torch.compile's wrapper around it taken off: as the start
    moves the state goes along the flow, but not where tokens are known. LSD moves the end alone."""
    class Echo(Exact):
        def __call__(self, z, *times, known, attention="auto"):
            return z + 0 * times[-1][:, None, None]
    class Compiled:
        _orig_mod = Echo(PAIRS)
        head, embed = _orig_mod.head, _orig_mod.embed
    (y, known), z = some_known(6, 2), normal(6, 2, V)
    student, teacher = Given(Compiled(), y, known), Denoiser(Given(Echo(PAIRS), y, known))
    target = OBJECTIVES[objective](student, teacher, CLOCK, z, TAU_S, TAU_T)
    denoised, hidden, tangent = target[1][:3]
    along = (denoised.softmax(-1) - z) * (objective == "esd")
    assert (tangent[known] == 0).all() and torch.allclose(tangent[~known], along[~known])
    assert torch.equal(hidden[known], F.one_hot(y, V).double()[known])

# ------------------------------------------------------------------------------ the losses

def put_back(z, E, y, known):
    """flow.hold, one place at a time."""
    return torch.stack([torch.stack([E[y[b, l]] if known[b, l] else z[b, l]
                                     for l in range(y.size(1))]) for b in range(len(y))])


def state(E, y, tau, known, shown):
    """What a loss makes with generator(0), from noise in V dimensions."""
    t = CLOCK.t_of_tau(tau)[:, None, None]
    x = (1 - t) * normal(*y.shape, V, rng=generator(0)) + t * F.one_hot(shown, V)
    return put_back(x @ E, E, y, known)


def require_sum_over_others(mean, losses, p, q, known, parameters):
    """The loss and its gradients are those of KL(p || q), (B, L, V), summed over unknown places."""
    total = 0
    for b, l, v in itertools.product(*map(range, p.shape)):
        if not known[b, l] and p[b, l, v]:
            total = total + p[b, l, v] * (p[b, l, v] / q[b, l, v]).log()
    assert torch.allclose(losses.sum(), total) and (losses[known] == 0).all()
    gradients = (torch.autograd.grad(x, parameters) for x in (mean, total / known.numel()))
    for ours, plain in zip(*gradients):
        assert torch.allclose(ours, plain) and plain.abs().max() > 1e-6
    assert torch.allclose(mean, total / known.numel())


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_loss_of_the_flow_is_a_sum_over_the_other_tokens(share):
    """And every gradient, that of E through the known tokens too. Those are never replaced."""
    net, (y, known), rng = network(), some_known(6, 4), generator(0)
    normal(6, 4, V, rng=rng)                                        # the noise, drawn before
    shown = flow.replace(y, share, rng)
    assert (shown != y)[known].any() == bool(share)
    q = net.head(net(state(net.embed.weight, y, TAU_S, known, shown), TAU_S, known=known))
    found = flow.loss(net, CLOCK, y, TAU_S, generator(0), share, known)
    require_sum_over_others(*found, F.one_hot(y, V).double(), q.softmax(-1), known,
                            list(net.parameters()))


@pytest.mark.parametrize("own", [False, True])
def test_loss_of_the_flow_map_is_a_sum_over_the_other_tokens(own):
    """Two rows of the diagonal, by the data if there is no teacher, and four jumps by psd."""
    net, n, (y, known) = network(True), 2, some_known(6, 3)
    E, known[1] = net.embed.weight, torch.tensor([True, False, True])
    target_net, teacher = network(True, E=E), network(E=E)
    tau_t = torch.where(torch.arange(6) < n, TAU_S, TAU_T)
    tau_u = (TAU_S + tau_t) / 2
    s, u, t = (CLOCK.t_of_tau(tau)[:, None, None] for tau in (TAU_S, tau_u, tau_t))
    z = state(E, y, TAU_S, known, y)
    with torch.no_grad():
        first = target_net.head(target_net(z, TAU_S, tau_u, known=known)).softmax(-1)
        z_u = put_back(z + (u - s) / (1 - s) * (first @ E - z), E, y, known)
        second = target_net.head(target_net(z_u, tau_u, tau_t, known=known)).softmax(-1)
        g = (1 - t) * (u - s) / ((1 - u) * (t - s))
        D = F.one_hot(y, V) if own else teacher.head(teacher(z, TAU_S, known=known)).softmax(-1)
        p = torch.cat([D[:n], (g * first + (1 - g) * second)[n:]])
    q = net.head(net(z, TAU_S, tau_t, known=known)).softmax(-1)
    mean, losses, _ = flowmap.loss(net, target_net, None if own else teacher, CLOCK, "psd", y,
                                   TAU_S, tau_t, generator(0), n, known=known)
    require_sum_over_others(mean, losses, p, q, known, list(net.parameters()))


def test_halves_of_a_batch_average_to_the_whole():
    """So processes can share a step, with as many known tokens each as it happens."""
    head, hidden, p = network().head, normal(6, 4, 4), normal(6, 4, V).softmax(-1)
    y, known = torch.randint(V, (6, 4)), torch.arange(6)[:, None].expand(6, 4) < 2
    target = lambda i: (lambda p: p, (p[i],))
    for loss in (lambda i: flow.cross_entropy(head, hidden[i], y[i], known[i])[0],
                 lambda i: flowmap.kl_to_target(head, hidden[i], target(i), known[i])[0]):
        whole, first, second = (loss(i) for i in (slice(6), slice(3), slice(3, 6)))
        assert torch.allclose((first + second) / 2, whole) and abs(first - second) > 0.1
        with torch.no_grad():
            assert torch.allclose(loss(slice(6)), whole)

# ------------------------------------------------------------------------------ the network

@pytest.mark.parametrize("flow_map", [False, True])
def test_no_known_tokens_are_no_context_bit_for_bit(flow_map):
    nets, y, z = (network(flow_map), network()), torch.randint(V, (6, 5)), normal(6, 5, 4)
    plain = network(flow_map, context=False), network(context=False)
    for net, same in zip(nets, plain):
        assert same.load_state_dict(net.state_dict(), strict=False).unexpected_keys == ["known"]
    none, times = torch.zeros(6, 5, dtype=torch.bool), [TAU_S, TAU_T][:1 + flow_map]

    def everything(net, teacher, known):
        yield net(z, *times, known=known)
        for objective in OBJECTIVES if flow_map else ():
            yield from flowmap.loss(net, net, teacher, CLOCK, objective, y, *times, generator(0), 0,
                                    known=known)
        if not flow_map:
            yield from flow.loss(net, CLOCK, y, *times, generator(0), known=known)
        told, rng = net if known is None else Given(net, y, known), generator(1)
        noise = lambda: normal(6, 5, 4, rng=rng)
        yield (flowmap if flow_map else flow).sample(told, CLOCK, noise(), 4, 0.7, noise)
    for known in (None, none):
        assert all(map(torch.equal, everything(*nets, known), everything(*plain, None)))
    with pytest.raises(ValueError, match="without context"):
        plain[0](z, *times, known=none)


def test_the_vector_is_zero_at_first_and_marks_the_known_places():
    """At first every block is the identity, so a network is the norm of its input. Settings of
    before have no context, and their weights no vector."""
    config = ModelConfig(V, 5, n_layer=2, n_head=2, n_embd=4, n_time=8, context=True)
    net, z, tau, (_, known) = FlowTransformer(config), torch.randn(6, 5, 4), TAU_S, some_known(6, 5)
    assert (net.known == 0).all() and torch.equal(net(z, tau, known=known), net(z, tau))
    torch.nn.init.normal_(net.known)
    x = z + net.positions + known[..., None] * net.known
    assert torch.allclose(net(z, tau, known=known), F.layer_norm(x, (4,)), atol=1e-6)
    before = {name: x for name, x in dataclasses.asdict(config).items() if name != "context"}
    weights = {name: x for name, x in net.state_dict().items() if name != "known"}
    FlowTransformer(ModelConfig(**before)).load_state_dict(weights)


def test_drawn_tokens_to_tell():
    """Given f ~ U(0, 1) each token is known with chance f: n given ones of L have the probability
    n! (L - n)! / (L + 1)!, so every number n is as likely. In long rows f itself shows."""
    L, share = 3, 0.6
    draw = lambda seed: draw_known((20_000, L), share, generator(seed))
    known, sets = draw(0), list(itertools.product((0, 1), repeat=L))
    assert known.shape == (20_000, L) and known.dtype == torch.bool
    assert torch.equal(known, draw(0)) and not torch.equal(known, draw(1))
    p = torch.tensor([share * math.factorial(sum(x)) * math.factorial(L - sum(x))
                      / math.factorial(L + 1) for x in sets], dtype=torch.float64)
    p[0] += 1 - share
    assert chi_square(counts(known.long(), 2), p) < CRITICAL[7]
    f = draw_known((64, 10_000), 0.5, generator(2)).double().mean(1)
    rising, low, error = f.sort().values, torch.arange(32) / 32, 5 * 0.5 / 10_000 ** 0.5
    assert (rising[:32] == 0).all() and 8 < (f[:32] > 0).sum() < 24  # which rows is by chance
    inside = (low - error < rising[32:]) & (rising[32:] < low + 1 / 32 + error)
    assert inside.all()                                             # one in each 32nd of [0, 1]

# ------------------------------------------------------------------------------ refinement

def test_refinement_commits_the_surest_tokens_in_equal_parts():
    """Of five tokens in three rounds 2, 2, 1; of three 1, 1, 1; of two 1, 1, 0; of one 1, 0, 0."""
    model, seen, calls = network(True), [], []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[1][0].item()))
    (y, _), known = some_known(40, 5), torch.arange(5) < torch.tensor([0, 2, 3, 4, 5] * 8)[:, None]
    found = refine(model, CLOCK, lambda: normal(40, 5, 4), 3, 2, None, y, known,
                   lambda told, hidden: seen.append((told.known, told.y, model.head(hidden))))
    assert calls == [0, 0.5] * 3                                    # rounds times jumps
    states = seen[::2] + [(torch.ones_like(known), found, None)]
    assert torch.equal(states[0][0], known) and torch.equal(states[0][1], y)
    parts = [[2, 1, 1, 1, 0], [2, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    for (old, old_y, _), (_, _, logits), (new, new_y, _), part in zip(states, seen[1::2],
                                                                      states[1:], parts):
        committed, (p, tokens) = new & ~old, logits.softmax(-1).max(-1)
        assert committed.sum(1).tolist() == part * 8 and new[old].all()
        assert torch.equal(new_y[old], old_y[old])
        assert torch.equal(new_y[committed], tokens[committed])
        least = p.masked_fill(~committed, 1).amin(1, keepdim=True)
        assert (p <= least)[~new].all()


def test_refinement_in_random_order_has_the_exact_law():
    """By the exact flow map, and with one token a round by the exact law of each token alone. In
    fewer rounds their independence within a draft shows. In the order of sureness what is committed
    depends on what was drafted."""
    def run(model, L, n, rounds, order=None):
        seen, rng = [], generator(1)
        tokens = refine(model, CLOCK, lambda: normal(n, L, V, rng=rng), rounds, order=order,
                        watch=lambda told, _: seen.append(told.known))
        return tokens, counts(seen[1].nonzero()[:, 1:])             # places of the first round
    found, _ = run(Exact(PAIRS), 2, 800, 2, generator(0))
    assert chi_square(counts(found), PAIRS) < CRITICAL[8]
    case = Independent(TRIPLES), 3, 20_000
    found, places = run(*case, 3, generator(0))
    assert chi_square(counts(found), TRIPLES) < CRITICAL[26]
    assert chi_square(places, torch.ones(3) / 3) < CRITICAL[2]
    assert torch.equal(found, run(*case, 3, generator(0))[0])
    for other in (run(*case, 2, generator(0)), run(*case, 3)):
        assert chi_square(counts(other[0]), TRIPLES) > 200

# ------------------------------------------------------------------------------ autoguidance

@pytest.mark.parametrize("flow_map", [False, True])
@pytest.mark.parametrize("eta", [-0.5, 0.0, 0.4, 1.0, 3.0])
def test_guided_moves_by_hand(flow_map, eta):
    """Two moves, both networks at the same states, and the last tokens, which are not sharpened.
    Guidance of 1 is none, and that of 0 is the weak network alone, bit for bit."""
    net, z, seen = network(flow_map), normal(200, 5, 4), []
    weak = network(flow_map, E=net.embed.weight)
    E, start = net.embed.weight, z
    for x in (net, weak):
        x.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run = lambda net, **extra: (flowmap if flow_map else flow).sample(
        net, CLOCK, start, 3, temperature=0.7, **extra)
    tokens = run(net, weak=weak, eta=eta)
    states = list(seen)
    times = torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64)
    with torch.no_grad():
        for i, (s, t) in enumerate(itertools.pairwise(CLOCK.t_of_tau(times).tolist())):
            assert torch.equal(*states[2 * i:2 * i + 2]) and torch.allclose(states[2 * i], z)
            at = [tau.expand(200) for tau in times[i:i + 1 + flow_map]]
            logits, weak_logits = net.head(net(z, *at)), weak.head(weak(z, *at))
            D, D_weak = (x.softmax(-1) for x in (logits / 0.7, weak_logits / 0.7))
            h = (t - s) / (1 - s)
            z = (1 - h) * z + h * (D_weak @ E + eta * (D - D_weak) @ E)
    D, D_weak = logits.softmax(-1), weak_logits.softmax(-1)
    assert len(states) == 6 and torch.equal(tokens, (D_weak + eta * (D - D_weak)).argmax(-1))
    for unguided, same in ((net, eta == 1), (weak, eta == 0)):
        assert torch.equal(tokens, run(unguided)) == same


def test_guidance_of_one_is_none_in_bfloat16():
    """Where the largest of many logits are often equal."""
    def model(hidden, tau):
        return hidden
    model.embed = torch.nn.Embedding(2000, 64)
    model.head = Head(ModelConfig(2000, 20, n_head=4, n_embd=64))
    z = torch.randn(40, 20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        plain, guided = (flow.sample(model, CLOCK, z, 1, **extra)
                         for extra in ({}, dict(weak=model, eta=1.0)))
        ties = model.head(z).argmax(-1) != plain
    assert torch.equal(plain, guided) and ties.any()
