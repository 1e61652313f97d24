"""A text-to-audio model in Auffusion's layout on disk, and how to sample it.

    text -> CLIP embedding -> UNet (latents) -> VAE decoder (image of a log-mel) -> vocoder -> audio
"""
import contextlib
import math
from collections import OrderedDict
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from huggingface_hub.utils import enable_progress_bars
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel

from extras.cli import InputError, read_json
from extras.folded import fold_upsampling, load_vocoder
from extras.hub import find, read_settings
from losses import one_step

transformers.utils.logging.disable_progress_bar()       # bars for reading files are noise,
enable_progress_bars()                                  # those for downloading are not
diffusers.logging.set_verbosity_error()                 # it warns of Auffusion's unused EMA keys

RATE, HOP = 16000, 160                                  # samples a second, and in a mel frame
LOG_MIN, LOG_MAX = math.log(1e-5), math.log(200)        # log-mels of the image's black and white


def image_to_mel(image):
    """The VAE's image (B, channels, mels, frames) in [-1, 1] -> log-mel (B, mels, frames)."""
    brightness = (image[:, 0].float() / 2 + 0.5).clamp(0, 1).flip(1)        # row 0 was the highest
    return brightness * (LOG_MAX - LOG_MIN) + LOG_MIN


# ---- its parts ---------------------------------------------------------------------------------

def load_part(folder, part, load):
    """Return load(folder / part); whatever goes wrong is one line that names the part."""
    path = Path(folder) / part                          # part "" is the folder itself
    if not path.is_dir():
        raise InputError(f"{folder}: lacks {part}/ (README, 'A teacher on disk')")
    try:
        return load(path)
    except Exception as e:                              # each library fails in its own way
        reason = (str(e).strip() or "?").splitlines()[0][:200]
        raise InputError(f"{path}: cannot be loaded, is a file missing or cut short? "
                         f"({type(e).__name__}: {reason})")


def pretrained(cls, **kw):
    """Make a loader in fp32 that refuses missing weights, which the libraries leave random."""
    def load(path):
        network, info = cls.from_pretrained(path, output_loading_info=True, **kw)
        if missing := sorted(info["missing_keys"]):
            raise InputError(f"{path}: lacks {len(missing)} weights, {missing[0]} for one")
        return network.float()
    return load


# transformers would otherwise load the dtype that config.json names, rounding the weights to it
load_clip = pretrained(CLIPTextModel, dtype=torch.float32)


def load_unet(folder, part="unet", dtype=torch.float32):
    """Load the UNet2DConditionModel of a folder, in eval mode."""
    unet = load_part(folder, part, pretrained(UNet2DConditionModel))
    return unet.to(dtype, memory_format=torch.channels_last)


def load_scheduler(path):
    """Load the diffusers scheduler that scheduler_config.json names."""
    name = read_json(path / "scheduler_config.json")["_class_name"]
    return getattr(diffusers, name).from_pretrained(path)


def load_adapter(path):
    """Load Auffusion's condition adapter: text -> LayerNorm(Linear(text))."""
    state = torch.load(path / "condition_adapter.pt", map_location="cpu", weights_only=True)
    width, dim = state["proj.weight"].shape
    layers = OrderedDict(proj=nn.Linear(dim, width), norm=nn.LayerNorm(width))
    adapter = nn.Sequential(layers)
    adapter.load_state_dict(state)
    return adapter.float()


# ---- the pipeline ------------------------------------------------------------------------------

