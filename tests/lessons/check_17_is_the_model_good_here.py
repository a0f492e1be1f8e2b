"""What notebooks/17_is_the_model_good_here.ipynb must find."""


def small(results):
    """Facts that hold with few patients and steps; wrong if nothing is learned."""
    assert max(value for value, *_ in results["auroc"].values()) > 0.6  # chance: 0.5
    assert all(0 <= count < 4 for count in results["withheld"].values())
    fresh = results["calibration"]["recalibrated"].values()
    gaps = [abs(row["says (%)"] - row["ill (%)"]) for row in fresh]
    assert max(gaps) < 20  # a half of fewer than a hundred patients


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    auroc, calibration = results["auroc"], results["calibration"]
    assert min(auroc, key=lambda name: auroc[name][0]) == "Hospital B"
    assert auroc["Hospital B"][2] < auroc["Hospital A"][1]
    sent, fresh = calibration["as sent"], calibration["recalibrated"]
    assert sent["Hospital C"]["says (%)"] + 20 < sent["Hospital C"]["ill (%)"]
    assert sent["Hospital B"]["says (%)"] > sent["Hospital B"]["ill (%)"] + 10
    assert all(row["to"] < 0.5 for row in sent.values())  # too sure everywhere
    for row in fresh.values():
        assert row["slope from"] < 1 < row["to"]
        assert abs(row["says (%)"] - row["ill (%)"]) < 2.1
    worth = {way: of["Hospital C"] for way, of in results["net_benefit"].items()}
    assert worth["as sent"] + 10 < worth["call everybody"] < worth["recalibrated"]
    assert results["bins"]["Hospital A"] > results["bins"]["Hospital D"]
    assert sum(results["withheld"].values()) == 5  # of 16
    low = {name: gain[1] for name, gain in results["gains"].items()}
    assert low["Hospital B"] > 0 and low["together"] > 0
