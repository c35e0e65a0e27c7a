"""Mounts `efx` as `optimum-cli efx`.

Installed as `optimum.commands.register`, where optimum looks for it; no `__init__.py` may lie beside it.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class EFXCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="efx", help="Sparse domain experts: prune, export, inspect, serve (see `efx --help`).")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of efx, such as `prune --help`")

    def run(self) -> None:
        from efx_plugin.cli import main

        main(self.args.arguments)


REGISTER_COMMANDS = [EFXCommand]
