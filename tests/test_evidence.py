"""python -m pytest tests/test_evidence.py

eval/evidence.py, with the programs it starts replaced by one that writes what they would, and
eval/report.py, on measurements made up here.
"""

import contextlib
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import ROOT, quick_run

from eval.report import CLAIMS, found, scores, values_and_error, verdicts


def measurement(steps, valid, high, seconds=10.0):
    row = dict(valid=dict(value=valid, low=2 * valid - high, high=high), steps=steps, samples=2000,
               kind="fmlm", temperature="argmax",
               different=dict(value=0.9 if valid == 0.4 else 1.0),
               unigram_kl=dict(value=0.25 if valid == 0.2 else 0.01))
    return dict(rows=[dict(name="held-out text"), row], seconds=seconds, machine="laptop",
                learning_rate=0.002, share=1,
                settings=dict(num_samples=2000, temperatures="argmax,0.3,0.5,1", gamma=0.9))


def write(folder, **records):
    """Measurements of seed 1, or of the seed that the name ends in."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, record in records.items():
        name, _, seed = name.partition("__")
        (folder / f"{name.replace('_short', '-short')}-seed{seed or 1}.json").write_text(
            json.dumps(record))


def report(root):
    """The README that follows from root / results."""
    quick_run("eval/evidence.py", "--report", f"--results={root / 'results'}")
    return (root / "results" / "README.md").read_text()


def run_evidence(root, monkeypatch, programs, *words):
    """evidence.py with everything below `root`, starting `programs`."""
    monkeypatch.setattr(subprocess, "Popen", programs)
    monkeypatch.setattr(sys, "argv", ["eval/evidence.py", f"--work={root / 'work'}",
                                      f"--results={root / 'results'}", *words])
    monkeypatch.chdir(ROOT)
    runpy.run_path("eval/evidence.py", run_name="__main__")


def test_the_report_says_what_was_measured(tmp_path):
    folder = tmp_path / "results" / "palindromes"
    write(folder, **{name: measurement(*numbers) for name, numbers in {
        "flm": (128, 0.94, 0.96), "duo": (128, 0.95, 0.96), "psd": (1, 0.59, 0.6),
        "psd__2": (1, 0.6, 0.61), "psd__3": (1, 0.61, 0.62), "sdtt": (8, 0.8, 0.81),
        "dcd": (8, 0.4, 0.41), "psd_published_short": (1, 0.6, 0.63),
        "esd_published_short": (1, 0.55, 0.6), "lsd_published_short": (1, 0.2, 0.21)}.items()})
    mdlm = measurement(128, 0.1, 0.12)                              # a worse one first
    mdlm["rows"] += [measurement(128, 0.9, 0.91)["rows"][1],
                     measurement(128, 0.99, 0.995)["rows"][1] | dict(unigram_kl=dict(value=0.2))]
    write(folder, mdlm=mdlm)                                        # the last is of few letters
    (tmp_path / "results" / "README.md").write_text(
        "before <!-- from here on written by eval/evidence.py -->stale<!-- up to here --> after")
    text = report(tmp_path)
    assert text.startswith("before ") and text.endswith(" after") and "stale" not in text
    assert "squared error" not in text and "Stories" not in text
    assert "| FMLM, PSD | 0.600 ± 0.025 | " in text and "| 0.400 ± 0.010, 0.90 different |" in text
    assert "MDLM at 128: 0.900 ± 0.010, Duo" in text
    assert "| 0.200 ± 0.010, tokens off by 0.25 nats |" in text
    for claim, verdict in {
            "in 128 steps": "holds", "eight of distilled discrete diffusion": "does not hold",
            "semigroup beats Eulerian distillation in one step": "within the error",
            "Lagrangian distillation in one step": "holds"}.items():
        assert f"{claim} | **{verdict}** (" in text
    assert "gamma sampling" not in text


def test_seconds_of_another_machine_are_left_out(tmp_path):
    """Also if it made one of the seeds, or all of a row."""
    write(tmp_path / "results" / "palindromes", **{
        name: measurement(128, 0.9, 0.92, seconds) | dict(machine=machine)
        for name, seconds, machine in (("flm", 10, "laptop"), ("flm__2", 20, "laptop"),
                                       ("flm__3", 99, "GPU"), ("psd", 50, "laptop"),
                                       ("mse", 77, "GPU"))})
    rows = [line.split(" | ") for line in report(tmp_path).splitlines()]
    seconds = {row[0]: row[2] for row in rows if len(row) == 3}
    assert [seconds[f"| {name}"] for name in ("FLM", "FMLM, PSD", "FLM, squared error")] == [
        "15 |", "50 |", " |"]


def test_a_claim_is_refuted_by_either_rival(tmp_path):
    def verdict(**measured):
        write(tmp_path, **{name: measurement(*numbers) for name, numbers in measured.items()})
        return {claim: said.split("**")[1] for claim, said in verdicts(tmp_path).items()}
    one_step, loss = CLAIMS[6][0], CLAIMS[9][0]
    assert verdict(psd=(1, 0.5, 0.51), dcd=(8, 0.6, 0.61)) == {one_step: "does not hold"}
    assert verdict(dcd=(8, 0.4, 0.41)) == {one_step: "not measured"}
    assert verdict(sdtt=(8, 0.495, 0.51)) == {one_step: "within the error"}
    assert verdict(sdtt=(8, 0.45, 0.46)) == {one_step: "holds"}
    verdict(flm=(4, 0.8, 0.81), mse=(4, 0.9, 0.91))                 # of a puzzle in four steps
    assert verdicts(tmp_path)[loss] == ("**does not hold** (FLM at 4: 0.800 ± 0.010, "
                                        "FLM, squared error at 4: 0.900 ± 0.010)")


def test_the_error_of_a_mean_over_seeds_covers_the_truth(tmp_path):
    """Of normal numbers, in 95 of 100 cases, however few; of one seed it is that of its samples."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        covered = 0
        for numbers in rng.normal(size=(4000, n)):
            values, error = values_and_error([dict(value=x, low=x, high=x) for x in numbers])
            covered += abs(np.mean(values)) <= error
        assert covered / 4000 == pytest.approx(0.95, abs=0.012)
    assert values_and_error([dict(value=1.0, low=0.5, high=1.5)]) == ([1.0], 0.5)
    assert values_and_error([dict(value=1.0, low=0.0, high=2.0)] * 4) == ([1.0] * 4, 0.5)


