"""People's questions about pictures: each picture once, with all that was asked about it."""

import json

import pytest

from fusion_jax.data.pictures import open_pictures
from fusion_jax.data.visual_questions import read_questions, read_vqa2
from fusion_jax.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mine(tmp_path):
    """Two questions about each of forty pictures, not in a row."""
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    rows = [
        {"image": f"{n}.png", "question": f"{word} {n}?", "answer": [f"a{n}", f"b{n}", f"b{n}"]}
        for word in ("What is", "Who is")
        for n in range(40)
    ]
    return write(tmp_path / "mine.jsonl", rows)


def test_own_questions_stay_with_their_picture(mine):
    pictures = open_pictures(None, mine, None, seed=0)
    assert len(pictures.source) == 40
    sides = [{thing.row for thing in those} for those in (pictures.train, pictures.test)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 40
    for thing in pictures.train + pictures.test:
        name = pictures.source[thing.row]["image"].decode()
        assert [q.text for q in thing.asked] == [f"What is {name}?", f"Who is {name}?"]
        assert {q.row for q in thing.asked} == {thing.row}
        assert {q.answer for q in thing.asked} == {f"b{name}"}
    assert pictures.described.startswith("mine.jsonl, 20 questions about 10 pictures")
    again = open_pictures(None, mine, None, seed=0, development=True)
    assert {thing.row for thing in again.train + again.test} == sides[0]


def test_a_csv_holds_one_answer(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "mine.csv").write_text("image,question,answer\na.png,What?,A cat\n")
    _, (thing,) = read_questions(tmp_path / "mine.csv")
    assert (thing.asked[0].answer, thing.asked[0].answers) == ("A cat", ("A cat",))


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "question": "What?"},
        {"image": "0.png", "answer": "A cat"},
        {"image": "0.png", "question": "What?", "answer": []},
        {"image": "0.png", "question": "What?", "answer": ["a", 2]},
        {"text": "A cat", "question": "What?", "answer": "A cat"},
    ],
)
def test_an_incomplete_row_is_told(mine, row):
    mine.write_text(mine.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"row 81: image .*expected all three"):
        read_questions(mine)


def published(folder, side, pictures):
    """Two questions about each, ten answers to each."""
    (folder / f"{side}2014").mkdir(parents=True)
    asked, said = [], []
    for number in pictures:
        (folder / f"{side}2014/COCO_{side}2014_{number:012d}.jpg").write_bytes(b"%d" % number)
        for n, people in enumerate((["yes"] * 10, ["two"] * 4 + ["3"] * 6)):
            about = {"image_id": number, "question_id": number * 1000 + n}
            asked.append({**about, "question": f"Question {n} about {number}?"})
            answers = [{"answer": each, "answer_id": i} for i, each in enumerate(people)]
            said.append({**about, "answers": answers})
    listed = folder / f"v2_OpenEnded_mscoco_{side}2014_questions.json"
    listed.write_text(json.dumps({"questions": asked}))
    annotated = folder / f"v2_mscoco_{side}2014_annotations.json"
    annotated.write_text(json.dumps({"annotations": said[::-1]}))


def test_vqa2_keeps_its_own_split(tmp_path):
    published(tmp_path, "train", range(9, 49))
    published(tmp_path, "val", [42, 1042])  # numbers of one side say nothing of the other
    pictures = open_pictures(None, None, None, seed=0, vqa2=tmp_path)
    assert (len(pictures.train), len(pictures.test)) == (40, 2)
    assert pictures.source[0]["name"].endswith("image train2014/COCO_train2014_000000000009.jpg")
    for thing in pictures.train + pictures.test:
        name = pictures.source[thing.row]["image"].decode()
        assert [q.text for q in thing.asked] == [f"Question {n} about {name}?" for n in (0, 1)]
        assert [q.answer for q in thing.asked] == ["yes", "3"]
        assert thing.asked[1].answers == ("two",) * 4 + ("3",) * 6
    assert "val2014" in pictures.source[pictures.test[0].row]["name"]
    again = open_pictures(None, None, None, seed=0, vqa2=tmp_path, development=True)
    rows = [{thing.row for thing in those} for those in (again.train, again.test)]
    assert len(rows[1]) == 2 and rows[0] | rows[1] == {thing.row for thing in pictures.train}


def test_what_is_missing_of_vqa2_is_told(tmp_path):
    with pytest.raises(UserError, match="expected VQAv2's files"):
        read_vqa2(tmp_path)
    published(tmp_path, "train", [9])
    published(tmp_path, "val", [42])
    (tmp_path / "val2014/COCO_val2014_000000000042.jpg").unlink()
    with pytest.raises(UserError, match=r"42.jpg is not there: unpack COCO's val2014.zip"):
        read_vqa2(tmp_path)
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="not as VQAv2 has them"):
        read_vqa2(tmp_path)
    with pytest.raises(UserError, match="not both"):
        open_pictures(None, tmp_path, None, seed=0, vqa2=tmp_path)
