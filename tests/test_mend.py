"""python -m pytest tests/test_mend.py

Mending, the last stage of distillation: the loss in loops, what the exact flow makes of wrong
drafts, and the way from a flow map to a mended one through the programs."""

import math
import os
import time

import pytest
import torch
from programs import log, quick_run
from test_context import Exact, Independent, network, some_known
from test_flowmap import CLOCK, V

import flow
import flowmap
from lib import checkpoint as ckpt
from lib.machine import SAMPLE_NOISE, generator
from lib.mend import LATER, ROUNDS, mending_loss, noise_of_rounds, shared_noise


EVEN = torch.full((V,), 1 / V, dtype=torch.float64)


@pytest.mark.parametrize("told, by_map", [(False, False), (True, False), (True, True)])
def test_loss_in_loops(told, by_map):
    """Row by row: a draft from noise, biased; for jumps of a part of the way it is mixed with fresh
    noise; then it is mended. Known tokens are put back before every jump, and are not learned. Only
    the student has a gradient."""
    B, L = 8, 5
    teacher = network(by_map, told)
    E = teacher.embed.weight.detach()
    student, draft_net = (network(True, told, E) for _ in range(2))
    y, known = some_known(B, L)
    tau = torch.tensor([0.5, 0, 0.3, 0.9, 0, 0.6, 0.2, 0], dtype=torch.float64)
    before = torch.linspace(0, 3, V, dtype=torch.float64)
    bias = before.clone()
    mean, losses, cut = mending_loss(student, draft_net, teacher, CLOCK, y, tau, generator(3),
                                     EVEN, bias, known=known if told else None, by_map=by_map)
    rng = generator(3)
    z0, again = (0.5 * flow.latent_noise(E, (B, 1), rng).expand(B, L, -1) for _ in range(2))
    counts = [0] * V

    def jump(net, z, b, *times):
        extra = dict(known=known[b:b + 1]) if told else {}
        if told:
            z = torch.where(known[b, :, None], E[y[b]], z)
        times = (torch.tensor([tau], dtype=torch.float64) for tau in times)
        return net.head(net(z[None], *times, **extra))[0]
    for b in range(B):
        t, z = CLOCK.t_of_tau(tau[b]).item(), z0[b]
        x = (jump(draft_net, z, b, 0, 1) + before).argmax(-1)
        for token in x.tolist() if not told or not known[b].any() else ():
            counts[token] += 1
        z = (1 - t) * again[b] + t * E[x] if t else z
        later = tau[b] + (1 - tau[b]) * LATER
        h = (CLOCK.t_of_tau(later).item() - t) / (1 - t)
        for _ in range(ROUNDS):
            x = jump(teacher, (1 - h) * z + h * E[x], b, later, *[1] * by_map).argmax(-1)
        log_p = jump(student, z, b, tau[b], 1).log_softmax(-1)
        for place in range(L):
            expected = 0 if told and known[b, place] else -log_p[place, x[place]].item()
            assert losses[b, place].item() == pytest.approx(expected, abs=1e-6)
    for token in range(V):
        share = counts[token] / sum(counts)
        step = 0.1 * (1 / V - share) * V
        assert bias[token].item() == pytest.approx(before[token].item() + step)
    assert mean.item() == pytest.approx(losses.mean().item()) and not cut.any()
    mean.backward()
    assert student.head.weight.grad.abs().max() > 0
    assert all(p.grad is None for net in (draft_net, teacher) for p in net.parameters())


def test_the_bias_makes_drafts_tell_every_token():
    """A network that all but always writes one token: biased, its drafts have all, as often as
    asked. Where every text is told something, the bias stays."""
    torch.manual_seed(0)
    net, teacher = network(True), network(False)
    net.head.bias.data = torch.tensor([3.0, 0, -1], dtype=torch.float64)
    wanted, bias = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), EVEN * 0
    y, tau, known = torch.zeros(64, 5, dtype=torch.long), torch.zeros(64), torch.zeros(64, 5) > 0
    shares = []
    for i in range(300):
        z = shared_noise(net.embed.weight.detach(), (64, 5), generator(i))
        start = torch.zeros(64, dtype=torch.float64)
        x = (net.head(net(z, start, start + 1)) + bias).argmax(-1)
        shares.append(torch.bincount(x.flatten(), minlength=V) / x.numel())
        mending_loss(net, net, teacher, CLOCK, y, start, generator(i), wanted, bias, known=known)
    assert shares[0][0] > 0.8
    assert torch.allclose(torch.stack(shares[-200:]).mean(0), wanted.float(), atol=0.05)
    told = bias.clone()
    mending_loss(net, net, teacher, CLOCK, y, tau.double(), generator(0), wanted, bias,
                 known=known | (torch.arange(5) == 0))
    assert torch.equal(told, bias)


def test_the_exact_flow_mends_every_draft():
    """Texts of two equal tokens. Every draft is wrong, and none is after mending. All three texts
    remain."""
    class Student:
        """Its loss of a token tells which it is: logits 0, 1, 2 for every place."""
        head = torch.nn.Identity()

        def __call__(self, z, *times, known):
            return torch.arange(3, dtype=z.dtype).expand(z.shape).clone().requires_grad_()

    class Careless(Independent):
        """Draws the second token as the first, but one further: every draft is wrong."""

        def __call__(self, z, *times, known=None):
            z = torch.stack([z[:, 0], z[:, 1].roll(1, -1)], dim=1)
            known = torch.zeros(z.shape[:2], dtype=torch.bool) if known is None else known
            return super().__call__(z, *times, known=known)
    law = Exact(torch.eye(V, dtype=torch.float64) / V + 1e-12)
    careless = Careless(law.log_p.exp().view(V, V))
    student, B = Student(), 300
    student.head.out_features, student.embed = V, law.embed
    known, start = torch.zeros(B, 2, dtype=torch.bool), torch.zeros(B, dtype=torch.float64)
    z0 = shared_noise(law.embed.weight, (B, 2), generator(5))
    drafts = careless(z0, start).argmax(-1)
    assert torch.equal((drafts[:, 0] + 1) % V, drafts[:, 1])
    _, losses, _ = mending_loss(student, careless, law, CLOCK, torch.zeros_like(drafts), start,
                                generator(5), EVEN, 0 * EVEN, known=known)
    tokens = (math.log(1 + math.e + math.e ** 2) - losses).round().long()
    assert (tokens[:, 0] == tokens[:, 1]).double().mean() > 0.99
    assert torch.bincount(tokens[:, 0], minlength=V).min() > B / 6


