"""Who of a run's silos is there, who is away and since when, as the server sees it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from fl_helpers.cross_silo.on_premises.refusals import CODES, explained


@dataclass(frozen=True)
class Answers:
    """What came back for one task, by silo: updates, and reasons of refusals.

    silos: those whose updates count; a secure sum has one update for all of them.
    """

    updates: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    silos: tuple[str, ...] = ()

    def more(self, later: Answers) -> Answers:
        """These, and what came when the rest was asked again."""
        silos = tuple(sorted({*self.silos, *later.silos}))
        before = {k: v for k, v in self.refused.items() if k not in later.silos}
        updates = self.updates | later.updates
        return Answers(updates, before | later.refused, silos)


class Attendance:
    """The silos of one run. A silo is called "site" where the engine's name is meant.

    silos: names, by the engine's names of their sites. heard: sites that asked for work
    since they were last found missing. ended: silos whose part in the run is over.
    """

    def __init__(self, silos: Mapping[str, str]) -> None:
        self.silos = dict(silos)
        self.away: dict[str, str] = {}  # site: since when, in words
        self.heard: set[str] = set()
        self.ended: set[str] = set()

    def back(self) -> list[str]:
        """Silos that were away and have asked for work since; they are there again."""
        sites = sorted(self.away.keys() & self.heard)
        for site in sites:
            del self.away[site]
        return [self.silos[site] for site in sites]

    def present(self) -> list[str]:
        """Sites that are asked: not those that did not answer and have not asked for
        work since. So a silo costs the others at most one deadline."""
        ended = {site for site, silo in self.silos.items() if silo in self.ended}
        return sorted(self.silos.keys() - self.away.keys() - ended)

    def note(
        self, index: int, sites: Iterable[str], heard: Collection[str]
    ) -> list[str]:
        """Silos that were asked in a round and are not among those that were heard."""
        missing = [site for site in sites if self.silos[site] not in heard]
        now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        for site in missing:
            self.away.setdefault(site, f"since round {index}, {now}")
        self.heard.difference_update(missing)
        return [self.silos[site] for site in missing]

    def said(self) -> str:
        """All that are away, and since when; "" if nobody is."""
        found = sorted((self.silos[site], since) for site, since in self.away.items())
        return "; ".join(f"{silo!r} is away {since}" for silo, since in found)

    def why(self, index: int, answers: Answers, quorum: int) -> str:
        """That a round lacks its quorum, and what is known of the silos that lack."""
        codes = {text.rpartition(" ")[2] for text in answers.refused.values()}
        means = "; ".join(explained(code) for code in sorted(codes & CODES.keys()))
        said = "; ".join(filter(None, [self.said(), means]))
        return (
            f"round {index}: {len(answers.silos)} valid updates, the quorum is "
            f"{quorum}; refused: {answers.refused}" + (f"; {said}" if said else "")
        )
