import copy
import random
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batchnorm_model, linear_model
from sklearn import metrics as sk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from torchvision.ops import StochasticDepth

from fl_helpers import training
from fl_helpers.scaffold import ControlVariates, zero_variates
from fl_helpers.training import (
    PlainSGD,
    ProximalTerm,
    Step,
    classification_metrics,
    cosine_lr,
    evaluate,
    frozen_entries,
    norm_entries,
    num_steps,
    reestimate_statistics,
    sgd_client,
    train_locally,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def train(model, silo, **options):
    defaults = dict(epochs=1, lr=0.1, batch_size=8, rng=rng())
    return train_locally(model, silo, **(defaults | options))


def test_one_step_is_plain_gradient_descent():
    # Squared error of w * x with x = 2, y = 1, w = 3: gradient 2 (3*2 - 1) 2 = 20.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    silo = SimpleNamespace(
        name="a", train=(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    )
    options = dict(lr=0.01, step=Step(PlainSGD(0, 0)))
    update = train(model, silo, loss_fn=nn.functional.mse_loss, **options)
    assert update.params["weight"].item() == pytest.approx(3 - 0.01 * 20)
    assert update.metrics == {"train_loss": 25.0, "steps": 1.0}
    assert update.num_examples == 1 and update.silo == "a"


def test_equals_a_hand_written_loop_bit_for_bit(silos):
    torch.manual_seed(0)
    mine = batchnorm_model()
    theirs = copy.deepcopy(mine)
    update = train(mine, silos[0], epochs=2, step=Step(PlainSGD(0.9, 1e-4)))
    optimizer = torch.optim.SGD(
        theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-4
    )
    (x, y), generator = silos[0].train, rng()
    for _ in range(2):
        for batch in torch.randperm(40, generator=generator).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x[batch]), y[batch]).backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        assert torch.equal(update.params[name], value), name


def test_steps_leave_out_the_incomplete_batch(silos):
    assert num_steps(40, epochs=2, batch_size=16) == 4  # 40 // 16 = 2 per epoch
    assert num_steps(5, epochs=3, batch_size=16) == 3  # all five in one batch
    assert num_steps(40, epochs=0.5, batch_size=4) == 5
    assert num_steps(40, epochs=0.001, batch_size=4) == 1
    assert (
        train(linear_model(), silos[0], batch_size=16, epochs=2).metrics["steps"] == 4
    )


def test_proximal_term_is_the_gradient_of_its_penalty(silos):
    torch.manual_seed(0)
    mine, start = linear_model(), None
    start = copy.deepcopy(mine)
    theirs = copy.deepcopy(mine)
    options = dict(step=Step(PlainSGD(0, 0)), batch_size=20, epochs=1, lr=0.1)
    near = ProximalTerm(mine, 0.7)
    update = train(mine, silos[0], adjust_gradients=near, **options)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    x, y = silos[0].train
    for batch in torch.randperm(40, generator=rng()).split(20):
        pairs = zip(theirs.parameters(), start.parameters(), strict=True)
        penalty = 0.7 / 2 * sum(((p - q) ** 2).sum() for p, q in pairs)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(theirs(x[batch]), y[batch]) + penalty).backward()
        optimizer.step()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(update.params[name], value)


def test_same_rng_same_weights_and_another_rng_others(silos):
    torch.manual_seed(0)
    model = linear_model()
    runs = [train(copy.deepcopy(model), silos[0], rng=rng(s)) for s in (1, 1, 2)]
    first, second, third = (run.params["1.weight"] for run in runs)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_dropout_draws_from_the_rng_also_in_threads(silos):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 2))
    before = torch.random.get_rng_state()
    expected = train(copy.deepcopy(model), silos[0]).params["2.weight"]
    assert torch.equal(torch.random.get_rng_state(), before)
    results = []
    work = lambda: results.append(train(copy.deepcopy(model), silos[0]))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 4
    assert all(torch.equal(r.params["2.weight"], expected) for r in results)


def test_params_are_copies(silos):
    model = linear_model()
    update = train(model, silos[0])
    kept = update.params["1.weight"].clone()
    train(model, silos[0])
    assert torch.equal(update.params["1.weight"], kept)


def test_divergence_names_the_silo(silos):
    with pytest.raises(FloatingPointError, match="'a'.*smaller lr"):
        train(linear_model(), silos[0], lr=1e30, epochs=5)


