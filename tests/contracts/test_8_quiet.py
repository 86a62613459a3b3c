"""Contract 8: buffers move once a step, dropout masks are shared, the random state ends where one forward leaves it."""

import pytest
import torch
from torch import nn

from tests.contracts.cases import MODELS, Case, Normalizer, assert_same, build, differs, each_method, each_whole_method

with_buffers = pytest.mark.parametrize("model_name", ["batchnorm", "spectral-norm", "custom-norm"])


def buffers(case: Case) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in case.model.named_buffers()}


@each_method
@with_buffers
@pytest.mark.parametrize("named", [False, True])
def test_buffers_are_those_of_the_first_probe(method, model_name, named):
    case = Case(method, model_name=model_name)
    if named:
        case.optimizer._model = case.model
    seen = []
    for _ in case.optimizer.probes():
        before = buffers(case)
        case.loss().backward()
        seen.append(buffers(case))
        assert differs(seen[-1], before)  # else this test shows nothing
    assert_same(buffers(case), seen[0])


@each_method
def test_batches_are_counted_once_a_step(method):
    case = Case(method, model_name="batchnorm").run(5)
    case.loop_step()
    assert case.model.get_buffer("1.num_batches_tracked") == 6


@each_method
@with_buffers
def test_buffers_stay_the_same_tensors(method, model_name):
    case = Case(method, model_name=model_name)
    if model_name == "custom-norm":  # its own forward replaces one: only later probes must not
        return
    before = dict(case.model.named_buffers())
    case.run(3)
    assert all(case.model.get_buffer(name) is buffer for name, buffer in before.items())


@each_whole_method
def test_all_probes_see_the_same_dropout_mask(method):
    case = Case(method, model_name="dropout")
    masks = []
    layer = case.model.get_submodule("1")
    layer.register_forward_hook(lambda _m, args, out: masks.append((out != 0) | (args[0] == 0)))
    for _ in range(2):
        first = len(masks)
        case.step()
        assert all(torch.equal(mask, masks[first]) for mask in masks[first:])
    assert not torch.equal(masks[0], masks[-1])  # and another one at the next step


@each_whole_method
def test_the_random_state_ends_where_one_forward_leaves_it(method):
    ours, control = Case(method, model_name="dropout"), Case("base", model_name="dropout")
    torch.manual_seed(5)
    ours.step()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    control.loss()
    assert torch.equal(state, torch.get_rng_state())


@each_method
def test_a_later_probe_that_draws_more_leaves_no_trace(method):
    case = Case(method)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for number, _ in enumerate(case.optimizer.probes()):
        torch.rand(7 * number)  # nothing in the first probe
        case.loss().backward()
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_noise_has_its_own_generator(method):
    case = Case(method)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    case.run(2)
    assert torch.equal(torch.get_rng_state(), state)


@each_method
def test_hooks_live_only_inside_probes(method):
    hooks = nn.modules.module._global_forward_pre_hooks
    for model_name, later in (("batchnorm", 1), ("plain", 0)):  # without buffers nothing can go wrong later
        case, inside = Case(method, model_name=model_name), []
        for _ in case.optimizer.probes():
            inside.append(len(hooks))
            case.loss().backward()
        assert len(hooks) == 0
        assert inside == [1] + [later] * (len(inside) - 1)


@each_whole_method
def test_a_module_called_in_parts_is_found(method):
    case = Case(method, model_name="batchnorm")
    first, *rest = case.model.children()

    def closure():
        case.optimizer.zero_grad()
        x = first(case.x)
        for layer in rest:
            x = layer(x)
        loss = nn.functional.cross_entropy(x, case.y)
        loss.backward()
        return loss

    for _ in range(3):
        case.optimizer.step(closure)
    assert case.model.get_buffer("1.num_batches_tracked") == 3


def _put(model, how):
    new = nn.BatchNorm1d(model[1].num_features, affine=False)
    if how == "assigned":
        model[1] = new
    elif how == "behind its back":
        model._modules["1"] = new
    else:
        model[0].add_module("inner", new)
        model[0].forward = lambda input: new(nn.Linear.forward(model[0], input))
    return new


