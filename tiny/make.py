"""Build the tiny world from nothing: captions, classifier and a teacher in Auffusion's layout.

    python -m tiny.make                     # everything, about an hour and a half on 2 CPU cores
    python -m tiny.make --stage teacher     # some of: data, vae, classifier, decoder, decoder2,
                                            # teacher, again, baselines
    python -m tiny.make --sounds ESC-10 --out FOLDER        # a teacher of recordings

Intermediate data (spectrograms of the rendered clips and their latents, about 2 GB) goes to
tiny/build. Each stage reads what the ones before it wrote, and from tiny/teacher what the networks
look like. swiftaudio.json there, the teacher's own defaults, was found as docs/LOG.md says.

With --sounds (tiny/recorded.py says which) a whole teacher goes to FOLDER, with its captions. Its
networks start from tiny/teacher's, and it gets a vocoder of its own (tiny/vocoder.py). A training
that was stopped goes on where it last saved, each three minutes.
"""
import csv
import functools
import json
import multiprocessing
import shutil
import time
from dataclasses import dataclass
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
from extras.audio import log_mel, mel_to_image
from extras.metrics import Classifier, load_classifier
from model import TINY, TextEncoder, has_bf16, load_scheduler, read_settings
from recipes.decoder import decoder_loss, energy
from tiny import score, vocoder, world
from tiny.recorded import Recordings
from tiny.score import HERE

SEED, MELS = 0, 64


def bf16(wanted=True):
    """A quarter less time on a CPU that has it, more on others; the weights stay fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and has_bf16(torch.device("cpu")))


@dataclass
class Plan:
    """A teacher to be made: of which source's clips, into which folders, from which weights."""
    source: world.World
    home: Path                                  # for captions.csv and heldout.csv
    teacher: Path
    clips: int
    warm: bool = False                          # start from the shipped teacher
    seed: int = SEED + 1000                     # of the clips: no scored clip has it

    @property
    def build(self):
        return self.home / "build"

    def load(self, name, what):
        return torch.from_numpy(np.load(self.build / f"{name}_{what}.npy"))

    def save(self, network, name):
        """Write a network in fp16, without the folder that diffusers loaded it from."""
        network.half().save_pretrained(self.teacher / name)
        path = self.teacher / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


SHIPPED = Plan(world.SYNTHESIS, HERE, TINY, 30000)


# ---- what the stages share ---------------------------------------------------------------------

def clip(index):
    """Render clip `index` of a list: its spectrogram's image (64, 256), its labels as 0 and 1."""
    source, descriptions, seed = clip.of
    wav, labels = source.clip(descriptions, index, seed)
    image = mel_to_image(log_mel(torch.from_numpy(wav)[None], MELS))[0, 0]
    return image.half().numpy(), np.isin(np.arange(len(source.labels)), labels)


def begin(*of):
    """Tell a process what clip() renders of: a source goes to each once, not with each clip."""
    torch.set_num_threads(1)
    clip.of = of


def render(plan, name, descriptions, seed):
    """Write the clips' images (n, 64, 256) as NAME_images.npy, labels as NAME_labels.npy."""
    count = len(descriptions)
    with multiprocessing.Pool(initializer=begin,
                              initargs=(plan.source, descriptions, seed)) as pool:
        images, labels = zip(*tqdm(pool.imap(clip, range(count), 64), total=count, desc=name))
    np.save(plan.build / f"{name}_images.npy", np.stack(images))
    np.save(plan.build / f"{name}_labels.npy", np.stack(labels))


def as_rgb(images):
    """Images (n, 64, frames) as the VAE takes them: (n, 3, 64, frames) in fp32."""
    return images.float()[:, None].expand(-1, 3, -1, -1)


def texture(image):
    """How rough an image (B, 1, mels, frames) is: its deviation in bars along each axis."""
    x = F.pad(image, (2, 2, 2, 2), "replicate")
    for bar in ((1, 8), (8, 1), (4, 4)):
        variance = F.avg_pool2d(x * x, bar, 2) - F.avg_pool2d(x, bar, 2).square()
        yield variance.clamp(min=1e-5).sqrt()


