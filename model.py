"""A text-to-audio model in Auffusion's layout on disk, and the Python API to run it.

    text -> CLIP embedding -> UNet (latents) -> VAE decoder (image of a log-mel) -> vocoder -> audio

    from model import load_student, load_teacher
    system = load_student("out/student")            # or load_teacher("tiny", steps=25)
    wavs = system(["a dog barks"], seed=0)          # (1, N) in [-1, 1] at 16 kHz, as sample.py's

Everything here raises InputError, with one line, where a model or a name is wrong.
"""
import contextlib
import math
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, SpeechT5HifiGan, SpeechT5HifiGanConfig
from transformers.audio_utils import mel_filter_bank

from data import InputError, read_json, require, sampling_noise
from losses import guided, one_step

transformers.utils.logging.disable_progress_bar()       # bars for reading files are noise,
huggingface_hub.utils.enable_progress_bars()            # those for downloading are not
diffusers.logging.set_verbosity_error()                 # it warns of Auffusion's unused EMA keys

TINY = Path(__file__).resolve().parent / "tiny/teacher"
RATE, HOP, WIN, N_FFT = 16000, 160, 1024, 2048          # Auffusion's front end, in samples
LOG_MIN, LOG_MAX = math.log(1e-5), math.log(200)        # log-mels of the image's black and white

# ---- where a model is ----------------------------------------------------------------------------

# What the hub is asked for: settings, then what training reads, then what hearing reads besides.
SETTINGS = ["swiftaudio.json"]
TO_TRAIN = [*SETTINGS, "unet/*", "text_encoder*", "tokenizer/*", "condition_*", "scheduler/*",
            "vae/config.json", "vocoder/config.json"]
TO_HEAR = [*TO_TRAIN, "vae/*", "vocoder/*"]
STUDENT = [*SETTINGS, "config.json", "diffusion_pytorch_model.*", "decoder/*", "unet/*"]


def find(name, files, skip=()):
    """Return the local folder of a model: "tiny", a folder, or a name on the Hugging Face hub.

    files, skip: patterns of what to download of a hub model, and of what to leave out.
    """
    if name == "tiny":
        return TINY
    if Path(name).is_dir():
        return Path(name)
    require(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)),
            f"{name}: no such folder, and not a name on the hub (user/model)")
    skip = ["*.*.safetensors", "*.*.bin", "*checkpoint.pt", *skip]      # and fp16 variants
    try:
        return Path(huggingface_hub.snapshot_download(
            name, allow_patterns=files, ignore_patterns=skip))
    except Exception as e:
        raise InputError(f"{name}: neither a folder here nor available from the hub ({cause(e)}); "
                         "pass a folder")


def cause(error):
    """What a library said went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_settings(folder):
    """Read a folder's own swiftaudio.json, {"seconds": ..., "train": {flag: value}, ...}, or {}."""
    path = Path(folder) / "swiftaudio.json"
    return read_json(path) if path.exists() else {}


def open_student(name):
    """Find a student's UNet: (folder, subfolder, its swiftaudio.json or the like)."""
    require(name != "out/student" or Path(name).exists(), "out/student: no student there yet; "
            "train one (python train.py --teacher tiny) or pass --student")
    folder = find(name, STUDENT)
    if (folder / "swiftaudio.json").exists() and (folder / "config.json").exists():
        about = read_json(folder / "swiftaudio.json")
        require({"teacher", "parameterization"} <= set(about),
                f"{folder}/swiftaudio.json: names no teacher or parameterization")
        return folder, "", about
    require((folder / "unet").is_dir(), f"{name}: neither a student of train.py (config.json and "
            "swiftaudio.json) nor a complete model (unet/, ...)")
    return folder, "unet", {"teacher": name, "parameterization": "eps"}     # the authors' own is so


# ---- where it runs -------------------------------------------------------------------------------

