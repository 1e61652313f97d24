"""Build the tiny world from nothing: captions, classifier and a teacher in Auffusion's layout.

    python tiny/make.py                   # everything, about an hour and a half on 2 CPU cores
    python tiny/make.py --stage teacher   # some of: data, vae, classifier, decoder, decoder2,
                                          # teacher, again, settings, and what the three
                                          # held-out lists are scored by: first, second, third

Intermediate data (spectrograms of the rendered clips and their latents, about 2 GB) goes to
tiny/build. Each stage reads what the ones before it wrote.
"""
import csv
import functools
import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Parser, cli, replace_file
from extras.audio import log_mel, mel_to_image
from extras.metrics import Classifier, load_classifier
from recipes.decoder import decoder_loss, energy
from tiny import score, world
from tiny.score import HERE

SEED, CLIPS, MELS = 0, 30000, 64
BUILD, TEACHER = HERE / "build", HERE / "teacher"
# A quarter less time on a CPU that has it; the weights stay fp32.
BF16 = torch.autocast("cpu", torch.bfloat16)

# The tiny teacher's own defaults, which train.py and sample.py read from its folder; docs/LOG.md
# says how they were found.
SETTINGS = {
    "seconds": world.SECONDS,
    "sample": {"guidance": 2.0},
    "train": {
        "captions": "../captions.csv", "max_steps": 480, "batch_size": 16, "grad_accum": 1,
        "lr": 2e-4, "lora_lr": 2e-3, "warmup": 20, "beta1": 0.5, "beta2": 0.99,
        "weight_decay": 0.0, "decay": True, "ema": 0.98, "guidance": 2.0, "lora_guidance": 1.0,
        "lora_weighting": "v", "lora_rank": 16, "lora_alpha": 16.0, "lora_targets": "all",
        "tv": "none", "save_every": 100, "keep_every": 0,
    },
    "decoder": {                # of recipes/decoder.py: a quarter of the VAE decoder's arithmetic
        "out_channels": 1, "decoder_block_out_channels": [16] * 4,
        "num_decoder_blocks": [8, 6, 2, 0],
    },
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# ---- what the stages share ---------------------------------------------------------------------

def clip(index, descriptions, seed):
    """Render clip `index` of a list: its spectrogram's image (64, 256), its labels as 0 and 1."""
    _, events, join = descriptions[index]
    wav, labels = world.render(np.random.default_rng((seed, index)), events, join)
    image = mel_to_image(log_mel(torch.from_numpy(wav)[None], MELS))[0, 0]
    return image.half().numpy(), np.isin(np.arange(len(world.LABELS)), labels)


def render(name, descriptions, seed):
    """Write the clips' images (n, 64, 256) as NAME_images.npy, labels as NAME_labels.npy."""
    one = functools.partial(clip, descriptions=descriptions, seed=seed)
    count = len(descriptions)
    with multiprocessing.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        images, labels = zip(*tqdm(pool.imap(one, range(count), 64), total=count, desc=name))
    np.save(BUILD / f"{name}_images.npy", np.stack(images))
    np.save(BUILD / f"{name}_labels.npy", np.stack(labels))


def write_json(path, content, **kw):
    path.write_text(json.dumps(content, **kw) + "\n")


def load(name, what):
    return torch.from_numpy(np.load(BUILD / f"{name}_{what}.npy"))


def as_rgb(images):
    """Images (n, 64, frames) as the VAE takes them: (n, 3, 64, frames) in fp32."""
    return images.float()[:, None].expand(-1, 3, -1, -1)


def fit(name, params, steps, lr, loss_of_step, after=lambda step: None):
    """Minimise loss_of_step(step) with AdamW, calling after(step) behind each.

    The rate has 50 steps of linear warm-up, then falls to zero by half a cosine.
    """
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    bar, mean = tqdm(range(steps), desc=name, mininterval=2), None
    for step in bar:
        warm, cosine = min(1, (step + 1) / 50), 0.5 * (1 + np.cos(np.pi * step / steps))
        opt.param_groups[0]["lr"] = lr * warm * cosine
        loss = loss_of_step(step)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        after(step)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)


# ---- the stages --------------------------------------------------------------------------------

