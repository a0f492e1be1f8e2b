"""What notebooks/09_who_lies_and_who_helps.ipynb must find."""


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    live = results["live"]
    assert live["weighted average"]["ill with marker, missed"] > 90
    assert live["nobody lies"]["balanced accuracy"] > 45  # chance: 33.3
    assert len(results["worth"]["all honest"]) == 2  # seeds


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    calm, attacked = (results["live"][k] for k in ("nobody lies", "weighted average"))
    # Accuracy hardly shows it, the ill patients without a marker do.
    assert calm["balanced accuracy"] - attacked["balanced accuracy"] < 5
    assert attacked["ill, missed"] - calm["ill, missed"] > 4
    marked = {
        k: found["ill with marker, missed"] for k, found in results["live"].items()
    }
    assert marked["weighted average"] > 95 > 60 > marked["median"] > 20
    # A limit for lengths that stops the liar exists, and is known only afterwards.
    ratio = results["ratio"]
    assert max(ratio, key=ratio.get) == "Hospital C" and ratio["Hospital C"] < 5
