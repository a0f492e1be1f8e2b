import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fl_helpers import models
from fl_helpers.models import (
    Ensemble,
    SmallUNet,
    _replace_stem,
    check_model,
    freeze,
    mlp,
    small_cnn,
    smooth_cnn,
    torchvision_model,
)
from fl_helpers.training import frozen_entries


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 1), (32, 3), (64, 1)])
def test_small_cnn_takes_any_image(norm, size, channels):
    model = small_cnn(3, in_channels=channels, norm=norm)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 3)
    assert {name.split(".")[0] for name in model.state_dict()} == {"body", "head"}


def test_small_cnn_is_small_and_its_norm_is_a_choice():
    # 8*25 + 16*8*9 + 32*16*9 convolutions, 2 * (8+16+32) norms, 512*3 + 3 head
    count = sum(p.numel() for p in small_cnn(3).parameters())
    assert count == 200 + 1152 + 4608 + 112 + 1539
    kinds = {type(m) for m in small_cnn(3, norm="group").modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
    with pytest.raises(ValueError, match="'layer'"):
        small_cnn(3, norm="layer")
    with pytest.raises(ValueError, match="even"):
        small_cnn(3, width=7)


def test_mlp_without_hidden_layers_is_logistic_regression():
    model = mlp(13, 2, hidden=())
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "head.weight": (2, 13),
        "head.bias": (2,),
    }
    assert mlp(13, 2, hidden=(8, 4))(torch.zeros(5, 13)).shape == (5, 2)


@pytest.mark.parametrize(
    ("name", "channels", "classes"),
    [("resnet18", 1, 2), ("resnet18", 3, 7), ("mobilenet_v3_small", 1, 5)],
)
def test_torchvision_models_are_adapted(name, channels, classes):
    model = torchvision_model(name, classes, in_channels=channels).eval()
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, classes)


def test_a_grey_image_meets_the_same_filters():
    torch.manual_seed(0)
    colour = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    grey = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    grey.load_state_dict(colour.state_dict())
    _replace_stem(grey, 1)
    image = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(grey(image), colour(image.expand(1, 3, 8, 8)))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no classifier 'resnet19'"):
        torchvision_model("resnet19", 2)


def test_the_bias_of_the_stem_is_kept():
    colour = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    grey = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    grey.load_state_dict(colour.state_dict())
    _replace_stem(grey, 1)
    image = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(grey(image), colour(image.expand(1, 3, 8, 8)))


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_a_classifier_that_cannot_be_adapted_is_refused(name):
    # No linear layer at the end; further heads that training would need.
    with pytest.raises(ValueError, match=name):
        torchvision_model(name, 2)


def found(rows):
    """By first word, but "second" for the reload."""
    words = [row["check"].removeprefix("a ").split()[0] for row in rows]
    return {w: (r["found"], r["ok"]) for w, r in zip(words, rows, strict=True)}


def examples(n=8):
    return torch.randn(n, 1, 16, 16), torch.arange(n) % 3


def test_check_of_a_good_model():
    x, y = examples()
    before = x.clone()
    rows = check_model(lambda: small_cnn(3), (x, y), steps=2)
    assert all(row["ok"] in (True, None) for row in rows) and torch.equal(x, before)
    row = found(rows)
    assert row["BatchNorm"] == (3, None) and row["outputs"][0] == [8, 3]
    # 30,444 + 460 bytes of float32 (7611 parameters, 112 statistics), 3 counters
    assert row["bytes"][0] == 2 * (4 * (7611 + 112) + 3 * 8)
    assert row["gradient"][0] > 0
    assert found(check_model(lambda: small_cnn(3, norm="group"), (x, y)))[
        "BatchNorm"
    ] == (0, None)


def test_check_counts_the_bytes_of_what_is_trained_only():
    def head_only():
        return freeze(small_cnn(3), up_to="body")

    x, y = examples()
    row = found(check_model(head_only, (x, y), steps=1))
    assert row["bytes"][0] == 2 * 4 * (512 * 3 + 3)  # weights and biases, both ways
    # The gradient of the head needs its 512 inputs for each of 8 images, that of the
    # cross-entropy 3 log probabilities, the 8 labels and a weight, which is their sum.
    assert row["activation"][0] == 4 * 8 * (512 + 3) + 8 * 8 + 4


@pytest.mark.parametrize("up_to", [None, "conv1", "layer2", "layer4"])
def test_two_files_agree_on_what_is_trained(up_to):
    model = freeze(torchvision_model("resnet18", 2), up_to=up_to)
    entries = set(model.state_dict())
    assert models._trained(model) == entries - set(frozen_entries(model))


def test_check_counts_what_a_step_keeps():
    def linear():
        return nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.Tanh())

    row = found(check_model(linear, examples(), loss_fn=lambda z, y: z.sum(), steps=1))
    assert row["activation"][0] == 4 * 8 * (256 + 5)  # inputs, and outputs of the Tanh


def test_check_finds_a_state_that_lacks_what_decides():
    class Hidden(nn.Module):
        """A constant drawn at construction, in no state_dict."""

        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(256, 3), torch.rand(()) + 1

        def forward(self, x):
            return self.scale * self.linear(x.flatten(1))

    row = found(check_model(Hidden, examples()))
    assert row["second"] == (False, False) and row["loss"][1]


