"""The teacher: a latent diffusion text-to-audio model in Auffusion's layout, from text to waveform and back.

    text -> CLIP embedding -> UNet (latents) -> VAE decoder (image of a log-mel spectrogram) -> HiFi-GAN -> waveform
"""
import contextlib
import functools
import math
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel
from transformers.audio_utils import mel_filter_bank

from data import InputError, read_json

transformers.utils.logging.disable_progress_bar()       # bars for reading files are noise,
huggingface_hub.utils.enable_progress_bars()            # those for downloading are not
TINY = Path(__file__).resolve().parent / "tiny" / "teacher"

RATE, HOP, WIN, N_FFT = 16000, 160, 1024, 2048          # Auffusion's mel front end: 10 ms hop, 64 ms Hann window
LOG_MIN, LOG_MAX = math.log(1e-5), math.log(200)        # the image's [0, 1] is this range of log-mel (Auffusion)


# ---- waveform <-> log-mel <-> image --------------------------------------------------------------------------------

@functools.lru_cache
def mel_filters(n_mels, device):
    """Slaney mel filters (N_FFT//2 + 1, n_mels) over 0..8000 Hz, librosa's default filterbank."""
    bank = mel_filter_bank(N_FFT // 2 + 1, n_mels, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.tensor(bank, dtype=torch.float32, device=device)


def log_mel(wav, n_mels=256):
    """Natural-log mel magnitude of waveforms (B, N) in [-1, 1] at 16 kHz: (B, n_mels, N // HOP), row 0 the lowest bin.

    The waveform is taken as it is: Auffusion peak-normalises to 0.95 first (see peak_normalize).
    """
    pad = (N_FFT - HOP) // 2
    wav = F.pad(wav[:, None].float(), (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(WIN, device=wav.device)
    spec = torch.stft(wav, N_FFT, HOP, WIN, window, center=False, return_complex=True)
    magnitude = (spec.real ** 2 + spec.imag ** 2 + 1e-9).sqrt()
    return (mel_filters(n_mels, wav.device).T @ magnitude).clamp(min=1e-5).log()


def peak_normalize(wav):
    """Waveforms (B, N) scaled to a peak of 0.95, each by itself; silence stays silence."""
    return 0.95 * wav / wav.abs().amax(-1, keepdim=True).clamp(min=1e-8)


def mel_to_image(mel):
    """Log-mel (B, n_mels, frames) -> the VAE's image (B, 3, n_mels, frames) in [-1, 1], row 0 the HIGHEST bin."""
    x = ((mel - LOG_MIN) / (LOG_MAX - LOG_MIN)).clamp(0, 1) * 2 - 1
    return x.flip(1)[:, None].expand(-1, 3, -1, -1)


def image_to_mel(image):
    """Inverse of mel_to_image; reads the first channel."""
    x = (image[:, 0].float() / 2 + 0.5).clamp(0, 1).flip(1)
    return x * (LOG_MAX - LOG_MIN) + LOG_MIN


# ---- HiFi-GAN (Kong et al. 2020, arXiv 2010.05646), as published, without the discriminators -----------------------

class ResBlock(nn.Module):
    """Residual dilated convolutions: kind "1" follows each dilated one with a plain one, kind "2" does not."""

    def __init__(self, channels, kernel, dilations, kind):
        super().__init__()
        def convs(ds):
            return nn.ModuleList(nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in ds)
        self.paired = kind == "1"
        if self.paired:
            self.convs1, self.convs2 = convs(dilations), convs([1] * len(dilations))
        else:
            self.convs = convs(dilations)

    def forward(self, x):
        for i, conv in enumerate(self.convs1 if self.paired else self.convs):
            y = conv(F.leaky_relu(x, 0.1))
            x = x + (self.convs2[i](F.leaky_relu(y, 0.1)) if self.paired else y)
        return x


class HiFiGAN(nn.Module):
    """Vocoder: log-mel (B, num_mels, frames) -> waveform (B, frames * HOP) in [-1, 1]. `config` is its config.json."""

    def __init__(self, config):
        super().__init__()
        width, kernels = config["upsample_initial_channel"], config["resblock_kernel_sizes"]
        self.num_mels, self.per_level = config["num_mels"], len(kernels)
        self.conv_pre = nn.Conv1d(self.num_mels, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config["upsample_rates"], config["upsample_kernel_sizes"]):
            odd = (kernel - rate) % 2                   # both parities occur in public configs; either gives x rate
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, (kernel - rate) // 2 + odd, odd))
            width //= 2
            for k, dilations in zip(kernels, config["resblock_dilation_sizes"]):
                self.resblocks.append(ResBlock(width, k, dilations, str(config["resblock"])))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel):
        x = self.conv_pre(mel.to(self.conv_pre.weight.dtype))
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(block(x) for block in self.resblocks[i * self.per_level:(i + 1) * self.per_level]) / self.per_level
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)).float())[:, 0]


