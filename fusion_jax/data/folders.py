"""Pictures in a folder for each class, as Office-31, Office-Home, PACS and DomainNet come.

source = folders.read("office31/amazon")        # amazon/images/back_pack/frame_0001.jpg
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".svg"}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A source (see pipeline.py); files are read when a row is asked for.

    Attributes:
      root: the folder of the domain.
      files: the pictures, sorted.
      labels: of each, an index into `classes`.
    """

    root: Path
    files: Sequence[Path]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        path = self.files[row]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        return {"id": int(row), "name": str(path), "image": data, "label": self.labels[row]}

    @property
    def concepts(self) -> list[str]:
        """What is dealt out to one split: each picture alone."""
        return [path.relative_to(self.root).as_posix() for path in self.files]

    @property
    def checksum(self) -> str:
        """Changes with any file's name, size or time."""
        stats = ((name, path.stat()) for name, path in zip(self.concepts, self.files, strict=True))
        lines = (f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(root: str | Path) -> Folder:
    """The pictures below `root`, or `root`/images if there is one; their folder is their class.

    Raises:
      UserError: no such folder, or no picture in folders.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected one with a folder for each class")
    start = root / "images" if (root / "images").is_dir() else root
    folders = [path.name for path in start.iterdir() if path.is_dir()]
    classes = tuple(sorted(name for name in folders if not name.startswith(".")))
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (start / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{start}: holds no pictures in folders named for their classes")
    return Folder(root, files, labels, classes)
