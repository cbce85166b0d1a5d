"""Adapters of implementations that exist: `--impl quest.conformance.adapters.NAME:Adapter`.

README.md says where each departs from the specification; NAME.xfails lists what must fail.
"""