def image_loss(image, target, weight=0.1, rough=0.0):
    """recipes.decoder's loss, and `rough` times the L1 of textures, else blurred where noisy."""
    loss = decoder_loss(image, target, weight)
    if rough:
        pairs = zip(texture(image[:, :1]), texture(target[:, :1]))
        loss = loss + rough * sum(F.l1_loss(ours, theirs) for ours, theirs in pairs) / 3
    return loss


def fit(path, params, steps, lr, loss_of_step, after=lambda step: None, ema=()):
    """Minimise loss_of_step(step) with AdamW, calling after(step) after each.

    The rate has 50 steps of linear warm-up, then falls to zero by half a cosine. The state is saved
    to `path` each three minutes, and read from there; in the end the file is removed.
    """
    opt = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    first, saved, kept = 0, time.time(), [p.detach() for p in params] + list(ema)
    if path.exists():
        first, tensors, state = torch.load(path)
        torch._foreach_copy_(kept, tensors)
        opt.load_state_dict(state)
    for step in (bar := tqdm(range(first, steps), desc=path.stem, mininterval=2)):
        warm, cosine = min(1, (step + 1) / 50), 0.5 * (1 + np.cos(np.pi * step / steps))
        opt.param_groups[0]["lr"] = lr * warm * cosine
        loss = loss_of_step(step)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        after(step)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if time.time() - saved > 180:
            state, saved = (step + 1, kept, opt.state_dict()), time.time()
            replace_file(path, lambda temporary: torch.save(state, temporary))
    path.unlink(missing_ok=True)


# ---- the stages --------------------------------------------------------------------------------

