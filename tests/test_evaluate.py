"""python -m pytest tests/test_evaluate.py

The baselines and evaluate.py as programs: trained, distilled and judged at toy size.
"""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs import QUICK, ROOT, TINY, inside, log, mistake, quick_run, same

import flow
import metrics
import storage
from data.loader import Data


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """The toy's flow and flow map, and every baseline: a folder, and the settings of all."""
    folder, _, _, _ = toy
    out = tmp_path_factory.mktemp("baselines")
    for name in ("flm.pt", "fmlm.pt"):
        shutil.copy(folder / "out" / name, out)
    common = [f"--dataset={folder / 'data'}", f"--out_dir={out}", "--device=cpu", "--dtype=float32"]
    for method in ("ar", "mdlm", "duo", "dense", "mse", "noclock"):
        quick_run("train.py", *common, *QUICK, *TINY, f"--method={method}")
    for method in ("sdtt", "dcd"):
        quick_run("baselines/distill.py", *common, f"--method={method}", "--rounds=2", "--max_iters=4", "--log_interval=1",
                  "--batch_size=8")
    return out, folder / "data", common


def judged(trained, tmp_path, *words):
    """What evaluate.py printed, and wrote."""
    out, data, _ = trained
    text = quick_run("evaluate.py", f"--dataset={data}", "--device=cpu", "--dtype=float32", "--num_samples=12",
                     "--batch_size=5", f"--scorer={out / 'ar.pt'}", f"--out={tmp_path / 'rows.json'}", *words)
    return text, json.loads((tmp_path / "rows.json").read_text())


def test_every_baseline_learns_and_is_judged(trained, tmp_path):
    out, data, _ = trained
    names = ("flm", "fmlm", "ar", "mdlm", "duo", "dense", "mse", "noclock", "sdtt", "dcd")
    for name in names[2:8]:
        losses = [record["val_loss"] for record in log(out / f"{name}.jsonl") if "val_loss" in record]
        assert losses[-1] < losses[0], name
    text, record = judged(trained, tmp_path, f"--source={','.join(str(out / f'{name}.pt') for name in names)}",
                          "--steps=1,3", "--bound")
    rows = record["rows"]
    assert [row["name"] for row in rows[:2]] == ["held-out text", "flm, 1 steps, argmax"]
    assert len(rows) == 1 + 2 * len(names) and {row.get("kind") for row in rows[1:]} == set(names)
    for row in rows:
        for key in ("entropy", "self_bleu", "unigram_kl", "distinct_2", "rare_256", "longest_copy", "perplexity ar.pt"):
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"] or key == "self_bleu", (row["name"], key)
    assert rows[0]["copied"]["value"] == 1                                      # the toy's held-out text is in its training text
    found = {Path(path).stem: likelihood for path, likelihood in record["likelihoods"].items()}
    assert {name: likelihood["exact"] for name, likelihood in found.items()} == dict(flm=False, ar=True, mdlm=False, duo=False)
    assert 0 <= found["flm"]["accuracy_nearly_clean"]["value"] <= 1 and "in almost no noise" in text
    assert "accuracy_nearly_clean" not in found["mdlm"]
    assert str(out) not in json.dumps(record["settings"])


def test_scored_likelihood_is_the_validation_loss(trained, tmp_path):
    """Held-out text under ar.pt: as evaluate.py's scorer, as its likelihood, and computed here."""
    out, data, _ = trained
    _, record = judged(trained, tmp_path, f"--source={out / 'ar.pt'}", "--bound")
    net = storage.build_model(storage.load_checkpoint(out / "ar.pt", "ar"), torch.device("cpu"))
    y = torch.from_numpy(Data(str(data), "val", 8, 1).rows(0, 12))
    x = torch.cat([torch.zeros(12, 1, 16), net.embed(y)[:, :-1]], dim=1)
    with torch.no_grad():
        logits = net.head(net(x, torch.ones(12), attention="causal"))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert record["rows"][0]["perplexity ar.pt"]["value"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert record["likelihoods"][str(out / "ar.pt")]["nats_per_token"]["value"] == pytest.approx(nats, rel=1e-4)


def test_likelihoods_of_a_uniform_guess_are_the_logarithm_of_the_vocabulary(toy, tmp_path):
    """Exact or as bounds, however many times are drawn for one; a character of the toy is a token."""
    for method in ("mdlm", "duo", "ar"):
        quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--max_iters=1", "--learning_rate=1e-6", "--min_lr=0",
                  f"--method={method}")
    sources = ",".join(str(tmp_path / f"{method}.pt") for method in ("mdlm", "duo", "ar"))
    quick_run("evaluate.py", f"--source={sources}", "--num_samples=0", "--bound", f"--dataset={toy[0] / 'data'}", "--scorer=",
              "--device=cpu", "--dtype=float32", f"--out={tmp_path / 'rows.json'}")
    for found in json.loads((tmp_path / "rows.json").read_text())["likelihoods"].values():
        nats = found["nats_per_token"]["value"]
        assert nats == pytest.approx(math.log(16), rel=0.2)
        assert found["perplexity"]["value"] == pytest.approx(math.exp(nats))
        assert found["bits_per_character"]["value"] == pytest.approx(nats / math.log(2))


