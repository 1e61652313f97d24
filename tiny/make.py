"""Build the tiny world from nothing: captions, classifier and a teacher in Auffusion's layout.

    python -m tiny.make                     # everything, about an hour and a half on 2 CPU cores
    python -m tiny.make --stage teacher     # some of: data, vae, classifier, decoder, decoder2,
                                            # teacher, again, baselines

Intermediate data (spectrograms of the rendered clips and their latents, about 2 GB) goes to
tiny/build. Each stage reads what the ones before it wrote, and from tiny/teacher what the networks
look like. swiftaudio.json there, the teacher's own defaults, was found as docs/LOG.md says.
"""
import csv
import functools
import json
import multiprocessing
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from data import Parser, cli, replace_file, replace_text
from extras.audio import log_mel, mel_to_image
from extras.metrics import Classifier, load_classifier
from model import load_scheduler, read_settings
from recipes.decoder import decoder_loss, energy
from tiny import score, world
from tiny.score import HERE

SEED, CLIPS, MELS = 0, 30000, 64
BUILD, TEACHER = HERE / "build", HERE / "teacher"
# A quarter less time on a CPU that has it; the weights stay fp32.
BF16 = torch.autocast("cpu", torch.bfloat16)


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


def save(network, name):
    """Write a network of the teacher in fp16, without the folder that diffusers loaded it from."""
    network.half().save_pretrained(TEACHER / name)
    path = TEACHER / name / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def load(name, what):
    return torch.from_numpy(np.load(BUILD / f"{name}_{what}.npy"))


def as_rgb(images):
    """Images (n, 64, frames) as the VAE takes them: (n, 3, 64, frames) in fp32."""
    return images.float()[:, None].expand(-1, 3, -1, -1)


def fit(name, params, steps, lr, loss_of_step, after=lambda step: None):
    """Minimise loss_of_step(step) with AdamW, calling after(step) after each.

    The rate has 50 steps of linear warm-up, then falls to zero by half a cosine.
    """
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    for step in (bar := tqdm(range(steps), desc=name, mininterval=2)):
        warm, cosine = min(1, (step + 1) / 50), 0.5 * (1 + np.cos(np.pi * step / steps))
        opt.param_groups[0]["lr"] = lr * warm * cosine
        loss = loss_of_step(step)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        after(step)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


# ---- the stages --------------------------------------------------------------------------------

