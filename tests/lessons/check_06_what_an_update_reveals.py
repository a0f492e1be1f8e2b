"""What notebooks/06_what_an_update_reveals.ipynb must find."""


def small(results):
    """Facts that hold with little data and few steps; wrong if nothing is found."""
    assert results["recovered"] >= 1 and results["largest_share_error"] < 25
    assert results["victims"]["batch of 4"] == 3  # of the committed eight


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    assert results["recovered"] >= 4  # of 8
    victims = results["victims"]
    assert victims["one image, one step"] == victims["one image, 20 steps"] == 8
    assert victims["sum of 4 hospitals, one image each"] == victims["batch of 4"] == 3
    assert victims["small_cnn, GroupNorm, one image"] == 5
    assert results["largest_share_error"] < 12
    loss, ratio = (results["membership"][k] for k in ("loss", "likelihood ratio"))
    assert ratio["auroc"] > loss["auroc"] > 0.75
    assert ratio["tpr"] > 0.1 > 0.05 > loss["tpr"]
