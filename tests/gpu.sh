#!/usr/bin/env bash
# What only a GPU can tell, in less than ten minutes on one card and without a network: the tests
# marked cuda; speed and memory at 124M; tiny Shakespeare; AdamW against Muon at 124M.
#
#   tests/gpu.sh              writes gpu.json and logs to $OUT (out-gpu), prints rows for README
#   TINY=1 tests/gpu.sh       the same at tiny sizes, to try this script
#
# Prepare data in GPT-2's tokens beforehand, where there is a network, and copy its train.bin and
# val.bin along. The last part reads about 25M tokens, so the more text the better. Either of
#   python data/text/prepare.py --tokens=gpt2 FILES OR FOLDERS...
#   python data/shakespeare/prepare.py
# Without them, the 124M model trains on the characters of Shakespeare.
#
# A part that fails or exceeds its limit leaves an error in gpu.json, and the next part runs.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-out-gpu}
TOTAL=570  # seconds
tiny_model="" tiny_run="" tiny_bench=""
if [ "${TINY:-}" ]; then
  TOTAL=3000  # on a CPU perhaps
  tiny_model="--n_layer=2 --n_head=2 --n_embd=32 --block_size=16"
  tiny_run="$tiny_model --batch_size=2 --max_iters=4 --lr_decay_iters=4 --eval_iters=2"
  tiny_bench="$tiny_model --vocab_size=65 --steps=2"
