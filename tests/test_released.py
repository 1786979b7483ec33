"""python -m pytest tests/test_released.py

Checkpoints that other programs wrote: read, sampled, distilled, and refused where damaged.

- In the authors' layout: fixtures/released_*.ckpt, two tiny networks with the outputs that a
  second, independent program computes (make_released.py).
- By train.py and distill.py of commit bc6711d: fixtures/old, from a few steps on programs.py's toy
  set. golden.pt holds noise and the tokens that commit decoded from it.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from programs import QUICK, inside, log, mistake, quick_run, same, write_set, write_toy

import flow
import flowmap
from lib import checkpoint as ckpt

OURS = ROOT / "tests" / "fixtures"
AUTHORS = ROOT.parent / "shared" / "fixtures"
WORDS = "[PAD] [UNK] [CLS] [SEP] the cat sat ##s on a mat .".split()    # V = 12
BASE = ["sample.py", "--device=cpu", "--dtype=float32", "--num_samples=3"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def release(path, change):
    """A released file after `change`d in place."""
    kind = "fmlm" if "fmlm" in path.name else "flm"
    file = torch.load(OURS / f"released_{kind}.ckpt")
    change(file)
    torch.save(file, path)
    return path


def log_probs(path, golden):
    """What our network makes of the golden dense state, through z = x E."""
    checkpoint = ckpt.load_checkpoint(path)
    ckpt.set_length(checkpoint, golden["x"].size(1), str(path))
    model = ckpt.build_model(checkpoint, torch.device("cpu"))
    hidden = model(golden["x"] @ model.embed.weight, golden["tau_s"], golden["tau_t"])
    return model.head(hidden).log_softmax(-1)

# ------------------------------------------------------------------------------ the numbers

@pytest.mark.parametrize("kind", ["flm", "fmlm"])
def test_golden_numbers(kind):
    path = OURS / f"released_{kind}.ckpt"
    golden = torch.load(path)["golden"]
    found = log_probs(path, golden)
    assert golden["log_probs"].std(1).mean() > 0.5  # they depend on the input
    assert torch.allclose(found, golden["log_probs"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["flm", "fmlm"])
def test_golden_numbers_of_the_authors_network(kind):
    path = AUTHORS / f"official_tiny_{kind}.ckpt"
    if not path.exists():
        pytest.skip(f"the numbers computed with the authors' code are not at {AUTHORS}")
    golden = torch.load(path.with_suffix(".golden.pt"), weights_only=True)
    assert torch.allclose(log_probs(path, golden), golden["log_probs"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["flm", "fmlm"])
def test_compiled_or_not(kind, tmp_path):
    """`_orig_mod.` anywhere in the names changes nothing."""
    golden = torch.load(OURS / f"released_{kind}.ckpt")["golden"]
    for prefix in ("backbone.", "backbone._orig_mod.", "_orig_mod.backbone."):
        def rename(file):
            file["state_dict"] = {
                prefix + name.replace("_orig_mod.", "").removeprefix("backbone."): tensor
                for name, tensor in file["state_dict"].items()}
        path = release(tmp_path / f"{kind}.ckpt", rename)
        assert torch.allclose(log_probs(path, golden), golden["log_probs"], atol=1e-4, rtol=0)


def test_other_parts_of_a_run_are_ignored(tmp_path):
    """A distillation's file may hold its teacher too."""
    golden = torch.load(OURS / "released_fmlm.ckpt")["golden"]

    def add_a_teacher(file):
        weights = file["state_dict"]
        weights |= {f"teacher.{name}": tensor + 1 for name, tensor in weights.items()}
    path = release(tmp_path / "fmlm.ckpt", add_a_teacher)
    assert torch.allclose(log_probs(path, golden), golden["log_probs"], atol=1e-4, rtol=0)


def test_network_is_built_from_the_shapes():
    for kind in ("flm", "fmlm"):
        checkpoint = ckpt.load_checkpoint(OURS / f"released_{kind}.ckpt")
        expected = dict(vocab_size=12, n_layer=2, n_head=2, n_embd=16, n_time=4, time_scale=1,
                        attention_softcap=50, logit_softcap=30, learned_positions=False,
                        flow_map=kind == "fmlm")
        assert checkpoint["kind"] == kind
        assert checkpoint["model_config"] == checkpoint["model_config"] | expected


@pytest.mark.parametrize("V, length", [(50257, 1024), (30522, 128)])
def test_length_of_the_published_models(V, length, tmp_path):
    """Their files do not say it; their vocabularies do."""
    def widen(file):
        average = iter(file["ema"]["shadow_params"])
        for name, tensor in file["state_dict"].items():
            if tensor.size(0) == 12:
                file["state_dict"][name] = torch.zeros(V, *tensor.shape[1:])
        file["ema"]["shadow_params"] = [t.new_zeros(V, *t.shape[1:]) if t.size(0) == 12 else t
                                        for t in average]
    checkpoint = ckpt.load_checkpoint(release(tmp_path / "flm.ckpt", widen))
    assert checkpoint["model_config"]["vocab_size"] == V
    assert ckpt.set_length(checkpoint, 0, "x") == length
    assert ckpt.set_length(checkpoint, 64, "x") == 64

