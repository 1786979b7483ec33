"""Checkpoints and logs: what a run leaves on disk, and how a network comes back from it.

A checkpoint is one file with everything a run needs to go on, and everything sampling needs, the tokenizer included. It
is written beside the old one and moved over it, so that a crash at any moment leaves the last good one. Its seed and
step are the state of every random generator and of the place in the data, since all of those are functions of the two (see
common.py).
"""

import itertools
import json
import os
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

import released
from common import Machine, fail, require_choice
from data import corpus, tokenizer
from data.loader import Data
from flow import Clock
from model import FlowTransformer, ModelConfig


# ---------------------------------------------------------------- files

def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write atomically: `write` fills a new file, which then takes the place of the one at `path` (or, where that is a
    link, of the one it leads to). Exits with one line, the old file as it was, when the disk is full or anything else is
    in the way."""
    require_writable(path)
    target = path.resolve()
    part = target.with_name(target.name + ".tmp")
    try:
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch reports a write that failed as a RuntimeError on top of it
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        fail(f"cannot write {path} ({getattr(cause, 'strerror', None) or cause}); what was there is untouched")


def require_writable(path: Path) -> None:
    """Exits when nothing can be written to `path`: better told before the work than after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a folder, or a device such as /dev/null
            fail(f"cannot write {path} (not a file)")
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror})")


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint, atomically: see `replace_file`."""
    replace_file(path, lambda file: torch.save(checkpoint, file))


def write_lines(path: Path, records: list[dict]) -> None:
    """Write one JSON object a line, atomically: see `replace_file`."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(path, lambda file: file.write(lines.encode()))


PLACES = "out_dir", "dataset", "teacher", "device", "wandb_project"  # settings that may differ without harm
KINDS = {"flm": "a flow (FLM, from train.py)", "fmlm": "a flow map (FMLM, from distill.py)"}


def load_checkpoint(path: Path | str, kind: str = "", trust: bool = False) -> dict:
    """Read a checkpoint of train.py or distill.py, or one the authors released (released.py), into main memory.

    kind: "flm" or "fmlm" when only that will do. trust: the file may hold Python objects besides tensors.
    Exits with one line when the file is missing, damaged, of another kind or something else.
    """
    if not os.path.isfile(path):
        fail(f"no checkpoint {path}; train.py writes flm.pt, distill.py reads it and writes fmlm.pt")
    try:
        checkpoint = read_tensors(path, trust)
        if not isinstance(checkpoint, dict) or not {"format", "state_dict"} & checkpoint.keys():
            raise ValueError("it has neither a format nor a state_dict")
        if "state_dict" in checkpoint:
            checkpoint = released.translate(checkpoint)
        if checkpoint["format"] != "flm-1":
            raise ValueError(f"its format is {checkpoint['format']!r}")
        for key in ("model", "ema", "clock_embedding_share", "settings", "step", "tokenizer", "vocabulary"):
            checkpoint[key]  # a KeyError here, rather than in the middle of a program
        if (checkpoint["kind"] == "fmlm") != ModelConfig(**checkpoint["model_config"]).flow_map:
            raise ValueError("its kind does not fit its network")
    except pickle.UnpicklingError as error:
        fail(f"{path} is no checkpoint ({error})" if trust else
             f"{path} holds Python objects besides tensors, and to read those can run any program; if you trust where it "
             f"comes from, add --trust_checkpoint (sample.py, distill.py, evaluate.py)")
    except zipfile.BadZipFile as error:
        fail(f"{path} is damaged, or no checkpoint at all ({error})")
    except Exception as error:  # a foreign file can raise anything
        fail(f"{path} is no checkpoint of train.py or distill.py, nor one the authors released "
             f"({type(error).__name__}: {error})")
    if kind and checkpoint["kind"] != kind:
        found, needed = (KINDS.get(name, f"a baseline ({name})") for name in (checkpoint["kind"], kind))
        fail(f"{path} is {found}; what is needed here is {needed}")
    return checkpoint


