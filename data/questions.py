"""Short texts with questions about them, in the layout of SQuAD: the same ones every time, nothing is downloaded.

python data/questions.py --output runs/data/questions
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"train": 6000, "validation": 300}  # contexts
RIVAL = 0.12  # contexts in which somebody else has an answer to the same question
STRANGER = 0.38  # contexts in which somebody else has an answer to another question
SHARE = 0.85  # of the gaps that version 2 asks about, which makes a third of its questions
ARTICLE = 25  # contexts under one title

PERSONS = (
    *("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo"),
    *("Irene", "Jonas", "Karin", "Leon", "Maria", "Nils", "Olga", "Peter"),
)
TOWNS = (
    *("Arden", "Belmont", "Corby", "Dover", "Elgin", "Glasgow", "Irvine", "Kendal"),
    *("Milton", "Norwich", "Perth", "Redhill", "Lake View", "New Forest", "Old Bridge", "Port Hope"),
)
COLOURS = ("black", "blue", "brown", "green", "red", "small", "white", "yellow")
THINGS = ("bicycle", "boat", "car", "coat", "guitar", "hat", "lamp", "piano")
OWNED = tuple(f"{colour} {thing}" for colour in COLOURS for thing in THINGS)
YEARS = tuple(str(year) for year in range(1951, 1999, 3))
HOURS = tuple(f"{hour}:{minute}" for hour in range(6, 12) for minute in ("15", "30", "45"))
PRICES = tuple(f"${whole}.{cents}" for whole in range(12, 18) for cents in ("25", "50", "75"))


class Relation(NamedTuple):
    """How it is told and how it is asked; ``{0}`` is the subject, ``{1}`` the answer."""

    told: tuple[str, ...]
    asked: tuple[str, ...]


class Family(NamedTuple):
    """Relations with answers of one kind: only the words around an answer tell which question it answers."""

    answers: tuple[str, ...]
    relations: tuple[Relation, ...]


FAMILIES = (
    Family(
        TOWNS,
        (
            Relation(("{0} lives in {1}",), ("Where does {0} live?",)),
            Relation(("{0} comes from {1}",), ("Where does {0} come from?",)),
            Relation(("{0} works in {1}",), ("Where does {0} work?",)),
            Relation(("{0} often visits {1}",), ("What does {0} often visit?",)),
        ),
    ),
    Family(
        YEARS,
        (
            Relation(("{0} was born in {1}",), ("When was {0} born?",)),
            Relation(("{0} left school in {1}",), ("When did {0} leave school?",)),
            Relation(("{0} got married in {1}",), ("When did {0} get married?", "When was the wedding of {0}?")),
            Relation(("{0} retired in {1}",), ("When did {0} retire?",)),
        ),
    ),
    Family(
        OWNED,
        (
            Relation(("{0} owns a {1}", "{0} has a {1}"), ("What does {0} own?", "What does {0} have?")),
            Relation(("{0} sold a {1}",), ("What did {0} sell?",)),
            Relation(("{0} wants a {1}",), ("What does {0} want?",)),
            Relation(("{0} lost a {1}",), ("What did {0} lose?",)),
        ),
    ),
    Family(
        HOURS,
        (
            Relation(("{0} gets up at {1}",), ("When does {0} get up?",)),
            Relation(("{0} has lunch at {1}",), ("When does {0} have lunch?", "When does {0} eat?")),
            Relation(("{0} goes home at {1}",), ("When does {0} go home?",)),
            Relation(("{0} feeds cats at {1}",), ("When does {0} feed cats?",)),
        ),
    ),
    Family(
        PRICES,
        (
            Relation(("{0} paid {1}",), ("How much did {0} pay?",)),
            Relation(("{0} saved {1}",), ("How much did {0} save?",)),
            Relation(("{0} won {1}",), ("How much did {0} win?",)),
            Relation(("{0} borrowed {1}",), ("How much did {0} borrow?",)),
        ),
    ),
)

Cell = tuple[str, Relation]  # a subject and what is said of it, or not


class Scene(NamedTuple):
    context: str
    answers: dict[Cell, tuple[str, int]]  # what the context says: the words and where they start
    gaps: dict[Cell, Cell]  # what it does not say, and what it says instead


def squad(split: str, *, unanswerable: bool = False) -> dict[str, Any]:
    """The layout of SQuAD 1.1, or with ``unanswerable`` of 2.0; the splits share no context."""
    if split not in SIZES:
        raise ValueError(f"split: unknown, got {split!r}; use one of {', '.join(SIZES)}")
    rng, scenes = random.Random(0), dict[str, Scene]()
    while len(scenes) < sum(SIZES.values()):
        scene = _scene(rng)
        scenes.setdefault(scene.context, scene)
    chosen = list(scenes.values())
    chosen = chosen[: SIZES["train"]] if split == "train" else chosen[SIZES["train"] :]
    version = "v2.0" if unanswerable else "1.1"
    # Another generator than that of the contexts: both versions ask about the same ones.
    rng = random.Random(f"{split} {version}")
    paragraphs = [
        {"context": scene.context, "qas": _questions(rng, scene, f"{split}-{version}-{index:05d}", unanswerable)}
        for index, scene in enumerate(chosen)
    ]
    articles = [
        {"title": f"Notes {start // ARTICLE + 1}", "paragraphs": paragraphs[start : start + ARTICLE]}
        for start in range(0, len(paragraphs), ARTICLE)
    ]
    return {"version": version, "data": articles}


def _scene(rng: random.Random) -> Scene:
    """Three of a family's relations for one subject, and at times a fact about another subject."""
    family = rng.choice(FAMILIES)
    answers, table = family
    one, two, three = rng.sample(PERSONS, 3)
    *told, untold = rng.sample(table, 4)
    # Without repetition: no answer is right by accident.
    values = rng.sample(answers, 4)
    said: list[tuple[Cell, str]] = [((one, relation), value) for relation, value in zip(told, values, strict=False)]
    chance = rng.random()
    if chance < RIVAL:
        said.append(((two, rng.choice(told)), values[3]))
    elif chance < RIVAL + STRANGER:
        other = rng.choice([other for other in FAMILIES if other is not family])
        said.append(((two, rng.choice(other.relations)), rng.choice(other.answers)))
    rng.shuffle(said)
    gaps = {(one, untold): (one, rng.choice(told)), (three, told[0]): (one, told[0])}
    return Scene(*_context(rng, said), gaps)


