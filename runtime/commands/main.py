"""The command `llmint8`: everything one does with an int8 checkpoint, and `convert`, which makes one."""

import click

from llmint8.converter.commands.command import Group
from llmint8.converter.commands.convert import convert_command
from llmint8.converter.commands.push import push_command

from .bench import bench_command
from .eval import eval_command
from .export import export_command
from .generate import generate_command
from .inspect import inspect_command
from .plan import plan_command
from .report import report_command
from .scaling import scaling_command
from .verify import verify_command


@click.group(cls=Group)
@click.version_option(package_name="llmint8")
def main() -> None:
    """Make, look at, check and run int8 checkpoints of language models."""


for _command in (
    plan_command,
    convert_command,
    inspect_command,
    verify_command,
    generate_command,
    eval_command,
    report_command,
    scaling_command,
    export_command,
    bench_command,
    push_command,
):
    main.add_command(_command)
