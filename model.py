"""A text-to-audio model in Auffusion's layout on disk, and the Python API to run it.

    text -> CLIP embedding -> UNet (latents) -> VAE decoder (image of a log-mel) -> vocoder -> audio
"""
import contextlib
import math
import os
import runpy
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

from data import InputError, read_json, require, sampling_noise
from losses import one_step

transformers.utils.logging.disable_progress_bar()       # bars for reading files are noise,
huggingface_hub.utils.enable_progress_bars()            # those for downloading are not
diffusers.logging.set_verbosity_error()                 # it warns of Auffusion's unused EMA keys

TINY = Path(__file__).resolve().parent / "tiny/teacher"
RATE, HOP = 16000, 160                                  # Auffusion's mel frames, in samples
LOG_MIN, LOG_MAX = math.log(1e-5), math.log(200)        # log-mels of the image's black and white

# ---- where a model is, and where it runs ---------------------------------------------------------
# What the hub is asked for: settings, then what training reads, then what hearing reads besides.
SETTINGS = ["swiftaudio.json"]
TO_TRAIN = [*SETTINGS, "unet/*", "text_encoder*", "tokenizer/*", "condition_*", "scheduler/*",
            "vae/config.json", "vocoder/config.json"]
TO_HEAR = [*TO_TRAIN, "vae/*", "vocoder/*"]
STUDENT = [*SETTINGS, "config.json", "diffusion_pytorch_model.*", "decoder/*", "vocoder/*",
           "unet/*"]


def find(name, files, skip=()):
    """The folder of a model: "tiny", a folder, or a hub name (files, skip: what to download)."""
    path = TINY if name == "tiny" else Path(name)
    if path.is_dir():
        return path
    skip = ["*.*.safetensors", "*.*.bin", "*checkpoint.pt", *skip]      # and fp16 variants
    try:
        return Path(huggingface_hub.snapshot_download(
            str(name), allow_patterns=files, ignore_patterns=skip))
    except Exception as e:
        raise InputError(f"{name}: no such folder, nor found on the hub ({cause(e)}); pass another,"
                         " as --teacher if it is a student's teacher")


def cause(error):
    """What a library said went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_settings(folder):
    """Read a folder's own swiftaudio.json, {"seconds": ..., "train": {flag: value}, ...}, or {}."""
    path = Path(folder) / "swiftaudio.json"
    found = read_json(path) if path.exists() else {}
    fine = isinstance(found, dict) and isinstance(found.get("seconds", 0), (int, float))
    require(fine, f"{path}: must be an object, {{...}}, its seconds a number")
    return found


def open_student(name):
    """Find a student's UNet: (folder, subfolder, its swiftaudio.json with local paths, or {})."""
    require(name != "out/student" or Path(name).exists(), "out/student: no student there yet; "
            "train one (python train.py --teacher tiny) or pass --student")
    folder = find(name, STUDENT)
    about, beside = read_settings(folder), folder.resolve().parent / "paths.json"
    require("teacher" in about or (folder / "unet").is_dir(), f"{name}: neither a student of "
            "train.py (swiftaudio.json, ...) nor a complete model (unet/, ...)")
    if "teacher" not in about:
        return folder, "unet", {}
    return folder, "", about | (read_json(beside) if beside.exists() else {})


def small_parts(folder):
    """The small parts of recipes/ in a student's folder: {"decoder": path, "vocoder": path}."""
    # a complete model's vocoder is its teacher's
    kinds = ["decoder", "vocoder"][:1 if (folder / "unet").is_dir() else 2]
    return {k: str(folder / k) for k in kinds if (folder / k / "config.json").exists()}


def has_bf16(device):
    """Whether a device computes in bf16 itself: recent GPUs, and CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()          # older torch: unknown
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def sampling_dtype(device):
    """What to sample in: fp16 on a GPU, bf16 on a CPU with instructions for it, else fp32."""
    half = torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.float16 if device.type == "cuda" else half     # bf16's error is 8 times as large


def pick_device(name=None, exact=False):
    """The device called `name`, or the accelerator that there is, or the CPU; exact: no TF32."""
    name = name or str(torch.accelerator.current_accelerator(True) or "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:   # one for each process of torchrun
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
def load_part(path, load):
    """Return load(path) of a part's folder, or InputError with the path."""
    require(path.is_dir(), f"{path}: is missing (docs/REPRODUCE.md)")
    try:
        return load(path)
    except Exception as e:                              # each library fails in its own way
        raise InputError(f"{path}: cannot be loaded ({hidden(path) or cause(e)})")


