"""What notebook 12 must find, with any parameters and with its own."""


def small(results):
    # Half of the bits of noise are ones; for two million bits +-0.0007 (95 %).
    assert abs(results["ones"] - 0.5) < 0.002
    assert results["best_of_noise"] < 25  # dB; 30 is hard to tell apart
    assert results["in_sum"] < sum(results["lost"].values())
    forged, over, two, trap = results["refused"]
    assert "is not signed with its certificate" in forged
    assert "round 0 is over" in over
    assert "a sum of 2 silos is refused" in two
    assert "could be subtracted" in trap
    assert [len(silos) for silos in results["silos"].values()] == [4, 3, 3]


def committed(results):
    lost = results["lost"]
    assert all(count >= 1 for count in lost.values())
    assert sum(lost.values()) >= 10 and 1 <= results["in_sum"] <= 3  # of 32 patients
