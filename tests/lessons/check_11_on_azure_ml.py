"""What notebooks/11_on_azure_ml.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["same_bits"] is True and results["refused"] == 1
    assert results["jobs"] == 11  # initial, 4 train, aggregate, 4 evaluate, collect


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["same_bits"] and results["balanced_accuracy"] > 65
    assert results["worst"] > 60 and results["jobs"] == 21 and results["refused"] == 1