def test_rivals_have_a_row_for_each_temperature(tmp_path):
    """And one of the best of them, by number of steps; claims compare with that."""
    def row(steps, temperature, valid):
        return measurement(steps, valid, valid + 0.01)["rows"][1] | dict(temperature=temperature)
    folder = tmp_path / "results" / "stories"
    cold_is_better, hot_is_better = ((row(8, 0.5, 0.3), row(8, 1.0, 0.1)),
                                     (row(64, 0.5, 0.5), row(64, 1.0, 0.6)))
    write(folder, mdlm=measurement(1, 0, 0) | dict(rows=[*cold_is_better, *hot_is_better]),
          duo=measurement(8, 0.3, 0.31), psd=measurement(1, 0.35, 0.36))
    text = report(tmp_path)
    assert "## Stories" in text and "\n| steps | 1 | 8 | 64 | training" in text
    for title, cells in (("MDLM", "0.300 | 0.600"), ("MDLM, temperature 1", "0.100 | 0.600"),
                         ("MDLM, temperature 0.5", "0.300 | 0.500")):
        assert f"| {title} |  | {cells} | 10 |" in text.replace(" ± 0.010", "")
    assert [scores(found(folder, name), 8)[0] for name in ("mdlm", "mdlm@1")] == [[0.3], [0.1]]
    assert "eight of discrete diffusion | **holds** (FMLM, PSD at 1: 0.350" in text
    assert "Duo, temperature" not in text                           # it had another


def test_the_readme_follows_from_the_results(tmp_path):
    """It is what evidence.py would write, with every figure it shows."""
    if not list((ROOT / "results").glob("*/*-seed*.json")):
        pytest.skip("no measurements in results/")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    text = report(tmp_path)
    assert text == (ROOT / "results" / "README.md").read_text()
    figures = re.findall(r"\((\w+\.png)\)", text)
    assert figures and all((ROOT / "results" / figure).exists() for figure in figures)


