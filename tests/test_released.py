"""python -m pytest tests/test_released.py

Checkpoints that other programs wrote: read, sampled, distilled, and refused where damaged.

- In the authors' layouts: fixtures/released_*.ckpt, two tiny networks with the outputs that a
  second, independent program computes (make_released.py). The other layouts are made from these.
- LM1B in BERT's tokens, which their networks for that set read.
- By train.py and distill.py of commit bc6711d: fixtures/old, from a few steps on programs.py's toy
  set. golden.pt holds noise and the tokens that commit decoded from it.
"""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from programs import QUICK, inside, log, mistake, quick_run, same, write_set, write_toy

import flow
import flowmap
from data import corpus, loader, tokenizer
from lib import checkpoint as ckpt
from lib import released

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


def log_probs(path, golden, n_head=0):
    """What our network makes of the golden dense state, through z = x E."""
    checkpoint = ckpt.load_checkpoint(path, n_head=n_head)
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


def add_module(name, before, averaged, teacher=False):
    """A `change` that puts a module before the first name with `before` in it: three parameters of
    shapes that the network has, too, or a whole teacher."""
    def change(file):
        theirs, average = file["state_dict"], iter(file["ema"]["shadow_params"])
        shadow = {n: None if "inv_freq" in n else next(average) for n in theirs}
        shapes = dict(weight=(4, 256), bias=(4,), norm=(16,))
        new = {f"{name}.{n}": t + 1 for n, t in theirs.items()} if teacher else {
            f"{name}.{n}": torch.randn(shape) for n, shape in shapes.items()}
        at = [before in n for n in theirs].index(True) if before else len(theirs)
        names = [*theirs][:at] + [*new] + [*theirs][at:]
        file["state_dict"] = {n: (theirs | new)[n] for n in names}
        file["ema"]["shadow_params"] = [
            (shadow | new)[n] for n in names
            if "inv_freq" not in n and (n in shadow or averaged)]
    return change


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("change, left_out", [
    (("backbone.learnable_loss_weighting", "blocks.0"), "learnable_loss_weighting"),
    (("learnable_loss_weighting", ""), "learnable_loss_weighting"),
    (("noise", "vocab_embed"), "noise"),
    (("teacher_model", "", "whole"), "teacher_model"),
    (("teacher_model", "vocab_embed", "whole"), "teacher_model")])
def test_other_modules_are_left_out(change, left_out, averaged, tmp_path, capfd):
    """Wherever they stand, in the average, too. The network's part is found by place and shape."""
    for kind in ("flm", "fmlm"):
        name, before, *teacher = change
        path = release(tmp_path / f"{kind}.ckpt", add_module(name, before, averaged, teacher))
        golden = torch.load(OURS / f"released_{kind}.ckpt")["golden"]
        assert torch.allclose(log_probs(path, golden), golden["log_probs"], atol=1e-4, rtol=0)
        assert capfd.readouterr().err == (
            f"{path}: left out what is not the network's: {left_out}\n")


