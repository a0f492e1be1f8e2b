"""What notebooks/01_centralized_baseline.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["centralized"] > 45 and results["local"] > 40  # chance: 33.3


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["local"] + 5 < results["centralized"]