@pytest.mark.parametrize("option", ["epochs", "lr", "batch_size"])
def test_bad_settings_are_named(silos, option):
    with pytest.raises(ValueError, match=f"{option} must be > 0, got 0"):
        train(linear_model(), silos[0], **{option: 0})


def test_a_negative_proximal_term_is_refused():
    with pytest.raises(ValueError, match="mu must be >= 0, got -1"):
        ProximalTerm(linear_model(), -1)


def test_empty_or_mismatched_data_is_refused():
    for x, y in (
        (torch.zeros(0, 256), torch.zeros(0)),
        (torch.zeros(3, 256), torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match="'x' has .* labels"):
            train(linear_model(), SimpleNamespace(name="x", train=(x, y)))


def test_cosine_goes_from_lr_to_nearly_zero():
    assert cosine_lr(0.2, 0, 10) == 0.2
    assert cosine_lr(0.2, 5, 10) == pytest.approx(0.1)  # half way: cos = 0
    assert 0 < cosine_lr(0.2, 9, 10) < 0.01


@pytest.mark.parametrize("num_classes", [2, 4])
def test_metrics_equal_scikit_learn(num_classes):
    rng_ = np.random.default_rng(0)
    y = rng_.integers(num_classes, size=300)
    scores = rng_.normal(size=(300, num_classes)) + 1.5 * np.eye(num_classes)[y]
    logits = torch.tensor(scores).round()  # many ties
    p = logits.softmax(1).numpy()
    got = classification_metrics(logits, torch.tensor(y))
    said = p.argmax(1)
    auroc = (
        sk.roc_auc_score(y, p[:, 1])
        if num_classes == 2
        else sk.roc_auc_score(y, p, multi_class="ovr", average="macro")
    )
    assert got["auroc"] == pytest.approx(auroc)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, said))
    assert got["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(y, said)
    )
    for k in range(num_classes):
        sensitivity = sk.recall_score(y == k, said == k)
        specificity = sk.recall_score(y != k, said != k)
        assert got[f"sensitivity_{k}"] == pytest.approx(sensitivity)
        assert got[f"specificity_{k}"] == pytest.approx(specificity)


def test_an_absent_class_is_not_counted():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    got = classification_metrics(p.log(), torch.tensor([0, 1, 1]))  # class 2 absent
    assert np.isnan(got["sensitivity_2"])
    assert got["balanced_accuracy"] == pytest.approx(0.75)  # (1/1 + 1/2) / 2


def test_loss_is_per_example_and_mode_is_restored(silos):
    model = batchnorm_model().train()
    x, y = silos[0].train
    got = evaluate(model, (x, y), batch_size=7)  # 40 = 5 * 7 + 5
    assert model.training
    model.eval()
    expected = nn.functional.cross_entropy(model(x), y).item()
    assert got["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="cannot evaluate 0"):
        evaluate(model, (x[:0], y[:0]))


def test_no_proximal_weight_is_plain_sgd_and_a_large_one_holds_back(silos):
    torch.manual_seed(0)
    model = linear_model()
    plain, none, strong = (
        train(copy.deepcopy(model), silos[0], **options).params["1.weight"]
        for options in (
            {},
            dict(adjust_gradients=ProximalTerm(model, 0.0)),
            dict(adjust_gradients=ProximalTerm(model, 5.0)),
        )
    )
    assert torch.equal(plain, none)
    start = model[1].weight.detach()
    assert (strong - start).norm() < 0.8 * (plain - start).norm()


def test_momentum_and_weight_decay_by_hand():
    # f = (2w - 1)^2 from w = 3, lr .01, momentum .5, decay .1; g = 4 (2w - 1) + .1 w
    # g = 20.3, w = 2.797; g = 4 * 4.594 + .2797 = 18.6557, velocity = .5 * 20.3 + g
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    data = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    options = dict(loss_fn=nn.functional.mse_loss, step=Step(PlainSGD(0.5, 0.1)))
    silo = SimpleNamespace(name="a", train=data)
    update = train(model, silo, lr=0.01, epochs=2, **options)
    expected = 2.797 - 0.01 * (0.5 * 20.3 + 18.6557)
    assert update.params["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_dropout_is_not_disturbed_by_a_thread_that_builds_a_model(silos):
    # In run_rounds with two workers, one silo trains while another builds its model,
    # which draws initial weights from torch's global generator.
    def build(*_):
        builder = threading.Thread(target=linear_model)
        builder.start()
        builder.join()

    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 2))
    expected = train(copy.deepcopy(model), silos[0]).params["2.weight"]
    model.register_forward_pre_hook(build)
    got = train(model, silos[0]).params["2.weight"]
    assert torch.equal(got, expected)