def export(folder, kind, prefix="", rotary=True, config=None, extra=None):
    """A released file as model.safetensors, with a config.json if asked."""
    safetensors = pytest.importorskip("safetensors.torch", reason="exports are read by safetensors")
    file = torch.load(OURS / f"released_{kind}.ckpt")
    average = iter(file["ema"]["shadow_params"])
    weights = {}
    for name, tensor in file["state_dict"].items():
        buffer = "inv_freq" in name
        name = prefix + name.replace("_orig_mod.", "").removeprefix("backbone.")
        if rotary or not buffer:
            weights[name] = tensor if buffer else next(average)
    folder.mkdir(exist_ok=True)
    safetensors.save_file(weights | (extra or {}), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


@pytest.mark.parametrize("kind", ["flm", "fmlm"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "_orig_mod.", "backbone._orig_mod."])
@pytest.mark.parametrize("heads", ["rotary", "config", "n_head"])
def test_exports(kind, prefix, heads, tmp_path):
    golden = torch.load(OURS / f"released_{kind}.ckpt")["golden"]
    config = dict(config=dict(sampling=dict(steps=8), model=dict(n_heads=2, length=7)))
    extra = {f"{prefix}learnable_loss_weighting.weight": torch.zeros(4, 256)}
    path = export(tmp_path, kind, prefix, heads == "rotary", config if heads == "config" else None,
                  extra)
    n_head = 2 if heads == "n_head" else 0
    assert torch.allclose(log_probs(path, golden, n_head), golden["log_probs"], atol=1e-4, rtol=0)
    length = ckpt.load_checkpoint(path, n_head=n_head)["model_config"]["block_size"]
    assert length == (7 if heads == "config" else 0)


def test_a_teacher_behind_a_module_of_the_backbone(tmp_path):
    """Its weights have the network's shapes, side by side; the whole file's order tells them apart.
    Counts are no weights."""
    golden = torch.load(OURS / "released_fmlm.ckpt")["golden"]

    def change(file):
        add_module("backbone.learnable_loss_weighting", "blocks.0", True)(file)
        add_module("teacher_model", "", True, teacher=True)(file)
    path = release(tmp_path / "fmlm.ckpt", change)
    assert torch.allclose(log_probs(path, golden), golden["log_probs"], atol=1e-4, rtol=0)
    path = export(tmp_path, "fmlm", extra={"metrics.count": torch.tensor(3)})
    assert torch.allclose(log_probs(path, golden), golden["log_probs"], atol=1e-4, rtol=0)


def test_exports_in_half_precision(tmp_path):
    """Are computed with in float32."""
    path = export(tmp_path, "flm")
    from safetensors.torch import load_file, save_file
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    ema = ckpt.load_checkpoint(path)["ema"]
    assert {tensor.dtype for tensor in ema.values()} == {torch.float32}


def test_what_an_export_does_not_say_is_asked_for(tmp_path, monkeypatch):
    path = export(tmp_path, "fmlm", rotary=False)
    command = [*BASE, f"--init_from={path}"]
    assert mistake(monkeypatch, *command) == (
        f"error: {path} does not say how many heads its attention has; give --n_head (the "
        f"published networks have 12)")
    assert mistake(monkeypatch, *command, "--n_head=2") == (
        f"error: {path} does not say how many tokens its texts have; give --block_size")
    assert mistake(monkeypatch, *command, "--n_head=3") == (
        f"error: {path} is no checkpoint of train.py or distill.py, nor one the authors released "
        f"(ValueError: n_embd=16 must be an even multiple of n_head=3)")
    path = export(tmp_path, "fmlm")
    assert mistake(monkeypatch, *command, "--n_head=4") == (
        f"error: n_head=4: the network of {path} has 2 heads; leave it at 0")
    for damaged in ("{", "[1]", "null"):  # tells nothing
        (tmp_path / "config.json").write_text(damaged)
        assert mistake(monkeypatch, *command).endswith("give --block_size")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert mistake(monkeypatch, *command) == (
        f"error: {path} needs the package safetensors; run: pip install safetensors")


def test_other_safetensors_are_refused(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="exports are read by safetensors")
    path = tmp_path / "other.safetensors"
    safetensors.save_file({"model.embed.weight": torch.zeros(2, 2)}, path)
    refused = (f"error: {path} is no checkpoint of train.py or distill.py, nor one the authors "
               f"released (")
    assert mistake(monkeypatch, *BASE, f"--init_from={path}") == (
        f"{refused}ValueError: it has no vocab_embed.embedding)")
    path.write_bytes(path.read_bytes()[:50])
    assert mistake(monkeypatch, *BASE, f"--init_from={path}").startswith(
        f"{refused}SafetensorError: ")


def test_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    golden, asked = torch.load(OURS / "released_fmlm.ckpt")["golden"], []
    cache = tmp_path / "snapshots" / "revision"
    cache.parent.mkdir()

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(cache)
    command = [*BASE, "--init_from=hf:owner/name"]
    assert mistake(monkeypatch, *command) == (
        "error: cannot fetch hf:owner/name from the Hugging Face hub (LocalEntryNotFoundError); "
        "check the name, or give the path of a copy, with its config.json beside it")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    export(cache, "fmlm", rotary=False, config=dict(n_heads=2))
    assert torch.allclose(log_probs("hf:owner/name", golden), golden["log_probs"], atol=1e-4,
                          rtol=0)
    assert asked == [("owner/name", dict(allow_patterns=["*.safetensors", "*config.json"]))]
    (cache / "fmlm").mkdir()                                        # config.json stays above it
    model = (cache / "model.safetensors").rename(cache / "fmlm" / "model.safetensors")
    assert log_probs("hf:owner/name", golden).shape == golden["log_probs"].shape
    model.rename(model.with_suffix(".bin"))
    assert mistake(monkeypatch, *command) == (
        "error: hf:owner/name has 0 .safetensors files, not one; download what you want and give "
        "its path")


def test_network_is_built_from_the_shapes():
    for kind in ("flm", "fmlm"):
        checkpoint = ckpt.load_checkpoint(OURS / f"released_{kind}.ckpt")
        expected = dict(vocab_size=12, n_layer=2, n_head=2, n_embd=16, n_time=4, time_scale=1,
                        attention_softcap=50, logit_softcap=30, learned_positions=False,
                        flow_map=kind == "fmlm")
        assert checkpoint["kind"] == kind
        assert checkpoint["model_config"] == checkpoint["model_config"] | expected


def widen(V, likeliest=None):
    """A `change` that gives the network V tokens, one of them far likelier than others."""
    def change(file):
        average = iter(file["ema"]["shadow_params"])
        for name, tensor in file["state_dict"].items():
            if tensor.size(0) == 12:
                file["state_dict"][name] = torch.zeros(V, *tensor.shape[1:])
        file["ema"]["shadow_params"] = [t.new_zeros(V, *t.shape[1:]) if t.size(0) == 12 else t
                                        for t in average]
        if likeliest is not None:
            bias, = (t for t in file["ema"]["shadow_params"] if t.shape == (V,))
            bias[likeliest] = 100
    return change


@pytest.mark.parametrize("V, length", [(50257, 1024), (50258, 1024), (30522, 128)])
def test_length_of_the_published_models(V, length, tmp_path):
    """Their files do not say it; their vocabularies do."""
    checkpoint = ckpt.load_checkpoint(release(tmp_path / "flm.ckpt", widen(V)))
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
    tokenizers = pytest.importorskip("tokenizers", reason="reading a tokenizer.json needs it")
    from lib.released import read_vocabulary
    ids = [WORDS.index(word) for word in "[CLS] the cat ##s sat . [SEP]".split()]
    vocabulary_json = vocabulary.with_suffix(".json")
    tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {word: i for i, word in enumerate(WORDS)})).save(str(vocabulary_json))
    for path in (vocabulary, vocabulary_json):
        assert read_vocabulary(str(path), 12).decode([*ids, 12]) == "[CLS] the cats sat. [SEP]"


