"""Base and change, each in a git worktree of its own under a temporary folder.

The working tree's state becomes a git tree by way of an index and an object store that lie in that
folder too: neither the user's index nor their objects change, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class GitError(ValueError):
    """The repository, or what was asked of it, cannot be used."""


# Files that decide what is right, or how long something took: a change of them is one of the judge.
JUDGES = ("benchmarks", "quest/conformance", "quest/gate", "reference")


@dataclass(frozen=True)
class Tree:
    """A worktree. tree: git's name of its contents. label: how to call it."""

    path: Path
    tree: str
    label: str


# What git sets for its hooks, which would send every command to the hook's own worktree.
LOCAL = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES",
)  # fmt: skip


def git(where: Path, *arguments: str, **environment: str) -> str:
    """What git says, stripped; GitError with its complaint where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(where), "-c", f"core.hooksPath={os.devnull}", *arguments],
            env={k: v for k, v in os.environ.items() if k not in LOCAL} | environment,
            capture_output=True,
            text=True,
            check=False,
            # An interrupt from the keyboard must not cut an addition or a removal in two.
            start_new_session=True,
        )
    except FileNotFoundError:
        raise GitError("git is not installed") from None
    if done.returncode:
        raise GitError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def root(where: Path) -> Path:
    """The top of the repository that `where` lies in."""
    try:
        return Path(git(where, "rev-parse", "--show-toplevel"))
    except GitError as error:
        if "not installed" in str(error):
            raise
        raise GitError(f"{where} is not in a git repository") from None


def commit(repository: Path, revision: str, option: str) -> str:
    """The commit that `revision` names; option: where it was given."""
    try:
        return git(
            repository, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}"
        )
    except GitError:
        shallow = git(repository, "rev-parse", "--is-shallow-repository") == "true"
        hint = "; this is a shallow clone: git fetch --unshallow" if shallow else ""
        raise GitError(f"{option} {revision!r} is no revision of {repository}{hint}") from None


def other_judges(base: Tree, change: Tree) -> list[str]:
    """Files of JUDGES that differ between two worktrees."""
    # The index and not the files: its names need no object, and a working tree's are not kept.
    told = git(
        change.path, "diff-index", "--cached", "--name-only", "--no-renames", "-z", base.tree, "--",
        *JUDGES,
    )  # fmt: skip
    return [name for name in told.split("\0") if name]


def _snapshot(repository: Path, folder: Path) -> tuple[str, dict[str, str]]:
    """(tree, environment that finds it) of the working tree: all that git does not ignore."""
    if git(repository, "ls-files", "--unmerged"):
        raise GitError("the working tree holds unmerged files: finish or abort the merge first")
    objects = git(repository, "rev-parse", "--path-format=absolute", "--git-path", "objects")
    store = {
        "GIT_OBJECT_DIRECTORY": str(folder / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
    }
    (folder / "objects").mkdir()
    index = Path(git(repository, "rev-parse", "--path-format=absolute", "--git-path", "index"))
    if index.is_file():  # with it git need not read files that did not change
        # Its time too: by that git knows which files may have changed in the second it was written.
        shutil.copy2(index, folder / "index")
    own = {**store, "GIT_INDEX_FILE": str(folder / "index")}
    git(repository, "add", "--all", ".", **own)
    return git(repository, "write-tree", **own), store


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignores what would interrupt, for as long as it takes to clean up."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM, which ends a canceled job, an interrupt like the keyboard's: it cleans up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def checked_out(where: Path, base: str, change: str | None) -> Iterator[tuple[Tree, Tree]]:
    """Worktrees of `base` and `change` (None: the working tree), removed at the end.

    where: a folder in the user's repository. Raises GitError.
    """
    repository = root(where)
    base_commit = commit(repository, base, "--base")
    change_commit = commit(repository, change or "HEAD", "--change")
    folder = Path(tempfile.mkdtemp(prefix="quest-gate-"))
    try:
        trees = []
        for name, revision in (("base", base_commit), ("change", change_commit)):
            path = folder / name
            git(repository, "worktree", "add", "--detach", "--quiet", str(path), revision)
            told = base if name == "base" else change or "working tree"
            tree = git(path, "rev-parse", "HEAD^{tree}")
            trees.append(Tree(path, tree, f"{told} ({revision[:10]})"))
        if change is None:
            there, store = _snapshot(repository, folder)
            if there != trees[1].tree:
                git(trees[1].path, "read-tree", "--reset", "-u", there, **store)
                label = f"working tree ({change_commit[:10]} and uncommitted changes)"
                trees[1] = Tree(trees[1].path, there, label)
        yield trees[0], trees[1]
    finally:
        with _uninterrupted():
            for name in ("base", "change"):
                with contextlib.suppress(GitError):  # it was not added yet
                    git(repository, "worktree", "remove", "--force", str(folder / name))
            shutil.rmtree(folder, ignore_errors=True)
