"""python -m pytest tests/test_evaluate.py

The baselines, evaluate.py and evidence.py as programs: trained, distilled, judged and reported at toy size.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
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
    assert [row["name"] for row in rows[:2]] == ["held-out text", "flm 1 steps, temperature 1"]
    assert len(rows) == 1 + 2 * len(names) and {row.get("kind") for row in rows[1:]} == set(names)
    for row in rows:
        for key in ("entropy", "self_bleu", "unigram_kl", "distinct_2", "rare_256", "longest_copy", "perplexity ar.pt"):
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"] or key == "self_bleu", (row["name"], key)
    assert rows[0]["copied"]["value"] == 1                                      # the toy's held-out text is in its training text
    assert set(record["likelihoods"]) == {"flm", "ar", "mdlm", "duo"}
    assert [name for name, found in record["likelihoods"].items() if found["exact"]] == ["ar"]
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
    assert record["likelihoods"]["ar"]["nats_per_token"]["value"] == pytest.approx(nats, rel=1e-4)


def test_texts_of_a_file_are_judged_like_those_of_the_checkpoint(trained, tmp_path):
    out, data, _ = trained
    quick_run("sample.py", f"--out_dir={out}", "--steps=2", "--num_samples=12", f"--out={tmp_path / 'texts.jsonl'}",
              "--device=cpu", "--dtype=float32")
    _, record = judged(trained, tmp_path, f"--source={out / 'fmlm.pt'},{tmp_path / 'texts.jsonl'}", "--steps=2")
    of_checkpoint, of_file = record["rows"][1:]
    assert of_checkpoint["perplexity ar.pt"] == of_file["perplexity ar.pt"] and of_file["samples"] == 12


def test_temperatures_are_matched(trained, tmp_path):
    out, _, _ = trained
    text, record = judged(trained, tmp_path, f"--source={out / 'mdlm.pt'}", "--steps=8", "--temperatures=0.02,1,50")
    entropies = [row["entropy"]["value"] for row in record["rows"][1:]]
    assert entropies == sorted(entropies)
    found, = record["matched"].values()
    reached = entropies[0] <= record["rows"][0]["entropy"]["value"] <= entropies[-1]
    assert (found is not None) == reached and ("not reached" in text) == (not reached)


def test_discrete_distillation_resumes_after_a_round(trained, tmp_path):
    out, data, common = trained
    words = ["baselines/distill.py", "--method=sdtt", f"--dataset={data}", f"--teacher={out / 'mdlm.pt'}", "--rounds=2",
             "--max_iters=4", "--batch_size=8", "--device=cpu", "--dtype=float32", f"--out_dir={tmp_path}"]
    quick_run(*words)
    whole = storage.load_checkpoint(tmp_path / "sdtt.pt", "sdtt")
    first = dict(torch.load(tmp_path / "sdtt.pt", weights_only=True))
    assert whole["step"] == 2 and not same(whole["model"], storage.load_checkpoint(out / "mdlm.pt")["ema"])
    quick_run(*words, "--init_from=resume")                                     # nothing is left to do
    assert same(storage.load_checkpoint(tmp_path / "sdtt.pt")["model"], first["model"])


@pytest.mark.parametrize("words, complaint", [
    (["evaluate.py", "--source=nowhere.pt"], "no checkpoint nowhere.pt"),
    (["evaluate.py", "--source=nowhere.jsonl", "--dataset=DATA", "--scorer="], "nowhere.jsonl is no .jsonl with a text"),
    (["evaluate.py", "--source=OUT/flm.pt", "--dataset=DATA", "--scorer=OUT/flm.pt"], "what is needed here is a baseline (ar)"),
    (["evaluate.py", "--source=OUT/flm.pt", "--dataset=DATA", "--scorer=nowhere/lm"], "--scorer= for none"),
    (["train.py", "--method=gan"], "method=gan: choose flm, ar, mdlm, duo, dense, mse, noclock"),
    (["baselines/distill.py", "--method=psd"], "method=psd: choose sdtt, dcd"),
    (["baselines/distill.py", "--teacher=OUT/flm.pt"], "what is needed here is a baseline (mdlm)"),
    (["evidence.py", "--sets=mnist", "--report"], "sets=mnist: choose palindromes, pydocs"),
])
def test_mistakes(words, complaint, trained, monkeypatch):
    out, data, _ = trained
    words = [word.replace("OUT", str(out)).replace("DATA", str(data)) for word in words]
    assert complaint in mistake(monkeypatch, *words)


# ---------------------------------------------------------------- the report

def measurement(valid, seconds=10.0):
    row = dict(valid=dict(value=valid), entropy=dict(value=2.0), temperature=1)
    return dict(rows=[dict(entropy=dict(value=2.0)), row], training=dict(seconds=seconds))


def test_the_report_says_what_was_measured(tmp_path):
    folder = tmp_path / "results" / "palindromes"
    folder.mkdir(parents=True)
    for name, valid in {"flm-seed1-128": 0.99, "mdlm-seed1-128": 0.9, "duo-seed1-128": 0.95, "psd-seed1-1": 0.5,
                        "psd-seed2-1": 0.7, "sdtt-seed1-8": 0.8, "dcd-seed1-8": 0.4}.items():
        (folder / f"{name}.json").write_text(json.dumps(measurement(valid)))
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- from here on written by evidence.py -->stale<!-- up to here --> after")
    quick_run("evidence.py", "--report", "--sets=palindromes", f"--results={tmp_path / 'results'}", f"--readme={readme}")
    text = readme.read_text()
    assert text.startswith("before ") and text.endswith(" after") and "stale" not in text
    assert "| FMLM, PSD | 0.600 (0.500 to 0.700) | " in text
    assert "many steps: **holds** (FLM at 128 0.990, MDLM at 128 0.900, Duo at 128 0.950)" in text
    assert "discrete diffusion: **does not hold**" in text and "in one step: **not measured yet**" in text


def test_the_readme_follows_from_the_results(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    shutil.copy(ROOT / "README.md", readme)
    if not (ROOT / "results").exists():
        pytest.skip("no results/ here")
    shutil.copytree(ROOT / "results", results)
    quick_run("evidence.py", "--report", f"--results={results}", f"--readme={readme}")
    assert readme.read_text().replace(str(results), "results") == (ROOT / "README.md").read_text()