def _context(rng: random.Random, said: list[tuple[Cell, str]]) -> tuple[str, dict[Cell, tuple[str, int]]]:
    """One sentence per fact; where its answer starts is noted while the text grows."""
    text, answers = "", {}
    for cell, value in said:
        before, after = rng.choice(cell[1].told).format(cell[0], "{1}").split("{1}")
        answers[cell] = (value, len(text + before))
        text += before + value + after + ". "
    return text.rstrip(), answers


def _questions(rng: random.Random, scene: Scene, name: str, unanswerable: bool) -> list[dict[str, Any]]:
    """One about every fact, and in version 2 about what is not said, too."""
    gaps = [cell for cell in scene.gaps if unanswerable and rng.random() < SHARE]
    rows = []
    for number, cell in enumerate([*scene.answers, *gaps]):
        row: dict[str, Any] = {"id": f"{name}-{number}", "question": rng.choice(cell[1].asked).format(cell[0])}
        row["answers"] = [_answer(scene, cell)] if cell in scene.answers else []
        if unanswerable:
            row["is_impossible"] = cell in gaps
        if cell in gaps:  # of the right kind, but of another fact
            row["plausible_answers"] = [_answer(scene, scene.gaps[cell])]
        rows.append(row)
    return rows


def _answer(scene: Scene, cell: Cell) -> dict[str, Any]:
    text, start = scene.answers[cell]
    return {"text": text, "answer_start": start}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a small set of questions, as SQuAD.", exit_on_error=False)
    default = Path("runs/data/questions")
    parser.add_argument("--output", type=Path, default=default, help="folder (default: %(default)s)")
    try:
        folder = parser.parse_args(argv).output
        for ending, unanswerable in (("", False), ("-v2", True)):
            for split in SIZES:
                print(_write(folder / f"{split}{ending}.json", squad(split, unanswerable=unanswerable)))
    except argparse.ArgumentError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        parser.exit(2, f"{folder}: cannot be written, got {error}; choose another folder\n")
    print(
        f"try: python apps/qa/train_prune.py --train_file {folder / 'train.json'} "
        f"--validation_file {folder / 'validation.json'}"
    )


def _write(file: Path, content: dict[str, Any]) -> str:
    """One line that says what the file holds."""
    from pruning_core.checkpoint import write_atomically  # brings torch, which whoever only wants rows does without

    write_atomically(file, lambda out: out.write(json.dumps(content).encode()))
    paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    rows = [row for paragraph in paragraphs for row in paragraph["qas"]]
    without = sum(not row["answers"] for row in rows)
    return f"{file}: {len(rows):,} questions about {len(paragraphs):,} texts, {without:,} without an answer"


if __name__ == "__main__":
    main()
