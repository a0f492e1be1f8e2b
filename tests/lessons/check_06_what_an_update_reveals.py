"""What notebooks/06_what_an_update_reveals.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["recovered"] >= 1 and results["largest_share_error"] < 25
    assert 0 < results["epsilon"] <= 3
    assert results["ssim"]["DP-SGD, epsilon 8"] < 0.1


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["recovered"] >= 4  # of 8
    ssim = results["ssim"]
    assert ssim["1 image, 1 step"] > 0.95 > 0.3 > ssim["8 images, 1 step"]
    membership = results["membership"]
    assert membership["likelihood ratio"] > membership["loss"] > 0.75
    assert 0.48 < membership["FedAvg: loss"] < 0.56
    assert results["fedavg"] > 80 and results["largest_share_error"] < 12