def hidden(path):
    """What a library's message does not say of a folder that it could not load, or None."""
    for file in filter(Path.is_file, sorted(path.rglob("*"))):
        if not os.access(file, os.R_OK):
            return f"{file.name}: permission denied"
        if file.open("rb").read(12) == b"version http":
            return f"{file.name} is Git LFS's pointer to the file; git lfs pull brings it"
        if ".fp16." in file.name and not Path(str(file).replace(".fp16", "")).exists():
            return f"its weights are in fp16 only, {file.name}; rename it without .fp16"


def pretrained(cls, **kw):
    """Make a loader in fp32 that refuses missing weights, which the libraries leave random."""
    def load(path):
        network, info = cls.from_pretrained(path, output_loading_info=True, **kw)
        require(not info["missing_keys"], f"lacks weights, {sorted(info['missing_keys'])[:3]}")
        return network.float().requires_grad_(False).eval()
    return load


def load_unet(folder, part="unet"):
    """Load the UNet2DConditionModel of a folder, frozen."""
    unet = load_part(Path(folder, part), pretrained(diffusers.UNet2DConditionModel))
    return unet.to(memory_format=torch.channels_last)


# Settings of UNet and VAE that ask for what this method does not do.
UNKNOWN = ("class_embed_type num_class_embeds time_cond_proj_dim addition_embed_type "
           "encoder_hid_dim encoder_hid_dim_type shift_factor latents_mean latents_std").split()


def check_fit(folder, unet, encode_text):
    """InputError unless a teacher's parts and `unet`, its own or a student's, fit each other."""
    vae, vocoder = (read_json(Path(folder) / part / "config.json") for part in ("vae", "vocoder"))
    hop = math.prod(vocoder.get("upsample_rates", [vocoder.get("hop_size", HOP)]))
    found = {"sampling_rate": RATE, **vae, **vocoder, **unet.config, "upsample_rates": hop}
    needed = dict.fromkeys(("in_channels", "out_channels"), vae["latent_channels"])
    needed |= {"cross_attention_dim": encode_text.dim, "upsample_rates": HOP,
               "sampling_rate": RATE, **dict.fromkeys(UNKNOWN)}
    for key, fits in needed.items():
        require(found.get(key) == fits, f"{folder}: its parts, or a student, do not fit: {key} is "
                f"{found.get(key)}, where the others, or this method, need {fits!r}")


def load_scheduler(folder):
    """Load a folder's diffusers scheduler; InputError where this method cannot use it."""
    found = load_part(Path(folder, "scheduler"), lambda path: getattr(diffusers, read_json(
        path / "scheduler_config.json")["_class_name"]).from_pretrained(path))
    kind, alphas = found.config.get("prediction_type"), getattr(found, "alphas_cumprod", [0])
    require(kind == "epsilon" and alphas[-1] > 0, f"{folder}/scheduler: {type(found).__name__}, "
            f"prediction_type {kind}, alpha_T^2 = {alphas[-1]:.2g}; eq. 1 needs epsilon, above 0")
    return found


def noise_schedule(scheduler, device="cpu"):
    """alpha and sigma (T + 1,) of eq. 2, x_t = alpha_t x0 + sigma_t eps, for t = 0 .. T."""
    alphas_cumprod = scheduler.alphas_cumprod.double()
    return [x.sqrt().float().to(device) for x in (alphas_cumprod, 1 - alphas_cumprod)]


