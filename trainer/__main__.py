"""`python -m trainer`: stage two.

train     train a diffusion transformer from a feature store; run it again to resume
generate  draw images from a run's averaged weights: a folder of PNGs, or one .npz
evaluate  FID, sFID, Inception Score, precision and recall; or a Fréchet distance in another encoder's features
probe     linear probing of hidden states over blocks, times and checkpoints
cknna     alignment of hidden states with a store's features
analyse   the paper's analysis figures, for any set of runs
ablate    train the runs of an ablation file that are missing
report    one HTML page about any number of runs
export    a run for diffusers, or its averaged weights as one file
import    make a run, to draw from or to train on, from a public checkpoint of DiT, SiT or REPA
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from storage.base.console import EXIT_FAILED, EXIT_OK, Parser, run_command

PROG = "python -m trainer"


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    from trainer import outputs
    from trainer.config.command_line import add_train_options, refuse_unknown, train_config
    from trainer.evaluation import commands as evaluation

    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    train_parser = commands.add_parser("train", help="train from a feature store, or resume")
    train_parser.add_argument(
        "--resume-with-changes", action="store_true", help="resume the run although settings that determine it changed"
    )
    add_train_options(train_parser, argv)
    import_parser = commands.add_parser("import", help="make a run from a public checkpoint")
    import_parser.add_argument("file", type=Path, help="what torch.save or safetensors wrote")
    import_parser.add_argument("--release", choices=("repa", "sit", "dit"), required=True, help="whose it is")
    add_train_options(import_parser, argv)
    evaluation.add_commands(commands)
    outputs.add_commands(commands)
    args, unknown = parser.parse_known_args(argv)
    refuse_unknown(commands.choices[args.command], unknown)
    values = vars(args)
    command = values.pop("command")
    if command == "import":
        from trainer.run.releases import import_checkpoint

        file, release = values.pop("file"), values.pop("release")
        config = train_config(values)
        print("\n".join(import_checkpoint(file, release, config)))
        run, saved = (shlex.quote(str(path)) for path in (config.run, config.run / "config.yaml"))
        print(f"next: {PROG} generate {run} --n 64   ·   {PROG} train --config {saved}")
        return EXIT_OK
    if command in evaluation.COMMANDS:
        return evaluation.run(command, values)
    if command in outputs.COMMANDS:
        return outputs.run(command, values)
    from trainer.loop.non_finite import NonFiniteError
    from trainer.loop.train import train

    accept = values.pop("resume_with_changes")
    try:
        summary = train(train_config(values), accept_changes=accept)
    except NonFiniteError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(summary, indent=1))
        run = shlex.quote(summary["run"])
        print(f"next: {PROG} generate {run} --n 64   ·   tensorboard --logdir {run}")
    return EXIT_OK


if __name__ == "__main__":
    run_command(main, PROG)
