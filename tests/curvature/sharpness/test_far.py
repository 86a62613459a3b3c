"""What is said of errors at displaced weights."""

import pytest
import torch

import flatmin
from tests.curvature.nets import criterion, make

FAR = {
    "radius": [
        lambda objective, far: flatmin.noise_stability(objective, far, num_draws=2),
        lambda objective, far: flatmin.average_sharpness(objective, far, num_draws=2),
        lambda objective, far: flatmin.ascent_sharpness(objective, far),
    ],
    "span": [lambda objective, far: flatmin.loss_slice(objective, flatmin.random_direction(objective), span=far)],
}


@pytest.mark.parametrize(("what", "measure"), [(what, measure) for what in FAR for measure in FAR[what]])
def test_a_loss_that_is_not_finite_out_there_says_why(what, measure):
    model, x, y = make("relu")
    objective = flatmin.Objective(model, criterion, [(x, y)])
    with pytest.raises(ValueError, match=r"the loss is (nan|inf)") as caught:
        measure(objective, 1e120)
    assert f"smaller {what}" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("measure", [measure for some in FAR.values() for measure in some])
def test_an_error_of_the_users_model_out_there_is_left_as_it_is(measure):
    model, x, y = make("relu")
    home = next(model.parameters()).detach().clone()

    def forward(model, batch):
        if not torch.equal(next(model.parameters()), home):
            raise ValueError("the user's own")
        return model(batch[0]), batch[1]

    with pytest.raises(ValueError, match="the user's own") as caught:
        measure(flatmin.Objective(model, criterion, [(x, y)], forward=forward), 0.1)
    assert not hasattr(caught.value, "__notes__")
