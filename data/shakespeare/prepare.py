"""
Tiny Shakespeare in GPT-2's BPE, to finetune on: 301,966 tokens to train on, 36,059 for validation.

    python data/shakespeare/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure
from data.common import GPT2, split_text, write_text

configure(globals())
text = (HERE.parent / "tinyshakespeare.txt").read_text(encoding="utf-8")
write_text(HERE, *split_text(text), GPT2)
