"""Checkpoints and logs: what a run leaves on disk, and how a network comes back from it.

train.py and distill.py say what a checkpoint holds: all that a run needs to go on, and all that
sampling needs, the tokenizer included. Seed and step stand for the state of every generator and the
place in the data, which are functions of the two (lib/machine.py).
"""

import itertools
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from data.loader import Data, tokenizer_from_dict
from lib import released
from lib.machine import Machine
from lib.settings import fail, require_choice
from model import FlowTransformer, ModelConfig

# ------------------------------------------------------------------------------ files

def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write atomically: `write` fills a file beside `path` (where that is a link, beside what it
    leads to), which then replaces it. A crash or a full disk leaves the old file; exits then."""
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
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError on top of a failed write
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        fail(f"cannot write {path} ({getattr(cause, 'strerror', None) or cause}); what was there "
             f"is untouched")


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


def save_checkpoint(path: Path, checkpoint: dict, best: bool = False) -> None:
    """Write a checkpoint atomically, to flm.pt, say. The one before is kept as flm.prev.pt, and if
    this is the best so far it is kept as flm.best.pt, too. Exits, the last one as it was, when the
    weights diverged."""
    if not all(p.isfinite().all() for p in checkpoint["model"].values()):
        fail(f"the weights diverged before step {checkpoint['step']}; {path} is left as it was; "
             f"try a lower learning_rate")
    whole = path.resolve()  # where a link leads: the others belong on that disk, too
    part = whole.with_suffix(".part")
    try:
        part.unlink(missing_ok=True)  # of a run that was killed
        if path.exists():
            link(path, part)
        replace_file(path, lambda file: torch.save(checkpoint, file))
        if part.exists():
            os.replace(part, whole.with_suffix(".prev.pt"))
        if best:
            link(path, part)
            os.replace(part, whole.with_suffix(".best.pt"))
    except OSError as error:
        fail(f"cannot keep a copy of {path} ({error.strerror}); {path} itself is whole")
    finally:
        part.unlink(missing_ok=True)


def link(path: Path, other: Path) -> None:
    """`other` becomes a second name of the file at `path`. No copy is made: files are replaced,
    never rewritten, so both names can stand for one."""
    other.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


def require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        fail(f"the loss is not finite at step {step}; the last checkpoint is untouched; try a "
             f"lower learning_rate")


def require_progress(skipped: int, step: int) -> None:
    """Exits when float16 overflowed in 20 steps in a row. A few are normal: the loss scale is found
    by trial, and halved each time."""
    if skipped == 20:
        fail(f"float16 overflowed in 20 steps in a row, the last of them {step}; the last "
             f"checkpoint is untouched; use --dtype=bfloat16 or float32, or a lower learning_rate")


def write_lines(path: Path, records: list[dict]) -> None:
    """Write one JSON object a line, atomically."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(path, lambda file: file.write(lines.encode()))

# ------------------------------------------------------------------------------ reading

KINDS = {"flm": "a flow (FLM, from train.py)", "fmlm": "a flow map (FMLM, from distill.py)"}


def load_checkpoint(path: Path | str, kind: str = "", trust: bool = False, n_head: int = 0
                    ) -> dict:
    """Read a checkpoint of train.py or distill.py, or one the authors released (lib/released.py: a
    .ckpt, a .safetensors or hf:owner/name), into main memory.

    kind: "flm" or "fmlm" when only that will do. trust: the file may hold Python objects besides
    tensors. n_head: of a released one that does not say it. Exits when the file is missing,
    damaged, of another kind or something else.
    """
    if str(path).startswith("hf:"):
        path = released.fetch(path)
    if not os.path.isfile(path):
        fail(f"no checkpoint {path}; train.py writes flm.pt, distill.py reads it and writes "
             f"fmlm.pt")
    try:
        exported = str(path).endswith(".safetensors")
        checkpoint = released.read_export(path) if exported else read_tensors(path, trust)
        if not isinstance(checkpoint, dict) or not {"format", "state_dict"} & checkpoint.keys():
            raise ValueError("it has neither a format nor a state_dict")
        if "state_dict" in checkpoint:
            checkpoint = released.translate(checkpoint, path, n_head)
        if checkpoint["format"] != "flm-1":
            raise ValueError(f"its format is {checkpoint['format']!r}")
        for key in ("ema", "settings", "step", "tokenizer", "vocabulary"):
            checkpoint[key]  # a KeyError here, rather than in the middle of a program
        if not 0 <= checkpoint["clock_embedding_share"] <= 1:
            raise ValueError("its clock_embedding_share is not in [0, 1]")
        if (checkpoint["kind"] == "fmlm") != ModelConfig(**checkpoint["model_config"]).flow_map:
            raise ValueError("its kind does not fit its network")
    except pickle.UnpicklingError as error:
        fail(f"{path} is no checkpoint ({error})" if trust else
             f"{path} holds Python objects besides tensors, and reading those can run any program; "
             f"if you trust its origin, add --trust_checkpoint (sample.py, distill.py, "
             f"eval/evaluate.py)")
    except zipfile.BadZipFile as error:
        prev = Path(path).with_suffix(".prev.pt")
        fail(f"{path} is damaged, or no checkpoint at all ({error})"
             + f"; {prev} is the one before it" * prev.exists())
    except Exception as error:  # a foreign file can raise anything
        fail(f"{path} is no checkpoint of train.py or distill.py, nor one the authors released "
             f"({type(error).__name__}: {error})")
    if kind and checkpoint["kind"] != kind:
        found, needed = (KINDS.get(name, f"a baseline ({name})")
                         for name in (checkpoint["kind"], kind))
        fail(f"{path} is {found}; what is needed here is {needed}")
    return checkpoint


