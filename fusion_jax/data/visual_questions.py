"""Questions that people asked about pictures: your own table, and VQAv2's published files.

    pictures, things = read_questions("mine.jsonl")      # columns image, question, answer
    pictures, sides = read_vqa2("VQAv2")                 # sides["train"], sides["val"]

Each picture is a row of a source, and `Thing.asked` holds all that was asked about it. An answer
may be a list of what several people said: the commonest is learned.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.data import records
from fusion_jax.data.questions import ASKED, Question, Thing, read_things
from fusion_jax.errors import UserError

SIDES = ("train", "val")


def read_questions(
    path: Path, lines: list[tuple[int, dict[str, Any]]] | None = None
) -> tuple[records.Table, list[Thing]]:
    """A JSONL or CSV file with a question in each row: image, question and answer.

    Args:
        lines: what `records.read_lines` gave of it, if it was read before.

    Raises:
        UserError: a row without one of them; what `records.read_table` raises.
    """
    lines = records.read_lines(path) if lines is None else lines
    table, given = records.read_table(path, lines=lines), dict(lines)
    first: dict[str, tuple[int, dict[str, Any]]] = {}
    asked: dict[str, list[tuple[str, list[str]]]] = {}
    for line, fields in table.rows:
        image, question = fields.get("image"), given[line].get("question")
        answer = given[line].get("answer")
        answers = answer if isinstance(answer, list) else [answer]
        texts = [question, *answers]
        if not (image and answers and all(isinstance(each, str) and each for each in texts)):
            raise UserError(
                f"{path} row {line}: image {image!r}, question {question!r}, answer {answer!r}; "
                "expected all three, the answer a string or a list of strings"
            )
        first.setdefault(image, (line, fields))
        asked.setdefault(image, []).append((question, answers))
    pictures = dataclasses.replace(table, rows=list(first.values()))
    things = zip(read_things(pictures), asked.values(), strict=True)
    return pictures, [_asked(thing, those) for thing, those in things]


def read_vqa2(folder: Path) -> tuple[records.Table, dict[str, list[Thing]]]:
    """VQAv2 (Goyal et al. 2017), as it is published: questions and annotations in JSON files, such
    as v2_mscoco_val2014_annotations.json, and COCO's pictures in train2014/ and val2014/.

    Raises:
        UserError: a file or a picture that is not there; malformed files.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    sides: dict[str, list[Thing]] = {}
    for side in SIDES:
        listed = folder / f"v2_OpenEnded_mscoco_{side}2014_questions.json"
        annotated = folder / f"v2_mscoco_{side}2014_annotations.json"
        asked: dict[int, list[tuple[str, list[str]]]] = {}
        try:
            said = {
                each["question_id"]: [one["answer"] for one in each["answers"]]
                for each in _json(annotated)["annotations"]
            }
            for each in _json(listed)["questions"]:
                question = (each["question"], said[each["question_id"]])
                asked.setdefault(int(each["image_id"]), []).append(question)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{listed}, or {annotated.name} beside it: not as VQAv2 has them ({error!r})"
            ) from error
        sides[side] = []
        for number, those in asked.items():
            image = f"{side}2014/COCO_{side}2014_{number:012d}.jpg"
            if not (folder / image).is_file():
                raise UserError(f"{folder / image} is not there: unpack COCO's {side}2014.zip here")
            sides[side].append(_asked(Thing(len(rows), None, None, None), those))
            rows.append((number, {"image": image}))
    return records.Table(folder / "VQAv2", rows, ()), sides


def _asked(thing: Thing, those: Sequence[tuple[str, list[str]]]) -> Thing:
    """With these questions, each with all its answers."""
    questions = tuple(
        Question(thing.row, ASKED, text, Counter(said).most_common(1)[0][0], tuple(said))
        for text, said in those
    )
    return dataclasses.replace(thing, asked=questions)


def _json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected VQAv2's files in this folder")
    return json.loads(path.read_text(encoding="utf-8"))
