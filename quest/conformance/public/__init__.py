"""The court, open to the public: `pytest --pyargs quest.conformance --impl package.module:Adapter`.

`load` finds an adapter, `properties` holds what is judged; `adapters/README.md` says how to write
one.
"""

from .adapter import Implementation, load
from .capabilities import Capabilities
from .formats import Format

__all__ = ["Capabilities", "Format", "Implementation", "load"]