class Programs:
    """Stands for the programs that evidence.py starts: writes what they would, and counts them. The
    learning rate `diverging` diverges, `best` is best; after all steps `lower` times that, and all
    is `worse`. AdamW is a little better than Muon. said: all their words."""

    def __init__(self, root, best=0.002, diverging="0.004", lower=1.0, worse=0.0):
        self.root, self.started, self.said, self.stop_at = root, [], [], None
        self.best, self.diverging, self.lower, self.worse = best, diverging, lower, worse

    def __call__(self, words, **_):
        words = words[1:]
        self.said.append(" ".join(words))
        if len(self.started) == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        self.started.append(words[0])
        given = dict(word[2:].split("=", 1) for word in words if re.match("--.*=", word))
        status = 1 if given.get("learning_rate") == self.diverging else 0
        if words[0] == "eval/evaluate.py":
            Path(given["out"]).write_text(json.dumps(self.judged(given)))
        elif "learning_rate" in given and status == 0:
            path = Path(given["out_dir"]) / f"{given.get('method', 'fmlm')}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            loss = abs(float(given["learning_rate"]) - self.best)
            loss += 1e-5 * (given.get("optimizer") == "muon")
            path.with_suffix(".jsonl").write_text(json.dumps(dict(step=1, val_loss=loss)) + "\n")
        return contextlib.nullcontext(SimpleNamespace(wait=lambda: status))

    def judged(self, given):
        rate = float(given["source"].split("rate-")[1].split("-")[0].split("/")[0])
        short, steps = "-tuning" in given["source"], given["steps"].split(",")
        best, worse = (self.best, 0) if short else (self.best * self.lower, self.worse)
        rows = [measurement(int(n), 0.9 - worse - 100 * abs(rate - best), 0.95)["rows"][1]
                for n in steps]
        return dict(rows=[*measurement(1, 0.5, 0.6)["rows"][:1], *rows], machine="laptop",
                    settings=given)


@pytest.mark.parametrize("best, diverging, tried", [
    (0.002, "", [0.001, 0.002, 0.004]), (0.008, "", [0.002, 0.004, 0.008, 0.016]),
    (0.008, "0.008", [0.002, 0.004, 0.008]),
    (0.0005, "0.004", [0.00025, 0.0005, 0.001, 0.002, 0.004])])
def test_rates_are_tried_until_the_best_has_worse_ones_on_both_sides(
        tmp_path, monkeypatch, best, diverging, tried):
    programs = Programs(tmp_path, best, diverging)
    run_evidence(tmp_path, monkeypatch, programs, "--sets=stories", "--seeds=1")
    folder = tmp_path / "results" / "stories"
    rates = json.loads((folder / "rates.json").read_text())
    assert sorted(rates) == [f"{name}, {optimizer}" for name in ("duo", "mdlm")
                             for optimizer in ("adamw", "muon")]
    assert all(sorted(map(float, of_it)) == tried for of_it in rates.values())
    chosen = json.loads((folder / "mdlm-seed1.json").read_text())
    assert chosen["learning_rate"] == (0.004 if diverging == "0.008" else best)
    assert chosen["optimizer"] == "adamw"


@pytest.mark.parametrize("lower, worse, best, share", [
    (1, 0, 0.002, 1), (0.5, 0, 0.001, 1), (1, 0.01, 0.002, 0.25), (0.25, 0, 0.002, 0.25)])
def test_whole_distillations_try_half_the_rate_and_short_ones_may_win(
        tmp_path, monkeypatch, lower, worse, best, share):
    programs = Programs(tmp_path, lower=lower, worse=worse)
    run_evidence(tmp_path, monkeypatch, programs, "--sets=palindromes", "--seeds=2")
    folder = tmp_path / "results" / "palindromes"
    rates = json.loads((folder / "rates.json").read_text())
    shown = {path.stem.removesuffix("-seed1"): json.loads(path.read_text())
             for path in folder.glob("*-seed*.json")}
    for name in ("psd", "sdtt", "dcd"):
        assert list(rates[f"{name}, all steps"]) == ["0.002", "0.001"]
        for run in (name, f"{name}-seed2"):
            assert (shown[run]["learning_rate"], shown[run]["share"]) == (best, share)
            source = shown[run]["settings"]["source"]
            assert (f"rate-{best:g}-tuning" in source) == (share < 1)
    assert (shown["psd-long"]["learning_rate"], shown["psd-long"]["share"]) == (best, 4)
    long = tmp_path / "work" / "palindromes" / "seed1" / f"rate-{best:g}-long" / "psd"
    assert "--max_iters=22000" in json.loads((long / "fmlm.run.json").read_text())["words"]
    assert shown["psd-short"]["learning_rate"] == shown["flm"]["learning_rate"] == 0.002
    text = (tmp_path / "results" / "README.md").read_text()
    assert ("| DCD (short was best) | " in text) == (share < 1)


