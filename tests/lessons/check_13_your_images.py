"""What notebooks/13_your_images.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    assert results["federated"] > 65 and results["local"] > 65  # chance: 50
    assert results["own_model"] > 40  # chance: 33.3, or 50 with real radiographs
    assert results["copied"] == 7


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    for source in ("published", "here"):  # FLamby's own figures, and ours
        means = {a: v[source] for a, v in results["benchmark"].items()}
        assert means["federated"] + 3 < means["local"]
    assert results["largest_deviation_from_published"] < 1
    assert results["worst_hospital"] == "VA Long Beach"  # and it gains most surely
    assert results["wins"]["federated"]["VA Long Beach"] >= 9  # of 10
    assert results["wins"]["federated"]["Switzerland"] <= 1
    assert results["local bias"] > results["federated"] + 3
