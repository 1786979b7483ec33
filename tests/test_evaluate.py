"""python -m pytest tests/test_evaluate.py

The baselines, evaluate.py and evidence.py as programs: trained, distilled, judged and reported at toy size.
"""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import QUICK, ROOT, TINY, log, mistake, quick_run, same

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


@pytest.mark.parametrize("words, complaint", [
    (["evaluate.py", "--source=nowhere.pt"], "no checkpoint nowhere.pt"),
    (["evaluate.py", "--source=nowhere.jsonl", "--dataset=DATA", "--scorer="], "nowhere.jsonl is no .jsonl with a text"),
    (["evaluate.py", "--source=OUT/flm.pt", "--dataset=DATA", "--scorer=OUT/flm.pt"], "what is needed here is a baseline (ar)"),
    (["evaluate.py", "--source=OUT/flm.pt", "--dataset=DATA", "--scorer=nowhere/lm"], "--scorer= for none"),
    (["evaluate.py", "--num_samples=1"], "num_samples=1: one text cannot be compared"),
    (["evaluate.py", "--temperatures=warm"], "temperatures=warm: expected positive numbers such as argmax,0.8,1"),
    (["evaluate.py", "--temperatures=0"], "temperatures=0: expected positive numbers such as argmax,0.8,1"),
    (["evaluate.py", "--noise_scales=1,-1"], "noise_scales=1,-1: expected positive numbers such as 0.6,0.8,1"),
    (["evaluate.py", "--source=OUT/flm.pt", "--block_size=16"], "texts of 8 and 16 tokens cannot be judged together"),
    (["baselines/distill.py", "--max_iters=4"], "max_iters=4 is less than one step for each of 5 rounds"),
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
    words = [word.replace("OUT", str(out)).replace("DATA", str(data)) for word in words]
    assert complaint in mistake(monkeypatch, *words)


# ---------------------------------------------------------------- evidence.py

def measurement(steps, valid, high, seconds=10.0):
    row = dict(valid=dict(value=valid, low=2 * valid - high, high=high), entropy=dict(value=2.0), steps=steps, samples=2000,
               kind="fmlm", temperature="argmax", different=dict(value=0.9 if valid == 0.4 else 1.0))
    return dict(rows=[dict(entropy=dict(value=2.0), rare_256=dict(value=0.3)), row], seconds=seconds, scorers=["judge"],
                machine="laptop")


def run_evidence(root, monkeypatch, programs, *words):
    """evidence.py with everything below `root`, starting `programs`, each of which takes as many seconds as came before it."""
    monkeypatch.setattr(subprocess, "Popen", programs)
    if isinstance(programs, Programs):
        monkeypatch.setattr(os, "times", lambda: SimpleNamespace(children_user=len(programs.started) ** 2, children_system=0))
    monkeypatch.setattr(sys, "argv", ["evidence.py", f"--work={root / 'work'}", f"--results={root / 'results'}",
                                      f"--readme={root / 'mine.md'}", *words])
    monkeypatch.chdir(ROOT)
    runpy.run_path("evidence.py", run_name="__main__")


def test_equal_time_is_that_of_the_rival_and_of_the_teachers(tmp_path, monkeypatch):
    """A student of 10 s after a teacher of 2 s is given the 22 s that its rival took, which leaves it twice its own 10 s;
    a trained model 4 s for the 3 of its rival is given 3/4 of its steps. The command line says so."""
    folder = tmp_path / "results" / "palindromes"
    folder.mkdir(parents=True)
    taken = {"flm": 3, "mdlm": 2, "duo": 4, "psd": 22, "sdtt": 12, "dcd": 9}
    rest = ("ar", "gamma", "psd-long", "psd-short", "lsd-short", "esd-short", "self-short", "mse", "noclock", "dense")
    for name, seconds in (taken | dict.fromkeys(rest, 1)).items():
        (folder / f"{name}-seed1.json").write_text(json.dumps(measurement(1, 0.5, 0.6, seconds)))
    rates = {name: {rate: float(rate != "0.002") for rate in ("0.001", "0.002", "0.004")} for name in
             ("mdlm", "duo", "sdtt", "dcd", "sdtt, all steps", "dcd, all steps")}
    (folder / "rates.json").write_text(json.dumps(rates))
    programs, given = Programs(tmp_path), {}

    def started(words, **rest):
        if any("equal-time" in word for word in words) and "evaluate.py" not in words:
            method = next(word for word in words if word.startswith("--method="))
            given[method[9:]] = next(int(word[12:]) for word in words if word.startswith("--max_iters="))
        return programs(words, **rest)
    run_evidence(tmp_path, monkeypatch, started, "--sets=palindromes", "--seeds=1")
    assert given == {"mdlm": 1500, "duo": 750, "sdtt": 11000, "dcd": 5500 * 18 // 5}
    assert "| 0.900 ± 0.050 at 8, as long as FMLM, PSD |" in (tmp_path / "mine.md").read_text()
    (folder / "dcd-equal-seed1.json").unlink()
    (folder / "psd-seed1.json").write_text(json.dumps(measurement(1, 0.5, 0.6, 22) | dict(machine="desktop")))
    with pytest.raises(SystemExit, match="dcd and psd took seconds on desktop and laptop; measure both on one machine"):
        run_evidence(tmp_path, monkeypatch, started, "--sets=palindromes", "--seeds=1")


def test_the_report_says_what_was_measured(tmp_path):
    folder = tmp_path / "results" / "palindromes"
    folder.mkdir(parents=True)
    for name, numbers in {"flm-seed1": (128, 0.94, 0.96), "mdlm-seed1": (128, 0.9, 0.91), "duo-seed1": (128, 0.95, 0.96),
                          "psd-seed1": (1, 0.5, 0.51), "psd-seed2": (1, 0.7, 0.71), "sdtt-seed1": (8, 0.8, 0.81),
                          "dcd-seed1": (8, 0.4, 0.41), "psd-short-seed1": (1, 0.6, 0.63), "esd-short-seed1": (1, 0.55, 0.6),
                          "lsd-short-seed1": (1, 0.2, 0.21)}.items():
        (folder / f"{name}.json").write_text(json.dumps(measurement(*numbers)))
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- from here on written by evidence.py -->stale<!-- up to here --> after")
    quick_run("evidence.py", "--report", "--sets=palindromes", f"--results={tmp_path / 'results'}", f"--readme={readme}")
    text = readme.read_text()
    assert text.startswith("before ") and text.endswith(" after") and "stale" not in text
    assert "clock of the FLM" not in text and "rare tokens" not in text
    assert "| FMLM, PSD | 0.600 ± 0.100 | " in text and "| 0.400 ± 0.010, 0.90 different |" in text
    for claim, verdict in {"many steps": "holds", "eight of distilled discrete diffusion": "does not hold",
                           "semigroup beats Eulerian distillation, in one step": "within the error",
                           "Lagrangian distillation, in one step": "holds",
                           "gamma sampling of the flow, which is not of the paper": "not measured yet"}.items():
        assert f"{claim}: **{verdict}**" in text
    assert "squared error" not in text


def test_the_report_compares_clocks_and_noise(tmp_path):
    """At the held-out text's entropy, 2, and at its share of rare tokens, 0.3: between two temperatures, geometrically."""
    folder = tmp_path / "results" / "pydocs4096"
    folder.mkdir(parents=True)

    def value(x):
        return dict(value=x, low=x - 0.25, high=x + 0.25)

    def row(temperature, entropy, rare, perplexity, kind="flm"):
        return {"kind": kind, "steps": 128, "temperature": temperature, "entropy": value(entropy), "rare_256": value(rare),
                "perplexity judge": value(perplexity), "different": value(1.0), "samples": 1000}
    rows = [dict(entropy=value(2.0), rare_256=value(0.3)), row("argmax", 3.0, 0.9, 1.0), row(0.8, 1.0, 0.2, 100.0),
            row(1.0, 3.0, 0.4, 10_000.0)]
    record = dict(rows=rows, matched={"flm.pt": {"128": {"judge": value(1000.0)}}}, scorers=["judge"], seconds=5.0,
                  vocabulary=4096, likelihoods={"flm.pt": dict(nats_per_token=value(5.5), accuracy_nearly_clean=value(0.75))})
    (folder / "flm-seed1.json").write_text(json.dumps(record | dict(val_loss=4.25)))
    (folder / "clock1-seed1.json").write_text(json.dumps(record | dict(rows=rows[:3])))
    (folder / "dense-seed1.json").write_text(json.dumps(record | dict(val_loss=4.5, likelihoods={})))
    readme = tmp_path / "mine.md"
    quick_run("evidence.py", "--report", f"--results={tmp_path / 'results'}", f"--readme={readme}")
    text = readme.read_text()
    assert "V = 4,096, perplexity under judge at the entropy of held-out text, 1,000 samples: smaller is better" in text
    assert "| mean of both | 1000 ± 0 | 1000 | 5.500 ± 0.250 | 75.0% |" in text
    assert "| reads d coordinates | 1000 ± 0 | not reached | 5.500 ± 0.250 | 75.0% |" in text
    assert "4.250 with noise drawn in d dimensions, 4.500 with noise drawn in V" in text and "**" not in text.split("V.\n")[1]
    scaled = [row("argmax", 2.0, 0.2, 100.0, "fmlm"), row("argmax", 2.5, 0.4, 2500.0, "fmlm"), row(0.5, 1.8, 0.1, 10.0, "fmlm")]
    (folder / "psd-seed1.json").write_text(json.dumps(record | dict(rows=[rows[0], *scaled])))  # by noise and cold
    quick_run("evidence.py", "--report", f"--results={tmp_path / 'results'}", f"--readme={readme}")
    assert ("| evaluations | 1 | 2 | 4 | 8 | 16 | 32 | 128 |\n|---|---|---|---|---|---|---|---|\n"
            "| FLM |  |  |  |  |  |  | 1000 |\n| FMLM, PSD |  |  |  |  |  |  | 500 |\n"
            "| FLM, V-dimensional noise |  |  |  |  |  |  | 1000 |\n") in readme.read_text()


def test_the_readme_follows_from_the_results(tmp_path):
    """It is what evidence.py would write."""
    if not list((ROOT / "results").glob("*/*-seed*.json")):
        pytest.skip("no measurements in results/")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    shutil.copy(ROOT / "README.md", readme)
    shutil.copytree(ROOT / "results", results)
    quick_run("evidence.py", "--report", f"--results={results}", f"--readme={readme}")
    assert readme.read_text().replace(str(results), "results") == (ROOT / "README.md").read_text()


class Programs:
    """Stands for the programs that evidence.py starts: writes what they would, and counts them. A learning rate of 0.004,
    or another, diverges; 0.002, or another, is best; after all steps `lower` times that, and all is `worse`. With `reached`
    unset all entropies are too small."""

    def __init__(self, root, best=0.002, diverging="0.004", lower=1.0, worse=0.0, reached=True):
        self.root, self.started, self.stop_at = root, [], None
        self.best, self.diverging, self.lower, self.worse, self.reached = best, diverging, lower, worse, reached

    def __call__(self, words, **_):
        words = words[1:]
        if len(self.started) == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        self.started.append(words[0])
        given = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        status = 1 if given.get("learning_rate") == self.diverging else 0
        if words[0] == "evaluate.py":
            rate = float(given["source"].split("rate-")[1].split("-")[0].split("/")[0])
            best, worse = (self.best, 0) if "-tuning" in given["source"] else (self.best * self.lower, self.worse)
            rows = [measurement(int(n), 0.9 - worse - 100 * abs(rate - best), 0.95)["rows"][1] for n in given["steps"].split(",")]
            matched = {given["source"]: {n: {"judge": dict(value=9.0, low=8.0, high=10.0)} for n in given["steps"].split(",")}}
            if not self.reached:
                matched = {}
                for row in rows:
                    row |= {"entropy": dict(value=1 - abs(rate - best)), "rare_256": dict(value=0.1),
                            "perplexity judge": dict(value=9)}
                    del row["valid"]
            bound = dict(nats_per_token=dict(value=5.0, low=4.0, high=6.0), accuracy_nearly_clean=dict(value=0.5))
            Path(given["out"]).write_text(json.dumps(dict(
                rows=[*measurement(1, 0.5, 0.6)["rows"][:1], *rows], scorers=["judge"], matched=matched, machine="laptop",
                likelihoods={given["source"]: bound})))
        elif "learning_rate" in given and status == 0:
            name = given.get("method", "fmlm")
            folder = Path(given["out_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.pt").touch()
            loss = abs(float(given["learning_rate"]) - self.best)
            (folder / f"{name}.jsonl").write_text(json.dumps(dict(step=1, val_loss=loss)) + "\n")
        return SimpleNamespace(wait=lambda: status)


@pytest.mark.parametrize("best, diverging, tried", [
    (0.002, "", [0.001, 0.002, 0.004]), (0.008, "", [0.001, 0.002, 0.004, 0.008, 0.016]),
    (0.008, "0.008", [0.001, 0.002, 0.004, 0.008]), (0.0005, "0.004", [0.00025, 0.0005, 0.001, 0.002, 0.004])])
def test_rates_are_tried_until_the_best_has_worse_ones_on_both_sides(tmp_path, monkeypatch, best, diverging, tried):
    run_evidence(tmp_path, monkeypatch, Programs(tmp_path, best, diverging), "--sets=pydocs4096")
    rates = json.loads((tmp_path / "results" / "pydocs" / "rates.json").read_text())["flm"]
    assert sorted(map(float, rates)) == tried
    chosen = json.loads((tmp_path / "results" / "pydocs4096" / "clock1-seed1.json").read_text())["learning_rate"]
    assert chosen == (0.004 if diverging == "0.008" else best)


@pytest.mark.parametrize("lower, worse, best, share", [
    (1, 0, 0.002, 1), (0.5, 0, 0.001, 1), (1, 0.01, 0.002, 0.25), (0.25, 0, 0.002, 0.25)])
def test_whole_distillations_try_half_the_rate_and_short_ones_may_win(tmp_path, monkeypatch, lower, worse, best, share):
    run_evidence(tmp_path, monkeypatch, Programs(tmp_path, lower=lower, worse=worse), "--sets=palindromes", "--seeds=2")
    folder = tmp_path / "results" / "palindromes"
    rates = json.loads((folder / "rates.json").read_text())
    shown = {path.stem.removesuffix("-seed1"): json.loads(path.read_text()) for path in folder.glob("*-seed*.json")}
    for name in ("psd", "sdtt", "dcd"):
        assert list(rates[f"{name}, all steps"]) == ["0.002", "0.001"]
        for run in (name, f"{name}-seed2"):
            assert (shown[run]["learning_rate"], shown[run]["share"]) == (best, share)
            assert (f"rate-{best:g}-tuning" in next(iter(shown[run]["matched"]))) == (share < 1)
    assert shown["dcd-equal"]["learning_rate"] == shown["psd-long"]["learning_rate"] == best and shown["psd-long"]["share"] == 4
    long = json.loads((tmp_path / "work" / "palindromes" / "seed1" / f"rate-{best:g}-long" / "psd" / "fmlm.run.json").read_text())
    assert "--max_iters=22000" in long["words"]                                     # four times the 5,500
    assert shown["psd-short"]["learning_rate"] == shown["flm"]["learning_rate"] == 0.002 and shown["flm"]["share"] == 1
    assert ("| DCD (short was best) | " in (tmp_path / "mine.md").read_text()) == (share < 1)


def test_where_no_rate_reaches_the_entropy_the_nearest_is_taken(tmp_path, monkeypatch):
    run_evidence(tmp_path, monkeypatch, Programs(tmp_path, reached=False), "--sets=pydocs", "--seeds=1")
    rates = json.loads((tmp_path / "results" / "pydocs" / "rates.json").read_text())["lsd"]
    assert rates == {"0.001": pytest.approx(1e9 * 2.001), "0.002": pytest.approx(1e9 * 2), "0.004": math.inf}
    assert "| FMLM, LSD, short | entropy not reached | entropy not reached | " in (tmp_path / "mine.md").read_text()


def test_evidence_compares_clocks_on_a_larger_vocabulary(tmp_path, monkeypatch):
    programs, said = Programs(tmp_path), []
    run_evidence(tmp_path, monkeypatch, lambda words, **rest: said.append(" ".join(words[1:])) or programs(words, **rest),
                 "--sets=pydocs4096", "--scorer=some/lm")
    assert said[:2] == ["data/pydocs/prepare.py", "data/pydocs/prepare.py --vocab_size=4096 --out_dir=data/pydocs4096"]
    assert not any("-tuning" in words and "pydocs4096" in words for words in said)                 # rates are those of pydocs
    measured = sorted(path.stem for path in (tmp_path / "results" / "pydocs4096").glob("*-seed*.json"))
    assert measured == ["ar-seed1", "clock0-seed1", "clock1-seed1", "dense-seed1", "flm-seed1"]
    whole = [words for words in said if "--method=flm " in words and "--max_iters=3000" in words]
    for trained, words in zip(whole, (["--clock_embedding_share=0 ", "/clock0 "], [], ["--clock_embedding_share=1 ", "/clock1 "]),
                              strict=True):                                     # the mean is that of config/pydocs.py
        assert trained.startswith("train.py config/pydocs.py ") and ("share" in trained) == bool(words)
        assert all(word in trained for word in [*words, "--dataset=pydocs4096 ", "--learning_rate=0.002 "])
    judged = [words for words in said if words.startswith("evaluate.py") and "pydocs4096" in words and "flm.pt" in words]
    assert len(judged) == 3 and all("--steps=128 " in words and "ar.pt,some/lm" in words for words in judged)  # of each clock


def test_evidence_measures_everything_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    programs = Programs(tmp_path)

    def go():
        run_evidence(tmp_path, monkeypatch, programs, "--sets=palindromes", "--seeds=2")
    programs.stop_at = 23
    with pytest.raises(KeyboardInterrupt):
        go()
    go()
    once = len(programs.started)
    measured = sorted(path.stem for path in (tmp_path / "results" / "palindromes").glob("*-seed*.json"))
    assert len(measured) == 16 + 7 + 4 and "psd-seed2" in measured and "sdtt-equal-seed1" in measured
    # three rates of twelve methods (dense takes flm's), then 10 + 6 + 4 models, the short ones being those of the best rate,
    # half the rate for three whole distillations, and a long one; evaluations: two rates of six distilled ones, and of three
    # of them whole, every model, and the flow of each of two seeds by another sampler
    assert programs.started.count("evaluate.py") == 12 + 6 + 25 + 2
    assert once - 1 - programs.started.count("evaluate.py") - programs.started.count("data/palindromes/prepare.py") == 36 + 3 + 20
    rates = json.loads((tmp_path / "results" / "palindromes" / "rates.json").read_text())
    assert rates["flm"]["0.004"] == math.inf and min(rates["flm"], key=rates["flm"].get) == "0.002"
    assert json.loads((tmp_path / "results" / "palindromes" / "sdtt-seed1.json").read_text())["learning_rate"] == 0.002
    go()
    assert len(programs.started) == once + 1                                    # prepare.py, which looks for itself
    assert "FMLM, PSD" in (tmp_path / "mine.md").read_text()
