import pytest
import torch
from torch import nn

from fl_helpers.models import _replace_stem, mlp, small_cnn, torchvision_model


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