def has_bf16(device):
    """Whether a device computes in bf16 itself: recent GPUs, and CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()          # older torch: unknown
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def sampling_dtype(device):
    """What to sample in: fp16 on a GPU, bf16 on a CPU with instructions for it, else fp32.

    Eq. 1 multiplies an error of eps by 14.6. Tiny student, mean error of the log-mel: fp16 0.006,
    bf16 0.049 (docs/LOG.md, 2026-11-21).
    """
    half = torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.float16 if device.type == "cuda" else half


def pick_device(name=None, exact=False):
    """The device called `name`, or the accelerator that there is, or the CPU.

    Each process of torchrun gets a GPU of its own. exact: fp32 is fp32, not TF32, on it.
    """
    name = name or str(torch.accelerator.current_accelerator(True) or "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if exact:       # cuDNN's convolutions are TF32 by default: 10 bits of mantissa for 23
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: not usable here ({str(e).splitlines()[0]})")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# ---- its parts -----------------------------------------------------------------------------------

def load_part(folder, part, load):
    """Return load(folder / part); whatever goes wrong is one line that names the part."""
    path = Path(folder) / part                          # part "" is the folder itself
    require(path.is_dir(), f"{folder}: lacks {part}/ (README, 'A teacher on disk')")
    try:
        return load(path)
    except InputError:
        raise
    except Exception as e:                              # each library fails in its own way
        raise InputError(f"{path}: cannot be loaded ({cause(e)})")


def pretrained(cls, **kw):
    """Make a loader in fp32 that refuses missing weights, which the libraries leave random."""
    def load(path):
        network, info = cls.from_pretrained(path, output_loading_info=True, **kw)
        missing = sorted(info["missing_keys"])
        require(not missing, f"{path}: lacks {len(missing)} weights, {missing[:1]} for one")
        return network.float().requires_grad_(False).eval()
    return load


def load_unet(folder, part="unet", dtype=torch.float32, fits=None):
    """Load the UNet2DConditionModel of a folder, frozen. fits: the teacher that it must fit."""
    unet = load_part(folder, part, pretrained(UNet2DConditionModel))
    theirs = read_json(fits / "unet/config.json") if fits else {}
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        ours = unet.config[key]
        require(theirs.get(key, ours) == ours, f"the student does not fit its teacher {fits}: "
                f"{key} {ours}, the teacher has {theirs.get(key)}")
    return unet.to(dtype, memory_format=torch.channels_last)


def load_scheduler(folder):
    """Load a folder's diffusers scheduler; InputError where this method cannot use it."""
    found = load_part(folder, "scheduler", lambda path: getattr(diffusers, read_json(
        path / "scheduler_config.json")["_class_name"]).from_pretrained(path))
    kind, alphas = found.config.get("prediction_type"), getattr(found, "alphas_cumprod", [0])
    require(kind == "epsilon" and alphas[-1] > 0, f"{folder}/scheduler: {type(found).__name__}, "
            f"prediction_type {kind}, alpha_T^2 = {float(alphas[-1]):.2g}; only teachers that "
            "predict epsilon are supported, with alpha_T above 0, as eq. 1 divides by it")
    return found


def noise_schedule(scheduler, device="cpu"):
    """alpha and sigma (T + 1,) of eq. 2, x_t = alpha_t x0 + sigma_t eps, for t = 0 .. T."""
    alphas_cumprod = scheduler.alphas_cumprod.double()
    return [x.sqrt().float().to(device) for x in (alphas_cumprod, 1 - alphas_cumprod)]


def latent_shape(folder, seconds=None):
    """Shape (C, h, w) of the latents of a clip, as long as the folder says, else 10.24 s."""
    vae, vocoder = (load_part(folder, part, lambda path: read_json(path / "config.json"))
                    for part in ("vae", "vocoder"))
    seconds = seconds or read_settings(folder).get("seconds", 10.24)
    stride = 2 ** (len(vae["block_out_channels"]) - 1)                  # 8
    width = seconds * RATE / HOP / stride
    require(abs(width - round(width)) < 1e-6, f"--seconds {seconds}: not a multiple of "
            f"{stride * HOP / RATE} s, one column of latents")
    return vae["latent_channels"], vocoder["num_mels"] // stride, round(width)


