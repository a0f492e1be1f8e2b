"""What notebooks/15_your_tables.ipynb must find."""


def small(results):
    """The same data and the same committed rows: nothing in it is drawn."""
    committed(results)


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    # Nobody but Long Beach gains, so no mean gain is clear; with any kind of model.
    assert sum("alone" in name for name in results["gains"]) == 3
    assert not [name for name in results["clear"] if "alone" in name]
    for name, hospitals in results["gains"].items():
        wins = {k: int(text.split("(")[1].split()[0]) for k, text in hospitals.items()}
        if "alone" in name:
            assert wins["VA Long Beach"] >= 9 and max(wins["Cleveland"], 0) <= 7
            assert wins["Hungary"] <= 6
    assert results["gains"]["network: FedAvg - alone"]["Hungary"].startswith("-0.6")
    # One healthy patient turns the answer round.
    assert results["means"] == [2.8, -4.3] and results["wins"] == [9, 1]
    assert results["ones"]["ecg_st_t"] == 4
    assert 4 < results["odds_ratios"]["sex_male"] < 5
    assert results["odds_ratios"].keys() >= {"Hungary", "VA Long Beach"}
