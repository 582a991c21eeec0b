"""Make words.csv: English, German and Italian words, to be told apart by their spelling alone.

  apt-get install wamerican wngerman witalian
  python tests/make_words.py words.csv

20,000 words a language, drawn at random with a fixed seed from Debian's word lists: letters
only, in lower case (else the capitals of German nouns would give them away), and none that
another of the three languages has too.
"""

import csv
import random
import sys
from pathlib import Path

LISTS = {"English": "american-english", "German": "ngerman", "Italian": "italian"}
COUNT = 20000


def main(target: str, folder: str = "/usr/share/dict") -> None:
    words = {}
    for language, name in LISTS.items():
        lines = Path(folder, name).read_text(encoding="utf-8").split("\n")
        words[language] = {line.strip().lower() for line in lines if line.strip().isalpha()}
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for language in LISTS:
            others = set().union(*(words[other] for other in LISTS if other != language))
            for word in random.Random(0).sample(sorted(words[language] - others), COUNT):
                writer.writerow([word, language])


if __name__ == "__main__":
    main(*sys.argv[1:])
