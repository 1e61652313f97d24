"""What several tests use: noise, what short runs of train.py leave, other teachers and students."""
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    RobertaTokenizerFast,
)

from data import InputError
from model import load_unet

LOSSES = {"vsd", "tv", "lora", "x0_std", "grad_student", "grad_lora"}
SMALL = ["--max_steps", 2, "--batch_size", 4, "--grad_accum", 1, "--lr", 1e-3, "--guidance", 2,
         "--log_every", 1, "--device", "cpu"]


def call(main, *flags):
    """main() of a program with these flags, which need not be strings."""
    return main([str(flag) for flag in flags])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(values, t):
    """alpha or sigma at t (B,), to multiply latents (B, C, h, w) with."""
    return values[t].view(-1, 1, 1, 1)


def read_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def result(out):
    """All that a run leaves and that must be reproducible."""
    checkpoint = read_checkpoint(out)
    return {"saved": load_file(out / "student/diffusion_pytorch_model.safetensors"),
            "adapters": load_file(out / "lora/adapter_model.safetensors"),
            **{key: checkpoint[key] for key in ("step", "weights", "opts")}}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curves(out):
    return [{k: v for k, v in line.items() if k != "samples_per_s"} for line in metrics(out)]


def alike(a, b):
    """Lines of metrics are the same but for rounding, of whatever speed."""
    for ours, theirs in zip(a, b, strict=True):
        assert {**ours, "samples_per_s": 0} == {
            key: pytest.approx(value, rel=2e-3) for key, value in {
                **theirs, "samples_per_s": 0}.items()}


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))


def change_teacher(folder):
    unet = load_unet(folder)
    unet.conv_in.weight.data += 1
    unet.save_pretrained(folder / "unet")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refuses(load, *args, says, **kw):
    with pytest.raises(InputError, match=says or None) as e:
        load(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def change_unet(teacher, folder, **config):
    """Write a random UNet of a teacher's settings, or of others."""
    torch.manual_seed(1)
    known = {**load_unet(teacher).config, **config}
    UNet2DConditionModel.from_config(known).save_pretrained(folder)


def write_student(folder, teacher, **more):
    """Write a student as train.py does, with random weights."""
    change_unet(teacher, folder)
    about = {"teacher": str(teacher), "timestep": 999, "seconds": 0.64}
    (folder / "swiftaudio.json").write_text(json.dumps({**about, **more}))
    return folder


def write_clap(folder):
    """A small random CLAP model in the published layout."""
    torch.manual_seed(0)
    text = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16, max_position_embeddings=80)
    audio = dict(patch_embeds_hidden_size=16, depths=[1, 1, 1, 1], num_mel_bins=64,
                 num_attention_heads=[1, 1, 2, 2], hidden_size=128, spec_size=256)
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    ClapModel(config).save_pretrained(folder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a dog barks"], vocab_size=300,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=77)
    ClapProcessor(ClapFeatureExtractor(truncation="rand_trunc"), tokenizer).save_pretrained(folder)
    return folder
