"""State, facts and vectors agree turn by turn while the agent's process is killed again and again."""

from __future__ import annotations

import random
from pathlib import Path

import conversations
import pytest


@pytest.mark.parametrize("durability", conversations.DURABILITIES)
def test_a_conversation_survives_its_agents(durability: str, tmp_path: Path) -> None:
    rng = random.Random(durability)
    words = ["I", "you", "like", "saw", "met", "the", "cat", "garden", "train", "letter", "yesterday", "often"]
    turns = [(f"t{n:03}", " ".join(rng.choices(words, k=8)) + f" {n}") for n in range(60)]
    report = conversations.conversation(str(tmp_path / "talk.db"), "talk", turns, durability, seed=7, patience=20)
    print(durability, report)
    assert report.kills
    assert (report.ghosts, report.losses, report.duplicates, report.index_faults) == (0, 0, 0, [])
