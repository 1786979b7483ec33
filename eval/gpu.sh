#!/usr/bin/env bash
# What one GPU does: the GPU tests, then the published OpenWebText network (12 layers, width 768, V = 50,257, L = 1,024).
#
#     bash eval/gpu.sh [folder]     # default results/gpu; about five minutes on an H100
#
# Writes <folder>/<card>-<date>.json (every measurement), <folder>/*.log (the tables, the profiles), and prints one table.
# A part that fails or takes too long is reported and the rest still runs.
set -uo pipefail
cd "$(dirname "$0")/.."
folder="${1:-results/gpu}"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

part() {  # part <seconds allowed> <name> <command ...>
    local limit="$1" name="$2" start="$SECONDS"
    shift 2
    timeout "$limit" "$@" >"$work/$name.log" 2>&1 || echo "$name: failed or stopped after $((SECONDS - start)) s, see $name.log"
    echo "$name: $((SECONDS - start)) s"
    cp "$work/$name.log" "$folder/"
}
bench() {  # bench <seconds allowed> <name> <arguments of bench.py ...>
    part "$1" "$2" "$python" bench.py "${@:3}" --out_dir="$work/$2" --block_size=1024 --turns=1
}

part 110 tests "$python" -m pytest -q tests/test_gpu.py -n 8 -p no:cacheprovider
caps="--attention_softcap=50 --logit_softcap=30 --compile=true"
bench 110 train train $caps --paths=ours,floor --steps=10 --profile=true
bench 40 train64 train $caps --paths=ours --batch_size=64 --steps=5
bench 60 plain train --compile=true --paths=ours --steps=10 --profile=true
bench 60 distill distill $caps --paths=ours --batch_size=16 --steps=10 --profile=true
bench 40 dense train --attention_softcap=50 --logit_softcap=30 --compile=true --paths=dense --steps=5
bench 40 head head --paths=ours,whole --logit_softcap=30 --steps=5
bench 60 sample64 sample $caps --batch_size=64 --steps=2
bench 60 sample1 sample $caps --batch_size=1 --steps=2

"$python" - "$work" "$folder" <<'PYTHON'
import datetime, json, pathlib, sys
import torch
work, folder = map(pathlib.Path, sys.argv[1:])
records = {path.parent.name: json.loads(path.read_text().splitlines()[-1]) for path in sorted(work.glob("*/*.jsonl"))}
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
out = folder / f"{card.replace(' ', '-')}-{datetime.datetime.now():%Y-%m-%d-%H%M}.json"
out.write_text(json.dumps(dict(card=card, torch=torch.__version__, records=records), indent=1))
print(f"\n{'part':10}{'path':8}{'s a step':>10}{'tokens/s':>12}{'peak GiB':>10}")
for name, record in records.items():
    for path, row in record["paths"].items():
        print(f"{name:10}{path:8}{row['seconds']:10.4f}{row['tokens_per_second']:12,.0f}{row['peak_gib']:10.2f}")
print(f"wrote {out}")
PYTHON
