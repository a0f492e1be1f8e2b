"""What a federated run will cost: bytes, hours, machine hours.

Arithmetic on numbers that you bring. Bytes are exact; hours are as good as the minutes
you put in, so measure one round first. Standard library only: copy this file on its
own.
"""

from __future__ import annotations

# Minutes beside training and transfer, to pass to `run_cost(**OVERHEAD[...])`.
OVERHEAD: dict[str, dict[str, float]] = {
    # Measured with four silos on one machine: docs/results/engines.csv. Separate
    # machines and a busy network take longer.
    "own machines": {
        "start_minutes": 0.31,
        "overhead_minutes": 0.01,
        "end_minutes": 0.005,
    },
    # Assumed, not measured: "Time and money" in docs/azure-ml.md.
    "Azure ML, machines kept": {
        "start_minutes": 5.0,
        "overhead_minutes": 3.5,
        "end_minutes": 4.0,
    },
    "Azure ML, machines given back": {
        "start_minutes": 5.0,
        "overhead_minutes": 13.5,
        "end_minutes": 14.0,
    },
}


def run_cost(
    model_bytes: int,
    *,
    silos: int,
    rounds: int,
    training_minutes: float,
    mbit_per_s: float,
    start_minutes: float = 0.0,
    overhead_minutes: float = 0.0,
    end_minutes: float = 0.0,
    price_per_hour: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """Bytes and hours of a run in which every silo takes part in every round.

    model_bytes: of one model state, uncompressed (`simulation.state_bytes`).
    training_minutes: of the slowest silo, per round. mbit_per_s: 10^6 bits per second
    of the orchestrator's line, which all silos share, the same in both directions.
    start_minutes: before the first round; overhead_minutes: per round, beside training
    and transfer (queues, containers, aggregation); end_minutes: after the last round.

    price_per_hour: of a machine, lowest and highest, in any currency.

    Returns gigabytes (10^9 bytes, both directions, all silos), hours, transfer_hours
    (part of hours), machine_hours (silos and orchestrator, waiting included), and the
    price of these, cost_from and cost_to.
    Not in it: retries, encryption's few percent, people's time.
    """
    counts = {"model_bytes": model_bytes, "silos": silos, "rounds": rounds}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
    minutes = {"training_minutes": training_minutes, "start_minutes": start_minutes}
    minutes |= {"overhead_minutes": overhead_minutes, "end_minutes": end_minutes}
    for name, value in minutes.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not 0 <= price_per_hour[0] <= price_per_hour[1]:
        raise ValueError(
            f"price_per_hour must be (lowest, highest), >= 0, got {price_per_hour}"
        )
    if not mbit_per_s > 0:
        raise ValueError(f"mbit_per_s must be > 0, got {mbit_per_s}")
    sent = 2 * model_bytes * silos  # bytes per round, down and up
    transfer = 8 * sent / (mbit_per_s * 1e6) / 60  # minutes per round
    per_round = training_minutes + overhead_minutes + transfer
    total = start_minutes + rounds * per_round + end_minutes
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