def test_spaces_before_signs_are_removed_as_by_a_bert_tokenizer():
    """With transformers as the judge, which calls it a clean-up."""
    transformers = pytest.importorskip("transformers", "5.0", reason="the judge is transformers")
    words = "cat . , ? ! ' n't 'm 's 've 're m s can # dogs".split()
    pieces, rng = loader.WordPieces("bert", words), np.random.default_rng(0)
    clean = transformers.PreTrainedTokenizerBase.clean_up_tokenization
    for row in rng.integers(len(words), size=(2000, 12)).tolist():
        expected = clean(None, " ".join(words[i] for i in row))
        assert pieces.decode(row) == expected


def test_a_tokenizer_json_says_where_texts_end(tmp_path, monkeypatch):
    """As the encoding that stands for it: the end of text stays, padding is nothing."""
    tokenizers = pytest.importorskip("tokenizers", reason="reading a tokenizer.json needs it")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    bpe.decoder = tokenizers.decoders.Fuse()
    bpe.add_special_tokens(["<|endoftext|>", "[PAD]"])              # 2 and 3
    bpe.save(str(tmp_path / "tokenizer.json"))
    for n, text in ((4, "a[PAD]"), (3, "a")):
        found = released.read_vocabulary(str(tmp_path / "tokenizer.json"), n)
        assert found.n_vocab == 4 and loader.text_of(found, [0, 3, 2, 1]) == text
        assert loader.text_of(found, [2, 0, 2, 1]) == "a\n\nb"


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

@pytest.fixture(scope="module")
def gpt2():
    """A stand-in for GPT-2's encoding: 50,256 characters and the end of text."""
    return tokenizer.encoding("gpt2", tokenizer.CHARACTER, [chr(i) for i in range(256, 50512)],
                              ("<|endoftext|>",))


