#!/usr/bin/env bash
# What only a GPU can tell, in less than ten minutes on one card and without a network.
#
#   tests/gpu.sh            leaves a table and the log of each part in $OUT (out-gpu)
#   tests/gpu.sh bench xl   only the parts whose names begin like this
#   TINY=1 tests/gpu.sh     the same at tiny sizes, to try this script
#
# Prepare data in GPT-2's tokens beforehand, where there is a network, and copy its train.bin and
# val.bin along. The last part reads about 25M tokens, so the more text the better. Either of
#   python data/text/prepare.py --tokens=gpt2 FILES OR FOLDERS...
#   python data/shakespeare/prepare.py
# Without them, the large models train on the characters of Shakespeare.
#
# A part that fails or exceeds its limit says so in the table, and the next part runs.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-out-gpu}
PYTHON=${PYTHON:-python3}
TOTAL=570  # seconds
chosen=$(IFS="|"; echo "$*")
tiny_model="" tiny_run="" tiny_bench=""
if [ "${TINY:-}" ]; then
  TOTAL=3000  # on a CPU perhaps
  tiny_model="--n_layer=2 --n_head=2 --n_embd=32 --block_size=16"
  tiny_run="$tiny_model --batch_size=2 --max_iters=4 --lr_decay_iters=4 --eval_iters=2"
  tiny_bench="$tiny_model --vocab_size=65 --steps=2"
fi
mkdir -p "$OUT"
rm -f "$OUT"/*.log
printf '| part | seconds | measured |\n|---|---|---|\n' > "$OUT/table.md"
runs=$(mktemp -d)  # checkpoints of gigabytes, so not in $OUT
trap 'rm -rf "$runs"' EXIT

dataset=shakespeare_char  # of the large models
for name in shakespeare text; do
  if [ -e data/$name/train.bin ] && [ ! -e data/$name/meta.pkl ]; then dataset=$name; fi
done
if [ ! -e data/shakespeare_char/train.bin ]; then "$PYTHON" data/shakespeare_char/prepare.py; fi

failed=0
part() {  # name, seconds at most, command
  local name=$1 limit=$2 status=1 start=$SECONDS log=$OUT/$1.log
  if [[ ! $name =~ ^($chosen) ]]; then return; fi
  if ((limit > TOTAL - SECONDS)); then limit=$((TOTAL - SECONDS)); fi
  echo "no time left" > "$log"
  if ((limit > 5)); then
    timeout -k 10 "$limit" "${@:3}" > "$log" 2>&1
    status=$?
  fi
  local last_iter=$(grep "^iter " "$log" | tail -n 1)
  local facts="^(train ours|best val loss|peak|difference).*|.* passed.*|train_ours_gib.: [0-9.]+"
  local result=$(grep -oE "$facts" "$log" | paste -sd ";")
  if ((status != 0)); then
    failed=1
    result="FAILED ($status): $(tail -n 2 "$log" | paste -sd " ")"
  fi
  echo "| $name | $((SECONDS - start)) | $last_iter $result |" | tee -a "$OUT/table.md"
}

run_train='
import atexit, runpy, torch
peak = torch.cuda.max_memory_allocated
atexit.register(lambda: print(f"peak {peak() / 2**30:.1f} GiB"))
runpy.run_path("train.py", run_name="__main__")'
train() {  # name, seconds at most, arguments
  part "$1" "$2" "$PYTHON" -c "$run_train" "${@:3}" --wandb_log=False --out_dir="$runs/$1"
}

compare_logs='
import csv, sys
a, b = (list(csv.DictReader(open(path))) for path in sys.argv[2:])
columns = ("iter", "train_loss", "val_loss", "loss", "lr", "grad_norm")
difference = max(abs(float(x[key] or 0) - float(y[key] or 0))
                 for x, y in zip(a, b, strict=True) for key in columns)
print(f"difference at most {difference:.2g}")
sys.exit(difference > float(sys.argv[1]))'
same() {  # name, the largest difference allowed, names of two runs
  part "$1" 20 "$PYTHON" -c "$compare_logs" "$2" "$runs/$3/log.csv" "$runs/$4/log.csv"
}

workers=""
if "$PYTHON" -c "import xdist" 2> /dev/null; then workers="-n 6"; fi
part tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda $workers tests/test_cuda.py

bench="$PYTHON bench.py --tokens=0"
part bench-12 75 $bench --batch_size=12 $tiny_bench
part bench-60-muon 75 $bench --batch_size=60 --optimizer_type=muon $tiny_bench
part bench-12-uncompiled 40 $bench --batch_size=12 --compile=False $tiny_bench

steps="--dataset=$dataset --max_iters=30 --eval_interval=30 --eval_iters=1 --log_interval=29"
for switch in False True; do
  train deterministic-$switch 70 $steps $tiny_model --gradient_accumulation_steps=1 \
    --deterministic=$switch
done

# 60 x 1024 x 50,304 logits are more than 2^31.
steps="--dataset=$dataset --max_iters=5 --warmup_iters=5 --eval_interval=5 --eval_iters=1"
train logits-60 70 $steps $tiny_model --batch_size=60 --gradient_accumulation_steps=1
train logits-30 70 $steps $tiny_model --batch_size=30 --gradient_accumulation_steps=2
same logits-compare 0.05 logits-60 logits-30

# GPT-2 XL with random weights, interrupted and resumed
xl="config/finetune_shakespeare.py --dataset=$dataset --init_from=scratch --n_layer=48 --n_head=25
  --n_embd=1600 --optimizer_type=muon --gradient_accumulation_steps=2 --eval_interval=4
  --eval_iters=2 --gradient_checkpointing=True --deterministic=True --compile=False $tiny_model"
train xl 90 $xl --max_iters=4
rm -f "$runs"/xl/*.pt  # 13 GB
train xl-resumed 90 $xl --max_iters=2
train xl-resumed 90 --init_from=resume --max_iters=4 --compile=False
same xl-compare 0 xl xl-resumed
rm -f "$runs"/xl-resumed/*.pt

train char-adamw 110 config/train_shakespeare_char.py $tiny_run
train char-muon 80 config/train_shakespeare_char.py --max_iters=2500 --lr_decay_iters=2500 \
  --optimizer_type=muon --lr_schedule=wsd --decay_frac=0.9 --learning_rate=4e-3 --min_lr=0 $tiny_run

# As many iterations as two runs can make in the time that is left.
each=$(((TOTAL - SECONDS) / 2))
ms=$(sed -n 's/.*"train_ours_ms": \([0-9]*\).*/\1/p' "$OUT/bench-60-muon.log" 2> /dev/null)
if ((${ms:-0} < 1)); then ms=150; fi
iters=$(((each - 45) * 1000 / ms))  # 45 seconds to start, compile, evaluate and save
if ((iters < 60)); then iters=60; fi
recipe="--dataset=$dataset --gradient_accumulation_steps=1 --max_iters=$iters --eval_iters=20
  --lr_decay_iters=$iters --warmup_iters=$((iters / 10)) --eval_interval=$((iters / 6))"
train gpt2-adamw $each config/train_gpt2_adamw.py $recipe $tiny_run
train gpt2-muon $each config/train_gpt2_fast.py $recipe $tiny_run

exit $failed
