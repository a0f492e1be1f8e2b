"""What notebooks/05_which_remedy.ipynb must find."""


def small(results):
    """The notebook reads committed results: it finds the same at any parameters."""
    assert results["comparisons"] == 146 and len(results["clear"]) == 7
    start = results["start_with"]
    assert start["heart: by site"] == start["synthetic: label mix, full"] == "FedAvg"
    assert start["synthetic: both, full"] == "Own statistics"


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    small(results)
    assert all("scanner" in name or "both" in name for name in results["clear"])
