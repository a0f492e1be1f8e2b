"""SCAFFOLD, inside one silo and over rounds, against the paper's own formulas."""

from dataclasses import replace

import pytest
import torch
from conftest import batchnorm_model, linear_model, play

from fl_helpers.aggregation import weighted_average
from fl_helpers.scaffold import ControlVariates, zero_variates
from fl_helpers.training import PlainSGD, Step, sgd_client, train_locally


def scaffold(make_model, **options):
    options = dict(epochs=1, lr=0.05, batch_size=8) | options

    def client_update(params, silo, *, round_index, rng):
        variates, model = ControlVariates(params), make_model()
        model.load_state_dict({key: params[key] for key in model.state_dict()})
        how = dict(adjust_gradients=variates.correct, rng=rng)
        update = train_locally(model, silo, **options, **how)
        return replace(update, params=update.params | variates.entries())

    return client_update


def start(make_model):
    torch.manual_seed(3)
    return make_model()


def federate(model, silos, client, **options):
    params = options.pop("params", model.state_dict())
    options = dict(rounds=3, seed=0) | options
    return play(params, silos, client, weighted_average, **options)


def scaffold_setting(model):
    variates = zero_variates(model)
    own = [name for name in variates if name.startswith("own_variate.")]
    return dict(params=model.state_dict() | variates, keep_local=own)


def test_scaffold_with_zero_variates_is_fedavg_exactly(silos):
    """In the first round; later rounds correct, so they differ."""
    model = start(batchnorm_model)
    plain_client = sgd_client(batchnorm_model, epochs=1, lr=0.05, batch_size=8)
    for rounds, equal in ((1, True), (2, False)):
        plain = federate(model, silos, plain_client, rounds=rounds).params
        setting = scaffold_setting(model)
        ours = federate(
            model, silos, scaffold(batchnorm_model), rounds=rounds, **setting
        )
        same = [torch.equal(plain[key], ours.params[key]) for key in plain]
        assert all(same) == equal


def test_scaffold_variates_average_to_the_servers(silos):
    model = start(batchnorm_model)
    setting = scaffold_setting(model)
    history = federate(model, silos, scaffold(batchnorm_model), **setting)
    for name, _ in model.named_parameters():
        own = [history.local[s.name][f"own_variate.{name}"] for s in silos]
        mean = (40 * own[0] + 24 * own[1]) / 64  # the silos' training examples
        torch.testing.assert_close(history.params[f"variate.{name}"], mean)
        assert mean.abs().max() > 0


def test_scaffold_is_option_two_of_the_paper_for_plain_sgd(silos):
    model = start(linear_model)
    rng = torch.Generator().manual_seed(1)
    params = model.state_dict() | zero_variates(model)
    for name in list(params):
        if "variate" in name:
            params[name] = torch.randn(params[name].shape, generator=rng) / 10
    params = {name: value.clone() for name, value in params.items()}
    options = dict(step=Step(PlainSGD(0, 0)), lr=0.05, epochs=2)
    update = scaffold(linear_model, **options)(params, silos[0], round_index=0, rng=rng)
    steps = update.metrics["steps"]
    assert steps == 10  # 2 epochs of 40 // 8
    for name, _ in model.named_parameters():
        c, own = params[f"variate.{name}"], params[f"own_variate.{name}"]
        moved = params[name] - update.params[name]
        expected = own - c + moved / (steps * 0.05)
        new = update.params[f"own_variate.{name}"]
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(update.params[f"variate.{name}"], c + new - own)


def test_scaffold_needs_its_variates_and_a_gradient():
    model = linear_model()
    with pytest.raises(ValueError, match="no control variates.*zero_variates"):
        ControlVariates(model.state_dict())
    with pytest.raises(ValueError, match="pass `correct`"):
        ControlVariates(model.state_dict() | zero_variates(model)).entries()


def test_partial_participation_moves_the_servers_variate_by_its_share():
    model = linear_model()
    variates = ControlVariates(model.state_dict() | zero_variates(model))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    variates.correct(model)
    entries = variates.entries(participation=0.25)
    assert entries["own_variate.1.bias"].tolist() == [1, 1]
    assert entries["variate.1.bias"].tolist() == [0.25, 0.25]