def read_tensors(path: Path | str, trust: bool) -> dict:
    """torch.load, which does not notice flipped bits by itself. Raises zipfile.BadZipFile for those and for other files,
    pickle.UnpicklingError for objects besides tensors (unless trusted), and whatever a malformed pickle raises."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # the checksum of every member
        folders = [member.filename for member in file.infolist() if member.external_attr & 0x10]
    if damaged or folders:  # torch reads nothing from a member marked as a folder, and does not say so
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}" if damaged else f"{folders[0]} marked as a folder")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not trust:
            raise
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=released.only_torch)


# ---------------------------------------------------------------- runs and networks

def find_checkpoint(out_dir: Path, model: str, init_from: str = "", trust: bool = False) -> dict:
    """The checkpoint file init_from if named; else the flow map in out_dir, else the flow, saying so. model = "fmlm" or
    "flm" asks for that kind."""
    require_choice("model", model, ("auto", "flm", "fmlm"))
    if init_from:
        checkpoint = load_checkpoint(init_from, "" if model == "auto" else model, trust)
        if checkpoint["kind"] not in KINDS:
            fail(f"{init_from} is a baseline ({checkpoint['kind']}), which sample.py would read as a flow; evaluate.py "
                 f"samples it")
        return checkpoint
    flow, flow_map = out_dir / "flm.pt", out_dir / "fmlm.pt"
    if model == "auto" and flow.exists() and not flow_map.exists():
        print(f"no flow map in {out_dir} (distill.py makes one), using flm.pt: it needs tens of steps", file=sys.stderr)
        return load_checkpoint(flow, "flm")
    if model != "flm" and flow.exists() and flow_map.exists() and flow.stat().st_mtime > flow_map.stat().st_mtime:
        print(f"{flow} is newer than {flow_map}: run distill.py for its flow map", file=sys.stderr)
    return load_checkpoint(flow, "flm") if model == "flm" else load_checkpoint(flow_map, "fmlm")


def set_length(checkpoint: dict, block_size: int, path: str) -> int:
    """Make the network of a checkpoint one of texts of `block_size` tokens, 0 for as many as it was trained on, and
    return how many that is. Exits when the network has a vector for each of its own positions, or nothing says how many."""
    config = checkpoint["model_config"]
    if config["learned_positions"] and block_size not in (0, config["block_size"]):
        fail(f"block_size={block_size}: the network has learned its {config['block_size']} positions; leave it at 0")
    config["block_size"] = block_size or config["block_size"]
    if not config["block_size"]:
        fail(f"{path} does not say how many tokens its texts have; give --block_size")
    return config["block_size"]


def find_tokenizer(checkpoint: dict, vocabulary: str):
    """What decodes the tokens of a checkpoint: its own tokenizer; for a released one GPT-2's, or the file `vocabulary`."""
    V = checkpoint["model_config"]["vocab_size"]
    if vocabulary:
        encoding = released.read_vocabulary(vocabulary)
        if encoding.get_vocab_size() != V:
            fail(f"{vocabulary} has {encoding.get_vocab_size()} tokens, the checkpoint {V}")
        return encoding
    if checkpoint["tokenizer"]:
        try:
            return tokenizer.from_dict(checkpoint["tokenizer"])
        except ValueError as error:
            fail(f"the checkpoint's {error}")
    if V != 50257:
        fail(f"the checkpoint does not hold its {V} tokens; give --vocabulary=vocab.txt (for LM1B the one of "
             f"bert-base-uncased)")
    return corpus.gpt2_encoding()


def load_resumable(path: Path, kind: str, init_from: str, settings: dict, fixed: Iterable[str], machine: Machine
                   ) -> dict | None:
    """The checkpoint to continue for init_from = "resume", None for "scratch". Exits when it was made with other values
    of the `fixed` settings, which a run cannot change on the way; says so where others differ."""
    require_choice("init_from", init_from, ("scratch", "resume"))
    if init_from == "scratch":
        return None
    checkpoint = load_checkpoint(path, kind)
    changed = {key: value for key, value in checkpoint["settings"].items()
               if settings.get(key) != value and key not in (*PLACES, "init_from")}
    for key in fixed:
        if key in changed:
            fail(f"{path} was made with {key}={changed[key]}, not {settings[key]}; resume with that, or start again with "
                 f"--init_from=scratch")
    for key in changed if machine.main else ():
        print(f"from here on {key}={settings.get(key)}, until now {changed[key]}", file=sys.stderr)
    return checkpoint


def set_aside(path: Path) -> None:
    """Before a run from scratch: keep the checkpoint of the run before, and its log, as flm.old1.pt, the next one as
    flm.old2.pt, and so on. Whoever forgot --init_from=resume has lost nothing."""
    if not path.exists():
        return
    names = (f"{path.stem}.old{i}" for i in itertools.count(1))
    kept = next(name for name in names if not path.with_stem(name).exists())
    for file in (path.with_suffix(".jsonl"), path):
        if file.exists():
            os.replace(file, file.with_stem(kept))
    print(f"the run before is kept as {path.with_stem(kept)}", file=sys.stderr)


def build_clock(config: ModelConfig, embedding_share: float, device: torch.device) -> Clock:
    """The clock of a network; exits when the share is not one."""
    try:
        return Clock(config.vocab_size, config.n_embd, embedding_share, device)
    except ValueError as error:
        fail(str(error))


def new_model(vocab_size: int, shape: dict, device: torch.device) -> FlowTransformer:
    """A network with initial weights; exits when the shape is impossible."""
    try:
        return FlowTransformer(ModelConfig(vocab_size=vocab_size, **shape)).to(device)
    except ValueError as error:
        fail(str(error))