def test_rows_are_measured_against_the_training_text(toy, monkeypatch):
    """Token frequencies, the other way around than one might; rare tokens, of a larger vocabulary than the toy's; and the
    interval of a statistic of all, which for a mean is known."""
    judge = inside(monkeypatch, "evaluate.py", f"--source={toy[0] / 'out' / 'flm.pt'}", f"--dataset={toy[0] / 'data'}",
                   "--scorer=", "--num_samples=20", "--device=cpu")
    counts = np.bincount(Data(str(toy[0] / "data"), "train", 8, 1).tokens, minlength=16)
    held_out = np.bincount(judge["held_out_tokens"].ravel(), minlength=16)
    assert judge["rows"][0]["unigram_kl"]["value"] == metrics.unigram_kl(counts, held_out)
    x = np.random.default_rng(1).normal(size=(400, 1))
    found = judge["of_all"](lambda rows: rows.mean(), x)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.25)
    monkeypatch.setitem(judge["judge"].__globals__, "training_counts", np.arange(3000)[::-1])
    assert judge["rare_256"](np.array([[0, 255, 256, 2999]])).tolist() == [0.5]


def test_a_flow_without_a_clock_is_sampled_without_one(toy, tmp_path, monkeypatch):
    real, clocks = flow.sample_flow, []
    monkeypatch.setattr(flow, "sample_flow", lambda net, clock, *rest: clocks.append(clock) or real(net, clock, *rest))
    quick_run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--method=noclock", "--max_iters=1")
    inside(monkeypatch, "evaluate.py", f"--source={tmp_path / 'noclock.pt'}", f"--dataset={toy[0] / 'data'}", "--scorer=",
           "--num_samples=4", "--steps=3", "--device=cpu")
    t = torch.rand(5).double()
    assert len(clocks) == 1 and torch.equal(clocks[0].t_of_tau(t), t)


class Foreign(torch.nn.Module):
    """A causal model as transformers has them: the logits of the next byte depend on this one alone."""

    def __init__(self):
        super().__init__()
        self.table, self.config = torch.randn(128, 128, generator=torch.Generator().manual_seed(5)), SimpleNamespace(
            max_position_embeddings=7)

    def forward(self, ids, attention_mask):
        return SimpleNamespace(logits=self.table[ids])


