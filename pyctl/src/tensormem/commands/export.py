# SPDX-License-Identifier: MIT
"""``tensormem export``: metrics for Prometheus."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import click

from .. import errors
from ..console import Command, emit, json_option
from .record import stopping

__all__ = ["export"]


def _metrics() -> Any:
    """Return the module that knows Prometheus: the rest of the package does without."""
    try:
        return importlib.import_module("tensormem.metrics")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "prometheus_client":
            raise
        raise errors.TensormemError(
            "'tensormem export' needs the Python package prometheus_client, which is missing",
            "install it: 'sudo apt install python3-prometheus-client',"
            " or 'pip install tensormem[export]'",
        ) from None


@click.command(cls=Command)
@click.option(
    "--listen", metavar="[ADDRESS:]PORT",
    help="Answer scrapes there until stopped; without ADDRESS only this machine's own.",
)  # fmt: skip
@click.option(
    "--textfile", type=click.Path(dir_okay=False), metavar="FILE.prom",
    help="Write a file for node_exporter's textfile collector, and end.",
)  # fmt: skip
@json_option
def export(listen: str | None, textfile: str | None, as_json: bool) -> None:
    """Export the module's state as metrics for Prometheus.

    It is read when it is scraped. While the module is not loaded, tensormem_up is 0. Only root
    sees the KV caches of everybody.
    """
    if (listen is None) == (textfile is None):
        raise click.UsageError("give either --listen or --textfile")
    metrics = _metrics()
    registry = metrics.registry()
    if textfile is not None:
        metrics.write_textfile(textfile, registry)
        if as_json:
            emit({"file": textfile})
        return
    host, port = metrics.address(listen)
    metrics.serve(host, port, registry)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    if as_json:
        emit({"url": url})
    else:
        click.echo(f"listening: {url}")
    with stopping():
        threading.Event().wait()
