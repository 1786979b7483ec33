"""python -m pytest tests/test_fuzz.py

Random settings, files and disks that fail. The readers of settings and checkpoints and the writers
of files give an answer or an error of one line: never a traceback, half a file, or another
checkpoint than the one saved. Every run tries the same examples.
"""

import copy
import functools
import io
import itertools
import math
import os
import pickle
import runpy
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import tokenizer
from lib.checkpoint import load_checkpoint, save_checkpoint, write_lines
from lib.settings import configure
from model import FlowTransformer, ModelConfig

settings.register_profile("reproducible", derandomize=True, database=None, deadline=None,
                          max_examples=60)
settings.load_profile("reproducible")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

# ------------------------------------------------------------------------------ command line

SCRIPT = dict(__doc__="A script.", __file__=__file__, __name__="__main__", _own=1, Path=Path,
              LIMIT=3, compile=False, steps=1000, learning_rate=2e-3, out_dir="out/toy")
DEFAULTS = {key: SCRIPT[key] for key in ("compile", "steps", "learning_rate", "out_dir")}
VALUES = dict(compile=st.booleans(), steps=st.integers(-2 ** 62, 2 ** 62), out_dir=st.text(),
              learning_rate=st.floats(allow_nan=False, allow_infinity=False))
some_settings = st.fixed_dictionaries({}, optional=VALUES)
ODD = ["", "nan", "-inf", "1e999", "9" * 5000, "a\nb", "c\r\u2028d", "\udcff", "--", "-", ".",
       "\0"]
keys = st.sampled_from([*DEFAULTS] * 9 + [*SCRIPT] + ODD + ["step", "Steps", "out-dir"])
values = st.one_of(st.sampled_from([*ODD, "true", "False", "1"]), st.integers().map(str),
                   st.floats().map(str), st.text())
arguments = st.one_of(st.builds("--{}={}".format, keys, values).map(lambda word: [word]),
                      st.tuples(keys.map("--{}".format), values).map(list),
                      keys.map(lambda key: [f"--{key}"]))
help_words = "-h", "--help"  # print and exit well


def in_words(good):
    return [f"--{key}={value}" for key, value in good.items()]


def one_line(stopped):
    """Whether a program ended as settings.fail ends it."""
    words = stopped.code
    return isinstance(words, str) and words.startswith("error: ") and len(words.splitlines()) == 1


def check_settings(argv):
    """configure returns settings of the defaults' names and types, as this does, or exits with one
    line."""
    script, found = SCRIPT.copy(), {}
    try:
        found = configure(script, argv)
    except SystemExit as stopped:
        assert one_line(stopped), stopped.code
    else:
        kinds, wanted = ([(key, type(value)) for key, value in values.items()]
                         for values in (found, DEFAULTS))
        assert kinds == wanted
        assert math.isfinite(found["learning_rate"])
    assert script == SCRIPT
    return found


@given(word=values.filter(lambda word: word not in help_words))
def test_any_first_word_gives_settings_or_one_line(word):
    check_settings([word])


@settings(max_examples=400)
@given(good=some_settings, rest=st.lists(arguments, max_size=2).map(lambda parts: sum(parts, [])))
def test_any_command_line_gives_settings_or_one_line(good, rest):
    check_settings(in_words(good) + [word for word in rest if word not in help_words])


@given(good=some_settings, one_word=st.booleans())
def test_settings_on_the_command_line_are_read_back(good, one_word):
    """From one word or two, where the second must not look like a setting. --key alone is true."""
    good = {k: value for k, value in good.items() if one_word or not str(value).startswith("--")}
    words = in_words(good) if one_word else sum(([f"--{k}", str(v)] for k, v in good.items()), [])
    assert configure(SCRIPT, words) == DEFAULTS | good
    assert configure(SCRIPT, words + ["--compile"]) == DEFAULTS | good | dict(compile=True)

# ------------------------------------------------------------------------------ config file

