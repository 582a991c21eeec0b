"""The accuracy of a linear model, and of a run of rnn.py, on labeled texts.

  pip install scikit-learn
  python tests/judge_texts.py words.csv
  python tests/judge_texts.py reviews-train.csv --test reviews-test.csv --out runs/reviews

The model is trained and, without --test, tested on the same texts as rnn.py with --seed 0. Features
of the linear model are the tf-idf of all words and pairs of words or, with --letters, of one to
five adjacent letters of a word; the model is logistic regression (C = 3). With --out, the run in
there predicts the texts of --test, too. Prints one JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import rnn  # noqa: E402


def split(rows, tokens):
    """The training and the test set of rnn.py, which puts equal texts into the same tenth."""
    contents = rnn.tokenize([text for text, _ in rows], tokens)
    tenths = common.split_tenths(contents, [label for _, label in rows], seed=0).tolist()
    train = [row for row, tenth in zip(rows, tenths) if tenth > 1]
    test = [row for row, tenth in zip(rows, tenths) if tenth == 0]
    return train, test


def linear_model(letters):
    if letters:
        features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True)
    else:
        features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(features, LogisticRegression(C=3, max_iter=1000))


def predict(out, texts):
    """What the run in `out` says of each text."""
    done = subprocess.run([sys.executable, str(ROOT / "rnn.py"), "--out", out, "--predict", "-"],
                          input="\n".join(texts), stdout=subprocess.PIPE, check=True,
                          encoding="utf-8")
    return [line.split("\t")[1] for line in done.stdout.splitlines()]


def accuracy(predicted, labels):
    assert len(predicted) == len(labels)
    return sum(map(str.__eq__, predicted, labels)) / len(labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="CSV or TSV file with columns text and label")
    parser.add_argument("--test", help="such a file with other texts")
    parser.add_argument("--letters", action="store_true", help="features are letters, not words")
    parser.add_argument("--out", help="folder of an rnn.py run to judge on --test")
    args = parser.parse_args()
    rows = common.read_table(args.train, ("text", "label"))
    train, test = split(rows, "chars" if args.letters else "words")
    if args.test:
        test = common.read_table(args.test, ("text", "label"))
    texts, labels = zip(*test)
    model = linear_model(args.letters).fit(*zip(*train))
    found = {"texts": len(test), "linear": accuracy(list(model.predict(texts)), labels)}
    if args.out:
        found["rnn.py"] = accuracy(predict(args.out, texts), labels)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
