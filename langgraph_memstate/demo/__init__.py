"""The story of the project in under a minute: one small agent, the same faults, without this package and with it."""