def stage_data():
    train, held = world.captions(SEED)
    for name, rows in (("captions.csv", train), ("heldout.csv", held)):
        with open(HERE / name, "w", newline="") as f:
            csv.writer(f).writerows([("caption",)] + [(text,) for text, _, _ in rows])
    BUILD.mkdir(exist_ok=True)
    # seeds that no scored clip has
    render("teacher", world.clips(CLIPS, True, SEED), SEED + 1000)
    render("classifier", world.clips(CLIPS // 3, False, SEED), SEED + 2000)


def stage_vae(steps=1200, size=32):
    images = load("teacher", "images")
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16, 24, 48, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=MELS, mid_block_add_attention=False)
    vae = vae.to(memory_format=torch.channels_last)

    def loss(step):
        rng = np.random.default_rng((SEED, 2, step))
        rows, starts = rng.integers(CLIPS, size=size), rng.integers(0, 129, size)
        x = as_rgb(torch.stack([images[i, :, j:j + 128] for i, j in zip(rows, starts)]))
        x = x.contiguous(memory_format=torch.channels_last)
        with BF16:
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        return decoder_loss(y, x) + kl

    fit("vae", list(vae.parameters()), steps, 2e-3, loss)
    with torch.no_grad():
        stats = [vae.encode(as_rgb(part).contiguous()).latent_dist
                 for part in tqdm(images.split(64), desc="latents")]
        mean, std = torch.cat([s.mean for s in stats]), torch.cat([s.std for s in stats])
    scale = 1 / float((mean.var() + std.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=round(scale, 4))
    vae.half().save_pretrained(TEACHER / "vae")
    np.save(BUILD / "teacher_latents.npy", torch.stack([mean, std]).half().numpy())


def stage_decoder(cycle=0, steps=800, size=16):
    """Go on with the decoder alone, which is cheaper: latents, and so the teacher, stay as is."""
    images, (mean, std) = load("teacher", "images"), load("teacher", "latents")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(TEACHER / "vae").float()
    vae = vae.to(memory_format=torch.channels_last)

    def loss(step):
        rng = np.random.default_rng((SEED, 5 + 5 * cycle, step))
        rows, starts = rng.integers(CLIPS, size=size), rng.integers(0, 17, size)
        places = list(zip(rows, starts))
        x = torch.stack([images[i, :, 8 * j:8 * j + 128] for i, j in places])[:, None].float()
        m, s = (torch.stack([part[i, :, :, j:j + 16] for i, j in places]).float()
                for part in (mean, std))
        z = m + s * torch.from_numpy(rng.standard_normal(m.shape)).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.8 * steps):
            y = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()
        return decoder_loss(y, x, 0.3)

    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    fit("decoder", params, steps, 1e-3, loss)
    vae.half().save_pretrained(TEACHER / "vae")


def stage_classifier(steps=2500, size=48, returned=5000):
    """Train on clips of any pair, as rendered and as the VAE returns them: to hear only events."""
    images = torch.cat([load("classifier", "images"), load("teacher", "images")])
    labels = torch.cat([load("classifier", "labels"), load("teacher", "labels")])
    vae = AutoencoderKL.from_pretrained(TEACHER / "vae").float()
    x = [energy(part[:, None]) for part in images.split(500)]
    with torch.no_grad(), BF16:
        for part in tqdm(images[:returned].split(50), desc="returned"):
            z = vae.encode(as_rgb(part).contiguous()).latent_dist.sample()
            x.append(energy(vae.decode(z).sample))
    x, y = torch.cat(x).float(), torch.cat([labels, labels[:returned]]).float()
    torch.manual_seed(SEED)
    net = Classifier(len(world.LABELS))

    def loss(step):
        rng = np.random.default_rng((SEED, 1, step))
        rendered = rng.integers(len(images), size=size // 2)
        back = len(images) + rng.integers(returned, size=size // 2)
        i = torch.from_numpy(np.concatenate([rendered, back]))
        noise = rng.random((size, 1, 1)) * rng.standard_normal(x[i].shape)
        noise = 0.3 * torch.from_numpy(noise).float()
        embedding, _ = net.of_blocks(x[i] + noise)
        return F.binary_cross_entropy_with_logits(net.head(F.dropout(embedding, 0.3)), y[i])

    fit("classifier", list(net.parameters()), steps, 3e-3, loss)
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(state, HERE / "classifier.safetensors")


def make_tokenizer(texts):
    """A tokenizer of the captions' words, padded to 24 tokens; other words become <unk>."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    words = sorted({w for t in texts for w in t.split()})
    vocabulary = {w: i for i, w in enumerate(special + words)}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")])
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, model_max_length=24, padding_side="right", pad_token="<pad>",
        unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def stage_teacher(steps=4000, lr=1.5e-3, again=False, size=64):
    """Train text encoder and UNet together.

    again: go on, with t more often high, where it is decided what sounds, and how often.
    """
    mean, std = load("teacher", "latents").float()
    scale = AutoencoderKL.load_config(TEACHER / "vae")["scaling_factor"]
    texts = [text for text, _, _ in world.clips(CLIPS, True, SEED)]
    tokenizer = make_tokenizer(texts)
    ids = tokenizer(texts + [""], padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(SEED)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, projection_dim=128, bos_token_id=2,
        eos_token_id=3, pad_token_id=0))
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
    if again:
        unet = UNet2DConditionModel.from_pretrained(TEACHER / "unet").float()
        text = CLIPTextModel.from_pretrained(TEACHER / "text_encoder").float()
    unet = unet.to(memory_format=torch.channels_last)
    # Stable Diffusion's noise schedule, as in Auffusion; DDIM with trailing spacing, so that few
    # steps start at t = 999 too
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing")
    alphas = scheduler.alphas_cumprod
    params = list(unet.parameters()) + list(text.parameters())
    ema = [p.detach().clone() for p in params]

    def loss(step):
        rng = np.random.default_rng((SEED, 6 if again else 4, step))
        i = torch.from_numpy(rng.integers(CLIPS, size=size))
        dropped = torch.from_numpy(rng.random(size) < 0.1)                  # unconditional
        caption = torch.where(dropped, len(texts), i)
        g = torch.Generator().manual_seed(step + 10 ** 6 * again)
        x0 = scale * (mean[i] + std[i] * torch.randn(mean[i].shape, generator=g))
        eps = torch.randn(x0.shape, generator=g)
        if again:
            t = (1000 * torch.rand(size, generator=g).sqrt()).long()
        else:
            t = torch.randint(1000, (size,), generator=g)
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.8 * steps):     # then fp32
            out = unet(x, t, text(ids[caption]).last_hidden_state).sample.float()
        # 1 / alpha_t^2 makes this the loss of v: plain eps-MSE leaves t = 999, where the student
        # starts, untrained
        return ((out - eps).square() / a).mean()

    def after(step):
        torch._foreach_lerp_(ema, [p.detach() for p in params], max(1 / (step + 2), 0.004))

    fit("teacher", params, steps, lr, loss, after)
    for p, e in zip(params, ema):
        p.data.copy_(e)
    unet.half().save_pretrained(TEACHER / "unet")
    # the names of published CLIP models: transformers 5.0 reads no others
    state = {f"text_model.{name}": w for name, w in text.half().state_dict().items()}
    text.save_pretrained(TEACHER / "text_encoder", state_dict=state)
    tokenizer.save_pretrained(TEACHER / "tokenizer")
    scheduler.save_pretrained(TEACHER / "scheduler")


def stage_settings():
    for path in (TEACHER / "unet/config.json", TEACHER / "vae/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)       # diffusers notes the folder it loaded from
        write_json(path, config, indent=2)
    write_json(TEACHER / "swiftaudio.json", SETTINGS, indent=2)
    (TEACHER / "vocoder").mkdir(exist_ok=True)
    write_json(TEACHER / "vocoder/config.json", {"num_mels": MELS, "griffin_lim": 32})
    write_json(TEACHER / "model_index.json", MODEL_INDEX, indent=2)


def stage_baselines(name, seeds):
    """Write what scoring by a held-out list needs and no student changes, behind earlier lists'."""
    rows, classifier = score.held_out(512, name), load_classifier()
    clips = score.generate(score.load_teacher(score.STEPS), rows, "the teacher's reference",
                           score.TEACHER_SEED)
    real, made = (score.features(classifier, mels)
                  for mels in (score.real(rows, score.REFERENCE), clips))
    heard = {"embeddings": real[0].half(), "logits": real[1].half(), "teacher": made[0].half()}
    path, start = HERE / "reference.safetensors", rows[0][0]
    before = load_file(path) if start else heard
    heard = {key: torch.cat([before[key][:start], x]) for key, x in heard.items()}
    replace_file(path, lambda tmp: save_file(heard, tmp))

    table, path = score.baselines(rows, seeds), HERE / "baselines.json"
    floors = [score.FLOOR + seed for seed in seeds]
    content = json.loads(path.read_text()) if start else {
        "N": len(rows), "noise_seeds": seeds,
        "render_seeds": {"reference": score.REFERENCE, score.FLOOR_ROW: floors}}
    write_json(path, {**content, f"{name} list" if start else "systems": table}, indent=2)
    print(score.show(table, len(rows)))


STAGES = {
    "data": stage_data,
    "vae": stage_vae,
    "classifier": stage_classifier,
    "decoder": stage_decoder,
    "decoder2": functools.partial(stage_decoder, 1),
    "teacher": stage_teacher,
    "again": functools.partial(stage_teacher, 2000, 7e-4, True),
    "settings": stage_settings,
    "first": functools.partial(stage_baselines, "first", (0, 1, 2)),
    "second": functools.partial(stage_baselines, "second", (0,)),
    "third": functools.partial(stage_baselines, "third", (0,)),
}


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="some of them")
    for name in p.parse_args(argv).stage:
        start = time.time()
        STAGES[name]()
        print(f"{name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    cli(main)
