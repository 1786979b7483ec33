"""python -m pytest tests/test_training.py

What the programs hand to the mathematics, and what they log of it: that settings arrive where they
belong, and validation is of what it says. The equations themselves are tested elsewhere.
"""

import copy
import math

import numpy as np
import pytest
import torch
from programs import TINY, inside, log, quick_run

import flow
import flowmap
from baselines import mdlm
from data.loader import Data
from lib import checkpoint as ckpt
from lib import machine as lib

KINDS = {"train.py": "flm", "distill.py": "fmlm"}


def command(toy, script, folder, *options):
    """One of the two programs, on the toy set or from the toy flow."""
    own = TINY if script == "train.py" else ["--batch_size=8",
                                             f"--teacher_path={toy[0] / 'out' / 'flm.pt'}"]
    return [script, *toy[1], *own, f"--out_dir={folder}", *options]

# ---------------------------------------------------------------- a step

@pytest.mark.parametrize("script", KINDS)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_settings_reach_the_optimizers(toy, script, schedule, tmp_path):
    """Six steps: two of warm-up, then a schedule, whose values are written out here."""
    quick_run(*command(toy, script, tmp_path, "--optimizer=muon", f"--schedule={schedule}",
                       "--learning_rate=0.04", "--min_lr=0.01", "--warmup_iters=2",
                       "--weight_decay=0.25", "--beta1=0.8", "--beta2=0.7"))
    cosine = [0.01 + 0.03 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    rates = [0.02, 0.04] + (cosine[:4] if schedule == "cosine" else [0.04] * 4)
    records = log(tmp_path / f"{KINDS[script]}.jsonl")
    assert [r["lr"] for r in records if "lr" in r] == pytest.approx(rates)
    states = torch.load(tmp_path / f"{KINDS[script]}.pt")["optimizers"]
    groups = [group for state in states for group in state["param_groups"]]
    assert len(groups) == 2 and tuple(groups[0]["betas"]) == (0.8, 0.7)
    last = 0.01 if schedule == "cosine" else 0.04               # set at the end of step 6
    assert all((g["lr"], g["weight_decay"]) == (pytest.approx(last), 0.25) for g in groups)


def test_a_run_starts_with_the_averages_of_another(toy, tmp_path):
    """A step too small to be seen leaves them; the vector that marks known tokens is new."""
    quick_run(*command(toy, "train.py", tmp_path, f"--start_from={toy[0] / 'out' / 'flm.pt'}",
                       "--context_share=0.5", "--max_iters=1", "--learning_rate=1e-30",
                       "--min_lr=0"))
    start, end = (torch.load(file) for file in (toy[0] / "out" / "flm.pt", tmp_path / "flm.pt"))
    assert end["step"] == 1 and end["model"].pop("known").abs().max() < 1e-20
    assert start["ema"].keys() == end["model"].keys()
    assert all(torch.equal(start["ema"][name], p) for name, p in end["model"].items())
    assert not all(torch.equal(start["model"][name], p) for name, p in end["model"].items())
    assert quick_run(*command(toy, "train.py", tmp_path / "again",
                              f"--start_from={tmp_path / 'flm.pt'}"), status=1) == (
        f"error: {tmp_path}/flm.pt was made with context=True, not False; start with that; set "
        f"context_share above 0")


def test_embed_lr_scale_scales_the_steps_of_e_alone(toy, tmp_path):
    """Two steps: in the first the head is zero, and E has no gradient. Both have one rate."""
    def weights(scale):
        quick_run(*command(toy, "train.py", tmp_path / scale, f"--embed_lr_scale={scale}",
                           "--max_iters=2", "--warmup_iters=0", "--schedule=constant"))
        model = torch.load(tmp_path / scale / "flm.pt")["model"]
        return model.pop("embed.weight"), model
    (start, others), (half, same), (whole, _) = map(weights, ("0", "0.5", "1"))
    assert all(torch.equal(others[name], same[name]) for name in others)
    assert 1e-4 < (half - start).abs().max()
    assert torch.allclose(whole - start, 2 * (half - start), atol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 5e-3)])
