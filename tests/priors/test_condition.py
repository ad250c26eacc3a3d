"""Conditions are stacked, cut and expanded with all that they carry."""

import pytest
import torch

from csd3d.priors import Condition


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_condition_is_batched_as_written():
    one, two = (
        Condition(noise(1, 3, 2), noise(1, 4, 2, 2)),
        Condition(noise(2, 3, 2, seed=7), noise(2, 4, 2, 2, seed=8)),
    )
    joined = Condition.cat([one, two])
    assert torch.equal(joined[1:].text, two.text)
    assert torch.equal(joined[torch.tensor([0])].image, one.image)
    assert torch.equal(one.expand(3)[2:].image, one.image)
    with pytest.raises(ValueError, match="1 of 2"):
        Condition.cat([one, Condition(two.text)])
    with pytest.raises(ValueError, match="image"):
        Condition(two.text, one.image)


def test_conditions_carry_their_extras():
    one = Condition(noise(1, 3, 2), pooled=noise(1, 5), time_ids=noise(1, 6))
    two = Condition(noise(2, 3, 2, seed=2), pooled=noise(2, 5, seed=3), time_ids=noise(2, 6, seed=4))
    joined = Condition.cat([one, two])
    assert torch.equal(joined[1:].pooled, two.pooled)
    assert torch.equal(joined[torch.tensor([0])].time_ids, one.time_ids)
    assert torch.equal(one.expand(4).pooled, one.pooled.repeat(4, 1))
    with pytest.raises(ValueError, match=r"1 of 2.*pooled"):
        Condition.cat([one, Condition(two.text, time_ids=two.time_ids)])
    with pytest.raises(ValueError, match="pooled"):
        Condition(one.text, pooled=two.pooled)
    with pytest.raises(ValueError, match="time_ids"):
        Condition(one.text, time_ids=noise(6))