def test_divergence_in_the_last_step_is_reported(silos):
    x, y = silos[0].train
    silos[0].train = (x * 1000, y)  # gradient > 2, so lr times it is beyond float32
    with pytest.raises(FloatingPointError, match="'a'"):  # loss is fine, weights not
        train(linear_model(), silos[0], lr=3e38, batch_size=40)


def test_nan_in_the_data_is_reported_as_divergence(silos):
    x, y = silos[0].train
    x[3] = torch.nan
    with pytest.raises(FloatingPointError, match="'a'.*NaN in the data"):
        train(linear_model(), silos[0])


def test_frozen_weights_stay(silos):
    model = batchnorm_model()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    update = train(model, silos[0], adjust_gradients=ProximalTerm(model, 0.1))
    assert torch.equal(update.params["0.weight"], before["0.weight"])
    assert not torch.equal(update.params["3.weight"], before["3.weight"])


def test_evaluation_leaves_parameters_statistics_and_every_mode(silos):
    model = batchnorm_model().train()
    model[1].eval()  # frozen statistics, as in fine-tuning
    before = copy.deepcopy(model.state_dict())
    evaluate(model, silos[0].test)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_mode_is_restored_after_an_error(silos):
    model = batchnorm_model().train()
    with pytest.raises(RuntimeError):
        evaluate(model, (torch.zeros(2, 5, 9, 9), torch.zeros(2).long()))
    assert model.training


def test_the_same_loss_function_serves_training_and_evaluation(silos):
    def loss(logits, y):
        return nn.functional.cross_entropy(logits, y, label_smoothing=0.1)

    model = linear_model()
    train(model, silos[0], loss_fn=loss)
    x, y = silos[0].test
    got = evaluate(model, (x, y), loss_fn=loss)["loss"]
    assert got == pytest.approx(loss(model(x), y).item(), rel=1e-5)


def test_a_class_that_is_alone_has_no_auroc_and_no_specificity():
    got = classification_metrics(
        torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), torch.zeros(2).long()
    )
    assert got["sensitivity_0"] == got["balanced_accuracy"] == got["accuracy"] == 0.5
    assert got["specificity_1"] == 0.5  # one of two negatives of class 1 is called so
    undefined = ("auroc", "sensitivity_1", "specificity_0")
    assert all(np.isnan(got[name]) for name in undefined)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu_and_sends_from_the_cpu(silos):
    torch.manual_seed(0)
    model = batchnorm_model()
    on_cpu = train(copy.deepcopy(model), silos[0])
    on_gpu = train(model.to("cuda"), silos[0])
    for name, value in on_cpu.params.items():
        assert on_gpu.params[name].device.type == "cpu"
        torch.testing.assert_close(on_gpu.params[name], value, rtol=1e-3, atol=1e-4)
    assert evaluate(model, silos[0].test)["loss"] > 0