def test_padding_is_never_decoded(tmp_path, monkeypatch, gpt2):
    """The network keeps it as its last token, here the likeliest; the texts lack it."""
    monkeypatch.setattr(released, "gpt2_encoding", lambda: gpt2)
    for V, encoding in ((50257, gpt2), (50258, gpt2), (50258, None)):
        found = released.find_tokenizer(V, "") if encoding else loader.tokenizer_from_dict(
            tokenizer.to_dict(gpt2))
        assert loader.text_of(found, [0, 50257, 1, 50256, 2]) == chr(256) + chr(257)
    path, out = release(tmp_path / "fmlm.ckpt", widen(50258, likeliest=50257)), tmp_path / "a.jsonl"
    inside(monkeypatch, *BASE, f"--init_from={path}", "--block_size=5", f"--out={out}")
    assert [(r["text"], r["tokens"]) for r in log(out)] == [("", [50257] * 5)] * 3


def test_a_teacher_with_padding(tmp_path, gpt2):
    """Is distilled on GPT-2's 50,257 tokens. Its flow map is sampled and judged."""
    ids = np.random.default_rng(0).integers(50257, size=400)
    corpus.write_bins(tmp_path / "data", gpt2, [ids], [ids[:100]], None)
    path = release(tmp_path / "flm.ckpt", widen(50258, likeliest=50257))
    common = ["--device=cpu", "--dtype=float32", f"--dataset={tmp_path / 'data'}"]
    common += ["--block_size=5"]
    quick_run("distill.py", *QUICK, f"--teacher_path={path}", "--batch_size=4", "--max_iters=3",
              "--eval_iters=1", *common, f"--out_dir={tmp_path}")
    out = tmp_path / "a.jsonl"
    quick_run(*BASE, f"--out_dir={tmp_path}", f"--out={out}")
    assert [(r["text"], r["tokens"]) for r in log(out)] == [("", [50257] * 5)] * 3
    said = quick_run("eval/evaluate.py", f"--source={tmp_path / 'fmlm.pt'},{path}", *common,
                     "--num_samples=4", "--scorer=")
    assert "fmlm, 1 steps" in said and "\nflm, 1 steps" in said
    assert "left out" not in quick_run("eval/evaluate.py", f"--source={out}", *common, "--scorer=")


@pytest.mark.parametrize("V, size, name, pattern, same", [
    (50257, 50257, "gpt2", "", True), (50258, 50257, "gpt2", "", True),
    (50257, 50257, "mine", "", False), (50258, 50257, "mine", "", False),
    (50258, 50258, "gpt2", "", False), (50257, 50256, "gpt2", "", False),
    (30522, 30522, "any", "WordPiece", True), (30522, 30522, "any", "", False),
    (12, 12, "any", "", True), (13, 12, "any", "", False)])
def test_sets_of_a_released_network(V, size, name, pattern, same):
    data = SimpleNamespace(path=Path("data/x/train.bin"), meta=dict(vocab_size=size, tokenizer="0"),
                           tokenizer=dict(name=name, pat_str=pattern))
    checkpoint = dict(vocabulary=None, model_config=dict(vocab_size=V))
    if same:
        return ckpt.require_same_vocabulary(checkpoint, data)
    with pytest.raises(SystemExit):
        ckpt.require_same_vocabulary(checkpoint, data)

# ------------------------------------------------------------------------------ LM1B as they read

@pytest.mark.parametrize("spaced, written", [
    ("The cat , the dog ; a mat : all sat .", "The cat, the dog; a mat: all sat."),
    ("He said : \" I 'm in , \" and left .", 'He said: "I\'m in," and left.'),
    ("Don 't ! Why ? It 's Tom 's .", "Don't! Why? It's Tom's."),
    ("wait . . . no", "wait... no"),
    ("pay $ 5 ( or £ 3 ) and / or [ sic ] more", "pay $5 (or £3) and/or [sic] more"),
    ("see http : / / a.com / b", "see http://a.com/b"),
    ("the ' big ' cat", "the 'big' cat"),
    ("3.5 per cent of 1,000", "3.5 per cent of 1,000")])
def test_detokenizing_lm1b(spaced, written):
    prepare = runpy.run_path(str(ROOT / "data" / "lm1b" / "prepare.py"))
    assert prepare["detokenized"](spaced) == written