class GriffinLim(nn.Module):
    """Phases by Griffin and Lim (1984), in HiFi-GAN's place where nothing is trained: the tiny teacher's vocoder.

    A convolutional vocoder turns a steady spectrum into a signal that repeats with every frame, so that it cannot hold
    a tone between multiples of 100 Hz unless trained at length; the tiny world is full of such tones.
    """

    def __init__(self, num_mels, steps):
        super().__init__()
        self.num_mels, self.steps = num_mels, steps

    def forward(self, mel):
        bank, target = mel_filters(self.num_mels, mel.device), mel.float().exp()
        window = torch.hann_window(WIN, device=mel.device)
        magnitude = bank @ target
        for _ in range(30):                             # non-negative magnitudes with the given mels (KL updates of NMF)
            magnitude = magnitude * (bank @ (target / (bank.T @ magnitude + 1e-8))) / (bank.sum(1, keepdim=True) + 1e-8)
        generator = torch.Generator().manual_seed(0)    # the same start whatever the batch
        phase = torch.rand(magnitude.shape[1:], generator=generator).to(mel.device) * 2 * math.pi
        spec, before, length = torch.polar(magnitude, phase.expand_as(magnitude)), 0, mel.shape[-1] * HOP
        for _ in range(self.steps):                     # with the momentum of Perraudin et al. (2013)
            wav = torch.istft(spec, N_FFT, HOP, WIN, window, length=length - HOP)
            now = torch.stft(wav, N_FFT, HOP, WIN, window, return_complex=True)
            spec, before = torch.polar(magnitude, (now + 0.99 * (now - before)).angle()), now
        return F.pad(wav, (HOP // 2, HOP // 2)).clamp(-1, 1)


def load_vocoder(folder):
    """The vocoder of a folder: a HiFiGAN of config.json and vocoder.pt ({"generator": state_dict}), weight norm folded in.

    A config.json of {"num_mels": ..., "griffin_lim": steps} gives GriffinLim.
    """
    config = read_json(Path(folder) / "config.json")
    if "griffin_lim" in config:
        return GriffinLim(config["num_mels"], config["griffin_lim"])
    path = Path(folder) / "vocoder.pt"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)["generator"]
    except pickle.UnpicklingError:
        raise InputError(f"{path}: holds more than tensors or is damaged, and was not run; get the file anew")
    state = {k: v.float() for k, v in stored.items() if not k.endswith(("weight_g", "weight_v"))}
    for k, v in stored.items():
        if k.endswith("weight_v"):                      # w = g v / |v|, the norm over all but the first axis
            v, g = v.float(), stored[k[:-1] + "g"].float()
            state[k[:-2]] = g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1)
    vocoder = HiFiGAN(config)
    vocoder.load_state_dict(state)
    return vocoder


# ---- where a teacher is, and its parts -----------------------------------------------------------------------------

def find(name, skip=()):
    """The local folder of a model: "tiny", a folder, or a name on the Hugging Face hub.

    Only the needed files are downloaded, and none whose path starts with `skip`.
    """
    if name == "tiny":
        return TINY
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InputError(f"{name}: no such folder, and not a name on the hub (user/model)")
    try:
        try:
            files = [f.rfilename for f in huggingface_hub.model_info(name).siblings]
        except Exception:              # no network: what an earlier run has downloaded may do
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True, allow_patterns=["vae/config.json", "config.json"]))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[f for f in needed(files) if not f.startswith(skip)]))
    except Exception as e:
        raise InputError(f"{name}: not a folder here, and the hub did not give it ({type(e).__name__}: no network, or an "
                         "unknown name?); download it elsewhere and pass its folder instead")


