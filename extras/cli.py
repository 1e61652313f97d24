"""What all commands share: errors of one line, flags with bounds, files that are always whole."""
import argparse
import json
import math
import os
from pathlib import Path

import torch.distributed as dist


class InputError(SystemExit):
    """Something the user gave is wrong: ends the program with this one line and exit code 1."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the defaults that say something."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action):
        empty = str(action.default) in ("None", "False", "[]")
        return action.help if empty else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in --help and complains in one line."""

    def __init__(self, description, **kw):
        kw.setdefault("formatter_class", HelpFormatter)
        super().__init__(description=description.split("\n\n")[0], **kw)

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


def number(kind, low=0, high=math.inf):
    """Return an argparse type: an int or a float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            finite = "" if math.isfinite(value) else " and finite"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}{finite}")
        return value

    parse.__name__ = kind.__name__                      # argparse names it in "invalid int value"
    return parse


def run(main):
    """Run a command's main(), reporting in one line what the file system refuses.

    torchrun's process group is destroyed here, once main() has freed its networks: a
    DistributedDataParallel that is the last to hold the group can deadlock (LOG.md, 2026-11-21).
    """
    try:
        main()
    except OSError as e:
        raise InputError(e)
    if dist.is_initialized():
        dist.barrier()                      # none leaves while another still saves
        dist.destroy_process_group()


def read_json(path):
    """Read a JSON file; InputError where it is not one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: is not JSON ({e})")


def replace_file(path, save):
    """Call save(temporary path), then rename: a killed program leaves the old file or the new."""
    temporary = Path(f"{path}.tmp")
    try:
        save(temporary)
        os.chmod(temporary, 0o644)                      # safetensors leaves files private
        os.replace(temporary, path)
    except Exception as e:                              # a full disk: each library its own error
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(e).split())[:120]
        raise InputError(f"{path}: not saved ({reason}); is the disk full? What was there before "
                         "is intact")


def replace_text(path, text):
    """replace_file() for text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
