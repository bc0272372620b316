"""Rows to read and tokenise: as many as wanted, distinct, seeded.

``resample_rows`` makes them of a data file's own rows, so that lengths and words are real. ``synthetic_rows``
needs no file.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, str]

_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her would there their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our
even most made after also did many off before must well back through years much where your way down should
because long each just state people those too how little good world make very year still see own work day get
here old between both life being under three never know same last another while us might great go come since
"""
_WORDS = _TEXT.split()
_REPLACED_WORDS = 0.1  # share of words that another one of the file takes the place of
_MOST_TRIES = 20  # for each row that is wanted
_NUMBER = re.compile(r"\d+")


def read_rows(path: Path) -> list[Row]:
    """Return the Alpaca rows of a .json or .jsonl file."""
    text = path.read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [{key: row.get(key) or "" for key in ("instruction", "input", "output")} for row in rows]


def resample_rows(rows: Sequence[Row], num_rows: int, seed: int = 0) -> Iterator[Row]:
    """Yield distinct rows like ``rows``: drawn from them, with other numbers and a tenth of the words exchanged.

    Raises:
        ValueError: they are too few or too short for so many.
    """
    choose = random.Random(seed)
    words = [word for row in rows for text in row.values() for word in re.findall(r"[A-Za-z]+", text)]

    def change(text: str) -> str:
        text = _NUMBER.sub(
            lambda found: str(choose.randrange(10 ** (len(found[0]) - 1), 10 ** len(found[0]))), text
        )
        return re.sub(
            r"[A-Za-z]+",
            lambda found: choose.choice(words) if choose.random() < _REPLACED_WORDS else found[0],
            text,
        )

    seen: set[int] = set()
    for _ in range(_MOST_TRIES * num_rows):
        if len(seen) == num_rows:
            return
        row = {key: change(text) for key, text in choose.choice(rows).items()}
        if (key := hash(tuple(row.values()))) not in seen:
            seen.add(key)
            yield row
    raise ValueError(
        f"{len(rows):,} short rows do not give {num_rows:,} distinct ones; {len(seen):,} were found"
    )


def synthetic_rows(num_rows: int, seed: int = 0) -> Iterator[Row]:
    """Yield distinct Alpaca rows whose lengths are like those of the 2023 data: some 60 words each."""
    choose = random.Random(seed)
    for number in range(num_rows):
        has_input = choose.random() < 0.4
        yield {
            "instruction": f"Task {number}: {' '.join(choose.choices(_WORDS, k=choose.randint(6, 14)))}?",
            "input": " ".join(choose.choices(_WORDS, k=choose.randint(5, 25))) if has_input else "",
            "output": f"{' '.join(choose.choices(_WORDS, k=choose.randint(10, 70)))}.",
        }


def random_text(num_words: int, seed: int) -> str:
    """Return a text of frequent English words; each is about one token."""
    return " ".join(random.Random(seed).choices(_WORDS, k=num_words))


def fold_input(row: Row) -> Row:
    """Return the row with its input as part of the instruction: tools fold it in differently."""
    folded = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"instruction": folded, "input": "", "output": row["output"]}


def write_jsonl(path: Path, rows: Iterator[object]) -> int:
    """Write one JSON value a line; return how many."""
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row) + "\n")
    return number
