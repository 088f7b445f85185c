import torch

from quantizers import identity
from quantizers.statistics import empty_statistics


def test_every_group_gets_ones(device):
    statistics = {"attention": empty_statistics(6, device), "down": empty_statistics(4, device)}
    decision = identity.decide(statistics, {"q_proj": torch.ones(2, 6, device=device)})
    assert list(decision) == ["attention", "down"]
    for name, columns in (("attention", 6), ("down", 4)):
        scale = decision[name]
        assert scale.dtype == torch.float32
        assert scale.device == statistics[name].absmax.device
        assert scale.tolist() == [1.0] * columns


def test_apply_returns_the_same_tensors_in_a_new_dict():
    weights = {"q_proj": torch.ones(2, 6), "k_proj": torch.zeros(2, 6)}
    applied = identity.apply(weights, {"attention": torch.ones(6)})
    assert applied is not weights
    assert list(applied) == list(weights)
    assert all(applied[name] is weights[name] for name in weights)
