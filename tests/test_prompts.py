"""Weights in prompts: how they are written, and that they scale attention's probabilities."""
import types

import pytest
import torch
from transformers import AutoTokenizer

from extras.cli import InputError
from extras.hub import TINY
from extras.prompts import parse_weights, reweighted, token_weights, unseen_words
from losses import guided
from model import Pipeline, denoiser, load_unet


@pytest.mark.parametrize("prompt, words, weights", [
    ("a dog", "a dog", [1] * 5),
    ("a (dog:2)", "a dog", [1, 1, 2, 2, 2]),
    ("((a:2) b:.5)", "a b", [1, 0.5, 0.5]),
    (r"a \(b\) 1:2", "a (b) 1:2", [1] * 9),
    (r"(a\:b: 3 )", "a:b", [3] * 3),
    (r"a\\b\c", r"a\b\c", [1] * 5),
    ("(a:0)(b:1.25)", "ab", [0, 1.25]),
    ("(:2)x", "x", [1])])
def test_weights_are_read(prompt, words, weights):
    assert parse_weights(prompt) == (words, weights)


@pytest.mark.parametrize("prompt, character", [
    ("(a:101)", 3), ("((a:11):11)", 8), ("a (dog", 3), ("a dog)", 6), ("(dog:x)", 5), ("(dog)", 5),
    ("(a:2) (b:-1)", 9), ("(a:inf)", 3), ("(a:)", 3), ("(a:1.2.3)", 3)])
def test_broken_weights_are_pointed_at(prompt, character):
    with pytest.raises(InputError, match=f"prompts.txt: .* at character {character},") as e:
        parse_weights(prompt, "prompts.txt")
    assert "(rain:1.5)" in str(e.value) and "\n" not in str(e.value)


def test_a_token_has_the_weight_of_its_first_letter(plain):
    pipe = Pipeline(plain)
    rows = token_weights(pipe, ["a dog", "a"], [[1, 1, 2, 3, 4], [0.5]])
    assert rows.shape == (2, 77)                            # start, a, dog, end, ...
    assert rows[0, :5].tolist() == [1, 1, 2, 1, 1] and rows[1, :4].tolist() == [1, 0.5, 1, 1]
    assert rows[:, 5:].eq(1).all()


@pytest.fixture
def layer_and_input(plain):
    unet = load_unet(plain).requires_grad_(False)
    layer = next(m for name, m in unet.named_modules() if name.endswith("attn2"))
    x, text = torch.randn(2, 6, layer.to_q.in_features), torch.randn(2, 77, 24)
    return unet, layer, x, text, torch.rand(2, 77) * 3


def attention(layer, x, text, w):
    """Cross-attention written out, its probabilities multiplied by w (B, tokens)."""
    q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
               for y in (layer.to_q(x), layer.to_k(text), layer.to_v(text)))
    p = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1) * w[:, None, None]
    return layer.to_out[0]((p @ v).transpose(1, 2).flatten(2))


def test_the_weight_of_a_token_is_that_of_its_probability(layer_and_input):
    unet, layer, x, text, w = layer_and_input
    expected = attention(layer, x, text, w)
    with reweighted(unet, w):
        assert torch.allclose(layer(x, text), expected, atol=1e-5)
    unweighted = layer(x, text)                             # it ends with the block
    assert torch.allclose(unweighted, attention(layer, x, text, torch.ones(2, 77)), atol=1e-5)
    assert not torch.allclose(unweighted, expected, atol=1e-3)
    with reweighted(unet, None):
        assert torch.equal(layer(x, text), unweighted)
    with pytest.raises(ZeroDivisionError), reweighted(unet, w):
        1 / 0
    assert torch.equal(layer(x, text), unweighted)


def test_the_unconditional_half_of_a_guided_batch_keeps_its_own(layer_and_input):
    unet, layer, x, text, w = layer_and_input
    unweighted, expected = layer(x, text), attention(layer, x, text, w)
    with reweighted(unet, w[:1]):
        both = layer(x[:1].expand(2, -1, -1), text[:1].expand(2, -1, -1))
    assert torch.allclose(both[0], expected[0], atol=1e-5)
    assert torch.allclose(both[1], unweighted[0], atol=1e-5)

    # the same through losses.guided: text first, the empty caption second
    eps, t, z = denoiser(unet), torch.tensor([999, 999]), torch.randn(2, 4, 8, 8)
    null = torch.randn(1, 77, 24)
    with reweighted(unet, w):
        whole, cond = guided(eps, null, 3)(z, t, text), eps(z, t, text)
    uncond = eps(z, t, null.expand_as(text))
    torch.testing.assert_close(whole, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_weights_change_in_a_compiled_layer_too(layer_and_input):
    unet, layer, x, text, w = layer_and_input
    compiled, results = torch.compile(layer, backend="eager"), []
    for weights in (None, w, w.flip(0), None):
        with reweighted(unet, weights):
            results.append((compiled(x, text), layer(x, text)))
    assert all(torch.equal(a, b) for a, b in results)
    plain, one, other, plain_again = (a for a, _ in results)
    assert torch.equal(plain, plain_again)
    assert not torch.equal(plain, one) and not torch.equal(one, other)


def test_words_that_do_not_fit_are_told(plain):
    warning, = unseen_words(Pipeline(plain), ["dog " * 74 + "barks", "fine"])
    assert "81 tokens, 77 fit; cut" in warning and "rks" in warning


def test_words_that_the_teacher_never_saw_are_told():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    pipe = types.SimpleNamespace(tokenizer=tokenizer, tokens=24)
    assert unseen_words(pipe, ["a dog barks twice", ""]) == []
    warning, = unseen_words(pipe, ["rain falls", "a Dog barks, in a cathedral"])
    assert "'in', 'cathedral'" in warning and "Dog" not in warning.split("seen")[1]
