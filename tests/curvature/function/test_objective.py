"""The loss as a function of parameters: weighting, batches of any kind, refusals; measuring changes nothing."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import flatmin
from flatmin.curvature import HessianOperator
from flatmin.vectors import Vector
from tests.curvature.nets import NETS, criterion, dense_hessian, make


def flat(v: Vector) -> torch.Tensor:
    return torch.cat([t.flatten() for t in v.present])


@pytest.mark.parametrize("name", list(NETS))
def test_loss_gradient_and_product_against_the_dense_hessian(name):
    model, x, y = make(name)
    # Batches of 16 and 8: a mean of batch means would be wrong.
    objective = flatmin.Objective(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    truth = criterion(model(x), y)
    assert objective.loss() == pytest.approx(truth.item(), rel=1e-12)
    grads = torch.autograd.grad(truth, list(model.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(flat(objective.gradient()), torch.cat([g.flatten() for g in grads]))
    hessian = dense_hessian(model, lambda: criterion(model(x), y))
    v = Vector(torch.randn_like(p) for p in objective.params)
    torch.testing.assert_close(flat(HessianOperator(objective).product(v)), hessian @ flat(v), rtol=1e-9, atol=1e-11)


class Tagging(nn.Module):
    """A classifier on dict batches that returns its own loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x, y=None):
        logits = self.layer(x)
        return logits if y is None else nn.functional.cross_entropy(logits, y)


def test_dict_batches_own_losses_sums_and_pairs_agree():
    torch.manual_seed(0)
    model, x, y = Tagging(), torch.randn(10, 4, dtype=torch.float64), torch.randint(3, (10,))
    rows = [slice(0, 6), slice(6, 10)]
    pairs = [(x[r], y[r]) for r in rows]
    dicts = [{"inputs": x[r], "labels": y[r]} for r in rows]
    expected = flatmin.Objective(model, criterion, pairs).loss()
    as_dict = flatmin.Objective(model, criterion, dicts, forward=lambda m, b: (m(b["inputs"]), b["labels"]))
    own = flatmin.Objective(model, None, dicts, forward=lambda m, b: (m(b["inputs"], b["labels"]), b["labels"]))
    summed = flatmin.Objective(model, nn.CrossEntropyLoss(reduction="sum"), pairs)
    for objective in (as_dict, own, summed):
        assert objective.loss() == pytest.approx(expected, rel=1e-12)
        assert objective.num_samples == 10


def test_chosen_parameters():
    model, x, y = make("relu")
    by_name = flatmin.Objective(model, criterion, [(x, y)], params=["0.weight", "4.bias"])
    by_rule = flatmin.Objective(model, criterion, [(x, y)], params=lambda name, p: name in ("0.weight", "4.bias"))
    assert by_name.names == by_rule.names == ("0.weight", "4.bias")
    full = dense_hessian(model, lambda: criterion(model(x), y))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    index, start = [], 0
    for n, size in sizes.items():
        index += range(start, start + size) if n in by_name.names else []
        start += size
    result = flatmin.top_eigenvalues(by_name, tol=1e-8)
    assert result.value == pytest.approx(float(torch.linalg.eigvalsh(full[index][:, index])[-1]), rel=1e-7)


@pytest.mark.parametrize("eval_mode", [True, False])
def test_measuring_changes_nothing(eval_mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    if eval_mode:
        model.append(nn.Dropout(0.3))
    model.train()
    model[1].eval()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    model(x).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [m.training for m in model.modules()]
    loader = DataLoader(TensorDataset(x, y), batch_size=12, shuffle=True)
    rng = torch.get_rng_state()
    flatmin.measure(model, criterion, loader, eval_mode=eval_mode, rtol=0.5)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_model_is_measured_on_what_it_wraps():
    model, x, y = make("relu")
    compiled = torch.compile(model)
    objective = flatmin.Objective(compiled, criterion, [(x, y)])  # type: ignore[arg-type]
    assert objective.model is model
    assert objective.names[0] == "0.weight"


def noisy_loader():
    class Augmented(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn_like(x), y

    _, x, y = make("relu")
    return DataLoader(Augmented(x, y), batch_size=8)


def with_dropout():
    model, x, y = make("relu")
    return nn.Sequential(model, nn.Dropout(0.5)), [(x, y)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m, x, y: (m, []), "no batches"),
        (lambda m, x, y: (m, DataLoader(TensorDataset(x[:0], y[:0]))), "no batches"),
        (lambda m, x, y: (m, iter([(x, y)])), "one-shot iterator"),
        (lambda m, x, y: (m, [x]), "not an .inputs, targets. pair"),
        (lambda m, x, y: (m.requires_grad_(False), [(x, y)]), "all are frozen"),
        (lambda m, x, y: (m, [(x * float("nan"), y)]), "the loss is nan on a batch of 24"),
        (lambda m, x, y: (m, noisy_loader()), "two passes over the data give different.*DataLoader may augment"),
    ],
)
def test_bad_data_is_refused_by_name(build, message):
    model, data = build(*make("relu"))
    with pytest.raises(ValueError, match=message):
        flatmin.trace(flatmin.Objective(model, criterion, data), max_products=2)