def needed(files):
    """Of a repository's files, those that are read here: no variants, and no .bin where there is a .safetensors."""
    parts = ("unet/", "vae/", "text_encoder", "tokenizer/", "scheduler/", "vocoder/", "condition_")
    student = ("config.json", "swiftaudio.json", "diffusion_pytorch_model.safetensors")
    files = [f for f in files if f.startswith(parts) and f.count(".") == 1 or f in student]
    safe = {str(Path(f).parent) for f in files if f.endswith(".safetensors")}
    return [f for f in files if f.endswith((".json", ".txt", ".safetensors", ".pt"))
            or f.endswith(".bin") and str(Path(f).parent) not in safe]


def load_part(folder, part, loader):
    """loader(folder / part), with whatever goes wrong said in one line that names the part."""
    if not (Path(folder) / part).is_dir():              # part "" is the folder itself
        raise InputError(f"{folder}: the teacher's folder lacks {part}/ (see README, 'The teacher on disk')")
    try:
        return loader(Path(folder) / part)
    except InputError:
        raise
    except Exception as e:                              # each library fails in its own way: one line for all
        raise InputError(f"{Path(folder) / part}: cannot be loaded, is a file missing or cut short? "
                         f"({type(e).__name__}: {(str(e).strip() or '?').splitlines()[0][:200]})")


def load_unet(folder, part="unet", dtype=torch.float32):
    """The UNet2DConditionModel of a folder, in eval mode (it has no dropout, and no layer that train() changes)."""
    with quiet():                                       # Auffusion's config.json holds EMA keys that diffusers ignores
        return load_part(folder, part, pretrained(UNet2DConditionModel)).to(dtype, memory_format=torch.channels_last)


def pretrained(cls):
    """A loader of `cls` in fp32 that does not accept missing weights: the libraries would leave them random."""
    def load(folder):
        network, info = cls.from_pretrained(folder, output_loading_info=True)
        if info["missing_keys"]:
            raise InputError(f"{folder}: its weights lack {len(info['missing_keys'])} tensors, {sorted(info['missing_keys'])[0]} for one")
        return network.float()
    return load


@contextlib.contextmanager
def quiet():
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(level)