class Crossings(TorchDispatchMode):
    """Let the device "meta" stand for a GPU, and count what makes a GPU wait: values
    that the host reads, and copies between host and device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [a for a in tree_leaves((args, kwargs)) if torch.is_tensor(a)]
        places = {t.device.type for t in tensors if t.dim()}
        there = tensors[0].device.type if tensors else "cpu"
        if name == "_local_scalar_dense" and there == "meta":
            self.count += 1
            return 1.0
        if (
            name == "_to_copy"
            and torch.device(kwargs.get("device") or there).type != there
        ):
            self.count += 1
            if there == "meta":  # it has no values to copy
                return torch.ones(args[0].shape, dtype=args[0].dtype)
        elif len(places) > 1:  # a copy inside the operation
            self.count += 1
        return func(*args, **kwargs)


def crossings(silo, *, adjust=None, **options):
    model = batchnorm_model()
    variates = ControlVariates(model.state_dict() | zero_variates(model))
    model.to("meta")
    if adjust:
        adjust = {"fedprox": ProximalTerm(model, 0.1), "scaffold": variates.correct}[
            adjust
        ]
    with Crossings() as found:
        train(model, silo, adjust_gradients=adjust, **options)
    return found.count


@pytest.mark.parametrize("how", [{}, {"adjust": "fedprox"}, {"adjust": "scaffold"}])
def test_a_gpu_never_waits_in_a_step(silos, how):
    few, many = (  # 2 steps and 20
        crossings(silos[0], batch_size=size, **how) for size in (20, 2)
    )
    assert few == many > len(batchnorm_model().state_dict())
    two = crossings(silos[0], batch_size=2, epochs=2, **how)
    assert two == many + 1  # an epoch's order of examples


def test_a_wait_in_each_step_would_be_seen(silos):
    def loss_fn(logits, y):
        loss = nn.functional.cross_entropy(logits, y)
        return loss * bool(loss.isfinite())

    few, many = (
        crossings(silos[0], batch_size=size, loss_fn=loss_fn) for size in (20, 2)
    )
    assert many == few + 18


def test_batches_are_full_and_show_each_example_at_most_once_per_epoch():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(x[:, 0].int().tolist())
            return super().forward(x)

    data = torch.arange(10.0)[:, None], torch.zeros(10).long()
    silo = SimpleNamespace(name="a", train=data)
    train(Spy(1, 2), silo, batch_size=4, epochs=3, lr=1e-3)
    assert [len(batch) for batch in seen] == [4] * 6  # 10 // 4 = 2 per epoch
    epochs = [seen[k] + seen[k + 1] for k in (0, 2, 4)]
    assert all(len(set(rows)) == 8 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3  # shuffled again


class _Sequence(nn.Module):
    """The rows of an image as a sequence, through a layer that has its own dropout."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(16, 2)

    def forward(self, x):
        out = self.layer(x[:, 0])
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


DRAWING = {
    "alpha": lambda: nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.5)),
    "depth": lambda: nn.Sequential(nn.Flatten(), StochasticDepth(0.5, "row")),
    "rrelu": lambda: nn.Sequential(nn.Flatten(), nn.RReLU()),
    "lstm": lambda: nn.LSTM(16, 16, 2, dropout=0.5, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.5, batch_first=True),
}


@pytest.mark.parametrize("kind", DRAWING)
def test_all_layers_that_draw_take_their_numbers_from_rng(silos, kind):
    model = DRAWING[kind]()
    if kind in ("lstm", "attention"):
        model = _Sequence(model)
    else:
        model.append(nn.Linear(256, 2))
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed())  # whatever ran before
        before = torch.get_rng_state()
        options = dict(batch_size=40, rng=rng(seed))  # the order does not matter
        states.append(train(copy.deepcopy(model), silos[0], **options).params)
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (torch.cat([v.flatten() for v in s.values()]) for s in states)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-5)


def test_reestimated_statistics_are_the_mean_over_batches():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.Dropout(0.5))
    model.train()
    x = torch.tensor([[0.0, 1], [2, 1], [4, 1], [8, 1], [100, 1]])  # the last is alone
    reestimate_statistics(model, x, batch_size=2)
    # means 1 and 6; unbiased variances 2 and 8; the batch of one has no variance
    assert model[0].running_mean.tolist() == [3.5, 1]
    assert model[0].running_var.tolist() == [5, 0]
    assert model[0].momentum == 0.3 and model[0].training and model[1].training


def test_reestimating_changes_buffers_of_batchnorm_only(silos):
    model = batchnorm_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_statistics(model, silos[0].train[0])
    changed = {
        n for n, v in model.state_dict().items() if not torch.equal(v, before[n])
    }
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not model.training
    with pytest.raises(ValueError, match="at least 2 inputs"):
        reestimate_statistics(model, silos[0].train[0][:1])


def test_norm_entries_finds_every_kind():
    model = torch.nn.Sequential(
        torch.nn.GroupNorm(1, 4),
        torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)),
        torch.nn.InstanceNorm1d(4, affine=True),
    )
    names = {"0.weight", "0.bias", "1.0.weight", "1.0.bias", "2.weight", "2.bias"}
    assert set(norm_entries(model)) == names
    assert norm_entries(torch.nn.Linear(2, 2)) == []


# ---- a Dataset instead of tensors