def build_model(checkpoint: dict, device: torch.device, weights: str = "ema", **changes) -> FlowTransformer:
    """The network in a checkpoint with its "ema" or "model" weights, in eval mode. `changes` replace ModelConfig fields;
    parameters the checkpoint does not have (a flow map's second time embedding) keep their initial values. Exits when
    other weights are missing or do not fit, or one is not a finite number."""
    model = FlowTransformer(ModelConfig(**checkpoint["model_config"] | changes))
    try:
        missing, unexpected = model.load_state_dict(checkpoint[weights], strict=False)
    except RuntimeError as error:  # other shapes
        fail(f"the weights of the checkpoint do not fit its model_config ({error})")
    odd = unexpected + [name for name in missing if not name.startswith("time_t.")]
    odd += [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if odd:
        fail(f"the checkpoint's {odd[0]} is missing, unknown or not a number; take an earlier one")
    return model.eval().to(device)


def save_run(path: Path, kind: str, model: nn.Module, ema: nn.Module, optimizers: list, machine: Machine,
             settings: dict, data: Data, clock_embedding_share: float, step: int) -> None:
    """Write all of a run, from the main process. Exits, and leaves the last checkpoint alone, when a weight is no longer a
    finite number."""
    if not machine.main:
        return
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"the weights diverged before step {step}; {path} is left as it was; try a lower learning_rate")
    save_checkpoint(path, dict(
        format="flm-1", kind=kind, model_config=asdict(model.config), model=model.state_dict(), ema=ema.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers], scaler=machine.scaler.state_dict(),
        clock_embedding_share=clock_embedding_share, settings=settings, step=step, train_tokens=len(data.tokens),
        tokenizer=data.tokenizer, vocabulary=data.meta["tokenizer"]))


def restore_run(checkpoint: dict, ema: nn.Module, optimizers: list, machine: Machine, data: Data) -> int:
    """Put a checkpoint's moving average, optimizers and loss scale back; returns its step. Exits when the data have not as
    many tokens as those of the run so far, or something is missing."""
    try:
        if checkpoint["train_tokens"] != len(data.tokens):
            fail(f"{data.path} has {len(data.tokens):,} tokens, the run was started on {checkpoint['train_tokens']:,}")
        ema.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if checkpoint["scaler"]:  # empty unless the run was in float16 until now
            machine.scaler.load_state_dict(checkpoint["scaler"])
        return checkpoint["step"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the checkpoint cannot be continued ({type(error).__name__}: {error}); sampling may still work")


def require_same_vocabulary(checkpoint: dict, data: Data) -> None:
    """Exits when the data have another vocabulary than the checkpoint. A released one does not hold its vocabulary: its
    size must do, and the name gpt2 where it has that size."""
    same = checkpoint["vocabulary"] == data.meta["tokenizer"]
    if checkpoint["vocabulary"] is None:
        V = checkpoint["model_config"]["vocab_size"]
        same = V == data.meta["vocab_size"] and (V != 50257 or data.tokenizer["name"] == "gpt2")
    if not same:
        fail(f"{data.path.parent} has another vocabulary than the checkpoint; train on the set it was trained on")


# ---------------------------------------------------------------- logs

def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that a crash cut short is left out. Exits when it is not a log."""
    records = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines[:-1]:  # after the last newline comes nothing, or what was cut short
            records.append(json.loads(line))
            records[-1]["step"] + 0  # it has a step, and that is a number
    except (KeyError, OSError, TypeError, ValueError) as error:
        fail(f"{path} is not a log of train.py or distill.py ({type(error).__name__}: {error}); move it away")
    return records


def lock(path: Path):
    """An open file that no other process can lock until this one ends, however it ends. None on Windows. Where the file
    system knows no locks it is not locked, which is said."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        file = open(path, "w")
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror})")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to {path.parent}; wait for it, or choose another out_dir")
    except OSError as error:
        print(f"{path} cannot be locked ({error.strerror}): start no second run in {path.parent}", file=sys.stderr)
    return file


class Log:
    """One JSON object a line beside the checkpoint, for plot.py and for people; and the same to wandb if asked.

    It goes on after `step` when a run is resumed; otherwise the run before is set aside. Holds a lock: exits when
    another run is writing to the same place.
    """

    def __init__(self, checkpoint_path: Path, machine: Machine, resumed: bool, step: int, wandb_project: str,
                 settings: dict):
        path = checkpoint_path.with_suffix(".jsonl")
        self.path = path if machine.main else None
        self.wandb = None
        if self.path:
            require_writable(path)
            self.lock = lock(path.with_suffix(".lock"))
            if wandb_project:
                try:
                    import wandb
                except ImportError:
                    fail("wandb_project is set but wandb is missing; run: pip install wandb")
                self.wandb = wandb.init(project=wandb_project, config=settings)
            if not resumed:
                set_aside(checkpoint_path)
            write_lines(path, [r for r in read_log(path) if r["step"] <= step] if resumed else [])  # the others come again

    def write(self, step: int, **values) -> None:
        if self.path:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(dict(step=step, **values)) + "\n")
            except OSError as error:
                fail(f"cannot write {self.path} ({error.strerror}); the last checkpoint is untouched")
            if self.wandb:
                self.wandb.log(values, step=step)