# ------------------------------------------------------------------------------ the programs

def test_sampling(tmp_path, vocabulary):
    pytest.importorskip("tokenizers", reason="decoding a WordPiece vocabulary needs tokenizers")
    for kind, name in (("flm", "FLM"), ("fmlm", "FMLM")):
        out = tmp_path / f"{kind}.jsonl"
        quick_run(*BASE, f"--init_from={OURS / f'released_{kind}.ckpt'}", "--block_size=5",
                  f"--vocabulary={vocabulary}", "--steps=1,3", f"--out={out}")
        records = log(out)
        assert [(r["model"], r["steps"]) for r in records] == [(name, 1)] * 3 + [(name, 3)] * 3
        known = {word.lstrip("#") for word in WORDS} | {word + "s" for word in WORDS}
        assert all(set(r["text"].replace(".", " . ").split()) <= known for r in records)
        assert len({r["text"] for r in records}) > 1


def test_wordpieces_are_joined(vocabulary):
    pytest.importorskip("tokenizers", reason="decoding a WordPiece vocabulary needs tokenizers")
    from lib.released import read_vocabulary
    ids = [WORDS.index(word) for word in "[CLS] the cat ##s sat . [SEP]".split()]
    assert read_vocabulary(str(vocabulary)).decode(ids) == "[CLS] the cats sat. [SEP]"


def test_distilling_a_released_teacher(tmp_path):
    """Gives a flow map of ours, with the set's tokenizer and the teacher's frozen E."""
    write_set(tmp_path / "data", "abcdefghijkl" * 50)
    quick_run("distill.py", *QUICK, f"--teacher_path={OURS / 'released_flm.ckpt'}",
              "--block_size=5", "--batch_size=8", f"--dataset={tmp_path / 'data'}",
              f"--out_dir={tmp_path / 'out'}")
    student = ckpt.load_checkpoint(tmp_path / "out" / "fmlm.pt", "fmlm")["model"]
    teacher = ckpt.load_checkpoint(OURS / "released_flm.ckpt")["ema"]
    assert torch.equal(student["embed.weight"], teacher["embed.weight"])
    assert not torch.equal(student["head.weight"], teacher["head.weight"])
    texts = quick_run(*BASE, f"--out_dir={tmp_path / 'out'}", "--steps=1")
    assert "FMLM       1 " in texts

# ------------------------------------------------------------------------------ older files

OLD = OURS / "old"


def test_sampling_from_files_of_the_version_before(tmp_path, monkeypatch):
    out = tmp_path / "texts.jsonl"
    inside(monkeypatch, *BASE, f"--out_dir={OLD}", "--steps=1,2", "--flow_steps=4", f"--out={out}")
    records, characters = log(out), set("the cat sat on the mat. a dog ran to the red hut.\n")
    assert [(r["model"], r["steps"]) for r in records] == [
        run for run in (("FMLM", 1), ("FMLM", 2), ("FLM", 4)) for _ in range(3)]
    assert all(len(r["text"]) == 8 and set(r["text"]) <= characters for r in records)
    assert len({r["text"] for r in records}) > 3


@pytest.mark.parametrize("kind", ["flm", "fmlm"])
def test_the_same_noise_gives_the_texts_of_the_version_before(kind):
    golden, checkpoint = torch.load(OLD / "golden.pt"), ckpt.load_checkpoint(OLD / f"{kind}.pt")
    net = ckpt.build_model(checkpoint, torch.device("cpu"))
    clock = flow.Clock(16, net.config.n_embd, checkpoint["clock_embedding_share"])
    sample = flow.sample if kind == "flm" else flowmap.sample
    for steps in (1, 4):
        tokens = sample(net, clock, golden["z"], steps)
        assert torch.equal(tokens, golden["tokens"][f"{kind} {steps}"])

# ------------------------------------------------------------------------------ trust

FOREIGN = '''
class Settings(dict):
    def __init__(self, **values):
        super().__init__(values)
        self.nested = [Settings] if values else []
class Weird:
    def __reduce__(self):
        return print, ("this ran while the file was read",)
'''


