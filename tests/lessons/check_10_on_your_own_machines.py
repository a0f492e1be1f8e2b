"""What notebooks/10_on_your_own_machines.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["same_bits"] is True and results["refused"] == 4
    assert results["left"] == 0


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["same_bits"] and results["balanced_accuracy"] > 75
    assert results["refused"] == 4 and results["left"] == 0