@pytest.mark.parametrize("read", [0, 7])
def test_a_foreign_scorer_sees_text_in_its_own_tokens(trained, tmp_path, monkeypatch, read):
    """Begin-of-text first, six tokens at most, texts of any length in one batch; the first `read` texts, or all."""
    out, data, _ = trained

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return dict(input_ids=[ord(c) for c in text.replace("th", "T")])       # texts of different lengths
    tokenizer.bos_token_id, tokenizer.eos_token_id = 1, 2
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda name, dtype: Foreign())))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--source={out / 'ar.pt'}", f"--dataset={data}", "--num_samples=20",
                                      "--scorer=some/lm", f"--scorer_samples={read}", f"--out={tmp_path / 'rows.json'}",
                                      "--device=cpu", "--dtype=float32"])
    monkeypatch.chdir(ROOT)
    runpy.run_path("evaluate.py", run_name="__main__")
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    held_out = Data(str(data), "val", 8, 1)
    encoding, log_p = storage.tokenizer.from_dict(held_out.tokenizer), Foreign().table.log_softmax(-1)
    nats, count = 0.0, 0
    for tokens in held_out.rows(0, 20)[:read or 20].tolist():
        ids = [1] + [ord(c) for c in encoding.decode(tokens).replace("th", "T")][:6]
        nats -= sum(log_p[a, b].item() for a, b in zip(ids, ids[1:]))
        count += len(ids) - 1
    assert row["perplexity lm"]["value"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_texts_of_a_file_are_judged_like_those_of_the_checkpoint(trained, tmp_path):
    out, data, _ = trained
    quick_run("sample.py", f"--out_dir={out}", "--steps=2", "--num_samples=12", f"--out={tmp_path / 'texts.jsonl'}",
              "--device=cpu", "--dtype=float32")
    _, record = judged(trained, tmp_path, f"--source={out / 'fmlm.pt'},{tmp_path / 'texts.jsonl'}", "--steps=2")
    of_checkpoint, of_file = record["rows"][1:]
    assert of_checkpoint["perplexity ar.pt"] == of_file["perplexity ar.pt"] and of_file["samples"] == 12


def test_every_run_in_a_file_is_a_row(trained, tmp_path):
    """Several numbers of steps, of flow map and flow, as sample.py writes them into one file, are not judged as one model."""
    out, data, _ = trained
    path = tmp_path / "texts.jsonl"
    quick_run("sample.py", f"--out_dir={out}", "--steps=1,2", "--flow_steps=2", "--num_samples=12", f"--out={path}",
              "--device=cpu", "--dtype=float32")
    _, record = judged(trained, tmp_path, f"--source={path},{out / 'fmlm.pt'},{out / 'flm.pt'}", "--steps=1,2")
    rows = {row["name"]: row["perplexity ar.pt"] for row in record["rows"]}
    assert rows[f"{path} model=FMLM steps=1"] == rows["fmlm, 1 steps, argmax"]
    assert rows[f"{path} model=FMLM steps=2"] == rows["fmlm, 2 steps, argmax"]
    assert rows[f"{path} model=FLM steps=2"] == rows["flm, 2 steps, argmax"]


def test_tokens_of_another_vocabulary_are_not_taken_for_ours(trained, tmp_path):
    """Small numbers fit every vocabulary; those that do not spell their text here are another's, and the text counts."""
    out, data, _ = trained
    held_out = Data(str(data), "val", 8, 1)
    encoding = storage.tokenizer.from_dict(held_out.tokenizer)
    texts = [encoding.decode(row) for row in held_out.rows(0, 12).tolist()]
    for name, ids in (("none", {}), ("theirs", dict(tokens=[0, 1, 2, 3, 4, 5, 6, 7]))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(dict(text=text, **ids)) for text in texts))
    _, record = judged(trained, tmp_path, f"--source={tmp_path / 'none.jsonl'},{tmp_path / 'theirs.jsonl'}", "--block_size=8")
    held, none, theirs = (row["perplexity ar.pt"]["value"] for row in record["rows"])
    assert held == none == theirs


def test_temperatures_are_matched(trained, tmp_path):
    """The perplexity where the sweep crosses the data's entropy lies between its neighbours, and so does a one-step flow's,
    whose tokens are drawn."""
    out, _, _ = trained
    text, record = judged(trained, tmp_path, f"--source={out / 'mdlm.pt'},{out / 'fmlm.pt'}", "--steps=1",
                          "--temperatures=argmax,0.0005,50", "--num_samples=40")
    by_kind = {kind: [row for row in record["rows"] if row.get("kind") == kind] for kind in ("mdlm", "fmlm")}
    assert [row["temperature"] for row in by_kind["fmlm"]] == ["argmax", 0.0005, 50.0]
    for kind, rows in by_kind.items():
        cold, hot = rows[-2:]
        found, target = record["matched"][str(out / f"{kind}.pt")]["1"]["ar.pt"], record["rows"][0]["entropy"]["value"]
        assert cold["entropy"]["value"] < hot["entropy"]["value"] - 0.1, kind
        assert (found is not None) == (cold["entropy"]["value"] <= target <= hot["entropy"]["value"]), kind
        if found:
            low, high = sorted(row["perplexity ar.pt"]["value"] for row in (cold, hot))
            assert low <= found["value"] <= high and found["low"] <= found["value"] <= found["high"], kind


