"""The public court's properties: `pytest --pyargs quest.conformance --impl package.module:A`."""