def test_check_finds_what_gets_no_gradient_and_no_finite_loss():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(256, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x.flatten(1))

    row = found(check_model(Unused, examples()))
    assert row["parameters"] == ("spare.weight, spare.bias", False)
    row = found(
        check_model(Unused, examples(), loss_fn=lambda z, y: z.sum() / 0)  # infinite
    )
    assert row["loss"][1] is False
    row = found(check_model(Unused, examples(), loss_fn=lambda z, y: z.mean(1)))
    assert row["loss"][1] is False  # a vector, not a number


def test_check_finds_a_model_that_mixes_examples():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(256, 3)

        def forward(self, x):
            z = self.linear(x.flatten(1))
            return z - z.mean(0)

    assert found(check_model(Mixing, examples()))["one"][1] is False


@pytest.mark.parametrize("size", [28, 30, 32])
def test_smooth_cnn_takes_its_size_and_has_neither_kinks_nor_pooling(size):
    model = smooth_cnn(3, size=size)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 3)
    kinds = {type(module) for module in model}
    assert kinds == {nn.Conv2d, nn.Tanh, nn.Flatten, nn.Linear}


def test_weights_come_from_a_file_but_for_the_head(tmp_path):
    source = torchvision_model("resnet18", 10)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = torchvision_model("resnet18", 2, in_channels=1, weights=tmp_path / "w.pth")
    found, own = source.state_dict(), model.state_dict()
    kept = [k for k in own if k not in ("conv1.weight", "fc.weight", "fc.bias")]
    assert all(torch.equal(own[k], found[k]) for k in kept) and len(kept) == 119
    grey = found["conv1.weight"].sum(1, keepdim=True)  # the same answer to grey images
    torch.testing.assert_close(own["conv1.weight"], grey)
    assert own["fc.weight"].shape == (2, 512)


def test_a_file_of_another_model_or_with_code_is_refused(tmp_path):
    torch.save(small_cnn(2).state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="does not hold the state_dict of resnet18"):
        torchvision_model("resnet18", 2, weights=tmp_path / "small.pth")
    torch.save(small_cnn(2), tmp_path / "whole.pth")  # a pickled object
    with pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only"):
        torchvision_model("resnet18", 2, weights=tmp_path / "whole.pth")
    with pytest.raises(FileNotFoundError):
        torchvision_model("resnet18", 2, weights=tmp_path / "none.pth")


def test_freezing_goes_up_to_a_layer():
    model = freeze(torchvision_model("resnet18", 2), up_to="layer3")
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"layer4", "fc"}
    freeze(model, up_to=None)
    assert all(p.requires_grad for p in model.parameters())
    head = freeze(small_cnn(3), up_to="body")
    trained = [n for n, p in head.named_parameters() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    for name in ("head", "nose"):
        with pytest.raises(
            ValueError, match=rf"such as one of \['body'\], got '{name}'"
        ):
            freeze(small_cnn(3), up_to=name)


class Says(nn.Module):
    """Always the same odds: of the first of two classes, or inside at each pixel."""

    def __init__(self, odds, *, pixels=False):
        super().__init__()
        self.logit, self.pixels = math.log(odds), pixels

    def forward(self, x):
        if self.pixels:
            return torch.full_like(x, self.logit)
        return torch.tensor([[self.logit, 0.0]]).expand(len(x), 2)


def test_an_ensemble_averages_the_answers():
    both = Ensemble([Says(9.0), Says(1.0)])  # 90 % and 50 % for the first class: 70 %
    expected = torch.tensor([0.7, 0.3]).expand(3, 2)
    torch.testing.assert_close(both(torch.zeros(3, 1)).softmax(dim=1), expected)
    with pytest.raises(ValueError, match="at least one"):
        Ensemble([])


def test_an_ensemble_of_outlines_averages_the_probability_of_each_pixel():
    both = Ensemble([Says(odds, pixels=True) for odds in (9.0, 1.0)])  # 90, 50 %: 70 %
    x = torch.zeros(2, 1, 4, 4)
    torch.testing.assert_close(both(x).sigmoid(), torch.full_like(x, 0.7))


def test_a_small_unet_answers_pixel_by_pixel():
    torch.manual_seed(0)
    model = SmallUNet()
    assert sum(p.numel() for p in model.parameters()) == 120_545
    x = torch.randn(3, 1, 32, 48)
    outputs = model.eval()(x)
    assert outputs.shape == x.shape and (outputs < 0).all()  # it begins with "none"
    # No statistics of a batch: an image alone gives the same.
    torch.testing.assert_close(model(x[:1]), outputs[:1], atol=1e-5, rtol=1e-5)


def test_a_small_unet_learns_an_outline():
    torch.manual_seed(0)
    x = torch.zeros(16, 1, 16, 16)
    for k in range(16):  # a bright square of 6 x 6 pixels on a dark ground
        x[k, :, k % 8 : k % 8 + 6, (3 * k) % 8 : (3 * k) % 8 + 6] = 1
    model = SmallUNet()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), x).backward()
        optimizer.step()
    said = model(x) > 0
    both = (said & (x > 0)).sum().item()
    assert 2 * both / (said.sum() + x.sum()).item() > 0.8  # Dice
