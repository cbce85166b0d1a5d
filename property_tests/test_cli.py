"""The command line: one line on stderr and the right status for whatever goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from quest.cli import main, quest
from quest.gate import command as gate_command
from quest.gate.command import Request
from quest.models import SIZES, Size
from quest.train import plot
from quest.train.folder import RunFolder
from quest.train.stopping import Stopped

TEXT = "".join(f"{i} is followed by {i + 1}, as ever.\n" for i in range(400))
LINE = ("train", "--size", "tiny", "--device", "cpu", "--data", "text.txt", "--out", "out")

DRAW = plot.draw


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", Size(1, 128, 2, lr=3e-3, tokens=4 * 64, batch=2, seq=32))
    monkeypatch.setattr(plot, "draw", lambda *_: None)  # it takes longer than such a run
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def everything() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refuses(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """Run, and hold the command to one line, the status and no change to any file."""
    before = everything()
    capsys.readouterr()
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert everything() == before
    return err.rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--foo"], "quest: no such option: --foo (see quest --help)"),
        (["tarin"], "quest: no such command 'tarin'"),
        (["train", "--foo"], "quest train: no such option: --foo"),
        (["verify", "--foo"], "quest verify: no such option: --foo"),
        (["train", "extra"], "quest train: got unexpected extra argument (extra)"),
        (["train", "--steps"], "quest train: option '--steps' requires an argument"),
        (["train", "--steps", "0"], "'--steps': 0 is not in the range x>=1"),
        (["train", "--steps", "many"], "'--steps': 'many' is not a valid integer"),
        (["train", "--lr", "0"], "'--lr': 0.0 is not in the range x>0"),
        (["train", "--lr", "nan"], "quest train: invalid value for '--lr': nan is not a finite"),
        (["train", "--lr", "inf"], "'--lr': inf is not a finite number"),
        (["train", "--lr", "1e999"], "'--lr': inf is not a finite number"),
        (["train", "--lr", "-inf"], "'--lr': -inf is not in the range x>0"),
        (["train", "--seed", "-1"], "'--seed': -1 is not in the range x>=0"),
        (["train", "--seed", str(2**64)], f"seed must be from 0 to 2^64 - 1, got {2**64}"),
        (["train", "--size", "huge"], "quest train: size is 'huge': must be one of demo, 30M"),
    ],
)
def test_usage_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refuses(capsys, *arguments)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data", "missing.txt"], "missing.txt: no such file or folder"),
        (["--data", ""], "the name of a text is empty: need a file, folder or glob"),
        (["--data", "*.md"], "*.md: no file matches"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "binary.txt"], "binary.txt is binary (it holds NUL bytes)"),
        (["--data", "latin.txt"], "latin.txt is binary (byte 3 is not UTF-8)"),
        (["--recipe", "w9a9"], "w9a9"),
        (["--recipe", ""], "recipe"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--tokenizer", "missing.json"], "tokenizer missing.json: no such file"),
        (["--tokenizer", "text.txt"], "text.txt is not a Hugging Face tokenizer"),
        (["--seq", "9000"], "the text is too short"),
        (["--out", "text.txt"], "text.txt is a file: --out needs a folder"),
        (["--out", "text.txt/below"], "text.txt/below cannot be made"),
        (["--resume"], "out holds no run of quest train: nothing to resume"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_unusable_input(capsys: pytest.CaptureFixture[str], more: list[str], expected: str) -> None:
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"some\0thing" * 99)
    Path("latin.txt").write_bytes(b"caf\xe9" * 99)
    line = [*LINE, *more]
    assert expected in refuses(capsys, *line)
    assert not Path("out").exists()


def test_too_short_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("a few words")
    assert "the text is too short" in refuses(capsys, *LINE)


def test_a_folder_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LINE) == 0
    Path("out/notes.md").write_text("mine")
    Path("out/checkpoint-mine.pt").write_text("mine")
    assert "out exists" in refuses(capsys, *LINE)

    # what turns out to be wrong leaves even what is to be overwritten
    refuses(capsys, *LINE, "--overwrite", "--data", "missing.txt")
    refuses(capsys, *LINE, "--overwrite", "--recipe", "w9a9")
    refuses(capsys, *LINE, "--resume", "--recipe", "w4a4")

    assert main([*LINE, "--overwrite", "--recipe", "bf16"]) == 0
    assert Path("out/notes.md").read_text() == "mine"
    assert Path("out/checkpoint-mine.pt").read_text() == "mine"
    assert not Path("out/checkpoint-w1a1.pt").exists()
    recipes = {
        json.loads(row)["recipe"] for row in Path("out/metrics.jsonl").read_text().splitlines()
    }
    assert recipes == {"bf16"}


def test_files_of_others_are_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("mine")
    message = refuses(capsys, *LINE, "--overwrite")
    assert "metrics.jsonl was not written by quest train" in message


def test_damaged_and_foreign_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINE, "--recipe", "w1a1", "--recipe", "bf16"]) == 0
    ours, other = Path("out/checkpoint-w1a1.pt"), Path("out/checkpoint-bf16.pt")
    whole = ours.read_bytes()
    ours.write_bytes(whole[: len(whole) // 2])
    assert "checkpoint-w1a1.pt is damaged" in refuses(capsys, *LINE, "--resume")
    ours.write_bytes(other.read_bytes())
    assert "its recipe is bf16, not w1a1" in refuses(capsys, *LINE, "--resume")
    ours.write_bytes(whole)
    assert main([*LINE, "--resume"]) == 0


def test_a_resumed_run_has_its_own_steps() -> None:
    """And their schedule; not those of the size, which are 4."""

    def rates() -> list[float]:
        rows = Path("out/metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["lr"] for row in rows]

    assert main([*LINE, "--steps", "6"]) == 0
    whole = rates()
    assert main([*LINE, "--steps", "2", "--overwrite"]) == 0
    manifest = json.loads(Path("out/run.json").read_text())
    manifest["config"]["steps"] = 6  # as of a run of 6 that was interrupted
    Path("out/run.json").write_text(json.dumps(manifest))
    for _ in range(2):  # and nothing is left to do
        assert main([*LINE, "--resume"]) == 0
        assert rates()[2:] == whole[2:]
    assert main([*LINE, "--resume", "--steps", "7"]) == 0
    assert len(rates()) == 7

    for broken in ('{"written_by": "quest train", "recipes": ["w1a1"]}', "[]", "{}", "no JSON"):
        Path("out/run.json").write_text(broken)
        assert RunFolder(Path("out")).steps is None
    for steps in (0, -1, "6", None, True):
        manifest["config"]["steps"] = steps
        Path("out/run.json").write_text(json.dumps(manifest))
        assert RunFolder(Path("out")).steps is None


def test_another_tokenizer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    built.train_from_iterator([TEXT], trainer)
    built.save("tokenizer.json")
    assert main([*LINE, "--tokenizer", "tokenizer.json", "--seq", "16"]) == 0
    out = capsys.readouterr().out
    assert "nats/token" in out
    assert "nats/byte" in out
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["val_loss_per_byte"] < last["val_loss"]
    assert "its tokenizer is" in refuses(capsys, *LINE, "--seq", "16", "--resume")


def test_what_a_run_leaves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "draw", DRAW)
    assert main([*LINE, "--recipe", "bf16", "--recipe", "w1a1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for expected in ("w1a1  step 4/4  loss", "tok/s", "nats/byte", "against bf16",
                     "out/metrics.jsonl", "out/loss.png"):  # fmt: skip
        assert expected in out
    assert {path.name for path in Path("out").iterdir()} == {
        "run.json", "metrics.jsonl", "loss.png", "checkpoint-bf16.pt", "checkpoint-w1a1.pt"
    }  # fmt: skip


def test_an_interrupted_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quest.train.run", interrupt)
    assert "interrupted: no checkpoint was written" in refuses(capsys, *LINE, status=130)
    Path("out").mkdir()
    Path("out/checkpoint-w1a1.pt").touch()
    assert "interrupted: --resume goes on from the last checkpoint" in refuses(
        capsys, *LINE, status=130
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_asked_to_stop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def stop(*_: object) -> None:
        raise Stopped(number, "after step 3 of w1a1, which is saved")

    monkeypatch.setattr("quest.train.run", stop)
    told = refuses(capsys, *LINE, status=status)
    assert "interrupted after step 3 of w1a1, which is saved: --resume goes on from there" in told


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 8.00 GiB for an array"),
    ],
    ids=["cuda", "cpu", "cublas", "numpy"],
)
def test_too_little_memory(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("quest.train.run", fail)
    told = refuses(capsys, *LINE, status=1)
    assert "too little memory: fewer sequences at once (--micro-batch)" in told
    assert told.rstrip().endswith(str(error).partition("\n")[0])


def test_what_no_user_can_mend_is_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the kernel is wrong")

    monkeypatch.setattr("quest.train.run", fail)
    with pytest.raises(RuntimeError, match="the kernel is wrong"):
        main(list(LINE))


def test_verify_hands_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = pytest.importorskip("quest.conformance.verify")
    calls: list[object] = []
    monkeypatch.setattr(verify, "run", lambda *given: calls.append(given) or 1)
    assert main(["verify", "--json", "r.json", "--lane", "a", "--lane", "b", "--quick"]) == 1
    assert calls == [(Path("r.json"), ("a", "b"), True, False, None)]


def test_gate_hands_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(gate_command, "run", lambda request: asked.append(request) or 0)
    line = ["gate", "--base", "a", "--change", "b", "--filter", "c", "--rounds", "20", "--full",
            "--lane", "x", "--lane", "y", "--aa", "5", "--allow-old-base", "--limit", "7",
            "--json", "z"]  # fmt: skip
    assert main(line) == main(["gate", "--base", "a"]) == 0
    assert asked == [
        Request("a", "b", "c", 20, ("--lane=x", "--lane=y"), 5, True, 7.0, Path("z")),
        Request("a", None, "", 150, ("--quick",), 3, False, 600.0, None),
    ]


def test_help_names_the_commands_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("train", "verify", "--recipe", "--tokenizer", "--resume", "--overwrite"):
        assert word in out


def test_every_float_is_finite() -> None:
    floats = [
        (command, option)
        for command in quest.commands.values()
        for option in command.params
        if isinstance(option.type, click.types.FloatParamType)
    ]
    assert floats
    for command, option in floats:
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(click.BadParameter, match=r"finite|range"):
                command.make_context("quest", [option.opts[0], value])


def test_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quest.cli", "train", "--foo"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "quest train: no such option: --foo (see quest train --help)\n"


SLOW = "{'numpy', 'torch', 'rich', 'matplotlib'}"  # to import


@pytest.mark.parametrize(
    "line", ["--help", "--version", "train --help", "--foo", "train --foo", "train --lr nan"]
)
def test_what_needs_no_pytorch_does_not_wait_for_it(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nfrom quest.cli import main\n"
         f"main({line.split()!r})\nsys.exit(str({SLOW} & set(sys.modules)))"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "set()"