fi
mkdir -p "$OUT"
rm -f "$OUT"/*.log "$OUT/gpu.json"
runs=$(mktemp -d)  # checkpoints of gigabytes, so not in $OUT
trap 'rm -rf "$runs"' EXIT

dataset=shakespeare_char  # of the 124M model
for name in shakespeare text; do
  if [ -e data/$name/train.bin ] && [ ! -e data/$name/meta.pkl ]; then dataset=$name; fi
done
if [ ! -e data/shakespeare_char/train.bin ]; then python3 data/shakespeare_char/prepare.py; fi

summarize() {  # writes gpu.json from what the parts have left so far, and prints the table
  python3 - "$runs" "$OUT/gpu.json" "$dataset" <<'END'
import csv, json, re, statistics, sys
from pathlib import Path

runs, dataset = Path(sys.argv[1]), sys.argv[3]
results = {"dataset": dataset}


def read_run(name):
    rows = list(csv.DictReader(open(runs / name / "log.csv")))
    val_losses = {int(row["iter"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    best_iter = min(val_losses, key=val_losses.get)
    ms = statistics.median(float(row["time_ms"]) for row in rows if row["time_ms"])
    time = re.search(r"^best val loss .*, time (\S+)", (runs / f"{name}.log").read_text(), re.M)
    return dict(best_val_loss=val_losses[best_iter], best_iter=best_iter, time=time and time[1],
                median_ms=ms, last_iter=int(rows[-1]["iter"]), val_losses=val_losses)


for line in (runs / "parts").read_text().splitlines():
    name, status, seconds = line.split()
    last_line = ([""] + (runs / f"{name}.log").read_text().splitlines())[-1]
    result = None
    try:
        if name == "tests":
            result = last_line
        else:
            result = json.loads(last_line) if name.startswith("bench") else read_run(name)
    except (OSError, ValueError):
        pass  # it did not get that far
    results[name] = dict(status=int(status), seconds=int(seconds), result=result)
    if status != "0":
        results[name]["error"] = "too slow" if status in ("124", "137") else last_line
Path(sys.argv[2]).write_text(json.dumps(results, indent=1) + "\n")

BENCH = ("{train_ours_ms:.1f} ms, {train_ours_rate:,.0f} tokens/s, {train_ours_gib} GiB, "
         "{train_tflops:.0f} TFLOP/s")
LOSS = "val loss {best_val_loss:.4f} at iteration {best_iter} of {last_iter}, {time}"
print("| what | measured | to compare |\n|---|---|---|")
for name, what, form, other in (
        ("tests", "tests marked cuda", "{0}", ""),
        ("bench-12", "124M, AdamW, 12 × 1024, compiled", BENCH, "7.2 GiB computed"),
        ("bench-60-muon", "124M, Muon, 60 × 1024, compiled", BENCH, "26.9 GiB computed"),
        ("bench-12-uncompiled", "124M, AdamW, 12 × 1024", BENCH, "11.7 GiB computed"),
        ("deterministic-False", "train.py, 124M, 12 × 1024, compiled", "{median_ms:.1f} ms", ""),
        ("deterministic-True", "the same, deterministic", "{median_ms:.1f} ms", ""),
        ("char-adamw", "train_shakespeare_char.py", LOSS, "1.4697, 3 minutes (nanoGPT, A100)"),
        ("char-muon", "the same, Muon and wsd, half the iterations", LOSS, ""),
        ("gpt2-adamw", f"124M, AdamW, 60 × 1024, {dataset}", LOSS, ""),
        ("gpt2-muon", f"124M, Muon, 60 × 1024, {dataset}", LOSS, "")):
    part = results.get(name, {})
    cells = [part.get("error"), part.get("result")]
    if isinstance(cells[1], dict):
        cells[1] = form.format(**cells[1])
    print(f"| {what} | {' / '.join(cell for cell in cells if cell)} | {other} |")
END
}

failed=0
part() {  # name, seconds at most, command; a part's log is named up to the first dash
  local name=$1 limit=$2 status=1 start=$SECONDS log=$runs/$1.log
  if ((limit > TOTAL - SECONDS)); then limit=$((TOTAL - SECONDS)); fi
  echo "$name, at most $limit s"
  echo "no time left" > "$log"
  if ((limit > 5)); then
    timeout -k 10 "$limit" "${@:3}" > "$log" 2>&1
    status=$?
  fi
  { echo "== ${*:3}"; cat "$log"; } >> "$OUT/${name%%-*}.log"
  echo "$name $status $((SECONDS - start))" >> "$runs/parts"
  if ((status != 0)); then failed=1; tail -n 3 "$log"; fi
  summarize > "$runs/table" || failed=1
}
train() {  # name, seconds at most, arguments
  part "$1" "$2" python3 train.py "${@:3}" --wandb_log=False --out_dir="$runs/$1" $tiny_run
}

workers=""
if python3 -c "import xdist" 2> /dev/null; then workers="-n 6"; fi
part tests 120 python3 -m pytest -q -p no:cacheprovider -m cuda $workers tests/test_cuda.py

bench="python3 bench.py --tokens=0 --tokenize_mb=0"
part bench-12 75 $bench --batch_size=12 $tiny_bench
part bench-60-muon 75 $bench --batch_size=60 --optimizer_type=muon $tiny_bench
part bench-12-uncompiled 40 $bench --batch_size=12 --compile=False $tiny_bench

steps="--max_iters=30 --eval_interval=30 --eval_iters=1 --gradient_accumulation_steps=1"
for switch in False True; do
  train deterministic-$switch 70 --dataset=$dataset $steps --deterministic=$switch
done

train char-adamw 110 config/train_shakespeare_char.py
train char-muon 80 config/train_shakespeare_char.py --max_iters=2500 --lr_decay_iters=2500 \
  --optimizer_type=muon --lr_schedule=wsd --decay_frac=0.9 --learning_rate=4e-3 --min_lr=0.0

# As many iterations as two runs can make in the time that is left.
each=$(((TOTAL - SECONDS) / 2))
ms=$(sed -n 's/.*"train_ours_ms": \([0-9]*\).*/\1/p' "$runs/bench-60-muon.log")
if ((${ms:-0} < 1)); then ms=150; fi
iters=$(((each - 45) * 1000 / ms))  # 45 seconds to start, compile, evaluate and save
if ((iters < 60)); then iters=60; fi
recipe="--dataset=$dataset --gradient_accumulation_steps=1 --max_iters=$iters --eval_iters=20
  --lr_decay_iters=$iters --warmup_iters=$((iters / 10)) --eval_interval=$((iters / 6))"
train gpt2-adamw $each config/train_gpt2_adamw.py $recipe
train gpt2-muon $each config/train_gpt2_fast.py $recipe

cat "$runs/table"
exit $failed