def latent_shape(folder, seconds=None):
    """Shape (C, h, w) of the latents of a clip, as long as the folder says, else 10.24 s."""
    vae, vocoder = (read_json(Path(folder) / part / "config.json") for part in ("vae", "vocoder"))
    seconds = seconds or read_settings(folder).get("seconds", 10.24)
    stride = 2 ** (len(vae["block_out_channels"]) - 1)                  # 8
    width = round(seconds * RATE / HOP / stride, 6)
    require(width % 1 == 0, f"--seconds {seconds}: not a multiple of {stride * HOP / RATE}")
    return vae["latent_channels"], vocoder["num_mels"] // stride, int(width)


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
            self.adapter = load_part(Path(folder, listed[0][names[1]]), load_adapter)
        self.tokenizer = load_part(Path(folder, tokenizer), AutoTokenizer.from_pretrained)
        # transformers would otherwise round the weights to the dtype that config.json names
        self.clip = load_part(Path(folder, encoder), pretrained(CLIPTextModel, dtype=torch.float32))
        self.tokens = self.clip.config.max_position_embeddings          # 77
        n, most, pad = len(self.tokenizer), self.clip.config.vocab_size, self.tokenizer.pad_token
        require(pad and n <= most, f"{folder}: its tokenizer has {n} tokens and pad_token {pad}; "
                f"needed are a pad_token, and at most the {most} tokens of its text encoder")
        self.dim = self.adapter.proj.out_features if self.adapter else self.clip.config.hidden_size

    def tokenize(self, prompts, cut=True, **kw):
        """Tokens of prompts, each of self.tokens or, with cut=False, as many as it has."""
        bad = [p for p in prompts if p != p.encode(errors="replace").decode()]
        require(not bad, f"{bad[:1]}: holds half a character, or bytes not in UTF-8; correct it")
        fit = dict(padding="max_length", max_length=self.tokens, truncation=True) if cut else {}
        return self.tokenizer(list(prompts), **fit, **kw)

    def forward(self, prompts):
        tokens = self.tokenize(prompts, return_tensors="pt").to(self.clip.device)
        hidden = self.clip(tokens.input_ids).last_hidden_state
        if self.adapter is None:
            return hidden
        # Attention is causal: zeros behind the last token equal encoding at the natural length.
        text = self.adapter(hidden * tokens.attention_mask[..., None])
        return text * torch.tensor([p != "" for p in prompts], device=text.device)[:, None, None]

    def unread(self, prompts):
        """What is not read of prompts, {prompt: why}: cut or unseen words. InputError: no UTF-8."""
        tokenizer, found, prompts = self.tokenizer, {}, list(prompts)
        # CLIP's own vocabulary has every word, in pieces; its unk is its end token
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        tokens = prompts and self.tokenize(prompts, cut=False, verbose=False)["input_ids"]
        for prompt, ids in zip(prompts, tokens):
            if len(ids) > self.tokens:
                found[prompt] = f"{prompt[:80]!r}: {len(ids)} tokens, {self.tokens} fit"
            elif unknown & set(ids):
                words = str([w for w in prompt.split() if unknown & set(tokenizer.encode(w))])
                found[prompt] = f"{prompt[:80]!r}: the teacher has never seen {words[1:-1][:200]}"
        return found


def load_adapter(path):
    """Load Auffusion's condition adapter: text -> LayerNorm(Linear(text))."""
    state = torch.load(path / "condition_adapter.pt", map_location="cpu", weights_only=True)
    (width, dim), adapter = state["proj.weight"].shape, nn.Sequential()
    adapter.proj, adapter.norm = nn.Linear(dim, width), nn.LayerNorm(width)
    adapter.load_state_dict(state)
    return adapter.float().requires_grad_(False)


# ---- from latents to sound -----------------------------------------------------------------------
class Decoder(nn.Module):
    """Latents -> log-mel -> waveform: VAE and vocoder, or the small_parts() in their place."""

    def __init__(self, folder, dtype=torch.float32, small={}):
        super().__init__()
        kind = diffusers.AutoencoderTiny if "decoder" in small else diffusers.AutoencoderKL
        self.vae = load_part(Path(small.get("decoder", f"{folder}/vae")), pretrained(kind))
        self.vae.to(dtype, memory_format=torch.channels_last)
        # bf16 would leave HiFi-GAN's noise 35 to 46 dB below the signal; fp16 has 3 more bits
        self.vocoder = load_part(Path(small.get("vocoder", f"{folder}/vocoder")), load_vocoder)
        self.vocoder.to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_(False)

    def decode(self, x0):
        """Latents (B, 4, h, w) -> log-mel (B, num_mels, 8 w) in nepers, row 0 the lowest bin."""
        z = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
        return image_to_mel(self.vae.decode(z).sample)

    def vocode(self, mel):
        """Log-mel (B, num_mels, frames) -> waveform (B, frames * HOP) in [-1, 1]."""
        return self.vocoder(mel.transpose(1, 2).to(self.vocoder.dtype)).float()


def image_to_mel(image):
    """The VAE's image (B, channels, mels, frames) in [-1, 1] -> log-mel (B, mels, frames)."""
    brightness = (image[:, 0].float() / 2 + 0.5).clamp(0, 1).flip(1)    # row 0 was the highest
    return brightness * (LOG_MAX - LOG_MIN) + LOG_MIN


