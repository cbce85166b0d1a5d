"""Training a Llama with any recipe on real text: what ``quest train`` runs.

`command.run` is the whole of it; `loop.train` trains one recipe. The parts know nothing of each
other that their arguments do not say: `text` finds files and parts them, `data` makes tokens and
batches, `optimizer` holds AdamW and its schedule, `step` does an update, `checkpoint` and `metrics`
keep what a run has done, `folder` guards the output folder, `progress` and `plot` show it.
"""

from quest.train.command import Request, run
from quest.train.config import TrainConfig
from quest.train.errors import UserError

__all__ = ["Request", "TrainConfig", "UserError", "run"]
