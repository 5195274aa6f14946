"""Write a corpus without the near-duplicates of its held-out documents.

    python -m paper.recipes.deduplicate CORPUS OUT.jsonl HOLDOUT SEED

Run it once on scraped text, then train on OUT.jsonl with the same --holdout and --seed: the
documents that are held out stay the same. Two documents are near-duplicates if they share at least
half of the eight-word runs of the one that has fewer. Do not use this for problems with answers,
which are compared by the problem alone.
"""

import re
import sys
from pathlib import Path

from data import hold_out, read_documents, read_files
from toy.make import write_rows

# Scripts without spaces, where each character counts as a word: Thai and Lao, Burmese, Khmer, kana,
# and the ideographs.
ALONE = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
         "\U00020000-\U0003ffff")
WORD = re.compile(f"[{ALONE}]|[^\\W{ALONE}]+")


def word_runs(text, size=8):
    """Return the hashes of a text's runs of eight words, or of all of them if there are fewer."""
    words = WORD.findall(text.casefold())
    return {hash(tuple(words[n: n + size])) for n in range(max(1, len(words) - size + 1))}


def near_duplicates(texts, held):
    """Return the indices of the texts that are not held out but near one that is."""
    runs = list(map(word_runs, texts))
    held_runs = [own for own, out in zip(runs, held) if out]
    known = set().union(*held_runs)
    return {n for n, own in enumerate(runs) if not held[n] and own & known and any(
        2 * len(own & other) >= min(len(own), len(other)) for other in held_runs)}


def main(argv=None):
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 4:
        sys.exit(__doc__)
    corpus, out, holdout, seed = given
    documents = read_documents(corpus)
    texts = [document.given + document.text for document in documents]
    found = near_duplicates(texts, hold_out(texts, int(holdout), int(seed)))
    places = {documents[n].where for n in found}
    write_rows(Path(out), (row for row, where in read_files(corpus) if where not in places))
    print(f"{len(found):,} of {len(texts):,} documents left out")


if __name__ == "__main__":
    main()
