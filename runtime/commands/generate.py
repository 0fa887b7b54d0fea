"""The command `llmint8 generate`."""

import click

from llmint8.converter.commands.command import Command, set_up_logging
from llmint8.converter.commands.output import echo_result
from llmint8.converter.commands.terminal import printable_lines
from llmint8.converter.words import count


@click.command("generate", cls=Command)
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="The text to continue or, with a chat template, to answer.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--no-chat", is_flag=True, help="Continue the prompt even where there is a chat template.")
@click.option("--device", help="Such as cpu or cuda; the default is the CPU.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, when CHECKPOINT is a Hub repo.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model code in CHECKPOINT, if it needs any.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the decoding first: pays for long texts.")
@click.option("--stats", is_flag=True, help="Print times, speed and memory.")
@click.option("--quiet", is_flag=True, help="Print the text only.")
def generate_command(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    no_chat: bool,
    device: str | None,
    revision: str | None,
    trust_remote_code: bool,
    compiled: bool,
    stats: bool,
    quiet: bool,
) -> None:
    """Generate text with an int8 checkpoint, streaming it to the terminal."""
    set_up_logging(False)
    from llmint8.converter.calibration.tokenizer import load_tokenizer
    from llmint8.converter.hub.resolve import resolve
    from llmint8.formats import SourceError

    from ..model.generate import require_text_model, statistics, stream_chat
    from ..model.load import load

    path = resolve(checkpoint, revision, "int8").path
    require_text_model(path, trust_remote_code)
    tokenizer, why = load_tokenizer(path, trust_remote_code, "the checkpoint")
    if tokenizer is None:
        raise SourceError(f"{path}: {why}; copy the tokenizer files of the source there")
    model = load(path, device=device, trust_remote_code=trust_remote_code, compile=compiled)
    done = stream_chat(
        model,
        tokenizer,
        prompt,
        lambda text: echo_result(text, nl=False),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat_template=not no_chat,
    )
    click.echo()
    if stats:
        click.echo(printable_lines(statistics(model, done)), err=True)
    elif not quiet:
        click.echo(f"{count(done.new_tokens, 'token')}, {done.new_tokens / done.seconds:.1f} per second.", err=True)
