"""The commands: each reads its config, claims its output directory, and calls the module that does the work.

Those modules are imported when their command runs: torch and xarray take seconds, ``--help`` must not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from spectralvae.config import (
    CommandConfig,
    CompressConfig,
    ConvertConfig,
    DecodeConfig,
    DecompressConfig,
    DownloadConfig,
    EncodeConfig,
    EvaluateConfig,
    ModelConfig,
    PrepareConfig,
    ProbeConfig,
    SimulateConfig,
    TrainConfig,
)
from spectralvae.config.loading import dump_config, load_config, resume_rules, to_yaml
from spectralvae.errors import ConfigError, PeerError, RunError, UserError, printable
from spectralvae.runtime.console import new_console
from spectralvae.runtime.rundir import RunDir
from spectralvae.runtime.signals import Stopped
from spectralvae.version import __version__

app = typer.Typer(
    name="spectralvae",
    help="KL-autoencoders for hyperspectral scenes. Every command reads one YAML config.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The command's config.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key.sub=value", help="Change a key of the config; may be repeated."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Clear an output_dir that this command made.")]
Debug = Annotated[bool, typer.Option("--debug", help="200 steps on reduced data with everything written often.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List names and bytes; nothing is written.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")]

console = new_console()
C = TypeVar("C", bound=CommandConfig)


_config_file: Path | None = None  # of the command at work; `run` names it in errors that name no file


def _read(
    schema: type[C], path: Path, settings: list[str] | None, print_config: bool = False, *, debug: bool = False
) -> C:
    global _config_file
    _config_file = path
    config = load_config(schema, path, settings or [], debug=debug)
    if print_config:
        sys.stdout.write(to_yaml(dump_config(config)))
        if rules := resume_rules(schema):
            print("# These keys may differ when the run is resumed:")
            print(*(f"#   {key} ({rule})" for key, rule in rules.items()), sep="\n")
        raise typer.Exit
    return config


def _claim(command: str, config: CommandConfig, overwrite: bool) -> RunDir:
    run = RunDir(command, config, overwrite=overwrite)
    if run.opens_as == "finished":
        _say_finished(config)
        raise typer.Exit
    return run


def _say_finished(config: CommandConfig) -> None:
    console.print(f"{config.output_dir}: this run is finished; nothing to do (--overwrite starts it afresh)")


@app.command()
def simulate(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Write synthetic TEMPO granules with known truth."""
    cfg = _read(SimulateConfig, config, set_, print_config)
    run = _claim("simulate", cfg, overwrite)
    from spectralvae.simulate import simulate_granules

    with run:
        paths = simulate_granules(
            run.path,
            seed=cfg.seed,
            n_granules=cfg.n_granules,
            shape=(cfg.shape[0], cfg.shape[1]),
            n_channels=cfg.n_channels,
            products=cfg.products,
            invalid_fraction=cfg.invalid_fraction,
            scans_per_day=cfg.scans_per_day,
            noise=cfg.noise,
            version=cfg.version,
            planted=cfg.plant,
        )
    console.print(f"{run.path}: {len(paths)} files")


@app.command()
def download(
    config: Config,
    set_: Set = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    print_config: PrintConfig = False,
) -> None:
    """Fetch TEMPO granules from NASA Earthdata: level 1 with level 2."""
    cfg = _read(DownloadConfig, config, set_, print_config)
    if dry_run:
        from spectralvae.download import list_granules

        list_granules(cfg, console)
        return
    run = _claim("download", cfg, overwrite)
    from spectralvae.download import download as work

    work(cfg, run, console)


