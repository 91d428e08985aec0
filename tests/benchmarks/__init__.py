"""Speed beside LangGraph's own SQLite savers and stores: measured, printed, never asserted.

Run ``python -m tests.benchmarks`` from the root of a clone with the `dev` extra; ``--help`` lists the cases.
"""
