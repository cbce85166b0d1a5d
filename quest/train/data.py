"""Text as tokens, and which tokens a step sees.

A batch is a pure function of the seed and the step: a resumed run and every recipe of a comparison
see the same batches, and nothing about the data has to be kept in a checkpoint.
The tokens of the whole text are held in memory, 1 byte each for bytes and 4 with a tokenizer.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quest.train.errors import UserError
from quest.train.text import Text

PIECE = 1 << 20  # characters that a tokenizer gets at once, cut at the end of a line


class Encoder(Protocol):
    """Bytes of UTF-8 text to token ids below ``vocab_size``; ``name`` tells encoders apart."""

    name: str
    unit: str
    vocab_size: int

    def encode(self, text: bytes) -> NDArray[np.uint8] | NDArray[np.int32]: ...


class ByteEncoder:
    """Each byte is a token."""

    name = "bytes"
    unit = "byte"
    vocab_size = 256

    def encode(self, text: bytes) -> NDArray[np.uint8]:
        return np.frombuffer(text, np.uint8).copy()


class FileEncoder:
    """A Hugging Face ``tokenizer.json``, without special tokens, truncation or padding.

    Text is cut at line ends into pieces of about a million characters, since the library keeps some
    hundred bytes a token.
    Raises `UserError` for a file that is missing or not a tokenizer, and for a text that has
    something without a token.
    """

    unit = "token"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer  # 0.1 s that byte-level training need not wait for

        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file")
        try:
            contents = path.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(contents)
        # The library raises plain Exception, with the parser's message.
        except Exception as error:
            raise UserError(f"tokenizer {path} is not a Hugging Face tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = hashlib.sha256(contents).hexdigest()
        # Ids may have holes.
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._path = path

    def encode(self, text: bytes) -> NDArray[np.int32]:
        whole = text.decode("utf-8")
        pieces: list[str] = []
        start = 0
        while start < len(whole):
            line_end = whole.find("\n", start + PIECE)
            end = len(whole) if line_end < 0 else line_end + 1
            pieces.append(whole[start:end])
            start = end
        try:
            ids = [
                np.array(self._tokenizer.encode(piece, add_special_tokens=False).ids, np.int32)
                for piece in pieces
            ]
        # As above: of a piece of text that it has no token for, for one.
        except Exception as error:
            raise UserError(f"tokenizer {self._path} can't read the text: {error}") from error
        return np.concatenate([np.empty(0, np.int32), *ids])


@dataclass(frozen=True)
class Dataset:
    """Training and held-out tokens, ``(n,)`` and ``(m,)``, uint8 or int32, on the CPU."""

    train: Tensor
    held_out: Tensor
    encoder: Encoder
    bytes_per_token: float
    """Bytes of held-out text over its tokens: a loss in nats a token over this is nats a byte."""
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    def batch(self, seed: int, step: int, batch: int, seq: int) -> Tensor:
        """Sequences of ``seq`` tokens and their successor, ``(batch, seq + 1)`` int64.

        Windows start anywhere in the training text, drawn with replacement; a pure function of the
        arguments.
        """
        draw = np.random.default_rng([seed, step])
        starts = torch.from_numpy(draw.integers(0, len(self.train) - seq, size=batch))
        return self.train[starts[:, None] + torch.arange(seq + 1)].long()

    def held_out_windows(self, most: int, seq: int) -> Tensor:
        """At most ``most`` windows ``(count, seq + 1)`` int64, spread evenly, that score each token
        at most once: neighbours share only the token that one ends and the next starts with."""
        available = (len(self.held_out) - 1) // seq
        count = min(most, available)
        starts = torch.arange(count) * available // count * seq
        return self.held_out[starts[:, None] + torch.arange(seq + 1)].long()

    def entropy(self) -> float:
        """Nats a token of the held-out tokens' frequencies: no model that ignores the context can
        have a lower loss on them."""
        counts = torch.bincount(self.held_out.long())
        share = counts[counts > 0].double() / len(self.held_out)
        return -math.fsum((share * share.log()).tolist())


def encode(text: Text, encoder: Encoder, seq: int) -> Dataset:
    """Tokens of ``text``; raises `UserError` where a side is too short for one sequence."""
    train = encoder.encode(text.train)
    held_out = encoder.encode(text.held_out)
    if min(len(train), len(held_out)) <= seq:
        raise UserError(
            f"the text is too short: {len(train)} {encoder.unit}s to train on and "
            f"{len(held_out)} held out, and each needs at least {seq + 1} for one sequence of {seq}"
        )
    return Dataset(
        torch.from_numpy(train),
        torch.from_numpy(held_out),
        encoder,
        len(text.held_out) / len(held_out),
        text.fingerprint,
    )
