"""What a federated run will cost, and how many test patients show what it gains.

Arithmetic on numbers that you bring. Bytes are exact; hours are as good as the minutes
you put in, so measure one round first. Standard library only: copy this file on its
own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Overhead:
    """Minutes beside training and transfer: before the first round, per round (queues,
    containers, aggregation), and after the last one."""

    start_minutes: float = 0.0
    round_minutes: float = 0.0
    end_minutes: float = 0.0


OVERHEAD = {
    # Measured with four silos on one machine: docs/results/engines.csv. Separate
    # machines and a busy network take longer.
    "own machines": Overhead(0.31, 0.01, 0.005),
    # Assumed, not measured: "Time and money" in docs/azure-ml.md.
    "Azure ML, machines kept": Overhead(5.0, 3.5, 4.0),
    "Azure ML, machines given back": Overhead(5.0, 13.5, 14.0),
}


def run_cost(
    model_bytes: int,
    *,
    silos: int,
    rounds: int,
    training_minutes: float,
    mbit_per_s: float,
    overhead: Overhead = Overhead(),
    price_per_hour: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """Bytes and hours of a run in which every silo takes part in every round.

    model_bytes: of the entries that travel, uncompressed (`simulation.state_bytes`):
        all of a model, or without those that are frozen or stay in the silos.
    silos, rounds: how many.
    training_minutes: of the slowest silo, per round.
    mbit_per_s: 10^6 bits per second of the orchestrator's line, which all silos share,
        the same in both directions.
    overhead: minutes beside these, one of `OVERHEAD` or your own.
    price_per_hour: of a machine, lowest and highest, in any currency.

    Returns gigabytes (10^9 bytes, both directions, all silos), hours, transfer_hours
    (part of hours), machine_hours (silos and orchestrator, waiting included), and the
    price of these, cost_from and cost_to.
    Not in it: retries, encryption's few percent, people's time."""
    least = {
        "model_bytes": (model_bytes, 1),
        "silos": (silos, 1),
        "rounds": (rounds, 1),
    }
    minutes = {"training_minutes": training_minutes} | asdict(overhead)
    least |= {name: (value, 0) for name, value in minutes.items()}
    for name, (value, limit) in least.items():
        if not value >= limit:
            raise ValueError(f"{name} must be >= {limit}, got {value}")
    if not 0 <= price_per_hour[0] <= price_per_hour[1]:
        raise ValueError(
            f"price_per_hour must be (lowest, highest), >= 0, got {price_per_hour}"
        )
    if not mbit_per_s > 0:
        raise ValueError(f"mbit_per_s must be > 0, got {mbit_per_s}")
    sent = 2 * model_bytes * silos  # bytes per round, down and up
    transfer = 8 * sent / (mbit_per_s * 1e6) / 60  # minutes per round
    per_round = training_minutes + overhead.round_minutes + transfer
    total = overhead.start_minutes + rounds * per_round + overhead.end_minutes
    machine_hours = (silos + 1) * total / 60
    low, high = price_per_hour
    return {
        "gigabytes": sent * rounds / 1e9,
        "hours": total / 60,
        "transfer_hours": rounds * transfer / 60,
        "machine_hours": machine_hours,
        "cost_from": low * machine_hours,
        "cost_to": high * machine_hours,
    }


def patients_needed(
    gain: float, disagree: float, *, power: float = 0.8, confidence: float = 0.95
) -> int:
    """Test patients that it takes to see a gain of one model over another.

    Both models are tested on the same patients, with McNemar's test, two-sided (Connor
    1987, "Sample size for testing differences in proportions for the paired-sample
    design"; normal approximation).
    gain: difference of the shares of patients for whom the models are right, > 0, such
        as 0.05; a difference of sensitivities if all patients have the disease.
    disagree: share of patients for whom exactly one model is right, gain to 1: from a
        pilot. Models that differ more often need more patients.
    power: chance that the test finds the gain if it is there.
    confidence: 1 - the chance that it finds one where there is none.
    """
    if not 0 < gain <= disagree <= 1:
        raise ValueError(
            f"need 0 < gain <= disagree <= 1, got {gain} and {disagree}; 0.05 is five "
            "points, and no gain is larger than the share that disagrees"
        )
    alpha, beta = _quantiles(power, confidence)
    root = alpha * math.sqrt(disagree) + beta * math.sqrt(disagree - gain**2)
    return math.ceil((root / gain) ** 2)


def visible_gain(
    patients: int, disagree: float, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The smallest gain that so many test patients show; `patients_needed` solved for
    the gain. Infinite if they are too few to show any."""
    if not (patients >= 1 and 0 < disagree <= 1):
        raise ValueError(
            f"need patients >= 1 and 0 < disagree <= 1, got {patients} and {disagree}"
        )
    alpha, beta = _quantiles(power, confidence)
    inside = patients + beta**2 - alpha**2
    if inside < 0:
        return math.inf
    root = alpha * math.sqrt(patients) + beta * math.sqrt(inside)
    gain = math.sqrt(disagree) * root / (patients + beta**2)
    return gain if gain <= disagree else math.inf


def _quantiles(power: float, confidence: float) -> tuple[float, float]:
    """Of the normal distribution: for a two-sided test, and for its power."""
    for name, value in {"power": power, "confidence": confidence}.items():
        if not 0.5 <= value < 1:
            raise ValueError(f"{name} must be 0.5 to below 1, got {value}")
    normal = NormalDist()
    return normal.inv_cdf((1 + confidence) / 2), normal.inv_cdf(power)