@pytest.fixture
def lm1b(tmp_path, vocabulary, monkeypatch):
    """How to prepare three sentences in word pieces, one of them held out."""
    pytest.importorskip("tokenizers", reason="cutting text into word pieces needs tokenizers")
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("The cats sat .\n\nA dog , on the mat .\nOn a mat sat the cat .\n")
    return ["data/lm1b/prepare.py", f"--file={sentences}", "--val_docs=1", "--block_size=6",
            "--num_proc=1", f"--vocabulary={vocabulary}", f"--out_dir={tmp_path / 'lm1b'}"]


def test_lm1b_in_word_pieces(lm1b, tmp_path, monkeypatch, capsys):
    """By hand. What is left over, `mat .` and the [SEP] behind it, makes no row."""
    inside(monkeypatch, *lm1b)
    ids = [np.fromfile(tmp_path / "lm1b" / f"{split}.bin", np.uint16).reshape(-1, 6)
           for split in ("train", "val")]
    assert [[" ".join(WORDS[i] for i in row) for row in rows] for rows in ids] == [
        ["[CLS] the cat ##s sat [SEP]", "[CLS] . [SEP] a [UNK] [SEP]",
         "[CLS] [UNK] on the mat [SEP]"],
        ["[CLS] on a mat sat [SEP]", "[CLS] the cat . [SEP] [SEP]"]]
    data = loader.Data(str(tmp_path / "lm1b"), "train", 6, 0)
    encoding = loader.tokenizer_from_dict(data.tokenizer)
    assert (data.meta["vocab_size"], encoding.words) == (12, WORDS)
    assert loader.text_of(encoding, [2, 4, 5, 7, 6, 11, 3]) == "[CLS] the cats sat. [SEP]"
    assert tokenizer.encode_text(encoding, "[CLS] the cats sat. [SEP]").tolist() == [
        2, 4, 5, 7, 6, 11, 3]
    assert encoding.decode([4, 12, 5]) == "the cat"     # nothing for what is past the vocabulary
    capsys.readouterr()
    inside(monkeypatch, *lm1b)
    assert "already there, with these settings" in capsys.readouterr().out


def test_distilling_and_judging_on_word_pieces(lm1b, tmp_path, monkeypatch):
    inside(monkeypatch, *lm1b)
    common = ["--device=cpu", "--dtype=float32", f"--dataset={tmp_path / 'lm1b'}"]
    quick_run("distill.py", *QUICK, f"--teacher_path={OURS / 'released_flm.ckpt'}", "--max_iters=3",
              "--block_size=6", "--batch_size=8", *common, f"--out_dir={tmp_path / 'out'}")
    out = tmp_path / "texts.jsonl"
    quick_run(*BASE, f"--out_dir={tmp_path / 'out'}", "--steps=1,2", f"--out={out}")
    encoding = loader.WordPieces("", WORDS)
    assert [encoding.decode(r["tokens"]) for r in log(out)] == [r["text"] for r in log(out)]
    said = quick_run("eval/evaluate.py", *common, "--num_samples=4", "--scorer=", "--block_size=6",
                     f"--source={tmp_path / 'out' / 'fmlm.pt'},{OURS / 'released_flm.ckpt'},{out}")
    assert all(name in said for name in ("held-out text", "fmlm, 1 steps", "\nflm, 1 steps"))
    assert f"{out} steps=2" in said


def test_bad_vocabularies_of_lm1b(lm1b, vocabulary, monkeypatch):
    for words, message in (
            (WORDS[:2] + WORDS[3:], "the vocabulary has no [CLS]; bert-base-uncased has its as "
                                    "vocab.txt"),
            (WORDS + ["the"], f"{vocabulary} is no vocabulary (a line is empty or there twice)")):
        vocabulary.write_text("\n".join(words))
        assert mistake(monkeypatch, *lm1b) == f"error: {message}"
    vocabulary.write_text("\n".join(WORDS))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert mistake(monkeypatch, *lm1b) == (
        "error: cutting text into word pieces needs the package tokenizers; run: pip install "
        "tokenizers")

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
    (lambda file: file.update(state_dict={}), "ValueError: it has no vocab_embed.embedding")])
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
    described = vocabulary.with_suffix(".json")
    described.write_text("{}")
    assert mistake(monkeypatch, *command, f"--vocabulary={described}") == (
        "error: a tokenizer.json needs the package tokenizers; run: pip install tokenizers")


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
