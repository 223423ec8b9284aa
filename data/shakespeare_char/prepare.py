"""
Tiny Shakespeare by characters: 65 of them; 1,003,854 tokens to train on, 111,540 to validate.

    python data/shakespeare_char/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import configure
from data import tinyshakespeare
from data.common import write_characters

configure(globals())
print(write_characters(HERE, tinyshakespeare.load(HERE)))
