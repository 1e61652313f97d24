"""Random teachers in Auffusion's layout: small ones for tests, its full size for bench.py."""
import json

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

FULL = dict(        # Auffusion's: 859.5 M parameters in the UNet
    dim=768, unet=(320, 640, 1280, 1280), vae=(128, 256, 512, 512), seconds=10.24,
    text_layers=12, heads=8, layers=2, groups=32, vocab=49408, text_heads=12, vocoder=dict(
        num_mels=256, upsample_rates=[5, 4, 2, 2, 2], upsample_kernel_sizes=[11, 8, 4, 4, 4],
        upsample_initial_channel=1024, resblock="1", resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3))


def write_tokenizer(folder):
    """Write a CLIP tokenizer as published, which spells words letter by letter; its size."""
    folder.mkdir(parents=True, exist_ok=True)
    letters, end = [chr(c) for c in range(33, 127)], "<|endoftext|>"
    words = [*letters, *(c + "</w>" for c in letters), "do", "dog</w>", "<|startoftext|>", end]
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        **special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True,
        "model_max_length": 77, "add_prefix_space": False}))
    return len(words)


def write_vocoder(folder, config):
    """Write HiFi-GAN with weight norm, in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    network = SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=config["num_mels"], **config))
    state = {}
    for name, w in network.named_parameters():
        name = name.replace("upsampler.", "ups.")
        if name.endswith("weight"):
            state[f"{name}_g"], name = torch.rand(w.shape[0], 1, 1) + 0.5, f"{name}_v"
        state[name] = torch.randn(w.shape) * 0.1
    torch.save({"generator": state}, folder / "vocoder.pt")
    (folder / "config.json").write_text(json.dumps(config))


def write_teacher(folder, *, dim, unet, vae, vocoder, seconds, text_layers=1, heads=2, layers=1,
                  groups=4, vocab=None, text_heads=2):
    """Write a random teacher of Auffusion's structure, in the layout of full-no-adapter."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64, layers_per_block=layers, block_out_channels=unet, norm_num_groups=groups,
        cross_attention_dim=dim, attention_head_dim=heads,
        down_block_types=[*["CrossAttnDownBlock2D"] * (len(unet) - 1), "DownBlock2D"],
        up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * (len(unet) - 1)],
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=vae, layers_per_block=layers, norm_num_groups=groups,
        scaling_factor=0.18215, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True,
        steps_offset=1, set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    write_vocoder(folder / "vocoder", vocoder)
    size = write_tokenizer(folder / "tokenizer")
    CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab or size, hidden_size=dim, intermediate_size=4 * dim, projection_dim=dim,
        num_hidden_layers=text_layers, num_attention_heads=text_heads, bos_token_id=size - 2,
        eos_token_id=size - 1, pad_token_id=size - 1)).save_pretrained(folder / "text_encoder")
    (folder / "swiftaudio.json").write_text(json.dumps({"seconds": seconds}))
    return folder