def stage_data():
    train, held = world.captions()
    for name, rows in (("captions.csv", train), ("heldout.csv", held)):
        with open(HERE / name, "w", newline="") as f:
            csv.writer(f).writerows([("caption",)] + [(text,) for text, _, _ in rows])
    BUILD.mkdir(exist_ok=True)
    # seeds that no scored clip has
    render("teacher", world.clips(CLIPS, True), SEED + 1000)
    render("classifier", world.clips(CLIPS // 3, False), SEED + 2000)


def stage_vae(steps=1200, size=32):
    images = load("teacher", "images")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(TEACHER / "vae"))

    def loss(step):
        rng = np.random.default_rng((SEED, 2, step))
        rows, starts = rng.integers(CLIPS, size=size), rng.integers(0, 129, size)
        x = as_rgb(torch.stack([images[i, :, j:j + 128] for i, j in zip(rows, starts)]))
        with BF16:
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        return decoder_loss(y, x) + kl

    fit("vae", list(vae.parameters()), steps, 2e-3, loss)
    with torch.no_grad():
        stats = [vae.encode(as_rgb(part)).latent_dist
                 for part in tqdm(images.split(64), desc="latents")]
        mean, std = torch.cat([s.mean for s in stats]), torch.cat([s.std for s in stats])
    scale = 1 / float((mean.var() + std.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=round(scale, 4))
    save(vae, "vae")
    np.save(BUILD / "teacher_latents.npy", torch.stack([mean, std]).half().numpy())


def stage_decoder(cycle=0, steps=800, size=16):
    """Go on with the decoder alone, which is cheaper: latents, and so the teacher, stay as is."""
    images, (mean, std) = load("teacher", "images"), load("teacher", "latents")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(TEACHER / "vae").float()

    def loss(step):
        rng = np.random.default_rng((SEED, 5 + 5 * cycle, step))
        rows, starts = rng.integers(CLIPS, size=size), rng.integers(0, 17, size)
        places = list(zip(rows, starts))
        x = torch.stack([images[i, :, 8 * j:8 * j + 128] for i, j in places])[:, None].float()
        m, s = (torch.stack([part[i, :, :, j:j + 16] for i, j in places]).float()
                for part in (mean, std))
        z = m + s * torch.from_numpy(rng.standard_normal(m.shape)).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.8 * steps):
            y = vae.decode(z).sample.float()
        return decoder_loss(y, x, 0.3)

    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    fit("decoder", params, steps, 1e-3, loss)
    save(vae, "vae")


def stage_classifier(steps=2500, size=48, returned=5000):
    """Train on clips of any pair, as rendered and as the VAE returns them: to hear only events."""
    images = torch.cat([load("classifier", "images"), load("teacher", "images")])
    labels = torch.cat([load("classifier", "labels"), load("teacher", "labels")])
    vae = AutoencoderKL.from_pretrained(TEACHER / "vae").float()
    x = [energy(part[:, None]) for part in images.split(500)]
    with torch.no_grad(), BF16:
        for part in tqdm(images[:returned].split(50), desc="returned"):
            z = vae.encode(as_rgb(part)).latent_dist.sample()
            x.append(energy(vae.decode(z).sample))
    x, y = torch.cat(x).float(), torch.cat([labels, labels[:returned]]).float()
    torch.manual_seed(SEED)
    net = Classifier(len(world.LABELS))

    def loss(step):
        rng = np.random.default_rng((SEED, 1, step))
        rendered = rng.integers(len(images), size=size // 2)
        back = len(images) + rng.integers(returned, size=size // 2)
        i = np.concatenate([rendered, back])
        noise = 0.3 * rng.random((size, 1, 1)) * rng.standard_normal(x[i].shape)
        embedding, _ = net.of_blocks(x[i] + torch.from_numpy(noise).float())
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
    texts = [text for text, _, _ in world.clips(CLIPS, True)]
    tokenizer = make_tokenizer(texts)
    ids = tokenizer(texts + [""], padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(SEED)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(
        TEACHER / "text_encoder", vocab_size=len(tokenizer))).float()
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TEACHER / "unet"))
    if again:
        unet = UNet2DConditionModel.from_pretrained(TEACHER / "unet").float()
        text = CLIPTextModel.from_pretrained(TEACHER / "text_encoder").float()
    alphas = load_scheduler(TEACHER).alphas_cumprod
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
        u = torch.rand(size, generator=g)
        t = (1000 * (u.sqrt() if again else u)).long()
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
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
    save(unet, "unet")
    # the names of published CLIP models: transformers 5.0 reads no others
    state = {f"text_model.{name.removeprefix('text_model.')}": w
             for name, w in text.half().state_dict().items()}           # earlier ones name them so
    text.save_pretrained(TEACHER / "text_encoder", state_dict=state)
    tokenizer.save_pretrained(TEACHER / "tokenizer")


def stage_baselines():
    """Write what scoring needs and no student changes: of all held-out lists."""
    classifier, heard, seeds = load_classifier(), [], [0, 1, 2]
    t = read_settings(TEACHER)["train"]["student_t"]
    content = {"N": 512, "noise_seeds": seeds, "student_t": t, "render_seeds": {
        "reference": score.REFERENCE, score.FLOOR_ROW: [score.FLOOR + seed for seed in seeds]}}
    lists = {name: score.held_out(512, name) for name in world.LISTS}
    for name, rows in lists.items():
        clips = score.generate(score.load_teacher(score.STEPS), rows, f"reference, {name} list",
                               score.TEACHER_SEED)
        real, made = (score.features(classifier, mels)
                      for mels in (score.real(rows, score.REFERENCE), clips))
        heard.append({"embeddings": real[0], "logits": real[1], "teacher": made[0]})
    heard = {key: torch.cat([part[key] for part in heard]).half() for key in heard[0]}
    replace_file(HERE / "reference.safetensors", lambda path: save_file(heard, path))
    for name, rows in lists.items():
        first = name == "first"                             # which results are reported by
        table = score.baselines(rows, seeds if first else seeds[:1], t)
        content["systems" if first else f"{name} list"] = table
        print(score.show(table, len(rows)))
    replace_text(HERE / "baselines.json", json.dumps(content, indent=2) + "\n")


STAGES = {
    "data": stage_data,
    "vae": stage_vae,
    "classifier": stage_classifier,
    "decoder": stage_decoder,
    "decoder2": functools.partial(stage_decoder, cycle=1),
    "teacher": stage_teacher,
    "again": functools.partial(stage_teacher, steps=2000, lr=7e-4, again=True),
    "baselines": stage_baselines,
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