class Pipeline(nn.Module):
    """All of a text-to-audio model but its UNet: text before it, audio behind it, its schedule.

    name: "tiny", a folder or a hub name; skip: files not to download. seconds: length of a clip;
    None takes the folder's own, else Auffusion's 10.24. dtype: of the VAE and the vocoder.
    decoder: folder of a small decoder (extras/decoder.py) to decode with in place of the VAE.
    Frozen. Has alpha, sigma (T + 1,), T, seconds, latent_shape (C, h, w), folder and settings.
    """

    def __init__(self, name, seconds=None, skip=(), dtype=torch.float32, decoder=None):
        super().__init__()
        self.folder = folder = find(name, skip)
        self.settings = read_settings(folder)
        self.vae = self.decoder = load_part(folder, "vae", pretrained(AutoencoderKL))
        if decoder:
            self.decoder = load_part(decoder, "", pretrained(AutoencoderTiny))
        fold_upsampling(self.decoder.decoder)
        for network in (self.vae, self.decoder):
            network.to(dtype, memory_format=torch.channels_last)
        self.vocoder = load_part(folder, "vocoder", load_vocoder)
        # bf16 would leave HiFi-GAN's noise 35 to 46 dB below the signal; fp16 has 3 more bits
        self.vocoder.to(torch.float32 if dtype == torch.bfloat16 else dtype)

        encoder, tokenizer, self.adapter = "text_encoder", "tokenizer", None
        conditions = folder / "condition_config.json"
        if conditions.exists():             # Auffusion's older layout: an adapter behind the text
            listed, names = read_json(conditions), ("text_encoder_name", "condition_adapter_name")
            if len(listed) != 1 or not all(name in listed[0] for name in names):
                raise InputError(f"{conditions}: must list one {' and one '.join(names)}")
            encoder = tokenizer = listed[0][names[0]]
            self.adapter = load_part(folder, listed[0][names[1]], load_adapter)
        self.tokenizer = load_part(folder, tokenizer, AutoTokenizer.from_pretrained)
        self.text_encoder = load_part(folder, encoder, load_clip)
        self.tokens = self.text_encoder.config.max_position_embeddings      # 77

        self.scheduler = load_part(folder, "scheduler", load_scheduler)
        kind = self.scheduler.config.prediction_type
        if kind != "epsilon":
            raise InputError(f"{folder}/scheduler: prediction_type is {kind}; only teachers that "
                             "predict epsilon are supported")
        # x_t = alpha_t x0 + sigma_t eps (eq. 2), for t = 0 .. T
        alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.register_buffer("alpha", alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt().float(), persistent=False)
        self.T = len(self.alpha) - 1

        stride = 2 ** (len(self.vae.config.block_out_channels) - 1)         # 8
        self.num_mels = read_json(folder / "vocoder/config.json")["num_mels"]
        self.seconds = seconds or self.settings.get("seconds", 10.24)
        width = self.seconds * RATE / HOP / stride
        if abs(width - round(width)) > 1e-6:
            raise InputError(f"--seconds {self.seconds}: not a multiple of {stride * HOP / RATE} "
                             "s, one column of latents")
        channels = self.vae.config.latent_channels
        self.latent_shape = (channels, self.num_mels // stride, round(width))
        self.requires_grad_(False).eval()

    @property
    def device(self):
        return self.alpha.device

    def tokenize(self, prompts, **kw):
        return self.tokenizer(list(prompts), padding="max_length", max_length=self.tokens,
                              truncation=True, **kw)

    @torch.no_grad()
    def encode_text(self, prompts):
        """Prompts -> what the UNet attends to, (B, 77, 768). "" is the unconditional prompt."""
        tokens = self.tokenize(prompts, return_tensors="pt").to(self.device)
        hidden = self.text_encoder(tokens.input_ids).last_hidden_state
        if self.adapter is None:
            return hidden
        # Attention is causal: zeros behind the last token equal encoding at the natural length.
        text = self.adapter(hidden * tokens.attention_mask[..., None])
        return text * torch.tensor([p != "" for p in prompts], device=self.device)[:, None, None]

    @torch.no_grad()
    def decode(self, x0):
        """Latents (B, 4, h, w) -> log-mel (B, num_mels, 8 w) in nepers, row 0 the lowest bin."""
        z = (x0 / self.decoder.config.scaling_factor).to(self.decoder.dtype)
        return image_to_mel(self.decoder.decode(z).sample)

    @torch.no_grad()
    def vocode(self, mel):
        """Log-mel (B, num_mels, frames) -> waveform (B, frames * HOP) in [-1, 1]."""
        return self.vocoder(mel.transpose(1, 2).to(self.vocoder.dtype)).float()

    def scheduler_of(self, steps):
        """Set a fresh scheduler to `steps`; InputError where it would not start from noise."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        first = int(scheduler.timesteps[0])
        if first < 0.9 * self.T:            # "leading" spacing: 2 steps would start at t = 501
            raise InputError(f"{steps} steps: this teacher's scheduler would start at t = {first}, "
                             "where x_t is not yet noise; ask for 1, or for more")
        return scheduler


# ---- sampling ----------------------------------------------------------------------------------

def denoiser(unet, autocast=None):
    """A UNet as losses.py sees it: eps(x_t, t, text) of x_t (B, 4, h, w) and t (B,), in fp32."""
    dtype = next(unet.parameters()).dtype

    def eps(x, t, text):
        with autocast or contextlib.nullcontext():
            return unet(x.to(dtype), t, text.to(dtype)).sample.float()

    return eps


@torch.no_grad()
def many_steps(eps, z_T, text, pipe, steps):
    """The teacher's own sampling with its scheduler; eps is guided. One step is eq. 1."""
    if steps == 1:
        return one_step(eps, z_T, text, pipe.alpha, pipe.sigma)
    scheduler = pipe.scheduler_of(steps)
    x = z_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = eps(scheduler.scale_model_input(x, t), t.expand(len(x)), text)
        x = scheduler.step(out, t, x).prev_sample
    return x
