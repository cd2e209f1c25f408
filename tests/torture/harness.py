"""What a campaign is, and the table that they end in."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Tally:
    """What a campaign did, and what came out wrong.

    `did` counts by what it did ("operations", "failovers", ...), in the order of the report.
    """

    did: dict[str, int] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, count: int = 1) -> None:
        self.did[what] = self.did.get(what, 0) + count

    def merge(self, other: "Tally") -> None:
        for what, count in other.did.items():
            self.add(what, count)
        self.figures.update(other.figures)
        self.wrong += other.wrong


class Campaign(NamedTuple):
    """A campaign: `run` gets its dice and how much of it to do, 1.0 being all of the goal.

    `short` is how much of it the suite does with every `make test`: a few seconds.
    """

    name: str
    goal: str
    run: Callable[[random.Random, float], Tally]
    short: float


def carry_out(campaign: Campaign, seed: int, scale: float) -> Tally:
    """Run a campaign. The seed decides all that the campaign itself decides."""
    begun = time.monotonic()
    tally = campaign.run(random.Random(f"{campaign.name} {seed}"), scale)  # noqa: S311  # no secret
    tally.figures["seconds"] = f"{time.monotonic() - begun:.0f}"
    return tally


def lines(results: Iterable[tuple[Campaign, Tally]]) -> Iterable[str]:
    """The report, as a table of Markdown, and what was wrong."""
    yield "| campaign | goal | done | wrong |"
    yield "|---|---|---|---|"
    results = list(results)
    for campaign, tally in results:
        did = ", ".join(f"{count:,} {what}" for what, count in tally.did.items())
        figures = ", ".join(f"{what} {value}" for what, value in tally.figures.items())
        done = "; ".join(filter(None, (did, figures)))
        yield f"| {campaign.name} | {campaign.goal} | {done} | {len(tally.wrong)} |"
    for campaign, tally in results:
        for wrong in tally.wrong[:20]:
            yield f"{campaign.name}: {wrong}"