class TextEncoder(nn.Module):
    """Prompts -> what the UNet attends to, (B, 77, 768). "" is the unconditional prompt."""

    def __init__(self, folder):
        super().__init__()
        encoder, tokenizer, self.adapter = "text_encoder", "tokenizer", None
        conditions = Path(folder) / "condition_config.json"
        if conditions.exists():             # Auffusion's older layout: an adapter behind the text
            listed, names = read_json(conditions), ("text_encoder_name", "condition_adapter_name")
            require(len(listed) == 1 and set(names) <= set(listed[0]),
                    f"{conditions}: must list one {' and one '.join(names)}")
            encoder = tokenizer = listed[0][names[0]]
            self.adapter = load_part(folder, listed[0][names[1]], load_adapter)
        self.tokenizer = load_part(folder, tokenizer, AutoTokenizer.from_pretrained)
        # transformers would otherwise round the weights to the dtype that config.json names
        self.clip = load_part(folder, encoder, pretrained(CLIPTextModel, dtype=torch.float32))
        self.tokens = self.clip.config.max_position_embeddings          # 77

    def tokenize(self, prompts, **kw):
        return self.tokenizer(list(prompts), padding="max_length", max_length=self.tokens,
                              truncation=True, **kw)

    @torch.no_grad()
    def forward(self, prompts):
        tokens = self.tokenize(prompts, return_tensors="pt").to(self.clip.device)
        hidden = self.clip(tokens.input_ids).last_hidden_state
        if self.adapter is None:
            return hidden
        # Attention is causal: zeros behind the last token equal encoding at the natural length.
        text = self.adapter(hidden * tokens.attention_mask[..., None])
        return text * torch.tensor([p != "" for p in prompts], device=text.device)[:, None, None]

    def unread(self, prompts):
        """What is not read of prompts, as {prompt: why}: words past the end, words never seen."""
        tokenizer, found, prompts = self.tokenizer, {}, list(prompts)
        # CLIP's own vocabulary has every word, in pieces; its unk is its end token
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        for prompt, ids in zip(prompts, prompts and tokenizer(prompts, verbose=False)["input_ids"]):
            if len(ids) > self.tokens:
                cut = tokenizer.decode(ids[self.tokens - 1:-1])
                found[prompt] = f"{len(ids)} tokens, {self.tokens} fit; cut: {cut!r}"
            elif unknown & set(ids):
                words = [repr(w) for w in prompt.split() if unknown & set(tokenizer.encode(w))]
                found[prompt] = f"{prompt!r}: the teacher has never seen {', '.join(words)}"
        return found


def load_adapter(path):
    """Load Auffusion's condition adapter: text -> LayerNorm(Linear(text))."""
    state = torch.load(path / "condition_adapter.pt", map_location="cpu", weights_only=True)
    width, dim = state["proj.weight"].shape
    adapter = nn.Sequential(OrderedDict(proj=nn.Linear(dim, width), norm=nn.LayerNorm(width)))
    adapter.load_state_dict(state)
    return adapter.float().requires_grad_(False)


# ---- from latents to sound -----------------------------------------------------------------------

class Decoder(nn.Module):
    """Latents -> log-mel -> waveform: a VAE, or a small decoder in its place, and a vocoder.

    small: folder of a small decoder (recipes/decoder.py). dtype: of the decoder; frozen.
    """

    def __init__(self, folder, dtype=torch.float32, small=None):
        super().__init__()
        self.vae = (load_part(small, "", pretrained(AutoencoderTiny)) if small
                    else load_part(folder, "vae", pretrained(AutoencoderKL)))
        self.vae.to(dtype, memory_format=torch.channels_last)
        # bf16 would leave HiFi-GAN's noise 35 to 46 dB below the signal; fp16 has 3 more bits
        self.vocoder = load_part(folder, "vocoder", load_vocoder)
        self.vocoder.to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_(False)

    @torch.no_grad()
    def decode(self, x0):
        """Latents (B, 4, h, w) -> log-mel (B, num_mels, 8 w) in nepers, row 0 the lowest bin."""
        z = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
        return image_to_mel(self.vae.decode(z).sample)

    @torch.no_grad()
    def vocode(self, mel):
        """Log-mel (B, num_mels, frames) -> waveform (B, frames * HOP) in [-1, 1]."""
        return self.vocoder(mel.transpose(1, 2).to(self.vocoder.dtype)).float()


def image_to_mel(image):
    """The VAE's image (B, channels, mels, frames) in [-1, 1] -> log-mel (B, mels, frames)."""
    brightness = (image[:, 0].float() / 2 + 0.5).clamp(0, 1).flip(1)    # row 0 was the highest
    return brightness * (LOG_MAX - LOG_MIN) + LOG_MIN


