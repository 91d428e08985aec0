"""`python -m langgraph_memstate`: the same as the command `memstate`."""

from langgraph_memstate.cli import main

if __name__ == "__main__":  # not in the processes that the demo starts, which import this module too
    raise SystemExit(main())
