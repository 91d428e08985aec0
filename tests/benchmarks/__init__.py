"""Speed beside LangGraph's own savers and stores: measured, printed, never asserted.

Run ``python -m tests.benchmarks`` from the root of a clone with the `dev` extra; ``--help`` lists the cases. On a
machine that does nothing else, what the README shows is made by::

    python -m tests.benchmarks --json tests/benchmarks/results.json --svg tests/benchmarks/results.svg --readme

and, from a run that there is, by the same with ``--from tests/benchmarks/results.json``.
"""
