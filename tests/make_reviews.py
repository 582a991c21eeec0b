"""Make reviews.csv and reviews-test.csv: sentences of movie reviews, for `rnn.py --data`.

  pip download vaderSentiment==3.3.2 --no-deps --no-binary :all:
  python tests/make_reviews.py vaderSentiment-3.3.2.tar.gz
  python rnn.py --data reviews.csv --tokens words

The sentences are those that Hutto and Gilbert (2014) had rated by twenty people each, from -4 to 4.
The label is the sign of the mean; sentences of a mean between -0.3 and 0.3 are left out. A fifth of
them, chosen at random, goes to reviews-test.csv.
"""

import csv
import io
import random
import sys
import tarfile

RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def main(path: str) -> None:
    with tarfile.open(path) as package:
        resources, = (name for name in package.getnames() if name.endswith("ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(package.extractfile(resources).read())) as archive:
            lines = archive.extractfile(RATINGS).read().decode("utf-8").splitlines()
    rows = []
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.3:
            rows.append((text.strip(), "positive" if float(rating) > 0 else "negative"))
    random.Random(0).shuffle(rows)
    count = len(rows) // 5
    for name, part in (("reviews-test.csv", rows[:count]), ("reviews.csv", rows[count:])):
        with open(name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
        print(f"{name}: {len(part):,} sentences")


if __name__ == "__main__":
    main(*sys.argv[1:])
