#!/usr/bin/env bash
# What one GPU does: tests/test_gpu.py, then the network of the published OpenWebText recipe
# (12 layers, width 768, V = 50,257, L = 1,024).
#
#     bash eval/gpu.sh [folder]     # default results/gpu; five to six minutes on an H100
#
# BENCH has more settings for bench.py. Without a GPU, try the script so:
#     BENCH="--device=cpu --vocab_size=512 --n_layer=1 --n_head=2 --n_embd=32 --block_size=64 \
#         --batch_size=2 --dtype=float32 --steps=1" bash eval/gpu.sh /tmp/gpu
#
# Writes <folder>/<card>-<date>.json (every measurement) and <folder>/*.log (tables, a profile), and
# prints one table. A part that fails or takes too long is reported; the rest still runs.
#
# On an H100 the tests take 77 s. The first torch.compile of this network with soft caps takes about
# 50 s, and 30 s in every further process, so distillation and sampling are not compiled.
set -uo pipefail
cd "$(dirname "$0")/.."
folder="${1:-results/gpu}"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

part() {  # part <seconds allowed> <name> <command ...>
    local limit="$1" name="$2" start="$SECONDS" ended="done"
    shift 2
    timeout "$limit" "$@" >"$work/$name.log" 2>&1 || ended="failed or stopped, see $name.log"
    echo "$name: $ended after $((SECONDS - start)) s"
    cp "$work/$name.log" "$folder/"
}
bench() {  # bench <seconds allowed> <name> <arguments of bench.py ...>
    part "$1" "$2" "$python" eval/bench.py "${@:3}" --out_dir="$work/$2" --block_size=1024 --turns=1 \
        ${BENCH:-}
}

part 110 tests "$python" -m pytest -q tests/test_gpu.py -n 8 -p no:cacheprovider
caps="--attention_softcap=50 --logit_softcap=30"
bench 140 train train $caps --compile=true --paths=ours,floor --profile=true
bench 70 train64 train $caps --compile=true --paths=ours --batch_size=64 --profile=true
bench 60 nocaps train --compile=true --paths=ours --profile=true
bench 40 distill distill --paths=ours --batch_size=16
bench 30 sample64 sample --paths=ours --batch_size=64 --steps=2
bench 30 sample1 sample --paths=ours --batch_size=1 --steps=2
bench 60 head head --paths=ours,whole --logit_softcap=30 --compile=true

"$python" - "$work" "$folder" <<'PYTHON'
import datetime, json, pathlib, sys
import torch
work, folder = map(pathlib.Path, sys.argv[1:])
records = {path.parent.name: json.loads(path.read_text().splitlines()[-1])
           for path in sorted(work.glob("*/*.jsonl"))}
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
name = f"{card.replace(' ', '-')}-{datetime.datetime.now():%Y-%m-%d-%H%M}.json"
(folder / name).write_text(json.dumps(dict(card=card, torch=torch.__version__, records=records),
                                      indent=1))
print(f"\n{'part':10}{'path':8}{'s a step':>10}{'tokens/s':>12}{'peak GiB':>10}")
for part, record in records.items():
    for path, row in record["paths"].items():
        print(f"{part:10}{path:8}{row['seconds']:10.4f}{row['tokens_per_second']:12,.0f}"
              f"{row['peak_gib']:10.2f}")
print(f"wrote {folder / name}")
PYTHON
