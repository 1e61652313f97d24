"""Adapters by hand against PEFT, diffusers and the merged weights."""
import copy

import peft
import pytest
import torch
from torch import nn

from data import InputError
from lora import TARGETS, inject, lora_disabled, lora_layers, save_lora
from model import load_unet


@pytest.fixture
def unet(plain):
    return load_unet(plain)


def call(unet, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 24, generator=g)
    return unet(x, torch.tensor([3, 700]), text).sample


def randomise(unet):
    g = torch.Generator().manual_seed(1)
    for m in lora_layers(unet).values():
        m.lora_A.weight.data.normal_(std=0.1, generator=g)
        m.lora_B.weight.data.normal_(std=0.1, generator=g)


@pytest.mark.parametrize("targets", TARGETS)
def test_equals_peft_and_diffusers_and_off_is_the_base(unet, targets, tmp_path):
    base, other, reference = copy.deepcopy(unet), copy.deepcopy(unet), call(unet)
    memory = {name: w.data_ptr() for name, w in unet.named_parameters()}
    inject(unet, targets, rank=3, alpha=5)
    torch.testing.assert_close(call(unet), reference, rtol=1e-4, atol=1e-5)             # B = 0
    parameters = dict(unet.named_parameters())              # the base's stay, nothing is held twice
    assert all(parameters[name].data_ptr() == place for name, place in memory.items())

    randomise(unet)
    on = call(unet)
    assert (on - reference).abs().max() > 1e-3
    with lora_disabled(unet):
        with pytest.raises(ZeroDivisionError), lora_disabled(unet):
            1 / 0
        assert torch.equal(call(unet), reference)
    assert torch.equal(call(unet), on)

    save_lora(unet, tmp_path, 3, 5)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(call(theirs), on, rtol=1e-4, atol=1e-5)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(lora_layers(unet))
    other.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors",
                            prefix="base_model.model")
    torch.testing.assert_close(call(other), on, rtol=1e-4, atol=1e-5)


def test_target_counts(unet):
    attentions = 2 * sum(type(m).__name__ == "BasicTransformerBlock" for m in unet.modules())
    kinds = [type(m) for m in unet.modules()]
    both = kinds.count(nn.Linear) + kinds.count(nn.Conv2d)
    for targets, count in (("qv", 2 * attentions), ("attention", 4 * attentions), ("all", both)):
        inject(copied := copy.deepcopy(unet), targets, 2, 2)
        assert len(lora_layers(copied)) == count, targets
    with pytest.raises(InputError, match="qv"):
        inject(nn.Sequential(nn.Linear(2, 2)), "qv")


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1),
                                   nn.Conv2d(6, 5, 1, bias=False)])
def test_equals_the_merged_layer(layer):
    network = nn.Sequential(copy.deepcopy(layer))
    A, _ = inject(network, "all", rank=64, alpha=6)         # at first uniform, up to 1 / sqrt(n)
    assert A.abs().max().item() == pytest.approx(A[0].numel() ** -0.5, rel=0.05)
    network = nn.Sequential(copy.deepcopy(layer))
    inject(network, "all", rank=2, alpha=6)
    randomise(network)
    a, b = network[0].lora_A.weight, network[0].lora_B.weight
    delta = 3 * (b.flatten(1) @ a.flatten(1)).view_as(layer.weight)
    x = torch.randn(4, 6) if isinstance(layer, nn.Linear) else torch.randn(4, 6, 9, 8)
    expected = torch.func.functional_call(layer, {"weight": layer.weight + delta}, (x,))
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_only_adapters_train(unet):
    parameters = inject(unet.requires_grad_(True), "all", 2, 2)
    randomise(unet)
    call(unet).square().mean().backward()
    trainable = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert set(trainable) == {name for name, _ in unet.named_parameters() if "lora_" in name}
    assert {id(p) for p in parameters} == {id(p) for p in trainable.values()}
    assert len(parameters) == 2 * len(lora_layers(unet))
    assert all(p.grad is not None for p in parameters)
