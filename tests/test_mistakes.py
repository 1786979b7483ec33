"""python -m pytest tests/test_mistakes.py

What the programs say to a user's mistakes, word for word, in one line. Any other exception fails
these tests; only a bug keeps its traceback, which is tested too. See also test_resume.py for full
disks, test_released.py for released checkpoints, test_data.py for files and downloads.
"""

import sys

import pytest
import torch
from conftest import ROOT
from programs import TINY, inside, mistake, quick_run, write_set, write_toy

import flow
from lib.checkpoint import save_checkpoint


class Object:
    """Something a checkpoint should not hold."""


@pytest.fixture(scope="module")
def broken(toy, tmp_path_factory):
    """A folder of everything that can be wrong with a file, made from the toy run."""
    folder, out = tmp_path_factory.mktemp("broken"), toy[0] / "out"

    def damage(name, file, change):
        write_toy(folder / name)
        (folder / name / file).write_bytes(change((folder / name / file).read_bytes()))
    damage("empty", "train.bin", lambda content: b"")
    damage("cut", "train.bin", lambda content: content[:1000])
    damage("odd", "train.bin", lambda content: content + b"\0")
    damage("past", "train.bin", lambda content: b"\x10\0" * (len(content) // 2))
    for name, file, old, new in (
            ("no_json", "meta.json", b"{", b"{,"), ("no_dtype", "meta.json", b"dtype", b"type"),
            ("words", "meta.json", b'"vocab_size": 16', b'"vocab_size": "16"'),
            ("packed", "meta.json", b'"row_length": null', b'"row_length": 4'),
            ("retokenised", "tokenizer.json", b"(?s:.)", b"(?s:..)")):
        damage(name, file, lambda content: content.replace(old, new))
    (folder / "x.jsonl").mkdir()
    write_toy(folder / "no_bin")
    (folder / "no_bin" / "train.bin").unlink()
    write_set(folder / "other", "abcdefghijklmnop" * 60)

    whole = (out / "flm.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for name, content in (("garbage", b"not a checkpoint"), ("nothing", b""),
                          ("half", whole[:len(whole) // 2]), ("flipped", bytes(flipped))):
        (folder / f"{name}.pt").write_bytes(content)
    for name in ("retrained", "swapped", "flow_only"):
        (folder / name).mkdir()
    for name, change in (
            ("newer.pt", lambda c: c.update(format="flm-2")), ("no_ema.pt", lambda c: c.pop("ema")),
            ("no_bias.pt", lambda c: c["ema"].pop("head.bias")),
            ("short.pt", lambda c: c["ema"].update({"head.bias": c["ema"]["head.bias"][:3]})),
            ("nan.pt", lambda c: c["ema"]["head.bias"].fill_(float("nan"))),
            ("retrained/flm.pt", lambda c: c["ema"]["embed.weight"].add_(1))):
        checkpoint = torch.load(out / "flm.pt")
        change(checkpoint)
        torch.save(checkpoint, folder / name)
    torch.save({"model": torch.zeros(3)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"state_dict": {}, "settings": Object()}, folder / "object.pt")
    for name, source in (("retrained/fmlm.pt", "fmlm.pt"), ("swapped/flm.pt", "fmlm.pt"),
                         ("swapped/fmlm.pt", "flm.pt"), ("flow_only/flm.pt", "flm.pt")):
        (folder / name).write_bytes((out / source).read_bytes())
    (folder / "a_file").write_text("x")
    (folder / "latin1.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1"))
    return folder


PARTS = dict(  # of several messages
    given="on the command line: expected",
    sets="the sets that can be prepared are captions, chat, lm1b, owt, palindromes, "
         "shakespeare_char, stories, text, tinystories",
    force="run its prepare.py with --force",
    written="bytes where 2,000 tokens of 2 bytes were written; run its prepare.py with --force",
    vocabulary="has another vocabulary than the checkpoint; train on the set it was trained on",
    positions="block_size=4: the network has learned its 8 positions; leave it at 0",
    writers="train.py writes flm.pt, distill.py reads it and writes fmlm.pt",
    again="resume with that, or start again with --init_from=scratch",
    damaged="is damaged, or no checkpoint at all",
    foreign="is no checkpoint of train.py or distill.py, nor one the authors released",
    local="on the Hub (OfflineModeIsEnabled); without a network, give a local copy with --file",
    weak="weak goes with neither flow_steps nor weak_dropout; leave them out",
    unguided="weak and weak_dropout are for guidance; add --guidance=2, say",
    mend="mend has a loss of its own, on the student's drafts; set diagonal_share=0, target_ema; "
         "leave out objective, self_distill, split, teacher_temperature",
    wants_map="is a flow (FLM, from train.py); what is needed here is a flow map (FMLM, from "
              "distill.py)",
    wants_flow="is a flow map (FMLM, from distill.py); what is needed here is a flow (FLM, from "
               "train.py)")
CASES = [
    # settings
    ("train.py --lerning_rate=1",
     "unknown setting 'lerning_rate' on the command line; did you mean 'learning_rate'?"),
    ("train.py --max_iters=ten", "max_iters=ten {given} a whole number, such as 1000"),
    *((f"train.py --learning_rate={rate}",
       f"learning_rate={rate} {{given}} a finite number, such as 0.002")
      for rate in ("fast", "nan", "inf")),
    ("train.py --compile=maybe", "compile=maybe {given} true or false, such as False"),
    ("train.py --seed=99999999999999999999",
     "seed=99999999999999999999 {given} a whole number, such as 1"),
    ("train.py --seed", "--seed needs a value, such as --seed=1"),
    ("train.py --seed --compile", "--seed needs a value, such as --seed=1"),
    ("train.py --out_dir=x config/owt.py",
     "cannot read 'config/owt.py'; give settings as --key=value, a config file first"),
    ("train.py -lr 1", "cannot read '-lr'; give settings as --key=value, a config file first"),
    ("train.py --init_from=gpt2", "init_from=gpt2: choose scratch, resume, auto"),
    ("train.py --dtype=int8", "dtype=int8: choose auto, bfloat16, float16, float32"),
    ("train.py --method=gpt", "method=gpt: choose flm, ar, dense, duo, mdlm, mse, noclock"),
    ("train.py --optimizer=sgd", "optimizer=sgd: choose adamw, muon"),
    ("train.py --schedule=linear", "schedule=linear: choose constant, cosine"),
    ("distill.py --objective=mse", "objective=mse: choose psd, lsd, esd"),
    ("sample.py --model=gpt", "model=gpt: choose auto, flm, fmlm"),
    ("train.py --batch_size=0", "batch_size=0: must lie in [1, inf)"),
    ("train.py --max_iters=-5", "max_iters=-5: must lie in [1, inf)"),
    ("train.py --learning_rate=-1e-3", "learning_rate=-0.001: must lie in (0, inf)"),
    ("train.py --warmup_iters=-1", "warmup_iters=-1: must lie in [0, inf)"),
    ("train.py --ema_decay=1", "ema_decay=1.0: must lie in [0, 1)"),
    ("train.py --beta2=1.5", "beta2=1.5: must lie in [0, 1)"),
    ("train.py --n_layer=0", "n_layer=0: must lie in [1, inf)"),
    ("train.py --n_head=3", "n_embd=16 must be an even multiple of n_head=3"),
    ("train.py --dropout=2", "dropout=2.0: must lie in [0, 1)"),
    ("train.py --replaced_share=1.5", "replaced_share=1.5: must lie in [0, 1]"),
    ("train.py --method=mdlm --replaced_share=0.1", "replaced_share is for method=flm; add "
     "--replaced_share=0 for mdlm"),
    ("train.py --replaced_share=0.1 --batch_size=1", "replaced_share takes tokens from other rows "
     "of a batch; set batch_size above 1"),
    ("train.py --clock_embedding_share=2", "clock_embedding_share=2.0: must lie in [0, 1]"),
    ("train.py --seed=-1", "seed=-1: must lie in [0, inf)"),
    ("train.py --learning_rate=1e-5", "the cosine would rise from learning_rate=1e-05 to "
     "min_lr=0.0001; lower min_lr, or set schedule=constant"),
    ("train.py --method=ar --attention_softcap=50",
     "method=ar has no soft cap on its attention; add --attention_softcap=0"),
    ("distill.py --diagonal_share=1", "diagonal_share=1.0: must lie in [0, 1)"),
    ("distill.py --diagonal_share=0.999",
     "diagonal_share=0.999 of batch_size=64 leaves no row for jumps"),
    ("distill.py --batch_size=1",
     "diagonal_share=0.5 of batch_size=1 leaves no row for the diagonal"),
    ("distill.py --diagonal_share=0",
     "objective=psd learns the flow from the diagonal alone; set diagonal_share above 0"),
    *((f"distill.py --mend {rest}", "{mend}") for rest in (
        "--target_ema", "--diagonal_share=0",
        *(f"--target_ema --diagonal_share=0 --{one}" for one in (
            "objective=lsd", "self_distill", "split=0.2", "teacher_temperature=2")))),
    ("distill.py --mend --target_ema --diagonal_share=0 --start_from={toy}/out/flm.pt",
     "{toy}/out/flm.pt {wants_map}"),
    ("distill.py --start_from={toy}/out/fmlm.pt",
     "start_from is the flow map that mend improves; add --mend, or leave it out"),
    ("distill.py --self_distill --teacher_temperature=1.2",
     "self_distill learns from the data, not from a teacher; add --teacher_temperature=1"),
    ("distill.py --full_jump_share=-0.5", "full_jump_share=-0.5: must lie in [0, 1]"),
    ("distill.py --block_size=4", "{positions}"),
    ("distill.py --context_share=0.3",
     "{toy}/out/flm.pt was trained with context_share=0; distil it with --context_share=0"),
    *((f"sample.py --steps={steps}",
       f"steps={steps}: expected positive numbers up to 1,000,000, such as 1,2,4,8")
      for steps in ("0", "1,99999999", "1,x")),
    ("sample.py --temperature=1e-40", "temperature=1e-40: must lie in [1e-3, 1e3]"),
    ("sample.py --gamma=2", "gamma=2.0: must lie in [0, 1]"),
    ("sample.py --num_samples=0", "num_samples=0: must lie in [1, inf)"),
    ("sample.py --flow_steps=-1", "flow_steps=-1: must lie in [0, 1000000]"),
    ("sample.py --block_size=4", "{positions}"),
    ("sample.py --guidance=0", "guidance=0.0: must lie in [1e-3, 1e3]"),
    ("sample.py --weak_dropout=1", "weak_dropout=1.0: must lie in (0, 1)"),
    ("sample.py --order=first", "order=first: choose confidence, random"),
    ("sample.py --order=random", "order=random is for refining; add --refine=8, say"),
    ("sample.py --weak=x.pt", "{unguided}"),
    ("sample.py --weak_dropout=0.5", "{unguided}"),
    ("sample.py --weak=x.pt --guidance=2 --flow_steps=2", "{weak}"),
    ("sample.py --weak=x.pt --guidance=2 --weak_dropout=0.5", "{weak}"),
    *((f"sample.py --refine=2 --{other}=0.5",
       "refine goes with none of gamma, temperature, guidance and flow_steps; leave them out")
      for other in ("gamma", "temperature", "guidance")),
    ("sample.py --refine=2 --model=flm",
     "refine is for flow maps, and {toy}/out/flm.pt is a flow; distill.py makes its map"),
    ("sample.py --guidance=2 --model=flm --weak={broken}/retrained/flm.pt",
     "{broken}/retrained/flm.pt has another E than {toy}/out/flm.pt; only earlier checkpoints of "
     "its distillation have the same, those of a flow do not"),
    ("sample.py --guidance=2 --weak={toy}/out/flm.pt", "{toy}/out/flm.pt {wants_map}"),
    ("sample.py --refine=9", "refine=9: must lie in [0, 8]"),
    *((f"sample.py {words}", "{toy}/out/fmlm.pt was trained with context_share=0, so it cannot be "
       "told tokens, as prompt, fill and refine do; set context_share=0.3 in train.py and "
       "distill.py")
      for words in ("--refine=2", "--prompt=the", "--fill={{2}}.")),
    ("sample.py --prompt=the --fill={{}}",
     "give prompt or fill, not both; a fill may begin with words, and need not end a text"),
    ("sample.py --fill={{0}}",
     "fill={{0}}: a blank needs a token at least; {{}} is one, {{3}} three"),
    ("sample.py --fill={{3", "fill={{3: a {{ is not closed; {{3}} is a blank of three tokens"),
    ("sample.py --fill=the", "fill=the has no blank and is no file; {{}} is one token, {{3}} "
     "three; use --prompt for the beginning of a text"),
    ("sample.py --fill={broken}/latin1.txt", "cannot read {broken}/latin1.txt (not UTF-8 text)"),
    ("sample.py --flow_steps=4 --init_from={toy}/out/fmlm.pt",
     "flow_steps compares a flow map in out_dir with the flow beside it; leave out init_from"),
    # the machine
    *((f"train.py --device={name}",
       f"device={name}: PyTorch cannot use it here; choose auto, cpu, cuda or mps")
      for name in ("gpu", "meta")),
    ("train.py --device=cuda",
     "device=cuda, but this PyTorch sees no CUDA device; use --device=cpu"),
    ("train.py --wandb_project=x",
     "wandb_project is set but wandb is missing; run: pip install wandb"),
    # data
    ("train.py --dataset=nowhere", "no data in {root}/data/nowhere; {sets}"),
    ("train.py --dataset=owt", "no data in {root}/data/owt; run: python data/owt/prepare.py"),
    ("train.py --dataset={broken}/no_bin", "no data in {broken}/no_bin; {sets}"),
    ("train.py --dataset={broken}/empty", "{broken}/empty/train.bin has 0 {written}"),
    ("train.py --dataset={broken}/cut", "{broken}/cut/train.bin has 1,000 {written}"),
    ("train.py --dataset={broken}/odd", "{broken}/odd/train.bin has 4,001 {written}"),
    ("train.py --dataset={broken}/past",
     "{broken}/past/train.bin holds token 16, past its vocabulary of 16"),
    ("train.py --dataset={broken}/no_json", "{broken}/no_json is damaged (JSONDecodeError: "
     "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {force}"),
    ("train.py --dataset={broken}/no_dtype",
     "{broken}/no_dtype is damaged (KeyError: 'dtype'); {force}"),
    ("train.py --dataset={broken}/words", "{broken}/words is damaged (TypeError: meta.json has "
     "something else for a number); {force}"),
    ("train.py --dataset={broken}/retokenised", "{broken}/retokenised is damaged (ValueError: "
     "tokenizer.json is not the one of meta.json); {force}"),
    ("train.py --dataset={broken}/packed",
     "{broken}/packed/train.bin holds rows of 4 tokens; set --block_size=4"),
    ("train.py --block_size=500",
     "{toy}/data/val.bin has 400 tokens, fewer than block_size=500"),
    ("distill.py --dataset={broken}/other", "{broken}/other {vocabulary}"),
    ("train.py --init_from=resume --dataset={broken}/other", "{broken}/other {vocabulary}"),
    # checkpoints
    ("distill.py --out_dir=nowhere", "no checkpoint nowhere/flm.pt; {writers}"),
    ("sample.py --out_dir=nowhere", "no checkpoint nowhere/fmlm.pt; {writers}"),
    ("sample.py --init_from=none.ckpt", "no checkpoint none.ckpt; {writers}"),
    ("train.py --init_from=resume --out_dir=nowhere", "no checkpoint nowhere/flm.pt; {writers}"),
    ("train.py --init_from=resume --block_size=4",
     "{toy}/out/flm.pt was made with block_size=8, not 4; {again}"),
    ("train.py --init_from=resume --seed=2",
     "{toy}/out/flm.pt was made with seed=1, not 2; {again}"),
    ("train.py --init_from=resume --optimizer=muon",
     "{toy}/out/flm.pt was made with optimizer=adamw, not muon; {again}"),
    ("train.py --start_from={toy}/out/flm.pt --n_layer=2",
     "{toy}/out/flm.pt was made with n_layer=1, not 2; start with that"),
    ("train.py --start_from={toy}/out/flm.pt --clock_embedding_share=1",
     "{toy}/out/flm.pt was made with clock_embedding_share=0.0, not 1.0; start with that"),
    ("distill.py --init_from=resume --objective=lsd",
     "{toy}/out/fmlm.pt was made with objective=psd, not lsd; {again}"),
    *((f"sample.py --init_from={{broken}}/{name}.pt", f"{{broken}}/{name}.pt {reason}")
      for name, reason in (
        ("garbage", "{damaged} (File is not a zip file)"),
        ("nothing", "{damaged} (File is not a zip file)"),
        ("half", "{damaged} (File is not a zip file)"),
        ("flipped", "{damaged} (wrong checksum of archive/data/40)"),
        ("foreign", "{foreign} (ValueError: it has neither a format nor a state_dict)"),
        ("list", "{foreign} (ValueError: it has neither a format nor a state_dict)"),
        ("newer", "{foreign} (ValueError: its format is 'flm-2')"),
        ("no_ema", "{foreign} (KeyError: 'ema')"),
        ("object", "holds Python objects besides tensors, and reading those can run any program; "
         "if you trust its origin, add --trust_checkpoint (sample.py, distill.py, "
         "eval/evaluate.py)"))),
    ("sample.py --init_from={broken}/object.pt --trust_checkpoint",
     "{broken}/object.pt {foreign} (ValueError: it has no vocab_embed.embedding)"),
    *((f"sample.py --init_from={{broken}}/{name}.pt",
       "the checkpoint's head.bias is missing, unexpected or not finite; use an earlier one")
      for name in ("no_bias", "nan")),
    ("sample.py --out_dir={broken}/retrained --flow_steps=2", "{broken}/retrained/flm.pt is not "
     "the flow that {broken}/retrained/fmlm.pt was distilled from; run distill.py again"),
    ("sample.py --init_from={toy}/out/flm.pt --model=fmlm", "{toy}/out/flm.pt {wants_map}"),
    ("sample.py --init_from={toy}/out/fmlm.pt --model=flm", "{toy}/out/fmlm.pt {wants_flow}"),
    ("sample.py --out_dir={broken}/swapped", "{broken}/swapped/fmlm.pt {wants_map}"),
    ("sample.py --out_dir={broken}/flow_only --model=fmlm",
     "no checkpoint {broken}/flow_only/fmlm.pt; {writers}"),
    ("distill.py --out_dir={broken}/swapped", "{broken}/swapped/flm.pt {wants_flow}"),
    ("distill.py --teacher_path={toy}/out/fmlm.pt", "{toy}/out/fmlm.pt {wants_flow}"),
    ("train.py --init_from=resume --out_dir={broken}/swapped",
     "{broken}/swapped/flm.pt {wants_flow}"),
    # places to write
    ("train.py --out_dir={broken}/a_file", "cannot write {broken}/a_file/flm.jsonl (File exists)"),
    ("sample.py --out=flm.pt", "out=flm.pt: give a name that ends in .jsonl"),
    ("sample.py --out={broken}", "out={broken}: give a name that ends in .jsonl"),
    ("sample.py --out={broken}/x.jsonl", "cannot write {broken}/x.jsonl (not a file)"),
    ("sample.py --out={broken}/a_file/x.jsonl",
     "cannot write {broken}/a_file/x.jsonl (File exists)"),
    ("eval/plot.py --out_dir=nowhere", "no log in nowhere; train.py writes one"),
    # preparing data
    ("data/owt/prepare.py --file={broken}/none.parquet", "{broken}/none.parquet: no such file"),
    ("data/owt/prepare.py --file={broken}/latin1.txt", "{broken}/latin1.txt: not UTF-8 text"),
    ("data/shakespeare_char/prepare.py --file={broken}/latin1.txt",
     "{broken}/latin1.txt: not UTF-8 text"),
    ("data/owt/prepare.py --out_dir={broken}/owt",
     "Couldn't reach 'Skylion007/openwebtext' {local}"),
    ("data/lm1b/prepare.py --out_dir={broken}/lm1b", "Couldn't reach 'dvruette/lm1b' {local}")]


@pytest.mark.parametrize("command, message", CASES)
def test_one_line(command, message, toy, broken, monkeypatch, tmp_path):
    if "device=cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has the CUDA device that the message says is missing")
    if "dataset=owt" in command and (ROOT / "data" / "owt" / "meta.json").exists():
        pytest.skip("data/owt is prepared here")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    script, *words = command.format(toy=toy[0], broken=broken).split()
    data, out = f"--dataset={toy[0] / 'data'}", f"--out_dir={toy[0] / 'out'}"
    fresh = out if "resume" in command else f"--out_dir={tmp_path}"
    usual = {"train.py": [data, fresh, "--device=cpu", *TINY],
             "distill.py": [data, out, "--device=cpu"], "sample.py": [out, "--device=cpu"]}
    assert mistake(monkeypatch, script, *usual.get(script, []), *words) == (
        "error: " + message.format_map(PARTS | dict(toy=toy[0], broken=broken, root=ROOT)))


def test_weights_of_another_shape(broken, monkeypatch):
    said = mistake(monkeypatch, "sample.py", f"--init_from={broken / 'short.pt'}", "--device=cpu")
    assert "\n" not in said
    assert said.startswith("error: the weights of the checkpoint do not fit its model_config (")


def test_a_process_alone_in_its_group(toy, monkeypatch, tmp_path):
    """Variables of torchrun left over in a shell, or a script started by hand."""
    for key, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    said = mistake(monkeypatch, "train.py", *toy[1], f"--out_dir={tmp_path}")
    assert said.startswith("error: process 1 did not find the others (") and "\n" not in said
    assert "); start all of them with torchrun, and on several machines name" in said


@pytest.mark.parametrize("rank, local, world", [
    ("1", "1", "1"), ("0", "0", "abc"), ("-1", "0", "2"), ("0", "0", "0"), ("0", "x", "1")])
def test_impossible_processes(rank, local, world, toy, monkeypatch, tmp_path):
    for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value)
    assert mistake(monkeypatch, "train.py", *toy[1], f"--out_dir={tmp_path}") == (
        f"error: RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={world} make no sense; start the "
        f"processes with torchrun, or unset all three")


@pytest.mark.parametrize("script", ["sample.py", "eval/evaluate.py", "baselines/distill.py"])
def test_programs_for_one_process(script):
    said = quick_run(script, "--device=cpu", processes=2, status=1)
    assert f"{script} runs as one process; start it with python" in said


@pytest.mark.parametrize("log_interval, found_at", [(1, 3), (100, 4)])
@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_a_loss_that_is_not_finite(toy, script, log_interval, found_at, monkeypatch, tmp_path):
    """One text of step 3 becomes NaN. The run stops at the next log line or validation and leaves
    the checkpoint of step 2."""
    corrupt, calls = flow.corrupt, []

    def corrupt_and_break(E, y, t, z0):
        z = corrupt(E, y, t, z0)
        if torch.is_grad_enabled():
            calls.append(None)
            if len(calls) == 3:
                z = torch.cat([z[:5], z[5:6] * float("nan"), z[6:]])
        return z
    monkeypatch.setattr("flow.corrupt", corrupt_and_break)
    monkeypatch.setattr("flowmap.corrupt", corrupt_and_break)
    shape = TINY if script == "train.py" else ["--batch_size=8"]
    said = mistake(
        monkeypatch, script, *toy[1], *shape, f"--out_dir={tmp_path}", "--eval_interval=2",
        f"--log_interval={log_interval}",
        *[f"--teacher_path={toy[0] / 'out' / 'flm.pt'}"] * (script == "distill.py"))
    assert said == (f"error: the loss is not finite at step {found_at}; the last checkpoint is "
                    f"untouched; try a lower learning_rate")
    kept = torch.load(tmp_path / {"train.py": "flm.pt", "distill.py": "fmlm.pt"}[script])
    assert kept["step"] == 2 and all(weight.isfinite().all() for weight in kept["model"].values())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    path = tmp_path / "flm.pt"
    save_checkpoint(path, dict(model={"w": torch.ones(2)}, step=1))
    with pytest.raises(SystemExit) as stopped:
        save_checkpoint(path, dict(model={"w": torch.tensor([1, float("nan")])}, step=2))
    assert stopped.value.code == (f"error: the weights diverged before step 2; {path} is left as "
                                  f"it was; try a lower learning_rate")
    assert torch.load(path)["step"] == 1


def test_a_bug_keeps_its_traceback(toy, monkeypatch, tmp_path):
    monkeypatch.setattr("flow.corrupt", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inside(monkeypatch, "train.py", *toy[1], *TINY, f"--out_dir={tmp_path}")


@pytest.mark.parametrize("script, key, value", [
    ("train.py", "clock_embedding_share", 0.5), ("train.py", "replaced_share", 0.5),
    ("train.py", "embed_lr_scale", 0.5), ("train.py", "mlp_ratio", 2),
    ("train.py", "beta2", 0.5),
    ("train.py", "gradient_accumulation_steps", 2), *(("distill.py", *item) for item in dict(
        self_distill=True, diagonal_share=0.25, full_jump_share=0.5, full_jump_ramp=True,
        split=0.2, target_ema=True, dropout=0.2, teacher_temperature=1.2).items())])
def test_what_a_resumed_run_may_not_change(toy, script, key, value, monkeypatch):
    shape = TINY if script == "train.py" else ["--batch_size=8"]
    said = mistake(monkeypatch, script, *toy[1], *shape, "--init_from=resume", f"--{key}={value}")
    assert f"was made with {key}=" in said and "\n" not in said


def test_a_resumed_map_of_another_flow(toy, broken, monkeypatch):
    other = broken / "retrained" / "flm.pt"
    said = mistake(monkeypatch, "distill.py", *toy[1], "--batch_size=8", "--init_from=resume",
                   f"--teacher_path={other}")
    assert said.endswith(f"was distilled from another network than {other}; give that as "
                         f"--teacher_path, or distil anew with --init_from=scratch")


def test_resuming_on_data_of_another_size(toy, tmp_path, monkeypatch):
    write_set(tmp_path / "data", "the cat sat on the mat. a dog ran to the red hut.\n" * 50)
    said = mistake(monkeypatch, "train.py", *toy[1], *TINY, "--init_from=resume",
                   f"--dataset={tmp_path / 'data'}")
    assert said == (f"error: {tmp_path / 'data'}/train.bin has 2,500 tokens, the run was started "
                    f"on 2,000")