expressions = st.one_of(*VALUES.values()).map(repr) | st.sampled_from([
    "None", "[1]", "{}", "object()", "print", "steps", "10 ** 400", "-10 ** 5000", "1e999",
    "1e999 * 0", "'a\\nb'", "'\\udcff'", "b''"])
assigned_keys = st.sampled_from([*DEFAULTS] * 3 + ["_own", "stepz", "__file__"])
statements = st.builds("{} = {}".format, assigned_keys, expressions) | st.sampled_from([
    "import math", "from pathlib import Path", "def f():\n    pass", "# words", "", "(", "1 / 0",
    "  x", "steps += 1", "del steps", "raise ValueError('a\\nb')", "raise SystemExit",
    "raise SystemExit('a\\nb')", "globals().clear()"])


def in_lines(good):
    return [f"{key} = {value!r}" for key, value in good.items()]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tmp_path_factory.mktemp("config") / "any.py"


@settings(max_examples=400)
@given(good=some_settings, rest=st.lists(statements, max_size=2))
@example(good={}, rest=["learning_rate = 10 ** 400"])
@example(good={}, rest=["compile = 10 ** 5000"])
@example(good={}, rest=["steps = print"])
def test_any_config_file_gives_settings_or_one_line(config, good, rest):
    """The settings are what the file assigns, but text may spell a number, true or false."""
    config.write_text("\n".join(in_lines(good) + rest), encoding="utf-8")
    found = check_settings([str(config)])
    assigned = runpy.run_path(str(config)) if found else {}
    assert all(found[key] == assigned[key] or type(assigned[key]) is str
               for key in found if key in assigned)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(content=st.text().map(str.encode) | st.binary())
def test_any_file_as_config_gives_settings_or_one_line(config, content):
    config.write_bytes(content)
    check_settings([str(config)])
    assert contents(config.parent) == {config.name: content}


@given(good=some_settings)
def test_settings_in_a_config_file_are_read_back(config, good):
    config.write_text("\n".join(["import math", *in_lines(good)]), encoding="utf-8")
    assert configure(SCRIPT, [str(config)]) == DEFAULTS | good

# ------------------------------------------------------------------------------ checkpoints

def small_checkpoint(seed):
    """All that train.py writes, for the smallest network, after one step."""
    torch.manual_seed(seed)
    shape = ModelConfig(5, 4, n_layer=1, n_head=1, n_embd=2, n_time=1)
    model = FlowTransformer(shape)
    optimizer = torch.optim.AdamW(model.parameters())
    model.head(model(torch.randn(1, 4, 2), torch.rand(1))).sum().backward()
    optimizer.step()
    return dict(format="flm-1", kind="flm", model_config=asdict(shape), model=model.state_dict(),
                ema=copy.deepcopy(model).state_dict(), optimizers=[optimizer.state_dict()],
                scaler={}, clock_embedding_share=0.0, settings=dict(seed=seed), step=1,
                train_tokens=2000, vocabulary="0123456789ab",
                tokenizer=tokenizer.to_dict(tokenizer.char_encoding("abcde", "five")))


def identical(a, b):
    """To the bit and to the type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.numpy().tobytes()) == (b.dtype, b.shape, b.numpy().tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def check_reading(path, saved=None):
    """load_checkpoint returns what was saved or exits with one line, and changes no file."""
    before = contents(path.parent)
    try:
        found = load_checkpoint(path)
    except SystemExit as stopped:
        assert one_line(stopped), stopped.code
    else:
        assert saved and identical(found, saved)
    assert contents(path.parent) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, the bytes of its file, and where to put damaged ones."""
    path, checkpoint = tmp_path_factory.mktemp("damaged") / "flm.pt", small_checkpoint(1)
    save_checkpoint(path, checkpoint)
    assert identical(load_checkpoint(path), checkpoint)
    return checkpoint, path.read_bytes(), path


def flip(whole, bits):
    damaged = bytearray(whole)
    for place, bit in bits:
        damaged[place % len(whole)] ^= 1 << bit
    return damaged


def blank(whole, span):
    start, n = span[0] % len(whole), span[1]
    return whole[:start] + bytes(len(whole[start:start + n])) + whole[start + n:]