def test_a_flow_map_is_swept_by_the_size_of_its_noise(trained, tmp_path):
    """By argmax from smaller noise, and from guesses on the way at a temperature below 1; sample.py makes the same texts.
    In one step, where there is no way, from larger noise instead. The others by temperature, as ever."""
    out, _, _ = trained
    _, record = judged(trained, tmp_path, f"--source={out / 'mdlm.pt'},{out / 'fmlm.pt'}", "--steps=2",
                       "--temperatures=argmax,0.01,2", "--noise_scales=0.5,1,2", "--num_samples=16")
    rows = [(row["kind"], row["temperature"], row.get("noise_scale", 1)) for row in record["rows"][1:]]
    assert rows == [("mdlm", 0.01, 1), ("mdlm", 2.0, 1), ("fmlm", "argmax", 1), ("fmlm", 0.01, 1), ("fmlm", "argmax", 0.5)]
    ours = [row["perplexity ar.pt"] for row in record["rows"][3:]]
    for how, expected in (("--noise_scale=0.5", ours[2]), ("--temperature=0.01", ours[1])):
        quick_run("sample.py", f"--out_dir={out}", "--steps=2", "--num_samples=16", how, "--device=cpu",
                  f"--out={tmp_path / 'same.jsonl'}", "--dtype=float32")
        _, of_file = judged(trained, tmp_path, f"--source={tmp_path / 'same.jsonl'}", "--block_size=8")
        assert of_file["rows"][1]["perplexity ar.pt"] == expected != ours[0]
    _, record = judged(trained, tmp_path, f"--source={out / 'fmlm.pt'}", "--steps=1", "--temperatures=argmax,0.5",
                       "--noise_scales=0.5,1,2", "--num_samples=16")
    assert [(row["temperature"], row.get("noise_scale", 1)) for row in record["rows"][1:]] == [
        ("argmax", 1), ("argmax", 2.0), ("argmax", 0.5)]


def test_gamma_draws_fresh_noise_for_flows_and_flow_maps(trained, tmp_path):
    out, _, _ = trained
    source = f"--source={out / 'flm.pt'},{out / 'fmlm.pt'}"
    (_, still), (_, again), (_, stirred) = (judged(trained, tmp_path, source, "--steps=8", "--num_samples=16", f"--gamma={gamma}")
                                            for gamma in (0, 0, 0.7))
    for kind in (1, 2):
        assert still["rows"][kind] == again["rows"][kind]
        assert still["rows"][kind]["perplexity ar.pt"] != stirred["rows"][kind]["perplexity ar.pt"]


def test_a_first_look_leaves_out_temperatures_far_from_the_entropy_of_the_data(trained, tmp_path):
    """What is kept is judged as in the whole sweep, and gives the same perplexity at the data's entropy."""
    out, _, _ = trained
    words = [f"--source={out / 'mdlm.pt'},{out / 'fmlm.pt'}", "--steps=1", "--temperatures=argmax,0.0001,0.0002,1,50,100",
             "--num_samples=40", "--seed=2"]  # with which uniform tokens vary more than those held out, uniform, too
    records = [judged(trained, tmp_path, *words, *more)[1] for more in ([], ["--sweep_samples=20"])]
    whole, part = ([row for row in record["rows"][1:]] for record in records)
    assert len(part) < len(whole) and all(row in whole for row in part)
    assert [row["temperature"] for row in part if row["kind"] == "fmlm"][0] == "argmax"
    assert 1.0 in [row["temperature"] for row in part if row["kind"] == "mdlm"]         # its usual way
    values = [[by_steps["1"]["ar.pt"]["value"] for by_steps in record["matched"].values()] for record in records]
    assert values[0] == values[1]


def test_discrete_distillation_resumes_after_a_round(trained, tmp_path, monkeypatch):
    """Stopped where the first of two rounds has just been written, and taken up again: as if never stopped."""
    out, data, _ = trained
    words = ["baselines/distill.py", "--method=sdtt", f"--dataset={data}", f"--teacher={out / 'mdlm.pt'}", "--rounds=2",
             "--max_iters=4", "--batch_size=8", "--device=cpu", "--dtype=float32"]
    quick_run(*words, f"--out_dir={tmp_path / 'whole'}")
    real = storage.save_checkpoint

    def stop(path, checkpoint):
        real(path, checkpoint)
        sys.exit("stopped")
    monkeypatch.setattr(storage, "save_checkpoint", stop)
    assert mistake(monkeypatch, *words, f"--out_dir={tmp_path / 'parts'}") == "stopped"
    monkeypatch.setattr(storage, "save_checkpoint", real)
    assert storage.load_checkpoint(tmp_path / "parts" / "sdtt.pt")["step"] == 1
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")                     # the first is locked by this process
    quick_run(*words, f"--out_dir={tmp_path / 'moved'}", "--init_from=resume")
    whole, parts = (storage.load_checkpoint(tmp_path / name / "sdtt.pt", "sdtt") for name in ("whole", "moved"))
    assert whole["step"] == 2 and not same(whole["model"], storage.load_checkpoint(out / "mdlm.pt")["ema"])
    assert all(same(whole[key], parts[key]) for key in ("model", "ema", "optimizers"))


