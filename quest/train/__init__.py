"""Training a Llama with any recipe on real text: what ``quest train`` runs.

`run` is the whole command; `loop.train` is one recipe of it. The parts know nothing of each other
that their arguments do not say: `text` finds files and parts them, `data` makes tokens and batches,
`optimizer` holds AdamW and its schedule, `checkpoint` and `metrics` keep what a run has done,
`folder` guards the output folder, `progress` and `plot` show it.
"""

from quest.train.config import TrainConfig
from quest.train.errors import UserError
from quest.train.run import Request, run

__all__ = ["Request", "TrainConfig", "UserError", "run"]
