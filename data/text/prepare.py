"""
Your own text as a data set: UTF-8 files, and folders of them.

    python data/text/prepare.py my.txt notes/                  # tokens are characters
    python data/text/prepare.py my.txt notes/ --tokens=bpe     # of a BPE trained on your text
    python data/text/prepare.py my.txt notes/ --tokens=gpt2    # of GPT-2's BPE
    python train.py config/train_shakespeare_char_cpu.py --dataset=text --out_dir=out-text

Files are read in the order given, and those of a folder in sorted order, without hidden ones and
those that are not UTF-8 text. Unless tokens are characters, each file ends with <|endoftext|>,
which may also separate the texts in a file.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tqdm import tqdm

from configurator import UserError, check_ranges, configure
from data import common

tokens = 'characters'  # or 'bpe', 'gpt2', a tokenizer.json, a folder that has one
vocab_size = 4096  # tokens of 'bpe'
val_frac = 0.1  # fraction of the characters, at the end, held out for validation
out_dir = str(HERE)  # where train.bin and val.bin go

_paths = []  # from the command line
config = configure(globals(), _paths)
check_ranges(config, "vocab_size", 257, 65536)
check_ranges(config, "val_frac", 0, 1)


def find_files(path):
    """The files that a path stands for: in a folder all but hidden ones and data sets."""
    if not path.is_dir():
        return [path]
    files = sorted(inner for inner in path.rglob("*") if inner.is_file())
    return [file for file in files if file.name not in common.DATASET_FILES
            and not any(part.startswith(".") for part in file.relative_to(path).parts)]


if not _paths:
    raise UserError("no text given; name files or folders: python data/text/prepare.py my.txt")
named = [Path(path) for path in _paths]
texts, skipped = [], []
for path in tqdm(sum(map(find_files, named), []), disable=None):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        texts.append(text)
    elif path in named:
        raise UserError(f"{str(path)!r} is not UTF-8 text; convert it or leave it out")
    else:
        skipped.append(path)
if skipped:
    print(f"skipped {len(skipped)} files that are not UTF-8 text, such as {str(skipped[0])!r}")

text = common.END_OF_TEXT.join([*texts, ""])
if tokens == "bpe":
    train, _ = common.split_text(text, val_frac)
    vocabulary = common.train_bpe(train.replace(common.END_OF_TEXT, ""), vocab_size)
elif tokens == "characters":
    vocabulary = common.characters_of("\n".join(texts))
else:
    vocabulary = common.read_vocabulary(tokens)
if common.stoi_of(vocabulary["tokenizer"]):
    text = "\n".join(texts)
common.write_text(out_dir, *common.split_text(text, val_frac), vocabulary)
