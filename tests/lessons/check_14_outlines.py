"""What notebooks/14_outlines.ipynb must find."""

from statistics import mean


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["dice"]["centralized"] > 0.3
    # Larger outlines are learned from larger outlines.
    size = results["size"]
    assert mean(size["A is generous"].values()) > mean(size["all agree"].values())


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    gain, size, missed = results["gain"], results["size"], results["missed"]
    assert max(gain["federated"]) < 0 and min(gain["federated"]) > -8
    assert min(gain["centralized"]) > 0  # in each seed; the interval includes zero
    agreed, generous = size["all agree"], size["A is generous"]
    own = size["own last layer"]
    assert max(agreed.values()) < 100 < 105 < min(generous.values())  # everywhere
    assert own["Hospital A"] > generous["Hospital A"] + 20
    assert own["Hospital C"] < 100
    assert missed["smallest"] > 0.15 > 0.06 > missed["middle"] > missed["largest"]
