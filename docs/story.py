"""Draw the README's animations of stories, from a flow and its flow map.

    python docs/story.py             # into docs/, from weights/stories; --seed=2 for another story

story.gif    a story of each: the flow's guesses in 64 steps, the flow map's single jump
refine.gif   a draft of the flow map, corrected by posterior refinement; needs a map with context
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the top folder
import flow
import flowmap
from data.loader import find_check
from lib import checkpoint as ckpt
from lib.machine import SAMPLE_NOISE, generator
from lib.mend import noise_of, noise_of_rounds
from lib.settings import configure, fail
from lib.watch import spell

out_dir = "weights/stories"      # where flm.pt and fmlm.pt are
to = "docs"                      # the folder of the pictures
steps = 64                       # of the flow
rounds = 8                       # of the refinement
seed = 1                         # of the noise: another seed, another story

settings = configure(globals(), sys.argv[1:])
globals().update(settings)
try:
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    fail("the figures need matplotlib and pillow; run: pip install matplotlib pillow")

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
PLAIN, BOLD = (ImageFont.truetype(str(FONTS / f"DejaVuSans{kind}.ttf"), 17)
               for kind in ("", "-Bold"))
WIDTH, LINE, EDGE = 400, 27, 24                                     # of a panel, in pixels

# ------------------------------------------------------------------------------ the guesses

files = {kind: ckpt.load_checkpoint(Path(out_dir) / f"{kind}.pt", kind) for kind in ("flm", "fmlm")}
nets = {kind: ckpt.build_model(file, torch.device("cpu")) for kind, file in files.items()}
if not nets["flm"].embed.weight.equal(nets["fmlm"].embed.weight):
    fail(f"{out_dir}/flm.pt is not the flow that fmlm.pt was distilled from")
E, L = nets["fmlm"].embed.weight.detach(), nets["fmlm"].config.block_size
clock = flow.Clock(*E.shape, files["flm"]["clock_embedding_share"])
encoding = ckpt.find_tokenizer(files["fmlm"], "")
check = find_check(files["fmlm"].get("checker")) or (lambda text: None)


def guesses_of(sample) -> list[list[tuple]]:
    """Of every text of sample(watch), its guesses in order: the words, how sure the network is of
    each, which were told."""
    seen = []

    def watch(model, hidden):
        tokens = flow.most_likely(model.head, hidden)               # (B, L)
        known = torch.zeros_like(tokens, dtype=torch.bool)
        if isinstance(model, flow.Given):
            known, tokens = model.known, torch.where(model.known, model.y, tokens)
        seen.append((tokens, flowmap.confidence(model.head, hidden, tokens), known))
    sample(watch)
    return [[(spell(encoding, tokens[i].tolist()), sure[i].tolist(), known[i].tolist())
             for tokens, sure, known in seen] for i in range(len(seen[0][0]))]


def right(guess: tuple) -> bool:
    return check("".join(guess[0]).strip()) is None


def first_good(*ways: list[list[tuple]], refined: bool = False) -> list[list[tuple]]:
    """The guesses of the first noise from which every way ends in a right story; with `refined` one
    whose first guess is wrong."""
    for texts in zip(*ways):
        if all(right(guesses[-1]) and not (refined and right(guesses[0])) for guesses in texts):
            return texts
    fail(f"none of {len(ways[0])} noises gives a right story{' from a wrong draft' * refined}; "
         f"try another seed, or train longer")

# ------------------------------------------------------------------------------ drawing

def draw(image: Image.Image, x: int, title: str, color: str, guess: tuple) -> None:
    """A guess in the panel that begins at x: pale words are unsure, bold ones told."""
    pen = ImageDraw.Draw(image)
    pen.text((x, EDGE), title, color, BOLD)
    left, y = x, EDGE + 2 * LINE
    for word, sure, known in zip(*guess):
        font = BOLD if known else PLAIN
        word = word.lstrip() if left == x else word
        if left + font.getlength(word) > x + WIDTH:
            left, y, word = x, y + LINE, word.lstrip()
        shade = round(215 * (1 - max(sure, known)) ** 0.7)
        pen.text((left, y), word, (shade, shade, shade), font)
        left += font.getlength(word)


def save(name: str, frames: list[Image.Image], milliseconds: list[int]) -> None:
    frames = [frame.quantize(32) for frame in frames]
    ckpt.replace_file(Path(to) / name, lambda file: frames[0].save(
        file, format="gif", save_all=True, append_images=frames[1:], loop=0,
        duration=milliseconds))


def empty(panels: int) -> Image.Image:
    return Image.new("RGB", (panels * (WIDTH + 2 * EDGE), 8 * LINE + EDGE), "white")


rng = generator(seed, SAMPLE_NOISE, 0)
FLOW, MAP = "#1f5fa8", "#c2410c"
z, z_map = (noise_of(files[kind])(E, (64, L), rng) for kind in ("flm", "fmlm"))         # (B, L, d)
by_flow, by_map = first_good(
    guesses_of(lambda watch: flow.sample(nets["flm"], clock, z, steps, watch=watch)),
    guesses_of(lambda watch: flowmap.sample(nets["fmlm"], clock, z_map, 1, watch=watch)))
frames = []
for i, guess in enumerate(by_flow):
    frames.append(empty(2))
    draw(frames[-1], EDGE, f"The flow: step {i + 1} of {steps}", FLOW, guess)
    draw(frames[-1], WIDTH + 3 * EDGE, "The flow map: one step", MAP, by_map[0])
save("story.gif", frames, [120] * (len(frames) - 1) + [4000])

if all(file["settings"].get("context_share") for file in files.values()):
    rng = generator(seed, SAMPLE_NOISE, 1)
    refined, = first_good(guesses_of(
        lambda watch: flowmap.refine(nets["fmlm"], clock, noise_of_rounds(files["fmlm"], lambda:
            noise_of(files["fmlm"])(E, (64, L), rng)), rounds, watch=watch)), refined=True)
    frames = []
    for i, guess in enumerate(refined):
        frames.append(empty(1))
        draw(frames[-1], EDGE, f"Refinement: round {i + 1} of {rounds}", MAP, guess)
    save("refine.gif", frames, [1200] * (len(frames) - 1) + [4000])
print(f"wrote pictures to {to}")
