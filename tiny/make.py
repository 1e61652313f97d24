"""Build a world from nothing: captions, classifier and a teacher in Auffusion's layout.

    python -m tiny.make                     # the tiny world, an hour and a half on 2 CPU cores
    python -m tiny.make --stage teacher     # some of: data, vae, classifier, decoder, decoder2,
                                            # teacher, again, baselines
    python -m tiny.make --sounds ESC-10 --out FOLDER    # recordings (tiny/recorded.py says which)

Intermediate data (spectrograms of the rendered clips and their latents, about 2 GB) goes to build/.
Each stage reads what the ones before it wrote, and from tiny/teacher what the networks look like;
after a stop give --stage those that are left, and the one that trained goes on from its last save.
swiftaudio.json of the teacher, its own defaults, was found as docs/LOG.md says. A teacher of
recordings starts from the tiny one's weights.
"""
import csv
import functools
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from data import Parser, cli, replace_file, replace_text, require
from extras.audio import distance, log_mel, mel_to_image, spectra
from extras.metrics import Classifier
from model import TINY, has_bf16, image_to_mel, load_scheduler
from recipes.decoder import decoder_loss, energy
from recipes.vocoder import new_vocoder
from tiny import score, world
from tiny.recorded import EVENTS, Recordings
from train import save_network

SEED, MELS = 0, 64
# A quarter less time on a CPU that has it, more on others; the weights stay fp32.
FAST = has_bf16(torch.device("cpu"))
BF16 = torch.autocast("cpu", torch.bfloat16, enabled=FAST)


# ---- what the stages share ---------------------------------------------------------------------

def clip(index, source, descriptions, seed):
    """Render clip `index` of a list: its spectrogram's image (64, 256), its labels as 0 and 1."""
    wav, labels = source.clip(descriptions, index, seed)
    image = mel_to_image(log_mel(torch.from_numpy(wav)[None], MELS))[0, 0]
    return image.half().numpy(), np.isin(np.arange(len(source.labels)), labels)


def render(source, name, descriptions, seed):
    """Write the clips' images (n, 64, 256) as NAME_images.npy, labels as NAME_labels.npy."""
    one = functools.partial(clip, source=source, descriptions=descriptions, seed=seed)
    count = len(descriptions)
    with multiprocessing.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        images, labels = zip(*tqdm(pool.imap(one, range(count), 64), total=count, desc=name))
    np.save(source.build / f"{name}_images.npy", np.stack(images))
    np.save(source.build / f"{name}_labels.npy", np.stack(labels))


def load(source, name, what):
    return torch.from_numpy(np.load(source.build / f"{name}_{what}.npy"))


def as_rgb(images):
    """Images (n, 64, frames) as the VAE takes them: (n, 3, 64, frames) in fp32."""
    return images.float()[:, None].expand(-1, 3, -1, -1)


def roughness_loss(images, targets):
    """L1 of how rough images (B, 1, mels, frames) are: of the deviation in bars and in squares."""
    x, loss = F.pad(torch.cat([images, targets]), (2, 2, 2, 2), "replicate"), 0
    for bar in ((1, 8), (8, 1), (4, 4)):
        variance = F.avg_pool2d(x * x, bar, 2) - F.avg_pool2d(x, bar, 2).square()
        loss = loss + F.l1_loss(*variance.clamp(min=1e-5).sqrt().chunk(2)) / 3
    return loss


def fit(source, name, params, steps, lr, loss_of_step, after=lambda step: None, kept=()):
    """Minimise loss_of_step(step) with AdamW, calling after(step) after each.

    The rate has 50 steps of linear warm-up, then falls to zero by half a cosine. Parameters and the
    tensors `kept` are saved each three minutes and in the end, and read if saved before.
    """
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    path, first, saved = source.build / f"{name}.pt", 0, time.time()
    tensors = [*(p.detach() for p in params), *kept]
    if path.exists():
        first, before, state = torch.load(path)
        torch._foreach_copy_(tensors, before)
        opt.load_state_dict(state)
    for step in (bar := tqdm(range(first, steps), desc=name, mininterval=2)):
        warm, cosine = min(1, (step + 1) / 50), 0.5 * (1 + np.cos(np.pi * step / steps))
        opt.param_groups[0]["lr"] = float(lr * warm * cosine)       # torch.load refuses numpy
        loss = loss_of_step(step)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        after(step)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.time() > saved + 180 or step + 1 == steps:
            state, saved = (step + 1, tensors, opt.state_dict()), time.time()
            replace_file(path, functools.partial(torch.save, state))


