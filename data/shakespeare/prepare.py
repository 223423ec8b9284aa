"""
Tiny Shakespeare in GPT-2's BPE, to finetune on: 301,966 tokens to train on, 36,059 for validation.

    python data/shakespeare/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure
from data.common import encode_gpt2, gpt2_bpe, replace_dataset

configure(globals())
text = (HERE.parent / "tinyshakespeare.txt").read_text(encoding="utf-8")
cut = int(len(text) * 0.9)  # by characters, as in the character data set
bpe = gpt2_bpe()
train_ids = encode_gpt2(bpe, text[:cut])
val_ids = encode_gpt2(bpe, text[cut:])
with replace_dataset(HERE) as tmp_folder:
    train_ids.tofile(Path(tmp_folder, "train.bin"))
    val_ids.tofile(Path(tmp_folder, "val.bin"))
print(f"train.bin {len(train_ids):,} tokens, val.bin {len(val_ids):,}")
