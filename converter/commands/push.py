"""The command `llmint8 push`, and `llmint8-convert --push-to-hub`: they print; `hub/push.py` does the work."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from ..words import count, size
from .command import Command, set_up_logging
from .terminal import printable


@click.command("push", cls=Command)
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repo private, where it is a new one.")
@click.option("--revision", metavar="REV", help="The branch to write to, a new one if need be; or refs/pr/N.")
@click.option("--create-pr", is_flag=True, help="Open a pull request, and write to that.")
@click.option("--token", help="A token that may write; that of HF_TOKEN or `hf auth login` otherwise.")
@click.option(
    "--commit-message", metavar="TEXT", default="Upload int8 checkpoint", show_default=True, help="For the commits."
)
@click.option("--i-have-the-right", is_flag=True, help="Publish although the licence seems to forbid it.")
@click.option("--replace-weights", is_flag=True, help="Publish over weights that are no int8 checkpoint.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def push_command(
    out: Path,
    repo: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    token: str | None,
    commit_message: str,
    i_have_the_right: bool,
    replace_weights: bool,
    quiet: bool,
) -> None:
    """Publish the int8 checkpoint OUT on the Hub as REPO, with a model card.

    It is checked first, and weights go before config.json. An upload that was interrupted is continued by starting it
    again.
    """
    set_up_logging(False)
    from ..hub.push import prepare

    upload = prepare(
        out,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
        have_right=i_have_the_right,
        replace_weights=replace_weights,
    )
    publish(upload, commit_message, quiet)


def publish(upload: Any, message: str, quiet: bool) -> None:
    """Send what has been prepared; say how much there is before, and how to load it afterwards."""
    from huggingface_hub.utils import disable_progress_bars

    from ..hub.push import send

    # It warns of every commit that would be empty, which is what a second push is made of.
    logging.getLogger("huggingface_hub.hf_api").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    if not quiet:
        click.echo(f"{count(len(upload.files), 'file')}, {size(upload.nbytes)}, to {printable(upload.to.repo)}")
    done = send(upload, message)
    if quiet:
        return
    click.echo(f"{'Published' if done.changed else 'Nothing has changed, it is all there'}: {printable(done.url)}")
    revision = f", revision={done.revision!r}" if done.revision else ""
    click.echo("Load it with:")
    click.echo("  from llmint8 import runtime")
    click.echo(f"  model = runtime.load({done.repo!r}{revision})")