@pytest.mark.parametrize("script", KINDS)
def test_a_step_is_clipped_in_the_units_of_the_gradient(toy, script, dtype, tolerance, tmp_path):
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient; the log has its
    norm before. In float16 the loss is scaled by 65,536; neither of them is."""
    # A sharper teacher: the student starts as its copy, and would have nothing to learn.
    softer = ["--teacher_temperature=0.02"] if script == "distill.py" else []

    def step(clip):
        quick_run(*command(toy, script, tmp_path / clip, f"--dtype={dtype}", f"--grad_clip={clip}",
                           "--max_iters=1", "--beta1=0.5", "--eval_iters=1", *softer))
        path = tmp_path / clip / f"{KINDS[script]}.pt"
        state = torch.load(path)["optimizers"][0]["state"]
        moments = torch.cat([moments["exp_avg"].flatten() for moments in state.values()])
        return moments / 0.5, log(path.with_suffix(".jsonl"))[1]["grad_norm"]
    gradient, norm = step("0")
    assert norm == pytest.approx(gradient.norm().item(), rel=tolerance) and 1e-3 < norm < 10
    for clip, factor in ((f"{norm / 4:.9f}", 0.25), ("100", 1)):
        clipped, before = step(clip)
        assert before == pytest.approx(norm, rel=1e-6)
        assert (clipped - factor * gradient).norm() < 1e-3 * factor * gradient.norm()


@pytest.mark.parametrize("script", KINDS)
def test_the_average_is_of_the_weights_that_are_saved(toy, script, tmp_path):
    """It forgets its start: the decay rises to ema_decay, and is (1 + 6) / (10 + 6) after step
    6."""
    path = tmp_path / f"{KINDS[script]}.pt"
    path.write_bytes((toy[0] / "out" / path.name).read_bytes())
    quick_run(*command(toy, script, tmp_path, "--init_from=resume", "--max_iters=7",
                       "--learning_rate=0.05"))
    before, after = torch.load(toy[0] / "out" / path.name)["ema"], torch.load(path)
    for name, weight in after["model"].items():
        expected = 7 / 16 * before[name] + 9 / 16 * weight
        assert torch.allclose(after["ema"][name], expected, atol=1e-6), name

# ---------------------------------------------------------------- train.py

@pytest.mark.parametrize("processes", [1, 2])
def test_validation_is_of_the_average_on_held_out_text(toy, processes, tmp_path):
    """Computed here from the checkpoint, with dropout off; and the first loss is that of a uniform
    guess."""
    quick_run(*command(toy, "train.py", tmp_path, "--n_embd=8", "--dropout=0.5",
                       "--learning_rate=0.05", "--warmup_iters=0", "--ema_decay=0.5",
                       "--eval_iters=4", "--gradient_accumulation_steps=2"), processes=processes)
    ema = ckpt.build_model(ckpt.load_checkpoint(tmp_path / "flm.pt"), torch.device("cpu"))
    tau = flow.stratified(32, lib.generator(1, lib.VAL_TIMES)).float()
    y = torch.from_numpy(Data(str(toy[0] / "data"), "val", 8, 1).rows(0, 32))
    with torch.no_grad():
        losses = torch.cat([
            flow.loss(ema, flow.Clock(16), y[8 * i:8 * i + 8], tau[8 * i:8 * i + 8],
                      lib.generator(1, lib.VAL_NOISE, i))[1].mean(1) for i in range(4)])
    records = log(tmp_path / "flm.jsonl")
    assert records[-1]["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    by_tau = [losses[(tau * 10).long() == i].mean().item() for i in range(10)]
    assert records[-1]["val_loss_by_tau"] == pytest.approx(by_tau, rel=1e-4)
    assert records[1]["loss"] == pytest.approx(math.log(16), abs=1e-3)


def test_every_program_uses_the_clock_of_the_run(toy, tmp_path, monkeypatch):
    shares = []

    class Spied(flow.Clock):
        def __init__(self, V, d, share, device):
            shares.append(share)
            super().__init__(V, d, share, device)
    monkeypatch.setattr(flow, "Clock", Spied)
    inside(monkeypatch, *command(toy, "train.py", tmp_path, "--max_iters=1", "--n_embd=8",
                                 "--clock_embedding_share=0.7"))
    inside(monkeypatch, *command(toy, "distill.py", tmp_path, "--max_iters=1",
                                 f"--teacher_path={tmp_path / 'flm.pt'}"))
    inside(monkeypatch, "sample.py", f"--out_dir={tmp_path}", "--device=cpu")
    inside(monkeypatch, "eval/evaluate.py", f"--source={tmp_path / 'flm.pt'}", "--scorer=",
           f"--dataset={toy[0] / 'data'}", "--num_samples=4", "--bound", "--device=cpu")
    assert shares == [0.7] * 5                          # the last twice: texts and likelihood

# ---------------------------------------------------------------- distill.py

@pytest.mark.parametrize("words, expected", [
    ([], (True, False, 0.5)), (["--target_ema=1"], (False, False, 0.5)),
    (["--self_distill=1"], (True, True, 0.5)), (["--split=0.2"], (True, False, 0.2))])
def test_distillation_is_given_what_was_asked_for(toy, words, expected, tmp_path, monkeypatch):
    """Whether the targets are the student's, whether there is a teacher, where jumps meet; every
    row once and a noise of its own for each step; dropout in training only."""
    real, calls, texts, seeds = flowmap.loss, [], [], []

    def loss(student, target_net, teacher, clock, objective, y, tau_s, tau_t, rng, n_diagonal,
             factor, split, teacher_temperature, known):
        assert student.training == torch.is_grad_enabled()
        if student.training:
            calls.append((target_net is student, teacher is None, split))
            texts.append(y)
            seeds.append(rng.initial_seed())
            assert student.blocks[0].dropout == 0.25
        return real(student, target_net, teacher, clock, objective, y, tau_s, tau_t, rng,
                    n_diagonal, factor, split, teacher_temperature, known)
    monkeypatch.setattr(flowmap, "loss", loss)
    inside(monkeypatch, *command(toy, "distill.py", tmp_path, "--dropout=0.25", *words))
    assert calls == [expected] * 6
    assert seeds == [lib.mix(1, lib.NOISE, step, 0) for step in range(6)]
    rows = Data(str(toy[0] / "data"), "train", 8, 1).rows(0, 48)
    assert np.array_equal(torch.cat(texts), rows)


def test_validation_is_by_length_of_the_jump(toy, tmp_path, monkeypatch):
    real, seen = flowmap.loss, []

    def loss(*inputs):
        found = real(*inputs)
        if not torch.is_grad_enabled():
            seen.extend(zip((inputs[7] - inputs[6]).tolist(), found[1].mean(1).tolist()))
        return found
    monkeypatch.setattr(flowmap, "loss", loss)
    inside(monkeypatch, *command(toy, "distill.py", tmp_path, "--max_iters=1", "--eval_iters=4",
                                 "--learning_rate=0.05", "--warmup_iters=0"))
    lengths, losses = np.array(seen[len(seen) // 2:]).T  # of the second validation, after the step
    record, diagonal = log(tmp_path / "fmlm.jsonl")[-1], np.arange(len(lengths)) % 8 < 4
    assert (lengths[diagonal] == 0).all()
    assert record["val_diagonal"] == pytest.approx(losses[diagonal].mean(), rel=1e-5, abs=1e-9)
    for i, found in enumerate(record["val_loss_by_length"]):
        there = ~diagonal & (np.minimum(lengths * 10, 9).astype(int) == i)
        assert (found is None) == (not there.any())
        assert found is None or found == pytest.approx(losses[there].mean(), rel=1e-4, abs=1e-9)

# ---------------------------------------------------------------- baselines/distill.py

def test_rounds_of_discrete_distillation(toy, tmp_path, monkeypatch):
    """The first teacher is the moving average of the diffusion model, the next that of the student
    after a round, whose steps are twice as long."""
    quick_run(*command(toy, "train.py", tmp_path, "--method=mdlm", "--learning_rate=0.05",
                       "--warmup_iters=0"))
    real, calls, saved, save = mdlm.distillation_loss, [], [], ckpt.save_checkpoint

    def loss(student, teacher, clock, y, tau, step, rng):
        calls.append((step, teacher.head.weight.clone()))
        return real(student, teacher, clock, y, tau, step, rng)
    monkeypatch.setattr(mdlm, "distillation_loss", loss)
    monkeypatch.setattr(ckpt, "save_checkpoint",
                        lambda path, c: saved.append(copy.deepcopy(c)) or save(path, c))
    inside(monkeypatch, "baselines/distill.py", f"--dataset={toy[0] / 'data'}",
           f"--out_dir={tmp_path}", "--rounds=2", "--max_iters=4", "--batch_size=8",
           "--first_step=0.125", "--learning_rate=0.05", "--warmup_iters=0", "--device=cpu",
           "--dtype=float32")
    first, last = saved
    teachers = [torch.load(tmp_path / "mdlm.pt")["ema"]["head.weight"], first["ema"]["head.weight"]]
    assert [step for step, _ in calls] == [0.125, 0.125, 0.25, 0.25]
    assert all(torch.equal(weight, teachers[i // 2]) for i, (_, weight) in enumerate(calls))
    assert not torch.equal(*teachers)
    assert not torch.equal(last["ema"]["head.weight"], last["model"]["head.weight"])
