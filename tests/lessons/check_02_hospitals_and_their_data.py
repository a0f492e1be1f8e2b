"""What notebooks/02_hospitals_and_their_data.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["largest_difference_to_pooled"] < 1e-7
    assert 0.2 < results["label_skew_knob_1"] < 0.4


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["largest_difference_to_pooled"] < 1e-7
    assert results["label_skew_here"] < 0.1 < results["label_skew_knob_1"]
    brightness = results["brightness_of"]  # the text: B is darkest, C brightest
    assert min(brightness, key=brightness.get) == "Hospital B"
    assert max(brightness, key=brightness.get) == "Hospital C"
