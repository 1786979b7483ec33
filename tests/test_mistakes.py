"""python -m pytest tests/test_mistakes.py

What the programs say to mistakes: one line each, word for word. No traceback for a mistake (any exception but the error
of one line fails these tests); a traceback for a bug, which is tested last. More of the same: full disks in
test_resume.py, released checkpoints in test_released.py, files and downloads in test_data.py.
"""

import sys

import pytest
import torch
from conftest import ROOT
from programs import TINY, mistake, quick_run, run, write_set, write_toy

import common
import flow


class Object:
    """Something a checkpoint should not hold."""


@pytest.fixture(scope="module")
def broken(toy, tmp_path_factory):
    """A folder of everything that can be wrong with a file, beside the toy run's."""
    folder, out = tmp_path_factory.mktemp("broken"), toy[0] / "out"

    def damage(name, file, change):
        write_toy(folder / name)
        (folder / name / file).write_bytes(change((folder / name / file).read_bytes()))
    damage("empty", "train.bin", lambda content: b"")
    damage("cut", "train.bin", lambda content: content[:1000])
    damage("odd", "train.bin", lambda content: content + b"\0")
    damage("past", "train.bin", lambda content: b"\x10\0" * (len(content) // 2))
    damage("no_json", "meta.json", lambda content: b"{")
    damage("no_dtype", "meta.json", lambda content: content.replace(b"dtype", b"type"))
    damage("words", "meta.json", lambda content: content.replace(b'"vocab_size": 16', b'"vocab_size": "16"'))
    damage("retokenised", "tokenizer.json", lambda content: content.replace(b"(?s:.)", b"(?s:..)"))
    damage("packed", "meta.json", lambda content: content.replace(b'"row_length": null', b'"row_length": 4'))
    (folder / "x.jsonl").mkdir()
    write_toy(folder / "no_bin")
    (folder / "no_bin" / "train.bin").unlink()
    write_set(folder / "other", "abcdefghijklmnop" * 60)

    whole = (out / "flm.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for name, content in (("garbage", b"not a checkpoint"), ("nothing", b""), ("half", whole[:len(whole) // 2]),
                          ("flipped", bytes(flipped))):
        (folder / f"{name}.pt").write_bytes(content)
    torch.save({"model": torch.zeros(3)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(dict(torch.load(out / "flm.pt"), format="flm-2"), folder / "newer.pt")
    torch.save({"state_dict": {}, "settings": Object()}, folder / "object.pt")
    torch.save({key: value for key, value in torch.load(out / "flm.pt").items() if key != "ema"}, folder / "no_ema.pt")
    (folder / "retrained").mkdir()
    (folder / "retrained" / "fmlm.pt").write_bytes((out / "fmlm.pt").read_bytes())
    checkpoint = torch.load(out / "flm.pt")
    checkpoint["ema"]["embed.weight"] += 1
    torch.save(checkpoint, folder / "retrained" / "flm.pt")
    for name, change in (("no_bias", lambda ema: ema.pop("head.bias")), ("short", lambda ema: ema.update(
            {"head.bias": ema["head.bias"][:3]})), ("nan", lambda ema: ema["head.bias"].fill_(float("nan")))):
        checkpoint = torch.load(out / "flm.pt")
        change(checkpoint["ema"])
        torch.save(checkpoint, folder / f"{name}.pt")
    for name, content in (("swapped", [("flm.pt", out / "fmlm.pt"), ("fmlm.pt", out / "flm.pt")]),
                          ("flow_only", [("flm.pt", out / "flm.pt")])):
        (folder / name).mkdir()
        for file, source in content:
            (folder / name / file).write_bytes(source.read_bytes())
    (folder / "a_file").write_text("x")
    (folder / "latin1.txt").write_bytes("caf\xe9 au lait\n".encode("latin-1"))
    return folder


CASES = [
    # settings
    ("train.py --lerning_rate=1", "unknown setting 'lerning_rate' on the command line; did you mean 'learning_rate'?"),
    ("train.py --max_iters=ten", "max_iters=ten on the command line: expected a whole number, such as 1000"),
    ("train.py --max_iters=1.5", "max_iters=1.5 on the command line: expected a whole number, such as 1000"),
    ("train.py --learning_rate=fast",
     "learning_rate=fast on the command line: expected a finite number, such as 0.002"),
    ("train.py --learning_rate=nan", "learning_rate=nan on the command line: expected a finite number, such as 0.002"),
    ("train.py --learning_rate=inf", "learning_rate=inf on the command line: expected a finite number, such as 0.002"),
    ("train.py --compile=maybe", "compile=maybe on the command line: expected true or false, such as False"),
    ("train.py --seed", "--seed needs a value, such as --seed=1"),
    ("train.py --seed --compile", "--seed needs a value, such as --seed=1"),
    ("train.py --out_dir=x config/owt.py",
     "cannot read 'config/owt.py'; settings are given as --key=value, a config file comes first"),
    ("train.py -lr 1", "cannot read '-lr'; settings are given as --key=value, a config file comes first"),
    ("train.py --init_from=gpt2", "init_from=gpt2: choose scratch, resume"),
    ("train.py --dtype=int8", "dtype=int8: choose auto, bfloat16, float16, float32"),
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
    ("train.py --clock_embedding_share=2", "clock_embedding_share=2.0: must lie in [0, 1]"),
    ("train.py --seed=-1", "seed=-1: must lie in [0, inf)"),
    ("distill.py --diagonal_share=1", "diagonal_share=1.0: must lie in [0, 1)"),
    ("distill.py --diagonal_share=0.999", "diagonal_share=0.999 of batch_size=64 leaves no row for jumps"),
    ("distill.py --full_jump_share=-0.5", "full_jump_share=-0.5: must lie in [0, 1]"),
    ("sample.py --steps=0", "steps=0: expected numbers from 1 to 1,000,000, such as 1 or 1,2,4,8"),
    ("sample.py --steps=1,99999999", "steps=1,99999999: expected numbers from 1 to 1,000,000, such as 1 or 1,2,4,8"),
    ("sample.py --steps=1,x", "steps=1,x: expected numbers from 1 to 1,000,000, such as 1 or 1,2,4,8"),
    ("sample.py --temperature=1e-40", "temperature=1e-40: must lie in [1e-3, 1e3]"),
    ("sample.py --out=flm.pt", "out=flm.pt: give a name that ends in .jsonl"),
    ("sample.py --gamma=2", "gamma=2.0: must lie in [0, 1]"),
    ("sample.py --gamma=-0.1", "gamma=-0.1: must lie in [0, 1]"),
    ("sample.py --num_samples=0", "num_samples=0: must lie in [1, inf)"),
    ("sample.py --flow_steps=-1", "flow_steps=-1: must lie in [0, 1000000]"),
    ("sample.py --block_size=4", "block_size=4: the network has learned its 8 positions; leave it at 0"),
    ("sample.py --flow_steps=4 --init_from={toy}/out/fmlm.pt",
     "flow_steps compares a flow map in out_dir with the flow beside it; leave out init_from"),
    ("distill.py --block_size=4", "block_size=4: the network has learned its 8 positions; leave it at 0"),
    # the machine
    ("train.py --device=gpu", "device=gpu: PyTorch cannot use it here; choose auto, cpu, cuda or mps"),
    ("train.py --device=meta", "device=meta: PyTorch cannot use it here; choose auto, cpu, cuda or mps"),
    ("train.py --seed=99999999999999999999",
     "seed=99999999999999999999 on the command line: expected a whole number, such as 1"),
    ("train.py --device=cuda", "device=cuda, but this PyTorch sees no CUDA device; use --device=cpu"),
    ("train.py --wandb_project=x", "wandb_project is set but wandb is missing; run: pip install wandb"),
    # data
    ("train.py --dataset=nowhere",
     "no data in {root}/data/nowhere; the sets that can be prepared are lm1b, owt, palindromes, pydocs, "
     "shakespeare_char, sums"),
    ("train.py --dataset=owt", "no data in {root}/data/owt; run: python data/owt/prepare.py"),
    ("train.py --dataset={broken}/no_bin",
     "no data in {broken}/no_bin; the sets that can be prepared are lm1b, owt, palindromes, pydocs, "
     "shakespeare_char, sums"),
    ("train.py --dataset={broken}/empty",
     "{broken}/empty/train.bin has 0 bytes where 2,000 tokens of 2 bytes were written; run its prepare.py with "
     "--force"),
    ("train.py --dataset={broken}/cut",
     "{broken}/cut/train.bin has 1,000 bytes where 2,000 tokens of 2 bytes were written; run its prepare.py with "
     "--force"),
    ("train.py --dataset={broken}/odd",
     "{broken}/odd/train.bin has 4,001 bytes where 2,000 tokens of 2 bytes were written; run its prepare.py with "
     "--force"),
    ("train.py --dataset={broken}/past", "{broken}/past/train.bin holds token 16, past its vocabulary of 16"),
    ("train.py --dataset={broken}/no_json",
     "{broken}/no_json is damaged (JSONDecodeError: Expecting property name enclosed in double quotes: line 1 "
     "column 2 (char 1)); run its prepare.py with --force"),
    ("train.py --dataset={broken}/no_dtype",
     "{broken}/no_dtype is damaged (KeyError: 'dtype'); run its prepare.py with --force"),
    ("train.py --dataset={broken}/words",
     "{broken}/words is damaged (TypeError: meta.json has something else for a number); run its prepare.py with --force"),
    ("train.py --dataset={broken}/retokenised",
     "{broken}/retokenised is damaged (ValueError: tokenizer.json is not the one of meta.json); run its prepare.py "
     "with --force"),
    ("train.py --dataset={broken}/packed", "{broken}/packed/train.bin holds rows of 4 tokens; set --block_size=4"),
    ("train.py --block_size=500", "{toy}/data/val.bin has 400 tokens, fewer than block_size=500"),
    ("distill.py --dataset={broken}/other",
     "{broken}/other has another vocabulary than the checkpoint; train on the set it was trained on"),
    ("train.py --init_from=resume --dataset={broken}/other",
     "{broken}/other has another vocabulary than the checkpoint; train on the set it was trained on"),
    # checkpoints
    ("distill.py --out_dir=nowhere",
     "no checkpoint nowhere/flm.pt; train.py writes flm.pt, distill.py reads it and writes fmlm.pt"),
    ("sample.py --out_dir=nowhere",
     "no checkpoint nowhere/fmlm.pt; train.py writes flm.pt, distill.py reads it and writes fmlm.pt"),
    ("sample.py --init_from=none.ckpt",
     "no checkpoint none.ckpt; train.py writes flm.pt, distill.py reads it and writes fmlm.pt"),
    ("train.py --init_from=resume --out_dir=nowhere",
     "no checkpoint nowhere/flm.pt; train.py writes flm.pt, distill.py reads it and writes fmlm.pt"),
    ("train.py --init_from=resume --block_size=4",
     "{toy}/out/flm.pt was made with block_size=8, not 4; resume with that, or start again with "
     "--init_from=scratch"),
    ("train.py --init_from=resume --seed=2",
     "{toy}/out/flm.pt was made with seed=1, not 2; resume with that, or start again with --init_from=scratch"),
    ("train.py --init_from=resume --optimizer=muon",
     "{toy}/out/flm.pt was made with optimizer=adamw, not muon; resume with that, or start again with "
     "--init_from=scratch"),
    ("distill.py --init_from=resume --objective=lsd",
     "{toy}/out/fmlm.pt was made with objective=psd, not lsd; resume with that, or start again with "
     "--init_from=scratch"),
    ("sample.py --init_from={broken}/garbage.pt",
     "{broken}/garbage.pt is damaged, or no checkpoint at all (File is not a zip file)"),
    ("sample.py --init_from={broken}/nothing.pt",
     "{broken}/nothing.pt is damaged, or no checkpoint at all (File is not a zip file)"),
    ("sample.py --init_from={broken}/half.pt",
     "{broken}/half.pt is damaged, or no checkpoint at all (File is not a zip file)"),
    ("sample.py --init_from={broken}/flipped.pt",
     "{broken}/flipped.pt is damaged, or no checkpoint at all (wrong checksum of archive/data/40)"),
    ("sample.py --init_from={broken}/foreign.pt",
     "{broken}/foreign.pt is no checkpoint of train.py or distill.py, nor one the authors released (ValueError: it "
     "has neither a format nor a state_dict)"),
    ("sample.py --init_from={broken}/list.pt",
     "{broken}/list.pt is no checkpoint of train.py or distill.py, nor one the authors released (ValueError: it "
     "has neither a format nor a state_dict)"),
    ("sample.py --init_from={broken}/newer.pt",
     "{broken}/newer.pt is no checkpoint of train.py or distill.py, nor one the authors released (ValueError: its "
     "format is 'flm-2')"),
    ("sample.py --init_from={broken}/no_ema.pt",
     "{broken}/no_ema.pt is no checkpoint of train.py or distill.py, nor one the authors released (KeyError: 'ema')"),
    ("sample.py --init_from={broken}/no_bias.pt",
     "the checkpoint's head.bias is missing, unknown or not a number; take an earlier one"),
    ("sample.py --init_from={broken}/nan.pt",
     "the checkpoint's head.bias is missing, unknown or not a number; take an earlier one"),
    ("sample.py --init_from={broken}/object.pt",
     "{broken}/object.pt holds Python objects besides tensors, and to read those can run any program; if you trust "
     "where it comes from, add --trust_checkpoint (sample.py, distill.py, evaluate.py)"),
    ("sample.py --init_from={broken}/object.pt --trust_checkpoint",
     "{broken}/object.pt is no checkpoint of train.py or distill.py, nor one the authors released (KeyError: "
     "'rotary_emb.inv_freq')"),
    ("sample.py --init_from={toy}/out/flm.pt --model=fmlm",
     "{toy}/out/flm.pt is a flow (FLM, from train.py); what is needed here is a flow map (FMLM, from distill.py)"),
    ("sample.py --init_from={toy}/out/fmlm.pt --model=flm",
     "{toy}/out/fmlm.pt is a flow map (FMLM, from distill.py); what is needed here is a flow (FLM, from train.py)"),
    ("sample.py --out_dir={broken}/retrained --flow_steps=2",
     "{broken}/retrained/flm.pt is not the flow that the flow map was distilled from; run distill.py again"),
    ("sample.py --out_dir={broken}/swapped",
     "{broken}/swapped/fmlm.pt is a flow (FLM, from train.py); what is needed here is a flow map (FMLM, from "
     "distill.py)"),
    ("sample.py --out_dir={broken}/flow_only --model=fmlm",
     "no checkpoint {broken}/flow_only/fmlm.pt; train.py writes flm.pt, distill.py reads it and writes fmlm.pt"),
    ("distill.py --out_dir={broken}/swapped",
     "{broken}/swapped/flm.pt is a flow map (FMLM, from distill.py); what is needed here is a flow (FLM, from "
     "train.py)"),
    ("distill.py --teacher={toy}/out/fmlm.pt",
     "{toy}/out/fmlm.pt is a flow map (FMLM, from distill.py); what is needed here is a flow (FLM, from train.py)"),
    ("train.py --init_from=resume --out_dir={broken}/swapped",
     "{broken}/swapped/flm.pt is a flow map (FMLM, from distill.py); what is needed here is a flow (FLM, from "
     "train.py)"),
    ("train.py --learning_rate=1e-5", "the cosine would rise from learning_rate=1e-05 to min_lr=0.0001; lower min_lr, or set "
     "schedule=constant"),
    ("distill.py --batch_size=1", "diagonal_share=0.5 of batch_size=1 leaves no row for the diagonal"),
    ("distill.py --diagonal_share=0", "objective=psd learns the flow from the diagonal alone; set diagonal_share above 0"),
    ("distill.py --self_distill --teacher_temperature=1.2",
     "self_distill learns from the data, not from a teacher; add --teacher_temperature=1"),
    # places to write
    ("train.py --out_dir={broken}/a_file",
     "cannot write {broken}/a_file/flm.jsonl (File exists)"),
    ("sample.py --out={broken}", "out={broken}: give a name that ends in .jsonl"),
    ("sample.py --out={broken}/x.jsonl", "cannot write {broken}/x.jsonl (not a file)"),
    ("sample.py --out={broken}/a_file/x.jsonl", "cannot write {broken}/a_file/x.jsonl (File exists)"),
    # preparing data
    ("data/owt/prepare.py --file={broken}/none.parquet", "{broken}/none.parquet: no such file"),
    ("data/owt/prepare.py --file={broken}/latin1.txt", "{broken}/latin1.txt: not UTF-8 text"),
    ("data/owt/prepare.py --out_dir={broken}/owt",
     "Couldn't reach 'Skylion007/openwebtext' on the Hub (OfflineModeIsEnabled); without a network, give a local "
     "copy with --file"),
    ("data/lm1b/prepare.py --out_dir={broken}/lm1b",
     "Couldn't reach 'dvruette/lm1b' on the Hub (OfflineModeIsEnabled); without a network, give a local copy with "
     "--file"),
    ("data/shakespeare_char/prepare.py --file={broken}/latin1.txt", "{broken}/latin1.txt: not UTF-8 text"),
    ("plot.py --out_dir=nowhere", "no log in nowhere; train.py writes one"),]


@pytest.mark.parametrize("command, message", CASES)
def test_one_line(command, message, toy, broken, monkeypatch, tmp_path):
    if "device=cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has the CUDA device that the message says is missing")
    if "dataset=owt" in command and (ROOT / "data" / "owt" / "meta.json").exists():
        pytest.skip("data/owt is prepared here")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    script, *words = command.format(toy=toy[0], broken=broken).split()
    out = toy[0] / "out" if "resume" in command else tmp_path
    usual = {"train.py": [f"--dataset={toy[0] / 'data'}", f"--out_dir={out}", "--device=cpu", *TINY],
             "distill.py": [f"--dataset={toy[0] / 'data'}", f"--out_dir={toy[0] / 'out'}", "--device=cpu"],
             "sample.py": [f"--out_dir={toy[0] / 'out'}", "--device=cpu"]}
    assert mistake(monkeypatch, script, *usual.get(script, []), *words) == (
        "error: " + message.format(toy=toy[0], broken=broken, root=ROOT))


def test_weights_of_another_shape(broken, monkeypatch):
    said = mistake(monkeypatch, "sample.py", f"--init_from={broken / 'short.pt'}", "--device=cpu")
    assert said.startswith("error: the weights of the checkpoint do not fit its model_config (") and "\n" not in said


def test_a_process_alone_in_its_group(toy, monkeypatch, tmp_path):
    """Variables of torchrun left over in a shell, or a script started by hand."""
    for key, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    said = mistake(monkeypatch, "train.py", *toy[1], f"--out_dir={tmp_path}")
    assert said.startswith("error: process 1 did not find the others (")
    assert "); start all of them with torchrun, and on several machines name" in said and "\n" not in said


@pytest.mark.parametrize("rank, local, world", [("1", "1", "1"), ("0", "0", "abc"), ("-1", "0", "2"), ("0", "0", "0"),
                                                ("0", "x", "1")])
def test_impossible_processes(rank, local, world, toy, monkeypatch, tmp_path):
    for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value)
    assert mistake(monkeypatch, "train.py", *toy[1], f"--out_dir={tmp_path}") == (
        f"error: RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={world} make no sense; start the processes with torchrun, or unset "
        f"all three")


def test_enough_cases():
    assert len({command for command, _ in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_loss_that_is_not_finite(toy, script, monkeypatch, tmp_path):
    """One text of the third micro-step comes out as NaN: the run stops at that step, names its times, which are drawn here
    a second time, and leaves the checkpoint before it. It looks only every fourth step."""
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
    name = {"train.py": "flm.pt", "distill.py": "fmlm.pt"}[script]
    (tmp_path / "flm.pt").write_bytes((toy[0] / "out" / "flm.pt").read_bytes())
    options = [*toy[1], *(TINY if script == "train.py" else ["--batch_size=8"]), f"--out_dir={tmp_path}", "--dropout=0",
               "--eval_interval=2", "--log_interval=4", "--gradient_accumulation_steps=1"]
    said = mistake(monkeypatch, script, *options)
    random = common.generator(1, 4, 2)  # seed 1, times, after two steps
    if script == "train.py":
        where = f"tau = {flow.stratified(8, random)[5].item():.6g}"
    else:  # row 5 is the second jump: the first four of eight are on the diagonal
        flow.stratified(4, random)
        length, place = (flow.stratified(4, random)[1].item() for _ in range(2))
        where = f"tau_s = {place * (1 - length):.6g}, tau_t = {place * (1 - length) + length:.6g}"
    assert said == (f"error: the loss is not a finite number at step 3, first for a text at {where}; the last checkpoint is "
                    f"untouched; try a lower learning_rate")
    kept = torch.load(tmp_path / name)
    assert kept["step"] == 2 and all(weight.isfinite().all() for weight in kept["model"].values())


def test_weights_that_are_not_finite_are_not_written(toy, monkeypatch, tmp_path):
    """The loss of the last step can be fine and its gradient not."""
    real = torch.nn.utils.clip_grad_norm_

    def clip_and_break(parameters, bound):
        parameters = list(parameters)
        parameters[0].grad.fill_(float("nan"))
        return real(parameters, bound)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip_and_break)
    said = mistake(monkeypatch, "train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--max_iters=1", "--eval_iters=1")
    assert said == (f"error: the weights diverged before step 1; {tmp_path / 'flm.pt'} is left as it was; try a lower "
                    f"learning_rate")
    assert not (tmp_path / "flm.pt").exists()


def test_compile_without_a_compiler(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    said = run("train.py", *toy[1], *TINY, f"--out_dir={tmp_path}", "--compile", status=1)
    assert said.startswith("error: compile=true does not work here (")
    assert said.endswith("); install a C++ compiler such as g++, or set compile=false") and "\n" not in said


def test_a_bug_keeps_its_traceback(toy, monkeypatch, tmp_path):
    monkeypatch.setattr("flow.corrupt", lambda *inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mistake(monkeypatch, "train.py", *toy[1], *TINY, f"--out_dir={tmp_path}")


@pytest.mark.parametrize("script, key, value", [
    ("train.py", "clock_embedding_share", 0.5), ("train.py", "beta2", 0.5), ("train.py", "gradient_accumulation_steps", 2),
    *(("distill.py", key, value) for key, value in dict(self_distill=True, diagonal_share=0.25, full_jump_share=0.5,
        full_jump_ramp=True, split=0.2, target_ema=True, dropout=0.2, teacher_temperature=1.2).items())])
def test_what_a_resumed_run_may_not_change(toy, script, key, value, monkeypatch):
    shape = TINY if script == "train.py" else ["--batch_size=8"]
    said = mistake(monkeypatch, script, *toy[1], *shape, "--init_from=resume", f"--{key}={value}")
    assert f"was made with {key}=" in said and "\n" not in said


def test_a_resumed_map_of_another_flow(toy, tmp_path, monkeypatch):
    checkpoint = torch.load(toy[0] / "out" / "flm.pt")
    checkpoint["ema"]["embed.weight"] += 1
    torch.save(checkpoint, tmp_path / "flm.pt")
    said = mistake(monkeypatch, "distill.py", *toy[1], "--batch_size=8", "--init_from=resume", f"--teacher={tmp_path / 'flm.pt'}")
    assert f"was distilled from another FLM than {tmp_path / 'flm.pt'}; start again with --init_from=scratch" in said


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py", "baselines/distill.py"])
def test_programs_for_one_process(script):
    assert f"{script} runs as one process; start it with python" in quick_run(script, "--device=cpu", processes=2, status=1)


def test_resuming_on_data_of_another_size(toy, tmp_path, monkeypatch):
    write_set(tmp_path / "data", "the cat sat on the mat. a dog ran to the red hut.\n" * 50)
    said = mistake(monkeypatch, "train.py", *toy[1], *TINY, "--init_from=resume", f"--dataset={tmp_path / 'data'}")
    assert said == f"error: {tmp_path / 'data'}/train.bin has 2,500 tokens, the run was started on 2,000"
