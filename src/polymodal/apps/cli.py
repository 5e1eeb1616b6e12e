"""The command line: parse, call, format.

Commands import what they need when they run, so that ``polymodal --help`` answers without loading torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from polymodal.core.errors import MissingExtraError, PolymodalError

app = typer.Typer(
    name="polymodal",
    help="Compose, train, measure and ask multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make, import and inspect data.", no_args_is_help=True, rich_markup_mode=None)
presets_app = typer.Typer(
    help="Recipes that ship with the package, and published models.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")
app.add_typer(presets_app, name="presets")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the recipe's choice if not given.")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint folder, or a hub id.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A preset's name or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as seed=1 precision.device=cpu."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest text to write, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that together have this chance.")
]
Seed = Annotated[int | None, typer.Option(help="Makes a draw repeatable; each is another if not given.")]
DataOut = Annotated[Path, typer.Argument(metavar="OUT", help="The JSON Lines file to write.")]
MediaTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The most tokens of all files: they get fewer tiles and frames, or less detail; as the recipe says if not "
        "given.",
    ),
]


def _command(name: str) -> Any:
    """The function of a command, from the module that does its work."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"polymodal.apps.{module}"), function)


def _version(is_asked: bool) -> None:
    if is_asked:
        from polymodal import __version__

        typer.echo(f"polymodal {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compose, train, measure and ask multimodal models."""


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all it makes; runs/PRESET if not given.")] = None,
    preset: Annotated[
        str, typer.Option(help="quickstart (minutes), scenes-full (longer and better), or a YAML file.")
    ] = "quickstart",
    scenes: Annotated[
        str | None, typer.Option(help="TRAIN,VAL,NOVEL scenes to make; the preset's if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a small model of six modalities from random weights, measure it, and write a report.

    The same command again goes on where it stopped.
    """
    _command("quickstart:run")(out or Path("runs") / Path(preset).stem, overrides or [], preset, scenes, as_json=json)


@app.command()
def ask(
    model: ModelPath,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help='Files, then the question: photo.png "What is it?"')
    ],
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    tokens: MediaTokens = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Answer a question about files. A file may be written modality:path where its name does not tell."""
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    _command("talk:ask")(model, inputs, options, device, tokens, as_json=json)


@app.command()
def chat(
    model: ModelPath,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    tokens: MediaTokens = None,
    device: Device = None,
) -> None:
    """Talk to a model; /image PATH, /audio PATH and others add files to the next message, /help lists the commands."""
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    _command("talk:chat")(model, options, device, tokens)


@app.command()
def embed(
    model: ModelPath,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Files and texts; text:... where a text looks like a file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .npy file to write float32 [N, D] to ([N, M, D] if each has several vectors); none if not given."
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Embed files and texts into the model's shared space, and show how alike they are."""
    _command("talk:embed")(model, inputs, out, device, as_json=json)


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Prove a recipe before a step is spent: every proof is a line with its figure."""
    _command("runs:check")(recipe, overrides or [], as_json=json)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME if not given.")] = None,
    json: Json = False,
) -> None:
    """Train a recipe. The same command again resumes where the run stopped."""
    _command("runs:train")(recipe, overrides or [], out, as_json=json)


@app.command()
def evaluate(
    model: ModelPath,
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK", help="JSON Lines files with questions, or task YAML files; the recipe's own if not given."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the predictions, a JSON Lines file per task; they are not kept if not given."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most this many questions per kind, or queries per search; the task's if not given."
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure a model beside its blind, shuffled-media and majority baselines."""
    _command("runs:evaluate")(model, tasks or [], out, limit, device, as_json=json)


@app.command()
def export(
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    format: Annotated[
        str, typer.Option(help="hub: a checkpoint folder as model hubs lay it out. adapter: what its adapters learned.")
    ] = "hub",
    architecture: Annotated[
        str | None, typer.Option(help="The published layout; the first that holds the model if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Hand a trained model back: the reference library and common servers read the folder."""
    if format not in ("hub", "adapter"):
        raise typer.BadParameter(f"found {format!r}, expected hub or adapter", param_hint="--format")
    if format == "adapter":
        if architecture is not None:
            raise typer.BadParameter(
                "found it beside --format adapter, which has no layouts", param_hint="--architecture"
            )
        _command("models:export_adapters")(model, out, as_json=json)
        return
    _command("models:export")(model, out, architecture, as_json=json)


@data_app.command("make")
def data_make(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="scenes or digits.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the corpus, such as num_train=2000 seed=1."),
    ] = None,
    json: Json = False,
) -> None:
    """Generate an embedded corpus."""
    _command("corpora:make")(corpus, out, options or [], as_json=json)


@data_app.command("import")
def data_import(
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="llava, coco-captions, coco-instances, folder or csv.")
    ],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What to import.")],
    out: DataOut,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the format, such as images=FOLDER.")
    ] = None,
    json: Json = False,
) -> None:
    """Turn a known data set layout into Polymodal's JSON Lines."""
    _command("corpora:bring")(format, source, out, options or [], as_json=json)


@data_app.command("inspect")
def data_inspect(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A JSON Lines file.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every file whole, not just its header.")] = False,
    json: Json = False,
) -> None:
    """Count, measure and check the samples of a file."""
    _command("corpora:inspect")(data, decode=decode, as_json=json)


@data_app.command("capfilt")
def data_capfilt(  # noqa: PLR0913 (a parameter is an option of the command)
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A JSON Lines file of view sets: one medium and a text.")
    ],
    out: DataOut,
    judge: Annotated[
        Path,
        typer.Option("--filter", help="A model whose matching head, or else shared space, tells what fits."),
    ],
    captioner: Annotated[
        Path | None,
        typer.Option(help="A model that writes a second text for every medium; texts are only filtered if not given."),
    ] = None,
    request: Annotated[str, typer.Option(help="What a captioner that chats is asked.")] = "Describe this image.",
    max_new_tokens: MaxNewTokens = 96,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    false_accept: Annotated[
        float | None,
        typer.Option(help="Share of mismatched pairs that may pass; 0.05 with a shared space if not given."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Least score of a kept pair; 0.5 with a matching head if not given.")
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Caption media with one model and drop, with another, texts that do not fit (CapFilt).

    The paper draws captions with --temperature 1 --top-p 0.9.
    """
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    options = {"request": request, "false_accept": false_accept, "threshold": threshold}
    _command("corpora:capfilt")(data, out, captioner, judge, sampling, options, device, as_json=json)


@presets_app.command("list")
def presets_list(json: Json = False) -> None:
    """List the recipes that ship with the package, and the published models."""
    _command("models:presets")(as_json=json)


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset's or a published model's name.")],
    json: Json = False,
) -> None:
    """Print a preset or a published model as YAML, ready to edit."""
    _command("models:show_preset")(name, as_json=json)


def main() -> None:
    """Run the command line; an error that the user can mend is one message, not a traceback."""
    try:
        app()
    except (PolymodalError, MissingExtraError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        typer.echo(f"error: {said}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
