"""
Tiny Shakespeare in GPT-2's BPE, to finetune on: 301,966 tokens to train on, 36,059 to validate.

    python data/shakespeare/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import configure
from data import tinyshakespeare
from data.common import gpt2_bpe, write_ids

configure(globals())
text = tinyshakespeare.load(HERE)
bpe = gpt2_bpe()
cut = int(len(text) * 0.9)  # by characters, as for the character model
for split, part in (("train", text[:cut]), ("val", text[cut:])):
    ids = bpe.encode_ordinary(part)
    write_ids(HERE / f"{split}.bin", ids)
    print(f"{split}.bin {len(ids):,} tokens")