def load_vocoder(path):
    """Load a vocoder: log-mels (B, frames, num_mels) -> waveforms (B, frames * HOP) in [-1, 1].

    HiFi-GAN (arXiv 2010.05646) as published, its weight norm folded in: config.json, vocoder.pt
    with {"generator": state_dict}. Or Griffin-Lim: {"num_mels": ..., "griffin_lim": steps}.
    """
    config = read_json(path / "config.json")
    if "griffin_lim" in config:
        return GriffinLim(config["num_mels"], config["griffin_lim"])
    require(str(config["resblock"]) == "1",
            f"{path}/config.json: only HiFi-GAN's resblock 1 is supported")
    try:
        stored = torch.load(path / "vocoder.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}/vocoder.pt: holds more than tensors or is damaged, and was not "
                         "run; get the file anew")

    # transformers has the network under other names, without weight norm
    state = {re.sub(r"^ups\.", "upsampler.", k): v.float() for k, v in stored["generator"].items()}
    for k in [k for k in state if k.endswith("weight_v")]:
        g, v = state.pop(k[:-1] + "g"), state.pop(k)
        state[k[:-2]] = g * F.normalize(v, dim=(1, 2))                  # w = g v / |v|
    sizes = ("upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel",
             "resblock_kernel_sizes", "resblock_dilation_sizes")
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=config["num_mels"], normalize_before=False, **{k: config[k] for k in sizes}))
    for layer in vocoder.upsampler:             # and without Auffusion's odd kernel - rate
        extra = layer.kernel_size[0] - layer.stride[0]
        layer.padding, layer.output_padding = (extra // 2 + extra % 2,), (extra % 2,)
    vocoder.load_state_dict({**state, "mean": vocoder.mean, "scale": vocoder.scale})
    return vocoder.eval()


class GriffinLim(nn.Module):
    """The tiny teacher's vocoder, which needs no training (docs/LOG.md, 2026-11-20, says why).

    Finds phases by Griffin and Lim (1984), with the momentum of Perraudin et al. (2013), in
    `steps` iterations. Log-mel (B, frames, num_mels) -> waveform (B, N).
    """
    dtype = torch.float32

    def __init__(self, num_mels, steps):
        super().__init__()
        self.steps = steps
        bank = mel_filter_bank(N_FFT // 2 + 1, num_mels, 0.0, RATE / 2, RATE, norm="slaney",
                               mel_scale="slaney")
        self.bank = torch.tensor(bank, dtype=torch.float32)     # no buffer: half() would round it

    def forward(self, log_mel):
        bank = self.bank.to(log_mel.device)                             # (F, M)
        mel = log_mel.float().transpose(1, 2).exp()                     # (B, M, T)
        window = torch.hann_window(WIN, device=mel.device)
        magnitude = bank @ mel                                          # (B, F, T)
        for _ in range(30):         # non-negative magnitudes of these mels: NMF's KL updates
            ratio = mel / (bank.T @ magnitude + 1e-8)
            magnitude = magnitude * (bank @ ratio) / (bank.sum(1, keepdim=True) + 1e-8)

        generator = torch.Generator().manual_seed(0)                    # same in any batch
        phase = 2 * math.pi * torch.rand(magnitude.shape[1:], generator=generator)
        spec = torch.polar(magnitude, phase.to(mel.device).expand_as(magnitude))
        before, length = 0, (mel.shape[-1] - 1) * HOP
        for _ in range(self.steps):
            wav = torch.istft(spec, N_FFT, HOP, WIN, window, length=length)
            now = torch.stft(wav, N_FFT, HOP, WIN, window, return_complex=True)
            spec, before = torch.polar(magnitude, (now + 0.99 * (now - before)).angle()), now
        return F.pad(wav, (HOP // 2, HOP // 2)).clamp(-1, 1)


# ---- sampling ------------------------------------------------------------------------------------

def denoiser(unet, autocast=None):
    """A UNet as losses.py sees it: eps(x_t, t, text) of x_t (B, 4, h, w) and t (B,), in fp32."""
    dtype = next(unet.parameters()).dtype

    def eps(x, t, text):
        with autocast or contextlib.nullcontext():
            return unet(x.to(dtype), t, text.to(dtype)).sample.float()

    return eps


def steps_of(scheduler, steps, device="cpu"):
    """A fresh scheduler set to `steps`; InputError where it would not start from noise."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    first = int(scheduler.timesteps[0])                 # "leading": 501 for 2 steps
    require(first >= 0.9 * len(scheduler.alphas_cumprod), f"{steps} steps: this teacher's "
            f"scheduler would start at t = {first}, where x_t is not yet noise; ask for more, or 1")
    return scheduler


def many_steps(eps, z_T, text, scheduler, steps):
    """The teacher's own sampling with its scheduler; eps is guided. One step is eq. 1."""
    if steps == 1:
        return one_step(eps, z_T, text, *noise_schedule(scheduler, z_T.device))
    scheduler = steps_of(scheduler, steps, z_T.device)
    x = z_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = eps(scheduler.scale_model_input(x, t), t.expand(len(x)), text)
        x = scheduler.step(out, t, x).prev_sample
    return x


class System:
    """A text-to-audio model from prompts to sound, made by load_student() or load_teacher().

    These set latents(z_T, text), what its UNet does in one step or many, differentiable in z_T.
    Has encode_text, decoder, unet, shape (C, h, w) of the latents, seconds, and about, a dict that
    says which system it is. seconds, small: see latent_shape() and Decoder.
    """

    def __init__(self, folder, unet, about, seconds, precision, device, small=None):
        require(precision in ("auto", "fp32"), f"precision {precision!r}: is auto or fp32")
        self.device = device = pick_device(device, exact=precision == "fp32")
        dtype = sampling_dtype(device) if precision == "auto" else torch.float32
        self.folder, self.about = folder, {**about, "dtype": str(dtype)}
        self.seconds = seconds or read_settings(folder).get("seconds", 10.24)
        self.shape = latent_shape(folder, self.seconds)
        self.encode_text = TextEncoder(folder).to(device)
        self.decoder = Decoder(folder, dtype, small).to(device)
        self.scheduler = load_scheduler(folder)
        self.unet = unet.to(device, dtype)
        self.eps, self.null = denoiser(unet), self.encode_text([""])

    def noise(self, numbers, seed):
        """z_T (B, C, h, w) of clips with these numbers, the k of sample.py, on the device."""
        return sampling_noise(numbers, seed, self.shape).to(self.device)

    @torch.no_grad()
    def make(self, prompts, z_T):
        """Make log-mels (B, num_mels, frames) and waveforms (B, N) of prompts, on the CPU."""
        mel = self.decoder.decode(self.latents(z_T, self.encode_text(prompts)))
        require(mel.isfinite().all(), f"{self.about}: makes clips that are not finite; is it "
                "damaged, or did its training diverge?")
        return mel.cpu(), self.decoder.vocode(mel).cpu().numpy()

    def __call__(self, prompts, seed=0, k=0):
        """Waveforms (B, N) in [-1, 1] at RATE, clip k of each prompt: numpy, as in sample.py."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.make(prompts, self.noise([k] * len(prompts), seed))[1]


def load_student(name="out/student", teacher=None, seconds=None, decoder="vae", precision="auto",
                 device=None):
    """Load a one-step student: a folder of train.py, or a complete model (folder or hub name).

    teacher: if not the student's own. seconds: length of a clip. decoder "fast": the small one that
    recipes/decoder.py made for it. precision "fp32" in place of the device's fastest.
    """
    require(decoder in ("vae", "fast"), f"decoder {decoder!r}: is vae or fast")
    folder, part, made = open_student(name)
    small = folder / "decoder" if decoder == "fast" else None
    require(small is None or (small / "config.json").exists(),
            f"{small}: not there; make it: python -m recipes.decoder --student {name}")
    try:
        home = find(teacher or made["teacher"], TO_HEAR, skip=["unet/diffusion*"])
    except InputError as e:                             # it may name another machine's folder
        raise InputError(f"the teacher of {name}, {e}; pass --teacher")
    about = {"student": str(name), "folder": str(folder / part), "steps": 1}
    unet = load_unet(folder, part, fits=home)
    system = System(home, unet, {**about, "decoder": str(small)} if small else about,
                    seconds or made.get("seconds"), precision, device, small)
    alpha, sigma = noise_schedule(system.scheduler, system.device)
    system.latents = lambda z_T, text: one_step(system.eps, z_T, text, alpha, sigma,
                                                made["parameterization"], made.get("timestep"))
    return system


def load_teacher(name, steps, guidance=None, seconds=None, precision="auto", device=None):
    """Load a teacher, "tiny", a folder or a hub name, to sample in so many steps.

    guidance: None takes the one that its folder names, else 7.5.
    """
    require(1 <= steps <= 1000, f"steps {steps}: must be between 1 and 1000")
    folder = find(name, TO_HEAR)
    if guidance is None:
        guidance = read_settings(folder).get("sample", {}).get("guidance", 7.5)
    about = {"teacher": str(folder), "steps": steps, "guidance": guidance}
    system = System(folder, load_unet(folder), about, seconds, precision, device)
    if steps > 1:
        steps_of(system.scheduler, steps)               # refuses too few
    eps = guided(system.eps, system.null, guidance)
    system.latents = lambda z_T, text: many_steps(eps, z_T, text, system.scheduler, steps)
    return system