def find_network(out_dir: str, init_from: str, model: str, trust: bool, n_head: int
                 ) -> tuple[str | Path, Path, dict]:
    """For sample.py: the path of what to sample (init_from, or out_dir's flow map, the mended one
    if there is one, or its flow where there is no map or `model` asks for it), that of the flow in
    out_dir, and the checkpoint. Without any of the two settings, and before something was trained,
    weights/stories. Says what it chose where that may surprise; exits when it is missing or a
    baseline."""
    if not out_dir:
        out_dir, shipped = "out/stories", Path(sys.argv[0]).parent / "weights" / "stories"
        trained = any((Path(out_dir) / f"{name}.pt").exists() for name in ("flm", "fmlm", "mended"))
        if not init_from and shipped.exists() and not trained:
            print(f"nothing trained in {out_dir} yet; reading {shipped}", file=sys.stderr)
            out_dir = shipped
    flow_path, mended_path = Path(out_dir) / "flm.pt", Path(out_dir) / "mended.pt"
    map_path = mended_path if mended_path.exists() else Path(out_dir) / "fmlm.pt"
    if init_from:
        checkpoint = load_checkpoint(init_from, model.replace("auto", ""), trust, n_head)
        if checkpoint["kind"] not in KINDS:
            fail(f"{init_from} is a baseline ({checkpoint['kind']}), which sample.py would read as "
                 f"a flow; eval/evaluate.py samples it")
        return init_from, flow_path, checkpoint
    if model == "flm" or model == "auto" and flow_path.exists() and not map_path.exists():
        if model == "auto":
            print(f"no flow map in {out_dir} (distill.py makes one), using flm.pt: it needs tens "
                  f"of steps", file=sys.stderr)
        return flow_path, flow_path, load_checkpoint(flow_path, "flm")
    checkpoint = load_checkpoint(map_path, "fmlm")
    before = Path(out_dir) / "fmlm.pt"                              # the map before mending
    if before.exists() and before.stat().st_mtime > map_path.stat().st_mtime:
        print(f"{map_path} is older than {before}: run distill.py --mend again, or read that with "
              f"--init_from={before}", file=sys.stderr)
    if "model" in checkpoint and flow_path.exists() and (
            flow_path.stat().st_mtime > map_path.stat().st_mtime):  # not in weights/, copied by git
        print(f"{flow_path} is newer than {map_path}: run distill.py for its flow map",
              file=sys.stderr)
    return map_path, flow_path, checkpoint


