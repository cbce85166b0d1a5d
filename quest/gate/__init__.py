"""`quest gate`: is a change still right, and still as fast as its base?

Correctness first: `quest verify` in the change, then its error ratios against base's
(`correctness`). Then speed: one process for each side (`worker`, spoken to by `side`) in a git
worktree of its own (`worktrees`), timed in turn, pair after pair (`pairs`, by `clock`), case after
case (`benchmarks`). `power` says by simulation how often that is wrong. `command` puts the parts
in order and `report` prints what they found.
"""