def load_vocoder(path):
    """Load a vocoder: log-mels (B, frames, num_mels) -> waveforms (B, frames * HOP) in [-1, 1]."""
    config = read_json(path / "config.json")
    if "resblock" not in config:                        # no model brings code: ours has it
        return runpy.run_path(TINY / "vocoder/vocoders.py")["load"](path, config)
    stored = torch.load(path / "vocoder.pt", map_location="cpu", weights_only=True)["generator"]
    # transformers has HiFi-GAN (arXiv 2010.05646) under other names, without weight norm
    state = {k.replace("ups.", "upsampler."): v.float() for k, v in stored.items()}
    for k in [k for k in state if k.endswith("weight_v")]:
        g, v = state.pop(k[:-1] + "g"), state.pop(k)
        state[k[:-2]] = g * (v / v.norm(dim=(1, 2), keepdim=True))      # w = g v / |v|
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=config["num_mels"], normalize_before=False, **config))
    for layer in vocoder.upsampler:             # and without Auffusion's odd kernel - rate
        extra = layer.kernel_size[0] - layer.stride[0]
        layer.padding, layer.output_padding = (extra // 2 + extra % 2,), (extra % 2,)
    vocoder.load_state_dict({**state, "mean": vocoder.mean, "scale": vocoder.scale})
    return vocoder.eval()


# ---- sampling ------------------------------------------------------------------------------------
def denoiser(unet, autocast=None):
    """A UNet as losses.py sees it: eps(x_t, t, text) of x_t (B, 4, h, w) and t (B,), in fp32."""
    dtype = next(unet.parameters()).dtype

    def eps(x, t, text):
        with autocast or contextlib.nullcontext():
            return unet(x.to(dtype), t, text.to(dtype)).sample.float()
    return eps


class System:
    """A text-to-audio model from prompts to sound, in one step from t (T, if t is None).

    Has encode_text, decoder, unet, eps, shape (C, h, w), seconds and about: which system it is.
    """

    def __init__(self, folder, unet, about, seconds=None, precision="auto", device=None, t=None,
                 small={}):
        self.device = device = pick_device(device, exact=precision == "fp32")
        dtype = {"auto": sampling_dtype(device), "fp32": torch.float32}[precision]
        self.folder, self.about = folder, {**about, "dtype": str(dtype)}
        self.seconds = seconds or read_settings(folder).get("seconds", 10.24)
        self.shape = latent_shape(folder, self.seconds)
        self.encode_text = TextEncoder(folder).to(device)
        check_fit(folder, unet, self.encode_text)
        self.decoder = Decoder(folder, dtype, small).to(device)
        self.unet = unet.to(device, dtype)
        self.scheduler, self.t, self.eps = load_scheduler(folder), t, denoiser(unet)
        self.schedule = noise_schedule(self.scheduler, device)

    def latents(self, z_T, text):
        """Latents x0 (B, C, h, w) of noise z_T and text (B, tokens, dim), differentiable in z_T."""
        return one_step(self.eps, z_T, text, *self.schedule, self.t)

    def noise(self, numbers, seed):
        """z_T (B, C, h, w) of clips with these numbers, the k of sample.py, on the device."""
        return sampling_noise(numbers, seed, self.shape).to(self.device)

    @torch.no_grad()
    def make(self, prompts, z_T):
        """Make log-mels (B, num_mels, frames) and waveforms (B, N) of prompts, on the CPU."""
        mel = self.decoder.decode(self.latents(z_T, self.encode_text(prompts)))
        require(mel.isfinite().all(), f"{self.about}: not finite; did its training diverge?")
        return mel.cpu(), self.decoder.vocode(mel).cpu().numpy()

    def __call__(self, prompts, seed=0, k=0):
        """Make clip k of each prompt, k + 1 where it comes again: waveforms (B, N), numpy."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        numbers = [k + prompts[:i].count(prompt) for i, prompt in enumerate(prompts)]
        return self.make(prompts, self.noise(numbers, seed))[1]


def load_student(name="out/student", teacher=None, seconds=None, decoder="vae", precision="auto",
                 device=None):
    """Load a one-step student or a complete model (folder, hub name); "fast": its small_parts()."""
    folder, part, made = open_student(name)
    small = {"vae": {}, "fast": small_parts(folder)}[decoder]
    require(small or decoder == "vae", f"{folder}: no small decoder or vocoder; recipes/ make them")
    home = find(teacher or made.get("teacher", name), TO_HEAR, skip=["unet/diffusion*"])
    about = {"student": str(Path(name)), "folder": str(folder / part), "steps": 1}
    return System(home, load_unet(folder, part), about | small, seconds, precision,
                  device, made.get("timestep"), small)
