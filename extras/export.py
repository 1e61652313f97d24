"""Write a student as ONNX files, which run without PyTorch (docs/USE.md: a clip in 25 lines).

    pip install onnx onnxscript onnxruntime && python -m extras.export --student out/student

text.onnx, step.onnx (noise and text to x0; timestep and schedule are inside), decoder.onnx (x0 to
log-mels) and vocoder.onnx for any batch and, where columns of noise come in multiples of the
manifest's "unit", any length; tokenizer.json; manifest.json. ONNX Runtime makes a clip with them,
which is compared with PyTorch's, before the folder gets its name.
"""
import importlib.metadata
import importlib.util
import json
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from data import InputError, Parser, cli, replace_text, require, sampling_noise
from extras.audio import log_mel
from extras.metrics import sha256
from losses import one_step
from model import HOP, RATE, cause, load_student

MAKES = {"text": "text", "step": "x0", "decoder": "mel", "vocoder": "wav"}
LIMIT = {torch.float32: 0.01, torch.float16: 0.05}      # mean difference; log-mels in nepers
MADE_WITH = "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"


class Part(nn.Module):
    """A part of a system, in `dtype` inside, its norms in fp32, and in fp32 at its ends."""

    def __init__(self, network, dtype, run):
        super().__init__()
        self.network, self.dtype, self.run = network.to(dtype), dtype, run
        for norm in network.modules() if dtype == torch.float16 else ():    # squares pass 65,504
            if isinstance(norm, (nn.GroupNorm, nn.LayerNorm)):
                norm.float().register_forward_pre_hook(lambda _, x: (x[0].float(),))
                norm.register_forward_hook(lambda _, x, y: y.half())

    def forward(self, *given):
        return self.run(*(x.to(self.dtype) if x.is_floating_point() else x for x in given)).float()


def parts(system, dtype):
    """{name: (Part, {input: an example, of two clips})} of a System on the CPU."""
    text, unet, decoder = system.encode_text, system.unet, system.decoder
    alpha, sigma = (x.to(dtype) for x in system.schedule)
    tokens, z_T = text.tokenize(["a", "b"], return_tensors="pt"), torch.zeros(2, *system.shape)
    mask = {"mask": tokens.attention_mask.float()} if text.adapter else {}

    def encode(ids, *mask):
        hidden = text.clip(ids).last_hidden_state
        return text.adapter(hidden * mask[0][..., None]) if mask else hidden

    def step(z_T, text):
        return one_step(lambda *x: unet(*x).sample, z_T, text, alpha, sigma, system.t)

    def vocode(mel, *noise):
        return decoder.vocoder(mel.transpose(1, 2), *noise).reshape(mel.shape[0], -1)

    found = {"text": (Part(text, dtype, encode), {"ids": tokens.input_ids, **mask}),
             "step": (Part(unet, dtype, step), {
                 "z_T": z_T, "text": torch.zeros(2, text.tokens, text.dim)}),
             "decoder": (Part(decoder.vae, dtype, decoder.decode), {"x0": z_T})}
    if type(decoder.vocoder).__name__ == "GriffinLim":
        print("vocoder: Griffin-Lim is no network; recipes.vocoder makes one for --decoder fast")
        return found
    given = {"mel": torch.zeros(2, *(8 * n for n in system.shape[1:]))}
    if getattr(decoder.vocoder, "noisy", False):
        given["noise"] = decoder.vocoder.draw(given["mel"].shape[2])
    return found | {"vocoder": (Part(decoder.vocoder, dtype, vocode), given)}


def export(system, folder, dtype):
    """Write a system's parts, and compare a clip of another length: what manifest.json says."""
    import onnxruntime
    unit = 2 ** (len(system.unet.config.block_out_channels) - 1)        # the UNet halves so often
    z_T = sampling_noise([0], 0, (*system.shape[:2], system.shape[2] + unit))
    tokens = system.encode_text.tokenize(["a dog barks"], return_tensors="pt")
    x0 = system.latents(z_T, text := system.encode_text(["a dog barks"]))
    mel = system.decoder.decode(x0)
    expected = {"text": text, "step": x0, "decoder": mel,
                "vocoder": log_mel(system.decoder.vocode(mel), mel.shape[1])}
    known = {"ids": tokens.input_ids, "mask": tokens.attention_mask.float(), "z_T": z_T}
    about = {"unit": unit, "latents": list(system.shape), "rate": RATE, "hop": HOP, "parts": {}}
    batch, length = (torch.export.Dim(name, min=1, max=2 ** 12) for name in ("batch", "length"))
    axes = {"z_T": {0: batch, 3: unit * length}, "x0": {0: batch, 3: length},
            "mel": {0: batch, 2: length}, "noise": {1: length}}
    for name, (part, given) in parts(system, dtype).items():
        path = folder / f"{name}.onnx"
        try:                                            # the exporter has many errors of its own
            torch.onnx.export(part.eval(), tuple(given.values()), path, input_names=[*given],
                              dynamic_shapes=(tuple(axes.get(k, {0: batch}) for k in given),),
                              dynamo=True, verbose=False)
        except Exception as e:
            raise InputError(f"{name}: cannot be exported ({cause(e)})")
        if "noise" in given:
            known["noise"] = system.decoder.vocoder.draw(mel.shape[2])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        made = torch.from_numpy(session.run(None, {key: known[key].numpy() for key in given})[0])
        made = log_mel(made, mel.shape[1]) if name == "vocoder" else made
        error = (made - expected[name]).abs().mean().item()
        require(error < LIMIT[dtype], f"{name}: {error:.3g} off PyTorch's; try it without --half")
        known[MAKES[name]] = made
        files = sorted(folder.glob(f"{name}.onnx*"))
        size = sum(file.stat().st_size for file in files) / 1e6
        print(f"{name}: {size:.1f} MB, {error:.2g} off PyTorch's")
        about["parts"][name] = {"inputs": {key: list(x.shape) for key, x in given.items()},
                                "sha256": sha256(*files)}
    return about


@torch.no_grad()
def main(argv=None):
    p = Parser(__doc__)
    add = p.add_argument
    add("--student", default="out/student", help="folder or hub name of it")
    add("--teacher", help="if not its own")
    add("--decoder", choices=("vae", "fast"), default="vae", help="fast: recipes' small parts")
    add("--out", type=Path, default=Path("onnx"), help="folder to make")
    add("--half", action="store_true", help="fp16, with norms in fp32")
    args = p.parse_args(argv)
    for name in MADE_WITH[3:]:
        require(importlib.util.find_spec(name), f"{name} is needed: pip install {name}")
    require(not args.out.exists(), f"{args.out} exists; pass another --out")
    warnings.simplefilter("ignore")                     # of the exporter, to its own authors
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    system = load_student(args.student, args.teacher, None, args.decoder, "fp32", "cpu")
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent) as folder:
        (folder := Path(folder, "onnx")).mkdir()
        about = export(system, folder, torch.float16 if args.half else torch.float32)
        about["made with"] = {name: importlib.metadata.version(name) for name in MADE_WITH}
        system.encode_text.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        replace_text(folder / "manifest.json", json.dumps(about, indent=2) + "\n")
        folder.rename(args.out)
    print(f"{args.out}: {', '.join(sorted(file.name for file in args.out.iterdir()))}")


if __name__ == "__main__":
    cli(main)