def stage_data(plan):
    plan.build.mkdir(parents=True, exist_ok=True)
    train, held = plan.source.captions()
    for name, rows in (("captions.csv", train), ("heldout.csv", held)):
        with open(plan.home / name, "w", newline="") as f:
            csv.writer(f).writerows([("caption",)] + [(text,) for text, _, _ in rows])
    if plan.warm:
        shutil.copytree(TINY, plan.teacher, dirs_exist_ok=True)
        settings = read_settings(TINY)
        settings["train"]["captions"] = "captions.csv"
        replace_text(plan.teacher / "swiftaudio.json", json.dumps(settings, indent=2) + "\n")
    render(plan, "teacher", plan.source.clips(plan.clips, True), plan.seed)
    if not plan.warm:
        render(plan, "classifier", plan.source.clips(plan.clips // 3, False), plan.seed + 1000)


def stage_vae(plan, steps=1200, size=32, lr=2e-3, rough=0.0):
    images = plan.load("teacher", "images")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(TINY / "vae"))
    if plan.warm:
        vae = AutoencoderKL.from_pretrained(TINY / "vae").float()

    def loss(step):
        rng = np.random.default_rng((SEED, 2, step))
        rows, starts = rng.integers(plan.clips, size=size), rng.integers(0, 129, size)
        x = as_rgb(torch.stack([images[i, :, j:j + 128] for i, j in zip(rows, starts)]))
        with bf16():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        kl = 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        return image_loss(y, x, rough=rough) + kl

    fit(plan.build / "vae.pt", list(vae.parameters()), steps, lr, loss)
    plan.save(vae, "vae")
    vae.float()
    with torch.no_grad():
        stats = [vae.encode(as_rgb(part)).latent_dist
                 for part in tqdm(images.split(64), desc="latents")]
        mean, std = torch.cat([s.mean for s in stats]), torch.cat([s.std for s in stats])
    scale = 1 / float((mean.var() + std.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=round(scale, 4))
    plan.save(vae, "vae")
    np.save(plan.build / "teacher_latents.npy", torch.stack([mean, std]).half().numpy())


def stage_decoder(plan, cycle=0, steps=800, size=16, rough=0.0):
    """Go on with the decoder alone, which is cheaper: latents, and so the teacher, stay as is."""
    images, (mean, std) = plan.load("teacher", "images"), plan.load("teacher", "latents")
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(plan.teacher / "vae").float()

    def loss(step):
        rng = np.random.default_rng((SEED, 5 + 5 * cycle, step))
        rows, starts = rng.integers(plan.clips, size=size), rng.integers(0, 17, size)
        places = list(zip(rows, starts))
        x = torch.stack([images[i, :, 8 * j:8 * j + 128] for i, j in places])[:, None].float()
        m, s = (torch.stack([part[i, :, :, j:j + 16] for i, j in places]).float()
                for part in (mean, std))
        z = m + s * torch.from_numpy(rng.standard_normal(m.shape)).float()
        with bf16(step < 0.8 * steps):
            y = vae.decode(z).sample.float()
        return image_loss(y, x, 0.3, rough)

    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    fit(plan.build / f"decoder{cycle}.pt", params, steps, 1e-3, loss)
    plan.save(vae, "vae")


def stage_classifier(plan, steps=2500, size=48, returned=5000):
    """Train on clips of any pair, as rendered and as the VAE returns them: to hear only events."""
    images = torch.cat([plan.load("classifier", "images"), plan.load("teacher", "images")])
    labels = torch.cat([plan.load("classifier", "labels"), plan.load("teacher", "labels")])
    vae = AutoencoderKL.from_pretrained(plan.teacher / "vae").float()
    x = [energy(part[:, None]) for part in images.split(500)]
    with torch.no_grad(), bf16():
        for part in tqdm(images[:returned].split(50), desc="returned"):
            z = vae.encode(as_rgb(part)).latent_dist.sample()
            x.append(energy(vae.decode(z).sample))
    x, y = torch.cat(x).float(), torch.cat([labels, labels[:returned]]).float()
    torch.manual_seed(SEED)
    net = Classifier(len(plan.source.labels))

    def loss(step):
        rng = np.random.default_rng((SEED, 1, step))
        rendered = rng.integers(len(images), size=size // 2)
        back = len(images) + rng.integers(returned, size=size // 2)
        i = np.concatenate([rendered, back])
        noise = 0.3 * rng.random((size, 1, 1)) * rng.standard_normal(x[i].shape)
        embedding, _ = net.of_blocks(x[i] + torch.from_numpy(noise).float())
        return F.binary_cross_entropy_with_logits(net.head(F.dropout(embedding, 0.3)), y[i])

    fit(plan.build / "classifier.pt", list(net.parameters()), steps, 3e-3, loss)
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(state, plan.home / "classifier.safetensors")


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


def new_words(text, old, new):
    """Give a text encoder the words of another tokenizer: known ones keep their embedding."""
    table = text.get_input_embeddings()
    known, mean = table.weight.data, table.weight.data.mean(0)
    rows = torch.stack([known[old[word]] if word in old else mean + 0.02 * torch.randn(len(mean))
                        for word in sorted(new, key=new.get)])
    text.resize_token_embeddings(len(new))
    text.get_input_embeddings().weight.data.copy_(rows)


def stage_teacher(plan, steps=4000, lr=1.5e-3, again=False, size=64):
    """Train text encoder and UNet together.

    again: go on, with t more often high, where it is decided what sounds, and how often.
    """
    mean, std = plan.load("teacher", "latents").float()
    scale = AutoencoderKL.load_config(plan.teacher / "vae")["scaling_factor"]
    texts = [text for text, _, _ in plan.source.clips(plan.clips, True)]
    tokenizer = make_tokenizer(texts)
    ids = tokenizer(texts + [""], padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(SEED)
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(
        TINY / "text_encoder", vocab_size=len(tokenizer))).float()
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY / "unet"))
    if again or plan.warm:
        start = plan.teacher if again else TINY
        unet = UNet2DConditionModel.from_pretrained(start / "unet").float()
        text = CLIPTextModel.from_pretrained(start / "text_encoder").float()
    if plan.warm and not again:
        new_words(text, TextEncoder(TINY).tokenizer.get_vocab(), tokenizer.get_vocab())
    alphas = load_scheduler(TINY).alphas_cumprod
    params = list(unet.parameters()) + list(text.parameters())
    ema = [p.detach().clone() for p in params]

    def loss(step):
        rng = np.random.default_rng((SEED, 6 if again else 4, step))
        i = torch.from_numpy(rng.integers(plan.clips, size=size))
        dropped = torch.from_numpy(rng.random(size) < 0.1)                  # unconditional
        caption = torch.where(dropped, len(texts), i)
        g = torch.Generator().manual_seed(step + 10 ** 6 * again)
        x0 = scale * (mean[i] + std[i] * torch.randn(mean[i].shape, generator=g))
        eps = torch.randn(x0.shape, generator=g)
        u = torch.rand(size, generator=g)
        t = (1000 * (u.sqrt() if again else u)).long()
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        with bf16(step < 0.8 * steps):                                      # then fp32
            out = unet(x, t, text(ids[caption]).last_hidden_state).sample.float()
        # 1 / alpha_t^2 makes this the loss of v: plain eps-MSE leaves t = 999, where the student
        # starts, untrained
        return ((out - eps).square() / a).mean()

    def after(step):
        torch._foreach_lerp_(ema, [p.detach() for p in params], max(1 / (step + 2), 0.004))

    fit(plan.build / f"{'again' if again else 'teacher'}.pt", params, steps, lr, loss, after, ema)
    for p, e in zip(params, ema):
        p.data.copy_(e)
    plan.save(unet, "unet")
    # the names of published CLIP models: transformers 5.0 reads no others
    state = {f"text_model.{name.removeprefix('text_model.')}": w
             for name, w in text.half().state_dict().items()}           # earlier ones name them so
    text.save_pretrained(plan.teacher / "text_encoder", state_dict=state)
    tokenizer.save_pretrained(plan.teacher / "tokenizer")


def stage_baselines(plan):
    """Write what scoring needs and no student changes: of all held-out lists."""
    classifier, heard, seeds = load_classifier(), [], [0, 1, 2]
    t = read_settings(plan.teacher)["train"]["student_t"]
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
    replace_file(plan.home / "reference.safetensors", lambda path: save_file(heard, path))
    for name, rows in lists.items():
        first = name == "first"                             # which results are reported by
        table = score.baselines(rows, seeds if first else seeds[:1], t)
        content["systems" if first else f"{name} list"] = table
        print(score.show(table, len(rows)))
    replace_text(plan.home / "baselines.json", json.dumps(content, indent=2) + "\n")


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
RECORDED = {
    "data": stage_data,
    "vae": functools.partial(stage_vae, steps=1600, size=8, lr=1e-3, rough=1.0),
    "vocoder": functools.partial(vocoder.train, fit=fit, steps=1000),
    "teacher": functools.partial(stage_teacher, steps=1200, lr=1e-3, size=32),
    "again": functools.partial(stage_teacher, steps=800, lr=7e-4, again=True, size=32),
    "vocoder2": functools.partial(vocoder.train, fit=fit, steps=700, lr=3e-4, adversary=True),
}


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--stage", choices={**STAGES, **RECORDED}, nargs="*",
                   help="some of them; default: all")
    p.add_argument("--sounds", type=Path, help="folder of recordings, in place of the synthesis")
    p.add_argument("--out", type=Path, help="folder for the teacher of recordings")
    args = p.parse_args(argv)
    require(bool(args.sounds) == bool(args.out), "--sounds and --out: needed are both or none")
    plan, stages = SHIPPED, STAGES
    if args.sounds:
        plan, stages = Plan(Recordings(args.sounds), args.out, args.out, 16000, True), RECORDED
    for name in args.stage or stages:
        require(name in stages, f"--stage {name}: with --sounds there is none of this name; "
                f"there are {', '.join(stages)}")
        start = time.time()
        stages[name](plan)
        print(f"{name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    cli(main)
