#!/usr/bin/env bash
# Runs the whole suite at both ends of requirements.txt, and in between, each in a fresh virtual
# environment, and ends with a table. usage: tests/matrix.sh [FOLDER for the environments]
set -u
cd "$(dirname "$0")/.."
folder=${1:-$(mktemp -d)}
lowest="torch==2.9.1 numpy==1.26.4 tiktoken==0.11.0 datasets==4.0.0 wandb==0.20.1 tqdm==4.66.3
safetensors==0.4.3 matplotlib==3.8.4"
table=""

run() { # name, interpreter, packages
  local name=$1 python=$2 environment=$folder/$1 start=$SECONDS
  if [ ! -e "$environment/ready" ]; then
    "$python" -m venv "$environment" &&
      "$environment/bin/pip" install --quiet ${@:3} -r requirements.txt -r tests/requirements.txt &&
      touch "$environment/ready"
  fi
  local summary
  summary=$("$environment/bin/python" -m pytest -q -p no:cacheprovider tests | tee "$folder/$name.log" | tail -1)
  table+=$(printf '%-10s %-14s %-14s %4d s   %s' "$name" "$("$python" --version)" \
    "torch $("$environment/bin/python" -c 'import torch; print(torch.__version__)')" \
    $((SECONDS - start)) "$summary")$'\n'
}

run lowest python3.10 $lowest
run middle python3.11 torch==2.13.0
run highest python3.13
printf '\n%s' "$table"
