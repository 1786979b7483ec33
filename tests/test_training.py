"""python -m pytest tests/test_training.py

What the programs hand to the mathematics, and what they log of it: that settings arrive where they belong, and validation is of
what it says. The equations themselves are tested elsewhere.
"""

import copy
import math

import numpy as np
import pytest
import torch
from programs import TINY, inside, log, quick_run

import common
import flowmap
import storage
import training
from baselines import mdlm
from data.loader import Data
from flow import Clock, flow_loss, latent_noise, noise_factor, stratified


# ---------------------------------------------------------------- a step

@pytest.mark.parametrize("script, kind", [("train.py", "flm"), ("distill.py", "fmlm")])
def test_settings_reach_the_optimizers(toy, script, kind, tmp_path):
    """Six steps: two of warm-up, then a cosine, whose values are written out here."""
    shape = TINY if script == "train.py" else ["--batch_size=8", f"--teacher={toy[0] / 'out' / 'flm.pt'}"]
    quick_run(script, *toy[1], *shape, f"--out_dir={tmp_path}", "--optimizer=muon", "--learning_rate=0.04", "--min_lr=0.01",
              "--warmup_iters=2", "--weight_decay=0.25", "--beta1=0.8", "--beta2=0.7")
    rates = [0.02, 0.04] + [0.01 + 0.03 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [r["lr"] for r in log(tmp_path / f"{kind}.jsonl") if "lr" in r] == pytest.approx(rates)
    groups = [group for state in torch.load(tmp_path / f"{kind}.pt")["optimizers"] for group in state["param_groups"]]
    assert len(groups) == 2 and all((group["lr"], group["weight_decay"]) == (0.01, 0.25) for group in groups)
    assert tuple(groups[0]["betas"]) == (0.8, 0.7)


def test_the_cosine_is_one():
    found = [training.learning_rate_at(step, 1.0, 0.2, "cosine", 4, 16) for step in (3, 4, 7, 8, 10, 12, 16, 20)]
    assert found == pytest.approx([1, 1] + [0.2 + 0.4 * (1 + math.cos(math.pi * k)) for k in (1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 1)])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("clip", [0.0, 2.0, 100.0])
def test_a_step_is_clipped_in_the_units_of_the_gradient(dtype, clip):
    """By plain gradient descent, since AdamW does not mind the scale. In float16 the loss is scaled; the norm is not."""
    machine, net, gradient = common.Machine("cpu", dtype), torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
    before, descent = net.weight.detach().clone(), torch.optim.SGD(net.parameters(), lr=1.0)
    machine.scaler.scale((net.weight * gradient).sum()).backward()
    assert training.optimizer_step(net, [descent], machine, clip).item() == pytest.approx(5)
    assert torch.allclose(before - net.weight, gradient * (min(1, clip / 5) if clip else 1), atol=1e-5)


# ---------------------------------------------------------------- train.py

@pytest.mark.parametrize("processes", [1, 2])
def test_validation_is_of_the_average_on_held_out_text(toy, processes, tmp_path):
    """Computed here from the checkpoint, with dropout off; and the first loss is that of a uniform guess."""
    quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--n_embd=8", "--dropout=0.5", "--learning_rate=0.05",
              "--warmup_iters=0", "--ema_decay=0.5", "--eval_iters=4", "--gradient_accumulation_steps=2", processes=processes)
    ema = storage.build_model(storage.load_checkpoint(tmp_path / "flm.pt"), torch.device("cpu"))
    E, tau = ema.embed.weight, stratified(32, common.generator(1, common.VAL_TIMES)).float()
    z0 = latent_noise(E, noise_factor(E), common.sample_normals(common.mix(1, common.VAL_NOISE), range(32), 8, E.device))
    y = torch.from_numpy(Data(str(toy[0] / "data"), "val", 8, 1).rows(0, 32))
    with torch.no_grad():
        losses = flow_loss(ema, Clock(16), y, tau, z0)[1].mean(1)
    records = log(tmp_path / "flm.jsonl")
    assert records[-1]["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    by_tau = [losses[(tau * 10).long() == i].mean().item() for i in range(10)]
    assert records[-1]["val_loss_by_tau"] == pytest.approx(by_tau, rel=1e-4)
    assert records[1]["loss"] == pytest.approx(math.log(16), abs=1e-3)


def test_every_program_uses_the_clock_of_the_run(toy, tmp_path, monkeypatch):
    shares, real = [], storage.Clock
    monkeypatch.setattr(storage, "Clock", lambda V, d, share, device: shares.append(share) or real(V, d, share, device))
    words = [*toy[1], f"--out_dir={tmp_path}", "--max_iters=1"]
    inside(monkeypatch, "train.py", *words, *TINY, "--n_embd=8", "--clock_embedding_share=0.7")
    inside(monkeypatch, "distill.py", *words, "--batch_size=8")
    inside(monkeypatch, "sample.py", f"--out_dir={tmp_path}", "--device=cpu")
    inside(monkeypatch, "evaluate.py", f"--source={tmp_path / 'flm.pt'}", f"--dataset={toy[0] / 'data'}", "--scorer=",
           "--num_samples=4", "--bound", "--device=cpu")
    assert shares == [0.7] * 5                                                  # the last twice: texts and likelihood


# ---------------------------------------------------------------- distill.py

@pytest.mark.parametrize("words, expected", [
    ([], (True, False, 0.5)), (["--target_ema=1"], (False, False, 0.5)), (["--self_distill=1"], (True, True, 0.5)),
    (["--split=0.2"], (True, False, 0.2))])
def test_distillation_is_given_what_was_asked_for(toy, words, expected, tmp_path, monkeypatch):
    """Whether the targets are the student's, whether there is a teacher, where jumps meet; every row and every noise once;
    dropout in training only."""
    real, calls, texts, samples, normals = flowmap.distillation_loss, [], [], [], common.sample_normals

    def loss(student, target, teacher, clock, objective, y, *rest):
        assert student.training == torch.is_grad_enabled()
        if student.training:
            calls.append((target is student, teacher is None, rest[-1]))
            texts.append(y)
            assert student.blocks[0].dropout == 0.25
        return real(student, target, teacher, clock, objective, y, *rest)

    def spied(seed, numbers, *rest):
        samples.extend(numbers if seed == common.mix(1, common.NOISE) else [])
        return normals(seed, numbers, *rest)
    monkeypatch.setattr(flowmap, "distillation_loss", loss)
    monkeypatch.setattr(common, "sample_normals", spied)
    inside(monkeypatch, "distill.py", *toy[1], "--batch_size=8", "--dropout=0.25", f"--teacher={toy[0] / 'out' / 'flm.pt'}",
           f"--out_dir={tmp_path}", *words)
    assert calls == [expected] * 6 and samples == list(range(48))
    assert np.array_equal(torch.cat(texts), Data(str(toy[0] / "data"), "train", 8, 1).rows(0, 48))


def test_validation_is_by_length_of_the_jump(toy, tmp_path, monkeypatch):
    real, seen = flowmap.distillation_loss, []

    def loss(*inputs):
        found = real(*inputs)
        if not torch.is_grad_enabled():
            seen.extend(zip((inputs[7] - inputs[6]).tolist(), found[1].mean(1).tolist()))
        return found
    monkeypatch.setattr(flowmap, "distillation_loss", loss)
    inside(monkeypatch, "distill.py", *toy[1], "--batch_size=8", f"--teacher={toy[0] / 'out' / 'flm.pt'}",
           f"--out_dir={tmp_path}", "--max_iters=1", "--eval_iters=4", "--learning_rate=0.05", "--warmup_iters=0")
    lengths, losses = np.array(seen[len(seen) // 2:]).T                         # of the second validation, after the step
    record, diagonal = log(tmp_path / "fmlm.jsonl")[-1], np.arange(len(lengths)) % 8 < 4
    assert (lengths[diagonal] == 0).all() and record["val_diagonal"] == pytest.approx(losses[diagonal].mean(), rel=1e-5, abs=1e-9)
    for i, found in enumerate(record["val_loss_by_length"]):
        there = ~diagonal & (np.minimum(lengths * 10, 9).astype(int) == i)
        assert (found is None) == (not there.any())
        assert found is None or found == pytest.approx(losses[there].mean(), rel=1e-4, abs=1e-9)


def test_the_flow_map_that_is_sampled_is_the_average(toy, tmp_path):
    words = ["distill.py", *toy[1], "--batch_size=8", f"--teacher={toy[0] / 'out' / 'flm.pt'}"]
    for decay, alike in (("0", True), ("0.5", False)):
        quick_run(*words, f"--out_dir={tmp_path / decay}", f"--ema_decay={decay}", "--learning_rate=0.05", "--warmup_iters=0")
        checkpoint = torch.load(tmp_path / decay / "fmlm.pt")
        assert all(torch.equal(checkpoint["ema"][name], p) for name, p in checkpoint["model"].items()) == alike


# ---------------------------------------------------------------- baselines/distill.py

def test_rounds_of_discrete_distillation(toy, tmp_path, monkeypatch):
    """The first teacher is the moving average of the diffusion model, the next that of the student after a round, whose steps are
    twice as long."""
    quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--method=mdlm", "--learning_rate=0.05", "--warmup_iters=0")
    real, calls, saved, save = mdlm.distillation_loss, [], [], storage.save_checkpoint

    def loss(student, teacher, clock, y, tau, step, random):
        calls.append((step, teacher.head.weight.clone()))
        return real(student, teacher, clock, y, tau, step, random)
    monkeypatch.setattr(mdlm, "distillation_loss", loss)
    monkeypatch.setattr(storage, "save_checkpoint", lambda path, c: saved.append(copy.deepcopy(c)) or save(path, c))
    inside(monkeypatch, "baselines/distill.py", f"--dataset={toy[0] / 'data'}", f"--out_dir={tmp_path}", "--rounds=2",
           "--max_iters=4", "--batch_size=8", "--first_step=0.125", "--learning_rate=0.05", "--warmup_iters=0", "--device=cpu",
           "--dtype=float32")
    teachers = [torch.load(tmp_path / "mdlm.pt")["ema"]["head.weight"], saved[0]["ema"]["head.weight"]]
    assert [step for step, _ in calls] == [0.125, 0.125, 0.25, 0.25]
    assert all(torch.equal(weight, teachers[i // 2]) for i, (_, weight) in enumerate(calls))
    assert not torch.equal(*teachers) and not torch.equal(saved[1]["ema"]["head.weight"], saved[1]["model"]["head.weight"])
