"""Run a command that a document gives, and keep what it measured in tests/results.

  python tests/record.py python cnn.py --data synthetic
  python tests/record.py python tests/benchmark.py cnn

tests/test_docs.py compares the figures in the documents' tables with these files.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def main():
    words = sys.argv[1:]
    if words[1].startswith("tests/"):
        json_option = ["--json"] if words[1] == "tests/benchmark.py" else []
        printed = subprocess.run([*words, *json_option], check=True, stdout=subprocess.PIPE,
                                 encoding="utf-8").stdout
        try:
            measured = json.loads(printed)
        except ValueError:
            measured = printed.splitlines()
    else:  # a script of the collection
        subprocess.run(words, check=True)
        out = words[words.index("--out") + 1] if "--out" in words else f"runs/{words[1][:-3]}"
        measured = json.loads(Path(out, "summary.json").read_text())
    command = shlex.join(words)
    name = re.sub(r"\W+", "_", command.replace("python ", "").replace(".py", "")).strip("_")
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"command": command, "measured": measured}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