def cut(whole, n):
    return whole[:n % len(whole)]


def lengthen(whole, tail):
    return whole + tail


places = st.integers(0, 2 ** 20)
bits = st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=8)
damages = st.one_of(st.tuples(st.just(flip), bits), st.tuples(st.just(cut), places),
                    st.tuples(st.just(blank), st.tuples(places, st.integers(1, 2000))),
                    st.tuples(st.just(lengthen), st.binary(min_size=1)))


@settings(max_examples=400)
@given(damage=damages)
def test_a_damaged_checkpoint_is_refused_or_unharmed(saved, damage):
    checkpoint, whole, path = saved
    damaging, how = damage
    path.write_bytes(damaging(whole, how))
    check_reading(path, checkpoint)


def test_no_bit_of_a_directory_entry_changes_a_weight(saved):
    """All bits of one entry: no checksum covers the directory at the end of a zip file."""
    checkpoint, whole, path = saved
    entry = whole.rindex(b"archive/data/0") - 46  # its fixed part comes before the name
    for place, bit in itertools.product(range(entry, entry + 46), range(8)):
        path.write_bytes(flip(whole, [(place, bit)]))
        check_reading(path, checkpoint)


members = st.dictionaries(st.sampled_from(["data.pkl", "version", "byteorder", "data/0"]),
                          st.binary(max_size=20))


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def stored(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


entries = st.sampled_from(["format", "kind", "state_dict", "ema", "step"])
plain = st.recursive(st.none() | st.integers() | st.text() | st.sampled_from(["flm-0", "fmlm"]),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(entries, inner))


@settings(max_examples=200)
@given(content=st.binary() | members.map(zipped) | plain.map(stored) | plain.map(pickle.dumps))
def test_another_file_is_no_checkpoint(saved, content):
    """Bytes, other zip files, other things written by torch.save or pickle."""
    *_, path = saved
    path.write_bytes(content)
    check_reading(path)


class Mischief:
    """Pickled as a call that makes a file."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


@pytest.mark.parametrize("call, argument", [
    (os.system, "echo > {}"), (os.mkdir, "{}"), (eval, "open({!r}, 'w')")])
@pytest.mark.parametrize("write", [
    torch.save, pickle.dump, functools.partial(torch.save, _use_new_zipfile_serialization=False)])
def test_a_checkpoint_cannot_run_a_program(tmp_path, call, argument, write):
    made, path = tmp_path / "made", tmp_path / "flm.pt"
    with open(path, "wb") as file:
        mischief = Mischief(call, argument.format(str(made)))
        write(small_checkpoint(1) | dict(settings=mischief), file)
    check_reading(path)
    assert not made.exists()

# ------------------------------------------------------------------------------ full disk

@contextmanager
def room_for(n):
    """Writing a file past n bytes fails, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits on files need POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CHECKPOINTS = small_checkpoint(1), small_checkpoint(2)
RECORDS = [[dict(step=step, text="añ\n" * k) for step in range(40)] for k in (20, 30)]


@pytest.mark.parametrize("write, old, new", [
    (save_checkpoint, *CHECKPOINTS), (write_lines, *RECORDS)])
@given(room=st.floats(0, 1.5))
def test_a_failed_write_leaves_the_old_file(tmp_path_factory, write, old, new, room):
    """A write fails exactly when there is no room for the new file, and then changes nothing. The
    checkpoint before is kept."""
    folder = tmp_path_factory.mktemp("full")
    path = folder / "file.pt"
    write(path, new)
    after = path.read_bytes()
    write(path, old)
    before, n = contents(folder), int(room * len(after))
    assert before[path.name] != after
    try:
        with room_for(n):
            write(path, new)
    except SystemExit as stopped:
        assert one_line(stopped) and n < len(after), stopped.code
        assert contents(folder) == before
    else:
        kept = {"file.prev.pt": before[path.name]} if write is save_checkpoint else {}
        assert n >= len(after) and contents(folder) == {path.name: after, **kept}
