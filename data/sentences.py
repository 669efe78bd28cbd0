"""Film reviews from a grammar, to classify and to compare: the same rows every time, nothing is downloaded.

python data/sentences.py --output runs/data/sentences
"""

from __future__ import annotations

import argparse
import csv
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Row = dict[str, Any]
Word = TypeVar("Word")  # a string, or a verb in both of its forms

SPLITS = ("train", "validation")
SENTIMENT = (4000, 1000)  # rows of each split
PARAPHRASE = (16000, 1000)  # whether two sentences agree is the harder question
# One line is one meaning: its words say the same. The first word of a line is the usual one, the last one is rare.
GOOD = (
    ("great", "wonderful", "superb"),
    ("funny", "amusing", "hilarious"),
    ("clever", "smart", "ingenious"),
    ("moving", "touching", "poignant"),
    ("gripping", "thrilling", "riveting"),
    ("fresh", "original", "inventive"),
    ("charming", "lovely", "delightful"),
    ("beautiful", "gorgeous", "stunning"),
)
BAD = (
    ("awful", "terrible", "dreadful"),
    ("dull", "boring", "tedious"),
    ("silly", "stupid", "foolish"),
    ("clumsy", "awkward", "inept"),
    ("weak", "feeble", "flimsy"),
    ("messy", "chaotic", "muddled"),
    ("stale", "tired", "hackneyed"),
    ("ugly", "hideous", "unsightly"),
)
# (do it, did it)
LIKED = (
    (("love", "loved"), ("adore", "adored")),
    (("enjoy", "enjoyed"), ("relish", "relished")),
    (("praise", "praised"), ("applaud", "applauded")),
)
LOATHED = (
    (("hate", "hated"), ("loathe", "loathed")),
    (("dislike", "disliked"), ("resent", "resented")),
    (("mock", "mocked"), ("ridicule", "ridiculed")),
)
PARTS = (
    ("plot", "story"),
    ("acting", "performance"),
    ("music", "soundtrack"),
    ("ending", "finale"),
    ("dialogue", "script"),
    ("camera work", "photography"),
    ("film", "movie"),
    ("opening", "first scene"),
)
WHO = (
    ("i",),
    ("we",),
    ("critics", "reviewers"),
    ("children", "kids"),
    ("my friends", "my mates"),
    ("the audience", "the viewers"),
)
OBJECT = {"i": "me", "we": "us"}
DEGREES = ("", "", "very ", "really ", "quite ", "truly ", "so ", "rather ")
DENIALS = ("not", "never", "hardly", "far from", "anything but")


def sentiment(split: str) -> list[Row]:
    """``{"sentence", "label"}``: 1 where the review is for the film, as many of each; splits share no sentence."""
    return _rows(split, SENTIMENT, lambda rng, label: {"sentence": _review(rng, label), "label": label})


def paraphrase(split: str) -> list[Row]:
    """``{"sentence1", "sentence2", "label"}``: 1 where both say the same, 0 where one fact differs; half of each."""
    return _rows(split, PARAPHRASE, _pair)


def _rows(split: str, sizes: tuple[int, int], draw: Callable[[random.Random, int], Row]) -> list[Row]:
    """Labels take turns. Both splits come from one stream without repetition, so that they cannot overlap."""
    if split not in SPLITS:
        raise ValueError(f"split: unknown, got {split!r}; use one of {', '.join(SPLITS)}")
    rng, rows = random.Random(0), list[Row]()
    seen: set[frozenset[str]] = set()
    while len(rows) < sum(sizes):
        row = draw(rng, len(rows) % 2)
        texts = frozenset(value for value in row.values() if isinstance(value, str))
        if texts not in seen:
            seen.add(texts)
            rows.append(row)
    return rows[: sizes[0]] if split == "train" else rows[sizes[0] :]


def _review(rng: random.Random, label: int) -> str:
    """One to three clauses, each about another part; where they disagree, the one that is stressed decides."""
    one, two, three = (_synonym(rng, part) for part in rng.sample(PARTS, 3))
    main, other = _opinion(rng, label, one), _opinion(rng, 1 - label, two)
    forms = (
        main,
        f"{main} and {_opinion(rng, label, two)}",
        f"{other} but {main}",
        f"although {other} , {main}",
        f"{main} even though {other}",
        f"despite the {_word(rng, _adjectives(1 - label))} {two} , {main}",
        f"it is not true that {other}",
        f"{other} and {_opinion(rng, 1 - label, three)} but {main}",
    )
    return rng.choices(forms, (8, 4, 2, 1, 1, 1, 1, 1))[0]


def _opinion(rng: random.Random, label: int, part: str) -> str:
    """A clause of that mood: a word of the mood, or one of the other mood denied."""
    who, degree, was = _word(rng, WHO), rng.choice(DEGREES), rng.choice(("is", "was"))
    adjective, opposite = (_word(rng, _adjectives(mood)) for mood in (label, 1 - label))
    did = _word(rng, _verbs(label))[1]
    do = _word(rng, _verbs(1 - label))[0]
    forms = (
        f"the {part} {was} {degree}{adjective}",
        f"{who} found the {part} {degree}{adjective}",
        f"{who} {did} the {part}",
        f"the {part} {was} {rng.choice(DENIALS)} {opposite}",
        f"{who} did not {do} the {part}",
        f"nothing about the {part} {was} {opposite}",
    )
    return rng.choices(forms, (3, 2, 2, 1, 1, 1))[0]


