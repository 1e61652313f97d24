"""Small random checkpoints in Auffusion's two layouts, and helpers to run the command lines."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import HiFiGAN

VOCODER = dict(num_mels=64, upsample_rates=[5, 4, 4, 2], upsample_kernel_sizes=[11, 8, 7, 4], upsample_initial_channel=32,
               resblock="1", resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]])


def write_tokenizer(folder):
    """A CLIP tokenizer as published: vocab.json, merges.txt and two small configs; it spells words letter by letter."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [c + "</w>" for c in letters] + ["do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True,
                                                              "model_max_length": 77, "add_prefix_space": False}))
    return len(words)


def write_vocoder(folder, config=VOCODER):
    """HiFi-GAN with weight norm, in the published form."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, w in HiFiGAN(config).state_dict().items():
        if name.endswith("weight"):
            state[f"{name}_g"], state[f"{name}_v"] = torch.rand(w.shape[0], 1, 1) + 0.5, torch.randn(w.shape) * 0.1
        else:
            state[name] = torch.randn(w.shape) * 0.1
    torch.save({"generator": state}, folder / "vocoder.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return state


def write_checkpoint(folder, layout="plain", dim=24, unet=(16, 32, 32, 32), vae=(4, 8, 8, 8), vocoder=VOCODER, text_layers=1,
                     heads=2, **more):
    """A random teacher of Auffusion's structure in one of its layouts: "plain" (no adapter) or "adapter"."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64, layers_per_block=more.get("layers", 1), block_out_channels=unet, cross_attention_dim=dim,
        attention_head_dim=heads, norm_num_groups=more.get("groups", 8)).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=vae, layers_per_block=more.get("layers", 1), norm_num_groups=more.get("groups", 4), scaling_factor=0.18215,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  ).save_pretrained(folder / "vae")
    PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1,
                  set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    write_vocoder(folder / "vocoder", vocoder)
    encoder = folder / ("text_encoder" if layout == "plain" else "text_encoder_0")
    size = write_tokenizer(folder / "tokenizer" if layout == "plain" else encoder)
    CLIPTextModel(CLIPTextConfig(
        vocab_size=more.get("vocab", size), hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=text_layers,
        num_attention_heads=more.get("text_heads", 2), projection_dim=dim, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)).save_pretrained(encoder)
    if layout == "adapter":
        (folder / "condition_config.json").write_text(json.dumps([{
            "text_encoder_name": "openai/clip-vit-large-patch14", "condition_adapter_name": "condition_adapter_0",
            "condition_max_length": 77, "condition_dim": dim, "cross_attention_dim": dim}]))
        (folder / "condition_adapter_0").mkdir()
        (folder / "condition_adapter_0/config.json").write_text(json.dumps({"condition_dim": dim}))
        torch.save({"proj.weight": torch.randn(dim, dim), "proj.bias": torch.randn(dim), "norm.weight": torch.rand(dim) + 0.5,
                    "norm.bias": torch.randn(dim)}, folder / "condition_adapter_0/condition_adapter.pt")
    (folder / "swiftaudio.json").write_text(json.dumps({"seconds": more.get("seconds", 0.64)}))     # latents of 4 x 8 x 8
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("adapter"), "adapter")


@pytest.fixture
def broken(plain, tmp_path):
    """A copy of the plain teacher, to break."""
    return Path(shutil.copytree(plain, tmp_path / "teacher"))


@pytest.fixture(scope="session")
def captions(tmp_path_factory):
    path = tmp_path_factory.mktemp("captions") / "captions.csv"
    path.write_text("id,caption\n" + "".join(f"{i},dog number {i} barks\n" for i in range(23)))
    return path


def run(script, *flags, cwd, ranks=0, threads=1, **kw):
    """Run train.py or sample.py as a user would: (exit code, all it printed)."""
    command = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else [])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command + [str(ROOT / script), *map(str, flags)], cwd=cwd, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800, **kw)
    return done.returncode, done.stdout


def refused(script, *flags, cwd, says, **kw):
    """The run must end with exit code 1 and one line `error: ...` holding each of `says`, and no traceback."""
    code, output = run(script, *flags, cwd=cwd, **kw)
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 1 and "Traceback" not in output and len(lines) == 1, output
    for word in says:
        assert word in lines[0], lines[0]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too (minutes to an hour, up to 24 GB)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
