#!/usr/bin/env bash
# Tests and measures what needs a GPU, in at most ten minutes and without a network:
#   OUT=out-gpu tests/gpu.sh
# Every part has a time limit, and a part that fails does not stop the next. Ends with the results in
# OUT/gpu.json, the logs of all parts beside it, and a table. TINY=1 makes every part small.
# The GPT-2 runs read data/shakespeare if it has been prepared, and characters if not: its
# tokenizer has to be downloaded.
set -u
cd "$(dirname "$0")/.."
export OUT=${OUT:-out-gpu}
mkdir -p "$OUT"
rm -f "$OUT"/*.log "$OUT/parts.txt"

part() { # name, time limit in seconds, command
  local name=$1 limit=$2 start=$SECONDS
  timeout --kill-after=5 "$limit" "${@:3}" > "$OUT/$name.log" 2>&1
  echo "$name $? $((SECONDS - start))" | tee -a "$OUT/parts.txt"
}

train() { # name, time limit in seconds, config and settings
  part "$1" "$2" python train.py "${@:3}" ${tiny_run:-} --out_dir="$OUT/$1" --init_from=scratch \
    --wandb_log=False
}

bench="python bench.py --tokenize_mb=0"
gpt2="--log_interval=1 --eval_interval=1000 --eval_iters=20 --gradient_accumulation_steps=4"
iters=60
if [ -n "${TINY:-}" ]; then
  shape="--n_layer=2 --n_head=2 --n_embd=32 --block_size=32"
  bench+=" $shape --vocab_size=512 --steps=3 --tokens=8"
  tiny_run="$shape --batch_size=4 --eval_iters=2 --eval_interval=10 --max_iters=12"
  iters=12
fi
python data/shakespeare_char/prepare.py
dataset=shakespeare_char
[ -e data/shakespeare/train.bin ] && dataset=shakespeare
gpt2+=" --dataset=$dataset --max_iters=$iters --lr_decay_iters=$iters --warmup_iters=5"

part tests 130 python -m pytest -q -m cuda tests
part bench_12 75 $bench --batch_size=12 --compare=True --num_samples=10
part bench_60 55 $bench --batch_size=60 --optimizer_type=muon --tokens=0
train char 105 config/train_shakespeare_char.py
train char_muon 45 config/train_shakespeare_char.py --optimizer_type=muon --lr_schedule=wsd \
  --decay_frac=0.9 --min_lr=0 --max_iters=2500 --lr_decay_iters=2500
train gpt2_adamw 45 config/train_gpt2_adamw.py $gpt2
train gpt2_muon 45 config/train_gpt2_fast.py $gpt2
train gpt2_deterministic 45 config/train_gpt2_adamw.py $gpt2 --deterministic=True

python - <<'END'
import csv, json, os, statistics

out = os.environ["OUT"]
results = {}
for line in open(f"{out}/parts.txt"):
    part, code, seconds = line.split()
    result = results[part] = {"exit_code": int(code), "seconds": int(seconds)}
    last_line = (open(f"{out}/{part}.log").read().splitlines() or [""])[-1]
    if part.startswith("bench") and code == "0":
        result.update(json.loads(last_line))
    elif os.path.exists(f"{out}/{part}/log.csv"):
        rows = list(csv.DictReader(open(f"{out}/{part}/log.csv")))
        times = [float(row["time_ms"]) for row in rows[2:] if row["time_ms"]]
        losses = [float(row["loss"]) for row in rows if row["loss"]]
        val_losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
        if times:
            result.update(time_ms=statistics.median(times), loss=losses[-1],
                          val_loss=min(val_losses))
    else:
        result["last_line"] = last_line
with open(f"{out}/gpu.json", "w") as file:
    json.dump(results, file, indent=1)

print("\n| part | seconds | ms per iteration | result |\n|---|---|---|---|")
for part, result in results.items():
    ms = result.get("train_ours_ms", result.get("time_ms", ""))
    if "train_ours_rate" in result:
        text = f"{result['train_ours_rate']:,.0f} tokens/s, {result.get('train_ours_gib')} GiB"
        for name in ("train_baseline_ratio", "sample_ours_rate", "sample_baseline_ratio"):
            if name in result:
                text += f", {name} {result[name]:,.1f}"
    elif "val_loss" in result:
        text = f"loss {result['loss']:.4f}, val loss {result['val_loss']:.4f}"
    else:
        text = result.get("last_line", "")
    if result["exit_code"] != 0:
        text = f"FAILED ({result['exit_code']}) {text}"
    print(f"| {part} | {result['seconds']} | {ms} | {text} |")
raise SystemExit(any(result["exit_code"] for result in results.values()))
END
