"""Places to break the code on purpose: would a test notice? (name, file, old text, new text, tests).

    python tests/mutants.py [NAME ...]        # all, or some: an hour on two cores

The old text stands once in its file; "train losses" are tests/test_train.py and test_losses.py, of
which one must fail. What has no effect that a test could see is left out, with its reason:
- train.py, MAY_CHANGE: "device", "compile", "checkpointing": results are the same in all of them.
- train.py, gradient_as_bucket_view: saves memory, changes no number.
- train.py, require_backward_grad_sync: saves traffic; gradients are the same without it.
- model.py, sampling_dtype's fp16 and pick_device's set_device: only a GPU has them.
- sample.py, bench.py: speed is printed, not asserted.
- recipes/clips.py, clips[:args.clips]: nothing reads those behind.
- recipes and eval, --device, and eval's --batch_size: results are the same but for rounding.
- eval.py, the seconds that CLAP hears of a crop: the crop has no more, and CLAP takes 10 at most.
"""
import os
import shutil
import sys
import tempfile
from pathlib import Path

import diffusers  # noqa: F401  (once, and not in every fork)
import peft  # noqa: F401
import pytest
import torch
import transformers  # noqa: F401

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

MUTANTS = [
    # ---- data.py
    ("caption order ignores the seed", "data.py", "default_rng((seed, 0, epoch))", "default_rng((0, 0, epoch))", "data"),
    ("an epoch repeats the order", "data.py", "default_rng((seed, 0, epoch))", "default_rng((seed, 0, 0))", "data"),
    ("the largest t is never drawn", "data.py", "rng.integers(t_min, t_max)", "rng.integers(t_min, t_max - 1)", "data"),
    ("the smallest t is never drawn", "data.py", "rng.integers(t_min, t_max)", "rng.integers(t_min + 1, t_max)", "data"),
    ("the largest t_lora is never drawn", "data.py", "rng.integers(0, T + 1)", "rng.integers(0, T)", "data"),
    ("sampling noise ignores the seed", "data.py", "default_rng((seed, 2, k))", "default_rng((0, 2, k))", "data sample"),
    ("sampling noise ignores the clip", "data.py", "default_rng((seed, 2, k))", "default_rng((seed, 2, 0))", "data"),
    ("csv without strict quotes", "data.py", "strict=True", "strict=False", "data"),
    ("captions keep duplicates", "data.py", "list(dict.fromkeys(full))", "full", "data"),
    ("the limit is ignored", "data.py", "return captions[:limit], {", "return captions, {", "data"),
    ("strings beside lists are dropped", "data.py", "isinstance(v, (list, str))", "isinstance(v, list)", "data"),
    ("a column's name may come twice", "data.py", "require(not any(n and names.count(n) > 1 for n in names)", "require(True", "data"),
    ("a note beside captions by id is one", "data.py", "if list not in map(type, by_id) else []", "if False else []", "data"),
    ("the column is ignored", "data.py", "columns = [column] if column else", "columns = [column] if False else", "data"),
    ("bounds are open above", "data.py", "low <= value <= high", "low <= value", "cli"),
    ("no temporary file", "data.py", 'temporary = Path(f"{path}.tmp")', "temporary = Path(path)", "cli"),
    ("exit code lost", "data.py", "        sys.exit(code)", "        pass", "cli"),
    ("no replacement of letters", "data.py", 'stream.reconfigure(errors="replace")', "pass", "cli sample"),
    # ---- losses.py
    ("eq. 1 without sigma", "losses.py", "x_t - at(sigma, t) * eps(", "x_t - eps(", "losses"),
    ("the step is always at T", "losses.py", "T if t is None else t,", "T,", "losses"),
    ("guidance off by one", "losses.py", "uncond + scale * (cond - uncond)", "cond + scale * (cond - uncond)", "losses"),
    ("eq. 3 the other way", "losses.py", "target = x0 - at(sigma", "target = x0 + at(sigma", "losses"),
    ("w(t) without its square", "losses.py", "at(sigma, t) ** 2", "at(sigma, t)", "losses"),
    ("tv along frequency", "losses.py", "d = x0[..., 1:] - x0[..., :-1]", "d = x0[..., 1:, :] - x0[..., :-1, :]", "losses"),
    ("eq. 8 moves the student", "losses.py", "diffuse(x0.detach(), t, eps", "diffuse(x0, t, eps", "losses"),
    # ---- lora.py
    ("scale without alpha", "lora.py", "layer.scale, layer.enabled = alpha / rank, True", "layer.scale, layer.enabled = 1 / rank, True", "lora"),
    ("adapters stay on", "lora.py", "            m.enabled = False", "            m.enabled = True", "lora"),
    ("adapters come back on", "lora.py", "            m.enabled = enabled", "            m.enabled = True", "lora"),
    ("B starts random", "lora.py", "nn.init.zeros_(layer.lora_B.weight)", "nn.init.ones_(layer.lora_B.weight)", "lora"),
    ("the base learns too", "lora.py", "    network.requires_grad_(False)\n    found", "    found", "lora"),
    ("alpha is not saved", "lora.py", '"lora_alpha": alpha, "target', '"lora_alpha": rank, "target', "lora"),
    # ---- train.py: flags, and what a run is
    ("--seed of the adapters", "train.py", "torch.manual_seed(args.seed)", "torch.manual_seed(0)", "train"),
    ("--student_t", "train.py", "text, alpha, sigma, args.student_t)\n            vsd", "text, alpha, sigma)\n            vsd", "train"),
    ("--guidance", "train.py", "guided(teacher_eps, null, args.guidance)", "guided(teacher_eps, null, 7.5)", "train"),
    ("--lora_guidance", "train.py", "guided(lora_eps, null, lora_guidance)", "guided(lora_eps, null, args.guidance)", "train"),
    ("--lora_weighting", "train.py", "                             args.lora_weighting)", '                             "alpha2")', "train"),
    ("--tv", "train.py", "tv_loss(x0, args.tv)", 'tv_loss(x0, "l1")', "train"),
    ("--tv_weight", "train.py", "args.tv_weight * tv", "0.05 * tv", "train"),
    ("--lora_rank, --lora_alpha", "train.py", "inject(unet, args.lora_targets, args.lora_rank, args.lora_alpha)", "inject(unet, args.lora_targets, 4, args.lora_alpha)", "train"),
    ("--lora_targets", "train.py", "inject(unet, args.lora_targets,", 'inject(unet, "qv",', "train"),
    ("--lora_drop", "train.py", "u < args.lora_drop", "u < 0.1", "train"),
    ("--lora_lr", "train.py", '"lora": args.lora_lr}', '"lora": 1e-3}', "train"),
    ("--lr", "train.py", '{"student": args.lr,', '{"student": 1e-3,', "train"),
    ("--t_min, --t_max", "train.py", "run.shape, args.t_min, args.t_max, run.T))", "run.shape, 20, 981, run.T))", "train"),
    ("--beta1", "train.py", "betas=(args.beta1, args.beta2)", "betas=(0.9, args.beta2)", "train"),
    ("--beta2", "train.py", "betas=(args.beta1, args.beta2)", "betas=(args.beta1, 0.999)", "train"),
    ("--weight_decay", "train.py", "weight_decay=args.weight_decay", "weight_decay=0.01", "train"),
    ("--grad_clip", "train.py", "args.grad_clip or float(\"inf\")", "float(\"inf\")", "train"),
    ("--grad_accum", "train.py", "((vsd + args.tv_weight * tv).mean() / args.grad_accum)", "(vsd + args.tv_weight * tv).mean()", "train"),
    ("--ema", "train.py", "min(ema, (step + 1) / (step + 10))", "(step + 1) / (step + 10)", "train"),
    ("the average is not what is saved", "train.py", "run.weights[\"ema\"] or run.weights[\"student\"]", "run.weights[\"student\"]", "train"),
    ("--warmup", "train.py", "max(1, args.warmup)", "1", "train"),
    ("--decay", "train.py", "(1 - step / args.max_steps if args.decay else 1)", "1", "train"),
    ("--max_captions", "train.py", "args.caption_column, args.max_captions)", "args.caption_column, None)", "resume"),
    ("--caption_column", "train.py", "args.captions, args.caption_column,", "args.captions, None,", "resume"),
    ("--init's weights", "train.py", "run.student = load_unet(run.home, part, fits=folder)", "run.student = load_unet(folder)", "train"),
    ("--init's LoRA teacher", "train.py", 'if args.init and home.name == "student" and', "if False and", "train"),
    ("--init of a kept student", "train.py", 'home.name == "student" and', "True and", "train"),
    ("adapters of another rank are repeated", "lora.py", "state[k].shape == w.shape", "True", "train"),
    ("a kept student after the checkpoint", "train.py", "        if keep:   ", "        save_run(run, done, log)\n        if keep:   ", "resume"),
    ("--init's flags", "train.py", "if k in KEPT and k in args}", "if False}", "train"),
    ("--init's column with other captions", "train.py", "if given.captions else {}", "if False else {}", "train resume"),
    ("--init's number of captions", "train.py", "caption_column max_captions guidance", "caption_column guidance", "train"),
    ("--init's number with other captions", "train.py", '["caption_column", "max_captions"]', '["caption_column"]', "train resume"),
    ("a complete model is its own teacher", "model.py", 'else (folder, "unet", {})', 'else (folder, "unet", {"teacher": name})', "train sample"),
    ("the command of a module", "train.py", "sys.orig_argv[1:]", "sys.argv", "publish"),
    ("a first timestep above T", "model.py", "0.9 * T <= first <= T", "0.9 * T <= first", "model"),
    ("spaces behind commas", "data.py", "skipinitialspace=True", "skipinitialspace=False", "data"),
    ("a full GPU is a traceback", "data.py", ", torch.OutOfMemoryError", "", "cli"),
    ("a manifest of numbers", "sample.py", "isinstance(r, dict) and", "", "sample"),
    ("a teacher's own flags of a recipe", "train.py", "settings.get(p.prog.split(\".\")[-1], {})", "{}", "recipes"),
    ("a teacher's own flags", "train.py", "p.parse_args([*words(p, args, own, home / \"swiftaudio.json\"), *init, *argv])", "p.parse_args([*init, *argv])", "train"),
    ("--precision", "train.py", "enabled=args.precision == \"bf16\"", "enabled=False", "train"),
    ("--checkpointing", "train.py", "if run.args.checkpointing:", "if False:", "train"),
    ("--save_every", "train.py", "done % args.save_every == 0", "done % 500 == 0", "train"),
    ("--keep_every", "train.py", "keep = args.keep_every and done % args.keep_every == 0", "keep = False", "resume"),
    ("--log_every", "train.py", "done % args.log_every == 0", "done % 10 == 0", "train"),
    ("samples depend on the process only", "train.py", "((step * args.grad_accum + micro) * run.ranks + run.rank)", "(step * args.grad_accum + micro)", "train"),
    ("the step is not in the samples", "train.py", "first = ((step * args.grad_accum + micro)", "first = ((micro)", "train"),
    ("optimizers start anew on resume", "train.py", 'opt.load_state_dict(copy.deepcopy(found["opts"][name]))', "pass", "resume"),
    ("weights start anew on resume", "train.py", "                w.data.copy_(saved)", "                pass", "resume"),
    ("the log starts anew on resume", "train.py", 'run.first_step, run.lines = found["step"], found["lines"]', 'run.first_step = found["step"]', "resume"),
    ("a changed flag on resume", "train.py", "fixed = set(ours) - MAY_CHANGE |", "fixed = set() |", "resume"),
    ("guidance may change on resume", "train.py", '"max_steps save_every', '"guidance max_steps save_every', "resume"),
    ("t_min, beta1 and ema may change on resume", "train.py", '"max_steps save_every', '"t_min beta1 ema max_steps save_every', "resume"),
    ("other captions on resume", "train.py", "digest(\"\\n\".join(run.captions).encode())", "digest(b\"\")", "resume"),
    ("another teacher on resume", "train.py", "is_of = fingerprint(unet)", "is_of = \"\"", "train"),
    ("no lock", "train.py", "            run.lock.acquire()\n", "            pass\n", "resume"),
    ("no check of the disk", "train.py", "require(free > copies * size", "require(True", "resume"),
    ("SIGTERM ends without saving", "train.py", "due = signalled or keep or", "due = keep or", "resume"),
    ("a signal is not heard", "train.py", "    if signalled:\n        run.say", "    if False:\n        run.say", "resume"),
    ("what is not finite is saved", "train.py", "require(row.isfinite().all()", "require(True", "resume"),
    ("means over the last step only", "train.py", "self.sums.get(name, 0) + row", "row", "train"),
    ("the captions' path stays relative", "train.py", "args.captions = str(Path(args.captions).resolve())", "args.captions = str(args.captions)", "resume"),
    # ---- model.py
    ("half a character passes", "model.py", "require(not bad, f", "require(True, f", "sample"),
    ("an image upside down", "model.py", ".clamp(0, 1).flip(1)", ".clamp(0, 1)", "model"),
    ("no scaling factor", "model.py", "z = (x0 / self.vae.config.scaling_factor)", "z = (x0 / 1)", "model"),
    ("padding reaches the adapter", "model.py", "self.adapter(hidden * tokens.attention_mask[..., None])", "self.adapter(hidden)", "model"),
    ("the empty prompt of the adapter", "model.py", "return text * torch.tensor([p != \"\" for p in prompts], device=text.device)[:, None, None]", "return text", "model"),
    ("missing weights pass", "model.py", 'require(not info["missing_keys"],', "require(True,", "model"),
    ("another architecture passes", "model.py", "require(dim == theirs,", "require(True,", "model sample"),
    ("training downloads everything", "model.py", '"vae/config.json", "vocoder/config.json"]', '"vae/*", "vocoder/*"]', "model"),
    ("the teacher's UNet comes along", "model.py", 'skip=["unet/diffusion*"],', "skip=[],", "model"),
    ("zero SNR passes", "model.py", "and alphas[-1] > 0,", "and True,", "model train"),
    ("steps that start below noise", "model.py", "require(0.9 *", "require(0 *", "model sample"),
    ("init_noise_sigma", "model.py", "x = z_T * scheduler.init_noise_sigma", "x = 2 * z_T", "model"),
    ("the student's timestep in sampling", "model.py", 'made.get("timestep")', "None", "model"),
    ("a student of another parameterization", "model.py", 'about.get("parameterization", "eps") == "eps"', "True", "model"),
    ("a folder that is no student", "model.py", 'require("teacher" in about or', "require(True or", "model sample"),
    ("a student's length", "model.py", 'seconds or made.get("seconds")', "None", "model sample"),
    ("clip k", "model.py", "self.noise([k] * len(prompts), seed)", "self.noise([0] * len(prompts), seed)", "model"),
    ("what is not finite is heard", "model.py", "require(mel.isfinite().all()", "require(True", "model"),
    ("the vocoder in bf16", "model.py", "torch.float32 if dtype == torch.bfloat16 else dtype", "dtype", "vocoder"),
    ("weight norm is not folded", "model.py", "g * F.normalize(v, dim=(1, 2))", "v", "vocoder"),
    ("the odd kernel", "model.py", "(extra // 2 + extra % 2,), (extra % 2,)", "(extra // 2,), (0,)", "vocoder"),
    ("Griffin-Lim without momentum", "tiny/teacher/vocoder/griffin_lim.py", "now + 0.99 * (now - before)", "now", "vocoder"),
    # ---- sample.py
    ("--seed", "sample.py", "system.noise([k for _, k in part], args.seed)", "system.noise([k for _, k in part], 0)", "sample"),
    ("--n: all clips alike", "sample.py", "system.noise([k for _, k in part], args.seed)", "system.noise([0 for _, k in part], args.seed)", "sample"),
    ("--overwrite", "sample.py", "require(args.overwrite or not path.exists()", "require(True or not path.exists()", "sample"),
    ("--guidance of a teacher", "sample.py", "args.teacher_steps, args.guidance, **more", "args.teacher_steps, None, **more", "sample"),
    ("--teacher_steps", "sample.py", "load_teacher(teacher, args.teacher_steps,", "load_teacher(teacher, 10,", "sample"),
    ("--seconds", "sample.py", "open_system(args, args.seconds, prompts)", "open_system(args, None, prompts)", "sample"),
    ("--decoder", "sample.py", "decoder=args.decoder, **more", "**more", "decoder"),
    ("--precision", "sample.py", "precision=args.precision,", 'precision="auto",', "sample model"),
    ("the manifest of another process", "sample.py", "  rows = {row[\"file\"]: row for row in read_manifest(out)}", "  rows = {} if i == 0 else rows", "sample"),
    ("the manifest forgets", "sample.py", 'rows = {row["file"]: row for row in read_manifest(out)}', "rows = {}", "sample"),
    ("the picture upside down", "sample.py", "(LOG_MAX - LOG_MIN), 0, 1)[::-1]", "(LOG_MAX - LOG_MIN), 0, 1)", "sample"),
    # ---- extras/listen.py, publish.py, fast.py, audio.py
    ("listen --blind", "extras/listen.py", "page_data(args.folders, args.blind)", "page_data(args.folders, False)", "listen"),
    ("listen --blind: pictures shown", "extras/listen.py", '"png": None if blind else embed(', '"png": embed(', "listen"),
    ("listen --out", "extras/listen.py", "Path(args.out or Path(args.folders[0])", "Path(Path(args.folders[0])", "listen"),
    ("a prompt ends the page's script", "extras/listen.py", r'.replace("<", "\\u003c")', "", "listen"),
    ("publish tensorboard", "extras/publish.py", 'if args.what == "card" else', "if True else", "publish"),
    ("publish card", "extras/publish.py", 'if args.what == "card" else', "if False else", "publish"),
    ("events all of step 0", "extras/publish.py", 'value, line["step"])', "value, 0)", "publish"),
    ("an earlier call's events stay", "extras/publish.py", "SummaryWriter(folder, purge_step=0)", "SummaryWriter(folder)", "publish"),
    ("a card keeps another step's metrics", "extras/publish.py", """metrics is None and f", {about['step']} steps\\n" in card:""", "metrics is None and card:", "publish"),
    ("the taps the other way", "extras/fast.py", "[c, b + c, a + b, a]", "[a, a + b, b + c, c]", "fast"),
    ("extras.fast folds nothing", "extras/fast.py", "        fold_upsampling(system.decoder.vae.decoder)\n", "", "fast"),
    ("the small decoder is not folded", "extras/fast.py", "if isinstance(layer, nn.Upsample):", "if False:", "fast"),
    ("a file's DC is heard", "extras/audio.py", "wav if mix else wav - wav.mean()", "wav", "audio"),
    ("files are not cut", "extras/audio.py", "[:round(seconds * rate)]", "", "audio"),
    ("the filter ends at Nyquist", "extras/audio.py", "cut = 0.99 * min(", "cut = min(", "audio"),
    ("encoded clips are not normalized", "extras/audio.py", "log_mel(peak_normalize(wav),", "log_mel(wav,", "audio"),
    # ---- extras/control.py
    ("control --init_prompt", "extras/control.py", "invert_recording(args.init, args.init_prompt, system", 'invert_recording(args.init, "", system', "control"),
    ("control --strength", "extras/control.py", "args.strength ** 2), args.strength", "0.2 ** 2), 0.2", "control"),
    ("control --init", "extras/control.py", "        if args.init:", "        if False:", "control"),
    ("control: unread brackets pass", "extras/control.py", "require(plain and all(", "require(all(", "control"),
    ("control: fp16 overflows", "extras/control.py", "float(weight) <= 100 for", "float(weight) <= 1000 for", "control"),
    ("control: weights stay behind", "extras/control.py", "            hook.remove()", "            pass", "control"),
    ("control's weights", "extras/control.py", "token_weights(system, words, weights)):", "None):", "control"),
    ("the empty caption is weighted", "extras/control.py", "len(value) - len(weights)), value=1)", "len(value) - len(weights)), value=2)", "control"),
    ("the inversion's noise is seed 0's", "extras/control.py", 'system, args.seed)\n            print', 'system, 0)\n            print', "control"),
    # ---- extras/metrics.py, bench.py
    ("Gaussians over n", "extras/metrics.py", "(len(a) - 1) ** 0.5", "len(a) ** 0.5", "metrics"),
    ("KL the other way", "extras/metrics.py", "reference.double().log_softmax(-1), generated.double()", "generated.double().log_softmax(-1), reference.double()", "metrics"),
    ("IS without its shuffle", "extras/metrics.py", "[np.random.RandomState(2020).permutation(len(logits))]", "", "metrics"),
    ("VGGish in torch's order", "extras/metrics.py", ".permute(0, 2, 3, 1).flatten(1)", ".flatten(1)", "metrics"),
    ("a download happens again", "extras/metrics.py", "        if not path.exists():\n", "        if True:\n", "metrics"),
    ("CLAP hears a random part", "extras/metrics.py", "seconds = min(seconds, 10.0)", "pass", "metrics"),
    ("bench: another guidance", "extras/bench.py", "guided(lora_eps, null, 7.5), alpha", "guided(lora_eps, null, 1), alpha", "bench"),
    ("bench: a stage is not of the path", "extras/bench.py", "mel = decoder.decode(x0).clone()", "mel = decoder.decode(2 * x0).clone()", "bench"),
    ("bench: of peak, of one sample", "extras/bench.py", "{batch * at_peak[name] / t:10.0%}", "{at_peak[name] / t:10.0%}", "bench"),
    ("bench: the ratio upside down", "extras/bench.py", "{plain[name] / t:.2f}x", "{t / plain[name]:.2f}x", "bench"),
    ("bench --batch_size", "extras/bench.py", "batch, what = args.batch_size or", "batch, what = None or", "bench"),
    # ---- extras/eval.py
    ("eval --which", "extras/eval.py", "found[args.which] for name", "found[0] for name", "eval"),
    ("a crop of 24 bits, cut at 1", "extras/eval.py", 'else "FLOAT"', 'else "PCM_24"', "eval"),
    ("consistency at another cost", "tiny/ablate.py", "--max_steps 3860", "--max_steps 4200", "tiny"),
    ("numbers that name other files", "extras/eval.py", "if Path(v).suffix.lower() in SOUNDS] or values", "] or values", "eval"),
    ("CLAP hears 16 kHz", "extras/metrics.py", "read_audio(path, seconds, 48000)", "read_audio(path, seconds, 16000)", "metrics"),
    ("CLAP's other sign", "extras/metrics.py", "return F.cosine_similarity(a, t)", "return -F.cosine_similarity(a, t)", "metrics"),
    ("CLAP hears all", "extras/metrics.py", "seconds = min(seconds, 10.0) ", "seconds = 10.0 ", "metrics"),
    ("a README somebody wrote", "extras/publish.py", 'not card or "made with', 'True or "made with', "publish"),
    ("eval: a clip that is gone is in the list", "extras/eval.py", "{name: prompts[name] for name in paired} if", "prompts if", "eval"),
    ("eval --crop_seed", "extras/eval.py", "default_rng((args.crop_seed,", "default_rng((0,", "eval"),
    ("eval --seconds of the crops", "extras/eval.py", "round(args.seconds * rate)", "round(10 * rate)", "eval"),
    ("eval --seconds of the scores", "extras/eval.py", "[hear(path, args.seconds) for", "[hear(path, 10.0) for", "eval"),
    ("eval --clap", "extras/eval.py", "clap = metrics.Clap(args.clap, device) if args.clap else None", "clap = None", "eval"),
    ("eval --weights", "extras/eval.py", "(kind, args.weights, args.download)", '(kind, ".", args.download)', "eval"),
    ("eval --download", "extras/eval.py", "(kind, args.weights, args.download)", "(kind, args.weights, False)", "eval"),
    ("a table of other weights", "extras/eval.py", '"N", "weights", "rate"', '"N", "rate"', "eval"),
    ("the hash without the UNet", "extras/eval.py", "for folder in folders for pattern", "for folder in () for pattern", "eval"),
    ("the hash without the UNet's weights", "extras/eval.py", "for pattern in STUDENT[:3]", "for pattern in STUDENT[:2]", "eval"),
    ("the hash without the scheduler", "extras/eval.py", 'if pattern != "unet/*"]', 'if pattern not in ("unet/*", "scheduler/*")]', "eval"),
    ("the hash without the tokenizer", "extras/eval.py", 'if pattern != "unet/*"]', 'if pattern not in ("unet/*", "tokenizer/*")]', "eval"),
    ("the hash without the text encoder", "extras/eval.py", 'if pattern != "unet/*"]', 'if pattern not in ("unet/*", "text_encoder*")]', "eval"),
    ("the hash without the settings", "extras/eval.py", 'if pattern != "unet/*"]', 'if pattern not in ("unet/*", *STUDENT[:1])]', "eval"),
    ("the hash without the decoder", "extras/eval.py", 'Path(system.about.get("decoder", unet))', "unet", "eval decoder"),
    ("eval --seed", "extras/eval.py", "for name in names], args.seed)", "for name in names], 0)", "eval"),
    ("a clip's noise is of its place", "extras/eval.py", "[zlib.crc32(name.encode()) for name in names]", "[i + k for k, _ in enumerate(names)]", "eval"),
    ("a clip of another caption stays", "extras/eval.py", "if clips.get(k) != prompts[k] or not", "if not", "eval"),
    ("FAD hears one channel", "extras/eval.py", "vgg(read(path, seconds, RATE, True))", "vgg(read(path, seconds, RATE))", "eval"),
    ("recordings of any start", "extras/eval.py", "if at == start or None in (at, start)", "if True", "eval"),
    ("recordings named with their end", "extras/eval.py", "found[2] and float(found[2])", "found[2]", "eval"),
    ("FAD of CNN14's embedding", "extras/eval.py", "frechet(real[2], made[2])", "frechet(real[0], made[0])", "eval"),
    ("the farthest caption", "extras/eval.py", "args.seconds).argmax()]", "args.seconds).argmin()]", "eval"),
    # ---- recipes/decoder.py
    ("decoder --captions", "recipes/decoder.py", 'flags = {} if args.captions else about.get("flags", {})', 'flags = about.get("flags", {})\n    args.captions = flags.get("captions") or args.captions', "decoder"),
    ("the decoder learns one caption", "recipes/decoder.py", "[caption_at(run.captions, args.seed, n) for n in numbers]", "[run.captions[0] for n in numbers]", "decoder"),
    ("decoder --clips", "recipes/decoder.py", "caption_at(range(args.clips), args.seed, n)", "caption_at(range(args.batch_size), args.seed, n)", "decoder"),
    ("decoder --batch_size", "recipes/decoder.py", "range(step * args.batch_size, (step + 1) * args.batch_size)", "range(step * 4, (step + 1) * 4)", "decoder"),
    ("decoder --lr", "recipes/decoder.py", "args.lr * train.learning_rate", "4e-3 * train.learning_rate", "decoder"),
    ("decoder --seed of its weights", "recipes/decoder.py", "torch.manual_seed(args.seed)", "torch.manual_seed(0)", "decoder"),
    ("decoder --seed of the noise", "recipes/decoder.py", "draw_batch(numbers, args.seed,", "draw_batch(numbers, 0,", "decoder"),
    ("decoder --seed of the captions", "recipes/decoder.py", "caption_at(run.captions, args.seed, n)", "caption_at(run.captions, 0, n)", "decoder"),
    ("decoder --seed of the clips' order", "recipes/decoder.py", "caption_at(range(args.clips), args.seed, n)", "caption_at(range(args.clips), 0, n)", "decoder"),
    ("decoder --init", "recipes/decoder.py", "AutoencoderTiny)) if args.init else", "AutoencoderTiny)) if False else", "decoder"),
    ("decoder --save_every", "recipes/decoder.py", "done % args.save_every == 0", "done % 500 == 0", "decoder"),
    ("decoder: the student's timestep", "recipes/decoder.py", "alpha, sigma, run.about.get(\"timestep\"))", "alpha, sigma)", "decoder"),
    ("decoder: the student's number of captions", "recipes/decoder.py", 'flags.get("max_captions"))', "None)", "decoder"),
    ("decoder: the rate stays", "recipes/decoder.py", "decay=True", "decay=False", "decoder"),
    # ---- recipes/clips.py, arc.py, energy.py
    ("--cache", "recipes/clips.py", "Path(args.cache or run.out /", "Path(run.out /", "recipes"),
    ("--clip_steps", "recipes/clips.py", "scheduler, args.clip_steps)", "scheduler, 10)", "recipes"),
    ("clips of other steps pass", "recipes/clips.py", '"clip_steps", "seed")', '"seed")', "recipes"),
    ("the clips' noise is scoring's", "recipes/clips.py", "stream=4)", "stream=2)", "recipes"),
    ("the clips' noise is seed 0's", "recipes/clips.py", "draw_more(numbers, seed, 1,", "draw_more(numbers, 0, 1,", "recipes"),
    ("the clips' captions are seed 0's", "recipes/clips.py", "caption_at(run.captions, seed, n)", "caption_at(run.captions, 0, n)", "recipes"),
    ("a sample's clip is seed 0's", "recipes/clips.py", "caption_at(range(args.clips), args.seed, n)", "caption_at(range(args.clips), 0, n)", "recipes"),
    ("the clips' guidance", "recipes/clips.py", "run.null, args.guidance), None", "run.null, 7.5), None", "recipes"),
    ("the clips begin below T", "recipes/clips.py", 'timestep_spacing="trailing"', 'timestep_spacing="leading"', "recipes"),
    ("--clips: all again", "recipes/clips.py", "range(len(clips), args.clips, cut)", "range(0, args.clips, cut)", "recipes"),
    ("arc --contrast", "recipes/arc.py", "args.contrast * rel", "1.0 * rel", "recipes"),
    ("arc --r1", "recipes/arc.py", "args.r1 * (near", "1.0 * (near", "recipes"),
    ("arc --r2", "recipes/arc.py", "args.r2 * (near", "1.0 * (near", "recipes"),
    ("arc --d_lr", "recipes/arc.py", '"d": args.d_lr}', '"d": 5e-4}', "recipes"),
    ("arc --d_first", "recipes/arc.py", "step >= args.d_first:", "step >= 0:", "recipes"),
    ("arc --d_frozen", "recipes/arc.py", "load_unet(run.folder), args.d_frozen, run.amp", "load_unet(run.folder), False, run.amp", "recipes"),
    ("arc --d_t_min", "recipes/arc.py", "args.d_t_min, args.d_t_max))\n", "50, args.d_t_max))\n", "recipes"),
    ("arc --d_t_max", "recipes/arc.py", "args.d_t_min, args.d_t_max))\n", "args.d_t_min, 700))\n", "recipes"),
    ("arc --seed of D", "recipes/arc.py", "torch.manual_seed(args.seed)", "torch.manual_seed(0)", "recipes"),
    ("arc's noise is seed 0's", "recipes/arc.py", "draw_batch(numbers, args.seed,", "draw_batch(numbers, 0,", "recipes"),
    ("D's noise is seed 0's", "recipes/arc.py", "numbers, args.seed, 3,", "numbers, 0, 3,", "recipes"),
    ("arc starts from the teacher", "recipes/arc.py", "run.device, run.alpha, run.sigma\n", "run.device, run.alpha, run.sigma\n    run.student = load_unet(run.folder)\n", "recipes"),
    ("arc --student_t", "recipes/arc.py", "alpha, sigma, args.student_t)", "alpha, sigma)", "recipes"),
    ("arc --ema", "recipes/arc.py", "train.average(weights, args.ema, step)", "train.average(weights, 0.5, step)", "recipes"),
    ("arc --grad_clip", "recipes/arc.py", 'args.grad_clip or float("inf")', 'float("inf")', "recipes"),
    ("arc --grad_accum", "recipes/arc.py", "flatten(1).sum(1).mean() / args.grad_accum", "flatten(1).sum(1).mean()", "recipes"),
    ("energy --samples", "recipes/energy.py", "    args = parse_args(argv)\n", "    args = parse_args(argv)\n    args.samples = 2\n", "recipes"),
    ("energy --patch", "recipes/energy.py", "energy_loss(x, y, args.patch)", "energy_loss(x, y, 4)", "recipes"),
    ("energy's noise is seed 0's", "recipes/energy.py", "draw_more(numbers, args.seed,", "draw_more(numbers, 0,", "recipes"),
    ("energy starts from the teacher", "recipes/energy.py", "run.device, run.alpha, run.sigma\n", 'run.device, run.alpha, run.sigma\n    run.student = __import__("model").load_unet(run.folder)\n', "recipes"),
    ("energy --student_t", "recipes/energy.py", "                         args.student_t)", "                         None)", "recipes"),
    ("energy --ema", "recipes/energy.py", "train.average(weights, args.ema, step)", "train.average(weights, 0.5, step)", "recipes"),
    ("energy --grad_clip", "recipes/energy.py", 'args.grad_clip or float("inf")', 'float("inf")', "recipes"),
    ("energy --grad_accum", "recipes/energy.py", "(energy.mean() / args.grad_accum)", "energy.mean()", "recipes"),
    # ---- recipes/consistency.py
    ("consistency: nothing is known at 0", "recipes/consistency.py", "torch.where((t > 0).view(-1, 1, 1, 1), x0, x)", "x0", "consistency"),
    ("consistency: f without sigma", "recipes/consistency.py", "(x - at(sigma, t) * eps(x, t, text))", "(x - eps(x, t, text))", "consistency"),
    ("consistency: the teacher stays at t", "recipes/consistency.py", "at(alpha, t), s, out, alpha, sigma)", "at(alpha, t), t, out, alpha, sigma)", "consistency"),
    ("consistency: the target hears t", "recipes/consistency.py", "(target, x_s, s, text", "(target, x_s, t, text", "consistency"),
    ("consistency: no teacher", "recipes/consistency.py", "(target, x_s, s, text", "(target, x, s, text", "consistency"),
    ("consistency: the student is its own target", "recipes/consistency.py", "(target, x_s, s, text", "(student, x_s, s, text", "consistency"),
    ("consistency: the target learns too", "recipes/consistency.py", "with torch.no_grad():", "if True:", "consistency"),
    ("consistency: c of huber", "recipes/consistency.py", "(d2 + 1e-6).sqrt() - 1e-3", "(d2 + 1e-4).sqrt() - 1e-2", "consistency"),
    ("consistency: T is not learned", "recipes/consistency.py", "run.shape, 1, args.ode_steps + 1))", "run.shape, 1, args.ode_steps))", "consistency"),
    ("consistency: the grid ends below T", "recipes/consistency.py", "// args.ode_steps - 1\n    grid = grid.clamp", "// args.ode_steps - 2\n    grid = grid.clamp", "consistency"),
    ("consistency --ode_steps", "recipes/consistency.py", "grid = torch.arange(args.ode_steps + 1) * (T + 1) // args.ode_steps", "grid = torch.arange(51) * (T + 1) // 50", "consistency"),
    ("consistency --ode_steps above T", "recipes/consistency.py", "require(args.ode_steps <= T // 2,", "require(True,", "consistency"),
    ("consistency --student_t", "recipes/consistency.py", "require(args.student_t in (None, T),", "require(True,", "consistency"),
    ("consistency --loss", "recipes/consistency.py", "sigma, args.loss)", 'sigma, "huber")', "consistency"),
    ("consistency --guidance", "recipes/consistency.py", "guided(teacher_eps, run.null, args.guidance)", "guided(teacher_eps, run.null, 7.5)", "consistency"),
    ("consistency: the teacher is the student", "recipes/consistency.py", "teacher, weights = run.unet,", "teacher, weights = run.student,", "consistency"),
    ("consistency: the target stands still", "recipes/consistency.py", "        train.average(weights, args.ema, step) ", "        pass ", "consistency"),
    ("consistency: the target is not resumed", "recipes/consistency.py", 'train.resume(run, weights, {"student": opt})', 'train.resume(run, {"student": weights["student"]}, {"student": opt})', "consistency"),
    ("consistency --ema", "recipes/consistency.py", "train.average(weights, args.ema, step)", "train.average(weights, 0.5, step)", "consistency"),
    ("consistency's noise is seed 0's", "recipes/consistency.py", "numbers, args.seed, 1,", "numbers, 0, 1,", "consistency"),
    ("consistency starts from the teacher", "recipes/consistency.py", "run.sigma, run.T\n", 'run.sigma, run.T\n    run.student = __import__("model").load_unet(run.folder)\n', "consistency"),
    ("consistency --grad_clip", "recipes/consistency.py", 'args.grad_clip or float("inf")', 'float("inf")', "consistency"),
    ("consistency --grad_accum", "recipes/consistency.py", "(loss.mean() / args.grad_accum)", "loss.mean()", "consistency"),
    # ---- tiny/
    ("tiny.score --list", "tiny/score.py", "rows, whole = held_out(args.clips, args.list, args.kind)", 'rows, whole = held_out(args.clips, "first", args.kind)', "tiny"),
    ("tiny.score --list of the shipped rows", "tiny/score.py", "others = shipped_rows(args.list)", 'others = shipped_rows("first")', "tiny"),
    ("tiny.score --kind", "tiny/score.py", "rows, whole = held_out(args.clips, args.list, args.kind)", "rows, whole = held_out(args.clips, args.list)", "tiny"),
    ("tiny.score --clips", "tiny/score.py", "rows, whole = held_out(args.clips,", "rows, whole = held_out(16,", "tiny"),
    ("tiny.score --seed", "tiny/score.py", "**measure(student, rows, args.seed)", "**measure(student, rows, 0)", "tiny"),
    ("tiny.score --seed of the noise", "tiny/score.py", "system.noise(numbers, seed)", "system.noise(numbers, 0)", "tiny"),
    ("tiny.score --seed of --all", "tiny/score.py", "baselines(rows, [args.seed])", "baselines(rows, [0])", "tiny"),
    ("tiny.score --seed of --diversity", "tiny/score.py", "rows, args.diversity, args.seed)", "rows, args.diversity, 0)", "tiny"),
    ("tiny.score --diversity", "tiny/score.py", "rows, args.diversity, args.seed)", "rows, 2, args.seed)", "tiny"),
    ("tiny.score --list, --kind of --diversity", "tiny/score.py", "args.diversity, args.list, args.kind)", "args.diversity)", "tiny"),
    ("tiny.score --all", "tiny/score.py", "    if args.all:", "    if False:", "tiny"),
    ("tiny.score: the student's timestep", "tiny/score.py", "    fold_upsampling(system.decoder.vae.decoder)\n    return folder", '    a, b = model.noise_schedule(system.scheduler)\n    system.latents = lambda z, text: __import__("losses").one_step(system.eps, z, text, a, b)\n    return folder', "tiny"),
    ("FD to teacher is FD", "tiny/score.py", "frechet(teacher, heard[0])", "frechet(target[0], heard[0])", "tiny"),
    ("tiny.ablate: every run is seed 0's", "tiny/ablate.py", '"--seed", seed, "--out_dir"', '"--seed", 0, "--out_dir"', "tiny"),
    ("tiny.ablate: the noise is seed 0's", "tiny/ablate.py", "score.measure(student, rows, seed)", "score.measure(student, rows, 0)", "tiny"),
    ("tiny.ablate --list", "tiny/ablate.py", "score.held_out(args.clips, name)", "score.held_out(args.clips)", "tiny"),
    ("tiny.ablate: one list's scores are another's", "tiny/ablate.py", 'path := out / f"row {name}.json"', 'path := out / "row second.json"', "tiny"),
    ("tiny.ablate: a finished student is trained again", "tiny/ablate.py", 'read_json(about)["step"] if about.exists() else 0', "0", "tiny"),
    ("tiny.ablate: an unfinished student is scored", "tiny/ablate.py", "if done < module", "if not about.exists() and 0 < module", "tiny"),
    ("tiny.ablate --steps", "tiny/ablate.py", '"--max_steps", args.steps]', '"--max_steps", 2]', "tiny"),
    ("tiny.ablate --student {seed}", "tiny/ablate.py", 'name.replace("{seed}", str(seed))', 'name.replace("{seed}", "0")', "tiny"),
    ("the lists' reference: one for all", "tiny/make.py", "score.held_out(512, name) for name", 'score.held_out(512, "first") for name', "tiny"),
    ("tiny.make: a teacher in fp32", "tiny/make.py", "network.half().save", "network.save", "tiny"),
    ("tiny.score: anyone's student", "tiny/score.py", "or weights == fingerprint(model.load_unet(TINY))", "or weights", "tiny"),
    ("tiny.score: the floor is one rendering", "tiny/score.py", "real(rows, FLOOR + seed))}", "real(rows, FLOOR))}", "tiny"),
    ("unseen pairs are trained on", "tiny/world.py", "p not in UNSEEN and p[::-1] not in UNSEEN", "p not in UNSEEN", "tiny"),
    ("then is while", "tiny/world.py", "start = int(i * N / 2) if ordered else 0", "start = 0", "tiny"),
    # ---- extras/app.py
    ("requests do not queue", "extras/app.py", "default_concurrency_limit=1)", "default_concurrency_limit=20)", "app"),
    ("a request keeps the last length", "extras/app.py", "system.seconds, system.shape = seconds, latent_shape(system.folder, seconds)", "system.seconds = seconds", "app"),
    ("the page's seed is not the clip's", "extras/app.py", "z_T = system.noise(range(n), seed)", "z_T = system.noise(range(n), 0)", "app"),
    ("the page ignores the strength", "extras/app.py", "start + strength * z_T", "start + 0.2 * z_T", "app"),
    ("the page ignores the decoder", "extras/app.py", "system = system_of(decoder)", "system = system_of(args.decoder)", "app"),
    ("an inverted recording of another seed", "extras/app.py", "words, system, seed)", "words, system, 0)", "app"),
    ("all results stay", "extras/app.py", "*results][:20]", "*results]", "app"),
    ("a result of any length of upload", "extras/app.py", "about.duration <= 60 and ", "", "app"),
    ("an upload of many channels or a high rate", "extras/app.py", " and about.frames * about.channels <= 2 ** 24", "", "app"),
    ("an upload whose resampling takes all memory", "extras/app.py", "and about.samplerate <= 4e5,", ",", "app"),
    ("an upload of any size", "extras/app.py", ', max_file_size="20mb"', "", "app"),
    ("telemetry", "extras/app.py", '"GRADIO_ANALYTICS_ENABLED": "False", ', '"GRADIO_ANALYTICS_ENABLED": "True", ', "app"),
    ("open to other machines", "extras/app.py", 'default="127.0.0.1"', 'default="0.0.0.0"', "app"),
    ("requests past the queue", "extras/app.py", "api_open=False, ", "api_open=True, ", "app"),
    ("the command is markup", "extras/app.py", "command = html.escape(f\"python {script} {shlex.join([*flags, *edit])}\")", "command = f\"python {script} {shlex.join([*flags, *edit])}\"", "app"),
]


def start(mutant, copy):
    """Test a broken copy of the project in a fork, which has the libraries: its process."""
    name, file, old, new, tests = mutant
    root = Path(__file__).resolve().parent.parent
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out*", "__pycache__"))
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{name}: its text stands {text.count(old)} times in {file}"
    (copy / file).write_text(text.replace(old, new))
    if pid := os.fork():
        return pid
    os.setsid()
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    for stream in (1, 2):
        os.dup2(os.open(f"{copy}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    noticed = any(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/test_{test}.py"]) == 1
                  for test in tests.split())
    os._exit(not noticed)


if __name__ == "__main__":
    todo = [m for m in MUTANTS if m[0] in (sys.argv[1:] or [m[0]])][::-1]
    running, alive = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        while todo or running:
            while todo and len(running) < (os.cpu_count() or 1):
                mutant = todo.pop()
                running[start(mutant, Path(folder) / str(len(todo)))] = mutant[0]
            pid, status = os.wait()
            alive += status != 0
            print("SURVIVED  " if status else "noticed   ", running.pop(pid), flush=True)
    sys.exit(f"{alive} survived" if alive else 0)
