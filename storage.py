"""Checkpoints and logs: what a run leaves on disk, and how a network comes back from it.

A checkpoint is one file with everything a run needs to go on, and everything sampling needs, the tokenizer included. It
is written beside the old one and moved over it, so that a crash at any moment leaves the last good one. Its seed and
the number of samples seen are the state of every random generator and of the place in the data (see common.py).
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common import Machine, fail, require_choice
from data.loader import Data
from flow import Clock
from model import FlowTransformer, ModelConfig


# ---------------------------------------------------------------- files

def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write atomically: the file at `path` is always a whole checkpoint. Exits with one line when it cannot."""
    part = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); the last checkpoint is untouched")


def write_lines(path: Path, records: list[dict]) -> None:
    """One JSON object a line, atomically. Exits with one line when it cannot."""
    part = path.with_suffix(path.suffix + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def load_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint of train.py or distill.py, into main memory. Exits with one line when it is missing or is
    something else."""
    if not Path(path).is_file():
        fail(f"no checkpoint {path}; train.py writes flm.pt, distill.py reads it and writes fmlm.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["format"] == "flm-1"
    except Exception as error:
        fail(f"{path} is not a checkpoint of train.py or distill.py ({type(error).__name__})")
    return checkpoint


# ---------------------------------------------------------------- runs and networks

def find_checkpoint(out_dir: Path, model: str) -> dict:
    """The flow map in out_dir, else the flow, saying so; or the one named by model = "fmlm" or "flm"."""
    require_choice("model", model, ("auto", "flm", "fmlm"))
    flow, flow_map = out_dir / "flm.pt", out_dir / "fmlm.pt"
    if model == "auto" and flow.exists() and not flow_map.exists():
        print(f"no flow map in {out_dir} (distill.py makes one), using flm.pt: it needs tens of steps", file=sys.stderr)
        return load_checkpoint(flow)
    if model != "flm" and flow.exists() and flow_map.exists() and flow.stat().st_mtime > flow_map.stat().st_mtime:
        print(f"{flow} is newer than {flow_map}: run distill.py for its flow map", file=sys.stderr)
    return load_checkpoint(flow if model == "flm" else flow_map)


def load_resumable(path: Path, init_from: str, settings: dict, fixed: Iterable[str]) -> dict | None:
    """The checkpoint to continue for init_from = "resume", None for "scratch". Exits when it was made with other values
    of the `fixed` settings, which a run cannot change on the way."""
    require_choice("init_from", init_from, ("scratch", "resume"))
    if init_from == "scratch":
        return None
    checkpoint = load_checkpoint(path)
    for key in fixed:
        if settings[key] != checkpoint["settings"][key]:
            fail(f"{path} was made with {key}={checkpoint['settings'][key]}, not {settings[key]}; resume with that, or "
                 f"start again with --init_from=scratch")
    return checkpoint


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
    parameters the checkpoint does not have (a flow map's second time embedding) keep their initial values."""
    model = FlowTransformer(ModelConfig(**checkpoint["model_config"] | changes))
    missing, unexpected = model.load_state_dict(checkpoint[weights], strict=False)
    assert not unexpected and all(name.startswith("time_t.") for name in missing), (missing, unexpected)
    return model.eval().to(device)


def save_run(path: Path, kind: str, model: nn.Module, ema: nn.Module, optimizers: list, machine: Machine,
             settings: dict, data: Data, clock_embedding_share: float, step: int, samples_seen: int) -> None:
    """Write all of a run, from the main process. (seed, samples_seen) is the state of the data order and of every
    generator. Exits, and leaves the last checkpoint alone, when a weight is no longer a finite number."""
    if not machine.main:
        return
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"the weights diverged before step {step}; {path} is left as it was; try a lower learning_rate")
    save_checkpoint(path, dict(
        format="flm-1", kind=kind, model_config=asdict(model.config), model=model.state_dict(), ema=ema.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers], scaler=machine.scaler.state_dict(),
        clock_embedding_share=clock_embedding_share, settings=settings, step=step,
        generator=dict(seed=settings["seed"], samples_seen=samples_seen),
        tokenizer=data.tokenizer, vocabulary=data.meta["tokenizer"]))


def restore_run(checkpoint: dict, ema: nn.Module, optimizers: list, machine: Machine) -> tuple[int, int]:
    """Put a checkpoint's moving average, optimizers and loss scale back; returns (step, samples_seen)."""
    ema.load_state_dict(checkpoint["ema"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    machine.scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint["generator"]["samples_seen"]


def require_same_vocabulary(checkpoint: dict, data: Data) -> None:
    if checkpoint["vocabulary"] != data.meta["tokenizer"]:
        fail(f"{data.path.parent} has another vocabulary than the checkpoint; train on the set it was trained on")


# ---------------------------------------------------------------- logs

def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Log:
    """One JSON object a line in `path`, for plot.py and for people; and the same to wandb if asked."""

    def __init__(self, path: Path, machine: Machine, step: int, wandb_project: str, settings: dict):
        self.path = path if machine.main else None
        self.wandb = None
        if self.path:
            kept = [record for record in read_log(path) if record["step"] <= step] if step else []
            write_lines(path, kept)  # a resumed run writes the others again
            if wandb_project:
                try:
                    import wandb
                except ImportError:
                    fail("wandb_project is set but wandb is missing; run: pip install wandb")
                self.wandb = wandb.init(project=wandb_project, config=settings)

    def write(self, step: int, **values) -> None:
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")
            if self.wandb:
                self.wandb.log(values, step=step)
