#!/usr/bin/env bash
# Runs the whole suite at both ends of requirements.txt, and with lm-evaluation-harness, each in a
# fresh virtual environment, and ends with a table.
# usage: tests/matrix.sh [FOLDER for the environments [NAMES of those to run]]
set -u
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
names=${*:2}
lowest="torch==2.11.0 numpy==2.0.0 tiktoken==0.12.0 tokenizers==0.22.2 datasets==4.0.0
  wandb==0.20.1 tqdm==4.66.3 safetensors==0.4.3 matplotlib==3.9.0"
table=""
failed=0

run() {  # name, interpreter, packages
  local name=$1 python=$2 environment=$folder/$1 start=$SECONDS
  if [[ -n $names && " $names " != *" $name "* ]]; then return; fi
  if [ ! -e "$environment/ready" ]; then
    "$python" -m venv "$environment" &&
      "$environment/bin/pip" install --quiet ${@:3} -r requirements.txt -r tests/requirements.txt &&
      touch "$environment/ready"
  fi
  "$environment/bin/python" -m pytest -q -p no:cacheprovider tests > "$folder/$name.log" 2>&1 ||
    failed=1
  table+=$(printf '%-8s %-14s torch %-14s %4d s   %s' "$name" "$("$python" --version)" \
    "$("$environment/bin/python" -c 'import torch; print(torch.__version__)')" \
    $((SECONDS - start)) "$(tail -n 1 "$folder/$name.log")")$'\n'
}

newest=python3.13
if python3.14 --version > /dev/null 2>&1; then newest=python3.14; fi
run lowest python3.11 $lowest
run lm_eval python3.11 torch==2.13.0 lm_eval[hf]
run highest $newest
printf '\n%s' "$table"
exit $failed