def read_tensors(path: Path | str, trust: bool) -> dict:
    """torch.load, which does not notice flipped bits by itself. Raises zipfile.BadZipFile for those
    and for other files, pickle.UnpicklingError for objects besides tensors (unless trusted), and
    whatever a malformed pickle raises."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # the checksum of every member
        folders = [member.filename for member in file.infolist() if member.external_attr & 0x10]
    if damaged or folders:  # torch silently reads nothing from a member marked as a folder
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}" if damaged else
                                 f"{folders[0]} marked as a folder")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not trust:
            raise
    return torch.load(path, map_location="cpu", weights_only=False,
                      pickle_module=released.only_torch)


def build_model(checkpoint: dict, device: torch.device, weights: str = "ema", **changes
                ) -> FlowTransformer:
    """The network in a checkpoint with its "ema" or "model" weights, in eval mode. `changes`
    replace ModelConfig fields. What they add keeps its initial values: a flow map's second time
    embedding (flow_map), the vector that marks known tokens (context). Exits when other weights are
    missing, do not fit or are not finite."""
    model = FlowTransformer(ModelConfig(**checkpoint["model_config"] | changes))
    try:
        missing, unexpected = model.load_state_dict(checkpoint[weights], strict=False)
    except RuntimeError as error:  # other shapes
        fail(f"the weights of the checkpoint do not fit its model_config ({error})")
    added = tuple(name for field, name in (("flow_map", "time_t."), ("context", "known"))
                  if field in changes)
    odd = unexpected + [name for name in missing if not name.startswith(added)]
    odd += [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if odd:
        fail(f"the checkpoint's {odd[0]} is missing, unexpected or not finite; use an earlier one")
    return model.eval().to(device)


def has_context(checkpoint: dict) -> bool:
    """Whether the network was trained to be told tokens, also in its last stage."""
    return bool(checkpoint["model_config"].get("context")
                and checkpoint["settings"].get("context_share", 1))


def require_context(path: str | Path, checkpoint: dict) -> None:
    """Exits when the network was not trained to be told tokens."""
    if not has_context(checkpoint):
        fail(f"{path} was trained with context_share=0, so it cannot be told tokens, as prompt, "
             f"fill and refine do; set context_share=0.3 in train.py and distill.py")


def set_length(checkpoint: dict, block_size: int, path: str) -> int:
    """Make the network of a checkpoint one of texts of `block_size` tokens, 0 for as many as it was
    trained on, and return how many that is. Exits when it has learned other positions, or nothing
    says how many."""
    config = checkpoint["model_config"]
    if config["learned_positions"] and block_size not in (0, config["block_size"]):
        fail(f"block_size={block_size}: the network has learned its {config['block_size']} "
             f"positions; leave it at 0")
    config["block_size"] = block_size or config["block_size"]
    if not config["block_size"]:
        fail(f"{path} does not say how many tokens its texts have; give --block_size")
    return config["block_size"]


def find_tokenizer(checkpoint: dict, vocabulary: str):
    """What decodes the tokens of a checkpoint: its own tokenizer; for a released one GPT-2's, or
    the file `vocabulary`."""
    if checkpoint["tokenizer"] and not vocabulary:
        try:
            return tokenizer_from_dict(checkpoint["tokenizer"])
        except ValueError as error:
            fail(f"the checkpoint's {error}")
    return released.find_tokenizer(checkpoint["model_config"]["vocab_size"], vocabulary)


def require_same_vocabulary(checkpoint: dict, data: Data) -> None:
    """Exits when the data have another vocabulary than the checkpoint. A released checkpoint does
    not hold its vocabulary; there its size decides."""
    same = checkpoint["vocabulary"] == data.meta["tokenizer"]
    if checkpoint["vocabulary"] is None:
        same = released.may_be_of(checkpoint["model_config"]["vocab_size"],
                                  data.meta["vocab_size"], data.tokenizer)
    if not same:
        fail(f"{data.path.parent} has another vocabulary than the checkpoint; train on the set it "
             f"was trained on")

# ------------------------------------------------------------------------------ resuming

# Settings that a resumed run may change without a word.
PLACES = "out_dir", "dataset", "teacher_path", "device", "wandb_project"
# What it may not change: with another batch, say, it would read some texts twice, others never.
FIXED = ("optimizer", "beta1", "beta2", "weight_decay", "batch_size",
         "gradient_accumulation_steps", "seed")


def load_resumable(path: Path, kind: str, init_from: str, settings: dict, fixed: Iterable[str],
                   machine: Machine) -> dict | None:
    """The checkpoint to continue for init_from = "resume", None for "scratch"; "auto" continues if
    there is one. Exits when it was made with other values of the `fixed` settings; says so where
    others differ."""
    require_choice("init_from", init_from, ("scratch", "resume", "auto"))
    found = machine.total(torch.tensor(float(path.exists()))) if init_from == "auto" else None
    if found and found != machine.world:
        fail(f"init_from=auto: some processes see {path}, others do not; put out_dir on a disk "
             f"that all nodes share")
    if init_from == "scratch" or found == 0:
        return None
    checkpoint = load_checkpoint(path, kind)
    if "model" not in checkpoint:
        fail(f"{path} holds averaged weights only; it can be sampled and distilled, not resumed")
    changed = {key: value for key, value in checkpoint["settings"].items()
               if settings.get(key) != value and key not in (*PLACES, "init_from", "start_from")}
    for key in fixed:
        if key in changed:
            fail(f"{path} was made with {key}={changed[key]}, not {settings[key]}; resume with "
                 f"that, or start again with --init_from=scratch")
    for key in changed if machine.main else ():
        print(f"from here on {key}={settings.get(key)}, until now {changed[key]}", file=sys.stderr)
    return checkpoint


def load_start(path: str, kind: str, model_args: dict, clock_embedding_share: float) -> dict:
    """The checkpoint whose weights a new run starts with. Exits when the run asks for another
    network; only being told tokens can be learned anew."""
    checkpoint = load_checkpoint(path, kind)
    for key, value in dict(model_args, clock_embedding_share=clock_embedding_share).items():
        had = (checkpoint | checkpoint["model_config"]).get(key, value)
        if had != value and (key != "context" or had):
            fail(f"{path} was made with {key}={had}, not {value}; start with that"
                 + "; set context_share above 0" * (key == "context"))
    return checkpoint


def restore_run(checkpoint: dict, ema: nn.Module, optimizers: list, machine: Machine, data: Data
                ) -> int:
    """Put a checkpoint's moving average, optimizers and loss scale back; returns its step. Exits
    when the data have another number of tokens than before, or something is missing."""
    try:
        if checkpoint["train_tokens"] != len(data.tokens):
            fail(f"{data.path} has {len(data.tokens):,} tokens, the run was started on "
                 f"{checkpoint['train_tokens']:,}")
        ema.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if checkpoint["scaler"]:  # empty unless the run was in float16 until now
            machine.scaler.load_state_dict(checkpoint["scaler"])
        return checkpoint["step"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the checkpoint cannot be continued ({type(error).__name__}: {error}); sampling may "
             f"still work")

# ------------------------------------------------------------------------------ logs

def read_log(path: Path) -> list[dict]:
    """The records of a log, without a last line that a crash cut short. Exits for anything else."""
    records = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines[:-1]:  # after the last newline comes nothing, or what was cut short
            records.append(json.loads(line))
            records[-1]["step"] + 0  # it has a step, and that is a number
    except (KeyError, OSError, TypeError, ValueError) as error:
        fail(f"{path} is not a log of train.py or distill.py ({type(error).__name__}: {error}); "
             f"move it away")
    return records


class Log:
    """One JSON object a line beside the checkpoint, and the same to wandb if asked. A resumed run
    continues it after its step. A new run first moves an older checkpoint and log out of the way,
    to flm.old1.pt, flm.old2.pt and so on."""

    def __init__(self, checkpoint_path: Path, machine: Machine, resumed: bool, step: int,
                 wandb_project: str, settings: dict):
        path = checkpoint_path.with_suffix(".jsonl")
        self.path = path if machine.main else None
        self.wandb = None
        if not self.path:
            return
        require_writable(path)
        if wandb_project:
            try:
                import wandb
            except ImportError:
                fail("wandb_project is set but wandb is missing; run: pip install wandb")
            self.wandb = wandb.init(project=wandb_project, config=settings)
        if not resumed:
            set_aside(checkpoint_path)
        kept = [record for record in read_log(path) if record["step"] <= step] if resumed else []
        write_lines(path, kept)
        self.best = min((record["val_loss"] for record in kept if "val_loss" in record
                         and record["step"] > 0 and path.with_suffix(".best.pt").exists()),
                        default=math.inf)

    def new_best(self, val_loss: float) -> bool:
        """Whether no checkpoint that was kept as the best had a lower one. This one is kept now."""
        best = bool(self.path) and val_loss <= self.best
        self.best = val_loss if best else self.best
        return best

    def write(self, step: int, **values) -> None:
        if self.path:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(dict(step=step, **values)) + "\n")
            except OSError as error:
                fail(f"cannot write {self.path} ({error.strerror}); the last checkpoint is "
                     f"untouched")
            if self.wandb:
                self.wandb.log(values, step=step)


def set_aside(path: Path) -> None:
    """Keep the checkpoints and the log of the run before under the next free name."""
    if not path.exists():
        return
    names = (f"{path.stem}.old{i}" for i in itertools.count(1))
    kept = next(name for name in names if not path.with_stem(name).exists())
    for suffix in (".jsonl", ".prev.pt", ".best.pt", ".pt"):
        if (file := path.with_suffix(suffix)).exists():
            os.replace(file, file.with_name(kept + suffix))
    print(f"the run before is kept as {path.with_stem(kept)}", file=sys.stderr)
