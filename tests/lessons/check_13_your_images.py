"""What notebooks/13_your_images.ipynb must find."""

from statistics import mean


def small(results):
    """Facts that hold with little data and few rounds; wrong if nothing is learned."""
    scratch, head, thawed = results["scores"].values()
    assert scratch["ensemble"] > 40  # chance: 33.3
    for scores in (head, thawed):  # the pretrained body helps everybody
        assert min(scores.values()) > 50
        assert scores["federated"] > scratch["federated"]


def committed(results):
    """What a reader sees on the forge's page, at default parameters."""
    scratch, head, _ = results["scores"].values()
    assert all(8.9 < head[way] - scratch[way] < 19 for way in head)
    # From scratch it loses in each seed; with the head, seeds are on both sides of 0.
    assert max(results["gain"]["from scratch"]) < 0
    assert min(results["gain"]["head only"]) < 0 < mean(results["gain"]["head only"])
    for scores in results["scores"].values():
        assert scores["ensemble"] > scores["local"] + 2
    # Thawed, the federated model is where it was; no way is above in all seeds.
    assert abs(mean(results["thawed"]["federated"])) < 0.2
    assert all(min(seeds) < 0 < max(seeds) for seeds in results["thawed"].values())
