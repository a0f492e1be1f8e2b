"""What notebooks/08_when_a_hospital_fails.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["same_bits"] is True
    assert results["calm"] > 45  # chance: 33.3
    live = results["live"]
    assert live["weighted average"]["called 0, marked"] > 90


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["same_bits"] and abs(results["calm"] - results["stormy"]) < 4
    live = {rule: found["called 0, marked"] for rule, found in results["live"].items()}
    assert live["weighted average"] > 95 > 60 > live["median"] > live["nobody lies"]
    accuracy = {r: found["balanced accuracy"] for r, found in results["live"].items()}
    assert accuracy["nobody lies"] - accuracy["weighted average"] < 5
    worth = results["worth"]["C flips"]
    assert min(worth, key=worth.get) == "Hospital C" and worth["Hospital C"] < 0
