"""What notebooks/16_time_to_event.ipynb must find."""


def small(results):
    """Facts that hold with few patients and rounds; wrong if nothing is estimated."""
    assert 1.3 < results["hazard_ratio_marker"] < 3.0  # the truth is 2.01
    assert results["width_together"] < results["width_d"]
    assert results["intervals_that_hold"] >= 5  # of 6


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["intervals_with_rule"] == 1 and results["intervals_without_d"] == 2
    assert results["rounds"] == 4 and results["intervals_that_hold"] == 15
    assert 1.7 < results["hazard_ratio_marker"] < 2.4
    assert results["width_d"] > 3 * results["width_together"]
    low, _ = results["cox_minus_network"]
    assert low > 0  # small, but steady
