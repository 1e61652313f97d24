"""Distil a small vocoder that takes the place of the teacher's: --decoder fast.

    python -m recipes.vocoder --student out/student

As recipes.decoder, after it: the student makes latents, its small decoder (or the VAE) log-mels,
the teacher's vocoder (any, Griffin-Lim too) waveforms, and a FrameVocoder without noise
learns these. Writes vocoder/ in the student's folder: what sample.py reads, checkpoint.pt and
metrics.jsonl. Unproven: Auffusion's HiFi-GAN could not be had, and one that was trained for the
trial sounds like a synthesizer (docs/RESULTS.md).
"""
import json
import math

import torch
from safetensors.torch import save

import model
import train
from data import InputError, cli, replace_file, replace_text, require
from extras.audio import distance, mel_filters, spectra
from extras.metrics import sha256
from recipes.decoder import learn, parse_args, start
from tiny.teacher.vocoder.vocoders import FrameVocoder

SIZES = dict(width=512, hidden=1536, blocks=8, n_fft=640)       # 0.029 TFLOP in a clip of 10.24 s


def vocoder_loss(wav, target, weight=0.1):
    """Distance of the spectra of waveforms (B, N), and their L1 as a share of the target's."""
    off = (wav - target).abs().mean(1) / (target.abs().mean(1) + 1e-4)
    return distance(spectra(wav), spectra(target)) + weight * off.mean()    # 1 makes noise quiet


def new_vocoder(num_mels, own, noise=False):
    """A FrameVocoder of SIZES or a teacher's, at first about as loud as mels; its config.json."""
    try:
        config = dict(num_mels=num_mels, noise=noise, hop_size=model.HOP, **{**SIZES, **own})
        require(config["n_fft"] % model.HOP == 0, f"n_fft is no multiple of {model.HOP}")
        net = FrameVocoder(**config)
    except (TypeError, ValueError, RuntimeError, InputError) as e:
        raise InputError(f"swiftaudio.json of the teacher: its vocoder {own} is none ({e})")
    bank = mel_filters(num_mels, "cpu")
    rows = bank[torch.linspace(0, len(bank) - 1, net.bins).long()]
    net.prior.weight.data = rows / rows.sum(1, keepdim=True).clamp(min=1e-6)
    net.prior.bias.data = net.prior.weight @ -bank.sum(0).log() - 0.3
    net.head.bias.data[:net.bins].uniform_(-math.pi, math.pi)
    return net, config


def sound(decoder, x0):
    """Log-mels (B, frames, mels) of latents, and the teacher's waveforms (B, N) of these."""
    mel = decoder.decode(x0).half()
    return mel.mT, decoder.vocode(mel.float())


def main(argv=None):
    args = parse_args(argv, __doc__, "vocoder", max_steps=10000, lr=1e-3)
    run = start(args, "vocoder")
    folder, home = run.out.parent, run.system.folder
    require(not (folder / "unet").is_dir(), f"{folder}: its vocoder/ is its own, not a small one")
    small = {k: path for k, path in model.small_parts(folder).items() if k == "decoder"}
    if small:                                   # else the system's own is the one
        run.system.decoder = model.Decoder(home, small=small).to(run.device)
    decoder = run.system.decoder
    torch.manual_seed(args.seed)
    net, config = new_vocoder(8 * run.shape[1], model.read_settings(home).get("vocoder", {}))
    net.to(run.device)

    def save_result(step):                      # as model.load_vocoder() reads it
        content = save(net.state_dict())
        replace_file(run.out / "model.safetensors", lambda path: path.write_bytes(content))
        replace_text(run.out / "config.json", json.dumps(config, indent=2) + "\n")

    run.save_result = save_result
    run.identity |= {"decoder's weights": train.fingerprint(decoder.vae),
                     "vocoder's files": sha256(*sorted((home / "vocoder").glob("*.*")))[:16],
                     "first vocoder's weights": train.fingerprint(net)}
    return learn(run, list(net.parameters()), sound,
                 lambda mel, target: vocoder_loss(net(mel), target))


if __name__ == "__main__":
    cli(main)