@pytest.mark.parametrize("method", ["sam", "nso"])
@pytest.mark.parametrize("how", ["assigned", "behind its back", "added to a part"])
def test_a_part_that_is_replaced_between_steps_is_found(method, how):
    case = Case(method, model_name="batchnorm").run(3)
    new = _put(case.model, how)
    case.run(2)
    assert new.num_batches_tracked == 2


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_buffer_that_a_part_gets_between_steps_is_found(method):
    case = Case(method, model_name="plain").run(3)
    part = case.model.get_submodule("0")
    part.register_buffer("calls", torch.zeros(()))
    part.register_forward_hook(lambda part, _args, _output: part.get_buffer("calls").add_(1) and None)
    case.run(2)
    assert part.get_buffer("calls") == 2


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_modules_that_their_parent_does_not_list_are_found(method):
    case = Case(method, model_name="plain")
    part: nn.Linear = case.model.get_submodule("0")  # type: ignore[assignment]
    hidden = [nn.BatchNorm1d(part.out_features, affine=False) for _ in range(2)]
    part.forward = lambda input: hidden[case.optimizer.num_steps % 2](nn.Linear.forward(part, input))
    case.run(4)
    assert [norm.get_buffer("num_batches_tracked") for norm in hidden] == [2, 2]


class Late(nn.Linear):
    """It gets its buffer in its first forward."""

    def forward(self, input):
        if "calls" not in self._buffers:
            self.register_buffer("calls", torch.zeros(()))
        self.get_buffer("calls").add_(1)
        return super().forward(input)


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_buffer_that_is_made_in_the_first_forward_is_found(method):
    case = Case(method, model_name="plain")
    part = case.model.get_submodule("0")
    part.__class__ = Late
    case.run(3)
    assert part.get_buffer("calls") == 3


@pytest.mark.parametrize("method", ["sam", "nso"])
@pytest.mark.parametrize("how", ["by a hook", "by a part", "after an exception"])
def test_what_a_known_model_calls_later_is_found(method, how):
    case = Case(method, model_name="plain").run(3)
    part: nn.Linear = case.model.get_submodule("0")  # type: ignore[assignment]
    hidden = nn.BatchNorm1d(part.out_features, affine=False)
    if how == "by a hook":
        part.register_forward_hook(lambda _part, _args, output: hidden(output))
    elif how == "by a part":
        part.forward = lambda input: hidden(nn.Linear.forward(part, input))
    else:
        part.register_forward_hook(_raises)

    def closure():
        case.optimizer.zero_grad()
        try:
            outputs = case.model(case.x)
        except RuntimeError:
            outputs = case.model.get_submodule("2")(hidden(nn.Linear.forward(part, case.x)))
        loss = nn.functional.cross_entropy(outputs, case.y)
        loss.backward()
        return loss

    for _ in range(2):
        case.optimizer.step(closure)
    assert hidden.num_batches_tracked == 2


def _raises(*_):
    raise RuntimeError("no")


