"""Texts by name: a dictionary's articles, or texts of one's own.

articles.read("foldoc")                     # a dictionary, see dictionary.py
articles.read("texts/")                     # each .txt file below a folder
articles.read("questions.jsonl")            # or .csv: columns text and, if there are any, label
"""

from pathlib import Path

from fusion_jax.data import dictionary, records
from fusion_jax.data.dictionary import Entry
from fusion_jax.errors import UserError


def read(name: str, folder: str | Path | None = None) -> list[Entry]:
    """The articles, in the order of the files; those of one's own have a text and perhaps a tag.

    Args:
      name: a folder, a table or a dictionary.
      folder: where the dictionary lies; see `dictionary.load`.

    Raises:
      UserError: none of the three; no text; a file that is not UTF-8; a row without a text.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.suffix in (".jsonl", ".csv"):
        return _of_table(path)
    if path.exists() or len(path.parts) > 1:
        raise UserError(
            f"{path}: expected a folder of .txt files, a .jsonl or .csv table with a column text, "
            "or the name of a dictionary"
        )
    return dictionary.load(name, folder)


def _of_folder(folder: Path) -> list[Entry]:
    found = []
    for path in sorted(folder.rglob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from error
        if text:
            found.append(Entry((), text))
    if not found:
        raise UserError(f"{folder}: holds no .txt file with a text in it")
    return found


def _of_table(path: Path) -> list[Entry]:
    found = []
    for line, fields in records.read_table(path).rows:
        if "text" not in fields:
            raise UserError(f"{path} row {line}: has no text")
        found.append(Entry((), fields["text"], (fields["label"],) if "label" in fields else ()))
    return found
