"""What notebooks/13_your_images.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    for scores in results["networks"].values():
        assert scores["centralized"] > 42  # chance: 33.3


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    scratch, head = (results["networks"][n] for n in ("from scratch", "head only"))
    assert head["federated"] > scratch["federated"] + 3  # the pretrained network helps
    # Three seeds do not promise a gain, and the text says so: no interval is above 0.
    assert min(results["gain"]["from scratch"]) < 0 > min(results["gain"]["head only"])
