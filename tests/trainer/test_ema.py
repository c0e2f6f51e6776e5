"""The averaged weights follow their recurrence in float32, whatever the model's dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.trainer.test_transformer import SMALL, randomised
from trainer.loop.ema import EMA
from trainer.run.averages import LEAST_STEPS, MOST, held_of_first


def test_follows_the_recurrence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    ema = EMA(model, 0.9)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        for name, value in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_a_constant_is_approached_as_a_power_of_the_decay() -> None:
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9999)
    nn.init.ones_(model.weight)
    for _ in range(1000):
        ema.update(model)
    torch.testing.assert_close(ema.state_dict()["weight"], torch.full((4, 4), 1 - 0.9999**1000), rtol=1e-4, atol=0)


def test_a_bfloat16_model_is_averaged_in_float32() -> None:
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.9999)
    with torch.no_grad():
        model.weight.fill_(2)
    for _ in range(10):
        ema.update(model)
    averaged = ema.state_dict()["weight"]
    assert averaged.dtype == torch.float32
    # bfloat16 would round each of these increments of 1e-4 away.
    torch.testing.assert_close(averaged, torch.full((8, 8), 2 - 0.9999**10), rtol=1e-6, atol=0)


def test_buffers_are_copied_not_averaged() -> None:
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.99)
    model(torch.randn(16, 3) * 5 + 2)
    ema.update(model)
    state = ema.state_dict()
    for name, buffer in model.named_buffers():
        assert torch.equal(state[name], buffer), name
        assert state[name].dtype == buffer.dtype, name


def test_the_average_is_a_copy_that_leaves_the_model_alone() -> None:
    model = randomised(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    now = {name: value.clone() for name, value in model.state_dict().items()}
    ema.update(model)
    assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())
    assert model.get_parameter("blocks.0.attn.qkv.weight").requires_grad
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not ema.model.training
    assert torch.equal(ema.state_dict()["pos_embed"], before["pos_embed"])


def test_the_state_has_the_model_s_names_and_loads_again() -> None:
    model = randomised(SMALL)
    ema = EMA(model, 0.9)
    assert list(ema.state_dict()) == list(model.state_dict())
    other = EMA(randomised(SMALL, seed=1), 0.9)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in other.state_dict().items())
    model.load_state_dict(ema.state_dict())
    short = dict(ema.state_dict())
    short.pop("pos_embed")
    with pytest.raises(RuntimeError, match="pos_embed"):
        other.load_state_dict(short)


def test_decay_zero_follows_the_model_exactly() -> None:
    model = randomised(SMALL)
    ema = EMA(model, 0.0)
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(1.7)
    ema.update(model)
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in model.state_dict().items())


@given(decay=st.sampled_from([0.0, 0.9, 0.99, 0.999, 0.9995, 0.9999]), steps=st.integers(0, 100_000))
def test_what_an_average_holds_of_its_first_weights_is_said_where_it_is_much(decay: float, steps: int) -> None:
    said = held_of_first(decay, steps)
    assert bool(said) == (steps >= LEAST_STEPS and decay**steps > MOST)
    if said:
        better = float(said.rpartition("; ")[2].split()[0])
        assert better < decay
        assert not held_of_first(better, steps)