def _adjectives(label: int) -> Sequence[Sequence[str]]:
    return GOOD if label else BAD


def _verbs(label: int) -> Sequence[Sequence[tuple[str, str]]]:
    return LIKED if label else LOATHED


def _word(rng: random.Random, meanings: Sequence[Sequence[Word]]) -> Word:
    return _synonym(rng, rng.choice(meanings))


def _synonym(rng: random.Random, words: Sequence[Word]) -> Word:
    """The first word six times as often as the third: rare words are rare in real text, too."""
    return rng.choices(words, (6, 3, 1)[: len(words)])[0]


class Fact(NamedTuple):
    """``the <part> is <what>`` where nobody is named, else ``<who> <what> the <part>``. Each is a line of a table."""

    part: tuple[str, ...]
    what: tuple[Any, ...]
    who: tuple[str, ...] | None
    denied: bool


def _pair(rng: random.Random, label: int) -> Row:
    parts = rng.sample(PARTS, 2)
    facts = [_fact(rng, part) for part in parts[: rng.choice((1, 1, 2))]]
    others = facts if label else _changed(rng, facts)
    return {"sentence1": _told(rng, facts), "sentence2": _told(rng, others), "label": label}


def _fact(rng: random.Random, part: tuple[str, ...]) -> Fact:
    denied = rng.random() < 0.25
    if rng.random() < 0.6:
        return Fact(part, rng.choice(GOOD + BAD), None, denied)
    return Fact(part, rng.choice(LIKED + LOATHED), rng.choice(WHO), denied)


def _changed(rng: random.Random, facts: list[Fact]) -> list[Fact]:
    """Other facts, the same ones but for one thing, or with their parts swapped, which leaves every word in place."""
    first, *rest = rng.sample(facts, len(facts))
    kind = rng.choices(("all", "what", "part", "denied", "swap"), (3, 4, 2, 2, 1))[0]
    if kind == "all":
        return [_fact(rng, _another(rng, PARTS, *(fact.part for fact in facts)))]
    if kind == "swap" and rest and first[1:] != rest[0][1:]:
        return [first._replace(part=rest[0].part), rest[0]._replace(part=first.part)]
    if kind == "denied":
        return [first._replace(denied=not first.denied), *rest]
    if kind == "part":
        return [first._replace(part=_another(rng, PARTS, *(fact.part for fact in facts))), *rest]
    good, bad = (LIKED, LOATHED) if first.who else (GOOD, BAD)
    opposite = bad if first.what in good else good
    return [first._replace(what=_another(rng, rng.choice((opposite, opposite, good + bad)), first.what)), *rest]


def _another(rng: random.Random, table: Sequence[tuple[Any, ...]], *taken: tuple[Any, ...]) -> tuple[Any, ...]:
    return rng.choice([line for line in table if line not in taken])


def _told(rng: random.Random, facts: list[Fact]) -> str:
    one, *rest = [_clause(rng, fact) for fact in rng.sample(facts, len(facts))]
    if not rest:
        return one
    return rng.choice((f"{one} and {rest[0]}", f"{one} while {rest[0]}", f"while {one} , {rest[0]}"))


def _clause(rng: random.Random, fact: Fact) -> str:
    part, no = _synonym(rng, fact.part), "not " if fact.denied else ""
    if fact.who is None:
        return f"the {part} is {no}{_synonym(rng, fact.what)}"
    do, did = _synonym(rng, fact.what)
    who = _synonym(rng, fact.who)
    active = f"{who} did not {do} the {part}" if fact.denied else f"{who} {did} the {part}"
    return rng.choice((active, f"the {part} was {no}{did} by {OBJECT.get(who, who)}"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make two small sets of sentences, as CSV.", exit_on_error=False)
    default = Path("runs/data/sentences")
    parser.add_argument("--output", type=Path, default=default, help="folder (default: %(default)s)")
    try:
        folder = parser.parse_args(argv).output
        for name, rows in (("sentiment", sentiment), ("paraphrase", paraphrase)):
            for split in SPLITS:
                print(_write(folder / name / f"{split}.csv", rows(split)))
    except argparse.ArgumentError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        parser.exit(2, f"{folder}: cannot be written, got {error}; choose another folder\n")
    files = folder / "paraphrase"
    print(
        f"try: python apps/text_classification/train_prune.py --train_file {files / 'train.csv'} "
        f"--validation_file {files / 'validation.csv'}"
    )


def _write(file: Path, rows: list[Row]) -> str:
    """One line that says what the file holds."""
    from pruning_core.checkpoint import write_atomically  # brings torch, which whoever only wants rows does without

    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(file, lambda out: out.write(text.getvalue().encode()))
    return f"{file}: {len(rows):,} rows, {sum(row['label'] for row in rows):,} of label 1"


if __name__ == "__main__":
    main()
