"""Text to numbers and back: bytes, or byte-pair encoding trained on the text at hand.

Both are saved as the ``tokenizer.json`` of the ``tokenizers`` library, so that
``transformers.PreTrainedTokenizerFast(tokenizer_file=...)`` reads either.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.core.errors import DataError
from atoll.core.files import write_atomic

FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Must  inverse  ``decode(encode(b)) == b`` for every UTF-8 text (for ``Bytes``: every byte string)."""

    @property
    def size(self) -> int:
        """The number of tokens."""
        ...

    def encode(self, text: bytes) -> NDArray[np.int64]: ...

    def decode(self, tokens: Iterable[int]) -> bytes: ...

    def names(self) -> tuple[str, ...]:
        """A printable name for each token."""
        ...

    def save(self, path: Path | str) -> None:
        """Write ``tokenizer.json`` (``path``: the file, or a folder for it)."""
        ...


@dataclass(frozen=True, slots=True)
class Bytes:
    """A token is a byte. 256 tokens, no special ones, no training, no library."""

    @property
    def size(self) -> int:
        return 256

    def encode(self, text: bytes) -> NDArray[np.int64]:
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(int(t) for t in tokens)

    def names(self) -> tuple[str, ...]:
        shown = {32: "space", 10: "newline", 9: "tab", 13: "return"}
        return tuple(shown.get(b, chr(b) if 32 < b < 127 else f"0x{b:02x}") for b in range(256))

    def save(self, path: Path | str) -> None:
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "vocab": {c: b for b, c in enumerate(_alphabet())}, "merges": []}
        whole = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": split,
            "decoder": split,
            "model": model,
        }
        write_atomic(_file(path), json.dumps(whole, ensure_ascii=False, indent=1).encode())


@dataclass(frozen=True, slots=True)
class BPE:
    """Byte-level byte-pair encoding (Sennrich et al., 2015, arXiv 1508.07909), by ``tokenizers``."""

    inner: Any
    """A ``tokenizers.Tokenizer``."""

    @property
    def size(self) -> int:
        return int(self.inner.get_vocab_size())

    def encode(self, text: bytes) -> NDArray[np.int64]:
        ids = self.inner.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int64)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return str(self.inner.decode(list(tokens), skip_special_tokens=False)).encode()

    def names(self) -> tuple[str, ...]:
        shown = str.maketrans({"\u0120": "\u00b7", "\u010a": "\u21b5"})  # stand-ins for space and newline
        return tuple(str(self.inner.id_to_token(i)).translate(shown) for i in range(self.size))

    def save(self, path: Path | str) -> None:
        write_atomic(_file(path), str(self.inner.to_str(pretty=True)).encode())


def train_bpe(texts: Iterable[bytes], size: int) -> BPE:
    """A vocabulary of at most ``size`` tokens (at least the 256 bytes), learned from ``texts``.

    Rows that a model will be tested on should not be among the texts; for a federation, use public text.
    """
    library = _library()
    if size <= 256:
        raise DataError(f"A byte-pair vocabulary starts from 256 bytes; `vocab_size` {size} leaves nothing to learn.")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator((t.decode("utf-8", errors="replace") for t in texts), trainer)
    return BPE(inner)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a ``tokenizer.json`` (or a folder that holds one), ours or anybody's.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    file = _file(path)
    if not file.is_file():
        raise DataError(f"There is no tokenizer at {file}.")
    try:
        model = json.loads(file.read_bytes())["model"]
        if (
            model["type"] == "BPE"
            and not model["merges"]
            and model["vocab"] == {c: b for b, c in enumerate(_alphabet())}
        ):
            return Bytes()
        return BPE(_library().Tokenizer.from_file(str(file)))
    except DataError:
        raise
    except Exception as e:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer ({e}).") from e


def identity(tokenizer: Tokenizer) -> str:
    """Text that two tokenizers share exactly when they do the same: a digest of what they save."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return hashlib.sha256((Path(folder) / FILE).read_bytes()).hexdigest()[:32]


def _file(path: Path | str) -> Path:
    path = Path(path).expanduser()
    return path if path.suffix == ".json" else path / FILE


def _alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as e:
        raise DataError("This tokenizer needs the `tokenizers` library: pip install 'atoll[language]'.") from e
    return tokenizers