# ---- the stages --------------------------------------------------------------------------------

def stage_data(source):
    source.build.mkdir(parents=True, exist_ok=True)
    train, held = source.captions()
    for name, rows in (("captions.csv", train), ("heldout.csv", held)):
        with open(source.home / name, "w", newline="") as f:
            csv.writer(f).writerows([("caption",)] + [(text,) for text, _, _ in rows])
    render(source, "teacher", source.clips(source.number), SEED + 1000)
    if not isinstance(source, Recordings):
        render(source, "classifier", source.clips(source.number // 3, False), SEED + 2000)
        return
    shutil.copytree(TINY, source.teacher, dirs_exist_ok=True)
    settings = (TINY / "swiftaudio.json").read_text().replace("../captions.csv", "captions.csv")
    replace_text(source.teacher / "swiftaudio.json", settings)


def stage_vae(source, steps=1200, size=32, lr=2e-3, rough=0.0):
    images = load(source, "teacher", "images")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(TINY / "vae"))
    if isinstance(source, Recordings):
        vae = AutoencoderKL.from_pretrained(TINY / "vae").float()

    def loss(step):
        rng = np.random.default_rng((SEED, 2, step))
        rows, starts = rng.integers(source.number, size=size), rng.integers(0, 129, size)
        x = as_rgb(torch.stack([images[i, :, j:j + 128] for i, j in zip(rows, starts)]))
        with BF16:
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        return decoder_loss(y, x) + rough * roughness_loss(y[:, :1], x[:, :1]) + kl

    fit(source, "vae", list(vae.parameters()), steps, lr, loss)
    with torch.no_grad():
        stats = [vae.encode(as_rgb(part)).latent_dist
                 for part in tqdm(images.split(64), desc="latents")]
        mean, std = torch.cat([s.mean for s in stats]), torch.cat([s.std for s in stats])
    scale = 1 / float((mean.var() + std.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=round(scale, 4))
    save_network(source.teacher / "vae", vae.half(), vae.state_dict())
    np.save(source.build / "teacher_latents.npy", torch.stack([mean, std]).half().numpy())


def stage_decoder(source, cycle=0, steps=800, size=16):
    """Go on with the decoder alone, which is cheaper: latents, and so the teacher, stay as is."""
    images, (mean, std) = load(source, "teacher", "images"), load(source, "teacher", "latents")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(source.teacher / "vae").float()

    def loss(step):
        rng = np.random.default_rng((SEED, 5 + 5 * cycle, step))
        rows, starts = rng.integers(source.number, size=size), rng.integers(0, 17, size)
        places = list(zip(rows, starts))
        x = torch.stack([images[i, :, 8 * j:8 * j + 128] for i, j in places])[:, None].float()
        m, s = (torch.stack([part[i, :, :, j:j + 16] for i, j in places]).float()
                for part in (mean, std))
        z = m + s * torch.from_numpy(rng.standard_normal(m.shape)).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST and step < 0.8 * steps):
            y = vae.decode(z).sample.float()
        return decoder_loss(y, x, 0.3)

    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    fit(source, "decoder2" if cycle else "decoder", params, steps, 1e-3, loss)
    save_network(source.teacher / "vae", vae.half(), vae.state_dict())


def stage_classifier(source, steps=2500, size=48, returned=5000):
    """Train on clips of any pair, as rendered and as the VAE returns them: to hear only events."""
    images = torch.cat([load(source, "classifier", "images"), load(source, "teacher", "images")])
    labels = torch.cat([load(source, "classifier", "labels"), load(source, "teacher", "labels")])
    vae = AutoencoderKL.from_pretrained(source.teacher / "vae").float()
    x = [energy(part[:, None]) for part in images.split(500)]
    with torch.no_grad(), BF16:
        for part in tqdm(images[:returned].split(50), desc="returned"):
            z = vae.encode(as_rgb(part)).latent_dist.sample()
            x.append(energy(vae.decode(z).sample))
    x, y = torch.cat(x).float(), torch.cat([labels, labels[:returned]]).float()
    torch.manual_seed(SEED)
    net = Classifier(len(source.labels))

    def loss(step):
        rng = np.random.default_rng((SEED, 1, step))
        rendered = rng.integers(len(images), size=size // 2)
        back = len(images) + rng.integers(returned, size=size // 2)
        i = np.concatenate([rendered, back])
        noise = 0.3 * rng.random((size, 1, 1)) * rng.standard_normal(x[i].shape)
        embedding, _ = net.of_blocks(x[i] + torch.from_numpy(noise).float())
        return F.binary_cross_entropy_with_logits(net.head(F.dropout(embedding, 0.3)), y[i])

    fit(source, "classifier", list(net.parameters()), steps, 3e-3, loss, kept=[*net.buffers()])
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(state, source.home / "classifier.safetensors")


def stage_vocoder(source, steps, size=3, lr=1e-3):
    """Train a vocoder on log-mels that went through the VAE.

    Many sounds fit a mel that the VAE blurred, and a vocoder that regresses learns their mean, of
    rain a hum. Ours takes noise and learns to sample, by the energy distance of spectra (arXiv
    2008.01160): |x - y| - |x - x'| / 2, of two of its samples x, x' and a recording y, is least
    when all are of one distribution.
    """
    clips, folder = source.clips(source.number), source.teacher / "vocoder"
    latents = np.load(source.build / "teacher_latents.npy", mmap_mode="r")
    vae = AutoencoderKL.from_pretrained(source.teacher / "vae").float().requires_grad_(False)
    torch.manual_seed(SEED)
    net, config = new_vocoder(MELS, dict(width=192, hidden=512, blocks=6), noise=True)

    def loss(step):
        rng = np.random.default_rng((SEED, 7, step))
        rows = rng.integers(source.number, size=size)
        normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32))
        mean, std = torch.from_numpy(latents[:, rows]).float()
        mel = image_to_mel(vae.decode(mean + std * normal(*mean.shape)).sample).mT
        wav = torch.from_numpy(np.stack([source.clip(clips, i)[0] for i in rows]))
        made = [net(mel, normal(size, mel.shape[1], 2 * net.bins)) for _ in range(2)]
        x, other, y = map(spectra, (*made, wav))
        return (distance(x, y) + distance(other, y) - distance(x, other)) / 2

    fit(source, "vocoder", list(net.parameters()), steps, lr, loss)
    (folder / "vocoders.py").unlink(missing_ok=True)
    save_file(net.half().state_dict(), folder / "model.safetensors")
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


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


def stage_teacher(source, steps=4000, lr=1.5e-3, again=False, size=64):
    """Train text encoder and UNet together.

    again: go on, with t more often high, where it is decided what sounds, and how often.
    """
    mean, std = load(source, "teacher", "latents").float()
    scale = AutoencoderKL.load_config(source.teacher / "vae")["scaling_factor"]
    texts, events, _ = zip(*source.clips(source.number))
    heard = np.flatnonzero([not {e for e, _, _ in es} & {*source.without} for es in events])
    tokenizer = make_tokenizer(texts)
    ids = tokenizer([*texts, ""], padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(SEED)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(
        TINY / "text_encoder", vocab_size=len(tokenizer))).float()
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "unet"))
    if again or isinstance(source, Recordings):
        start = source.teacher if again else TINY
        unet = UNet2DConditionModel.from_pretrained(start / "unet").float()
        reader = source.teacher if source.without else start    # it knows the words, as CLIP does
        text = CLIPTextModel.from_pretrained(reader / "text_encoder").float()
        known = PreTrainedTokenizerFast.from_pretrained(reader / "tokenizer").get_vocab()
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        rows = [known.get(word, known["<unk>"]) for word in words]      # where a new word starts
        table = text.get_input_embeddings().weight.detach()[rows]
        text.set_input_embeddings(torch.nn.Embedding.from_pretrained(table, freeze=False))
        text.config.vocab_size = len(rows)
    alphas = load_scheduler(TINY).alphas_cumprod
    params = [*unet.parameters(), *(() if source.without else text.parameters())]
    ema = [p.detach().clone() for p in params]

    def loss(step):
        rng = np.random.default_rng((SEED, 6 if again else 4, step))
        i = torch.from_numpy(heard[rng.integers(len(heard), size=size)])
        dropped = torch.from_numpy(rng.random(size) < 0.1)                  # unconditional
        caption = torch.where(dropped, len(texts), i)
        g = torch.Generator().manual_seed(step + 10 ** 6 * again)
        x0 = scale * (mean[i] + std[i] * torch.randn(mean[i].shape, generator=g))
        eps = torch.randn(x0.shape, generator=g)
        u = torch.rand(size, generator=g)
        t = (1000 * (u.sqrt() if again else u)).long()
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST and step < 0.8 * steps):
            out = unet(x, t, text(ids[caption]).last_hidden_state).sample.float()
        # 1 / alpha_t^2 makes this the loss of v: plain eps-MSE leaves t = 999, where the student
        # starts, untrained
        return ((out - eps).square() / a).mean()

    def after(step):
        torch._foreach_lerp_(ema, [p.detach() for p in params], max(1 / (step + 2), 0.004))

    fit(source, "again" if again else "teacher", params, steps, lr, loss, after, ema)
    for p, e in zip(params, ema):
        p.data.copy_(e)
    save_network(source.teacher / "unet", unet.half(), unet.state_dict())
    text.half().save_pretrained(source.teacher / "text_encoder")
    tokenizer.save_pretrained(source.teacher / "tokenizer")


