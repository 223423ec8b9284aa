"""
Tiny Shakespeare by characters: 65 of them, 1,003,854 tokens to train on and 111,540 for validation.

    python data/shakespeare_char/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure
from data import common

configure(globals())
text = (HERE.parent / "tinyshakespeare.txt").read_text(encoding="utf-8")
print(common.write_text(HERE, [text], common.characters_of(text)))
