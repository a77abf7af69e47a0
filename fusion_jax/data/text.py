"""Text -> token ids: bytes, or any `tokenizer.json`."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from fusion_jax.data.languages import choose
from fusion_jax.errors import UserError


class Tokenizer(Protocol):
    """What a text transform asks of a tokenizer."""

    vocabulary: int

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Ids with the special tokens, at most `length` of them (the text is cut, they are not)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids 3..258; 0 pads, 1 begins, 2 ends. Any language, nothing to train."""

    pad: int = 0
    begin: int = 1
    end: int = 2
    vocabulary: int = 259

    def encode(self, text: str, length: int | None = None) -> list[int]:
        ids = [byte + 3 for byte in text.encode()]
        return [self.begin, *(ids if length is None else ids[: max(length - 2, 0)]), self.end]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - 3 for i in ids if i >= 3).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json` as Hugging Face's `tokenizers` writes it."""

    def __init__(self, path: str | Path):
        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer.json ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._checksum = hashlib.sha256(content.encode()).hexdigest()
        self.vocabulary = self._tokenizer.get_vocab_size()

    def encode(self, text: str, length: int | None = None) -> list[int]:
        encoding = self._tokenizer.encode(text)
        if length is None or len(encoding.ids) <= length:
            return encoding.ids
        # Cut the text's own tokens from the end; a closing special token such as [SEP] stays.
        cut = len(encoding.ids) - length
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        dropped = set(own[max(len(own) - cut, 0) :])
        return [token for i, token in enumerate(encoding.ids) if i not in dropped][:length]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def json(self) -> str:
        """As `tokenizer.json` holds it."""
        return self._tokenizer.to_str()

    def __repr__(self) -> str:
        return f"FileTokenizer({self._checksum})"


@dataclasses.dataclass(frozen=True)
class Ids:
    """The transform of a text field: int32 ids [at most length].

    Attributes:
      languages: which captions to draw from, in order of preference; None for all there are.
      field: which field of the example. It may also hold ids already.
    """

    tokenizer: Tokenizer
    length: int
    languages: tuple[str, ...] | None = ("en",)
    field: str = "text"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    dtype = np.int32

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator | None
    ) -> np.ndarray | None:
        text = choose(example.get(self.field), self.languages, rng)
        if text is None:
            return None
        if isinstance(text, str):
            text = self.tokenizer.encode(text, self.length)
        return np.asarray(text[: self.length], np.int32)
