"""
Your own text as a data set: UTF-8 files, and folders of them.

    python data/text/prepare.py my.txt notes/                  # tokens are characters
    python data/text/prepare.py my.txt notes/ --tokens=gpt2    # GPT-2's BPE
    python train.py config/train_shakespeare_char_cpu.py --dataset=text --out_dir=out-text

Files are read in the order given, and those of a folder in sorted order. Hidden files in folders,
and those that are not UTF-8 text, are skipped. With GPT-2's BPE each file ends with
<|endoftext|>, which may also separate the texts in a file.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tqdm import tqdm

from configurator import UserError, check_choice, check_ranges, configure
from data.common import DATASET_FILES, END_OF_TEXT, GPT2, characters_of, write_text

tokens = 'characters'  # or 'gpt2': GPT-2's BPE
val_frac = 0.1  # fraction of the characters, at the end, held out for validation
out_dir = str(HERE)  # where train.bin and val.bin go

paths = []  # from the command line
config = configure(globals(), paths=paths)
check_choice("tokens", tokens, ("characters", "gpt2"))
check_ranges(config, "val_frac", 1e-6, 1 - 1e-6)


def find_files(path):
    """The files that a path stands for: in a folder all but hidden ones and data sets."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{str(path)!r} is neither a file nor a folder; check the path")
    files = []
    for inner in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in inner.relative_to(path).parts)
        if inner.is_file() and not hidden and inner.name not in DATASET_FILES:
            files.append(inner)
    return files


if not paths:
    raise UserError("no text given; name files or folders: python data/text/prepare.py my.txt")

given = [Path(path) for path in paths]
texts = []
num_skipped = 0
for path in tqdm(sum(map(find_files, given), []), disable=None):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        texts.append(text)
    elif path in given:
        raise UserError(f"{str(path)!r} is not UTF-8 text; convert it or leave it out")
    else:
        num_skipped += 1
if num_skipped > 0:
    print(f"skipped {num_skipped} files that are not UTF-8 text")

if tokens == "characters":
    text = "\n".join(texts)
    print(write_text(out_dir, [text], characters_of(text), val_frac))
else:
    documents = [document for text in texts for document in text.split(END_OF_TEXT)]
    print(write_text(out_dir, documents, GPT2, val_frac))
