"""
Tiny Shakespeare by characters: 65 of them, 1,003,854 tokens to train on and 111,540 for validation.

    python data/shakespeare_char/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure
from data.common import characters_of, split_text, write_text

configure(globals())
text = (HERE.parent / "tinyshakespeare.txt").read_text(encoding="utf-8")
write_text(HERE, *split_text(text), characters_of(text))
