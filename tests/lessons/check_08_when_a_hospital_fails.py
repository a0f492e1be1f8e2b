"""What notebooks/08_when_a_hospital_fails.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["numbers_that_differ"] == 0
    assert results["calm"] > 45  # chance: 33.3
    assert results["refused"] == ["Hospital D", "Hospital C"]


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["numbers_that_differ"] == 0 and results["calm"] > 78
    lost = results["lost"]  # {who is absent: [mean, low, high] in points}
    for who in ("each in turn", "D always", "D always, at D"):
        mean, low, high = lost[who]
        assert low < 0 < high, who  # no loss that can be told from luck
    mean, low, high = lost["A always"]
    assert low < 0 < 2 < mean  # likely, and not certain after five seeds
    assert lost["A always, at A"][1] > 0