def test_rivals_on_stories_see_the_tokens_of_all_stages_together(tmp_path, monkeypatch):
    """The stages are those of config/, and every model has every seed and number of steps."""
    programs = Programs(tmp_path, diverging="")
    run_evidence(tmp_path, monkeypatch, programs, "--sets=stories", "--seeds=2")
    flow, flow_map, mended = stages = [runpy.run_path(ROOT / "config" / f"{stage}stories.py")
                                       for stage in ("", "distill_", "mend_")]
    flow_map["max_iters"] //= 2
    tokens = sum(of["max_iters"] * of["batch_size"] for of in stages)
    folder = tmp_path / "results" / "stories"
    assert sorted(path.stem for path in folder.glob("*-seed*.json")) == [
        f"{name}-seed{seed}" for name in ("duo", "flm", "mdlm", "mended", "psd") for seed in (1, 2)]
    for seed in (1, 2):
        for name, stage in (("flm", flow), ("psd", flow_map), ("mended", mended)):
            rate = stage["learning_rate"]
            run = tmp_path / "work" / "stories" / f"seed{seed}" / f"rate-{rate:g}"
            run = run / {"flm": "flm.run.json", "psd": "psd/fmlm.run.json",
                         "mended": "mended/mended.run.json"}[name]
            words = json.loads(run.read_text())["words"]
            assert {f"--max_iters={stage['max_iters']}", f"--learning_rate={rate}"} < set(words)
            if name == "mended":                                    # of which map, by which flow
                folder = run.parents[1] / "psd"
                flow_path = run.parents[2] / f"rate-{flow['learning_rate']:g}" / "flm.pt"
                assert {"config/mend_stories.py", f"--start_from={folder / 'fmlm.pt'}",
                        f"--teacher_path={flow_path}"} < set(words)
            assert not any("optimizer" in word for word in words)
        for name in ("mdlm", "duo"):
            run = tmp_path / "work" / "stories" / f"seed{seed}" / "rate-0.002-adamw"
            words = json.loads((run / f"{name}.run.json").read_text())["words"]
            assert {"train.py", "config/stories.py", "--optimizer=adamw", "--embed_lr_scale=1",
                    "--replaced_share=0"} < set(words)              # train.py refuses it for them
            steps = next(int(word[12:]) for word in words if word.startswith("--max_iters="))
            assert 0 <= tokens - steps * flow["batch_size"] < flow["batch_size"]
    judged = [words for words in programs.said if words.startswith("eval/evaluate.py")]
    assert len(judged) == 10 and all("--steps=1,2,4,8,16,64,128 " in words for words in judged)
    assert sum("--temperatures=0.5,1 " in words for words in judged) == 4
    before = len(programs.started)
    run_evidence(tmp_path, monkeypatch, programs, "--sets=stories", "--seeds=2")
    assert programs.started[before:] == ["data/stories/prepare.py"]


def test_evidence_measures_everything_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    programs, prepare = Programs(tmp_path), "data/palindromes/prepare.py"
    folder = tmp_path / "results" / "palindromes"

    def go():
        run_evidence(tmp_path, monkeypatch, programs, "--sets=palindromes", "--seeds=2")
    programs.stop_at = 23
    with pytest.raises(KeyboardInterrupt):
        go()
    go()
    once, judged = len(programs.started), programs.started.count("eval/evaluate.py")
    measured = sorted(path.stem for path in folder.glob("*-seed*.json"))
    assert len(measured) == 16 + 7 and "psd-seed2" in measured
    # three rates of 13 methods (flm_published takes flm's), then 10 + 6 models, the short ones
    # being those of the best rate, half the rate for three whole distillations, and a long one.
    # Evaluations: two rates of seven distilled ones, two of three whole ones, and every row.
    assert judged == 14 + 6 + 23
    assert once - 1 - judged - programs.started.count(prepare) == 39 + 3 + 16
    rates = json.loads((folder / "rates.json").read_text())["flm"]
    assert rates["0.004"] == math.inf and min(rates, key=rates.get) == "0.002"
    assert json.loads((folder / "sdtt-seed1.json").read_text())["learning_rate"] == 0.002
    go()
    assert len(programs.started) == once + 1                        # prepare.py looks for itself
    path = folder / "mdlm-seed2.json"                               # measured otherwise: again
    whole = path.read_text()
    for otherwise in (whole.replace("argmax,0.3,0.5,1", "argmax,1"),
                      whole.replace('"temperatures"', '"before_there_were"'),
                      whole.replace('"learning_rate": 0.002,', '"learning_rate": 0.001,')):
        assert otherwise != whole
        path.write_text(otherwise)
        before = len(programs.started)
        go()
        assert programs.started[before:] == [prepare, "eval/evaluate.py"]
        assert path.read_text() == whole