@app.command()
def prepare(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Turn scenes into a store: statistics, normalisation, split."""
    cfg = _read(PrepareConfig, config, set_, print_config)
    run = _claim("prepare", cfg, overwrite)
    from spectralvae.data.prepare import prepare as work

    work(cfg, run, console)


@app.command()
def train(
    config: Config,
    set_: Set = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
    print_config: PrintConfig = False,
) -> None:
    """Train the network on a store; started again, it resumes where it stopped."""
    cfg = _read(TrainConfig, config, set_, print_config, debug=debug)
    from spectralvae.runtime.ranks import find_ranks

    ranks = find_ranks()
    console.quiet = not ranks.is_main
    with ranks.joined(cfg.training.peer_timeout):
        run = ranks.on_main(RunDir, "train", cfg, overwrite=overwrite)
        if ranks.broadcast(run is not None and run.opens_as == "finished"):
            _say_finished(cfg)
            return
        from spectralvae.training.trainer import train as work

        work(cfg, run, ranks, console)


@app.command()
def doctor(
    config: Config,
    set_: Set = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Try out a train config, its store and this machine; nothing is changed."""
    cfg = _read(TrainConfig, config, set_)
    from spectralvae.training.doctor import doctor as work

    work(cfg, as_json=json, console=console)


@app.command()
def encode(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Turn scenes into latents, one file each; started again, it resumes with the files that are left."""
    cfg = _read(EncodeConfig, config, set_, print_config)
    from spectralvae.inference.encode import encode as work

    _share_files("encode", cfg, overwrite, work)


@app.command()
def decode(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Turn latents into radiance, in files laid out like their sources; it resumes as encode does."""
    cfg = _read(DecodeConfig, config, set_, print_config)
    from spectralvae.inference.decode import decode as work

    _share_files("decode", cfg, overwrite, work)


@app.command()
def compress(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Turn scenes into small files, to a size or an error, which may be bounded; it resumes as encode does."""
    cfg = _read(CompressConfig, config, set_, print_config)
    from spectralvae.codec.compress import compress as work

    _share_files("compress", cfg, overwrite, work)


@app.command()
def decompress(
    config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False
) -> None:
    """Turn files of compress into radiance, in files laid out like their sources; it resumes as encode does."""
    cfg = _read(DecompressConfig, config, set_, print_config)
    from spectralvae.codec.decompress import decompress as work

    _share_files("decompress", cfg, overwrite, work)


def _share_files(command: str, config: ModelConfig, overwrite: bool, work: Callable[..., None]) -> None:
    """Run a command of which each process does some of the files."""
    from spectralvae.files.jobs import LONGEST_WAIT
    from spectralvae.runtime.ranks import find_ranks

    ranks = find_ranks()
    console.quiet = not ranks.is_main
    with ranks.joined(LONGEST_WAIT):
        run = ranks.on_main(RunDir, command, config, overwrite=overwrite)
        if ranks.broadcast(run is not None and run.opens_as == "finished"):
            _say_finished(config)
            return
        work(config, run, ranks, console)


@app.command()
def evaluate(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Judge the checkpoints of a run on all its validation tiles, beside PCA and the mean."""
    cfg = _read(EvaluateConfig, config, set_, print_config)
    run = _claim("evaluate", cfg, overwrite)
    from spectralvae.analysis.evaluate import evaluate as work

    work(cfg, run, console)


@app.command()
def probe(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Predict level-2 products from latents: what do these tell of the atmosphere?"""
    cfg = _read(ProbeConfig, config, set_, print_config)
    run = _claim("probe", cfg, overwrite)
    from spectralvae.analysis.probe import probe as work

    work(cfg, run, console)


@app.command()
def convert(config: Config, set_: Set = None, overwrite: Overwrite = False, print_config: PrintConfig = False) -> None:
    """Turn a model into an export folder, or into a file for mltools."""
    cfg = _read(ConvertConfig, config, set_, print_config)
    run = _claim("convert", cfg, overwrite)
    from spectralvae.convert.export import convert as work

    work(cfg, run, console)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A store, run, model, latents, compressed file, scene or level-2 product.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it and check digests, counts, statistics.")
    ] = False,
) -> None:
    """Tell what a file or folder is, and whether it is sound; nothing is changed."""
    from spectralvae.inspection import inspect as work

    work(path.expanduser(), verify=verify, as_json=json, console=console)


def _version(value: bool) -> None:
    if value:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _fail(message: str, code: int) -> int:
    print(f"spectralvae: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def run(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code (see README)."""
    global _config_file
    _config_file = None
    try:
        result = app(arguments, prog_name="spectralvae", standalone_mode=False)
        if result == 130:  # Ctrl-C, as typer reports it
            return _fail("interrupted", 130)
        return result if isinstance(result, int) else 0
    except UserError as error:
        # an error without a key, or about a $VARIABLE, is about the environment
        of_config = isinstance(error, ConfigError) and error.key is not None and not error.key.startswith("$")
        if of_config and error.path is None:
            error = error.with_parts(path=_config_file)
        return _fail(str(error), 2)
    except PeerError as error:  # the process that failed says so itself, and the first one for all
        return 1 if console.quiet else _fail(str(error), 1)
    except RunError as error:
        return _fail(str(error), 1)
    except Stopped as stopped:
        return stopped.exit_code
    except typer.TyperException as error:  # wrong usage; without arguments the help is printed instead
        return _fail(error.format_message(), 2) if error.format_message() else 2
    except OSError as error:  # a full disk, a lost file system: what went wrong is not in the program
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)


def main() -> None:
    """Entry point of the `spectralvae` command."""
    sys.exit(run())
