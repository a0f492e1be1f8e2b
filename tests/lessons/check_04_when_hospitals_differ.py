"""What notebooks/04_when_hospitals_differ.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["fedbn"]["scanner"] != 0  # another model than FedAvg's
    assert set(results["own_statistics"]) == {"scanner", "label mix"}


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    local, own = results["local"], results["own_statistics"]
    assert local["scanner"] > 0 and local["label mix"] < -10  # points above FedAvg
    assert own["scanner"] > 5 and abs(own["label mix"]) < 1.5
    assert results["fedbn"]["scanner"] > 5
    assert results["fine_tuning"]["label mix"] < results["fine_tuning"]["scanner"]