class Pairs(Dataset):
    """Examples one by one. noisy: with draws of torch, numpy and Python."""

    def __init__(self, x, y, noisy=False, broken=None):
        self.x, self.y, self.noisy, self.broken = x, y, noisy, broken

    def __len__(self):
        return len(self.y)

    def __getitem__(self, row):
        if row == self.broken:
            raise OSError("/archive/17.png is truncated")
        x = self.x[row]
        if self.noisy:
            x = x + torch.rand(()) * np.random.rand() * random.random()  # noqa: NPY002
        return x, int(self.y[row])


def of_dataset(silo, **how):
    return SimpleNamespace(name=silo.name, train=Pairs(*silo.train, **how))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_dataset_trains_to_the_bits_of_its_tensors(silos):
    torch.manual_seed(0)
    model, how = batchnorm_model(), dict(epochs=2.5)
    tensors = train(copy.deepcopy(model), silos[0], **how)
    lazy = train(copy.deepcopy(model), of_dataset(silos[0]), **how)
    assert same(tensors.params, lazy.params) and tensors.metrics == lazy.metrics
    assert lazy.num_examples == 40
    both = (silos[0].test, Pairs(*silos[0].test))
    assert evaluate(model, both[0], batch_size=7) == evaluate(model, both[1])


def test_augmentation_draws_from_the_silo_whoever_loads(silos):
    torch.manual_seed(0)
    model, before = linear_model(), torch.get_rng_state()
    states = [
        train(
            copy.deepcopy(model), of_dataset(silos[0], noisy=True), epochs=2,
            step=Step(workers=workers), rng=rng(seed),
        ).params
        for seed, workers in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]  # fmt: skip
    assert same(states[0], states[1]) and same(states[0], states[2])
    assert not same(states[0], states[3])
    assert torch.equal(torch.get_rng_state(), before)  # nor is it a new draw each time
    plain = train(copy.deepcopy(model), of_dataset(silos[0]), epochs=2).params
    assert not same(states[0], plain)