def test_what_was_trained_otherwise_is_not_mixed(tmp_path, monkeypatch):
    def go():
        run_evidence(tmp_path, monkeypatch, Programs(tmp_path), "--sets=palindromes", "--seeds=1")
    go()
    run = tmp_path / "work" / "palindromes" / "seed1" / "rate-0.002" / "mdlm.run.json"
    run.write_text(run.read_text().replace("--max_iters=1000", "--max_iters=10"))
    (tmp_path / "results" / "palindromes" / "mdlm-seed1.json").unlink()
    with pytest.raises(SystemExit, match=r"was trained otherwise \(train.py .*=10\); move it away"):
        go()


def test_objectives_are_compared_with_the_published_mix_and_time_scale(tmp_path, monkeypatch):
    """The words of their commands; those of our own rows have none of it."""
    run_evidence(tmp_path, monkeypatch, Programs(tmp_path), "--sets=palindromes", "--seeds=1")
    folder = tmp_path / "work" / "palindromes" / "seed1"
    words = {path.parent.name: json.loads(path.read_text())["words"]
             for path in folder.glob("rate-0.002*/*/*.run.json")}
    assert {"--time_scale=1", "--method=flm"} < set(words["flm_published"])
    mix = {"--diagonal_share=0.5", "--full_jump_share=0.03125", "--full_jump_ramp=false",
           "--split=0.5", "--teacher_temperature=1"}
    for objective in ("psd", "lsd", "esd"):
        run = words[f"{objective}_published"]
        assert mix | {f"--objective={objective}"} < set(run)
        assert any("flm_published/flm.pt" in word for word in run)
    assert not any("full_jump" in word or "flm_published" in word for word in words["psd"])


def test_numbers_of_the_prose_are_in_the_results():
    """Every number 1,234, 0.123 or 1.234 in the words of results/README.md is a value in results/,
    in the tables or in evidence.py. It may be another one's: this finds words that measurements
    left behind, not all of them."""
    text = (ROOT / "results" / "README.md").read_text().split("## Not reproduced")[0]
    prose, tables, rest = re.split(r"<!-- from here.*?-->|<!-- up to here -->", text)
    prose += rest

    def leaves(x):
        """All numbers but the ends of intervals."""
        inside = x
        if isinstance(x, dict):
            inside = [x[key] for key in x if key not in ("low", "high")]
        inside = inside if isinstance(inside, list) else ()
        of_parts = [leaf for part in inside for leaf in leaves(part)]
        return [x] if isinstance(x, (int, float)) else of_parts
    files = [json.loads(file.read_text()) for name in ("palindromes", "stories", "captions", "chat")
             for file in (ROOT / "results" / name).glob("*.json")]
    if not files:
        pytest.skip("no measurements in results/")
    known = [abs(x) for record in files for x in leaves(record)]
    known = [x * scale for x in known if math.isfinite(x) and x < 1e9
             for scale in (1 - 1e-9, 1 + 1e-9)]                     # halves: both ways
    said = {f"{x:,.0f}" for x in known} | {f"{x:.3f}" for x in known}
    said |= {number if "." in number else f"{float(number):,.0f}"
             for number in re.findall(r"[\d.]+\d", tables)}
    source = (ROOT / "eval" / "evidence.py").read_text()
    said |= {f"{int(number):,}" for number in re.findall(r"\b\d{4,5}\b", source)}
    written = re.findall(r"(?<![\w.,/-])(?:\d{1,3},\d{3}|\d\.\d{3})(?![\w/-])", prose)
    assert len(written) > 20 and [number for number in written if number not in said] == []
