"""Write a student as ONNX files, which run without PyTorch; --page adds a page that runs them.

    pip install onnx onnxscript onnxruntime && python -m extras.export --student out/student
    npm install onnxruntime-web@1.30.0 && python -m extras.export --out page --page node_modules

Each part must make what it makes in PyTorch, also at a length that the exporter did not see.
"""
import gzip
import json
import logging
import tempfile
from importlib import metadata, util
from pathlib import Path

import torch

from data import InputError, Parser, cli, read_captions, replace_text, require, sampling_noise
from extras.audio import log_mel
from extras.metrics import sha256
from losses import one_step
from model import HOP, RATE, cause, load_student, read_settings

MADE_WITH = "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime"
NO_NETWORK = "Griffin-Lim is no network; recipes.vocoder learns one, for --decoder fast"
WEB, WEB_FILES = "1.30.0", ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
WEB_HASH = "5fb3678b60512196cd3de6b2b7d699b1c00c820de19900efa52be7a432fd315b"   # of both


def part(network, run, dtype):
    """A network's function as a module: in `dtype` inside, its norms and its ends in fp32."""
    for norm in network.to(dtype).modules():            # whose squares pass fp16's 65,504
        if isinstance(norm, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            norm.forward = lambda x, run=norm.float().forward: run(x.float()).to(dtype)
    module, cast = torch.nn.Module(), lambda x: x.to(dtype) if x.is_floating_point() else x
    module.network, module.forward = network, lambda *given: run(*map(cast, given)).float()
    return module.eval()


def parts(system):
    """{name: (network, function, names of what it takes, of what it makes)} of a System."""
    text, unet, vocoder = system.encode_text, system.unet, system.decoder.vocoder
    hidden = lambda ids: text.clip(ids).last_hidden_state
    encode = lambda ids, *m: text.adapter(hidden(ids) * m[0][..., None]) if m else hidden(ids)
    step = lambda z_T, text: one_step(lambda *x: unet(*x).sample, z_T, text, *(
        x.to(z_T.dtype) for x in system.schedule), system.t)
    vocode, noise = lambda mel, *n: vocoder(mel.mT, *n), getattr(vocoder, "noisy", False)
    return {"text": (text, encode, ["ids", "mask"][:1 + bool(text.adapter)], "text"),
            "step": (unet, step, ["z_T", "text"], "x0"),
            "decoder": (system.decoder.vae, system.decoder.decode, ["x0"], "mel"),
            "vocoder": (vocoder, vocode, ["mel", "noise"][:1 + noise], "wav")}


def export(system, folder, half, small):
    """Write the parts, compare a clip of another length: {name: what the manifest says}."""
    import onnxruntime
    about, most = {}, 0.05 if half or small else 0.01                   # mean error, in nepers
    unit = 2 ** (len(system.unet.config.block_out_channels) - 1)        # the UNet halves so often
    batch, length = (torch.export.Dim(name, min=1, max=2 ** 12) for name in ("batch", "length"))
    axes = {"z_T": {0: batch, 3: unit * length}, "x0": {0: batch, 3: length},
            "mel": {0: batch, 2: length}, "noise": {1: length}}
    tokens = system.encode_text.tokenize(["a dog barks"] * 2, return_tensors="pt")
    given, known = ({"ids": tokens.input_ids[:n], "mask": tokens.attention_mask[:n].float(),
                     "z_T": sampling_noise(range(n), 0, (*system.shape[:2], width)),
                     "noise": getattr(system.decoder.vocoder, "draw", int)(8 * width)}
                    for n, width in ((2, system.shape[2]), (1, system.shape[2] + unit)))
    for name, (network, run, takes, makes) in parts(system).items():
        if not [*network.parameters()]:
            print(f"{name}: {NO_NETWORK}")
            continue
        for values in (given, known):
            values[makes] = run(*(values[key] for key in takes))
        for w in network.parameters() if small else ():
            w.data = w.half().float()                   # such files compress to half their size
        try:                                            # the exporter has many errors of its own
            program = torch.onnx.export(
                part(network, run, torch.float16 if half else torch.float32), dynamo=True,
                args=tuple(given[key] for key in takes), input_names=takes, output_names=[makes],
                dynamic_shapes=(tuple(axes.get(x, {0: batch}) for x in takes),), verbose=False)
        except Exception as e:
            raise InputError(f"{name}: cannot be exported ({cause(e)})")
        for node in program.model.graph:                # its traces name this machine's folders
            node.metadata_props.clear()
        program.save(path := folder / f"{name}.onnx", external_data=not small)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        made, = session.run(None, {key: known[key].numpy() for key in takes})
        see = lambda x: log_mel(x, 8 * system.shape[1]) if makes == "wav" else x
        error = (see(torch.from_numpy(made)) - see(known[makes])).abs().mean().item()
        require(error < most, f"{name}: {error:.3g} off PyTorch's; try it without --half")
        print(f"{name}: {error:.2g} off PyTorch's")
        about[name] = {"opset": program.model.opset_imports[""], "shapes": {
            x.name: x.shape for x in session.get_inputs() + session.get_outputs()}}
    return about


def page(system, packages):
    """Files of a page besides the parts, what its manifest says; InputError where none can be."""
    whole = system.encode_text.tokenizer.bos_token == "<bos>"           # as of tiny.make
    require(whole, f"--page: the tokenizer of {system.folder} is not one of whole words")
    require([*system.decoder.vocoder.parameters()], f"--page: {NO_NETWORK}")
    files = [packages / "onnxruntime-web/dist" / name for name in WEB_FILES]
    fine = all(file.is_file() for file in files) and sha256(*files) == WEB_HASH
    require(fine, f"{packages}: lacks version {WEB}; run npm install onnxruntime-web@{WEB}")
    captions = system.folder / read_settings(system.folder).get("train", {}).get("captions", "")
    about = {"onnxruntime-web": WEB, "examples": read_captions(captions, limit=6)[0]}
    return [*Path(__file__).with_name("page").iterdir(), *files], about


@torch.no_grad()
def main(argv=None):
    add = (p := Parser(__doc__)).add_argument
    add("--student", default="out/student", help="folder or hub name of it")
    add("--teacher", help="if not its own")
    add("--decoder", choices=("vae", "fast"), default="vae", help="fast: the small parts")
    add("--out", type=Path, default=Path("onnx"), help="folder to make")
    add("--half", action="store_true", help="fp16, with norms in fp32")
    add("--page", type=Path, metavar="NODE_MODULES", help="add a page; npm's folder of packages")
    args = p.parse_args(argv)
    for name in MADE_WITH[3:]:
        require(util.find_spec(name), f"{name} is needed: pip install {name}")
    require(not args.out.exists(), f"{args.out} exists; pass another --out")
    logging.captureWarnings(True)                       # of the exporter, to its own authors
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    system = load_student(args.student, args.teacher, None, args.decoder, "fp32", "cpu")
    files, about = page(system, args.page) if args.page else ([], {})
    about |= {"latents": system.shape, "rate": RATE, "hop": HOP,
              "made with": {name: metadata.version(name) for name in MADE_WITH}}
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent) as beside:
        (folder := Path(beside, "onnx")).mkdir()
        about["parts"] = export(system, Path(beside) if files else folder, args.half, files)
        system.encode_text.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        for file in [*files, *Path(beside).glob("*.onnx")]:
            end, pack = (".gz", gzip.compress) if file.suffix in (".onnx", ".wasm") else ("", bytes)
            (folder / (file.name + end)).write_bytes(pack(file.read_bytes()))
        about["files"] = {f.name: [f.stat().st_size, sha256(f)] for f in sorted(folder.iterdir())}
        replace_text(folder / "manifest.json", json.dumps(about, indent=2) + "\n")
        folder.rename(args.out)
    print(f"{args.out}: {', '.join(sorted(file.name for file in args.out.iterdir()))}")


if __name__ == "__main__":
    cli(main)
