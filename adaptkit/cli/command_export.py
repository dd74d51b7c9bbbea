"""`adaptkit export`: the backbone of a run for other tools."""

from __future__ import annotations

import sys

import click

from adaptkit.cli.options import Words, as_json, quiet
from adaptkit.errors import UsageError

FORMATS = ("timm", "onnx", "torch")


@click.command("export", short_help="Write a run's backbone for ONNX Runtime, torch.export or timm.")
@click.argument("run")
@click.option("--format", "form", type=Words(FORMATS), help="A folder for timm, else one file.")
@click.option("--output", metavar="PATH", help="The folder or file to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output.")
@click.option(
    "--push-to-hub", "repo", metavar="ORG/NAME", help="Upload backbone and model card to the Hugging Face hub."
)
@click.option("--public", is_flag=True, help="A repository of the hub that is made is public.  [default: private]")
@as_json
@quiet
def export_command(
    run: str,
    form: str | None,
    output: str | None,
    overwrite: bool,
    repo: str | None,
    public: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the backbone of the finished run in the folder RUN in another format.

    It is loaded again and compared with the run's on 64 of its images before the command succeeds. onnx and torch take
    normalised images, float32, in batches of any size; how to normalise is in the file and in the JSON document.
    """
    if repo is None and (form is None or output is None):
        raise UsageError("give --format and --output, or --push-to-hub ORG/NAME")
    if repo is not None and (form is not None or output is not None):
        raise UsageError("--push-to-hub uploads the timm folder; leave --format and --output out")
    if public and repo is None:
        raise UsageError("--public is about --push-to-hub")
    from adaptkit.cli.console import RichReporter, StreamConsole
    from adaptkit.cli.listing import line
    from adaptkit.cli.summary import print_document

    console = StreamConsole(sys.stdout)
    if repo is not None:
        with RichReporter(quiet) as reporter:
            reporter.phase(f"uploading {run} to {repo}")
            from adaptkit.pushing import push_run  # imports torch

            pushed = push_run(run, repo, private=not public)
        if as_json:
            print_document(pushed)
        else:
            line(console, f"uploaded  {pushed['url']}")
        return
    with RichReporter(quiet) as reporter:
        reporter.phase(f"exporting {run} as {form}")
        from adaptkit.formats import export_run  # imports torch

        document = export_run(run, str(form), str(output), overwrite=overwrite).document
    if as_json:
        print_document(document)
        return
    line(console, f"export    {document['output']}")
    line(console, f"checked   differs by {document['max_difference']:.1e} at most, {document['compared_on']}")