def test_dropout_in_training_mode_is_refused_by_name():
    model, data = with_dropout()
    with pytest.raises(ValueError, match=r"In training mode these modules are random: 1\. Use eval_mode=True"):
        flatmin.measure(model, criterion, data, eval_mode=False)
    flatmin.trace(flatmin.Objective(model, criterion, data), max_products=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": ["nope"]}, "no parameter is called 'nope'"),
        ({"params": lambda n, p: False}, "params selects none"),
        ({"criterion": nn.CrossEntropyLoss(reduction="none")}, r"must return a scalar tensor, got \(24,\)"),
    ],
)
def test_bad_arguments(options, message):
    model, x, y = make("relu")
    with pytest.raises(ValueError, match=message):
        flatmin.Objective(model, options.pop("criterion", criterion), [(x, y)], **options).loss()


def test_a_frozen_parameter_that_is_asked_for():
    model, x, y = make("relu")
    model.get_parameter("0.weight").requires_grad_(False)
    assert "0.weight" not in flatmin.Objective(model, criterion, [(x, y)]).names
    with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
        flatmin.Objective(model, criterion, [(x, y)], params=["0.weight"])


def test_a_gradient_is_taken_under_no_grad():
    model, x, y = make("relu")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    expected = objective.gradient()
    with torch.no_grad():
        torch.testing.assert_close(flat(objective.gradient()), flat(expected))


def test_a_tied_parameter_is_known_by_both_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    data = [(torch.randn(4, 3), torch.randint(3, (4,)))]
    for params in (["2.weight"], ["2.weight", "0.weight"], lambda name, _: name == "2.weight"):
        objective = flatmin.Objective(model, criterion, data, params=params)
        assert objective.names == ("2.weight",)
        assert objective.params == (model[0].weight,)
    assert flatmin.Objective(model, criterion, data).names == ("0.weight", "0.bias", "2.bias")


class NormAtZero(nn.Module):
    """Its loss is finite at zero, with a gradient; its second derivative there is not."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Parameter(torch.ones(3))
        self.norm = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return (self.fine**2).sum() + self.norm.norm() + x.sum() * 0


@pytest.mark.parametrize("work", [flatmin.trace, flatmin.top_eigenvalues])
def test_a_hessian_that_is_not_finite_is_refused_by_name(work):
    objective = flatmin.Objective(NormAtZero(), None, [torch.ones(4)], forward=lambda m, b: (m(b), b))
    with pytest.raises(ValueError, match=r"the Hessian is not finite: .* parameter 'norm'"):
        work(objective)


@pytest.mark.parametrize("own", ["generator", "sampler"])
def test_the_generator_of_a_loader_is_as_before(own):
    model, x, y = make("relu")
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(x, y)
    if own == "generator":
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    else:
        loader = DataLoader(data, batch_size=8, sampler=RandomSampler(data, generator=generator))
    before = generator.get_state()
    flatmin.trace(flatmin.Objective(model, criterion, loader), max_products=2)
    assert torch.equal(generator.get_state(), before)


def test_a_loader_of_an_iterable_data_set():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(2), torch.tensor([1.0])), (torch.zeros(2), torch.tensor([3.0]))])

    model = nn.Linear(2, 1)
    objective = flatmin.Objective(model, nn.MSELoss(), torch.utils.data.DataLoader(Stream(), batch_size=2))
    data = [(torch.stack([torch.ones(2), torch.zeros(2)]), torch.tensor([[1.0], [3.0]]))]
    assert objective.loss() == flatmin.Objective(model, nn.MSELoss(), data).loss()
    assert objective.num_samples == 2


def test_the_reduction_of_a_partial_function_is_seen():
    model, x, y = nn.Linear(2, 3), torch.randn(8, 2), torch.randint(3, (8,))
    total = functools.partial(nn.functional.cross_entropy, reduction="sum")
    mean = flatmin.Objective(model, nn.functional.cross_entropy, [(x, y)]).loss()
    assert flatmin.Objective(model, total, [(x, y)]).loss() == pytest.approx(mean, rel=1e-6)
    module = functools.partial(nn.CrossEntropyLoss(reduction="sum"))
    assert flatmin.Objective(model, module, [(x, y)]).loss() == pytest.approx(mean, rel=1e-6)
