"""Settings: plain globals at the top of a program, replaced by a config file and `--key=value`.

A user's mistake is one line on stderr and exit status 1, here and in all programs: "exits" in a
docstring means `fail`.
"""

import contextlib
import difflib
import math
import os
import re
import runpy
import signal
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

# OpenMP's threads spin while they wait: with another program on their core, at its cost and their
# own (docs/speed.md). OpenMP reads this when PyTorch is imported, so programs import this first.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"


def fail(message: str) -> NoReturn:
    """Report a user error in one line on stderr and end with status 1."""
    sys.exit("error: " + " ".join(message.splitlines()))


def configure(script: dict, argv: list[str]) -> dict:
    """The settings of a program: its lower-case globals of plain type, replaced by a config file
    (at most one, first) and then by `--key=value` or `--key value`. `--key` alone means true.

    script: the caller's globals(). The caller puts the result back with globals().update.
    A config file is Python: it may import and compute, and `_names` are its own.
    Exits for an unknown key (naming the nearest), a wrong type, or an unreadable config file.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))          # Ctrl-C without a traceback
    settings = {key: value for key, value in script.items() if key.islower()
                and not key.startswith("_") and type(value) in (bool, int, float, str)}
    if "--help" in argv or "-h" in argv:
        source = Path(script["__file__"]).read_text().split("settings = ")[0]
        print(script["__doc__"], *re.findall(r"^[a-z]\w* = .*|^# --.*", source, re.M), sep="\n")
        sys.exit()
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        settings |= read_config(argv.pop(0), settings)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            fail(f"cannot read {word!r}; give settings as --key=value, a config file first")
        key, has_value, value = word[2:].partition("=")
        require_known(settings, key, "on the command line")
        if not has_value and (not argv or argv[0].startswith("--")):
            if type(settings[key]) is not bool:
                example = "..." if settings[key] == "" else settings[key]
                fail(f"--{key} needs a value, such as --{key}={example}")
            value = "true"
        elif not has_value:
            value = argv.pop(0)
        settings[key] = checked(settings, key, value, "on the command line")
    return settings


def read_config(path: str, settings: dict) -> dict:
    """The settings that a config file assigns."""
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        there = " ".join(sorted(map(str, Path("config").glob("*.py"))))
        fail(f"no config file {path!r}; there are: {there}")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        fail(f"config file {path}: {type(error).__name__}: {error}")
    values = {}
    for key, value in assigned.items():
        helper = key not in settings and (callable(value) or isinstance(value, types.ModuleType))
        if not (key.startswith("_") or helper):
            values[key] = checked(settings, key, value, f"in {path}")
    return values


EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def require_known(settings: dict, key: str, where: str) -> None:
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0.0)[0]
        fail(f"unknown setting {key!r} {where}; did you mean {nearest!r}?")


def checked(settings: dict, key: str, value: object, where: str) -> object:
    """The value for settings[key], in the type of its default. Exits when there is no such key, the
    type differs, or the number is not finite or too large."""
    require_known(settings, key, where)
    default = settings[key]
    wanted = type(default)
    try:
        if isinstance(value, str) and wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if isinstance(value, str) and wanted in (int, float) or type(value) is int and (
                wanted is float):
            value = wanted(value)
    except (KeyError, ValueError, OverflowError):
        pass
    if type(value) is not wanted or wanted is float and not math.isfinite(value) or (
            wanted is int and abs(value) >> 63):
        with contextlib.suppress(ValueError):  # Python does not print an integer of 5,000 digits
            key = f"{key}={value}"
        fail(f"{key[:200]} {where}: expected {EXPECTED[wanted]}, such as {default!r}")
    return value


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        fail(f"{key}={value}: choose {', '.join(choices)}")


def require_in(settings: dict, interval: str, *keys: str) -> None:
    """Exits unless every settings[key] lies in an interval such as "[0, 1)" or "(0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    for key in keys:
        value = settings[key]
        if not low <= value <= high or value == low and interval[0] == "(" or (
                value == high and interval[-1] == ")"):
            fail(f"{key}={value}: must lie in {interval}")


def require_trainable(settings: dict) -> None:
    """The ranges of the settings that train.py and distill.py share."""
    require_choice("optimizer", settings["optimizer"], ("adamw", "muon"))
    require_choice("schedule", settings["schedule"], ("constant", "cosine"))
    require_in(settings, "[1, inf)", "batch_size", "gradient_accumulation_steps", "max_iters",
               "eval_interval", "eval_iters", "log_interval")
    require_in(settings, "(0, inf)", "learning_rate")
    require_in(settings, "[0, inf)", "min_lr", "warmup_iters", "weight_decay", "grad_clip", "seed")
    require_in(settings, "[0, 1)", "beta1", "beta2", "ema_decay", "dropout")
    if settings["schedule"] == "cosine" and settings["min_lr"] > settings["learning_rate"]:
        fail(f"the cosine would rise from learning_rate={settings['learning_rate']} to "
             f"min_lr={settings['min_lr']}; lower min_lr, or set schedule=constant")


def require_sampling(settings: dict) -> None:
    """The ranges of sample.py's settings, and which of them go together."""
    require_in(settings, "[1, inf)", "num_samples")
    require_in(settings, "[0, inf)", "block_size", "n_head", "seed")
    require_in(settings, "[0, 1000000]", "flow_steps")
    require_in(settings, "[0, 1]", "gamma")
    require_in(settings, "[1e-3, 1e3]", "temperature", "guidance")  # beyond, float32 overflows
    require_in(settings, "(0, 1)", "weak_dropout")
    require_choice("model", settings["model"], ("auto", "flm", "fmlm"))
    require_choice("order", settings["order"], ("confidence", "random"))
    refine, flow_steps, weak = settings["refine"], settings["flow_steps"], settings["weak"]
    guided, other_dropout = settings["guidance"] != 1, settings["weak_dropout"] != 0.1
    if flow_steps and settings["init_from"]:
        fail("flow_steps compares a flow map in out_dir with the flow beside it; leave out "
             "init_from")
    if refine and (settings["gamma"] or settings["temperature"] != 1 or guided or flow_steps):
        fail("refine goes with none of gamma, temperature, guidance and flow_steps; leave them out")
    if settings["order"] == "random" and not refine:
        fail("order=random is for refining; add --refine=8, say")
    if (weak or other_dropout) and not guided:
        fail("weak and weak_dropout are for guidance; add --guidance=2, say")
    if weak and (flow_steps or other_dropout):
        fail("weak goes with neither flow_steps nor weak_dropout; leave them out")


def parse_numbers(name: str, text: str, kind: type, example: str) -> list:
    """"1,2,4" -> [1, 2, 4]. Exits unless all are of that kind, positive and at most a million."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = [0]
    if not all(0 < value <= 1_000_000 for value in values):
        fail(f"{name}={text}: expected positive numbers up to 1,000,000, such as {example}")
    return values
