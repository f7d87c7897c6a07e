"""vmoe-export BUNDLE --triton-repo DIR on a machine without torch: a bundle's files as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vmoe import cli
from vmoe.errors import MissingDependencyError

from . import command, refuse_existing


@cli.command(
    "vmoe-export",
    "vmoe-export runs/export/mine-split --triton-repo models",
    "vmoe-export --triton-repo models --dry-run",
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@command.options
@click.option("--overwrite", is_flag=True, help="Replace a repository that is there.")
@click.option("--dry-run", is_flag=True, help="Show the models; write nothing.")
@cli.config_option
@cli.json_option
def main(
    bundle: Path | None, triton_repo: Path | None, overwrite: bool, dry_run: bool,
    config: Path | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Write the model repository of BUNDLE, its parts as they are; needs no torch.

    BUNDLE is what vmoe-export wrote, lowering split; left out, the newest under runs/, else the
    one that ships. To export a checkpoint, and for the other flags: pip install 'vmoe[train,cpu]'.
    """
    if not command.is_bundle(bundle):
        raise MissingDependencyError(
            f"{bundle} is no bundle; exporting a checkpoint needs torch, which is not installed: "
            "pip install 'vmoe[train,cpu]'."
        )
    how = command.of_flags(triton_repo, flags)
    assert how is not None  # else this is not the command that was called
    refuse_existing(how.folder, overwrite=overwrite)
    command.run(bundle, how, overwrite=overwrite, dry_run=dry_run, as_json=as_json)


if __name__ == "__main__":
    main()