def test_two_silos_in_threads_augment_as_if_each_were_alone(silos):
    torch.manual_seed(0)
    model, found = linear_model(), {}

    def work(silo):
        mine = of_dataset(silo, noisy=True)
        found[silo.name] = train(copy.deepcopy(model), mine, epochs=5).params

    threads = [threading.Thread(target=work, args=(silo,)) for silo in silos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for silo in silos:
        in_threads = found.pop(silo.name)
        work(silo)
        assert same(in_threads, found[silo.name])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_fails_names_silo_and_file(silos, workers):
    broken = of_dataset(silos[0], broken=17)
    with pytest.raises(RuntimeError, match="silo 'a', examples .*17.png is truncated"):
        train(linear_model(), broken, step=Step(workers=workers))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_pixel_that_is_no_number_names_silo_and_example(silos, value, workers):
    x, y = silos[0].train
    x = x.clone()
    x[17, 0, 2, 3] = value
    silo = SimpleNamespace(name="a", train=Pairs(x, y))
    message = r"silo 'a', .*example\(s\) \[17\]; correct or leave them out"
    with pytest.raises(RuntimeError, match=message):
        train(linear_model(), silo, step=Step(workers=workers))
    with pytest.raises(RuntimeError, match=r"the test set, .*example\(s\) \[17\]"):
        evaluate(linear_model(), silo.train)
    x[17, 0, 2, 3] = 3e38  # their sum is infinite, but they are numbers
    x[17, 0, 2, 4] = 3e38
    assert Pairs(x, y)[17][0].sum().isinf()
    training._check_pixels(x, list(range(len(x))))


def test_examples_that_do_not_fit_name_the_silo(silos):
    x, y = silos[0].train
    mixed = SimpleNamespace(name="a", train=Pairs([*x[:20], *x[20:, :, :8]], y))
    with pytest.raises(RuntimeError, match="'a', examples .*give all images one size"):
        train(linear_model(), mixed)
    colour = [*x[:20], *x[20:].expand(-1, 3, -1, -1)]
    mixed = SimpleNamespace(name="a", train=Pairs(colour, y))
    with pytest.raises(RuntimeError, match="'a', examples .*number of channels"):
        train(linear_model(), mixed)
    with pytest.raises(RuntimeError, match="silo 'a': IndexError.*labels must be 0 to"):
        train(linear_model(), SimpleNamespace(name="a", train=(x, y + 2)))
    outline = SimpleNamespace(name="a", train=(x, torch.zeros(40, 1, 9, 9)))
    loss = nn.functional.binary_cross_entropy_with_logits
    with pytest.raises(RuntimeError, match=r"'a': .*\[8, 1, 9.*give masks a channel"):
        train(nn.Conv2d(1, 1, 3, padding=1), outline, loss_fn=loss)
    with pytest.raises(ValueError, match="silo 'a' has 0 inputs"):
        train(linear_model(), SimpleNamespace(name="a", train=Pairs(x[:0], y[:0])))


# ---- other steps than plain SGD


def test_any_optimizer_equals_a_hand_written_loop(silos):
    def adamw(model, lr):
        return torch.optim.AdamW([{"params": model[1].weight, "lr": 10 * lr},
                                  {"params": model[1].bias}], lr=lr)  # fmt: skip

    torch.manual_seed(0)
    mine = linear_model()
    theirs = copy.deepcopy(mine)
    train(mine, silos[0], epochs=2, lr=1e-3, step=Step(adamw, max_norm=0.05))
    optimizer, (x, y), draws = adamw(theirs, 1e-3), silos[0].train, rng()
    for _ in range(2):
        for rows in torch.randperm(40, generator=draws).split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
            optimizer.step()
    assert same(mine.state_dict(), theirs.state_dict())


def test_accumulated_batches_are_one_large_batch(silos):
    torch.manual_seed(0)
    model = linear_model()
    large = train(copy.deepcopy(model), silos[0], batch_size=20, epochs=2)
    small = train(copy.deepcopy(model), silos[0], batch_size=10, epochs=2,
                  step=Step(accumulate=2))  # fmt: skip
    assert large.metrics["steps"] == small.metrics["steps"] == 4
    for name, value in large.params.items():
        torch.testing.assert_close(small.params[name], value)
    # 5 batches: steps of 2, 2 and 1, the last one of its own mean gradient
    rest = train(model, silos[0], batch_size=8, step=Step(accumulate=2))
    assert rest.metrics["steps"] == 3


def test_a_small_norm_makes_a_small_step(silos):
    model = linear_model()
    start = copy.deepcopy(model.state_dict())
    step = Step(PlainSGD(0, 0), max_norm=0.01)
    train(model, silos[0], batch_size=40, lr=1.0, step=step)
    moved = [(v - start[k]).flatten() for k, v in model.state_dict().items()]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("step", "tolerance"),
    [(Step(channels_last=True), 1e-5), (Step(autocast=torch.bfloat16), 0.05)],
)
def test_other_layouts_and_precisions_stay_near(silos, step, tolerance):
    torch.manual_seed(0)
    model = batchnorm_model()
    plain = train(copy.deepcopy(model), silos[0]).params
    other = train(copy.deepcopy(model), silos[0], step=step).params
    for name, value in plain.items():
        assert other[name].dtype == value.dtype and other[name].is_contiguous()
        torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance)
    assert not same(plain, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(accumulate=0), "accumulate must be >= 1"),
        (dict(workers=-1), "workers >= 0, got 1 and -1"),
        (dict(max_norm=0.0), "max_norm must be > 0 or None, got 0.0"),
        (dict(autocast=torch.float16), "bfloat16 or None, got torch.float16"),
    ],
)
def test_impossible_steps_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Step(**change)


# ---- what is frozen, other tasks


def test_frozen_entries_are_what_training_leaves_alone(silos):
    model = batchnorm_model()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    after = train(model, silos[0], epochs=2).params
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert frozen_entries(model) == unchanged
    assert unchanged == [
        "0.weight", "0.bias", "1.weight", "1.bias",
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    ]  # fmt: skip
    assert frozen_entries(batchnorm_model()) == []


def test_loss_and_metrics_are_arguments(silos):
    def metrics(outputs, y):
        return {"error": (outputs[:, 0] - y).abs().mean().item()}

    def loss(outputs, y):
        return nn.functional.mse_loss(outputs[:, 0], y.float())

    client = sgd_client(linear_model, epochs=1, lr=0.01, batch_size=8,
                        loss_fn=loss, metrics=metrics)  # fmt: skip
    params, (x, y) = linear_model().state_dict(), silos[0].test
    model = linear_model()
    model.load_state_dict(params)
    found = client.evaluate(params, silos[0])
    expected = (model(x)[:, 0] - y).abs().mean().item()
    assert found.keys() == {"loss", "error"}
    assert found["error"] == pytest.approx(expected)
    how = partial(client.update, round_index=0, rng=rng())
    assert how(params, silos[0]).metrics["train_loss"] > 0
