"""`python -m trainer`: stage two.

train     train a diffusion transformer from a feature store; run it again to resume
sample    draw images from a run's averaged weights
evaluate  FID, sFID, Inception Score, precision and recall; or a Fréchet distance in another encoder's features
probe     linear probing of hidden states over blocks, times and checkpoints
cknna     alignment of hidden states with a store's features
analyse   the paper's analysis figures, for any set of runs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from storage.console import EXIT_FAILED, EXIT_OK, Parser, run_command

PROG = "python -m trainer"


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    from trainer.cli import add_train_options, refuse_unknown, train_config
    from trainer.evaluation import commands as evaluation

    parser = Parser(prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    train_parser = commands.add_parser("train", help="train from a feature store, or resume")
    add_train_options(train_parser, argv)
    sample_parser = commands.add_parser("sample", help="draw images from a run")
    sample_parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    sample_parser.add_argument("--n", type=int, default=32, help="how many images (default 32), classes in turn")
    sample_parser.add_argument("--out", type=Path, default=None, help="PNG to write (default RUN/samples.png)")
    sample_parser.add_argument("--vae", type=str, default="", help="VAE to decode with (default: as the store says)")
    sample_parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the run's)")
    sample_parser.add_argument("--steps", type=int, default=None, help="sampler steps (default: the run's)")
    sample_parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    evaluation.add_commands(commands)
    args, unknown = parser.parse_known_args(argv)
    refuse_unknown(commands.choices[args.command], unknown)
    values = vars(args)
    command = values.pop("command")
    if command in evaluation.COMMANDS:
        return evaluation.run_command(command, values)
    if command == "train":
        from trainer.guard import NonFiniteError
        from trainer.train import train

        accept = values.pop("resume_with_changes")
        try:
            summary = train(train_config(values), accept_changes=accept)
        except NonFiniteError as error:
            print(f"{PROG}: error: {error}", file=sys.stderr)
            return EXIT_FAILED
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(summary, indent=1))
            print(f"next: {PROG} sample --run {summary['run']}   ·   tensorboard --logdir {summary['run']}")
        return EXIT_OK
    from trainer.evaluation.generate import write_samples

    print(write_samples(**values))
    return EXIT_OK


if __name__ == "__main__":
    run_command(main, PROG)
