"""What the user says, what goes wrong meanwhile, and how the application goes on. Plain data, the same for both sides.

Applications go on in one of two ways after a run that did not end: they resume it, or the user says something else,
and LangGraph drops what was unfinished. Both happen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from langgraph_memstate.demo.faults import Trap

Then = Literal["resume", "move on"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the user. `then` tells what happens if the run does not end."""

    text: str
    trap: Trap | None = None
    then: Then = "resume"

    @property
    def kills(self) -> bool:
        return self.trap is not None and self.trap.kind == "kill -9"


@dataclass(frozen=True, slots=True)
class Story:
    """A conversation with one kind of fault."""

    name: str
    title: str
    turns: tuple[Turn, ...]


_WROTE = "after store.put"
_NODE_FAILS = Trap("outage", (_WROTE, "before model"))
_RETRIED = Trap("rate limit", (_WROTE, "before model"))
_REFUSED = Trap("outage", (_WROTE, "before upsert"))
_ANSWER_LOST = Trap("outage", (_WROTE, "after upsert"))  # Chroma has the vector, and the caller an error

_KILLS = (
    ("before the memory is written", ("before store.put",)),
    ("after the memory is written", (_WROTE,)),
    ("after its vector is written", (_WROTE, "after upsert")),
    ("before the finished node is saved", (_WROTE, "before put_writes")),
    ("after the finished node is saved", (_WROTE, "after put_writes")),
    ("before the step is saved", (_WROTE, "before put")),
    ("after the step is saved", (_WROTE, "after put")),
    ("while the agent replies", (_WROTE, "after put", "before model")),
)
_AFTER_A_KILL: tuple[tuple[str, Then], ...] = (("we went on", "resume"), ("I let it be", "move on"))
_LAST = Turn("Thank you, I enjoyed that.")


def _story(name: str, title: str, *turns: Turn) -> Story:
    """A story that ends well, so that its last state is a finished one."""
    return Story(name, title, (*turns, _LAST))


STORIES = (
    _story(
        "none",
        "nothing goes wrong",
        Turn("I am Ada."),
        Turn("I live in Oslo."),
        Turn("I live in Bergen now."),
    ),
    _story(
        "failure",
        "a node failing after writing",
        Turn("I have a brother in Rome.", _NODE_FAILS),
        Turn("I am allergic to nuts.", _NODE_FAILS, then="move on"),
        Turn("I live in Oslo."),
        Turn("I live in Bergen, or will if I get the job.", _NODE_FAILS, then="move on"),
    ),
    _story(
        "retry",
        "a node retried after writing",
        Turn("I play the cello.", _RETRIED),
        Turn("I live in Oslo.", _RETRIED),
        Turn("I bake on Sundays.", _RETRIED),
    ),
    _story(
        "interrupt",
        "an interrupt after writing",
        Turn("I like Munch; please book the museum."),
        Turn("I like jazz; please book the club.", then="move on"),
    ),
    _story(
        "upsert",
        "a vector upsert failing",
        Turn("I collect stamps.", _REFUSED),
        Turn("I collect maps.", _ANSWER_LOST),
        Turn("I dislike coriander.", _REFUSED, then="move on"),
        Turn("I dislike heights.", _ANSWER_LOST, then="move on"),
        Turn("I live in Oslo."),
        Turn("I live in Bergen, or will if I get the job.", _REFUSED, then="move on"),
    ),
    _story(
        "kill",
        "kill -9 in the middle",
        *(
            Turn(f"I was cut off {where}, and {what}.", Trap("kill -9", route), then)
            for where, route in _KILLS
            for what, then in _AFTER_A_KILL
        ),
    ),
)