class Positions(nn.Module):
    """An expanded buffer, one made in inference mode, and a cache that is filled on the first forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("offset", torch.arange(6.0).expand(64, -1))
        with torch.inference_mode():
            self.register_buffer("frozen", torch.ones(6))
        self.register_buffer("calls", None)

    def forward(self, x):
        self.calls = torch.ones(()) if self.calls is None else self.calls + 1
        return self.layer(x + self.get_buffer("offset") + self.get_buffer("frozen").clone())


@each_whole_method
def test_buffers_that_cannot_be_written_and_buffers_that_appear(method, monkeypatch):
    monkeypatch.setitem(MODELS, "positions", Positions)
    case = Case(method, model_name="positions").run(3)
    assert case.model.calls == 3


@each_whole_method
def test_a_functional_call_leaves_the_module_its_own_buffers(method):
    case = Case(method, model_name="batchnorm")
    own = {k: v for k, v in case.model.named_buffers() if v.is_floating_point()}
    case.run(1)
    foreign = {k: v.clone() + 7 for k, v in case.model.named_buffers()}
    expected = {k: v.clone() for k, v in case.model.named_buffers()}

    def closure():
        case.optimizer.zero_grad()
        state = {**dict(case.model.named_parameters()), **foreign}
        loss = nn.functional.cross_entropy(torch.func.functional_call(case.model, state, case.x), case.y)
        loss.backward()
        return loss

    case.optimizer.step(closure)
    for name, buffer in case.model.named_buffers():
        assert torch.equal(buffer, expected[name])
        if name in own:
            assert buffer is own[name]


@each_whole_method
def test_graphs_that_the_caller_holds_stay_valid(method):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    critic = nn.Linear(4, 1)
    optimizer = build(method, torch.optim.SGD(critic.parameters(), lr=0.1))
    fake = generator(torch.randn(8, 2))

    def closure():
        optimizer.zero_grad()
        loss = critic(fake.detach()).mean() - critic(generator(torch.randn(8, 2)).detach()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    critic(fake).mean().backward()
    assert generator[0].weight.grad is not None


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_modules_made_in_every_step_are_forgotten(method):
    case = Case(method, model_name="batchnorm")

    def closure():
        case.optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(case.model(case.x), case.y)  # it has a buffer, `weight`
        loss.backward()
        return loss

    for _ in range(5):
        case.optimizer.step(closure)
    assert len(case.optimizer._quiet._owners) <= 2


@each_method
@pytest.mark.parametrize("named", [False, True])
def test_a_first_step_that_is_skipped_leaves_buffers_that_forward_replaces(method, named):
    case = Case(method, model_name="custom-norm")
    if named:
        case.optimizer._model = case.model
    before = buffers(case)
    case.x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped step 0"):
        case.step()
    assert_same(buffers(case), before)
    case.x[0] = 0.0
    case.run(2)
    assert case.optimizer.num_skipped == 1


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_module_that_is_first_met_in_a_skipped_step_is_as_before(method):
    case = Case(method, model_name="plain").run(2)
    new = Normalizer(8)
    hidden = [new]
    case.model.get_submodule("1").register_forward_hook(lambda _part, _args, output: hidden[0](output))
    before = {k: v.clone() for k, v in new.state_dict().items()}
    case.x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped"):
        case.step()
    assert_same(new.state_dict(), before)


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_the_buffers_of_a_functional_call_are_not_taken_for_the_modules_own(method):
    case = Case(method, model_name="custom-norm")
    own = dict(case.model.named_buffers())
    others = {k: v.clone() + 1 for k, v in own.items()}

    def closure():
        case.optimizer.zero_grad()
        out = torch.func.functional_call(case.model, {**dict(case.model.named_parameters()), **others}, (case.x,))
        loss = nn.functional.cross_entropy(out, case.y)
        loss.backward()
        return loss

    values = {k: v.clone() for k, v in own.items()}
    case.x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped"):
        case.optimizer.step(closure)
    assert all(case.model.get_buffer(name) is buffer for name, buffer in own.items())
    assert_same(dict(case.model.named_buffers()), values)


class Resized(nn.Module):
    """As observers of quantisation do: its buffer gets its size in the first forward."""

    largest: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.tensor([]))

    def forward(self, x):
        if self.largest.numel() == 0:
            self.largest.resize_(x.shape[1]).fill_(0.0)
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().amax(0)))
        return x


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_buffer_that_is_resized_in_a_skipped_step_has_its_size_again(method):
    case = Case(method, model_name="plain")
    assert isinstance(case.model, nn.Sequential)
    part = Resized()
    case.model.insert(1, part)
    case.x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="skipped"):
        case.step()
    assert part.largest.numel() == 0
    assert case.optimizer.num_steps == 1
    case.x[0] = 0.0
    case.run(1)
    assert part.largest.numel() == 8
    assert case.optimizer.num_skipped == 1


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("named", [False, True])
def test_sparse_buffers(layout, named):
    case = Case("sam", model_name="plain")
    sparse = torch.eye(64) * 0.5
    adjacency = getattr(sparse, f"to_sparse{'' if layout == 'coo' else '_' + layout}")()
    case.model.register_buffer("adjacency", adjacency)
    case.x, plain = (adjacency @ case.x), Case("sam", model_name="plain")
    plain.x = case.x
    if named:
        case.optimizer._model = case.model
    case.run(2)
    plain.run(2)
    for p, q in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(adjacency.to_dense(), torch.eye(64) * 0.5)


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_buffer_in_the_memory_of_a_parameter_does_not_undo_the_way_home(method):
    case = Case(method, model_name="plain").run(1)
    case.model.register_buffer("tied", case.model.get_parameter("0.weight").detach())
    case.run(1)
    before = case.snapshot()
    probes = case.optimizer.probes()
    next(probes)
    case.loss().backward()
    next(probes)
    probes.close()
    case.optimizer.zero_grad()
    assert_same(case.snapshot(), before)


def test_an_overflow_leaves_buffers_without_the_guard_too():
    case = Case("sam", model_name="batchnorm", options={"guard": False})
    before = buffers(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in case.optimizer.probes(scaler):
        scaler.scale(1e3 * case.loss()).backward()
    case.optimizer.step()
    assert case.optimizer.num_skipped == 1
    assert_same(buffers(case), before)