def test_a_discrete_distillation_that_diverges_says_where(trained, tmp_path):
    out, data, _ = trained
    said = quick_run("baselines/distill.py", f"--dataset={data}", f"--out_dir={tmp_path}", "--device=cpu", "--dtype=float32",
                     f"--teacher={out / 'mdlm.pt'}", "--learning_rate=1e30", "--rounds=1", "--max_iters=20", "--log_interval=5",
                     "--warmup_iters=0", "--batch_size=8", status=1)
    assert "error: the loss is not a finite number at step 2, first for a text at tau = " in said
    assert not (tmp_path / "sdtt.pt").exists()


@pytest.mark.parametrize("words, complaint", [
    (["evaluate.py", "--source=nowhere.pt"], "no checkpoint nowhere.pt"),
    (["evaluate.py", "--source=nowhere.jsonl", "--dataset=DATA", "--scorer="], "nowhere.jsonl is no .jsonl with a text"),
    (["evaluate.py", "--source=OUT/flm.pt", "--dataset=DATA", "--scorer=OUT/flm.pt"], "what is needed here is a baseline (ar)"),
    (["evaluate.py", "--source=OUT/flm.pt", "--dataset=DATA", "--scorer=nowhere/lm"], "--scorer= for none"),
    (["evaluate.py", "--num_samples=1"], "num_samples=1: one text cannot be compared"),
    (["evaluate.py", "--device=mps"], "device=mps: tokens are drawn in float64, which Apple GPUs do not have"),
    (["train.py", "--method=ar", "--attention_softcap=50"], "method=ar has no soft cap on its attention"),
    (["evaluate.py", "--temperatures=warm"], "temperatures=warm: expected positive numbers such as argmax,0.8,1"),
    (["evaluate.py", "--temperatures=0"], "temperatures=0: expected positive numbers such as argmax,0.8,1"),
    (["evaluate.py", "--noise_scales=1,-1"], "noise_scales=1,-1: expected positive numbers such as 0.6,0.8,1"),
    (["evaluate.py", "--source=OUT/flm.pt", "--block_size=16"], "texts of 8 and 16 tokens cannot be judged together"),
    (["baselines/distill.py", "--max_iters=4"], "max_iters=4 is less than one step for each of 5 rounds"),
    (["baselines/distill.py", "--first_step=0.1"], "first_step=0.1 in 5 rounds ends in steps longer than all of time"),
    (["evaluate.py", "--source=LINES", "--dataset=DATA", "--scorer="], "LINES is no .jsonl with a text a line (TypeError: "),
    (["evaluate.py", "--source=x.jsonl", "--dataset=DATA", "--scorer=", "--block_size=3"], "texts of 3 tokens cannot be judged"),
    (["evaluate.py", "--source=x.jsonl", "--dataset=DATA", "--scorer=", "--block_size=390"], "too few are held out"),
    (["baselines/distill.py", "--learning_rate=1e-6"], "the cosine would rise from learning_rate=1e-06 to min_lr=2e-05"),
    (["baselines/distill.py", "--optimizer=adam"], "optimizer=adam: choose adamw, muon"),
    (["evidence.py", "--report", "--results=nowhere"], "no measurements in nowhere; leave out --report"),
    (["sample.py", "--init_from=OUT/mdlm.pt"], "is a baseline (mdlm), which sample.py would read as a flow; evaluate.py"),
    (["train.py", "--method=gan"], "method=gan: choose flm, ar, mdlm, duo, dense, mse, noclock"),
    (["baselines/distill.py", "--method=psd"], "method=psd: choose sdtt, dcd"),
    (["baselines/distill.py", "--teacher=OUT/flm.pt"], "what is needed here is a baseline (mdlm)"),
    (["evidence.py", "--sets=mnist", "--report"], "sets=mnist: choose palindromes, pydocs"),
])
def test_mistakes(words, complaint, trained, monkeypatch):
    out, data, _ = trained
    lines = out / "lines.jsonl"
    lines.write_text('{"tokens": ["a", "b"]}\n')
    words = [word.replace("OUT", str(out)).replace("DATA", str(data)).replace("LINES", str(lines)) for word in words]
    complaint = complaint.replace("LINES", str(lines))
    assert complaint in mistake(monkeypatch, *words)


# ---------------------------------------------------------------- evidence.py