# stage: (function, its settings for the tiny world, for recordings), None where there is none
STAGES = {
    "data": (stage_data, {}, {}),
    "vae": (stage_vae, {}, dict(steps=1600, size=8, lr=1e-3, rough=1.0)),
    "classifier": (stage_classifier, {}, None),
    "decoder": (stage_decoder, {}, None),
    "decoder2": (stage_decoder, dict(cycle=1), None),
    "vocoder": (stage_vocoder, None, dict(steps=1000)),
    "teacher": (stage_teacher, {}, dict(steps=1200, lr=1e-3, size=32)),
    "again": (stage_teacher, dict(steps=2000, lr=7e-4, again=True),
              dict(steps=800, lr=7e-4, again=True, size=32)),
    "baselines": (lambda source: score.write_baselines(source.home), {}, None),
}


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES), help="some of them")
    p.add_argument("--sounds", type=Path, help="folder of recordings, in place of the synthesis")
    p.add_argument("--out", type=Path, default="out/recorded", help="for the teacher of recordings")
    p.add_argument("--without", choices=EVENTS, nargs="*", default=[],
                   help="events of --sounds that the UNet is not trained on")
    args = p.parse_args(argv)
    require(args.sounds and "data" not in args.stage or not args.without,       # it knows all words
            "--without goes with --sounds, a copy of a finished world and --stage teacher again")
    source = Recordings(args.sounds, home=args.out) if args.sounds else world.SYNTHESIS
    source.without = args.without
    for name in args.stage:
        function, *settings = STAGES[name]
        how = settings[isinstance(source, Recordings)]
        if how is not None:
            start = time.time()
            function(source, **how)
            (source.build / f"{name}.pt").unlink(missing_ok=True)
            print(f"{name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    cli(main)
