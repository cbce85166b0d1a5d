"""Text, its parting into training and held-out, tokens and batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quest.train import text as text_module
from quest.train.data import ByteEncoder, Dataset, FileEncoder, encode
from quest.train.errors import UserError
from quest.train.text import Text, load_text, split

# numbers make every line occur once: a line found on both sides would be an overlap
LINES = "".join(f"line {i} of äö some text\n" for i in range(900))


@pytest.fixture
def dataset() -> Dataset:
    train, held_out = split([LINES.encode()], 33)
    return encode(Text(train, held_out, 1, ()), ByteEncoder(), 32)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A small byte-level BPE whose file also asks for truncation, padding and a special token."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>"],
    )
    built.train_from_iterator([LINES], trainer)
    built.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    built.enable_truncation(16)
    built.enable_padding(length=16)
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    return path


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**9),
    batch=st.integers(1, 8),
    seq=st.integers(1, 64),
)
def test_a_batch_depends_on_seed_and_step_alone(
    dataset: Dataset, seed: int, step: int, batch: int, seq: int
) -> None:
    first = dataset.batch(seed, step, batch, seq)
    dataset.batch(seed, step + 1, batch, seq)
    torch.rand(3)
    assert torch.equal(dataset.batch(seed, step, batch, seq), first)
    assert first.shape == (batch, seq + 1)
    assert first.dtype == torch.int64
    whole = bytes(dataset.train.tolist())
    assert all(bytes(window.tolist()) in whole for window in first)


def test_batches_of_other_seeds_and_steps_differ(dataset: Dataset) -> None:
    seen = {tuple(dataset.batch(s, t, 4, 32).flatten().tolist()) for s in (0, 1) for t in range(50)}
    assert len(seen) == 100


def test_batches_reach_every_training_token(dataset: Dataset) -> None:
    short = Dataset(torch.arange(40), dataset.held_out, dataset.encoder, 1.0, "")
    seen = torch.cat([short.batch(0, step, 8, 32).flatten() for step in range(20)])
    assert set(seen.tolist()) == set(range(40))


@given(length=st.integers(2, 400), seq=st.integers(1, 50), most=st.integers(1, 60))
def test_held_out_windows_score_no_token_twice(length: int, seq: int, most: int) -> None:
    if length <= seq:
        return
    data = Dataset(torch.arange(1), torch.arange(length), ByteEncoder(), 1.0, "")
    windows = data.held_out_windows(most, seq)
    assert windows.shape == (min(most, (length - 1) // seq), seq + 1)
    scored = windows[:, 1:].flatten().tolist()
    assert len(set(scored)) == len(scored)
    assert max(scored) < length
    apart, rest = divmod((length - 1) // seq, len(windows))
    gaps = set(windows[:, 0].diff().tolist())
    assert gaps <= {apart * seq, (apart + bool(rest)) * seq}  # spread over the whole text


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 50))
def test_few_documents_are_parted_without_loss_or_overlap(
    documents: list[bytes], shortest: int
) -> None:
    train, held_out = split(documents, shortest)
    whole = b"\n".join(documents)
    assert train + held_out == whole
    assert len(held_out) >= min(shortest, len(whole))


def test_a_character_is_not_cut() -> None:
    train, held_out = split(["äöü".encode() * 500], 20)
    assert train.decode() + held_out.decode() == "äöü" * 500


def test_many_documents_are_parted_whole_and_by_their_contents() -> None:
    documents = [f"document {i}\n".encode() * 20 for i in range(400)]
    train, held_out = split(documents, 10)
    again = split(documents[::-1] + documents[:50], 10)  # another order, and copies
    for document in documents:
        assert (document in train) != (document in held_out)
        assert (document in again[1]) == (document in held_out)
    assert 0.01 < len(held_out) / (len(train) + len(held_out)) < 0.2


def test_documents_that_make_no_good_parts_are_parted_at_their_end() -> None:
    """More than a fifth held out, or less than a sequence of a run."""
    documents = [f"document {i}\n".encode() * 20 for i in range(400)]
    by_contents = split(documents, 10)
    kept = next(d for d in documents if d in by_contents[1])
    for many, shortest in ((documents + [kept] * 200, 10), (documents, len(by_contents[1]) + 1)):
        train, held_out = split(many, shortest)
        assert train + held_out == b"\n".join(many)
        assert len(held_out) == max(len(train + held_out) // 20, shortest)


def test_a_fingerprint_is_of_both_parts_and_of_where_they_meet() -> None:
    parts = [(b"ab", b"cd"), (b"abc", b"d"), (b"ab", b"ce"), (b"bb", b"cd")]
    assert len({Text(*part, 1, ()).fingerprint for part in parts}) == 4


def test_the_standard_library_is_the_default() -> None:
    text = load_text([], 129)
    assert text.files > 400
    assert len(text.train) > 5e6
    assert 0.01 <= len(text.held_out) / len(text.train) <= 0.25
    assert b"\0" not in text.train
    listed = text_module._listing(text_module.standard_library())
    assert not any("site-packages" in str(path) for path in listed)
    assert {path.suffix for path in listed} == {".py"}


def test_entropy_is_that_of_the_frequencies() -> None:
    data = Dataset(torch.arange(1), torch.tensor([1, 1, 2, 5], dtype=torch.uint8),
                   ByteEncoder(), 1.0, "")  # fmt: skip
    assert data.entropy() == pytest.approx(1.5 * math.log(2), rel=1e-12)


def test_tokenizer_files_give_the_whole_text(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest.train.data.PIECE", 1000)  # several pieces
    encoder = FileEncoder(tokenizer)
    ids = encoder.encode(LINES.encode())
    whole = Tokenizer.from_file(str(tokenizer))
    assert encoder.vocab_size == whole.get_vocab_size()
    assert ids.min() > 0  # no padding, and nothing before each piece
    assert ids.max() < encoder.vocab_size
    assert whole.decode(ids.tolist()) == LINES

    data = encode(Text(b"z" * 999, LINES.encode(), 1, ()), encoder, 32)
    assert data.bytes_per_token == pytest.approx(len(LINES.encode()) / len(ids))
    assert data.bytes_per_token > 1.5


def test_sources(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_text("bbb\n")
    (folder / "deeper" / "a.md").write_text("aaa\n")
    (folder / "picture").write_bytes(b"\x89PNG\0")
    (folder / "empty").touch()
    (folder / ".hidden").write_text("hidden\n")

    whole = load_text([str(folder)], 1)
    assert whole.train + whole.held_out == b"bbb\n\naaa\n"
    assert {path.name for path in whole.skipped} == {"picture", "empty"}

    globbed = load_text([str(folder / "**" / "*.md"), str(folder / "b.txt")], 1)
    assert globbed.train + globbed.held_out == b"aaa\n\nbbb\n"
    assert globbed.fingerprint != whole.fingerprint

    twice = load_text([str(folder), str(folder / "b.txt"), str(folder)], 1)
    assert twice.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"some\0thing", "is binary \\(it holds NUL bytes\\)"),
        (b"caf\xe9 au lait", "is binary \\(byte 3 is not UTF-8\\)"),
    ],
)
def test_bad_files(tmp_path: Path, contents: bytes | None, message: str) -> None:
    path = tmp_path / "x.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UserError, match=message) as raised:
        load_text([str(path)], 33)
    assert str(path) in str(raised.value)


def test_files_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder and of a glob, however they are called, but not where they are named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("aaa\n")
    (tmp_path / "b.txt").write_text("bbb\n")
    but = (tmp_path / "x" / ".." / "a.txt",)
    for source in (tmp_path, tmp_path / "*.txt", ".", "*.txt"):
        made = load_text([str(source)], 1, but)
        assert made.train + made.held_out == b"bbb\n"
        assert not made.skipped
    made = load_text([str(tmp_path / "a.txt")], 1, but)
    assert made.train + made.held_out == b"aaa\n"


def _words(path: Path, vocabulary: dict[str, int], unknown: str | None) -> Path:
    built = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown or "[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(path))
    return path


def test_ids_with_holes(tmp_path: Path) -> None:
    encoder = FileEncoder(_words(tmp_path / "t.json", {"[UNK]": 0, "the": 1, "of": 7}, "[UNK]"))
    assert encoder.vocab_size == 8
    assert encoder.encode(b"of the rest").tolist() == [7, 1, 0]


def test_text_without_a_token(tmp_path: Path) -> None:
    path = _words(tmp_path / "t.json", {"the": 0, "of": 1}, None)
    encoder = FileEncoder(path)
    assert encoder.encode(b"of the of").tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"tokenizer .*t\.json can't read the text: .*\[UNK\]"):
        encoder.encode(b"of the rest")


def test_folders_and_globs_without_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0")
    with pytest.raises(UserError, match="holds no file of UTF-8 text"):
        load_text([str(tmp_path)], 33)
    with pytest.raises(UserError, match="no file matches"):
        load_text([str(tmp_path / "*.txt")], 33)


@pytest.mark.parametrize("length", [1, 33, 65])
def test_text_of_less_than_two_sequences_is_too_short(length: int) -> None:
    train, held_out = split([b"x" * length], 33)
    with pytest.raises(UserError, match=r"too short.* at least 33 for one sequence of 32"):
        encode(Text(train, held_out, 1, ()), ByteEncoder(), 32)


def test_text_of_two_sequences_is_enough() -> None:
    train, held_out = split([b"x" * 66], 33)
    data = encode(Text(train, held_out, 1, ()), ByteEncoder(), 32)
    assert data.batch(0, 0, 2, 32).shape == data.held_out_windows(2, 32).expand(2, -1).shape


@pytest.mark.parametrize("contents", [b"", b"{}", b"no json"])
def test_what_is_no_tokenizer(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(contents)
    with pytest.raises(UserError, match="is not a Hugging Face tokenizer"):
        FileEncoder(path)
    with pytest.raises(UserError, match="no such file"):
        FileEncoder(tmp_path / "missing.json")
