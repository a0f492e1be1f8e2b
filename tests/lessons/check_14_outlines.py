"""What notebooks/14_outlines.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["dice"]["centralized"] > 0.3
    # Larger outlines are learned from larger outlines.
    assert results["size"]["A is generous"] > results["size"]["all agree"]


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    gain, size, missed = results["gain"], results["size"], results["missed"]
    assert min(gain["centralized"]) > 3  # more images help, in each seed
    assert max(gain["federated"]) < 0 and min(gain["federated"]) > -8
    assert size["all agree"] < 100 < size["own last layer"] + 5 < size["A is generous"]
    assert missed["smallest"] > 0.3 > 0.1 > missed["largest"]