@pytest.fixture
def with_objects(tmp_path, monkeypatch):
    """A released file with what Lightning adds: objects whose classes are not installed."""
    (tmp_path / "gone.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    import gone

    def add(file):
        file["hyper_parameters"] = {"config": gone.Settings(size=1), "tokenizer": gone.Weird()}
        file["callbacks"] = {gone.Settings: {"path": Path("x")}}
    path = release(tmp_path / "released_fmlm.ckpt", add)
    (tmp_path / "gone.py").unlink()
    del sys.modules["gone"]
    return path


def test_objects_are_refused(with_objects, monkeypatch, capfd):
    said = mistake(monkeypatch, *BASE, f"--init_from={with_objects}")
    assert said == (f"error: {with_objects} holds Python objects besides tensors, and reading "
                    f"those can run any program; if you trust its origin, add --trust_checkpoint "
                    f"(sample.py, distill.py, eval/evaluate.py)")
    assert "this ran" not in capfd.readouterr().out


def test_trusted_objects_are_left_out(with_objects, capfd):
    """Their classes and packages are not needed. Even a trusted file does not run this program."""
    checkpoint = ckpt.load_checkpoint(with_objects, trust=True)
    plain = ckpt.load_checkpoint(OURS / "released_fmlm.ckpt")
    assert same(checkpoint["ema"], plain["ema"])
    assert "this ran" not in capfd.readouterr().out


def test_trust_checkpoint_is_a_bare_flag(with_objects, vocabulary):
    pytest.importorskip("tokenizers", reason="decoding a WordPiece vocabulary needs tokenizers")
    said = quick_run(*BASE, f"--init_from={with_objects}", f"--vocabulary={vocabulary}",
                     "--block_size=5", "--trust_checkpoint", "--steps", 1)
    assert "FMLM       1 " in said

# ------------------------------------------------------------------------------ refusals

def lose_the_average(file):
    del file["ema"]


def lose_a_weight(file):
    file["ema"]["shadow_params"].pop()


def grow_a_weight(file):
    file["state_dict"]["backbone.blocks.0.mlp.0.bias"] = torch.zeros(7)
    file["ema"]["shadow_params"] = [tensor for name, tensor in file["state_dict"].items()
                                    if "inv_freq" not in name]


def round_the_average(file):
    file["ema"]["shadow_params"] = [tensor.int() for tensor in file["ema"]["shadow_params"]]


@pytest.mark.parametrize("change, reason", [
    (lose_the_average, "ValueError: it has no moving average"),
    (round_the_average, "ValueError: its moving average does not hold floating-point numbers"),
    (lose_a_weight, "ValueError: its moving average does not have the shapes of its network"),
    (grow_a_weight, "ValueError: blocks.0.mlp_in.bias does not fit the authors' network"),
    (lambda file: file.update(state_dict={}), "KeyError: 'rotary_emb.inv_freq'")])
def test_other_networks_are_refused(change, reason, tmp_path, monkeypatch):
    path = release(tmp_path / "flm.ckpt", change)
    assert mistake(monkeypatch, *BASE, f"--init_from={path}") == (
        f"error: {path} is no checkpoint of train.py or distill.py, nor one the authors released "
        f"({reason})")


def test_missing_facts_are_asked_for(vocabulary, monkeypatch):
    path = OURS / "released_fmlm.ckpt"
    command = [*BASE, f"--init_from={path}"]
    assert mistake(monkeypatch, *command) == (
        f"error: {path} does not say how many tokens its texts have; give --block_size")
    command += ["--block_size=5"]
    assert mistake(monkeypatch, *command) == (
        "error: the checkpoint does not hold its 12 tokens; give --vocabulary=vocab.txt (for LM1B "
        "the one of bert-base-uncased)")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert mistake(monkeypatch, *command, f"--vocabulary={vocabulary}") == (
        "error: --vocabulary needs the package tokenizers; run: pip install tokenizers")


def test_wrong_vocabularies_are_refused(tmp_path, vocabulary, monkeypatch):
    pytest.importorskip("tokenizers", reason="decoding a WordPiece vocabulary needs tokenizers")
    command = [*BASE, f"--init_from={OURS / 'released_fmlm.ckpt'}", "--block_size=5"]
    assert mistake(monkeypatch, *command, "--vocabulary=none.txt") == (
        "error: no vocabulary none.txt; bert-base-uncased has its as vocab.txt")
    vocabulary.write_text("\n".join(WORDS[:5]))
    assert mistake(monkeypatch, *command, f"--vocabulary={vocabulary}") == (
        f"error: {vocabulary} has 5 tokens, the checkpoint 12")
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text("{")
    assert mistake(monkeypatch, *command, f"--vocabulary={damaged}").startswith(
        f"error: {damaged} is no vocabulary (")


def test_teachers_of_another_kind_or_vocabulary_are_refused(tmp_path, monkeypatch):
    write_toy(tmp_path / "data")
    command = ["distill.py", f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path}",
               "--device=cpu", "--block_size=5"]
    path = OURS / "released_fmlm.ckpt"
    assert mistake(monkeypatch, *command, f"--teacher_path={path}") == (
        f"error: {path} is a flow map (FMLM, from distill.py); what is needed here is a flow (FLM, "
        f"from train.py)")
    assert mistake(monkeypatch, *command, f"--teacher_path={OURS / 'released_flm.ckpt'}") == (
        f"error: {tmp_path / 'data'} has another vocabulary than the checkpoint; train on the set "
        f"it was trained on")