MEND = ["--mend=true", "--diagonal_share=0", "--target_ema", "--batch_size=8",
        "--learning_rate=0.01", "--schedule=constant"]


def test_a_mended_map_from_the_flow_map_to_its_texts(toy, tmp_path, capsys):
    """It starts as the flow map, continues exactly, and is sampled from shared noise."""
    flow_path, map_path = (toy[0] / "out" / f"{kind}.pt" for kind in ("flm", "fmlm"))
    run = lambda folder, *more, **options: quick_run(
        "distill.py", *toy[1], *MEND, f"--out_dir={folder}", f"--teacher_path={flow_path}",
        f"--start_from={map_path}", *more, **options)
    (tmp_path / "still").mkdir()                                    # by default the map mends
    (tmp_path / "still" / "fmlm.pt").write_bytes(map_path.read_bytes())
    run(tmp_path / "still", "--teacher_path=", "--start_from=", "--max_iters=1",
        "--learning_rate=1e-30", "--min_lr=0")
    first, start = torch.load(tmp_path / "still" / "mended.pt"), torch.load(map_path)
    assert first["kind"] == "fmlm" and first["mended"]
    assert all(torch.equal(start["ema"][name], p) for name, p in first["model"].items())
    run(tmp_path / "whole")
    run(tmp_path / "parts", "--max_iters=3")
    run(tmp_path / "parts", "--init_from=resume")
    whole, parts = (torch.load(tmp_path / name / "mended.pt") for name in ("whole", "parts"))
    for kind in ("model", "ema"):
        assert all(torch.equal(whole[kind][name], p) for name, p in parts[kind].items())
    assert not torch.equal(whole["ema"]["head.weight"], start["ema"]["head.weight"])
    run(tmp_path / "again", f"--start_from={tmp_path}/whole/mended.pt", "--max_iters=1",
        "--learning_rate=1e-30", "--min_lr=0")                      # a mended map can be mended
    again = torch.load(tmp_path / "again" / "mended.pt")["model"]
    assert all(torch.equal(whole["ema"][name], p) for name, p in again.items())
    assert run(tmp_path / "again", f"--teacher_path={tmp_path}/whole/mended.pt", status=1) == (
        f"error: {tmp_path}/whole/mended.pt is mended already; give the map before, or its flow, "
        f"as --teacher_path")
    other, another = torch.load(flow_path), tmp_path / "another.pt"
    for name, path, more in (("head.bias", "whole/mended.pt", ["--init_from=resume"]),
                             ("embed.weight", "before.pt", [f"--start_from={tmp_path}/before.pt"])):
        other["ema"][name] += 1
        torch.save(other, another)
        (tmp_path / "before.pt").write_bytes(map_path.read_bytes())
        assert run(tmp_path / "whole", f"--teacher_path={another}", *more, status=1) == (
            f"error: {tmp_path}/{path} was distilled from another network than {another}; give "
            f"that as --teacher_path, or distil anew with --init_from=scratch")
    lengths = log(tmp_path / "whole" / "mended.jsonl")[0]["val_loss_by_length"]
    assert lengths[-1] is not None

    (tmp_path / "whole" / "fmlm.pt").write_bytes(map_path.read_bytes())
    path, before = (tmp_path / "whole" / name for name in ("mended.pt", "fmlm.pt"))
    for age, says in ((10, True), (-10, False)):                    # seconds before fmlm.pt
        os.utime(path, (time.time() - age,) * 2)
        os.utime(before, (time.time(),) * 2)
        assert ckpt.find_network(str(tmp_path / "whole"), "", "auto", False, 0)[0] == path
        assert (f"{path} is older than {before}" in capsys.readouterr().err) == says
    quick_run("sample.py", f"--out_dir={tmp_path / 'whole'}", "--num_samples=8", "--steps=2",
              f"--out={tmp_path / 'texts.jsonl'}", "--dtype=float32", "--device=cpu")
    net = ckpt.build_model(ckpt.load_checkpoint(tmp_path / "whole" / "mended.pt"),
                           torch.device("cpu"))
    E = net.embed.weight.detach()
    with torch.no_grad():
        texts, others = (flowmap.sample(net, flow.Clock(*E.shape), draw(
            E, (8, net.config.block_size), generator(1, SAMPLE_NOISE, 0), flow.noise_factor(E)),
            2).tolist() for draw in (shared_noise, flow.latent_noise))
    assert [record["tokens"] for record in log(tmp_path / "texts.jsonl")] == texts != others


def test_rounds_of_refinement_have_one_noise_only_with_a_mended_map():
    numbers = iter(range(9))
    once, fresh = (noise_of_rounds(checkpoint, lambda: next(numbers))
                   for checkpoint in (dict(mended=True), {}))
    assert [once(), fresh(), once(), fresh(), once()] == [0, 1, 0, 2, 0]