class Teacher(nn.Module):
    """All of a teacher but its UNet: text in front of it, latents to waveform behind it, and its noise schedule.

    name: "tiny", a folder or a hub name. seconds: length of a clip; None takes the folder's own (else Auffusion's 10.24).
    dtype: of the VAE and the vocoder.
    """

    def __init__(self, name, seconds=None, skip=(), dtype=torch.float32):
        super().__init__()
        self.folder = folder = find(name, skip)
        self.defaults = folder_defaults(folder)
        with quiet():                                   # diffusers warns of any cast
            self.vae = load_part(folder, "vae", pretrained(AutoencoderKL))
            fold_upsampling(self.vae.decoder)
            self.vae.to(dtype, memory_format=torch.channels_last)
        self.vocoder = load_part(folder, "vocoder", load_vocoder).to(dtype)
        self.adapter = None
        conditions = folder / "condition_config.json"
        if conditions.exists():                         # Auffusion's older layout: an adapter behind the text encoder
            if len(read_json(conditions)) != 1:
                raise InputError(f"{conditions}: lists more than one text encoder, which is not supported")
            self.tokenizer = load_part(folder, "text_encoder_0", AutoTokenizer.from_pretrained)
            self.text_encoder = load_part(folder, "text_encoder_0", pretrained(CLIPTextModel))
            self.adapter = load_part(folder, "condition_adapter_0", load_adapter)
        else:
            self.tokenizer = load_part(folder, "tokenizer", AutoTokenizer.from_pretrained)
            self.text_encoder = load_part(folder, "text_encoder", pretrained(CLIPTextModel))
        self.tokens = self.text_encoder.config.max_position_embeddings      # 77
        self.scheduler = load_part(folder, "scheduler", load_scheduler)
        if self.scheduler.config.prediction_type != "epsilon":
            raise InputError(f"{folder}/scheduler: prediction_type is {self.scheduler.config.prediction_type}; "
                             "only teachers that predict epsilon are supported")
        # alpha_t, sigma_t of x_t = alpha_t x0 + sigma_t eps (eq. 2), for t = 0 .. T
        self.register_buffer("alpha", self.scheduler.alphas_cumprod.double().sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - self.scheduler.alphas_cumprod.double()).sqrt().float(), persistent=False)
        self.T = len(self.alpha) - 1
        stride = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.seconds = seconds or self.defaults.get("seconds", 10.24)
        frames = self.seconds * RATE / HOP / stride
        if abs(frames - round(frames)) > 1e-6:
            raise InputError(f"--seconds {self.seconds}: not a multiple of {stride * HOP / RATE} s, one column of latents")
        self.latent_shape = (self.vae.config.latent_channels, self.vocoder.num_mels // stride, round(frames))
        self.requires_grad_(False).eval()

    @property
    def device(self):
        return self.alpha.device

    def check(self, prompts):
        """Warn of what the text encoder will not see: words past its length, and words not in a word-level vocabulary."""
        tok, lines = self.tokenizer, []
        for prompt in prompts:
            ids = tok(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > self.tokens:
                lines.append(f"warning: {len(ids)} tokens, {self.tokens} fit; cut: {tok.decode(ids[self.tokens - 1:-1])!r}")
            if tok.unk_token_id != tok.eos_token_id:    # CLIP's own tokenizer knows every word in pieces
                unknown = [w for w in prompt.split() if tok.unk_token_id in tok(w, add_special_tokens=False).input_ids]
                if unknown:
                    lines.append(f"warning: {prompt!r}: the teacher has never seen {', '.join(map(repr, unknown))}")
        return lines

    def token_weights(self, prompts, weights):
        """Weights of each prompt's characters -> those of its tokens (B, tokens): a token has the weight of its first letter."""
        spans = self.tokenizer(list(prompts), padding="max_length", max_length=self.tokens, truncation=True,
                               return_offsets_mapping=True)["offset_mapping"]
        return torch.tensor([[w[a] if b > a else 1.0 for a, b in row] for row, w in zip(spans, weights)], device=self.device)

    @torch.no_grad()
    def encode_text(self, prompts):
        """Prompts -> what the UNet attends to, (B, 77, 768) for Auffusion. "" is the unconditional prompt."""
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.tokens, truncation=True,
                                return_tensors="pt").to(self.device)
        hidden = self.text_encoder(tokens.input_ids).last_hidden_state
        if self.adapter is None:
            return hidden
        # Attention is causal, so zeros behind the last token are the same as encoding at the natural length.
        text = self.adapter(hidden * tokens.attention_mask[..., None])
        return text * torch.tensor([p != "" for p in prompts], device=self.device)[:, None, None]

    @torch.no_grad()
    def decode(self, z):
        """Latents (B, 4, h, w) -> log-mel (B, num_mels, 8 w), row 0 the lowest bin."""
        return image_to_mel(self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype)).sample)

    @torch.no_grad()
    def vocode(self, mel):
        """Log-mel (B, num_mels, frames) -> waveform (B, frames * 160) in [-1, 1]."""
        return self.vocoder(mel)

    @torch.no_grad()
    def encode_audio(self, wav):
        """Waveforms (B, N) at 16 kHz -> latents (B, 4, h, w): the posterior's mean of the peak-normalised clip."""
        image = mel_to_image(log_mel(peak_normalize(wav), self.vocoder.num_mels))
        return self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode().float() * self.vae.config.scaling_factor


@torch.no_grad()
def fold_upsampling(decoder):
    """Replace each "repeat every pixel, then convolve 3 x 3" of a VAE decoder by the one transposed convolution that equals it.

    Where two of the three taps fall on the same pixel their weights add up, so that 16 taps do for 36.
    """
    for block in decoder.up_blocks:
        for i, layer in enumerate(block.upsamplers or []):
            w = layer.conv.weight
            for dim in (2, 3):
                a, b, c = w.unbind(dim)
                w = torch.stack([c, b + c, a + b, a], dim)
            up = block.upsamplers[i] = nn.ConvTranspose2d(w.shape[1], w.shape[0], 4, 2, 1)
            up.weight.copy_(w.transpose(0, 1))
            up.bias.copy_(layer.conv.bias)


def folder_defaults(folder):
    """A teacher folder's own settings, swiftaudio.json: {"seconds": ..., "train": {flag: value}, ...}, or {}."""
    path = Path(folder) / "swiftaudio.json"
    return read_json(path) if path.exists() else {}


def load_scheduler(folder):
    """The diffusers scheduler that scheduler_config.json names."""
    name = read_json(folder / "scheduler_config.json")["_class_name"]
    with quiet():
        return getattr(diffusers, name).from_pretrained(folder)


def load_adapter(folder):
    """Auffusion's condition adapter: text -> LayerNorm(Linear(text))."""
    state = torch.load(folder / "condition_adapter.pt", map_location="cpu", weights_only=True)
    out, dim = state["proj.weight"].shape
    adapter = nn.Sequential(OrderedDict(proj=nn.Linear(dim, out), norm=nn.LayerNorm(out)))
    adapter.load_state_dict(state)
    return adapter.float()


def pick_device(name=None):
    """The device called `name`, or the first there is of cuda, mps and cpu; one GPU each for torchrun's processes."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: not usable here ({str(e).splitlines()[0]})")


# ---- sampling ------------------------------------------------------------------------------------------------------

def sampling_dtype(device):
    """What to sample in: fp16 on a GPU, bf16 on a CPU with instructions for it, else fp32.

    Eq. 1 multiplies an error of eps by 14.6. Tiny student, mean error of the log-mel: fp16 0.006, bf16 0.049 (LOG.md).
    """
    if device.type == "cuda":
        return torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def denoiser(unet):
    """A UNet as the method sees it: eps(x_t, t, text), with x_t (B, 4, h, w), t (B,) and the result in fp32."""
    dtype = next(unet.parameters()).dtype
    return lambda x, t, text: unet(x.to(dtype), t, text.to(dtype)).sample.float()


def guided(eps, x, t, text, null, scale):
    """Classifier-free guidance (arXiv 2207.12598): eps(null) + scale (eps(text) - eps(null)), in one batch of 2 B."""
    if scale == 1:
        return eps(x, t, text)
    cond, uncond = eps(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, null.expand_as(text)])).chunk(2)
    return uncond + scale * (cond - uncond)


def one_step(eps, z_T, text, teacher, parameterization="eps"):
    """Eq. 1: the student's clip from noise in one pass, x0 = (z_T - sigma_T eps(z_T, T, text)) / alpha_T.

    parameterization "direct" takes the network's output for x0 (the ablation of the paper's Table IV).
    """
    out = eps(z_T, torch.full((len(z_T),), teacher.T, device=z_T.device), text)
    return out if parameterization == "direct" else (z_T - teacher.sigma[-1] * out) / teacher.alpha[-1]


def scale_values(layer, _, value):
    """Forward hook of a cross-attention's to_v: see reweighted."""
    w = layer.token_weights
    if w is not None:                                   # in a guided batch of 2 B, the unconditional half is left alone
        w = w if len(value) == len(w) else torch.cat([w, torch.ones_like(w)])
        return value * w[..., None].to(value.dtype)


@contextlib.contextmanager
def reweighted(unet, weights):
    """Inside, each token's part in every cross-attention is multiplied by weights (B, tokens); None changes nothing.

    Prompt-to-prompt (arXiv 2208.01626) scales attention probabilities; scaling the token's value is the same and keeps fused
    kernels. The weights are attributes of the layers, which torch.compile watches, if this was entered before it compiled.
    """
    layers = [m.to_v for name, m in unet.named_modules() if name.endswith("attn2")]
    for layer in layers:
        if not hasattr(layer, "token_weights"):
            layer.register_forward_hook(scale_values)
        layer.token_weights = weights
    try:
        yield
    finally:
        for layer in layers:
            layer.token_weights = None


def invert(latents, x0, z_T, steps=30, rate=0.1):
    """Noise (B, 4, h, w) from which latents(z_T), a one-step student, makes something close to x0, and how close (B,).

    Adam on z_T itself; the result stays as wide as noise by itself (measured: 1.00), so that nothing pulls it there.
    Starts with a fifth of x0 in the noise, of which a student's clip is half as far from x0 as of another noise (tiny.control edit).
    """
    z = (0.2 * x0 / x0.std((1, 2, 3), keepdim=True) + 0.98 * z_T).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            error = (latents(z) - x0).square().mean((1, 2, 3))
            z.grad, = torch.autograd.grad(1024 * error.sum(), z)   # Adam does not care, and fp16 would round small ones to zero
            optimizer.step()
    return z.detach(), error.detach()


@torch.no_grad()
def many_steps(eps, z_T, text, null, teacher, steps, guidance):
    """The teacher's own sampling, with its diffusers scheduler: `steps` steps of classifier-free guidance."""
    scheduler = type(teacher.scheduler).from_config(teacher.scheduler.config)
    scheduler.set_timesteps(steps, device=z_T.device)
    x = z_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = guided(eps, scheduler.scale_model_input(x, t), t.expand(len(x)), text, null, guidance)
        x = scheduler.step(out, t, x).prev_sample
    return x
